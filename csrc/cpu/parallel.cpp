// The pool of parallel.h.  Workers sleep on a condition variable between calls.  After fork() the
// child owns none of the threads, so it starts with an empty pool.
#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

namespace attn::cpu {
namespace {

struct Job {
  const std::function<void(int64_t)>* f = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;  // written once, by the thread that set `failed`

  void work() {
    for (;;) {
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

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& f) {
  Job job;
  job.f = &f;
  job.tasks = tasks;
  if (threads > tasks) threads = static_cast<int>(tasks);
  const GompParallel openmp = team.load(std::memory_order_relaxed);
  if (threads > 1 && openmp)
    openmp([](void* j) { static_cast<Job*>(j)->work(); }, &job, unsigned(threads), 0);
  else if (threads <= 1 || !the_pool().run(job, threads))
    job.work();
  if (job.failed) std::rethrow_exception(job.error);
}

}  // namespace attn::cpu
