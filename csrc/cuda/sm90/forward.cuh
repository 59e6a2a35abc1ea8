// O = softmax(scale * Q K^T) V and LSE on Hopper: 16 bits, at most a causal or window band.
// Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk, Dv], O [B, Hq, Sq, Dv]; varlen: [total, H, D].
// D at most HEAD_DIM, Dv at most VALUE_DIM.
// After FlashAttention-3 (Shah et al. 2024).
//
// A CTA works on tiles of 128 query rows of one head, one after the other (schedule.cuh), by three
// warpgroups.  The first is the producer: one thread of it has the copy engine (TMA) bring Q, then
// K and V tiles into rings of STAGES buffers.  The other two are consumers, 64 rows each: S = Q K^T
// by wgmma from shared memory, softmax in registers, O += P V with P from registers.  They share a
// full and an empty mbarrier a buffer, and what tile it is.
#pragma once
#include "schedule.cuh"

namespace attn::cuda::sm90 {

// The softmax of tiles that every row sees.  The base of the exponentials, once the row's largest
// logit, stays while it serves: it cancels in O and LSE, and O is hardly ever rescaled
// (FlashAttention-4).  No largest logit is looked for before.  The exponentials are taken, and
// their sum, which is wanted anyway, tells whether one of them exceeds LIMIT; hardly ever, one
// does, and they are taken again from a new base.
struct LazySoftmax {
  static constexpr float LIMIT = 256.0f;     // of what a thread adds up of a row in a tile
  static constexpr float LOWEST = -3.4e38f;  // finite: -inf - -inf would be NaN
  float base[2], alpha[2];                   // of rows g and g + 8

  ATTN_DEVICE LazySoftmax(const RowState& state, float scale) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) settle(r, state.max[r], scale);
  }
  ATTN_DEVICE void settle(int r, float max, float scale) { base[r] = fmaxf(max * scale, LOWEST); }

  // P = exp2(scale * S - base) as A operands, and the sums of its rows.
  template <class T, int TILES>
  ATTN_DEVICE void exponentials(uint32_t (&P)[TILES / 2][4], float (&sum)[2],
                                const float (&S)[TILES][4], float scale) const {
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float a = exp2_approx(fmaf(S[n][2 * r], scale, -base[r]));
      const float b = exp2_approx(fmaf(S[n][2 * r + 1], scale, -base[r]));
      P[n / 2][n % 2 * 2 + r] = pack<T>(a, b);
      sum[r] = n ? sum[r] + (a + b) : a + b;
    }
  }
  // The base becomes the largest logit so far; alpha is what was added up by the old one times.
  template <int TILES>
  ATTN_DEVICE void move(const float (&S)[TILES][4], RowState& state, float scale) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      float top = state.max[r];
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n) top = fmaxf(top, fmaxf(S[n][2 * r], S[n][2 * r + 1]));
      const float before = base[r];
      state.max[r] = quad_max(top);
      settle(r, state.max[r], scale);
      alpha[r] = exp2_approx(before - base[r]);
      state.sum[r] *= alpha[r];
    }
  }
  // P of a tile, and its sums added to the state's.  True in the whole warp where a base has moved:
  // O is then to be rescaled.  A NaN moves nothing: its row comes out as NaN and is mended at the
  // end.
  template <class T, int TILES>
  ATTN_DEVICE bool weights(uint32_t (&P)[TILES / 2][4], const float (&S)[TILES][4], RowState& state,
                           float scale) {
    float sum[2];
    exponentials<T>(P, sum, S, scale);
    const bool moved = ballot((sum[0] > LIMIT) | (sum[1] > LIMIT)) != 0;
    if (moved) {
      move(S, state, scale);
      exponentials<T>(P, sum, S, scale);
    }
    state.sum[0] += sum[0], state.sum[1] += sum[1];
    return moved;
  }
  template <int ACC>
  ATTN_DEVICE void rescale(float (&O)[ACC][4]) const {
    ATTN_UNROLL
    for (int n = 0; n < ACC; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) O[n][c] *= alpha[c >> 1];
  }
};

