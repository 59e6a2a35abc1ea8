#include "fiber.h"

#include <sys/mman.h>

#include <new>

#ifndef ATTN_FIBER_UCONTEXT
// Saves the registers that a call must keep, swaps stacks, restores.  (System V ABI, x86-64.)
asm(R"(
.text
.hidden attn_switch_stack
.globl attn_switch_stack
.type attn_switch_stack, @function
attn_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size attn_switch_stack, .-attn_switch_stack
)");
#endif

namespace attn::emulation {
namespace {
constexpr size_t SLOT = STACK_BYTES + GUARD_BYTES;

// Lanes run the same code at the same depth: without an offset all their locals share a few sets of
// the first-level cache.
size_t stagger(int index) { return size_t(index % 64) * 192; }
}  // namespace

void StackPool::reserve(int count) {
  if (count <= count_) return;
  void* map =
      mmap(nullptr, SLOT * count, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (map == MAP_FAILED) throw std::bad_alloc();
  auto* base = static_cast<uint8_t*>(map);
  for (int i = 0; i < count; ++i) {
    if (mprotect(base + i * SLOT + GUARD_BYTES, STACK_BYTES, PROT_READ | PROT_WRITE) != 0) {
      munmap(map, SLOT * count);
      throw std::bad_alloc();
    }
  }
  if (base_) munmap(base_, SLOT * count_);
  base_ = base;
  count_ = count;
}

void StackPool::prepare(Context& context, int index, void (*entry)()) const {
  uint8_t* bottom = base_ + index * SLOT + GUARD_BYTES;
  const size_t usable = STACK_BYTES - stagger(index);
#ifdef ATTN_FIBER_UCONTEXT
  getcontext(&context.u);
  context.u.uc_stack.ss_sp = bottom;
  context.u.uc_stack.ss_size = usable;
  context.u.uc_link = nullptr;
  makecontext(&context.u, entry, 0);
#else
  // From the top: a zero return address that ends stack traces, entry's address, six registers.
  // After `ret`, %rsp is 8 below a multiple of 16, as at any function's first instruction.
  auto* top = reinterpret_cast<void**>(bottom + usable - 64);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  context.stack_pointer = top - 8;
#endif
}

int StackPool::guard_hit(const void* address) const {
  const auto* p = static_cast<const uint8_t*>(address);
  if (!base_ || p < base_ || p >= base_ + SLOT * count_) return -1;
  const size_t offset = size_t(p - base_);
  return offset % SLOT < GUARD_BYTES ? int(offset / SLOT) : -1;
}

}  // namespace attn::emulation
