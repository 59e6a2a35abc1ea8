// The kernels of one ISA, all of it one text.  Each isa/*.cpp includes it once, inside its target
// region, after it defined the ISA (region.h).
#pragma once
#include "cpu/isa/region.h"
#include "cpu/kernels/backward.h"
#include "cpu/kernels/decode.h"
#include "cpu/kernels/forward.h"
#ifdef ATTN_AMX
#include "cpu/simd/gemm_amx.h"
#endif
#ifndef ATTN_BF16_DOT
#include "cpu/kernels/backward_tangent.h"
#include "cpu/kernels/inspect.h"
#include "cpu/kernels/tangent.h"
#endif

namespace attn::cpu::ATTN_ISA {

// Whether the kernel for few queries may be asked: it knows whole calls of dot products alone.
inline bool may_decode(const Pointers& ptr, const Options& o) {
  return o.plain() && !o.partial && !ptr.frame;
}

#if defined(ATTN_BF16_DOT)
void forward(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  if (!may_decode(ptr, o) || !decode<DType::kBFloat16>(p, ptr, o, threads))
    Forward<Bf16Pairs>(p, ptr, o, threads).run();
}

void backward(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  Backward<Bf16Pairs>(p, ptr, o, threads).run();
}

#ifdef ATTN_AMX
void forward_tiles(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  if (!may_decode(ptr, o) || !decode<DType::kBFloat16>(p, ptr, o, threads))  // too thin for tiles
    Forward<AmxPairs>(p, ptr, o, threads).run();
}

void backward_tiles(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  Backward<AmxPairs>(p, ptr, o, threads).run();
}
#endif
#else
void forward(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  if (o.kept.rows) {
    if (!may_decode(ptr, o) || !decode<DType::kFloat32, kInt8>(p, ptr, o, threads))
      throw NotServed(
          "only calls of few queries, which kernels/decode.h serves, read rows of int8");
    return;
  }
  if (p.dtype == DType::kFloat64) return Forward<Plain<double>>(p, ptr, o, threads).run();
  const bool few = may_decode(ptr, o) && (decode<DType::kFloat32>(p, ptr, o, threads) ||
                                          decode<DType::kFloat16>(p, ptr, o, threads) ||
                                          decode<DType::kBFloat16>(p, ptr, o, threads));
  if (!few) Forward<Plain<float>>(p, ptr, o, threads).run();
}

void backward(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  if (p.dtype == DType::kFloat64)
    Backward<Plain<double>>(p, ptr, o, threads).run();
  else
    Backward<Plain<float>>(p, ptr, o, threads).run();
}

void inspect(const Problem& p, const Pointers& ptr, const Options& o, const Map& wanted,
             int threads) {
  if (p.dtype == DType::kFloat64)
    Inspect<double>(p, ptr, o, wanted, threads).run();
  else
    Inspect<float>(p, ptr, o, wanted, threads).run();
}

bool tangent(const Problem& p, const Pointers& ptr, const Problem& tp, const Pointers& tptr,
             int threads) {
  const Dual dual{p, ptr, tp, tptr};
  return Tangent<float>(dual, threads).run();
}

bool backward_tangent(const Problem& p, const Pointers& ptr, const Problem& tp,
                      const Pointers& tptr, int threads) {
  const Dual dual{p, ptr, tp, tptr};
  return BackwardTangent<float>(dual, threads).run();
}
#endif

}  // namespace attn::cpu::ATTN_ISA
