// The text of the CPU kernels for one ISA.  No include guard: each isa_*.cpp includes it once,
// inside its target region, after it defined ATTN_ISA (a namespace), ATTN_VEC_BYTES, ATTN_NV and
// ATTN_MR.
namespace attn::cpu::ATTN_ISA {

#include "cpu/simd.h"

// Queries of one head go through the kernels in panels, and the bands of causal and window
// attention are cut by grain.
constexpr int64_t kPanel = 64, kGrain = 16, kGrains = kPanel / kGrain;

// clang-format off: the order of use
#include "cpu/transpose.h"
#include "cpu/prefetch.h"
#include "cpu/gemm.h"
#ifdef ATTN_AMX
#include "cpu/tiles.h"
#include "cpu/gemm_amx.h"
#endif
#include "cpu/rows.h"
#include "cpu/dropout.h"
#include "cpu/mask.h"
#include "cpu/score.h"
#include "cpu/forward.h"
#include "cpu/gradient.h"
#include "cpu/backward.h"
#include "cpu/decode.h"
#ifndef ATTN_BF16_DOT
#include "cpu/family_tile.h"
#include "cpu/additive.h"
#include "cpu/family.h"
#include "cpu/family_backward.h"
#include "cpu/inspect.h"
#endif
// clang-format on

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
