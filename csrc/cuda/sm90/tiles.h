// Tile sizes of the Hopper kernels, and what they take as parameters.
#pragma once
#include <type_traits>

#include "../tiles.h"

namespace attn::cuda::sm90 {

constexpr int STAGES = 2, CONSUMER_WARPS = 8, THREADS = 384;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
constexpr int RING_BARS = 16 * STAGES;  // bytes of the mbarriers of one ring

constexpr int slabs_of(int head_dim) { return (head_dim + 63) / 64; }  // of 64 columns

// 64 rows a consumer warpgroup.  BLOCK_N: what 227 KiB of shared memory and 240 registers a thread
// hold; of O, S and P, HEAD_DIM = 192 has 96 + 48 + 24, 256 has 128 + 32 + 16.  With values of 128
// columns 192 has the 64 + 64 + 32 of 128, and 208 KiB.
template <int HEAD_DIM_, int VALUE_DIM_ = HEAD_DIM_>
struct ForwardTile90 {
  static constexpr int HEAD_DIM = HEAD_DIM_, VALUE_DIM = VALUE_DIM_;
  static constexpr int BLOCK_M = 128;
  static constexpr int BLOCK_N = VALUE_DIM <= 128 ? 128 : HEAD_DIM <= 192 ? 96 : 64;
  static constexpr int SLABS = slabs_of(HEAD_DIM), VALUE_SLABS = slabs_of(VALUE_DIM);
  static constexpr int QUERY_BYTES = SLABS * BLOCK_M * 128, KEY_BYTES = SLABS * BLOCK_N * 128;
  static constexpr int VALUE_BYTES = VALUE_SLABS * BLOCK_N * 128;
  // Two tiles of Q: one comes while another is in use; wider, there is no room.
  static constexpr int QUERY_STAGES = HEAD_DIM <= 128 ? 2 : 1;
  static constexpr int SMEM =
      QUERY_STAGES * (QUERY_BYTES + 32) + STAGES * (KEY_BYTES + VALUE_BYTES) + 2 * RING_BARS;
};

// VALUE_DIM of the forward for a HEAD_DIM and values of this many columns: of heads of 192, values
// of up to 128 are not padded (multi-head latent attention).
constexpr int forward_value_dim(int head_dim, int64_t head_dim_v) {
  return head_dim == 192 && head_dim_v <= 128 ? 128 : head_dim;
}

// Of a thread's groups of 4 keys, how many have their masks and biases asked for before S is there.
constexpr int early_groups(int head_dim, int bits, int groups) {
  if (bits & kAny) return groups / 2;
  if (head_dim <= 96 || !(bits & kBias)) return groups;
  return bits & (kBiasFloat | kMask) ? groups / 2 : groups * 3 / 4;
}

// dQ: 64 queries a consumer warpgroup, their rows of Q and dO resident.  Registers of dQ, S, dP and
// packed dS: 32 + 64 + 64 + 32 (64), 64 + 32 + 32 + 16 (128), 96 + 32 + 32 + 16 (192), 128 + 16 +
// 16 + 8 (256: 128 KiB of Q and dO leave room for 32 keys twice).
template <int HEAD_DIM>
struct QueryGradientTile {
  static constexpr int BLOCK_M = 128;
  static constexpr int BLOCK_N = HEAD_DIM <= 64 ? 128 : HEAD_DIM <= 192 ? 64 : 32;
  static constexpr int SLABS = slabs_of(HEAD_DIM);
  static constexpr int QUERY_BYTES = SLABS * BLOCK_M * 128, KEY_BYTES = SLABS * BLOCK_N * 128;
  static constexpr int RESIDENT = 2;  // Q and dO
  static constexpr int SMEM = RESIDENT * QUERY_BYTES + 2 * STAGES * KEY_BYTES + 8 + 2 * RING_BARS;
};

// dK and dV: K and V of BLOCK_N keys resident, BLOCK_M queries at a time.  Up to 128 a consumer
// warpgroup has 64 keys and both accumulators: 64 + 64 registers, S and dP 32 + 32, P and dS packed
// 16 + 16.  Wider (SPLIT), both have the same 64 keys, one dV and the other dK, 128 registers, and
// P goes from one to the other through shared memory.
template <int HEAD_DIM_, int BLOCK_M_ = 64>
struct KeyGradientTile {
  static constexpr int HEAD_DIM = HEAD_DIM_;
  static constexpr int PRODUCER_REGISTERS = sm90::PRODUCER_REGISTERS;
  static constexpr int CONSUMER_REGISTERS = sm90::CONSUMER_REGISTERS;
  static constexpr int BITS = 0;  // features
  static constexpr bool SPLIT = HEAD_DIM > 128;
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = SPLIT ? 64 : 128;
  static constexpr int SLABS = slabs_of(HEAD_DIM);
  static constexpr int QUERY_BYTES = SLABS * BLOCK_M * 128, KEY_BYTES = SLABS * BLOCK_N * 128;
  static constexpr int ROW_BYTES = 8 * BLOCK_M;                          // LSE and delta
  static constexpr int EXTRA_BYTES = SPLIT ? 4 * BLOCK_M * BLOCK_N : 0;  // P
  static constexpr int smem(int extra) {
    return 2 * KEY_BYTES + 2 * STAGES * QUERY_BYTES + extra + STAGES * ROW_BYTES + 8 +
           2 * RING_BARS;
  }
  static constexpr int SMEM = smem(EXTRA_BYTES);
};

// The same, and dQ: dS of a tile [64, BLOCK_N] goes through shared memory, a slab a warpgroup, and
// dQ is added up in global memory.  Of dQ [64, HEAD_DIM] a warpgroup has one slab of columns, 32
// registers (BY_COLUMNS), or, where there is no slab for each, all columns of every other tile.
//
// Of 128 queries each warpgroup has 64 (BY_ROWS).
template <int HEAD_DIM, int BLOCK_M = 64>
struct FusedTile : KeyGradientTile<HEAD_DIM, BLOCK_M> {
  using Base = KeyGradientTile<HEAD_DIM, BLOCK_M>;
  static_assert(!Base::SPLIT);
  static constexpr bool BY_COLUMNS = HEAD_DIM == 128, BY_ROWS = BLOCK_M == 128;
  static constexpr int SUM_TILES = BY_COLUMNS ? 8 : HEAD_DIM / 8;  // 8 columns each
  static constexpr int SCORE_BYTES = 128 * Base::BLOCK_M;          // dS, a slab
  static constexpr int SUM_BYTES = 2048 * SUM_TILES;               // dQ of 64 queries, a warpgroup
  static constexpr int WORDS = 4 * SCORE_BYTES + 2 * SUM_BYTES;    // behind dS of two turns
  static constexpr int EXTRA_BYTES = WORDS + 16;
  static constexpr int SMEM = Base::smem(EXTRA_BYTES);
};

// Of plain calls.  Registers of 128 queries at 64 columns: dK and dV 64, S and dP 128, P packed 32.
template <int HEAD_DIM>
using PlainFusedTile = FusedTile<HEAD_DIM, HEAD_DIM == 64 ? 128 : 64>;

// The tile of a backward with features by keys (backward_sides.cuh), FusedTile or, above 128
// columns, KeyGradientTile.  What a tile of queries has beside Q and dO lies in a ring of one or
// two stages in what is left of 227 KiB.
constexpr int SHARED_MEMORY = 227 * 1024, SIDE_WARPS = 3;
template <int HEAD_DIM>
using KeysWithSides =
    std::conditional_t<(HEAD_DIM > 128), KeyGradientTile<HEAD_DIM>, FusedTile<HEAD_DIM>>;
template <int HEAD_DIM>
struct SideRoom : KeysWithSides<HEAD_DIM> {
  using Base = KeysWithSides<HEAD_DIM>;
  static constexpr int M = Base::BLOCK_M, N = Base::BLOCK_N;
  static constexpr int SIDE_READERS = Base::SPLIT ? CONSUMER_WARPS / 2 : CONSUMER_WARPS;
  static constexpr int FLAG_ROW = 2 * M + 8;  // 8 more: rows meet other banks
  static constexpr int FLAG_BYTES = FLAG_ROW * (N / 16);
  static constexpr int LEFT = SHARED_MEMORY - Base::SMEM;
  static constexpr int MOST = 2 * (4 * M * N + 2 * FLAG_BYTES + 16);
  static constexpr int SIDES = (LEFT < MOST ? LEFT : MOST) / 16 * 16;
  static constexpr int EXTRA_BYTES = Base::EXTRA_BYTES + SIDES;
  static constexpr int SMEM = Base::smem(EXTRA_BYTES);

