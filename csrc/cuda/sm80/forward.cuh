// O = softmax(scale * Q K^T + ...) V and LSE.  Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk,
// Dv], O [B, Hq, Sq, Dv]; D and Dv at most HEAD_DIM.
//
// One CTA = BLOCK_M query rows of one head, or with splits > 1 its share of their keys (decode.cuh
// plans, combine.cuh merges).  A warp owns 16 rows and all BLOCK_N keys of a tile, so the softmax
// needs only its own quads.  K and V tiles arrive by cp.async one tile ahead.
//
// GENERAL = false: dense or varlen with at most a causal or window band; the inner loop knows
// nothing else.  GENERAL = true: everything, by run-time branches; also paged caches and `pack`
// query heads of one K/V head in one tile of rows (row r = query r % Sq of head r / Sq).
#pragma once
#include "../dropout.cuh"
#include "../score.cuh"
#include "../softmax.cuh"

namespace attn::cuda::sm80 {

// Which rows and keys a CTA works on.
struct ForwardTask {
  int b, head, split;  // head: first query head of the rows
  int row0, rows;      // rows of the tile: row0 .. of `rows` in all

  ATTN_DEVICE static ForwardTask of(const Params& p, int block_m) {
    ForwardTask t;
    const int heads = int(p.p.heads_q) / p.pack;
    int x = block_id().x;
    t.split = x % p.splits, x /= p.splits;
    const int m = p.m_tiles - 1 - x % p.m_tiles;  // causal tiles grow: the longest first
    x /= p.m_tiles;
    t.head = x % heads * p.pack, t.b = x / heads;
    t.row0 = m * block_m;
    return t;
  }
};

// Keys [lo, hi) that the tile's rows may see.
template <bool GENERAL>
ATTN_DEVICE void task_keys(const Params& p, const Sequence& seq, const Band& band, int row0,
                           int row1, int& lo, int& hi) {
  if (GENERAL && p.pack > 1) {
    const bool one_head = row0 / seq.seqlen_q == (row1 - 1) / seq.seqlen_q;
    band.key_range(one_head ? row0 % seq.seqlen_q : 0,
                   one_head ? (row1 - 1) % seq.seqlen_q + 1 : seq.seqlen_q, seq.seqlen_k, lo, hi);
  } else {
    band.key_range(row0, row1, seq.seqlen_k, lo, hi);
  }
}

ATTN_DEVICE Rows query_rows(const Params& p, const Sequence& seq, const void* base,
                            const Strides& s, int head, int bytes) {
  const int64_t first = seq.b * s.b + head * s.h + seq.q_start * s.s;
  return {static_cast<const char*>(base) + first * bytes, s.s * bytes,
          p.pack > 1 ? seq.seqlen_q : 0, s.h * bytes, nullptr};
}

ATTN_DEVICE Rows key_rows(const Params& p, const Sequence& seq, const void* base, const Strides& s,
                          int head_k, int bytes) {
  const auto* start = static_cast<const char*>(base) + head_k * s.h * bytes;
  if (p.ptr.block_table)
    return {start, s.s * bytes, int(p.p.page_size), s.b * bytes,
            p.ptr.block_table + seq.b * p.p.block_table_stride};
  return {start + (seq.b * s.b + seq.k_start * s.s) * bytes, s.s * bytes, 0, 0, nullptr};
}

// S: products in, logits out.  Only for tiles that need it when the call is plain.
template <bool GENERAL, int TILES>
ATTN_DEVICE void mask_scores(float (&S)[TILES][4], const Score& score, const Query (&query)[2],
                             int n0) {
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) {
    ATTN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int j = n0 + 8 * n + 2 * (lane_id() & 3) + (c & 1);
      const Query& q = query[c >> 1];
      float derivative;
      if constexpr (GENERAL)
        S[n][c] = score.logit(S[n][c], q, j, derivative);
      else
        S[n][c] = j < score.seq.seqlen_k && score.band.keep(q.i, j) ? S[n][c] : -kInf;
    }
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

// Columns 8 n + 2 t + {0, 1} of one row, as T or as the floats of a partial result.
template <class Out, int ACC>
ATTN_DEVICE void store_row(Out* row, const float (&acc)[ACC][4], int r, float factor, int dim) {
  const int t = lane_id() & 3;
  const bool pairs = dim % 2 == 0 && reinterpret_cast<uintptr_t>(row) % (2 * sizeof(Out)) == 0;
  ATTN_UNROLL
  for (int n = 0; n < ACC; ++n) {
    const int d = 8 * n + 2 * t;
    const float a = factor == 0.0f ? 0.0f : acc[n][2 * r] * factor;
    const float b = factor == 0.0f ? 0.0f : acc[n][2 * r + 1] * factor;
    if (pairs && d < dim) {
      if constexpr (sizeof(Out) == 2)
        *reinterpret_cast<uint32_t*>(row + d) = pack<Out>(a, b);
      else
        stg_64(row + d, {as_uint(a), as_uint(b)});
    } else {
      if (d < dim) row[d] = from_float<Out>(a);
      if (d + 1 < dim) row[d + 1] = from_float<Out>(b);
    }
  }
}

// O, LSE and statistics of a warp's 16 rows, or one share of them.
template <class T, bool GENERAL, int ACC>
ATTN_DEVICE void store_rows(const Params& p, const Sequence& seq, const ForwardTask& task,
                            const float (&acc)[ACC][4], const RowState& state,
                            const Query (&query)[2], int row, float scale) {
  const bool stats = GENERAL && p.ptr.entropy;
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const Query& q = query[r];
    const bool valid = row + 8 * r < task.rows;
    const auto* sinks = static_cast<const float*>(p.ptr.sink);
    const bool partial = GENERAL && p.splits > 1;
    const RowResult result = finish_row(
        state, r, scale, GENERAL && sinks && !partial && valid ? sinks + q.h : nullptr, stats);
    if (!valid) continue;
    const float factor = GENERAL ? result.inverse * p.keep_scale : result.inverse;
    const bool writes = (lane_id() & 3) == 0;
    if (partial) {
      const int64_t all = p.p.batch * p.p.heads_q * p.p.seqlen_q;
      const int64_t at = (seq.b * p.p.heads_q + q.h) * p.p.seqlen_q + q.i + task.split * all;
      store_row(p.partial_o + at * p.p.head_dim_v, acc, r, factor, int(p.p.head_dim_v));
      if (!writes) continue;
      p.partial_stats[at] = result.lse;
      p.partial_stats[at + p.splits * all] = result.max_logit;
      p.partial_stats[at + 2 * p.splits * all] = result.entropy;
      continue;
    }
    const int64_t at = seq.b * p.p.o.b + q.h * p.p.o.h + (seq.q_start + q.i) * p.p.o.s;
    store_row(static_cast<T*>(p.ptr.o) + at, acc, r, factor, int(p.p.head_dim_v));
    if (!writes) continue;
    const int64_t lse = seq.lse_offset(p, q.h, q.i);
    static_cast<float*>(p.ptr.lse)[lse] = result.lse;
    if (!stats) continue;
    static_cast<float*>(p.ptr.max_logit)[lse] = result.max_logit;
    static_cast<float*>(p.ptr.entropy)[lse] = result.entropy;
  }
}

