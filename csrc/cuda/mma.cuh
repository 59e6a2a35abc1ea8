// Products of tiles on the tensor cores, for halves (m16n8k16) and floats (three tf32 m16n8k8: the
// high and low parts of each factor, so that about 22 bits of the product survive).
//
// Who owns what, with g = lane / 4 and t = lane % 4 (the table that other files point at):
//   C, fp32   16 x 8   c[0], c[1] = (g, 2t), (g, 2t + 1)    c[2], c[3] = (g + 8, same columns)
//   A, halves 16 x 16  a[0] = (g, 2t..)  a[1] = (g + 8, 2t..)  a[2] = (g, 8 + 2t..)  a[3] = (g+8,
//   ..) B, halves 16 x 8   b0 = (2t.., g)    b1 = (8 + 2t.., g) A, floats 16 x 8   a[0] = (g, t)
//   a[1] = (g + 8, t)     a[2] = (g, t + 4)     a[3] = (g+8, ..) B, floats 8 x 8    b0 = (t, g) b1
//   = (t + 4, g)
// So a row of C fragments is an A operand without a shuffle: for halves two neighbouring C tiles
// are packed; for floats the contraction index is permuted, column t of A holds column 2t of C and
// t + 4 holds 2t + 1, and B's rows are read in the same order.
#pragma once
#include "smem.cuh"

namespace attn::cuda {

template <class T>
struct Mma {                       // halves
  static constexpr int TILES = 2;  // C tiles that make one A operand
  struct A {
    uint32_t r[4];
  };
  ATTN_DEVICE static A operand(const uint32_t (&r)[4]) { return {{r[0], r[1], r[2], r[3]}}; }
  ATTN_DEVICE static A operand(const float (*c)[4]) {
    return {{pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]), pack<T>(c[1][0], c[1][1]),
             pack<T>(c[1][2], c[1][3])}};
  }
  ATTN_DEVICE static void run(float (&acc)[4], const A& a, uint32_t b0, uint32_t b1) {
    mma_m16n8k16<T>(acc, a.r, b0, b1);
  }
  // b[0..1]: rows k0.. of columns 8*n..8*n+7 of a [k][n] tile; b[2..3]: of the next 8 columns
  template <int HEAD_DIM>
  ATTN_DEVICE static void load_transposed(uint32_t (&b)[4], uint32_t tile, int step, int n) {
    const int lane = lane_id(), row = lane & 15;
    ldmatrix_x4_trans(b,
                      tile + (16 * step + row) * Row<T, HEAD_DIM>::BYTES +
                          chunk_offset<T, HEAD_DIM>(row_swizzle<T, HEAD_DIM>(row), n, lane >> 4));
  }
};

template <>
struct Mma<float> {
  static constexpr int TILES = 1;
  struct A {
    uint32_t high[4], low[4];
  };
  ATTN_DEVICE static void split(uint32_t v, uint32_t& high, uint32_t& low) {
    high = to_tf32(as_float(v));
    low = to_tf32(as_float(v) - as_float(high));
  }
  ATTN_DEVICE static A operand(const uint32_t (&r)[4]) {
    A a;
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) split(r[i], a.high[i], a.low[i]);
    return a;
  }
  ATTN_DEVICE static A operand(const float (*c)[4]) {
    const uint32_t r[4] = {as_uint(c[0][0]), as_uint(c[0][2]), as_uint(c[0][1]), as_uint(c[0][3])};
    return operand(r);
  }
  ATTN_DEVICE static void run(float (&acc)[4], const A& a, uint32_t b0, uint32_t b1) {
    uint32_t high0, low0, high1, low1;
    split(b0, high0, low0), split(b1, high1, low1);
    mma_m16n8k8_tf32(acc, a.low, high0, high1);  // small terms first
    mma_m16n8k8_tf32(acc, a.high, low0, low1);
    mma_m16n8k8_tf32(acc, a.high, high0, high1);
  }
  template <int HEAD_DIM>
  ATTN_DEVICE static void load_transposed(uint32_t (&b)[4], uint32_t tile, int step, int n) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * t + (i & 1), even = 2 * (n + (i >> 1));
      b[i] = lds_32(tile + (8 * step + row) * Row<float, HEAD_DIM>::BYTES + 4 * (g & 3) +
                    chunk_offset<float, HEAD_DIM>(row, even, g >> 2));
    }
  }
};