  // Of one stage.  A kernel for any feature has one stage, as large as there is room.
  static constexpr int side_bytes(int bits) {
    return bits & kAny ? SIDES - 16
                       : (bits & kBias ? (bits & kBiasFloat ? 4 : 2) * M * N : 0) +
                             (bits & kMask ? FLAG_BYTES : 0) + (bits & kDropout ? FLAG_BYTES : 0);
  }
  static constexpr bool fits(int bits) { return side_bytes(bits) + 16 <= SIDES; }
};
template <int HEAD_DIM, int BITS_>
struct FeatureTile : SideRoom<HEAD_DIM> {
  using Room = SideRoom<HEAD_DIM>;
  static constexpr int BITS = BITS_, SIDE_BYTES = Room::side_bytes(BITS);
  static constexpr int SIDE_STAGES = 2 * (SIDE_BYTES + 16) <= Room::SIDES ? 2 : 1;
  static_assert(Room::fits(BITS));
};
// The kernel's HEAD_DIM where the head's is padded to `head_dim`, 0: none knows these features.  A
// bias in float32 finds no room at 96 columns, and at 128 none beside both mask and dropout.
constexpr int feature_head_dim(int head_dim, int features) {
  static_assert(SideRoom<192>::fits(kMask | kBias | kBiasFloat | kDropout));
  static_assert(SideRoom<256>::fits(kMask | kBias | kBiasFloat | kDropout));
  if (head_dim <= 64 || head_dim > 128) return head_dim;
  if (head_dim <= 96 && SideRoom<96>::fits(features)) return head_dim;
  return SideRoom<128>::fits(features) ? 128 : features ? 0 : head_dim;
}
// Of a call's features those that a backward kernel is compiled for: a sink is in LSE, and weights
// are selected behind the scale, whatever that is.
constexpr int backward_features_of(int features) { return features & ~(kSink | kStats | kScale); }

struct ForwardParams {
  Params p;
  TensorMap Q, K, V, O;
  bool stores_tiles;  // O can be stored by the copy engine
  int section;        // query heads whose K and V fit the L2 cache together
  int* counter;       // of tiles claimed, 0 at first; null: a CTA has the tile of its number
};
struct BackwardParams {
  Params p;
  TensorMap Q, K, V, dO;
};

}  // namespace attn::cuda::sm90
