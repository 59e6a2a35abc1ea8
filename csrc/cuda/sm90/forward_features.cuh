// The forward of forward.cuh for calls with mask, bias, ALiBi, soft cap, sink, dropout or
// statistics, compiled for exactly the features of a call (features.h).
//
// The same roles, rings and order of products, but for the order of keys in shared memory
// (fours.cuh).
//
// What is added to a tile that every row sees: before the products are issued, while the registers
// of S are free, dropout is drawn, into the words of P that it masks, and mask and bias are asked
// for; while S is computed, the mask becomes a bit a pair; behind it come the logits and, where the
// mask does not keep all of the warp's pairs, a selection a pair.  No tile is looked at for NaN:
// what a NaN behind an excluded pair leaves is computed once more (repair.cuh).
#pragma once
#include "forward.cuh"
#include "fours.cuh"

namespace attn::cuda::sm90 {

template <class T, class Tile, int BITS>
struct FeatureConsumer : Consumer<T, Tile>, FourSides<T, BITS, Tile::BLOCK_N / 8> {
  using Base = Consumer<T, Tile>;
  using Fours = FourSides<T, BITS, Tile::BLOCK_N / 8>;
  using Base::N, Base::TILES, Base::ACC, Base::p, Base::K, Base::V, Base::O, Base::state;
  using Fours::GROUPS, Fours::PRODUCTS, Fours::at, Fours::first_key, Fours::score, Fours::query;
  using typename Base::Buffers;
  using typename Base::Scores;
  using typename Base::Weights;
  using typename Fours::Sides;
  static_assert(GROUPS <= 8);
  // Which pairs of a tile the mask keeps.  Key e of group m of row r: bit 8 e + m of row[r], as the
  // bytes of the mask add up to it, and of which 7 neighbours become predicates at once; of the
  // last of 8 groups its byte in last[r].
  struct PairBits {
    static constexpr bool LAST = GROUPS == 8;
    static constexpr int GROUPS_IN_ROW = LAST ? 7 : GROUPS;
    uint32_t row[2], last[2];

    ATTN_DEVICE bool keeps(int m, int r, int e) const {
      return m < GROUPS_IN_ROW ? (row[r] & 1u << (8 * e + m)) != 0 : (last[r] & 1u << 8 * e) != 0;
    }
    // Whether all of the warp's pairs are kept.
    ATTN_DEVICE bool all() const {
      bool mine = (row[0] & row[1]) == ((1u << GROUPS_IN_ROW) - 1) * 0x01010101u;
      if (LAST) mine &= (last[0] & last[1]) == 0x01010101u;
      return ballot(!mine) == 0;
    }
  };

  static constexpr bool FAR = may_have<BITS>(kBias);  // a row may keep natural units
  static constexpr float LIMIT = LazySoftmax::LIMIT, LOWEST = FAR ? kFinfoMin : LazySoftmax::LOWEST;
  static constexpr int EARLY = early_groups(Tile::HEAD_DIM, BITS, GROUPS);

  float row_unit[FAR ? 2 : 1];
  float alpha[2];  // what was added up by the base before is to be multiplied by

