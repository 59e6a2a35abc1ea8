// Fibers: one stack and one saved context per emulated CUDA thread, switched without system calls.
// x86-64 has a hand-written switch; other CPUs (or -DATTN_FIBER_UCONTEXT) use ucontext, whose
// signal-mask system calls make kernels about five times slower.
#pragma once
#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) && !defined(ATTN_FIBER_UCONTEXT)
#define ATTN_FIBER_UCONTEXT 1
#endif
#ifdef ATTN_FIBER_UCONTEXT
#include <ucontext.h>
#endif

namespace attn::emulation {

// A kernel compiled from PTX without optimisation has a variable for each of its registers.
constexpr size_t STACK_BYTES = 256 * 1024, GUARD_BYTES = 4096;

#ifdef ATTN_FIBER_UCONTEXT
struct Context {
  ucontext_t u;
};
inline void switch_context(Context& from, Context& to) { swapcontext(&from.u, &to.u); }
#else
struct Context {
  void* stack_pointer = nullptr;
};
extern "C" void attn_switch_stack(void** save, void* load);
inline void switch_context(Context& from, Context& to) {
  attn_switch_stack(&from.stack_pointer, to.stack_pointer);
}
#endif

// Stacks of all emulated threads, each with a guard page below it.  Mapped once a process.
class StackPool {
 public:
  // Throws std::bad_alloc when the address space cannot be mapped.
  void reserve(int count);
  // A context that starts `entry`, which must never return, on stack `index`.
  void prepare(Context& context, int index, void (*entry)()) const;
  // The stack whose guard page holds this address, or -1.
  int guard_hit(const void* address) const;

 private:
  uint8_t* base_ = nullptr;
  int count_ = 0;
};

}  // namespace attn::emulation
