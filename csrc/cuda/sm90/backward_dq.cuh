// dQ = scale * dS K on Hopper, for the calls of forward.cuh.  Q, dO [B, Hq, Sq, D or Dv], K, V [B,
// Hk, Sk, D or Dv], dQ as Q.
//
// One CTA = 128 query rows of one head, as in forward.cuh: a producer thread has the copy engine
// bring Q and dO, then K and V tiles through rings; two consumer warpgroups have 64 rows each: S =
// Q K^T and dP = dO V^T by wgmma from shared memory, dS in registers, dQ += dS K.  No other CTA
// adds to its rows, so that a result never depends on the order of CTAs.
#pragma once
#include "backward_parts.cuh"

namespace attn::cuda::sm90 {

// A consumer warpgroup: its registers, and a tile of keys at a time.
template <class T, int HEAD_DIM>
struct QueryGradient {
  using Tile = QueryGradientTile<HEAD_DIM>;
  static constexpr int N = Tile::BLOCK_N, TILES = N / 8, ACC = HEAD_DIM / 8;

  const Score& score;
  const Ring<STAGES>&K, &V;
  uint32_t Q_smem, dO_smem;  // its 64 rows
  int row, group;
  RowGradient gradient[2];  // of rows g and g + 8
  float dQ[ACC][4] = {};

  // P of tile n0.., in place of S.
  ATTN_DEVICE void weights(float (&S)[TILES][4], int n0, bool edge) const {
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c)
      S[n][c] = weight_of(S[n][c], score.p.scale_log2, gradient[c >> 1].lse);
    if (edge)
      mask_weights(S, {Columns::of_query(score, row, n0), Columns::of_query(score, row + 8, n0)});
  }

  ATTN_DEVICE void add(int turn, int n0, bool edge) {
    float S[TILES][4], dS[TILES][4];
    K.wait(turn);
    wgmma_fence();
    // S = Q K^T, dP = dO V^T   [64, BLOCK_N]
    issue_rows<T, HEAD_DIM, Tile::BLOCK_M>(S, Q_smem, K.tile(turn));
    V.wait(turn);
    wgmma_fence();  // once more, else ptxas finds the wait's loop in the way of dP's registers
    issue_rows<T, HEAD_DIM, Tile::BLOCK_M>(dS, dO_smem, V.tile(turn));
    wgmma_wait<1>();  // S is there
    wgmma_hold(S);
    weights(S, n0, edge);
    wgmma_hold(S);
    wgmma_wait<0>();  // dP is there
    wgmma_hold(dS);
    V.release(turn);
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) dS[n][c] = gradient_of(S[n][c], dS[n][c], gradient[c >> 1].delta);
    // dQ += dS K   [64, HEAD_DIM].  A NaN in K is already in dS of who sees it.
    if (edge && warpgroup_finds_nonfinite<T, Tile::KEY_BYTES>(K.tile(turn), group)) {
      add_visible<T>(dQ, dS, K.tile(turn));
    } else {
      uint32_t A[TILES / 2][4];
      pack_weights<T>(A, dS);
      wgmma_hold(dQ);
      wgmma_hold(A);
      wgmma_fence();
      issue_sum<T>(dQ, A, K.tile(turn));
      wgmma_wait<0>();
      wgmma_hold(dQ);
      wgmma_hold(A);  // the tensor cores have read it only now
    }
    K.release(turn);
  }
};

