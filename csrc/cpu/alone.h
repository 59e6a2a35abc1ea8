// When a call shall not wait for other threads: the decision of parallel.cpp apart from its clock.
// Times are nanoseconds.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

namespace attn::cpu {

// Until when calls begin alone, by what regions have cost: the time in which a thread had no core
// and the others waited for it, against the time of the busiest thread on its core.  Both are
// averages over some eight regions, so that one interruption of a machine that is idle otherwise
// changes nothing.  The time alone doubles where the regions after it go wrong again, and halves
// when they went well for as long.
class Alone {
 public:
  bool now_is(int64_t time) const { return time < until_.load(std::memory_order_relaxed); }

  // Whether the threads of a region that begins now still spin.  Threads that sleep come late on an
  // idle machine, too: by up to a tick of the scheduler, which is milliseconds.
  bool awake(int64_t time) const { return time - end_.load(std::memory_order_relaxed) < kSpinning; }

  // A region ends: for `work` the busiest thread was on a core, for `lost` no thread was or
  // the last one did not come.
  void learn(int64_t time, int64_t work, int64_t lost) {
    end_.store(time, std::memory_order_relaxed);
    const int64_t wasted = blend(lost_, lost), useful = blend(useful_, work);
    int64_t hold = hold_.load(std::memory_order_relaxed);
    if (wasted > useful) {
      hold = std::min(std::max(2 * hold, kShortest), kLongest);
      until_.store(time + hold, std::memory_order_relaxed);
      // Back to the edge: after the time alone, one more region that loses much is enough.
      lost_.store(useful, std::memory_order_relaxed);
    } else if (hold > 0 && time >= calm_.load(std::memory_order_relaxed)) {
      hold = hold > kShortest ? hold / 2 : 0;
    } else {
      return;
    }
    hold_.store(hold, std::memory_order_relaxed);
    calm_.store(std::max(time, until_.load(std::memory_order_relaxed)) + hold,
                std::memory_order_relaxed);
  }

  // What a call may take of its core alone before it asks for the others after all.
  static constexpr int64_t kTrial = 2'000'000;

 private:
  // The average with one more number; a number that another thread adds meanwhile may be lost.
  static int64_t blend(std::atomic<int64_t>& average, int64_t x) {
    const int64_t old = average.load(std::memory_order_relaxed), sum = old + (x - old) / 8;
    average.store(sum, std::memory_order_relaxed);
    return sum;
  }

  static constexpr int64_t kSpinning = 1'000'000;
  static constexpr int64_t kShortest = 50'000'000, kLongest = 1'000'000'000;
  std::atomic<int64_t> hold_{0}, until_{0}, calm_{0}, end_{0}, lost_{0}, useful_{0};
};
}  // namespace attn::cpu
