// O = softmax(scale * Q K^T) V and LSE on Hopper: 16 bits, at most a causal or window band.
// Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk, Dv], O [B, Hq, Sq, Dv]; varlen: [total, H, D].
// D, Dv at most HEAD_DIM.
// After FlashAttention-3 (Shah et al. 2024).
//
// One CTA = 128 query rows of one head, three warpgroups.  The first is the producer: one thread of
// it has the copy engine (TMA) bring Q, then K and V tiles into rings of STAGES buffers.  The other
// two are consumers, 64 rows each: S = Q K^T by wgmma from shared memory, softmax in registers, O
// += P V with P from registers.  A full and an empty mbarrier a buffer are all that they share.
#pragma once
#include "parts.cuh"

namespace attn::cuda::sm90 {

// The softmax of tiles that every row sees.  The base of the exponentials, once the row's largest
// logit, stays while no row of the warp has a logit that is larger by more than 2^GROWTH: the base
// cancels in O and LSE, P is at most 2^GROWTH then, and O is hardly ever rescaled
// (FlashAttention-4).
struct LazySoftmax {
  static constexpr float GROWTH = 8.0f;
  static constexpr float LOWEST = -3.4e38f;  // finite: -inf - -inf would be NaN
  float base[2], limit[2], alpha[2];         // of rows g and g + 8; limit: an unscaled logit

  ATTN_DEVICE LazySoftmax(const RowState& state, float scale) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) settle(r, state.max[r], scale);
  }
  ATTN_DEVICE void settle(int r, float max, float scale) {
    base[r] = fmaxf(max * scale, LOWEST);
    limit[r] = max + GROWTH / scale;
  }
  // S: logits in, exp2(scale * S - base) out.  True in the whole warp where a base has moved: O is
  // then to be rescaled.
  template <int TILES>
  ATTN_DEVICE bool weights(float (&S)[TILES][4], RowState& state, float scale) {
    float top[2];
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[r] = S[0][2 * r];
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n) top[r] = fmaxf(top[r], fmaxf(S[n][2 * r], S[n][2 * r + 1]));
      top[r] = quad_max(top[r]);
    }
    const bool moved = ballot((top[0] > limit[0]) | (top[1] > limit[1])) != 0;
    if (moved) {
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const float max = fmaxf(top[r], state.max[r]), before = base[r];
        settle(r, max, scale);
        alpha[r] = exp2_approx(before - base[r]);
        state.max[r] = max, state.sum[r] *= alpha[r];
      }
    }
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) {
      S[n][c] = exp2_approx(fmaf(S[n][c], scale, -base[c >> 1]));
      state.sum[c >> 1] += S[n][c];
    }
    return moved;
  }
  template <int ACC>
  ATTN_DEVICE void rescale(float (&O)[ACC][4]) const {
    ATTN_UNROLL
    for (int n = 0; n < ACC; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) O[n][c] *= alpha[c >> 1];
  }
};

// Which of two consumer warpgroups may issue its products: the first begins, then they alternate.
// Nothing but speed depends on it.
struct TakeTurns {
  static constexpr int FIRST = 3;  // named barriers FIRST + group: it is the group's turn
  int group;
  bool both;  // else the other warpgroup has no such tiles

  ATTN_DEVICE void begin() const {
    if (both && group == 1) named_barrier_arrive<FIRST>(256);
  }
  ATTN_DEVICE void wait() const {
    if (both) named_barrier_sync(FIRST + group, 256);
  }
  ATTN_DEVICE void pass() const {
    if (both) named_barrier_arrive(FIRST + 1 - group, 256);
  }
  // The second's last pass() is awaited, so that no barrier stays half full.
  ATTN_DEVICE void finish() const {
    if (both && group == 0) named_barrier_sync<FIRST>(256);
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
    issue_rows<T, HEAD_DIM, Tile::BLOCK_M>(S, Q_smem, K.tile(turn));
  }
  ATTN_DEVICE void output(int turn) { issue_sum<T>(O, P, V.tile(turn)); }
  // The same with nothing else under way, until they are there.
  ATTN_DEVICE void scores_alone(float (&S)[TILES][4], int turn) {
    K.wait(turn);
    scores(S, turn);
    wgmma_wait<0>();
    wgmma_hold(S);
    K.release(turn);
  }
  ATTN_DEVICE void output_alone(int turn) {
    wgmma_hold(O);
    wgmma_hold(P);
    wgmma_fence();
    output(turn);
    wgmma_wait<0>();
    wgmma_hold(O);
  }

  // From Q K^T to P of a tile by itself, O rescaled; mask(S): -inf where a pair does not count.
  template <class Mask>
  ATTN_DEVICE void weights_alone(float (&S)[TILES][4], int turn, const Mask& mask) {
    scores_alone(S, turn);
    mask(S);
    online_softmax<false>(S, O, state, p.scale_log2, false);
  }

  // A tile at an edge, by itself.
  ATTN_DEVICE void edge(const Score& score, const Query (&query)[2], int group, int turn, int n0) {
    float S[TILES][4];
    weights_alone(S, turn, [&](float (&x)[TILES][4]) { mask_scores<false>(x, score, query, n0); });
    V.wait(turn);
    if (warpgroup_finds_nonfinite<T, Tile::KEY_BYTES>(V.tile(turn), group)) {
      add_visible<T>(O, S, V.tile(turn));
    } else {
      pack_weights<T>(P, S);
      output_alone(turn);
    }
    V.release(turn);
  }

