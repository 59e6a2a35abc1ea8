// The kernels of attn_ext.inspect on the plainest vectors, as a library of their own in which tests
// plant bugs (tests/cpu/test_inspect_kernel_mutations.py) and whose function attn_ext._C then
// calls.
#include "cpu/kernels/inspect.h"

namespace attn::cpu {

ScratchBuffer& thread_scratch() {
  thread_local ScratchBuffer buffer;
  return buffer;
}

void parallel_for(int64_t tasks, int, const std::function<void(int64_t)>& f) {
  for (int64_t task = 0; task < tasks; ++task) f(task);
}

}  // namespace attn::cpu

extern "C" void planted_inspect(const attn::Problem& p, const attn::Pointers& ptr,
                                const attn::cpu::Options& o, const attn::cpu::Map& wanted,
                                int threads) {
  attn::cpu::baseline::Inspect<float>(p, ptr, o, wanted, threads).run();
}