// A consumer warpgroup: its registers, and a tile of keys at a time.
template <class T, class Tile>
struct Consumer {
  static constexpr int HEAD_DIM = Tile::HEAD_DIM;
  static constexpr int N = Tile::BLOCK_N, TILES = N / 8, ACC = Tile::VALUE_DIM / 8;
  using Scores = float[TILES][4];
  using Weights = uint32_t[TILES / 2][4];  // P as A operands

  const Params& p;
  const KeyRing &K, &V;
  uint32_t Q_word;  // its 64 rows (wgmma_word)
  float O[ACC][4] = {};
  RowState state;

  ATTN_DEVICE Consumer(const Params& params, const KeyRing& k, const KeyRing& v, uint32_t q)
      : p(params), K(k), V(v), Q_word(wgmma_word(q)) {}

  // Buffers of a turn and of every second one behind it: tiles of K and V (wgmma_word), and K's
  // full mbarrier, behind which V's lies at a known distance (ForwardMemory).  With two stages
  // nothing of that changes over the loop.
  struct Buffers {
    uint32_t K, V, full;
  };
  ATTN_DEVICE static uint32_t V_full(const Buffers& at) { return at.full + RING_BARS; }
  ATTN_DEVICE Buffers buffers(int turn) const {
    static_assert(STAGES == 2);
    // Held: ptxas would compute it again for each use.
    return {wgmma_word(K.tile(turn)), wgmma_word(V.tile(turn)), wgmma_held(K.full_bar(turn))};
  }

  // S = Q K^T, of the tile whose turn it is and that is there.  Issued.
  ATTN_DEVICE void scores(Scores& S, int turn) { scores_of(S, wgmma_word(K.tile(turn))); }
  ATTN_DEVICE void scores_of(Scores& S, uint32_t K_word) {
    wgmma_hold(O);
    wgmma_fence();
    // Up to 128, Q's descriptors stay in uniform registers over the loop; wider, they are too many.
    const uint32_t Q = HEAD_DIM <= 128 ? Q_word : wgmma_held(Q_word);
    issue_rows<T, HEAD_DIM, Tile::BLOCK_M>(S, wgmma_operand(Q, 0), wgmma_operand(K_word, 0));
  }
  // Of a tile by itself, until it is there.
  ATTN_DEVICE void scores_alone(Scores& S, int turn) {
    K.wait(turn);
    scores(S, turn);
    wgmma_wait<0>();
    wgmma_hold(S);
    K.release(turn);
  }
  // O += P V of the tile whose turn it is and that is there, until it is done.
  ATTN_DEVICE void output_alone(Weights& P, int turn) {
    wgmma_hold(O);
    wgmma_hold(P);
    wgmma_fence();
    issue_sum<T>(O, P, wgmma_word(V.tile(turn)));
    wgmma_wait<0>();
    wgmma_hold(O);
    wgmma_hold(P);  // the tensor cores have read it only now
  }

  // From Q K^T to P of a tile by itself, O rescaled; mask(S): -inf where a pair does not count.
  template <class Mask>
  ATTN_DEVICE void weights_alone(Scores& S, int turn, const Mask& mask) {
    scores_alone(S, turn);
    mask(S);
    online_softmax<false>(S, O, state, p.scale_log2, false);
  }

  // A tile at an edge, by itself.
  ATTN_DEVICE void edge(const Score& score, const Query (&query)[2], int group, int turn, int n0) {
    Scores S;
    weights_alone(S, turn, [&](Scores& x) { mask_scores<0>(x, score, query, n0); });
    V.wait(turn);
    if (warpgroup_finds_nonfinite<T, Tile::VALUE_BYTES>(V.tile(turn), group)) {
      add_visible<T>(O, S, V.tile(turn));
    } else {
      Weights P;
      pack_weights<T>(P, S);
      output_alone(P, turn);
    }
    V.release(turn);
  }