  // Tiles that every row sees: S of one tile and P V of the tile before are under way together, and
  // the softmax runs while P V still does.  The two warpgroups take turns (FlashAttention-3's
  // ping-pong): one issues its products, then has its softmax while the other's products run.
  ATTN_DEVICE void whole(int turn, int end, const TakeTurns& turns) {
    if (turn >= end) return;
    float S[TILES][4];
    weights_alone(S, turn, [](float (&)[TILES][4]) {});
    LazySoftmax lazy(state, p.scale_log2);
    pack_weights<T>(P, S);
    if (turn + 1 < end) K.wait(turn + 1);
    turns.begin();
    ATTN_NO_UNROLL
    for (++turn; turn < end; ++turn) {
      V.wait(turn - 1);
      turns.wait();
      scores(S, turn);
      output(turn - 1);
      turns.pass();
      wgmma_wait<1>();  // S is there
      wgmma_hold(S);
      K.release(turn);
      const bool moved = lazy.weights(S, state, p.scale_log2);
      wgmma_hold(S);
      // Now, since ptxas would move the softmax behind the next wait, but not across a loop.
      if (turn + 1 < end) K.wait(turn + 1);
      wgmma_wait<0>();  // O is there
      wgmma_hold(O);
      V.release(turn - 1);
      if (moved) lazy.rescale(O);
      pack_weights<T>(P, S);
    }
    turns.finish();
    V.wait(turn - 1);
    output_alone(turn - 1);
    V.release(turn - 1);
  }
};

template <class T, int HEAD_DIM>
ATTN_DEVICE void consume(const Params& p, const QueryTask& task, const Turns& turns,
                         const QueryMemory<ForwardTile90<HEAD_DIM>>& smem) {
  constexpr int N = ForwardTile90<HEAD_DIM>::BLOCK_N;
  const int group = warp_id() / 4 - 1, group_row = task.row0 + 64 * group;
  const int group_end = min_int(group_row + 64, task.rows);
  const int row = group_row + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, task.seq);
  Query query[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r)
    query[r] = Query{min_int(row + 8 * r, task.rows - 1), task.head, 0.0f, 0, 0};
  int lo = 0, hi = 0;  // keys that some row of the warpgroup sees
  if (group_row < group_end) score.band.key_range(group_row, group_end, task.seq.seqlen_k, lo, hi);

  Consumer<T, HEAD_DIM> mine(p, smem.K, smem.V, smem.Q + group * 64 * 128);
  if (turns.count()) mbarrier_wait(smem.queries_full, 0);
  int turn = 0;
  ATTN_NO_UNROLL
  for (; turn < (lo < hi ? turns.edges() : turns.count()); ++turn) {
    const int n0 = turns.tile(turn) * N;
    if (n0 < hi && n0 + N > lo) {
      mine.edge(score, query, group, turn, n0);
    } else {  // nothing for this warpgroup
      smem.K.skip(turn);
      smem.V.skip(turn);
    }
  }
  const bool both = task.row0 + 64 < task.rows;  // tiles that every row sees are of both, or of one
  mine.whole(turn, turns.count(), {group, both});
  const bool bad = warp_finds_nan(mine.O);
  store_rows<T, false>(p, task.seq, task, mine.O, mine.state, query, row, p.scale_log2);
  if (bad)
    each_row(group_row + 16 * (warp_id() % 4), task.rows,
             [&](int i) { Repair<T, HEAD_DIM>{p, task.seq}.output(task.head, i); });
}

// The producer's thread: Q, then K and V of all turns.
template <class Tile>
ATTN_DEVICE void produce(const ForwardParams& x, const QueryTask& task, const Turns& turns,
                         const QueryMemory<Tile>& smem) {
  constexpr int S = Tile::SLABS, M = Tile::BLOCK_M, N = Tile::BLOCK_N;
  mbarrier_arrive_expect_tx(smem.queries_full, Tile::QUERY_BYTES);
  const Coordinates at(x.p, task.seq);
  load_rows<S, M>(smem.Q, x.Q, smem.queries_full, at.q + task.row0, task.head, at.b);
  const int head_k = task.head / x.p.group;
  const auto load = [&](const Ring<STAGES>& ring, const TensorMap& map, int turn) {
    ring.template load<S, N>(turn, map, at.k + turns.tile(turn) * N, head_k, at.b);
  };
  load(smem.K, x.K, 0);
  ATTN_NO_UNROLL
  for (int i = 0; i < turns.count(); ++i) {
    if (i + 1 < turns.count()) load(smem.K, x.K, i + 1);  // is needed before V of this turn
    load(smem.V, x.V, i);
  }
}

template <class T, int HEAD_DIM>
ATTN_KERNEL((THREADS), 1)
void forward(ATTN_GRID_CONSTANT const ForwardParams x) {
  using Tile = ForwardTile90<HEAD_DIM>;
  const auto smem = QueryMemory<Tile>::of(smem_base());
  const QueryTask task = QueryTask::of(x.p, Tile::BLOCK_M);
  if (task.row0 >= task.rows) return;  // a shorter sequence has fewer tiles
  const Turns turns =
      Turns::of(Band::of(x.p, task.seq), task.row0, task.end, task.seq.seqlen_k, Tile::BLOCK_N);
  const auto load = [&] {
    if (warp_id() == 0 && elect_one() && turns.count()) produce(x, task, turns, smem);
  };
  run_roles(smem, load, [&] { consume<T, HEAD_DIM>(x.p, task, turns, smem); });
}

}  // namespace attn::cuda::sm90
