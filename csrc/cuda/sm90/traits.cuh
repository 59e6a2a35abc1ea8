// Tile sizes of the Hopper kernels, and what they take as parameters.
#pragma once
#include "../ptx_sm90.cuh"
#include "../traits.cuh"

namespace attn::cuda::sm90 {

constexpr int STAGES = 2, CONSUMER_WARPS = 8;

// 64 rows a consumer warpgroup.  BLOCK_N: what 227 KiB of shared memory and 240 registers a thread
// hold; of O, S and P, HEAD_DIM = 192 has 96 + 48 + 24, 256 has 128 + 32 + 16.
template <int HEAD_DIM>
struct ForwardTile90 {
  static constexpr int BLOCK_M = 128, THREADS = 384;
  static constexpr int BLOCK_N = HEAD_DIM <= 128 ? 128 : HEAD_DIM <= 192 ? 96 : 64;
  static constexpr int SLABS = (HEAD_DIM + 63) / 64;  // of 64 columns
  static constexpr int QUERY_BYTES = SLABS * BLOCK_M * 128, KEY_BYTES = SLABS * BLOCK_N * 128;
  static constexpr int SMEM = QUERY_BYTES + 2 * STAGES * KEY_BYTES + 8 + 2 * STAGES * 16;
};

struct ForwardParams {
  Params p;
  TensorMap Q, K, V;
};

}  // namespace attn::cuda::sm90