  // S of this turn and O += P V of the turn before are under way together, and the softmax runs
  // while P V still does.  before: P of the turn before; now: P of this turn.
  ATTN_DEVICE void overlap(Weights& before, Weights& now, int turn, int end, const Buffers& last,
                           const Buffers& here, const TakeTurns& turns, LazySoftmax& lazy) {
    Scores S;
    V.wait(V_full(last), turn - 1);
    turns.wait();
    wgmma_hold(before);
    scores_of(S, here.K);
    issue_sum<T>(O, before, last.V);
    turns.pass();
    wgmma_wait<1>();  // S is there
    wgmma_hold(S);
    K.release(here.full);
    const bool moved = lazy.template weights<T>(now, S, state, p.scale_log2);
    wgmma_hold(now);
    // Now, since ptxas would move the softmax behind the next wait, but not across a loop.
    if (turn + 1 < end) K.wait(last.full, turn + 1);
    wgmma_wait<0>();  // O is there
    wgmma_hold(O);
    wgmma_hold(before);  // the tensor cores have read it only now
    V.release(V_full(last));
    if (moved) lazy.rescale(O);
  }
  ATTN_DEVICE void last(Weights& P, int turn) {
    V.wait(turn);
    output_alone(P, turn);
    V.release(turn);
  }

  // Tiles that every row sees.  The two warpgroups take turns (FlashAttention-3's ping-pong): one
  // issues its products, then has its softmax while the other's products run.  Two tiles an
  // iteration: what one packs for the next is in other registers than what wgmma still reads.
  ATTN_DEVICE void whole(int turn, int end, const TakeTurns& turns) {
    if (turn >= end) return;
    Weights even, odd;
    {
      Scores S;
      weights_alone(S, turn, [](Scores&) {});
      pack_weights<T>(even, S);
    }
    LazySoftmax lazy(state, p.scale_log2);
    const Buffers first = buffers(turn), second = buffers(turn + 1);
    rest(even, odd, turn, end, [&](Weights& before, Weights& now, int at, bool odd_turn) {
      odd_turn ? overlap(before, now, at, end, first, second, turns, lazy)
               : overlap(before, now, at, end, second, first, turns, lazy);
    });
  }
  // Those behind the first, whose P is `even`: overlap(P of the turn before, P of this turn, turn).
  template <class Overlap>
  ATTN_DEVICE void rest(Weights& even, Weights& odd, int turn, int end, const Overlap& overlap) {
    if (turn + 1 < end) K.wait(turn + 1);
    ATTN_NO_UNROLL
    while (true) {
      if (++turn == end) return last(even, turn - 1);
      overlap(even, odd, turn, true);
      if (++turn == end) return last(odd, turn - 1);
      overlap(odd, even, turn, false);
    }
  }
};

template <class T, class Tile>
ATTN_DEVICE int consume(const ForwardParams& x, const Work& w, Stored& stored,
                        const ForwardMemory<Tile>& smem) {
  const Params& p = x.p;
  const QueryTask& task = w.task;
  const int group = warp_id() / 4 - 1;
  const int row = task.row0 + 64 * group + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, task.seq);
  Query query[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r)
    query[r] = Query{min_int(row + 8 * r, task.rows - 1), task.head, 0.0f, 0, 0};

  Consumer<T, Tile> mine(p, smem.K, smem.V, smem.Q.tile(w.n) + group * 64 * 128);
  const int end = consume_turns(
      w, score, stored, smem, [&](int turn, int n0) { mine.edge(score, query, group, turn, n0); },
      [&](int turn, int end, int) { mine.whole(turn, end, TakeTurns::of(task, group)); });
  const bool bad = warp_finds_nan(mine.O) || warp_finds_huge(mine.state, p.scale_log2);
  finish_tile<T, 0>(x, w.n, smem, mine.O, mine.state, p.scale_log2, bad);
  return end;
}

template <class T, int HEAD_DIM, int VALUE_DIM>
ATTN_KERNEL((THREADS), 1)
void forward(ATTN_GRID_CONSTANT const ForwardParams x) {
  using Tile = ForwardTile90<HEAD_DIM, VALUE_DIM>;
  const auto smem = ForwardMemory<Tile>::of(smem_base());
  run_tiles<0, Tile, false>(
      x, smem, [&](const Work& w, Stored& stored) { return consume<T>(x, w, stored, smem); });
}

}  // namespace attn::cuda::sm90
