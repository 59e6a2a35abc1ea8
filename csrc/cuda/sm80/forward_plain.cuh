// O = softmax(scale * Q K^T) V and LSE of a plain call: 16 bits, dense or varlen, at most a causal
// or window band.  Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk, Dv], O [B, Hq, Sq, Dv]; D and
// Dv at most HEAD_DIM.  After FlashAttention-2 (Dao 2023).
//
// One CTA = BLOCK_M query rows of one head.  A warp owns FRAGMENTS times 16 rows and all BLOCK_N
// keys of a tile.  K and V have one buffer each: V of a tile arrives while S is computed, K of the
// next one while the softmax and P V are.  Tiles at an edge of the band come first, with a mask and
// a look for NaN; the loop over the others knows of neither.
#pragma once
#include "../forward_parts.cuh"
#include "../repair.cuh"
#include "rows.cuh"

namespace attn::cuda::sm80 {

// The softmax of tiles that every row sees, of FRAGMENTS times 2 rows a thread.  The base of the
// exponentials, once the row's largest logit, stays while no row of the warp has a logit that is
// larger by more than 2^GROWTH: the base cancels in O and LSE, P is at most 2^GROWTH then, and O is
// hardly ever rescaled (FlashAttention-4).
template <int FRAGMENTS>
struct WholeSoftmax {
  static constexpr float GROWTH = 8.0f;
  static constexpr float LOWEST = -3.4e38f;  // finite: -inf - -inf would be NaN
  RowState (&state)[FRAGMENTS];              // max: in units of log2(e), the base
  // Of these tiles; state.sum of those before.  One sum over both loops of a kernel is kept in
  // memory at 96 columns, since registers are few in the loop over the edges.
  float sum[FRAGMENTS][2] = {};

  ATTN_DEVICE WholeSoftmax(RowState (&rows)[FRAGMENTS], float scale) : state(rows) {
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) state[f].max[r] = fmaxf(state[f].max[r] * scale, LOWEST);
  }
  // All sums; and -inf again where no key counts.
  ATTN_DEVICE void finish() {
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      state[f].sum[r] += sum[f][r];
      if (state[f].max[r] == LOWEST) state[f].max[r] = -kInf;
    }
  }
  // Moves the bases, and rescales O, where a logit has grown too large for one.
  template <int TILES, int ACC>
  ATTN_DEVICE void follow(const float (&S)[FRAGMENTS][TILES][4], float (&O)[FRAGMENTS][ACC][4],
                          float scale) {
    float top[FRAGMENTS][2];
    bool grown = false;
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[f][r] = S[f][0][2 * r];
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n)
        top[f][r] = fmaxf(top[f][r], fmaxf(S[f][n][2 * r], S[f][n][2 * r + 1]));
      top[f][r] = quad_max(top[f][r]);
      grown |= fmaf(top[f][r], scale, -state[f].max[r]) > GROWTH;
    }
    if (!ballot(grown)) return;
    ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float base = fmaxf(state[f].max[r], top[f][r] * scale);
      const float alpha = exp2_approx(state[f].max[r] - base);
      state[f].max[r] = base, state[f].sum[r] *= alpha, sum[f][r] *= alpha;
      ATTN_UNROLL
      for (int n = 0; n < ACC; ++n) O[f][n][2 * r] *= alpha, O[f][n][2 * r + 1] *= alpha;
    }
  }
  // S: logits in, exp2(scale * S - base) out.
  template <int TILES>
  ATTN_DEVICE void weights(float (&S)[FRAGMENTS][TILES][4], float scale) {
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int f = 0; f < FRAGMENTS; ++f) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) {
      S[f][n][c] = exp2_approx(fmaf(S[f][n][c], scale, -state[f].max[c >> 1]));
      sum[f][c >> 1] += S[f][n][c];
    }
  }
};

template <class T, int HEAD_DIM, class Tile_ = PlainForwardTile<HEAD_DIM>, class Order = InOrder>
struct PlainForward {
  using Tile = Tile_;
  static constexpr int F = Tile::FRAGMENTS, M = Tile::BLOCK_M, N = Tile::BLOCK_N;
  static constexpr int TILES = N / 8, ACC = HEAD_DIM / 8, BYTES = Row<T, HEAD_DIM>::BYTES;
  using Stream = TileStream<T, HEAD_DIM, N, Tile::THREADS, Order>;

  const Params& p;
  const Sequence& seq;
  const QueryTask& task;
  const Turns& turns;
  Rows K, V;
  float O[F][ACC][4] = {};
  RowState state[F];

  ATTN_DEVICE PlainForward(const Params& params, const QueryTask& t, const Turns& order)
      : p(params),
        seq(t.seq),
        task(t),
        turns(order),
        K(key_rows(p, seq, p.ptr.k, p.p.k, task.head / p.group, sizeof(T))),
        V(key_rows(p, seq, p.ptr.v, p.p.v, task.head / p.group, sizeof(T))) {}

  ATTN_DEVICE static uint32_t Q_smem() { return smem_base(); }
  ATTN_DEVICE static uint32_t K_smem() { return smem_base() + M * BYTES; }
  ATTN_DEVICE static uint32_t V_smem() { return K_smem() + N * BYTES; }
  ATTN_DEVICE static uint32_t flags() { return V_smem() + N * BYTES; }
  ATTN_DEVICE static int warp_row() { return Tile::WARP_ROWS * warp_id(); }

