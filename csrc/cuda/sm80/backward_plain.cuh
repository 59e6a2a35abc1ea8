// dQ, dK and dV of a plain call (16 bits, dense or varlen, at most a band) with heads of at most
// 128 columns, in two kernels without atomics, so that a result never depends on the order of CTAs
// (FlashAttention-2, Dao 2023):
//   backward_dq_plain    a CTA owns BLOCK_M queries of one head and streams the keys:
//                        dP = dO V^T, S = Q K^T, dQ += dS K
//   backward_dkdv_plain  a CTA owns BLOCK_M keys of one K/V head and streams the queries of its
//                        group: S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
// with P = exp(S - LSE), dS = P * (dP - delta), delta = rowsum(dO * O) - dLSE.  What is streamed is
// the column of a fragment, so P and dS go from registers into the next product (mma.cuh).
//
// Tiles that every row sees know of no mask.  No tile is looked at for NaN: what 0 * NaN leaves is
// computed once more (repair.cuh).
#pragma once
#include "../backward_parts.cuh"
#include "../forward_parts.cuh"
#include "../repair.cuh"
#include "backward_tiles.h"
#include "rows.cuh"

namespace attn::cuda::sm80 {

// P: a product in, a weight out; dS: dP - delta in, dS out.  EDGE: the pair may not count.
template <bool EDGE>
ATTN_DEVICE void plain_gradient(float& P, float& dS, float scale_log2, float lse, bool counts) {
  P = exp2_approx(fmaf(P, scale_log2, -lse));
  if (EDGE && !counts) P = 0.0f;
  // not P * (..) where P = 0 at an edge: V or dO there may hold NaN
  dS = EDGE && P == 0.0f ? 0.0f : P * dS;
}

// dQ of BLOCK_M queries.  K and V have one buffer each: K of a tile arrives while dP is computed, V
// of the next one while S and dQ are.
template <class T, int HEAD_DIM>
struct QueryGradient {
  using Tile = QueryGradientTile<HEAD_DIM>;
  static constexpr int F = Tile::FRAGMENTS, M = Tile::BLOCK_M, N = Tile::BLOCK_N;
  static constexpr int THREADS = Tile::THREADS, TILES = N / 8, ACC = HEAD_DIM / 8;
  static constexpr int BYTES = Row<T, HEAD_DIM>::BYTES;
  using Stream = TileStream<T, HEAD_DIM, N, THREADS>;

  const Params& p;
  const Sequence& seq;
  const QueryTask& task;
  const Band& band;
  const Turns& turns;
  Rows K, V;
  RowGradient row_values[F][2];
  float dQ[F][ACC][4] = {};

  ATTN_DEVICE QueryGradient(const Params& params, const QueryTask& t, const Band& b,
                            const Turns& order)
      : p(params),
        seq(t.seq),
        task(t),
        band(b),
        turns(order),
        K(key_rows(p, seq, p.ptr.k, p.p.k, task.head / p.group, sizeof(T))),
        V(key_rows(p, seq, p.ptr.v, p.p.v, task.head / p.group, sizeof(T))) {
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r)
      row_values[f][r] = RowGradient::of(p, seq, task.head, row(f) + 8 * r);
  }

  ATTN_DEVICE static uint32_t Q_smem() { return smem_base(); }
  ATTN_DEVICE static uint32_t dO_smem() { return Q_smem() + M * BYTES; }
  ATTN_DEVICE static uint32_t K_smem() { return dO_smem() + M * BYTES; }
  ATTN_DEVICE static uint32_t V_smem() { return K_smem() + N * BYTES; }
  ATTN_DEVICE static int warp_row() { return Tile::WARP_ROWS * warp_id(); }
  ATTN_DEVICE int row(int f) const { return task.row0 + warp_row() + 16 * f + (lane_id() >> 2); }

