// The kernels of second derivatives on the plainest vectors, as a library of their own in which
// tests plant bugs (tests/cpu/test_second_kernel_mutations.py) and whose functions attn_ext._C then
// calls.
#include "cpu/kernels/backward_tangent.h"
#include "cpu/kernels/tangent.h"
#include "one_thread.h"

using attn::Pointers;
using attn::Problem;
using attn::cpu::baseline::Dual;

extern "C" bool planted_tangent(const Problem& p, const Pointers& ptr, const Problem& tp,
                                const Pointers& tptr, int threads) {
  const Dual dual{p, ptr, tp, tptr};
  return attn::cpu::baseline::Tangent<float>(dual, threads).run();
}

extern "C" bool planted_backward_tangent(const Problem& p, const Pointers& ptr, const Problem& tp,
                                         const Pointers& tptr, int threads) {
  const Dual dual{p, ptr, tp, tptr};
  return attn::cpu::baseline::BackwardTangent<float>(dual, threads).run();
}