  ATTN_DEVICE FeatureConsumer(const Params& params, const Score& of, int h, int row, int rows,
                              const ForwardMemory<Tile>& smem, uint32_t q)
      : Base(params, smem.K, smem.V, q), Fours(params, of, h, row, rows) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      state.max[r] = LOWEST;  // the base of the exponentials, in the row's unit
      if (FAR) row_unit[r] = 1.0f;
    }
  }
  // What a logit is multiplied by before the base is taken from it.
  ATTN_DEVICE float unit(int r) const {
    if constexpr (FAR) return row_unit[r];
    return Fours::unit();
  }
  // The word of P that has keys `odd` and 2 + odd of group m of row r.
  ATTN_DEVICE static uint32_t& pair(Weights& P, int m, int odd, int r) {
    const int n = m + odd * GROUPS;
    return P[n / 2][n % 2 * 2 + r];
  }

  // The mask's bytes are 0 or 1.
  ATTN_DEVICE static void mask_bits(PairBits& bits, const Sides& sides) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t sum = 0;
      ATTN_UNROLL
      for (int m = PairBits::GROUPS_IN_ROW - 1; m >= 0; --m) sum = 2 * sum + sides[m][r].mask;
      bits.row[r] = wgmma_held(sum);  // computed here, and not behind the wait that follows
      if (PairBits::LAST) bits.last[r] = sides[GROUPS - 1][r].mask;
    }
  }
  // What P is to be masked with: a half of a word is ones where dropout takes its pair.
  ATTN_DEVICE void draw(Weights& P, int n0) const {
    ATTN_UNROLL
    for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t words[4];
      this->dropout.words(query[r].h, query[r].i, first_key(n0, m), words);
      ATTN_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        const uint32_t both =
            halves_of(this->threshold.dropped(words[odd]), this->threshold.dropped(words[2 + odd]));
        pair(P, m, odd, r) = wgmma_held(both);  // here, and not behind the products
      }
    }
  }

  // S: products in, logits out.
  template <class Ways>
  ATTN_DEVICE void logits_by(Scores& S, const Sides& sides, int n0) const {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float distance = this->distance_of(r, n0);
      ATTN_UNROLL
      for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& s = at(S, m, r, e);
        const float away = distance - float(16 * m + e);
        s = this->template logit<Ways>(s, away, sides[m][r], e, [](float) {});
      }
    }
  }
  ATTN_DEVICE void logits(Scores& S, const Sides& sides, int n0) const {
    if (PRODUCTS) return;
    this->with_ways(S, [&](auto ways) { logits_by<decltype(ways)>(S, sides, n0); });
  }
  ATTN_DEVICE static void exclude(Scores& S, const PairBits& bits) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) ATTN_UNROLL
    for (int m = 0; m < GROUPS; ++m)
      if (!bits.keeps(m, r, e)) at(S, m, r, e) = -kInf;
  }
  // The logits of a tile at an edge, where a pair must be within length and band.
  ATTN_DEVICE void edge_logits(Scores& S, int n0) const {
    ATTN_UNROLL
    for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float distance = this->distance_of(r, n0);
      Side<T, BITS> side;
      side.load_some(p, query[r], first_key(n0, m), score.seq.seqlen_k);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int j = first_key(n0, m) + e;
        float& s = at(S, m, r, e);
        const float away = distance - float(16 * m + e);
        s = this->template logit<NaturalWays>(s, away, side, e, [](float) {});
        const bool keeps = !has<BITS>(p, kMask) || side.keeps(e);
        if (!(keeps && j < score.seq.seqlen_k && score.band.keep(query[r].i, j))) s = -kInf;
      }
    }
  }

  // P = exp2(unit * S - base) as A operands, 0 of dropped pairs (draw(); 1 / (1 - p) comes with the
  // normalisation), and the sums of its rows.
  ATTN_DEVICE void exponentials(Weights& P, float (&sum)[2], float (&weighted)[2],
                                const Scores& S) const {
    ATTN_UNROLL
    for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      float w[4];
      if (m == 0) weighted[r] = 0.0f;
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const float x = fmaf(at(S, m, r, e), unit(r), -state.max[r]);
        w[e] = exp2_approx(x);
        if (has<BITS>(p, kStats)) weighted[r] += x == -kInf ? 0.0f : w[e] * x;
      }
      const float four = (w[0] + w[1]) + (w[2] + w[3]);
      sum[r] = m ? sum[r] + four : four;
      ATTN_UNROLL
      for (int odd = 0; odd < 2; ++odd) {
        uint32_t& word = pair(P, m, odd, r);
        const uint32_t dropped = has<BITS>(p, kDropout) ? word : 0u;
        word = pack<T>(w[odd], w[2 + odd]) & ~dropped;
      }
    }
  }
  // From P back to what it was masked with.  A weight that is 0 though its pair is kept stays 0 by
  // a larger base.
  ATTN_DEVICE static void masks_again(Weights& P) {
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t& word = P[n / 2][n % 2 * 2 + r];
      const uint32_t low = word & 0x0000ffffu ? 0u : 0x0000ffffu;
      word = word & 0xffff0000u ? low : low | 0xffff0000u;
    }
  }
  // The base of a row becomes the largest logit so far.
  ATTN_DEVICE void move(int r, float top) {
    const float before = state.max[r];
    alpha[r] = 1.0f;
    if (!(fmaf(top, unit(r), -before) > 0.0f)) return;
    bool other_unit = false;
    if constexpr (FAR) {
      const float now = is_far_logit(top) ? 1.0f : kLog2e;
      other_unit = now != row_unit[r];
      row_unit[r] = now;
    }
    state.max[r] = top * unit(r);
    const float shift = other_unit ? -kInf : before - state.max[r];
    alpha[r] = exp2_approx(shift);
    if (has<BITS>(p, kStats))
      state.weighted[r] = alpha[r] * (state.weighted[r] + fmaxf(shift, -kFar) * state.sum[r]);
    state.sum[r] *= alpha[r];
  }
  ATTN_DEVICE float largest(const Scores& S, int r) const {
    float top = S[0][2 * r];
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) top = fmaxf(top, fmaxf(S[n][2 * r], S[n][2 * r + 1]));
    return quad_max(top);
  }
  // P of a tile, and its sums added to the state's; true in the whole warp where a base has moved:
  // O is then to be rescaled.  As in LazySoftmax it moves where a sum says that it must; with
  // statistics wherever a logit is larger.
  ATTN_DEVICE bool weights(Weights& P, const Scores& S) {
    float sum[2], weighted[2];
    bool moved = false;
    if (has<BITS>(p, kStats)) {
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) moved |= fmaf(largest(S, r), unit(r), -state.max[r]) > 0.0f;
      moved = ballot(moved) != 0;
    } else {
      exponentials(P, sum, weighted, S);
      moved = ballot((sum[0] > LIMIT) | (sum[1] > LIMIT)) != 0;
    }
    if (moved) {
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) move(r, largest(S, r));
      if (has<BITS>(p, kDropout) && !has<BITS>(p, kStats)) masks_again(P);
    }
    if (moved || has<BITS>(p, kStats)) exponentials(P, sum, weighted, S);
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) state.sum[r] += sum[r], state.weighted[r] += weighted[r];
    return moved;
  }
  ATTN_DEVICE void rescale() {
    ATTN_UNROLL
    for (int n = 0; n < ACC; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) O[n][c] *= alpha[c >> 1];
  }

  // A tile at an edge, by itself.
  ATTN_DEVICE void edge(int turn, int n0) {
    Scores S;
    Weights P;
    if (has<BITS>(p, kDropout)) draw(P, n0);
    this->scores_alone(S, turn);
    edge_logits(S, n0);
    if (weights(P, S)) rescale();
    V.wait(turn);
    this->output_alone(P, turn);
    V.release(turn);
  }

  // What the pairs of a tile have beside their products, on its way and as bits, around what
  // issues the products and behind what waits for S.
  template <class Issue, class Wait>
  ATTN_DEVICE bool tile(Scores& S, Weights& P, int n0, const Issue& issue, const Wait& wait) {
    Sides sides;
    PairBits unmasked;
    this->load_sides(sides, n0, 0, EARLY);
    if (has<BITS>(p, kDropout)) draw(P, n0);
    issue();
    if (has<BITS>(p, kMask) && EARLY == GROUPS) mask_bits(unmasked, sides);
    wait();  // S is there
    this->load_sides(sides, n0, EARLY, GROUPS);
    if (has<BITS>(p, kMask) && EARLY < GROUPS) mask_bits(unmasked, sides);
    logits(S, sides, n0);
    // Most masks keep all of most tiles.
    if (has<BITS>(p, kMask) && !unmasked.all()) exclude(S, unmasked);
    return weights(P, S);
  }
  ATTN_DEVICE void overlap(Weights& before, Weights& now, int turn, int end, int n0,
                           const Buffers& last, const Buffers& here, const TakeTurns& turns) {
    Scores S;
    const bool moved = tile(
        S, now, n0,
        [&] {
          V.wait(this->V_full(last), turn - 1);
          turns.wait();
          wgmma_hold(before);
          this->scores_of(S, here.K);
          issue_sum<T>(O, before, last.V);
          turns.pass();
        },
        [&] {
          wgmma_wait<1>();
          wgmma_hold(S);
          K.release(here.full);
        });
    wgmma_hold(now);
    // Now, since ptxas would move the softmax behind the next wait, but not across a loop.
    if (turn + 1 < end) K.wait(last.full, turn + 1);
    wgmma_wait<0>();  // O is there
    wgmma_hold(O);
    wgmma_hold(before);  // the tensor cores have read it only now
    V.release(this->V_full(last));
    if (moved) rescale();
  }
  // Tiles that every row sees, the first from key n0 on (Consumer::whole).
  ATTN_DEVICE void whole(int turn, int end, int n0, const TakeTurns& turns) {
    if (turn >= end) return;
    Weights even, odd;
    {
      Scores S;
      const auto issue = [&] {
        K.wait(turn);
        this->scores(S, turn);
      };
      const auto wait = [&] {
        wgmma_wait<0>();
        wgmma_hold(S);
        K.release(turn);
      };
      if (tile(S, even, n0, issue, wait)) rescale();
    }
    const int begin = turn;
    const Buffers first = this->buffers(turn), second = this->buffers(turn + 1);
    this->rest(even, odd, turn, end, [&](Weights& before, Weights& now, int at, bool odd_turn) {
      const int at_key = n0 + (at - begin) * N;
      odd_turn ? overlap(before, now, at, end, at_key, first, second, turns)
               : overlap(before, now, at, end, at_key, second, first, turns);
    });
  }

  // From bases to what store_rows() takes, logits in units of log2(e): -inf where no key counts,
  // and finfo.min as it is there.  True where the rounding of a base counts (warp_finds_huge).
  ATTN_DEVICE bool finish() {
    bool huge = false;
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      float& base = state.max[r];
      if (quad_sum(state.sum[r]) == 0.0f)
        base = -kInf;
      else if (FAR && unit(r) == 1.0f)
        base = far_base(base);
      else
        huge |= rounds_away(base);
    }
    return repairs() && ballot(huge) != 0;
  }
};

