// Rows of storage as they leave a product:  X[r] = factor * sum_k A(r, k) B[k],  where A is what a
// tile of weights holds, and the numbers of a row lie in lanes: rows of O and dQ, over keys, where
// the tile has all keys that they see, and rows of dK and dV, over queries, at a block's last
// panel. Beside gemm.h's products it needs neither sums in memory nor a transposition, and each
// block of rows begins and ends where its own rows do.
#pragma once
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

template <class Op>
class RowProduct {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  static constexpr int L = kLanes<T>, kWide = ATTN_NV * L;  // numbers of a row that a block has

 public:
  // Whole blocks only: narrower ones would be too few sums to hide their latency.
  static bool serves(int64_t dim) { return Op::kStep == 1 && dim % kWide == 0; }

  // B: rows of `dim` numbers, as rows_by_key gives them.
  RowProduct(const Operand& b, int64_t dim, DType type)
      : B(reinterpret_cast<const Item*>(b.data)),
        ldb(b.depth_step / int64_t(sizeof(Item))),
        dim(dim),
        type(type) {}

  // The panel's rows of `base`, which lie as `s` says: A's columns of `tile`, whose numbers are 0
  // where a row does not see a key of its grain.  False where a sum is inf or NaN.
  bool write(const Panel<T>& panel, const Tile& tile, const Item* A, const T* factor, void* base,
             const Strides& s, Prefetch& soon) const {
    const int64_t size = int64_t(dtype_size(type));
    char* out = static_cast<char*>(base) + panel.seq.q_offset(s, panel.h, panel.m0) * size;
    const Sides sides{A, 1, kPanel, nullptr, out, s.s * size};
    Vec<T> bad{};
    for (int64_t g = 0; g < panel.grains; ++g) {
      const int64_t end = std::min((g + 1) * kGrain, panel.nq);
      for (int64_t q = g * kGrain; q < end;) {
        const int64_t most = end - q > 4 ? ATTN_MR : 4, n = std::min(most, end - q);
        bad += take(sides, q, n, most, keys(panel, tile, g, q, n), factor + q, soon);
        q += n;
      }
    }
    return all_equal<T>(bad, Vec<T>{});
  }

  // Rows [lo, hi) of a block's keys, from `out` on: A is [keys][items of kPanel], of which row j
  // ends and begins where the queries of `s` do that may see its key.  before: the sums of other
  // panels, [keys][dim], or null.
  bool write_keys(const Panel<T>& panel, const Tile& tile, const Segment& s, const Item* A,
                  T factor, const T* before, char* out, int64_t row_bytes, Prefetch& soon) const {
    const Sides sides{A, kPanel / Op::kPack, 1, before, out, row_bytes};
    T factors[ATTN_MR];
    std::fill(factors, factors + ATTN_MR, factor);
    Vec<T> bad{};
    for (int64_t j = s.lo; j < s.hi;) {
      const int64_t left = s.hi - j, most = left > 4 && left != 8 ? ATTN_MR : 4;
      const int64_t n = std::min(most, left);
      bad += take(sides, j, n, most, queries(panel, tile, s, j, n), factors, soon);
      j += n;
    }
    return all_equal<T>(bad, Vec<T>{});
  }

 private:
  const Item* B;
  int64_t ldb, dim;
  DType type;

  // What a call multiplies and writes, from row 0 on.
  struct Sides {
    const Item* A;
    int64_t row_step, depth_step;  // of A, in items
    const T* before;               // the sums so far, [rows][dim], or null
    char* out;
    int64_t row_bytes;
  };

  // n rows of it, as a block of products takes them.
  struct Rows {
    const Item* A;
    int64_t row_step, depth_step;  // of A, in bytes
    const Item* B;
    int64_t depth;
    const T *factor, *before;
    char* out;
    int64_t row_bytes, n;
  };

  // Rows [r, r + n) over `depth`, in a block of `most` rows, 4 or ATTN_MR: what block() says.
  Vec<T> take(const Sides& s, int64_t r, int64_t n, int64_t most, const Keys& depth,
              const T* factor, Prefetch& soon) const {
    const int64_t first = depth.lo / Op::kPack, count = items<Op>(depth.hi) - first;
    const Rows rows{s.A + r * s.row_step + first * s.depth_step,
                    s.row_step * int64_t(sizeof(Item)),
                    s.depth_step * int64_t(sizeof(Item)),
                    B + first * ldb,
                    count,
                    factor,
                    s.before ? s.before + r * dim : nullptr,
                    s.out + r * s.row_bytes,
                    s.row_bytes,
                    n};
    const Lines lines = soon.some(count * Op::kPack, rows.A);
    return most == 4 ? block<4>(rows, lines) : block<ATTN_MR>(rows, lines);
  }

