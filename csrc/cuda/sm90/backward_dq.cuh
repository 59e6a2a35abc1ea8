// dQ = scale * dS K on Hopper, for the calls of forward.cuh.  Q, dO [B, Hq, Sq, D or Dv], K, V [B,
// Hk, Sk, D or Dv], dQ as Q.
//
// One CTA = 128 query rows of one head: a producer thread has the copy engine
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
  uint32_t queries;  // its 64 rows of Q (wgmma_word); those of dO are QUERY_BYTES further on
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

  // dS in place of dP.
  template <bool EDGE>
  ATTN_DEVICE void gradients(float (&dP)[TILES][4], const float (&P)[TILES][4]) const {
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c)
      dP[n][c] = gradient_of<EDGE>(P[n][c], dP[n][c], gradient[c >> 1].delta);
  }

  // S = Q K^T, dP = dO V^T   [64, BLOCK_N].  Issued.
  ATTN_DEVICE void issue(float (&S)[TILES][4], float (&dP)[TILES][4], int turn) const {
    K.wait(turn);
    wgmma_fence();
    issue_rows<T, HEAD_DIM, Tile::BLOCK_M>(S, wgmma_operand(queries, 0),
                                           wgmma_operand(wgmma_word(K.tile(turn)), 0));
    V.wait(turn);
    wgmma_fence();  // once more, else ptxas finds the wait's loop in the way of dP's registers
    issue_rows<T, HEAD_DIM, Tile::BLOCK_M>(dP, wgmma_operand(queries, Tile::QUERY_BYTES),
                                           wgmma_operand(wgmma_word(V.tile(turn)), 0));
  }
  // dQ += dS K   [64, HEAD_DIM].  A NaN in K is already in dS of who sees it.
  ATTN_DEVICE void add_gradients(const float (&dS)[TILES][4], int turn, bool edge) {
    if (edge && warpgroup_finds_nonfinite<T, Tile::KEY_BYTES>(K.tile(turn), group)) {
      add_visible<T>(dQ, dS, K.tile(turn));
    } else {
      uint32_t A[TILES / 2][4];
      pack_weights<T>(A, dS);
      wgmma_hold(dQ);
      wgmma_hold(A);
      wgmma_fence();
      issue_sum<T>(dQ, A, wgmma_word(K.tile(turn)));
      wgmma_wait<0>();
      wgmma_hold(dQ);
      wgmma_hold(A);  // the tensor cores have read it only now
    }
    K.release(turn);
  }

  ATTN_DEVICE void add(int turn, int n0, bool edge) {
    float S[TILES][4], dS[TILES][4];
    issue(S, dS, turn);
    wgmma_wait<1>();  // S is there
    wgmma_hold(S);
    weights(S, n0, edge);
    wgmma_hold(S);
    wgmma_wait<0>();  // dP is there
    wgmma_hold(dS);
    V.release(turn);
    edge ? gradients<true>(dS, S) : gradients<false>(dS, S);
    add_gradients(dS, turn, edge);
  }
};