  ATTN_DEVICE void copy_queries() const {
    const Rows Q = query_rows(p, seq, p.ptr.q, p.p.q, task.head, sizeof(T));
    const Rows dO = query_rows(p, seq, p.ptr.dout, p.p.dout, task.head, sizeof(T));
    copy_tile<T, HEAD_DIM, M, THREADS, false>(Q_smem(), Q, task.row0, task.end, int(p.p.head_dim),
                                              p.q_vec);
    copy_tile<T, HEAD_DIM, M, THREADS, false>(dO_smem(), dO, task.row0, task.end,
                                              int(p.p.head_dim_v), p.dout_vec);
  }
  ATTN_DEVICE void copy_K(int turn) const {
    copy_tile<T, HEAD_DIM, N, THREADS, false>(K_smem(), K, turns.tile(turn) * N, seq.seqlen_k,
                                              int(p.p.head_dim), p.k_vec);
  }
  ATTN_DEVICE void copy_V(int turn) const {
    copy_tile<T, HEAD_DIM, N, THREADS, false>(V_smem(), V, turns.tile(turn) * N, seq.seqlen_k,
                                              int(p.p.head_dim_v), p.v_vec);
  }

  // Keys n0 ..; this_K and next_V copy.
  template <bool EDGE, class CopyK, class CopyV>
  ATTN_DEVICE void tile(const RowGradient (&row_values)[F][2], int n0, const CopyK& this_K,
                        const CopyV& next_V) {
    float S[F][TILES][4], dS[F][TILES][4];
    cp_async_wait<0>();
    sync_threads();  // V of this turn is complete, and every warp has read K of the turn before
    this_K();
    cp_async_commit();
    // dP - delta = dO V^T - delta   [WARP_ROWS, BLOCK_N] a warp
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) dS[f][n][c] = -row_values[f][c >> 1].delta;
    add_products<T, HEAD_DIM>(dS, dO_smem(), warp_row(), V_smem());
    cp_async_wait<0>();
    sync_threads();  // K is complete, and every warp has read V
    next_V();
    cp_async_commit();
    // S = Q K^T
    multiply_rows<T, HEAD_DIM>(S, Q_smem(), warp_row(), K_smem());
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int i = row(f) + 8 * (c >> 1), j = n0 + 8 * n + 2 * (lane_id() & 3) + (c & 1);
      plain_gradient<EDGE>(S[f][n][c], dS[f][n][c], p.scale_log2, row_values[f][c >> 1].lse,
                           !EDGE || (j < seq.seqlen_k && band.keep(i, j)));
    }
    // dQ += dS K   [WARP_ROWS, D] a warp
    accumulate_rows<T, HEAD_DIM, true>(dQ, dS, K_smem());
  }
  ATTN_DEVICE void edge(int turn) {
    tile<true>(
        row_values, turns.tile(turn) * N, [&] { copy_K(turn); },
        [&] {
          if (turn + 1 < turns.count()) copy_V(turn + 1);
        });
  }
  // Tiles that every row sees, from `turn` to the last.
  ATTN_DEVICE void whole(int turn) {
    int left = turns.count() - turn;
    // V of the first of them is on its way
    Stream K_stream(K_smem(), K, turns.tile(turn) * N, int(p.p.head_dim));
    Stream V_stream(V_smem(), V, (turns.tile(turn) + 1) * N, int(p.p.head_dim_v));
    // Read once more: values that live over both loops are kept in memory at 96 columns on sm_120,
    // since registers are few in the loop over the edges.
    RowGradient rows[F][2];
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) rows[f][r] = RowGradient::of(p, seq, task.head, row(f) + 8 * r);
    ATTN_NO_UNROLL
    for (; left > 0; --left)
      tile<false>(
          rows, 0, [&] { K_stream.copy(); },
          [&] {
            if (left > 1) V_stream.copy();
          });
  }

  ATTN_DEVICE void store() const {
    bool bad = false;
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      bad |= warp_finds_nan(dQ[f]);
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int i = row(f) + 8 * r;
        if (i >= seq.seqlen_q) continue;
        const int64_t at = seq.b * p.p.dq.b + task.head * p.p.dq.h + (seq.q_start + i) * p.p.dq.s;
        store_result<T, 0>(p, p.ptr.dq, at, dQ[f], r, p.scale, int(p.p.head_dim));
      }
    }
    if (!bad) return;
    ATTN_NO_UNROLL
    for (int f = 0; f < F; ++f)
      each_row(task.row0 + warp_row() + 16 * f, seq.seqlen_q,
               [&](int i) { Repair<T, HEAD_DIM>{p, seq}.query_gradient(task.head, i); });
  }
};