// NaN of C = A B^T once more as plain sums: the three tf32 products of an infinite factor are inf
// and NaN, where one product would be inf.
template <int HEAD_DIM, int TILES>
ATTN_DEVICE void mend_products(float (&C)[TILES][4], uint32_t a_tile, int a_row, uint32_t b_tile) {
  bool bad = false;
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) ATTN_UNROLL
  for (int i = 0; i < 4; ++i) bad |= C[n][i] != C[n][i];
  if (!bad) return;
  const auto element = [](uint32_t tile, int row, int d) {
    return lds_f32(tile_address<float, HEAD_DIM>(tile, row, d / 4) + 4 * (d % 4));
  };
  ATTN_NO_UNROLL
  for (int at = 0; at < 4 * TILES; ++at) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    const int a = a_row + g + 8 * (at / 2 % 2), b = 8 * (at / 4) + 2 * t + at % 2;
    float sum = 0.0f;
    ATTN_NO_UNROLL
    for (int d = 0; d < HEAD_DIM; ++d)
      sum = fmaf(element(a_tile, a, d), element(b_tile, b, d), sum);
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n)
      ATTN_UNROLL  // C[n] with n known at compile time: registers
          for (int i = 0; i < 4; ++i) if (4 * n + i == at && C[n][i] != C[n][i]) C[n][i] = sum;
  }
}

// C = A B^T   [16, 8 * TILES]: rows a_row.. of one tile against all rows of another, over HEAD_DIM
template <class T, int HEAD_DIM, int TILES>
ATTN_DEVICE void multiply(float (&C)[TILES][4], uint32_t a_tile, int a_row, uint32_t b_tile) {
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES;
  const int lane = lane_id(), a_lane = lane & 15, b_lane = (lane & 7) + ((lane >> 4) << 3);
  const int a_swizzle = row_swizzle<T, HEAD_DIM>(a_lane);  // a_row is a multiple of 16
  const int b_swizzle = row_swizzle<T, HEAD_DIM>(b_lane);
  [[maybe_unused]] const uint32_t a_begin = a_tile, b_begin = b_tile;
  a_tile += (a_row + a_lane) * BYTES, b_tile += b_lane * BYTES;
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) C[n][0] = C[n][1] = C[n][2] = C[n][3] = 0.0f;
  [[maybe_unused]] constexpr int UNROLL =
      kIsHalf<T> ? Row<T, HEAD_DIM>::STEPS : 2;  // floats: all would spill
#pragma unroll UNROLL
  for (int step = 0; step < Row<T, HEAD_DIM>::STEPS; ++step) {
    uint32_t r[4], b[4];
    ldmatrix_x4(r, a_tile + chunk_offset<T, HEAD_DIM>(a_swizzle, 2 * step, lane >> 4));
    const typename Mma<T>::A a = Mma<T>::operand(r);
    ATTN_UNROLL
    for (int n = 0; n < TILES; n += 2) {
      ldmatrix_x4(b, b_tile + 8 * n * BYTES +
                         chunk_offset<T, HEAD_DIM>(b_swizzle, 2 * step, (lane >> 3) & 1));
      Mma<T>::run(C[n], a, b[0], b[1]);
      Mma<T>::run(C[n + 1], a, b[2], b[3]);
    }
  }
  if constexpr (!kIsHalf<T>) mend_products<HEAD_DIM>(C, a_begin, a_row, b_begin);
}

// acc += C B   [16, HEAD_DIM]: fragments C [16, 8 * TILES] against a tile of 8 * TILES rows
template <class T, int HEAD_DIM, int TILES>
ATTN_DEVICE void accumulate(float (&acc)[HEAD_DIM / 8][4], const float (&C)[TILES][4],
                            uint32_t tile) {
  ATTN_UNROLL
  for (int step = 0; step < TILES / Mma<T>::TILES; ++step) {
    const typename Mma<T>::A a = Mma<T>::operand(&C[step * Mma<T>::TILES]);
    ATTN_UNROLL
    for (int n = 0; n < HEAD_DIM / 8; n += 2) {
      uint32_t b[4];
      Mma<T>::template load_transposed<HEAD_DIM>(b, tile, step, n);
      Mma<T>::run(acc[n], a, b[0], b[1]);
      Mma<T>::run(acc[n + 1], a, b[2], b[3]);
    }
  }
}

