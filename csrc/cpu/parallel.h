// A small pool of threads for one call at a time.  parallel_for(n, threads, f) runs f(task) for
// each task in [0, n), handing tasks out in ascending order from one counter; the caller takes
// part.  A caller that finds the pool busy (another Python thread is in a kernel) runs its tasks
// itself.  The first exception of a task is rethrown in the caller.
#pragma once
#include <cstdint>

namespace attn::cpu {

// Run the tasks on the team of an OpenMP runtime from now on, given the address of its
// GOMP_parallel (0: on the pool again). torch's own runtime is meant: its threads spin for a while
// after each torch operation, and a second pool would have to share the cores with them
// (1,8,1024,64 float32 forward between two torch calls: 11.9 ms against 5.5).
void use_openmp(uintptr_t gomp_parallel);

// What is done for a task, by reference: the function outlives the call that it is handed to.
// std::function costs a third of a second of building for each instruction set.
class TaskFunction {
 public:
  template <class F>
  TaskFunction(const F& f)
      : f_(&f), call_([](const void* f, int64_t task) { (*static_cast<const F*>(f))(task); }) {}
  void operator()(int64_t task) const { call_(f_, task); }

 private:
  const void* f_;
  void (*call_)(const void*, int64_t);
};

void parallel_for(int64_t tasks, int threads, TaskFunction f);

}  // namespace attn::cpu
