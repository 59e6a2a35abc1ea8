// What the kernels ask of the rest of attn_ext._C, by the calling thread alone: for kernels that a
// test compiles by themselves.
#pragma once

#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace attn::cpu {

ScratchBuffer& thread_scratch() {
  thread_local ScratchBuffer buffer;
  return buffer;
}

void parallel_for(int64_t tasks, int, TaskFunction f) {
  for (int64_t task = 0; task < tasks; ++task) f(task);
}

}  // namespace attn::cpu