// The same for FRAGMENTS times 16 rows a warp, of halves: what is read of B feeds all of them.
// C[f] += A B^T: rows a_row + 16 f .. of one tile against all rows of another, over HEAD_DIM
template <class T, int HEAD_DIM, int FRAGMENTS, int TILES>
ATTN_DEVICE void add_products(float (&C)[FRAGMENTS][TILES][4], uint32_t a_tile, int a_row,
                              uint32_t b_tile) {
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES;
  const int lane = lane_id(), a_lane = lane & 15, b_lane = (lane & 7) + ((lane >> 4) << 3);
  const int a_swizzle = row_swizzle<T, HEAD_DIM>(a_lane);  // a_row is a multiple of 16
  const int b_swizzle = row_swizzle<T, HEAD_DIM>(b_lane);
  a_tile += (a_row + a_lane) * BYTES, b_tile += b_lane * BYTES;
  ATTN_UNROLL
  for (int step = 0; step < Row<T, HEAD_DIM>::STEPS; ++step) {
    typename Mma<T>::A a[FRAGMENTS];
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f)
      ldmatrix_x4(a[f].r, a_tile + 16 * f * BYTES +
                              chunk_offset<T, HEAD_DIM>(a_swizzle, 2 * step, lane >> 4));
    ATTN_UNROLL
    for (int n = 0; n < TILES; n += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, b_tile + 8 * n * BYTES +
                         chunk_offset<T, HEAD_DIM>(b_swizzle, 2 * step, (lane >> 3) & 1));
      ATTN_UNROLL
      for (int f = 0; f < FRAGMENTS; ++f) {
        Mma<T>::run(C[f][n], a[f], b[0], b[1]);
        Mma<T>::run(C[f][n + 1], a[f], b[2], b[3]);
      }
    }
  }
}

// C[f] = A B^T
template <class T, int HEAD_DIM, int FRAGMENTS, int TILES>
ATTN_DEVICE void multiply_rows(float (&C)[FRAGMENTS][TILES][4], uint32_t a_tile, int a_row,
                               uint32_t b_tile) {
  ATTN_UNROLL
  for (int f = 0; f < FRAGMENTS; ++f) ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) C[f][n][0] = C[f][n][1] = C[f][n][2] = C[f][n][3] = 0.0f;
  add_products<T, HEAD_DIM>(C, a_tile, a_row, b_tile);
}

// acc[f] += C[f] B   [16, HEAD_DIM] each: fragments C against a tile of 8 * TILES rows.
// APART: the distance of a step is added behind the lane's own.  Where the compiler makes one `or`
// of both it keeps an address for each step (dQ at 64 columns: 16 for 4, and 4 spills); the forward
// at 128 columns has 33 moves fewer with both in one.
template <class T, int HEAD_DIM, bool APART = false, int FRAGMENTS, int TILES>
ATTN_DEVICE void accumulate_rows(float (&acc)[FRAGMENTS][HEAD_DIM / 8][4],
                                 const float (&C)[FRAGMENTS][TILES][4], uint32_t tile) {
  ATTN_UNROLL
  for (int step = 0; step < TILES / Mma<T>::TILES; ++step) {
    typename Mma<T>::A a[FRAGMENTS];
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) a[f] = Mma<T>::operand(&C[f][step * Mma<T>::TILES]);
    ATTN_UNROLL
    for (int n = 0; n < HEAD_DIM / 8; n += 2) {
      uint32_t b[4];
      if constexpr (APART)
        Mma<T>::template load_transposed<HEAD_DIM>(b, tile + 16 * step * Row<T, HEAD_DIM>::BYTES, 0,
                                                   n);
      else
        Mma<T>::template load_transposed<HEAD_DIM>(b, tile, step, n);
      ATTN_UNROLL
      for (int f = 0; f < FRAGMENTS; ++f) {
        Mma<T>::run(acc[f][n], a[f], b[0], b[1]);
        Mma<T>::run(acc[f][n + 1], a[f], b[2], b[3]);
      }
    }
  }
}