// make(QueryGradient, score, head): it, or what has features.
template <class T, int HEAD_DIM, int BITS, class Make>
ATTN_DEVICE void consume_keys(const Params& p, const QueryTask& task, int t0, int t1,
                              const QueryMemory<QueryGradientTile<HEAD_DIM>>& smem,
                              const Make& make) {
  constexpr int N = QueryGradientTile<HEAD_DIM>::BLOCK_N;
  const Sequence& seq = task.seq;
  const int group = warp_id() / 4 - 1, group_row = task.row0 + 64 * group;
  const int group_end = min_int(group_row + 64, task.rows);
  const int row = group_row + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, seq);
  auto mine = make(
      QueryGradient<T, HEAD_DIM>{
          score, smem.K, smem.V, wgmma_word(smem.Q + group * 64 * 128), row, group, {}},
      score, task.head);
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) mine.gradient[r] = RowGradient::of(p, seq, task.head, row + 8 * r);
  int lo = 0, hi = 0;  // keys that some row of the warpgroup sees
  if (group_row < group_end) score.band.key_range(group_row, group_end, seq.seqlen_k, lo, hi);

  if (t0 < t1) mbarrier_wait(smem.queries_full, 0);
  ATTN_NO_UNROLL
  for (int turn = 0; turn < t1 - t0; ++turn) {
    const int n0 = (t0 + turn) * N;
    if (n0 < hi && n0 + N > lo) {
      mine.add(turn, n0, has_edge(score, group_row, group_end, n0, n0 + N));
    } else {  // nothing for this warpgroup
      smem.K.skip(turn);
      smem.V.skip(turn);
    }
  }
  const bool bad = warp_finds_nan(mine.dQ);
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= seq.seqlen_q) continue;
    const int64_t at =
        seq.b * p.p.dq.b + task.head * p.p.dq.h + (seq.q_start + row + 8 * r) * p.p.dq.s;
    store_row<false>(static_cast<T*>(p.ptr.dq) + at, mine.dQ, r, p.scale, int(p.p.head_dim));
  }
  if (bad)
    each_row(group_row + 16 * (warp_id() % 4), seq.seqlen_q,
             [&](int i) { Repair<T, HEAD_DIM, BITS>{p, seq}.query_gradient(task.head, i); });
}

// The producer's thread: Q and dO, then K and V of tiles t0 .. t1.
template <bool FOURS, class Tile>
ATTN_DEVICE void produce_keys(const BackwardParams& x, const QueryTask& task, int t0, int t1,
                              const QueryMemory<Tile>& smem) {
  constexpr int S = Tile::SLABS, M = Tile::BLOCK_M, N = Tile::BLOCK_N;
  mbarrier_arrive_expect_tx(smem.queries_full, 2 * Tile::QUERY_BYTES);
  const Coordinates at(x.p, task.seq);
  load_rows<S, M>(smem.Q, x.Q, smem.queries_full, at.q + task.row0, task.head, at.b);
  load_rows<S, M>(smem.dO, x.dO, smem.queries_full, at.q + task.row0, task.head, at.b);
  const int head_k = task.head / x.p.group;
  ATTN_NO_UNROLL
  for (int turn = 0; turn < t1 - t0; ++turn) {
    smem.K.template load<S, N, FOURS>(turn, x.K, at.k + (t0 + turn) * N, head_k, at.b);
    smem.V.template load<S, N, FOURS>(turn, x.V, at.k + (t0 + turn) * N, head_k, at.b);
  }
}

// BITS: features; with some, keys lie in the order of fours.cuh.
template <class T, int HEAD_DIM, int BITS, class Make>
ATTN_DEVICE void run_query_task(const BackwardParams& x, const Make& make) {
  using Tile = QueryGradientTile<HEAD_DIM>;
  constexpr int N = Tile::BLOCK_N;
  const auto smem = QueryMemory<Tile>::of(smem_base());
  const QueryTask task = QueryTask::of<0>(x.p, Tile::BLOCK_M);
  if (task.row0 < 0) return;  // packed: a number that stands for no tile
  int lo, hi;
  Band::of(x.p, task.seq).key_range(task.row0, task.end, task.seq.seqlen_k, lo, hi);
  const int t0 = lo / N, t1 = hi > lo ? ceil_div(hi, N) : t0;
  const auto load = [&] {
    if (warp_id() == 0 && elect_one() && t0 < t1) produce_keys<BITS != 0>(x, task, t0, t1, smem);
  };
  run_roles(smem, load, [&] { consume_keys<T, HEAD_DIM, BITS>(x.p, task, t0, t1, smem, make); });
}

template <class T, int HEAD_DIM>
ATTN_KERNEL(THREADS, 1)
void backward_dq(ATTN_GRID_CONSTANT const BackwardParams x) {
  run_query_task<T, HEAD_DIM, 0>(
      x, [](const QueryGradient<T, HEAD_DIM>& mine, const Score&, int) { return mine; });
}

}  // namespace attn::cuda::sm90
