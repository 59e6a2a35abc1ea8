// Tiles of the backward in two kernels of plain calls in 16 bits, up to 128 columns
// (backward_plain.cuh).  Plain C++.
#pragma once
#include "../tiles.h"

namespace attn::cuda::sm80 {

// A warp owns FRAGMENTS times 16 rows, to which the others come BLOCK_N at a time.
template <int FRAGMENTS_, int BLOCK_N_>
struct PairTile {
  static constexpr int WARPS = 4, THREADS = 32 * WARPS;
  static constexpr int FRAGMENTS = FRAGMENTS_, WARP_ROWS = 16 * FRAGMENTS_;
  static constexpr int BLOCK_M = WARP_ROWS * WARPS, BLOCK_N = BLOCK_N_;
};

// dQ: 128 queries and one buffer each for K and V.  With 32 rows a warp what is read of K and V
// feeds four products; dQ, S and dP leave registers for two CTAs.  128 columns: 80 KiB.
template <int HEAD_DIM>
struct QueryGradientTile : PairTile<2, HEAD_DIM <= 64 ? 64 : 32> {
  using Base = PairTile<2, HEAD_DIM <= 64 ? 64 : 32>;
  static constexpr int SMEM = 2 * HEAD_DIM * (2 * Base::BLOCK_M + 2 * Base::BLOCK_N);
};

// dK and dV: two buffers for Q with LSE and delta, one for dO.  Two accumulators of 32 rows fit
// the registers up to 64 columns only, at 64 beside S and dP of 32 queries.  128 columns: 81 KiB,
// so that two CTAs fit the 164 KiB of sm_80.
template <int HEAD_DIM>
struct KeyGradientTile : PairTile<HEAD_DIM <= 64 ? 2 : 1, HEAD_DIM == 64 ? 32 : 64> {
  using Base = PairTile<HEAD_DIM <= 64 ? 2 : 1, HEAD_DIM == 64 ? 32 : 64>;
  static constexpr int ROW_BYTES = 2 * 2 * 4 * Base::BLOCK_N;  // [2][LSE, delta]
  static constexpr int SMEM = 2 * HEAD_DIM * (2 * Base::BLOCK_M + 3 * Base::BLOCK_N) + ROW_BYTES;
};

}  // namespace attn::cuda::sm80
