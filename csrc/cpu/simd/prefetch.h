// Brings n rows of `bytes` each towards the second-level cache.
#pragma once
#include "cpu/simd/vector.h"

namespace attn::cpu::ATTN_ISA {

// Always inline: g++ takes a function that only prefetches for one without effect, and drops calls.
// LOCALITY: of __builtin_prefetch; 0: for one use.
template <int LOCALITY = 2>
ATTN_INLINE void prefetch_rows(const void* base, int64_t n, int64_t row_step, int64_t bytes) {
  const char* row = static_cast<const char*>(base);
  for (int64_t i = 0; i < n; ++i, row += row_step)
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, LOCALITY);
}

// Lines that a loop prefetches, one or two a turn; the last of them again when there are no more.
struct Lines {
  const char *at, *last;
  ATTN_INLINE void one() {
    __builtin_prefetch(at, 0, 2);
    at = at < last ? at + 64 : last;
  }
};

// Memory that is touched soon, brought towards the second-level cache a line at a time by the loops
// of products, or a few between them where its rows lie apart: all at once they would fill the
// queue of misses, and the next loads wait.
class Prefetch {
 public:
  // at_once: for units whose blocks are too narrow to be interrupted (gemm.h).
  explicit Prefetch(bool at_once = false) : at_once_(at_once) {}

  // n rows of `bytes` each, after what was added before ...
  void add(const void* base, int64_t n, int64_t row_step, int64_t bytes) {
    if (at_once_) return prefetch_rows(base, n, row_step, bytes);
    if (n > 0 && bytes > 0 && end_ - begin_ < kRanges)
      ranges_[end_++ % kRanges] = range(base, n, row_step, bytes);
  }
  // ... or before it, at the cost of the last one where there is no room.
  void add_first(const void* base, int64_t n, int64_t row_step, int64_t bytes) {
    if (at_once_) return prefetch_rows(base, n, row_step, bytes);
    if (n <= 0 || bytes <= 0) return;
    if (end_ - begin_ == kRanges) --end_;
    ranges_[--begin_ % kRanges] = range(base, n, row_step, bytes);
  }
  // The next lines, so many at most, for a loop; `idle`, which is in the cache, where there are
  // none.
  ATTN_INLINE Lines some(int64_t most, const void* idle) {
    const char* at = static_cast<const char*>(idle);
    if (begin_ == end_) return {at, at};
    return next(most, at);
  }
  // The next few lines at once.
  ATTN_INLINE void some() {
    if (begin_ != end_) fetch(lines_);
  }
  // All that is there is to come within some `calls` of some(), as far as that is good.
  void spread(int64_t calls) {
    int64_t bytes = 0;
    for (unsigned i = begin_; i != end_; ++i)
      bytes += ranges_[i % kRanges].rows * ranges_[i % kRanges].bytes;
    lines_ = std::clamp(bytes / 64 / std::max<int64_t>(calls, 1), kLines, kMostLines);
  }

 private:
  static constexpr unsigned kRanges = 16;
  static constexpr int64_t kLines = 32, kMostLines = 96;
  struct Range {
    const char* row;
    int64_t rows, row_step, bytes, at;
  };
  Range ranges_[kRanges];
  const bool at_once_;
  unsigned begin_ = 0, end_ = 0;  // modulo 2^32
  int64_t lines_ = kLines;

  static Range range(const void* base, int64_t n, int64_t row_step, int64_t bytes) {
    const bool dense = row_step == bytes;
    return {static_cast<const char*>(base), dense ? 1 : n, row_step, dense ? n * bytes : bytes, 0};
  }

  __attribute__((noinline)) Lines next(int64_t most, const char* idle) {
    Range& r = ranges_[begin_ % kRanges];
    if (r.rows > 1) {
      fetch(lines_);
      return {idle, idle};
    }
    const int64_t left = (r.bytes - r.at + 63) / 64, n = std::min(left, most);
    const char* line = r.row + r.at;
    r.at += 64 * n;
    if (n == left) ++begin_;
    return n > 0 ? Lines{line, line + 64 * (n - 1)} : Lines{idle, idle};
  }

  __attribute__((noinline)) void fetch(int64_t lines) {
    for (; begin_ != end_; ++begin_) {
      Range& r = ranges_[begin_ % kRanges];
      for (; r.rows > 0; --r.rows, r.row += r.row_step, r.at = 0) {
        const int64_t left = (r.bytes - r.at + 63) / 64, n = std::min(left, lines);
        const char* line = r.row + r.at;
        for (int64_t i = 0; i < n; ++i) __builtin_prefetch(line + 64 * i, 0, 2);
        lines -= n;
        if (n < left) {
          r.at += 64 * n;
          return;
        }
      }
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