template <class T, int HEAD_DIM, bool GENERAL>
ATTN_KERNEL((ForwardTile<T, HEAD_DIM>::THREADS), 1)
void forward(ATTN_GRID_CONSTANT const Params p) {
  using Tile = ForwardTile<T, HEAD_DIM>;
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES, N = Tile::BLOCK_N, TILES = N / 8;
  const uint32_t Q_smem = smem_base(), K_smem = Q_smem + Tile::BLOCK_M * BYTES;
  const uint32_t V_smem = K_smem + Tile::STAGES * N * BYTES;
  const uint32_t flags = V_smem + Tile::STAGES * N * BYTES;

  ForwardTask task = ForwardTask::of(p, Tile::BLOCK_M);
  const Sequence seq = Sequence::of(p, task.b);
  task.rows = GENERAL ? p.pack * seq.seqlen_q : seq.seqlen_q;
  if (task.row0 >= task.rows) return;
  const Score score(p, seq);
  const Dropout dropout = Dropout::of(p, seq.b);
  const int row_end = min_int(task.row0 + Tile::BLOCK_M, task.rows);
  int lo, hi;
  task_keys<GENERAL>(p, seq, score.band, task.row0, row_end, lo, hi);
  int t0 = lo / N, t1 = hi > lo ? ceil_div(hi, N) : t0;
  if (GENERAL && p.splits > 1) {
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
    if constexpr (GENERAL)
      query[r] = p.pack > 1 ? score.query(task.head + at / seq.seqlen_q, at % seq.seqlen_q)
                            : score.query(task.head, at);
    else
      query[r] = Query{at, task.head, 0.0f, 0, 0};
  }

  const Rows Q = query_rows(p, seq, p.ptr.q, p.p.q, task.head, sizeof(T));
  const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, task.head / p.group, sizeof(T));
  const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, task.head / p.group, sizeof(T));
  const int dim = int(p.p.head_dim), dim_v = int(p.p.head_dim_v);
  auto copy_keys = [&](int t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, GENERAL>(K_smem + stage, K, t * N, seq.seqlen_k, dim,
                                                      p.k_vec);
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, GENERAL>(V_smem + stage, V, t * N, seq.seqlen_k, dim_v,
                                                      p.v_vec);
    cp_async_commit();
  };

  float O[HEAD_DIM / 8][4] = {};
  RowState state;
  const float scale = GENERAL ? 1.0f : p.scale_log2;
  copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, GENERAL>(Q_smem, Q, task.row0, row_end, dim,
                                                                p.q_vec);
  if (t0 < t1) copy_keys(t0);
  for (int t = t0; t < t1; ++t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    const int n0 = t * N;
    cp_async_wait<0>();
    sync_threads();  // tile t is complete, and every warp is done with the buffer of t - 1
    if (Tile::STAGES > 1 && t + 1 < t1) copy_keys(t + 1);
    const bool whole = n0 + N <= seq.seqlen_k && score.band.full(task.row0, row_end, n0, n0 + N) &&
                       !(GENERAL && p.pack > 1);

    float S[TILES][4];
    if (active) {
      // S = Q K^T   [16, BLOCK_N] a warp
      multiply<T, HEAD_DIM, TILES>(S, Q_smem, 16 * warp_id(), K_smem + stage);
      if (GENERAL || !whole) mask_scores<GENERAL>(S, score, query, n0);
      online_softmax<GENERAL>(S, O, state, scale, GENERAL && p.ptr.entropy);
      if (GENERAL && p.p.dropout_p > 0) drop(S, dropout, query, n0);
    }
    // O += P V   [16, Dv] a warp
    const bool bad = (GENERAL || !whole) &&
                     tile_has_nonfinite<T, HEAD_DIM, N, Tile::WARPS>(V_smem + stage, flags);
    accumulate_visible<T, HEAD_DIM, TILES, Tile::THREADS, GENERAL>(
        O, S, V_smem + stage, V, n0, seq.seqlen_k, dim_v, bad, false, active);
    if (Tile::STAGES == 1 && t + 1 < t1) {
      sync_threads();  // every warp has read K and V
      copy_keys(t + 1);
    }
  }
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  if (active) store_rows<T, GENERAL>(p, seq, task, O, state, query, row, scale);
}

}  // namespace attn::cuda::sm80