template <class T, int HEAD_DIM>
ATTN_DEVICE void consume_keys(const Params& p, const Sequence& seq, const ForwardTask& task, int t0,
                              int t1, uint32_t Q_smem, uint32_t dO_smem, uint32_t queries_full,
                              const Ring<STAGES>& K, const Ring<STAGES>& V) {
  constexpr int N = QueryGradientTile<HEAD_DIM>::BLOCK_N;
  const int group = warp_id() / 4 - 1, group_row = task.row0 + 64 * group;
  const int group_end = min_int(group_row + 64, task.rows);
  const int row = group_row + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, seq);
  QueryGradient<T, HEAD_DIM> mine{
      score, K, V, Q_smem + group * 64 * 128, dO_smem + group * 64 * 128, row, group, {}};
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) mine.gradient[r] = RowGradient::of(p, seq, task.head, row + 8 * r);
  int lo = 0, hi = 0;  // keys that some row of the warpgroup sees
  if (group_row < group_end) score.band.key_range(group_row, group_end, seq.seqlen_k, lo, hi);

  if (t0 < t1) mbarrier_wait(queries_full, 0);
  ATTN_NO_UNROLL
  for (int turn = 0; turn < t1 - t0; ++turn) {
    const int n0 = (t0 + turn) * N;
    if (n0 < hi && n0 + N > lo) {
      mine.add(turn, n0, has_edge(score, group_row, group_end, n0, n0 + N));
    } else {  // nothing for this warpgroup
      K.skip(turn);
      V.skip(turn);
    }
  }
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= seq.seqlen_q) continue;
    const int64_t at = seq.b * p.p.dq.b + task.head * p.p.dq.h + (row + 8 * r) * p.p.dq.s;
    store_row(static_cast<T*>(p.ptr.dq) + at, mine.dQ, r, p.scale, int(p.p.head_dim));
  }
}

template <class T, int HEAD_DIM>
ATTN_KERNEL(THREADS, 1)
void backward_dq(ATTN_GRID_CONSTANT const BackwardParams x) {
  using Tile = QueryGradientTile<HEAD_DIM>;
  constexpr int N = Tile::BLOCK_N;
  const Params& p = x.p;
  const uint32_t Q_smem = smem_base(), dO_smem = Q_smem + Tile::QUERY_BYTES;
  const uint32_t K_smem = dO_smem + Tile::QUERY_BYTES;
  const uint32_t V_smem = K_smem + STAGES * Tile::KEY_BYTES;
  const uint32_t queries_full = V_smem + STAGES * Tile::KEY_BYTES;
  const Ring<STAGES> K{K_smem, queries_full + 8, Tile::KEY_BYTES};
  const Ring<STAGES> V{V_smem, queries_full + 8 + RING_BARS, Tile::KEY_BYTES};

  ForwardTask task = ForwardTask::of(p, Tile::BLOCK_M);
  const Sequence seq = Sequence::of(p, task.b);
  task.rows = seq.seqlen_q;
  const int row_end = min_int(task.row0 + Tile::BLOCK_M, task.rows);
  int lo, hi;
  Band::of(p, seq).key_range(task.row0, row_end, seq.seqlen_k, lo, hi);
  const int t0 = lo / N, t1 = hi > lo ? ceil_div(hi, N) : t0;

  if (thread_id() == 0) {
    mbarrier_init(queries_full, 1);
    K.init();
    V.init();
    fence_mbarrier_init();
  }
  sync_threads();  // the mbarriers are there

  if (warp_id() < 4) {
    setmaxnreg_dec<PRODUCER_REGISTERS>();
    if (warp_id() == 0 && elect_one() && t0 < t1) {
      constexpr int S = Tile::SLABS, M = Tile::BLOCK_M;
      mbarrier_arrive_expect_tx(queries_full, 2 * Tile::QUERY_BYTES);
      load_rows<S, M>(Q_smem, x.Q, queries_full, task.row0, task.head, task.b);
      load_rows<S, M>(dO_smem, x.dO, queries_full, task.row0, task.head, task.b);
      const int head_k = task.head / p.group;
      ATTN_NO_UNROLL
      for (int turn = 0; turn < t1 - t0; ++turn) {
        K.template load<S, N>(turn, x.K, (t0 + turn) * N, head_k, task.b);
        V.template load<S, N>(turn, x.V, (t0 + turn) * N, head_k, task.b);
      }
    }
  } else {
    setmaxnreg_inc<CONSUMER_REGISTERS>();
    consume_keys<T, HEAD_DIM>(p, seq, task, t0, t1, Q_smem, dO_smem, queries_full, K, V);
  }
}

}  // namespace attn::cuda::sm90
