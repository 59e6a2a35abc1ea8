// O = softmax(scale * Q K^T) V and LSE on Hopper: dense, 16 bits, at most a causal or window band.
// Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk, Dv], O [B, Hq, Sq, Dv]; D, Dv at most HEAD_DIM.
// After FlashAttention-3 (Shah et al. 2024).
//
// One CTA = 128 query rows of one head, three warpgroups.  The first is the producer: one thread of
// it has the copy engine (TMA) bring Q, then K and V tiles into rings of STAGES buffers.  The other
// two are consumers, 64 rows each: S = Q K^T by wgmma from shared memory, softmax in registers, O
// += P V with P from registers.  A full and an empty mbarrier a buffer are all that they share.
//
// Tiles in shared memory are slabs of 64 columns, [slab][row][128 bytes], swizzled; columns beyond
// D and rows beyond the tensor are the engine's zeros.
#pragma once
#include "../forward_parts.cuh"
#include "traits.cuh"

namespace attn::cuda::sm90 {

// A ring of STAGES buffers: full and empty mbarriers, 8 bytes each.
template <int STAGES>
struct Ring {
  uint32_t tiles, full, bytes;
  ATTN_DEVICE uint32_t tile(int i) const { return tiles + uint32_t(i % STAGES) * bytes; }
  ATTN_DEVICE uint32_t full_bar(int i) const { return full + uint32_t(i % STAGES) * 8; }
  ATTN_DEVICE uint32_t empty_bar(int i) const { return full_bar(i) + 8 * STAGES; }
  ATTN_DEVICE static uint32_t parity(int i) { return uint32_t(i / STAGES) & 1; }

  ATTN_DEVICE void init() const {
    for (int s = 0; s < STAGES; ++s) {
      mbarrier_init(full_bar(s), 1);
      mbarrier_init(empty_bar(s), CONSUMER_WARPS);
    }
  }
  // Producer: all slabs of rows n0.. of one head into buffer i.
  template <int SLABS, int ROWS>
  ATTN_DEVICE void load(int i, const TensorMap& map, int n0, int head, int b) const {
    mbarrier_wait(empty_bar(i), parity(i) ^ 1);  // every consumer has read the tile before
    mbarrier_arrive_expect_tx(full_bar(i), int(bytes));
    ATTN_UNROLL
    for (int slab = 0; slab < SLABS; ++slab)
      tma_load_4d(tile(i) + uint32_t(slab * ROWS * 128), map, full_bar(i), 64 * slab, n0, head, b);
  }
  ATTN_DEVICE void wait(int i) const { mbarrier_wait(full_bar(i), parity(i)); }
  // Consumers, once a warp: it reads buffer i no more.
  ATTN_DEVICE void release(int i) const {
    sync_warp();  // every lane has read
    if (lane_id() == 0) mbarrier_arrive(empty_bar(i));
  }
};

// S = Q K^T   [64, BLOCK_N] a warpgroup.  Q: its first row.  Issued, not waited for.
template <class T, int HEAD_DIM, int BLOCK_M, int BLOCK_N, int TILES>
ATTN_DEVICE void issue_scores(float (&S)[TILES][4], uint32_t Q, uint32_t K) {
  ATTN_UNROLL
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const uint32_t slab = step / 4, column = step % 4 * 32;
    wgmma_ss<T, false>(S, wgmma_descriptor(Q + slab * BLOCK_M * 128 + column),
                       wgmma_descriptor(K + slab * BLOCK_N * 128 + column), step > 0);
  }
  wgmma_commit();
}

// O += P V   [64, HEAD_DIM] a warpgroup, P [TILES] as A operands.  Issued, not waited for.
template <class T, int ACC, int STEPS>
ATTN_DEVICE void issue_output(float (&O)[ACC][4], const uint32_t (&P)[STEPS][4], uint32_t V) {
  ATTN_UNROLL
  for (int step = 0; step < STEPS; ++step)
    wgmma_rs<T, true>(O, P[step], wgmma_descriptor(V + step * 2048, STEPS * 16 * 128), true);
  wgmma_commit();
}

// C fragments of P as A operands (mma.cuh): two neighbouring tiles each.
template <class T, int TILES>
ATTN_DEVICE void pack_weights(uint32_t (&P)[TILES / 2][4], const float (&S)[TILES][4]) {
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) {
    P[n / 2][n % 2 * 2] = pack<T>(S[n][0], S[n][1]);
    P[n / 2][n % 2 * 2 + 1] = pack<T>(S[n][2], S[n][3]);
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
  return group == 0 ? named_barrier_or<1>(128, bad) : named_barrier_or<2>(128, bad);
}

// O += P V key by key, only where P != 0: what excluded rows of V hold is not touched.  Slow.
template <class T, int TILES, int ACC>
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
          if (weight[r] != 0.0f) {
            O[n][2 * r] = fmaf(weight[r], unpack_lo<T>(word), O[n][2 * r]);
            O[n][2 * r + 1] = fmaf(weight[r], unpack_hi<T>(word), O[n][2 * r + 1]);
          }
      }
    }
  }
}

