// A small pool of threads for one call at a time.  parallel_for(n, threads, f) runs f(task) for
// each task in [0, n), handing tasks out in ascending order from one counter; the caller takes
// part.  A caller that finds the pool busy (another Python thread is in a kernel) runs its tasks
// itself.  The first exception of a task is rethrown in the caller.
#pragma once
#include <cstdint>
#include <functional>

namespace attn::cpu {

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& f);

}  // namespace attn::cpu
