// What the Hopper kernels share: rings of buffers between the copy engine and the consumers,
// products of tiles by wgmma, and the slow products that step around NaN.
//
// Tiles in shared memory are slabs of 64 columns, [slab][row][128 bytes], swizzled; columns beyond
// D and rows beyond the tensor are the engine's zeros.
#pragma once
#include "../forward_parts.cuh"
#include "../ptx_sm90.cuh"
#include "../repair.cuh"
#include "tiles.h"

namespace attn::cuda::sm90 {

// A sequence as the copy engine knows it: where its queries and keys begin, and the last
// coordinate. Boxes are cut at the end of the tensor, not of the sequence: kernels mask, and do not
// store, what lies behind it.
struct Coordinates {
  int q, k, b;

  ATTN_DEVICE explicit Coordinates(const Params& p, const Sequence& seq)
      : q(int(seq.q_start)), k(int(seq.k_start)), b(p.ptr.cu_seqlens_q ? 0 : seq.b) {}
};

// All slabs of rows r0.. of one head, announced on `bar` by the caller.  FOURS: a box of the map
// has every other row, and rows r0, r0 + 2, .. come before r0 + 1, r0 + 3, .. (fours.cuh).
template <int SLABS, int ROWS, bool FOURS = false>
ATTN_DEVICE void load_rows(uint32_t tile, const TensorMap& map, uint32_t bar, int r0, int head,
                           int b) {
  constexpr int BOXES = FOURS ? 2 : 1;
  ATTN_UNROLL
  for (int slab = 0; slab < SLABS; ++slab) ATTN_UNROLL
  for (int box = 0; box < BOXES; ++box)
    tma_load_4d(tile + uint32_t((slab * BOXES + box) * (ROWS / BOXES) * 128), map, bar, 64 * slab,
                r0 + box, head, b);
}

// A ring of STAGES buffers: full and empty mbarriers, 8 bytes each.
//
// INDEX: how turns are counted.  Signed, ptxas takes fewer registers in the backward, whose turns
// never go round; unsigned, fewer instructions in the forward.
template <int STAGES, class INDEX = int>
struct Ring {
  uint32_t tiles, full, bytes;
  ATTN_DEVICE uint32_t tile(int i) const { return tiles + uint32_t(INDEX(i) % STAGES) * bytes; }
  ATTN_DEVICE uint32_t full_bar(int i) const { return full + uint32_t(INDEX(i) % STAGES) * 8; }
  ATTN_DEVICE uint32_t empty_bar(int i) const { return full_bar(i) + 8 * STAGES; }
  ATTN_DEVICE static uint32_t parity(int i) { return uint32_t(INDEX(i) / STAGES) & 1; }

  ATTN_DEVICE void init(int producers = 1, int consumers = CONSUMER_WARPS) const {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full_bar(s), producers);
      mbarrier_init(empty_bar(s), consumers);
    }
  }
  // Producer: all slabs of rows r0.. of one head into buffer i.
  template <int SLABS, int ROWS, bool FOURS = false>
  ATTN_DEVICE void load(int i, const TensorMap& map, int r0, int head, int b) const {
    wait_empty(i);
    mbarrier_arrive_expect_tx(full_bar(i), int(bytes));
    load_rows<SLABS, ROWS, FOURS>(tile(i), map, full_bar(i), r0, head, b);
  }
  // Producers, before they write buffer i.
  ATTN_DEVICE void wait_empty(int i) const {
    mbarrier_wait(empty_bar(i), parity(i) ^ 1);  // every consumer has read the tile before
  }
  ATTN_DEVICE void wait(int i) const { wait(full_bar(i), i); }
  // Consumers, once a warp: it reads buffer i no more.
  ATTN_DEVICE void release(int i) const { release(full_bar(i)); }
  // The same of a buffer that is known by its full mbarrier.
  ATTN_DEVICE static void wait(uint32_t bar, int i) { mbarrier_wait(bar, parity(i)); }
  ATTN_DEVICE static void release(uint32_t bar) {
    sync_warp();  // every lane has read
    if (lane_id() == 0) mbarrier_arrive(bar + 8 * STAGES);
  }
  // Consumers that need nothing of buffer i: it is theirs to free all the same.
  ATTN_DEVICE void skip(int i) const {
    wait(i);
    release(i);
  }
};

// The mbarriers, by one thread, and then the roles: one warpgroup produces, the others consume.
template <int PRODUCER = PRODUCER_REGISTERS, int CONSUMER = CONSUMER_REGISTERS, class Memory,
          class Produce, class Consume>
ATTN_DEVICE void run_roles(const Memory& smem, const Produce& produce, const Consume& consume) {
  if (thread_id() == 0) {
    smem.init();
    fence_mbarrier_init();
  }
  sync_threads();  // the mbarriers are there

  if (warp_id() < 4) {
    setmaxnreg_dec<PRODUCER>();
    produce();
  } else {
    setmaxnreg_inc<CONSUMER>();
    consume();
  }
}

// Shared memory of a CTA that owns queries: Q and dO, and rings of K and V.
template <class Tile>
struct QueryMemory {
  uint32_t Q, dO, queries_full;
  Ring<STAGES> K, V;

