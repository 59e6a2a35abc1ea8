// The pool of parallel.h.  Workers sleep on a condition variable between calls.  After fork() the
// child owns none of the threads, so it starts with an empty pool.
//
// OpenMP's threads spin between calls, and its regions end when every thread has arrived.  Where
// other processes have the cores, a thread may arrive milliseconds late, or lose its core for so
// long.  Where regions lose more time in this way than they take otherwise, calls begin on the
// caller's thread alone for a while (`Alone`), so that short ones need no other thread, and the
// idle threads go to sleep.
#include "cpu/parallel.h"

#include <pthread.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <limits>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#include "cpu/alone.h"

namespace attn::cpu {
namespace {

// Nanoseconds of a clock that only grows.
int64_t now() {
  return std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Nanoseconds that this thread has had a core.
int64_t on_core() {
#ifdef CLOCK_THREAD_CPUTIME_ID
  timespec t{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
  return int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
#else
  return now();
#endif
}

constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

struct Job {
  const TaskFunction f;
  const int64_t tasks;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error{};  // written once, by the thread that set `failed`

  // Tasks until there are none, or until this thread has had a core for so long.
  void work(int64_t most = kForever) {
    const bool ends = most != kForever;
    const int64_t core = ends ? on_core() : 0;
    int64_t until = ends ? now() + most : kForever;
    for (;;) {
      if (ends && now() >= until) {
        // The time in which another process had the core is none that more threads would save.
        const int64_t left = most - (on_core() - core);
        if (left <= 0) return;
        until = now() + left;
      }
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      if (task >= tasks) return;
      try {
        if (!failed.load(std::memory_order_relaxed)) f(task);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

Alone alone;

class Pool {
 public:
  // Runs the job on `threads` threads; false when another caller has the pool.
  bool run(Job& job, int threads) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < threads - 1) {
        try {
          std::thread([this, id = workers_] { loop(id); }).detach();
        } catch (const std::system_error&) {
          break;  // no more threads to be had: go on with those there are
        }
        ++workers_;
      }
      job_ = &job;
      wanted_ = threads - 1 < workers_ ? threads - 1 : workers_;
      running_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });  // no worker may touch `job` after this
    job_ = nullptr;
    return true;
  }

  std::mutex owner_;  // held by the caller whose job runs
  std::mutex mutex_;  // guards all below

 private:
  void loop(int id) {
    uint64_t seen = 0;
    for (;;) {
      Job* job;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (id >= wanted_) continue;
        job = job_;
      }
      job->work();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  int workers_ = 0, wanted_ = 0, running_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its detached threads may outlive static destructors.
alignas(Pool) unsigned char storage[sizeof(Pool)];
Pool* pool = nullptr;

void before_fork() {
  pool->owner_.lock();
  pool->mutex_.lock();
}
void after_fork_parent() {
  pool->mutex_.unlock();
  pool->owner_.unlock();
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
std::atomic<GompParallel> team{nullptr};

void after_fork_child() {
  pool = new (storage) Pool;
  team = nullptr;  // libgomp hangs in the child of a process that has used it
}

Pool& the_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new (storage) Pool;
    pthread_atfork(before_fork, after_fork_parent, after_fork_child);
  });
  return *pool;
}

}  // namespace

void use_openmp(uintptr_t gomp_parallel) {
  the_pool();  // registers the fork handlers
  team = reinterpret_cast<GompParallel>(gomp_parallel);
}

static void raise(std::atomic<int64_t>& most, int64_t x) {
  int64_t seen = most.load(std::memory_order_relaxed);
  while (x > seen && !most.compare_exchange_weak(seen, x, std::memory_order_relaxed)) {
  }
}

// On torch's threads, of which the caller's is one.
static void on_team(GompParallel openmp, Job& job, int threads) {
  const int64_t time = now();
  if (alone.now_is(time)) {
    job.work(Alone::kTrial);
    if (job.next.load(std::memory_order_relaxed) >= job.tasks) return;
  }
  struct Region {
    Job* job;
    int64_t begin;
    std::atomic<int64_t> late{0}, work{0};
  } region{&job, now()};
  const bool awake = alone.awake(region.begin);
  openmp(
      [](void* data) {
        auto* r = static_cast<Region*>(data);
        raise(r->late, now() - r->begin);
        const int64_t core = on_core();
        r->job->work();
        raise(r->work, on_core() - core);
      },
      &region, unsigned(threads), 0);
  const int64_t end = now(), took = end - region.begin - (awake ? 0 : region.late.load());
  alone.learn(end, region.work, std::max<int64_t>(0, took - region.work));
}

void parallel_for(int64_t tasks, int threads, TaskFunction f) {
  Job job{f, tasks};
  if (threads > tasks) threads = static_cast<int>(tasks);
  const GompParallel openmp = team.load(std::memory_order_relaxed);
  if (threads > 1 && openmp)
    on_team(openmp, job, threads);
  else if (threads <= 1 || !the_pool().run(job, threads))
    job.work();
  if (job.failed) std::rethrow_exception(job.error);
}

}  // namespace attn::cpu