  // The tile's keys that some of n rows from q see, from an item's first on.
  static Keys keys(const Panel<T>& panel, const Tile& tile, int64_t g, int64_t q, int64_t n) {
    Keys all{tile.lo[g], tile.hi[g]};
    if (!tile.banded || all.lo >= all.hi) return {all.lo, std::max(all.lo, all.hi)};
    int64_t lo, hi;
    panel.seq.key_range(panel.m0 + q, panel.m0 + q + n, &lo, &hi);
    all.lo = std::clamp(lo - tile.n0, all.lo, all.hi);
    return {all.lo, std::clamp(hi - tile.n0, all.lo, all.hi)};
  }

  // The segment's queries that may see some of n keys from j.
  static Keys queries(const Panel<T>& panel, const Tile& tile, const Segment& s, int64_t j,
                      int64_t n) {
    const int64_t end = std::min(s.end, panel.nq);
    if (!tile.banded) return {s.begin, end};
    int64_t lo, hi;
    panel.seq.query_range(tile.n0 + j, tile.n0 + j + n, &lo, &hi);
    lo = std::clamp(lo - panel.m0, s.begin, end);
    return {lo, std::clamp(hi - panel.m0, lo, end)};
  }

  // 0 where all sums of rows r < n are finite, else NaN in some lane, as also where their sums
  // overflow, which costs time alone: a unit that is not finite is looked at once more.  Additions
  // do not wait for the units that multiply.
  template <int ROWS>
  __attribute__((noinline)) Vec<T> block(const Rows& r, Lines lines) const {
    if constexpr (Op::kStep > 1) return Vec<T>{};  // serves() no product of the tile unit
    Vec<T> sum[ATTN_NV] = {};
    for (int64_t c = 0; c < dim; c += kWide) {
      Vec<T> acc[ROWS][ATTN_NV];
      multiply<Op>(r.depth, reinterpret_cast<const char*>(r.A), r.row_step, r.depth_step, r.B + c,
                   ldb, acc, lines);
      if (r.before)
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) {
          if (i >= r.n) break;
#pragma GCC unroll 8
          for (int v = 0; v < ATTN_NV; ++v) acc[i][v] += load(r.before + i * dim + c + v * L);
        }
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        if (i >= r.n) break;
        const Vec<T> factor = set1(r.factor[i]);
#pragma GCC unroll 8
        for (int v = 0; v < ATTN_NV; ++v) {
          sum[v] += acc[i][v];
          acc[i][v] *= factor;
        }
      }
      put(r, c, acc);
    }
    Vec<T> any{};
    for (int v = 0; v < ATTN_NV; ++v) any += sum[v] - sum[v];
    return any;
  }

  // Numbers [c, c + kWide) of the rows of storage.  No call while sums are in registers: they would
  // be in memory on every way.
  template <int ROWS>
  ATTN_INLINE void put(const Rows& r, int64_t c, const Vec<T> (&x)[ROWS][ATTN_NV]) const {
    const int64_t step = r.row_bytes;
    char* row = r.out + c * int64_t(dtype_size(type));
#ifdef ATTN_BF16_DOT
    if (type == DType::kBFloat16) {
#pragma GCC unroll 8
      for (int i = 0; i < ROWS; ++i) {
        if (i >= r.n) break;
#pragma GCC unroll 8
        for (int v = 0; v < ATTN_NV; v += 2)
          _mm512_storeu_si512(reinterpret_cast<uint16_t*>(row + i * step) + v * L,
                              two_rows(x[i][v], x[i][v + 1]));
      }
      return;
    }
#endif
    T numbers[ROWS][kWide];
    const bool direct = dtype_size(type) == sizeof(T);
    char* to = direct ? row : reinterpret_cast<char*>(numbers);
    const int64_t to_step = direct ? step : kWide * int64_t(sizeof(T));
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; ++i) {
      if (i >= r.n) break;
#pragma GCC unroll 8
      for (int v = 0; v < ATTN_NV; ++v)
        store(reinterpret_cast<T*>(to + i * to_step) + v * L, x[i][v]);
    }
    for (int i = 0; !direct && i < r.n; ++i)
      restore_row<T>(type, numbers[i], kWide, row + i * step);
  }
};

}  // namespace attn::cpu::ATTN_ISA
