// O = softmax(scale * Q K^T + ...) V and LSE.  Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk,
// Dv], O [B, Hq, Sq, Dv]; D and Dv at most HEAD_DIM.
//
// One CTA = BLOCK_M query rows of one head, or with splits > 1 its share of their keys (decode.cuh
// plans, combine.cuh merges).  A warp owns 16 rows and all BLOCK_N keys of a tile, so the softmax
// needs only its own quads.  K and V tiles arrive by cp.async one tile ahead.
//
// For float32, decode and caches in pages; `pack` query heads of one K/V head may share a tile of
// rows (row r = query r % Sq of head r / Sq).  It is compiled for the features of a call
// (features.h).  Other calls in 16 bits have forward_plain.cuh and forward_features.cuh.
#pragma once
#include "../dropout.cuh"
#include "../forward_parts.cuh"
#include "rows.cuh"

namespace attn::cuda::sm80 {

// Keys [lo, hi) that the tile's rows may see.
ATTN_DEVICE void task_keys(const Params& p, const Sequence& seq, const Band& band, int row0,
                           int row1, int& lo, int& hi) {
  if (p.pack > 1) {
    const bool one_head = row0 / seq.seqlen_q == (row1 - 1) / seq.seqlen_q;
    band.key_range(one_head ? row0 % seq.seqlen_q : 0,
                   one_head ? (row1 - 1) % seq.seqlen_q + 1 : seq.seqlen_q, seq.seqlen_k, lo, hi);
  } else {
    band.key_range(row0, row1, seq.seqlen_k, lo, hi);
  }
}

// P: the weights of dropped pairs become 0 (1 / (1 - p) comes with the normalisation)
template <int TILES>
ATTN_DEVICE void drop(float (&P)[TILES][4], const Dropout& dropout, const Query (&query)[2],
                      int n0) {
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      bool first, second;
      dropout.keep_pair(query[r].h, query[r].i, n0 + 8 * n + 2 * (lane_id() & 3), first, second);
      if (!first) P[n][2 * r] = 0.0f;
      if (!second) P[n][2 * r + 1] = 0.0f;
    }
  }
}

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((ForwardTile<T, HEAD_DIM>::THREADS), 1)
void forward_general(ATTN_GRID_CONSTANT const Params p) {
  using Tile = ForwardTile<T, HEAD_DIM>;
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES, N = Tile::BLOCK_N, TILES = N / 8;
  const uint32_t Q_smem = smem_base(), K_smem = Q_smem + Tile::BLOCK_M * BYTES;
  const uint32_t V_smem = K_smem + Tile::STAGES * N * BYTES;
  const uint32_t flags = V_smem + Tile::STAGES * N * BYTES;

  const QueryTask task = QueryTask::of<BITS>(p, Tile::BLOCK_M);
  if (task.row0 < 0) return;  // packed: a number that stands for no tile
  const Sequence& seq = task.seq;
  const Score score(p, seq);
  const Dropout dropout = Dropout::of(p, seq);
  int lo, hi;
  task_keys(p, seq, score.band, task.row0, task.end, lo, hi);
  int t0 = lo / N, t1 = hi > lo ? ceil_div(hi, N) : t0;
  if (p.splits > 1) {
    const int share = ceil_div(t1 - t0, p.splits);
    t0 += task.split * share;
    t1 = min_int(t1, t0 + share);
  }

  // Each thread's two rows; the warp rests (but meets every barrier) when all its rows are padding.
  const int row = task.row0 + 16 * warp_id() + (lane_id() >> 2);
  const bool active = task.row0 + 16 * warp_id() < task.rows;
  Query query[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int at = min_int(row + 8 * r, task.rows - 1);
    query[r] = p.pack > 1 ? score.query(task.head + at / seq.seqlen_q, at % seq.seqlen_q)
                          : score.query(task.head, at);
  }

  const Rows Q = query_rows(p, seq, p.ptr.q, p.p.q, task.head, sizeof(T));
  const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, task.head / p.group, sizeof(T));
  const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, task.head / p.group, sizeof(T));
  const int dim = int(p.p.head_dim), dim_v = int(p.p.head_dim_v);
  auto copy_keys = [&](int t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, true>(K_smem + stage, K, t * N, seq.seqlen_k, dim,
                                                   p.k_vec);
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, true>(V_smem + stage, V, t * N, seq.seqlen_k, dim_v,
                                                   p.v_vec);
    cp_async_commit();
  };

  const float scale = BITS ? 1.0f : p.scale_log2;  // of what mask_scores() leaves
  float O[HEAD_DIM / 8][4] = {};
  RowState state;
  copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, true>(Q_smem, Q, task.row0, task.end, dim,
                                                             p.q_vec);
  if (t0 < t1) copy_keys(t0);
  for (int t = t0; t < t1; ++t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    const int n0 = t * N;
    cp_async_wait<0>();
    sync_threads();  // tile t is complete, and every warp is done with the buffer of t - 1
    if (Tile::STAGES > 1 && t + 1 < t1) copy_keys(t + 1);

    float S[TILES][4];
    if (active) {
      // S = Q K^T   [16, BLOCK_N] a warp
      multiply<T, HEAD_DIM, TILES>(S, Q_smem, 16 * warp_id(), K_smem + stage);
      mask_scores<BITS>(S, score, query, n0);
      online_softmax<may_have<BITS>(kStats)>(S, O, state, scale, has<BITS>(p, kStats));
      if (has<BITS>(p, kDropout)) drop(S, dropout, query, n0);
    }
    // O += P V   [16, Dv] a warp
    const bool bad = tile_has_nonfinite<T, HEAD_DIM, N, Tile::WARPS>(V_smem + stage, flags);
    accumulate_visible<T, HEAD_DIM, TILES, Tile::THREADS, true>(
        O, S, V_smem + stage, V, n0, seq.seqlen_k, dim_v, bad, false, active);
    if (Tile::STAGES == 1 && t + 1 < t1) {
      sync_threads();  // every warp has read K and V
      copy_keys(t + 1);
    }
  }
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  if (active) store_rows<T, BITS, true>(p, task, O, state, query, row, scale);
}

}  // namespace attn::cuda::sm80
