// Products of two tiles in shared memory of which one is read across its rows, for FRAGMENTS times
// 16 rows a warp, in 16 bits (fragments: mma.cuh).  What a warp reads is at run-time rows and
// columns.
#pragma once
#include "mma.cuh"

namespace attn::cuda {

// acc[f] += a[f] B: rows 16 * step .. of B [.., HEAD_DIM], columns b_column ..
template <class T, int HEAD_DIM, int FRAGMENTS, int TILES>
ATTN_DEVICE void add_rows(float (&acc)[FRAGMENTS][TILES][4],
                          const typename Mma<T>::A (&a)[FRAGMENTS], uint32_t B, int b_column,
                          int step) {
  const int lane = lane_id(), b_row = lane & 15;
  ATTN_UNROLL
  for (int n = 0; n < TILES; n += 2) {  // rows 16 apart have the same swizzle
    uint32_t b[4];
    ldmatrix_x4_trans(b, tile_address<T, HEAD_DIM>(B, b_row, b_column / 8 + n + (lane >> 4)) +
                             16 * step * Row<T, HEAD_DIM>::BYTES);
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) {
      Mma<T>::run(acc[f][n], a[f], b[0], b[1]);
      Mma<T>::run(acc[f][n + 1], a[f], b[2], b[3]);
    }
  }
}

// acc[f] += A^T B: A [16 * STEPS, A_DIM], columns a_column + 16 f ..; B [16 * STEPS, HEAD_DIM],
// columns b_column ..
template <class T, int A_DIM, int HEAD_DIM, int STEPS, int FRAGMENTS, int TILES>
ATTN_DEVICE void add_across(float (&acc)[FRAGMENTS][TILES][4], uint32_t A, int a_column, uint32_t B,
                            int b_column) {
  constexpr int A_BYTES = Row<T, A_DIM>::BYTES;
  const int lane = lane_id(), a_row = (lane & 7) + (lane >> 4) * 8;
  ATTN_UNROLL
  for (int step = 0; step < STEPS; ++step) {  // rows 16 apart have the same swizzle
    typename Mma<T>::A a[FRAGMENTS];
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f)
      ldmatrix_x4_trans(a[f].r,
                        tile_address<T, A_DIM>(A, a_row, a_column / 8 + 2 * f + ((lane >> 3) & 1)) +
                            16 * step * A_BYTES);
    add_rows<T, HEAD_DIM>(acc, a, B, b_column, step);
  }
}

// acc[f] += A B: A [.., A_DIM], rows a_row + 16 f ..; B [A_DIM, HEAD_DIM], columns b_column ..
template <class T, int A_DIM, int HEAD_DIM, int FRAGMENTS, int TILES>
ATTN_DEVICE void add_along(float (&acc)[FRAGMENTS][TILES][4], uint32_t A, int a_row, uint32_t B,
                           int b_column) {
  constexpr int A_BYTES = Row<T, A_DIM>::BYTES;
  const int lane = lane_id(), a_lane = lane & 15;
  const int a_swizzle = row_swizzle<T, A_DIM>(a_lane);  // a_row is a multiple of 16
  A += uint32_t((a_row + a_lane) * A_BYTES);
  ATTN_UNROLL
  for (int step = 0; step < A_DIM / 16; ++step) {
    typename Mma<T>::A a[FRAGMENTS];
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f)
      ldmatrix_x4(a[f].r,
                  A + 16 * f * A_BYTES + chunk_offset<T, A_DIM>(a_swizzle, 2 * step, lane >> 4));
    add_rows<T, HEAD_DIM>(acc, a, B, b_column, step);
  }
}

}  // namespace attn::cuda