// The key tiles of a CTA in the order of their turns: first those at an edge of the band, which
// need a mask, then those that every row sees whole.
struct Turns {
  int first, whole_first, whole_end, end;  // tiles
  int lo, hi;                              // keys that some row sees
  ATTN_DEVICE int edges() const { return end - first - (whole_end - whole_first); }
  ATTN_DEVICE int count() const { return end - first; }
  ATTN_DEVICE int tile(int turn) const {
    if (turn >= edges()) return whole_first + turn - edges();
    const int t = first + turn;
    return t < whole_first ? t : t + whole_end - whole_first;
  }

  // Of queries [i0, i1).
  ATTN_DEVICE static Turns of(const Band& band, int i0, int i1, int seqlen_k, int block_n) {
    Turns s;
    band.key_range(i0, i1, seqlen_k, s.lo, s.hi);
    s.first = s.lo / block_n, s.end = s.hi > s.lo ? ceil_div(s.hi, block_n) : s.first;
    const int whole_lo = band.left < 0 ? 0 : max_int(0, i1 - 1 + band.diagonal - band.left);
    const int whole_hi = band.right < 0
                             ? seqlen_k
                             : max_int(0, min_int(seqlen_k, i0 + band.diagonal + band.right + 1));
    s.whole_first = min_int(s.end, max_int(s.first, ceil_div(whole_lo, block_n)));
    s.whole_end = max_int(s.whole_first, min_int(s.end, whole_hi / block_n));
    return s;
  }
};

// A consumer warpgroup: its registers, and a tile of keys at a time.
template <class T, int HEAD_DIM>
struct Consumer {
  using Tile = ForwardTile90<HEAD_DIM>;
  static constexpr int N = Tile::BLOCK_N, TILES = N / 8, ACC = HEAD_DIM / 8;

  const Params& p;
  const Ring<STAGES>&K, &V;
  uint32_t Q_smem;  // its 64 rows
  float O[ACC][4] = {};
  uint32_t P[TILES / 2][4];
  RowState state;

  ATTN_DEVICE Consumer(const Params& params, const Ring<STAGES>& k, const Ring<STAGES>& v,
                       uint32_t q)
      : p(params), K(k), V(v), Q_smem(q) {}

  // S = Q K^T, of the tile whose turn it is and that is there.  Issued.
  ATTN_DEVICE void scores(float (&S)[TILES][4], int turn) {
    wgmma_hold(O);
    wgmma_hold(P);
    wgmma_fence();
    issue_scores<T, HEAD_DIM, Tile::BLOCK_M, N>(S, Q_smem, K.tile(turn));
  }
  ATTN_DEVICE void output(int turn) { issue_output<T>(O, P, V.tile(turn)); }

  // S becomes P; O must be multiplied by alpha[0][0] (row g) and alpha[0][2] (row g + 8).
  ATTN_DEVICE void softmax(float (&S)[TILES][4], float (&alpha)[1][4]) {
    ATTN_UNROLL
    for (int i = 0; i < 4; ++i) alpha[0][i] = 1.0f;
    online_softmax<false>(S, alpha, state, p.scale_log2, false);
  }
  ATTN_DEVICE void rescale(const float (&alpha)[1][4]) {
    ATTN_UNROLL
    for (int n = 0; n < ACC; ++n) ATTN_UNROLL
    for (int i = 0; i < 4; ++i) O[n][i] *= alpha[0][i];
  }

  // A tile at an edge, by itself.
  ATTN_DEVICE void edge(const Score& score, const Query (&query)[2], int group, int turn, int n0) {
    float S[TILES][4], alpha[1][4];
    K.wait(turn);
    scores(S, turn);
    wgmma_wait<0>();
    wgmma_hold(S);
    K.release(turn);
    mask_scores<false>(S, score, query, n0);
    softmax(S, alpha);
    rescale(alpha);
    V.wait(turn);
    if (warpgroup_finds_nonfinite<T, Tile::KEY_BYTES>(V.tile(turn), group)) {
      add_visible<T>(O, S, V.tile(turn));
    } else {
      pack_weights<T>(P, S);
      wgmma_hold(O);
      wgmma_hold(P);
      wgmma_fence();
      output(turn);
      wgmma_wait<0>();
      wgmma_hold(O);
    }
    V.release(turn);
  }

  // Tiles that every row sees: S of one tile and P V of the tile before are under way together, and
  // the softmax runs while P V still does.
  ATTN_DEVICE void whole(int turn, int end) {
    if (turn >= end) return;
    float S[TILES][4], alpha[1][4];
    K.wait(turn);
    scores(S, turn);
    wgmma_wait<0>();
    wgmma_hold(S);
    K.release(turn);
    softmax(S, alpha);
    rescale(alpha);
    pack_weights<T>(P, S);
    if (turn + 1 < end) K.wait(turn + 1);
    ATTN_NO_UNROLL
    for (++turn; turn < end; ++turn) {
      V.wait(turn - 1);
      scores(S, turn);
      output(turn - 1);
      wgmma_wait<1>();  // S is there
      wgmma_hold(S);
      K.release(turn);
      softmax(S, alpha);
      wgmma_hold(S);
      // Now, since ptxas would move the softmax behind the next wait, but not across a loop.
      if (turn + 1 < end) K.wait(turn + 1);
      wgmma_wait<0>();  // O is there
      wgmma_hold(O);
      V.release(turn - 1);
      rescale(alpha);
      pack_weights<T>(P, S);
    }
    V.wait(turn - 1);
    wgmma_hold(O);
    wgmma_hold(P);
    wgmma_fence();
    output(turn - 1);
    wgmma_wait<0>();
    wgmma_hold(O);
    V.release(turn - 1);
  }
};

