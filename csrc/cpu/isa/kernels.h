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
#include "cpu/kernels/family.h"
#include "cpu/kernels/family_backward.h"
#include "cpu/kernels/inspect.h"
#endif

#ifdef ATTN_AMX
namespace attn::cpu::avx512_bf16 {
void forward(const Problem& p, const Pointers& ptr, int threads);
}
#endif

namespace attn::cpu::ATTN_ISA {

#if defined(ATTN_AMX)
void forward(const Problem& p, const Pointers& ptr, int threads) {
  if (Decode<DType::kBFloat16>::serves(p, ptr))  // too thin for tiles
    avx512_bf16::forward(p, ptr, threads);
  else
    Forward<AmxPairs>(p, ptr, threads).run();
}

void backward(const Problem& p, const Pointers& ptr, int threads) {
  Backward<AmxPairs>(p, ptr, threads).run();
}
#elif defined(ATTN_BF16_DOT)
void forward(const Problem& p, const Pointers& ptr, int threads) {
  if (!decode<DType::kBFloat16>(p, ptr, threads)) Forward<Bf16Pairs>(p, ptr, threads).run();
}

void backward(const Problem& p, const Pointers& ptr, int threads) {
  Backward<Bf16Pairs>(p, ptr, threads).run();
}
#else
void forward(const Problem& p, const Pointers& ptr, int threads) {
  if (p.dtype == DType::kFloat64)
    Forward<Plain<double>>(p, ptr, threads).run();
  else if (!decode<DType::kFloat32>(p, ptr, threads) && !decode<DType::kFloat16>(p, ptr, threads) &&
           !decode<DType::kBFloat16>(p, ptr, threads))
    Forward<Plain<float>>(p, ptr, threads).run();
}

void backward(const Problem& p, const Pointers& ptr, int threads) {
  if (p.dtype == DType::kFloat64)
    Backward<Plain<double>>(p, ptr, threads).run();
  else
    Backward<Plain<float>>(p, ptr, threads).run();
}

void family_forward(const Problem& p, const Pointers& ptr, const FamilyOptions& o, int threads) {
  if (p.dtype == DType::kFloat64)
    FamilyForward<double>(p, ptr, o, threads).run();
  else
    FamilyForward<float>(p, ptr, o, threads).run();
}

void family_backward(const Problem& p, const Pointers& ptr, const FamilyOptions& o, int threads) {
  if (p.dtype == DType::kFloat64)
    FamilyBackward<double>(p, ptr, o, threads).run();
  else
    FamilyBackward<float>(p, ptr, o, threads).run();
}

void inspect(const Problem& p, const Pointers& ptr, const FamilyOptions& o,
             const InspectOptions& wanted, int threads) {
  if (p.dtype == DType::kFloat64)
    Inspect<double>(p, ptr, o, wanted, threads).run();
  else
    Inspect<float>(p, ptr, o, wanted, threads).run();
}
#endif

}  // namespace attn::cpu::ATTN_ISA
