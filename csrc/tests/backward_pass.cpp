// The backward kernel of float32 on the plainest vectors, as a library of its own in which tests
// plant bugs (tests/cpu/test_far_row_mutations.py) and which attn_ext._C then calls.
#define ATTN_ISA baseline
#define ATTN_VEC_BYTES 16
#define ATTN_NV 2
#define ATTN_MR 4
#include "cpu/isa/region.h"
#include "cpu/kernels/backward.h"
#include "one_thread.h"

extern "C" void planted_backward(const attn::Problem& p, const attn::Pointers& ptr,
                                 const attn::cpu::Options& o, int threads) {
  namespace kernels = attn::cpu::baseline;
  kernels::Backward<kernels::Plain<float>>(p, ptr, o, threads).run();
}