  ATTN_DEVICE void copy_queries() const {
    const Rows Q = query_rows(p, seq, p.ptr.q, p.p.q, task.head, sizeof(T));
    copy_tile<T, HEAD_DIM, M, Tile::THREADS, false>(Q_smem(), Q, task.row0, task.end,
                                                    int(p.p.head_dim), p.q_vec);
  }
  ATTN_DEVICE void copy_K(int turn) const {
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, false, Order>(
        K_smem(), K, turns.tile(turn) * N, seq.seqlen_k, int(p.p.head_dim), p.k_vec);
    cp_async_commit();
  }
  ATTN_DEVICE void copy_V(int turn) const {
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, false, Order>(
        V_smem(), V, turns.tile(turn) * N, seq.seqlen_k, int(p.p.head_dim_v), p.v_vec);
    cp_async_commit();
  }

  // O += P V of a tile that may hold NaN or infinities in rows that P excludes.
  ATTN_DEVICE void output_visible(float (&P)[F][TILES][4], int n0) {
    if (!tile_has_nonfinite<T, HEAD_DIM, N, Tile::WARPS>(V_smem(), flags()))
      return accumulate_rows<T, HEAD_DIM>(O, P, V_smem());
    ATTN_UNROLL
    for (int f = 0; f < F; ++f)
      accumulate_visible<T, HEAD_DIM, TILES, Tile::THREADS, false>(
          O[f], P[f], V_smem(), V, n0, seq.seqlen_k, int(p.p.head_dim_v), true, false, true);
  }

  ATTN_DEVICE void edge(const Score& score, int turn) {
    const int n0 = turns.tile(turn) * N;
    float S[F][TILES][4];
    cp_async_wait<0>();
    sync_threads();  // K of this turn is complete, and every warp has read V of the turn before
    copy_V(turn);
    multiply_rows<T, HEAD_DIM>(S, Q_smem(), warp_row(), K_smem());
    cp_async_wait<0>();
    sync_threads();  // V is complete, and every warp has read K
    if (turn + 1 < turns.count()) copy_K(turn + 1);
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      const auto query = queries(f);
      mask_scores<0>(S[f], score, query.row, n0);
      online_softmax<false>(S[f], O[f], state[f], p.scale_log2, false);
    }
    output_visible(S, n0);
  }

  // Tiles that every row sees, from `turn` to the last.
  ATTN_DEVICE void whole(int turn) {
    const float scale = p.scale_log2;
    WholeSoftmax<F> softmax(state, scale);
    // V of the first of them, and K of the second; K of the first is on its way
    int left = turns.count() - turn;
    Stream next_V(V_smem(), V, turns.tile(turn) * N, int(p.p.head_dim_v));
    Stream next_K(K_smem(), K, (turns.tile(turn) + 1) * N, int(p.p.head_dim));
    ATTN_NO_UNROLL
    for (; left > 0; --left) {
      float S[F][TILES][4];
      cp_async_wait<0>();
      sync_threads();  // K of this turn is complete, and every warp has read V of the turn before
      next_V.copy();
      cp_async_commit();
      // S = Q K^T   [WARP_ROWS, BLOCK_N] a warp
      multiply_rows<T, HEAD_DIM>(S, Q_smem(), warp_row(), K_smem());
      cp_async_wait<0>();
      sync_threads();  // V is complete, and every warp has read K
      if (left > 1) next_K.copy();
      cp_async_commit();
      softmax.follow(S, O, scale);
      softmax.weights(S, scale);
      // O += P V   [WARP_ROWS, Dv] a warp
      accumulate_rows<T, HEAD_DIM>(O, S, V_smem());
    }
    softmax.finish();
  }

  struct Pair {
    Query row[2];
  };
  // Rows g and g + 8 of a fragment; those behind the end are the last row once more.
  ATTN_DEVICE Pair queries(int f) const {
    Pair pair;
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r)
      pair.row[r] = {min_int(row(f) + 8 * r, task.rows - 1), task.head, 0.0f, 0, 0};
    return pair;
  }
  ATTN_DEVICE int row(int f) const { return task.row0 + warp_row() + 16 * f + (lane_id() >> 2); }
  // scale: of the largest logits.
  ATTN_DEVICE void store(float scale) {
    bool bad = false;
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      bad |= warp_finds_nan(O[f]) || warp_finds_huge(state[f], scale);
      store_rows<T, 0, false>(p, task, O[f], state[f], queries(f).row, row(f), scale);
    }
    if (!bad) return;
    ATTN_NO_UNROLL
    for (int f = 0; f < F; ++f)
      each_row(task.row0 + warp_row() + 16 * f, task.rows,
               [&](int i) { Repair<T, HEAD_DIM>{p, seq}.output(task.head, i); });
  }
};

template <class T, int HEAD_DIM>
ATTN_KERNEL((PlainForwardTile<HEAD_DIM>::THREADS), 1)
void forward_plain(ATTN_GRID_CONSTANT const Params p) {
  using Kernel = PlainForward<T, HEAD_DIM>;
  const QueryTask task = QueryTask::of<0>(p, Kernel::M);
  if (task.row0 < 0) return;  // packed: a number that stands for no tile
  const Score score(p, task.seq);
  Turns turns = Turns::of(score.band, task.row0, task.end, task.seq.seqlen_k, Kernel::N);
  // rows that come element by element are not for the fast loop
  if (!(p.k_vec && p.v_vec)) turns.whole_first = turns.whole_end = turns.end;

  Kernel mine(p, task, turns);
  mine.copy_queries();
  if (turns.count()) mine.copy_K(0);
  ATTN_NO_UNROLL
  for (int turn = 0; turn < turns.edges(); ++turn) mine.edge(score, turn);
  const bool whole = turns.edges() < turns.count();
  if (whole) mine.whole(turns.edges());
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  mine.store(whole ? 1.0f : p.scale_log2);
}

}  // namespace attn::cuda::sm80
