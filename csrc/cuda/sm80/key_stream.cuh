// Whole tiles of K and V, one behind the other, by cp.async, from rows one behind the other or from
// the pages of a cache.
//
// A thread keeps its chunk of 16 bytes of a row and moves a pointer into K and one into V down the
// rows.  Pages of a multiple of RUN keys hold whole runs of rows, which therefore lie one behind
// the other: what page comes next is asked where one ends, once for all of its rows of K and V, and
// its number was read when the page before it began.
#pragma once
#include "rows.cuh"

namespace attn::cuda::sm80 {

// The largest power of two that is at most n and at most 16.
constexpr int rows_at_a_time(int n) {
  return n >= 16 ? 16 : n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
}

template <class T, int HEAD_DIM, int ROWS, int THREADS, bool PAGED>
struct KeyStream {
  using R = Row<T, HEAD_DIM>;
  static constexpr int RUN = 16;
  static constexpr int STEP = rows_at_a_time(THREADS / R::CHUNKS);  // rows that the CTA copies
  static_assert(ROWS % RUN == 0 && THREADS >= R::CHUNKS);
  static_assert(STEP >= 8 || R::BYTES % 128 == 0, "the swizzle of a step is no change of a chunk");

  const char *K, *V;     // the thread's chunk of its next rows
  uint32_t to;           // the same in a tile
  int left;              // runs left in the page
  int page, last, next;  // its place in the table, that of the last one, and the next one's entry
  bool inside_k, inside_v;  // columns behind the head dimension are zeros

  // Whether rows can be copied so.
  ATTN_DEVICE static bool serves(const Params& p) {
    return p.k_vec && p.v_vec && !(PAGED && p.page.by % RUN);
  }
  ATTN_DEVICE static int row() { return thread_id() / R::CHUNKS; }
  ATTN_DEVICE static int chunk() { return thread_id() % R::CHUNKS; }

  // From key `first` on, a multiple of RUN; end: behind the last key.
  ATTN_DEVICE void begin(const Params& p, const Rows& keys, const Rows& values, int first,
                         int end) {
    to = tile_address<T, HEAD_DIM>(0, row(), chunk());
    inside_k = chunk() * R::PER_CHUNK < int(p.p.head_dim);
    inside_v = chunk() * R::PER_CHUNK < int(p.p.head_dim_v);
    if (PAGED && keys.table) {
      page = p.page.quotient(first) - 1, last = p.page.quotient(end - 1);
      next = keys.table[page + 1];
      turn(p, keys, values, first - (page + 1) * p.page.by);
    } else {
      left = 0x7fffffff;
      K = keys.base + (first + row()) * keys.stride + 16 * chunk();
      V = values.base + (first + row()) * values.stride + 16 * chunk();
    }
  }
  // To key `first` of the next page.
  ATTN_DEVICE void turn(const Params& p, const Rows& keys, const Rows& values, int first) {
    const int64_t at = keys.page(next);
    K = keys.base + at * keys.outer + (first + row()) * keys.stride + 16 * chunk();
    V = values.base + at * values.outer + (first + row()) * values.stride + 16 * chunk();
    left = (p.page.by - first) / RUN;
    ++page;
    next = keys.table[min_int(page + 1, last)];
  }
  // The next tile; the caller commits and waits.
  ATTN_DEVICE void copy(const Params& p, const Rows& keys, const Rows& values, uint32_t K_tile,
                        uint32_t V_tile) {
    if (THREADS != STEP * R::CHUNKS && thread_id() >= STEP * R::CHUNKS) return;
    const int64_t k_step = STEP * keys.stride, v_step = STEP * values.stride;
    ATTN_UNROLL
    for (int run = 0; run < ROWS; run += RUN) {
      if (PAGED && left == 0) turn(p, keys, values, 0);
      --left;
      ATTN_UNROLL
      for (int r = run; r < run + RUN; r += STEP, K += k_step, V += v_step) {
        const uint32_t at = (to ^ (row_swizzle<T, HEAD_DIM>(r) << 4)) + r * R::BYTES;
        cp_async_16(K_tile + at, K, inside_k);
        cp_async_16(V_tile + at, V, inside_v);
      }
    }
  }
};

}  // namespace attn::cuda::sm80
