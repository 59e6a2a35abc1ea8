// The text of the CPU kernels for one ISA.  No include guard: each isa_*.cpp includes it once,
// inside its target region, after it defined ATTN_ISA (a namespace), ATTN_VEC_BYTES, ATTN_NV and
// ATTN_MR.
namespace attn::cpu::ATTN_ISA {

#include "cpu/simd.h"
// clang-format off: gemm needs simd, the kernels need gemm and score
#include "cpu/gemm.h"
#include "cpu/score.h"
#include "cpu/forward.h"
#include "cpu/backward.h"
// clang-format on

void forward(const Problem& p, const Pointers& ptr, int threads) {
  if (p.dtype == DType::kFloat64)
    Forward<double>(p, ptr, threads).run();
  else
    Forward<float>(p, ptr, threads).run();
}

void backward(const Problem& p, const Pointers& ptr, int threads) {
  if (p.dtype == DType::kFloat64)
    Backward<double>(p, ptr, threads).run();
  else
    Backward<float>(p, ptr, threads).run();
}

}  // namespace attn::cpu::ATTN_ISA