template <class T, int HEAD_DIM>
ATTN_KERNEL((QueryGradientTile<HEAD_DIM>::THREADS), 1)
void backward_dq_plain(ATTN_GRID_CONSTANT const Params p) {
  using Kernel = QueryGradient<T, HEAD_DIM>;
  const QueryTask task = QueryTask::of<0>(p, Kernel::M);
  if (task.row0 < 0) return;  // packed: a number that stands for no tile
  const Band band = Band::of(p, task.seq);
  Turns turns = Turns::of(band, task.row0, task.end, task.seq.seqlen_k, Kernel::N);
  // rows that come element by element are not for the fast loop
  if (!(p.k_vec && p.v_vec)) turns.whole_first = turns.whole_end = turns.end;

  Kernel mine(p, task, band, turns);
  mine.copy_queries();
  if (turns.count()) mine.copy_V(0);
  cp_async_commit();
  ATTN_NO_UNROLL
  for (int turn = 0; turn < turns.edges(); ++turn) mine.edge(turn);
  if (turns.edges() < turns.count()) mine.whole(turns.edges());
  cp_async_wait<0>();  // nothing may be in flight at the end
  mine.store();
}

// dK and dV of BLOCK_M keys.  Q, LSE and delta of the next tile arrive in their other buffer while
// this one is computed; dO has one buffer, and the next one arrives while dK is.
template <class T, int HEAD_DIM>
struct KeyGradients {
  using Tile = KeyGradientTile<HEAD_DIM>;
  static constexpr int F = Tile::FRAGMENTS, M = Tile::BLOCK_M, N = Tile::BLOCK_N;
  static constexpr int THREADS = Tile::THREADS, TILES = N / 8, ACC = HEAD_DIM / 8;
  static constexpr int BYTES = Row<T, HEAD_DIM>::BYTES;
  using Stream = TileStream<T, HEAD_DIM, N, THREADS>;
  static_assert(2 * N <= THREADS);  // each copies one LSE or delta

  const Params& p;
  const Sequence& seq;
  const Band& band;
  int head_k, n0, n1;
  // What is copied next: queries m .. of a head.
  int head, m;
  Stream Q_stream, dO_stream;
  const float* row_values;  // of this thread: LSE or delta of a query
  float dK[F][ACC][4] = {}, dV[F][ACC][4] = {};

  ATTN_DEVICE KeyGradients(const Params& params, const Sequence& s, const Band& b, int k_head,
                           int first_key, int first_query)
      : p(params),
        seq(s),
        band(b),
        head_k(k_head),
        n0(first_key),
        n1(min_int(first_key + M, s.seqlen_k)),
        head(k_head * params.group),
        m(first_query),
        Q_stream(Q_smem(0), Q_rows(), m, int(p.p.head_dim)),
        dO_stream(dO_smem(), dO_rows(), m, int(p.p.head_dim_v)),
        row_values(my_row_values()) {}

  ATTN_DEVICE static uint32_t K_smem() { return smem_base(); }
  ATTN_DEVICE static uint32_t V_smem() { return K_smem() + M * BYTES; }
  ATTN_DEVICE static uint32_t dO_smem() { return V_smem() + M * BYTES; }
  ATTN_DEVICE static uint32_t Q_smem(int stage) {
    return dO_smem() + N * BYTES + uint32_t(stage) * N * BYTES;
  }
  ATTN_DEVICE static uint32_t rows_smem(int stage) {  // [LSE, delta][BLOCK_N]
    return dO_smem() + 3 * N * BYTES + uint32_t(stage) * 8 * N;
  }
  ATTN_DEVICE static int warp_row() { return Tile::WARP_ROWS * warp_id(); }