// One of three views of a tensor that holds NaN or infinities: its finite part, or 1 where it is
// +inf (-inf) or NaN.
struct View {
  int pass;
  template <class T>
  ATTN_DEVICE T operator()(T v) const {
    const float x = to_float(v);
    const bool finite = x - x == 0.0f;
    if (pass == 0) return finite ? v : from_float<T>(0.0f);
    return from_float<T>(!finite && x != (pass == 1 ? -kInf : kInf) ? 1.0f : 0.0f);
  }
};

// The threads that share a tile have met: those of the CTA, or of a warp that has it alone.
template <int THREADS>
ATTN_DEVICE void sync_sharers() {
  THREADS == 32 ? sync_warp() : sync_threads();
}

// tile = the view of rows[first ..]; all threads that share the tile.
template <class T, int HEAD_DIM, int ROWS, int THREADS, bool GENERAL>
ATTN_DEVICE void view_tile(uint32_t tile, const Rows& rows, int first, int end, int dim,
                           View view) {
  using R = Row<T, HEAD_DIM>;
  sync_sharers<THREADS>();  // all have read the tile
  ATTN_NO_UNROLL
  for (int index = sharer_id<THREADS>(); index < ROWS * R::CHUNKS; index += THREADS) {
    const int row = index / R::CHUNKS, chunk = index % R::CHUNKS;
    U32x4 v{0, 0, 0, 0};
    if (first + row < end)
      v = gather_chunk<T>(rows.at<GENERAL>(first + row), chunk * R::PER_CHUNK, dim, view);
    sts_128(tile_address<T, HEAD_DIM>(tile, row, chunk), v);
  }
  sync_sharers<THREADS>();  // the view is complete
}

// accumulate(), but where the tile is known to be `bad` (to hold NaN or infinities) a zero of C
// silences them.  The finite part is multiplied as usual; then, by products of 0/1 matrices, it is
// counted whether some C != 0 met +inf or -inf (NaN is both).  signed_C: C may be negative, and the
// infinities are left out.  Destroys C and a bad tile.  All threads that share the tile; `active`
// warps compute.
template <class T, int HEAD_DIM, int TILES, int THREADS, bool GENERAL>
ATTN_DEVICE void accumulate_visible(float (&acc)[HEAD_DIM / 8][4], float (&C)[TILES][4],
                                    uint32_t tile, const Rows& rows, int first, int end, int dim,
                                    bool bad, bool signed_C, bool active) {
  if (bad) view_tile<T, HEAD_DIM, 8 * TILES, THREADS, GENERAL>(tile, rows, first, end, dim, {0});
  if (active) accumulate<T, HEAD_DIM, TILES>(acc, C, tile);
  if (!bad || signed_C) return;
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) ATTN_UNROLL
  for (int i = 0; i < 4; ++i) C[n][i] = C[n][i] != 0.0f ? 1.0f : 0.0f;
  ATTN_NO_UNROLL
  for (int pass = 1; pass < 3; ++pass) {
    view_tile<T, HEAD_DIM, 8 * TILES, THREADS, GENERAL>(tile, rows, first, end, dim, {pass});
    if (!active) continue;
    const float infinity = pass == 1 ? kInf : -kInf;
    ATTN_NO_UNROLL
    for (int n = 0; n < HEAD_DIM / 8; n += 2) {
      float count[2][4] = {};
      ATTN_UNROLL
      for (int step = 0; step < TILES / Mma<T>::TILES; ++step) {
        uint32_t b[4];
        Mma<T>::template load_transposed<HEAD_DIM>(b, tile, step, n);
        const typename Mma<T>::A a = Mma<T>::operand(&C[step * Mma<T>::TILES]);
        Mma<T>::run(count[0], a, b[0], b[1]);
        Mma<T>::run(count[1], a, b[2], b[3]);
      }
      ATTN_UNROLL
      for (int m = 0; m < HEAD_DIM / 8; ++m) {  // acc[n] with n known at compile time: registers
        ATTN_UNROLL
        for (int i = 0; i < 4; ++i)
          if (m / 2 == n / 2 && count[m % 2][i] > 0.0f) acc[m][i] += infinity;
      }
    }
  }
}

}  // namespace attn::cuda
