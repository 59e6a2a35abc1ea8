// What launches and kernels share: the parameter block, the tile sizes, and how a row of head_dim
// elements is cut.  The tile sizes of sm_80 are here, but for those of sm80/backward_tiles.h; those
// of Hopper are in sm90/tiles.h.  Plain C++: the host's compiler reads it as well as NVRTC.
#pragma once
#include <cstdint>
#include <type_traits>

#include "../logit.h"
#include "../params.h"
#include "../philox.h"
#include "features.h"
#include "ptx_types.h"

namespace attn::cuda {
using namespace attn::ptx;

// Quotients of numbers below 2^31 by one that is known before the launch: a product and a shift.
struct Divisor {
  int by;  // 0: nothing is divided
  uint32_t factor;
  int shift;

  ATTN_FORMULA static Divisor of(int by) {
    if (by < 1) return {0, 0, 0};
    int shift = 31;
    while ((int64_t(1) << (shift - 31)) < by) ++shift;
    return {by, uint32_t(((uint64_t(1) << shift) + uint64_t(by) - 1) / uint64_t(by)), shift};
  }
  ATTN_FORMULA int quotient(int x) const { return int(uint64_t(uint32_t(x)) * factor >> shift); }
};

// One launch.  Everything that a kernel would otherwise derive again in every thread is here.
struct Params {
  Problem p;
  Pointers ptr;
  float scale, scale_log2;             // softmax_scale, and that times log2(e)
  Terms<float> terms, natural;         // of logits, in units of log2(e) and as they are
  int features;                        // bits of features.h
  float keep_scale;                    // 1 / (1 - dropout_p); 0 where everything is dropped
  uint64_t keep_threshold;             // a Philox word survives when it is at least this
  int window_left, window_right;       // -1: unbounded
  int group;                           // query heads of one K/V head
  int pack;                            // query heads that share a tile's rows: 1, or group (decode)
  Divisor packed, page;                // of packed rows by queries, of keys by those of a page
  int m_tiles, n_tiles;                // tiles of a head (tile_counts.h)
  int splits;                          // CTAs that share the keys of one tile of queries
  int pass;                            // backward for wide heads: 0 = dV, 1 = dK
  bool q_vec, k_vec, v_vec, dout_vec;  // rows can be copied 16 bytes at a time
  int16_t fused_block_m, fused_block_n;  // backward in one kernel on sm80: queries, keys of a tile
  float* delta;                          // as LSE: rowsum(dO * O) - dLSE
  float* dq_sums;                        // of a backward in one kernel, or null
  float* partial_o;                      // [splits, B, Hq, Sq, Dv] normalised, when splits > 1
  float* partial_stats;  // [3, splits, B, Hq, Sq]: LSE - largest logit, that, entropy
};

// A row of HEAD_DIM elements: 16-byte chunks for copies, 32-byte steps for the tensor cores (16
// halves or 8 floats, one mma deep).
template <class T, int HEAD_DIM>
struct Row {
  static constexpr int BYTES = HEAD_DIM * int(sizeof(T));
  static constexpr int CHUNKS = BYTES / 16, STEPS = BYTES / 32;
  static constexpr int PER_CHUNK = 16 / int(sizeof(T));
};

// BLOCK_M rows stay (16 a warp), BLOCK_N are streamed through STAGES buffers.  Everything fits 99
// KiB, the limit of sm_86, sm_89 and sm_120 (sm_80: 163, sm_90: 227).
template <int WARPS_, int BLOCK_N_, int STAGES_>
struct Tile {
  static constexpr int WARPS = WARPS_, THREADS = 32 * WARPS_;
  static constexpr int BLOCK_M = 16 * WARPS_, BLOCK_N = BLOCK_N_, STAGES = STAGES_;
  static constexpr int KEY_WARPS = 1;  // warps that share the keys of 16 rows
  // After the tiles: 128 bytes of flags; in backward then LSE and delta of the streamed queries, or
  // column sums.  Forward goes without these: 1 KiB more would leave one block of 82 KiB on sm_80.
  static constexpr int FLAG_BYTES = 128, ROWS_BYTES = 8 * BLOCK_N_ * STAGES_;
  static constexpr int SUM_BYTES = 4 * BLOCK_N_ * WARPS_;
  static constexpr int forward_smem(int row_bytes) {
    return row_bytes * (BLOCK_M + 2 * STAGES * BLOCK_N) + FLAG_BYTES;
  }
  static constexpr int backward_smem(int row_bytes) {
    return row_bytes * (2 * BLOCK_M + 2 * STAGES * BLOCK_N) + FLAG_BYTES +
           (ROWS_BYTES > SUM_BYTES ? ROWS_BYTES : SUM_BYTES);
  }
};

template <int ROW_BYTES>
struct ForwardTileOf {
  // 512: 32 + 4 * 16 KiB.  768 and 1024 are fp32 with D > 128.
  using type = std::conditional_t<
      ROW_BYTES <= 256, Tile<4, 64, 2>,
      std::conditional_t<ROW_BYTES <= 512, Tile<4, 32, 2>,
                         std::conditional_t<ROW_BYTES <= 768, Tile<4, 16, 2>, Tile<2, 16, 2>>>>;
};
// Two accumulators of head_dim columns for D <= 128: BLOCK_N = 32 keeps S and dP in registers too.
template <int ROW_BYTES>
struct BackwardTileOf {
  using type = std::conditional_t<
      ROW_BYTES <= 64, Tile<4, 64, 2>,
      std::conditional_t<ROW_BYTES <= 256, Tile<4, 32, 2>,
                         std::conditional_t<ROW_BYTES <= 512, Tile<4, 16, 2>,
                                            std::conditional_t<ROW_BYTES <= 768, Tile<2, 16, 2>,
                                                               Tile<2, 16, 1>>>>>;
};
template <class T, int HEAD_DIM>
using ForwardTile = typename ForwardTileOf<Row<T, HEAD_DIM>::BYTES>::type;
// The forward of at most 16 rows: all warps have these, and 16 keys of a tile each.
template <class T, int HEAD_DIM>
struct DecodeTile {
  using Keys = ForwardTile<T, HEAD_DIM>;
  static constexpr int BLOCK_M = 16, BLOCK_N = Keys::BLOCK_N, STAGES = Keys::STAGES;
  static constexpr int WARPS = BLOCK_N / 16, KEY_WARPS = WARPS, THREADS = 32 * WARPS;
  static constexpr int SMEM =
      Row<T, HEAD_DIM>::BYTES * (BLOCK_M + 2 * STAGES * BLOCK_N) + Keys::FLAG_BYTES;
};
// Tiles of 16 keys, of float32 above 128 columns, have nothing to share.
template <class T, int HEAD_DIM>
constexpr bool kHasDecodeTile = DecodeTile<T, HEAD_DIM>::WARPS > 1;

template <class T, int HEAD_DIM>
using BackwardTile = typename BackwardTileOf<Row<T, HEAD_DIM>::BYTES>::type;

// The plain forward: a warp owns FRAGMENTS times 16 rows, so that what it reads of K and V feeds as
// many products; K and V have one buffer each.
template <int WARPS_, int FRAGMENTS_, int BLOCK_N_>
struct PlainTile {
  static constexpr int WARPS = WARPS_, THREADS = 32 * WARPS_;
  static constexpr int FRAGMENTS = FRAGMENTS_, WARP_ROWS = 16 * FRAGMENTS_;
  static constexpr int BLOCK_M = WARP_ROWS * WARPS_, BLOCK_N = BLOCK_N_, FLAG_BYTES = 128;
  static constexpr int smem(int row_bytes) {
    return row_bytes * (BLOCK_M + 2 * BLOCK_N) + FLAG_BYTES;
  }
};
// O and S of 32 rows up to 128 columns: registers for two CTAs of 4 warps (three spill in the loop,
// 7 times at 32 columns, 40 at 64).
// 192: 96 KiB; 256: the same with half of the keys.
template <int HEAD_DIM>
using PlainForwardTile = std::conditional_t<
    HEAD_DIM <= 128, PlainTile<4, 2, 64>,
    std::conditional_t<HEAD_DIM <= 192, PlainTile<8, 1, 64>, PlainTile<8, 1, 32>>>;

// The same with features.  BOTH: a mask and a bias, which are on their way while O, S and Q take
// the registers: at 128 columns half of the keys (64 keys spill 67 times in the loop).
template <int HEAD_DIM, bool BOTH>
using FeatureForwardTile =
    std::conditional_t<HEAD_DIM == 128 && BOTH, PlainTile<4, 2, 32>, PlainForwardTile<HEAD_DIM>>;

// Behind the tiles of a call with a mask or a bias alone, at 128 columns: room for where the mask
// or bias of each thread's 4 rows begins, used where these are read by vectors.  Kept in registers
// over the loop they are spilled, 8 words a tile.
constexpr int row_address_bytes(int head_dim, int features) {
  const bool one = !(features & kMask) != !(features & kBias);
  return head_dim == 128 && one ? 4 * 8 * PlainForwardTile<128>::THREADS : 0;
}

// The backward in one kernel: a warp owns 32 of BLOCK_N keys and half of the columns; the queries
// come BLOCK_M at a time through two buffers, but dO through one where two do not fit; P and dS
// cross shared memory.
template <int HEAD_DIM, int BLOCK_M_, int BLOCK_N_ = 128>
struct FusedBackwardTile {
  static constexpr int BLOCK_M = BLOCK_M_, BLOCK_N = BLOCK_N_;
  static constexpr int WARPS = BLOCK_N / 16, THREADS = 32 * WARPS;
  static constexpr int DOUT_BUFFERS = BLOCK_N == 64 && HEAD_DIM == 128 ? 1 : 2;
  static constexpr int SMEM = 2 * HEAD_DIM * (2 * BLOCK_N + (2 + DOUT_BUFFERS) * BLOCK_M) +
                              2 * 2 * BLOCK_M * BLOCK_N + 2 * 2 * 4 * BLOCK_M;
};
struct FusedShape {
  int block_m, block_n;  // 0: none fits
};
// The tile of a head dimension where a CTA may have `limit` bytes of shared memory.  64 columns
// take 128 queries in 162 KiB, or 64 in 97; 32, 96 and 128 columns 64 queries in 65, 129 and 161
// KiB.  GPUs with 99 KiB have 64 keys for 96 and 128 columns, in 89 and 97 KiB: twice the additions
// to dQ, and still five products where two kernels have seven.
constexpr FusedShape fused_shape(int head_dim, int limit) {
  if (head_dim == 64 && FusedBackwardTile<64, 128>::SMEM <= limit) return {128, 128};
  const int smem = head_dim == 32   ? FusedBackwardTile<32, 64>::SMEM
                   : head_dim == 64 ? FusedBackwardTile<64, 64>::SMEM
                   : head_dim == 96 ? FusedBackwardTile<96, 64>::SMEM
                                    : FusedBackwardTile<128, 64>::SMEM;
  if (head_dim <= 128 && smem <= limit) return {64, 128};
  const int half = head_dim == 96    ? FusedBackwardTile<96, 64, 64>::SMEM
                   : head_dim == 128 ? FusedBackwardTile<128, 64, 64>::SMEM
                                     : 0;
  return half && half <= limit ? FusedShape{64, 64} : FusedShape{0, 0};
}
// Heads that have such a tile of 64 keys.
constexpr bool kHasHalfTile(int head_dim) { return head_dim == 96 || head_dim == 128; }

template <class T>
constexpr bool kIsHalf = sizeof(T) == 2;

// Of backward_dkdv: wide heads have registers for one accumulator: two launches, p.pass = 0 for dV,
// 1 for dK.  Else both in one.
template <class T, int HEAD_DIM>
constexpr bool kTwoPasses = HEAD_DIM > (kIsHalf<T> ? 128 : 64);

constexpr int kRowThreads = 128;  // of kernels that give a warp a row

}  // namespace attn::cuda