template <class T, int HEAD_DIM>
ATTN_DEVICE void consume(const Params& p, const Sequence& seq, const ForwardTask& task,
                         const Turns& turns, uint32_t Q_smem, uint32_t Q_full,
                         const Ring<STAGES>& K, const Ring<STAGES>& V) {
  constexpr int N = ForwardTile90<HEAD_DIM>::BLOCK_N;
  const int group = warp_id() / 4 - 1, group_row = task.row0 + 64 * group;
  const int group_end = min_int(group_row + 64, task.rows);
  const int row = group_row + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, seq);
  Query query[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r)
    query[r] = Query{min_int(row + 8 * r, task.rows - 1), task.head, 0.0f, 0, 0};
  int lo = 0, hi = 0;  // keys that some row of the warpgroup sees
  if (group_row < group_end) score.band.key_range(group_row, group_end, seq.seqlen_k, lo, hi);

  Consumer<T, HEAD_DIM> mine(p, K, V, Q_smem + group * 64 * 128);
  if (turns.count()) mbarrier_wait(Q_full, 0);
  int turn = 0;
  ATTN_NO_UNROLL
  for (; turn < (lo < hi ? turns.edges() : turns.count()); ++turn) {
    const int n0 = turns.tile(turn) * N;
    if (n0 < hi && n0 + N > lo) {
      mine.edge(score, query, group, turn, n0);
    } else {  // nothing for this warpgroup, but the buffers are its to free
      K.wait(turn);
      K.release(turn);
      V.wait(turn);
      V.release(turn);
    }
  }
  mine.whole(turn, turns.count());
  store_rows<T, false>(p, seq, task, mine.O, mine.state, query, row, p.scale_log2);
}

template <class T, int HEAD_DIM>
ATTN_KERNEL((ForwardTile90<HEAD_DIM>::THREADS), 1)
void forward(ATTN_GRID_CONSTANT const ForwardParams x) {
  using Tile = ForwardTile90<HEAD_DIM>;
  const Params& p = x.p;
  const uint32_t Q_smem = smem_base(), K_smem = Q_smem + Tile::QUERY_BYTES;
  const uint32_t V_smem = K_smem + STAGES * Tile::KEY_BYTES;
  const uint32_t Q_full = V_smem + STAGES * Tile::KEY_BYTES;
  const Ring<STAGES> K{K_smem, Q_full + 8, Tile::KEY_BYTES};
  const Ring<STAGES> V{V_smem, Q_full + 8 + 16 * STAGES, Tile::KEY_BYTES};

  ForwardTask task = ForwardTask::of(p, Tile::BLOCK_M);
  const Sequence seq = Sequence::of(p, task.b);
  task.rows = seq.seqlen_q;
  const int row_end = min_int(task.row0 + Tile::BLOCK_M, task.rows);
  const Turns turns = Turns::of(Band::of(p, seq), task.row0, row_end, seq.seqlen_k, Tile::BLOCK_N);

  if (thread_id() == 0) {
    mbarrier_init(Q_full, 1);
    K.init();
    V.init();
    fence_mbarrier_init();
  }
  sync_threads();  // the mbarriers are there

  if (warp_id() < 4) {
    setmaxnreg_dec<24>();
    if (warp_id() == 0 && elect_one() && turns.count()) {
      mbarrier_arrive_expect_tx(Q_full, Tile::QUERY_BYTES);
      ATTN_UNROLL
      for (int slab = 0; slab < Tile::SLABS; ++slab)
        tma_load_4d(Q_smem + uint32_t(slab * Tile::BLOCK_M * 128), x.Q, Q_full, 64 * slab,
                    task.row0, task.head, task.b);
      const int head_k = task.head / p.group;
      const auto load = [&](const Ring<STAGES>& ring, const TensorMap& map, int turn) {
        ring.template load<Tile::SLABS, Tile::BLOCK_N>(turn, map, turns.tile(turn) * Tile::BLOCK_N,
                                                       head_k, task.b);
      };
      load(K, x.K, 0);
      ATTN_NO_UNROLL
      for (int i = 0; i < turns.count(); ++i) {
        if (i + 1 < turns.count()) load(K, x.K, i + 1);  // is needed before V of this turn
        load(V, x.V, i);
      }
    }
  } else {
    setmaxnreg_inc<240>();
    consume<T, HEAD_DIM>(p, seq, task, turns, Q_smem, Q_full, K, V);
  }
}

}  // namespace attn::cuda::sm90