  ATTN_DEVICE Rows Q_rows() const { return query_rows(p, seq, p.ptr.q, p.p.q, head, sizeof(T)); }
  ATTN_DEVICE Rows dO_rows() const {
    return query_rows(p, seq, p.ptr.dout, p.p.dout, head, sizeof(T));
  }
  ATTN_DEVICE const float* my_row_values() const {
    const float* all = thread_id() < N ? static_cast<const float*>(p.ptr.lse) : p.delta;
    return all + (seq.lse_offset(p, head, m) + (thread_id() & (N - 1)));
  }
  ATTN_DEVICE void copy_keys() const {
    const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, head_k, sizeof(T));
    const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, head_k, sizeof(T));
    copy_tile<T, HEAD_DIM, M, THREADS, false>(K_smem(), K, n0, n1, int(p.p.head_dim), p.k_vec);
    copy_tile<T, HEAD_DIM, M, THREADS, false>(V_smem(), V, n0, n1, int(p.p.head_dim_v), p.v_vec);
  }
  // The next queries, LSE and delta into a buffer.
  ATTN_DEVICE void copy_Q(int stage) {
    if (m + N <= seq.seqlen_q && p.q_vec) {
      Stream to_buffer = Q_stream;
      to_buffer.to += uint32_t(stage) * N * BYTES;
      to_buffer.copy();
      Q_stream.from = to_buffer.from;
    } else {
      copy_tile<T, HEAD_DIM, N, THREADS, false>(Q_smem(stage), Q_rows(), m, seq.seqlen_q,
                                                int(p.p.head_dim), p.q_vec);
    }
    if (thread_id() < 2 * N) {
      const bool valid = m + (thread_id() & (N - 1)) < seq.seqlen_q;
      cp_async_4(rows_smem(stage) + 4 * thread_id(), valid ? row_values : p.delta, valid);
    }
  }
  ATTN_DEVICE void copy_dO() {
    if (m + N <= seq.seqlen_q && p.dout_vec)
      dO_stream.copy();
    else
      copy_tile<T, HEAD_DIM, N, THREADS, false>(dO_smem(), dO_rows(), m, seq.seqlen_q,
                                                int(p.p.head_dim_v), p.dout_vec);
  }
  // To the queries behind these, of which each head has those from `first` to `last`; false where
  // the group has no more.
  ATTN_DEVICE bool advance(int first, int last) {
    m += N, row_values += N;
    if (m < last) return true;
    if (++head == (head_k + 1) * p.group) return false;
    m = first;
    Q_stream = Stream(Q_smem(0), Q_rows(), m, int(p.p.head_dim));
    dO_stream = Stream(dO_smem(), dO_rows(), m, int(p.p.head_dim_v));
    row_values = my_row_values();
    return true;
  }

  // Queries m0 .., which are in buffer `stage`; more: others come behind them.
  template <bool EDGE>
  ATTN_DEVICE void tile(int m0, int stage, bool more) {
    float P[F][TILES][4], dS[F][TILES][4];
    // S^T = K Q^T, dP^T - delta = V dO^T - delta   [WARP_ROWS, BLOCK_N] a warp
    multiply_rows<T, HEAD_DIM>(P, K_smem(), warp_row(), Q_smem(stage));
    const auto column = [](int n) { return 8 * n + 2 * (lane_id() & 3); };  // and the next
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) {
      const U32x2 delta = lds_64(rows_smem(stage) + 4 * (N + column(n)));
      ATTN_UNROLL
      for (int f = 0; f < F; ++f) ATTN_UNROLL
      for (int c = 0; c < 4; ++c) dS[f][n][c] = -as_float(c & 1 ? delta.y : delta.x);
    }
    add_products<T, HEAD_DIM>(dS, V_smem(), warp_row(), dO_smem());
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) {
      const U32x2 values = lds_64(rows_smem(stage) + 4 * column(n));
      ATTN_UNROLL
      for (int c = 0; c < 2; ++c) {
        const float value = as_float(c ? values.y : values.x);
        // -inf in a tile that the row sees whole: every logit is, which leaves NaN for the repair
        const float lse = EDGE ? RowGradient::of(value, 0.0f).lse : value * kLog2e;
        ATTN_UNROLL
        for (int f = 0; f < F; ++f) ATTN_UNROLL
        for (int r = 0; r < 2; ++r) {
          const int j = n0 + warp_row() + 16 * f + 8 * r + (lane_id() >> 2);
          plain_gradient<EDGE>(P[f][n][2 * r + c], dS[f][n][2 * r + c], p.scale_log2, lse,
                               !EDGE || band.keep(m0 + column(n) + c, j));
        }
      }
    }
    // dV += P^T dO   [WARP_ROWS, D] a warp
    accumulate_rows<T, HEAD_DIM, true>(dV, P, dO_smem());
    sync_threads();  // every warp has read dO
    if (more) copy_dO();
    cp_async_commit();
    // dK += dS^T Q
    accumulate_rows<T, HEAD_DIM, true>(dK, dS, Q_smem(stage));
  }

  ATTN_DEVICE void store() const {
    bool bad = false;
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      // Keys behind the end are zeros, whose weights may be more than P can hold.
      const int row = n0 + warp_row() + 16 * f + (lane_id() >> 2);
      const bool first = row < seq.seqlen_k, second = row + 8 < seq.seqlen_k;
      bad |= warp_finds_nan(dK[f], first, second) || warp_finds_nan(dV[f], first, second);
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int j = row + 8 * r;
        if (j >= seq.seqlen_k) continue;
        if (p.ptr.dk)
          store_result<T, 0>(p, p.ptr.dk, at(p.p.dk, j), dK[f], r, p.scale, int(p.p.head_dim));
        if (p.ptr.dv)
          store_result<T, 0>(p, p.ptr.dv, at(p.p.dv, j), dV[f], r, 1.0f, int(p.p.head_dim_v));
      }
    }
    if (!bad) return;
    ATTN_NO_UNROLL
    for (int f = 0; f < F; ++f)
      each_row(n0 + warp_row() + 16 * f, seq.seqlen_k,
               [&](int j) { Repair<T, HEAD_DIM>{p, seq}.key_gradients(head_k, j, true, true); });
  }
  ATTN_DEVICE int64_t at(const Strides& s, int j) const {
    return seq.b * s.b + head_k * s.h + (seq.k_start + j) * s.s;
  }
};

