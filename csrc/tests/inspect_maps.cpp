// The kernels of attn_ext.inspect on the plainest vectors, as a library of their own in which tests
// plant bugs (tests/cpu/test_inspect_kernel_mutations.py) and whose function attn_ext._C then
// calls.
#include "cpu/kernels/inspect.h"
#include "one_thread.h"

extern "C" void planted_inspect(const attn::Problem& p, const attn::Pointers& ptr,
                                const attn::cpu::Options& o, const attn::cpu::Map& wanted,
                                int threads) {
  attn::cpu::baseline::Inspect<float>(p, ptr, o, wanted, threads).run();
}