  ATTN_DEVICE static QueryMemory of(uint32_t base) {
    const uint32_t K_smem = base + Tile::RESIDENT * Tile::QUERY_BYTES;
    const uint32_t V_smem = K_smem + STAGES * Tile::KEY_BYTES;
    const uint32_t bars = V_smem + STAGES * Tile::KEY_BYTES;
    return {base,
            base + Tile::QUERY_BYTES,
            bars,
            {K_smem, bars + 8, Tile::KEY_BYTES},
            {V_smem, bars + 8 + RING_BARS, Tile::KEY_BYTES}};
  }
  ATTN_DEVICE void init() const {
    mbarrier_init(queries_full, 1);
    K.init();
    V.init();
  }
};

// C = A B^T   [64, 8 * TILES] a warpgroup, over HEAD_DIM columns.  Operands: A its first row, in a
// tile of A_ROWS; B a tile of 8 * TILES rows.  Issued, not waited for.
template <class T, int HEAD_DIM, int A_ROWS, int TILES>
ATTN_DEVICE void issue_rows(float (&C)[TILES][4], uint64_t a, uint64_t b) {
  ATTN_UNROLL
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const uint32_t slab = step / 4, column = step % 4 * 32;
    wgmma_ss<T, false>(C, wgmma_moved(a, slab * A_ROWS * 128 + column),
                       wgmma_moved(b, slab * (8 * TILES) * 128 + column), step > 0);
  }
  wgmma_commit();
}

// acc += P V   [64, HEAD_DIM] a warpgroup: P [STEPS] as A operands, V the tile of 16 * STEPS rows
// that lies `bytes` behind `word` (wgmma_operand).  Issued, not waited for.
template <class T, int ACC, int STEPS>
ATTN_DEVICE void issue_sum(float (&acc)[ACC][4], const uint32_t (&P)[STEPS][4], uint32_t word,
                           uint32_t bytes = 0) {
  const uint64_t v = wgmma_operand(word, bytes, STEPS * 16 * 128);
  ATTN_UNROLL
  for (int step = 0; step < STEPS; ++step)
    wgmma_rs<T, true>(acc, P[step], wgmma_moved(v, step * 2048), true);
  wgmma_commit();
}

// Two neighbours of P.  DROPS: what is below 0 was dropped, and counts as 0.
template <class T, bool DROPS>
ATTN_DEVICE uint32_t pack_pair(float lo, float hi) {
  if constexpr (DROPS) return pack_relu<T>(lo, hi);
  return pack<T>(lo, hi);
}
// C fragments of P as A operands (mma.cuh): two neighbouring tiles each.
template <class T, bool DROPS = false, int TILES>
ATTN_DEVICE void pack_weights(uint32_t (&P)[TILES / 2][4], const float (&S)[TILES][4]) {
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) {
    P[n / 2][n % 2 * 2] = pack_pair<T, DROPS>(S[n][0], S[n][1]);
    P[n / 2][n % 2 * 2 + 1] = pack_pair<T, DROPS>(S[n][2], S[n][3]);
  }
}

// True in the whole warpgroup when the tile holds NaN or infinities.
template <class T, int BYTES>
ATTN_DEVICE bool warpgroup_finds_nonfinite(uint32_t tile, int group) {
  bool bad = false;
  ATTN_NO_UNROLL
  for (int at = 16 * (thread_id() % 128); at < BYTES; at += 16 * 128) {
    const U32x4 v = lds_128(tile + at);
    bad |= !(word_is_finite(T{}, v.x) && word_is_finite(T{}, v.y) && word_is_finite(T{}, v.z) &&
             word_is_finite(T{}, v.w));
  }
  fence_proxy_async();  // the copy engine may load over it once it is released
  return group == 0 ? named_barrier_or<1>(128, bad) : named_barrier_or<2>(128, bad);
}

// O += P V key by key, only where P != 0 (DROPS: nor below 0): what excluded rows of V hold is not
// touched.  Slow.
template <class T, bool DROPS = false, int TILES, int ACC>
ATTN_DEVICE void add_visible(float (&O)[ACC][4], const float (&P)[TILES][4], uint32_t V) {
  const int quad = lane_id() & 28, t = lane_id() & 3;
  ATTN_UNROLL
  for (int tile = 0; tile < TILES; ++tile) {  // unrolled: P in registers
    ATTN_NO_UNROLL
    for (int key = 0; key < 8; ++key) {
      float weight[2];
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r)
        weight[r] = shfl(key & 1 ? P[tile][2 * r + 1] : P[tile][2 * r], quad | key >> 1);
      const uint32_t row = V + uint32_t(8 * tile + key) * 128 + 4 * t;
      ATTN_UNROLL
      for (int n = 0; n < ACC; ++n) {
        const uint32_t word =
            lds_32(row + uint32_t(n / 8 * 8 * TILES * 128) + uint32_t((n % 8 ^ key) << 4));
        ATTN_UNROLL
        for (int r = 0; r < 2; ++r)
          if (weight[r] != 0.0f && !(DROPS && weight[r] < 0.0f)) {
            O[n][2 * r] = fmaf(weight[r], unpack_lo<T>(word), O[n][2 * r]);
            O[n][2 * r + 1] = fmaf(weight[r], unpack_hi<T>(word), O[n][2 * r + 1]);
          }
      }
    }
  }
  fence_proxy_async();  // the copy engine may load over V once it is released
}

}  // namespace attn::cuda::sm90
