// The pool of parallel.h.  Workers sleep on a condition variable between calls.  After fork() the
// child owns none of the threads, so it starts with an empty pool.
//
// OpenMP's threads spin between calls, and its regions end when every thread has arrived.  Where
// other processes have the cores, a thread may arrive milliseconds late, or lose its core for so
// long.  After that, calls begin on the caller's thread alone for a while (`Alone`), so that
// short ones need no other thread, and the idle threads go to sleep.
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
  const std::function<void(int64_t)>* f = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written once, by the thread that set `failed`

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
        if (!failed.load(std::memory_order_relaxed)) (*f)(task);
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  }
};

// Until when calls begin alone.  Each region in which a thread had no core doubles the time, each
// other one shortens it.
class Alone {
 public:
  bool now_is(int64_t time) const { return time < until_.load(std::memory_order_relaxed); }

  // lost: the longest that a thread came late or was without a core.
  void learn(int64_t lost) {
    int64_t hold = hold_.load(std::memory_order_relaxed);
    if (lost < kLate) {
      if (hold > 0) hold_.store(hold - hold / 64 - 1, std::memory_order_relaxed);
      return;
    }
    hold = std::min(std::max(2 * hold, kShortest), kLongest);
    hold_.store(hold, std::memory_order_relaxed);
    until_.store(now() + hold, std::memory_order_relaxed);
  }

  // What a call may take of its core alone before it asks for the others after all.
  static constexpr int64_t kTrial = 2'000'000;

 private:
  // A sleeping thread of an idle machine comes within some 100 us; a slice of the scheduler, which
  // one that lost its core waits for, is milliseconds.
  static constexpr int64_t kLate = 500'000;
  static constexpr int64_t kShortest = 50'000'000, kLongest = 1'000'000'000;
  std::atomic<int64_t> hold_{0}, until_{0};
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
    std::atomic<int64_t> lost{0};
  } region{&job, now()};
  openmp(
      [](void* data) {
        auto* r = static_cast<Region*>(data);
        const int64_t start = now(), core = on_core();
        r->job->work();
        const int64_t lost = std::max(start - r->begin, now() - start - (on_core() - core));
        if (lost > r->lost.load(std::memory_order_relaxed)) r->lost.store(lost);
      },
      &region, unsigned(threads), 0);
  alone.learn(region.lost);
}

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& f) {
  Job job;
  job.f = &f;
  job.tasks = tasks;
  if (threads > tasks) threads = static_cast<int>(tasks);
  const GompParallel openmp = team.load(std::memory_order_relaxed);
  if (threads > 1 && openmp)
    on_team(openmp, job, threads);
  else if (threads <= 1 || !the_pool().run(job, threads))
    job.work();
  if (job.failed) std::rethrow_exception(job.error);
}

}  // namespace attn::cpu