template <class T, int HEAD_DIM>
ATTN_KERNEL((KeyGradientTile<HEAD_DIM>::THREADS), 1)
void backward_dkdv_plain(ATTN_GRID_CONSTANT const Params p) {
  using Kernel = KeyGradients<T, HEAD_DIM>;
  constexpr int M = Kernel::M, N = Kernel::N;
  const TileOf x = key_numbers(p, M).find(block_id().x);
  const Sequence seq = Sequence::of(p, x.b);
  const int n0 = x.tile * M;
  if (n0 >= seq.seqlen_k) return;  // a shorter cache, or packed: a number that stands for no tile
  const Band band = Band::of(p, seq);
  int lo, hi;
  band.query_range(n0, min_int(n0 + M, seq.seqlen_k), seq.seqlen_q, lo, hi);
  const int first = lo / N * N;
  // Tiles of queries from whole_first to whole_last see every key.  Queries and keys behind the
  // ends are zeros: they add nothing, or to rows that are not stored.
  const int whole_first = band.right < 0 ? 0 : n0 + M - 1 - band.diagonal - band.right;
  const int whole_last = band.left < 0 ? seq.seqlen_q : n0 - band.diagonal + band.left + 1 - N;

  Kernel mine(p, seq, band, x.head, n0, first);
  mine.copy_keys();
  bool more = lo < hi;
  if (more) {
    mine.copy_Q(0);
    mine.copy_dO();
  }
  cp_async_commit();
  ATTN_NO_UNROLL
  for (int stage = 0; more; stage ^= 1) {
    const int m0 = mine.m;
    more = mine.advance(first, hi);
    cp_async_wait<0>();
    sync_threads();  // this tile is complete, and every warp has read the other buffer of Q
    if (more) mine.copy_Q(stage ^ 1);
    if (m0 >= whole_first && m0 <= whole_last)
      mine.template tile<false>(m0, stage, more);
    else
      mine.template tile<true>(m0, stage, more);
  }
  cp_async_wait<0>();  // nothing may be in flight at the end
  mine.store();
}

}  // namespace attn::cuda::sm80