template <class T, int BITS, class Tile>
ATTN_DEVICE int consume_features(const ForwardParams& x, const Work& w, Stored& stored,
                                 const ForwardMemory<Tile>& smem) {
  const QueryTask& task = w.task;
  const int group = warp_id() / 4 - 1;
  const int row = task.row0 + 64 * group + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(x.p, task.seq);
  FeatureConsumer<T, Tile, BITS> mine(x.p, score, task.head, row, task.rows, smem,
                                      smem.Q.tile(w.n) + group * 64 * 128);
  const int end = consume_turns(
      w, score, stored, smem, [&](int turn, int n0) { mine.edge(turn, n0); },
      [&](int turn, int end, int n0) { mine.whole(turn, end, n0, TakeTurns::of(task, group)); });
  bool bad = warp_finds_nan(mine.O);
  bad |= mine.finish();
  finish_tile<T, BITS>(x, w.n, smem, mine.O, mine.state, 1.0f, bad);
  return end;
}

template <class T, int HEAD_DIM, int VALUE_DIM, int BITS>
ATTN_KERNEL((THREADS), 1)
void forward_features(ATTN_GRID_CONSTANT const ForwardParams x) {
  using Tile = ForwardTile90<HEAD_DIM, VALUE_DIM>;
  const auto smem = ForwardMemory<Tile>::of(smem_base());
  run_tiles<BITS, Tile, true>(x, smem, [&](const Work& w, Stored& stored) {
    return consume_features<T, BITS>(x, w, stored, smem);
  });
}

}  // namespace attn::cuda::sm90
