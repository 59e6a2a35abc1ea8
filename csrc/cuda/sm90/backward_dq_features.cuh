// backward_dq.cuh for calls with features (../features.h).
//
// Keys lie in shared memory in the order of fours.cuh, so that a thread reads mask and bias of 4
// keys at a time.  They are asked for, and dropout is drawn, before S is waited for.  What a NaN
// behind an excluded pair leaves is computed once more (repair.cuh).
#pragma once
#include "backward_dq.cuh"
#include "fours.cuh"

namespace attn::cuda::sm90 {

template <class T, int HEAD_DIM, int BITS>
struct FeatureQueryGradient : QueryGradient<T, HEAD_DIM>,
                              FourSides<T, BITS, QueryGradientTile<HEAD_DIM>::BLOCK_N / 8> {
  using Base = QueryGradient<T, HEAD_DIM>;
  using Base::TILES, Base::row, Base::gradient;
  using Fours = FourSides<T, BITS, TILES>;
  using Fours::CAPPED, Fours::GROUPS, Fours::at, Fours::score;
  using typename Fours::Scores, typename Fours::Sides;
  static constexpr bool SIDES = may_have<BITS>(kMask | kBias);
  // Ones where dropout takes a key of a group.
  struct Dropped {
    uint32_t word[GROUPS][2][4];
  };

  ATTN_DEVICE FeatureQueryGradient(const Base& base, const Score& of, int h)
      : Base(base), Fours(of.p, of, h, base.row, of.seq.seqlen_q) {}

  // What the pairs of a tile have beside their products.
  ATTN_DEVICE void load(Sides& sides, int n0, bool edge) const {
    if (!SIDES) return;
    if (!edge) return this->load_sides(sides, n0, 0, GROUPS);
    ATTN_UNROLL
    for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r)
      sides[m][r].load_some(score.p, this->query[r], this->first_key(n0, m), score.seq.seqlen_k);
  }
  ATTN_DEVICE void draw(Dropped& dropped, int n0) const {
    ATTN_UNROLL
    for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      uint32_t words[4];
      const Query& q = this->query[r];
      this->dropout.words(q.h, q.i, this->first_key(n0, m), words);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e)
        dropped.word[m][r][e] = wgmma_held(this->threshold.dropped(words[e]));  // here, not later
    }
  }
  // 0 where the band or the length excludes a pair.
  ATTN_DEVICE void exclude(Scores& P, int n0) const {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Columns columns = Columns::of_query(score, row + 8 * r, n0);
      const int t = 4 * (lane_id() & 3), lo = columns.lo - t, hi = columns.hi - t;
      ATTN_UNROLL
      for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
      for (int e = 0; e < 4; ++e)
        if (!((16 * m + e >= lo) & (16 * m + e < hi))) at(P, m, r, e) = 0.0f;
    }
  }
  // S: products in, weights times the slope of the soft cap out.
  template <class Ways>
  ATTN_DEVICE void weigh_by(Scores& S, const Sides& sides, int n0) const {
    const Params& p = score.p;
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float distance = this->distance_of(r, n0);
      ATTN_UNROLL
      for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        float &x = at(S, m, r, e), slope = 1.0f;
        x = this->template logit<Ways>(x, distance - float(16 * m + e), sides[m][r], e,
                                       [&](float d) { slope = d; });
        x = weight_of(x, this->unit(), gradient[r].lse);
        if (has<BITS>(p, kMask) && !sides[m][r].keeps(e)) x = 0.0f;
        if (CAPPED) x *= slope;
      }
    }
  }
  ATTN_DEVICE void weigh(Scores& S, const Sides& sides, int n0, bool edge) const {
    this->with_ways(S, [&](auto ways) { weigh_by<decltype(ways)>(S, sides, n0); });
    if (edge) exclude(S, n0);
  }
  // dS in place of dP.
  template <bool EDGE>
  ATTN_DEVICE void differentiate(Scores& dP, const Scores& P, const Dropped& dropped) const {
    const Params& p = score.p;
    ATTN_UNROLL
    for (int m = 0; m < GROUPS; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      float& x = at(dP, m, r, e);
      const float weight = at(P, m, r, e);
      if (has<BITS>(p, kDropout)) {  // not 0 * dP: V of a key that is dropped may hold NaN
        const float kept = as_float(as_uint(x) & ~dropped.word[m][r][e]);
        const float d = fmaf(kept, p.keep_scale, -gradient[r].delta);
        x = EDGE && weight == 0.0f ? 0.0f : weight * d;
      } else {
        x = gradient_of<EDGE>(weight, x, gradient[r].delta);
      }
    }
  }

  ATTN_DEVICE void add(int turn, int n0, bool edge) {
    Scores S, dS;
    Sides sides;
    Dropped dropped;
    load(sides, n0, edge);
    this->issue(S, dS, turn);
    if (has<BITS>(score.p, kDropout)) draw(dropped, n0);
    wgmma_wait<1>();  // S is there
    wgmma_hold(S);
    weigh(S, sides, n0, edge);
    wgmma_hold(S);
    wgmma_wait<0>();  // dP is there
    wgmma_hold(dS);
    this->V.release(turn);
    edge ? differentiate<true>(dS, S, dropped) : differentiate<false>(dS, S, dropped);
    this->add_gradients(dS, turn, edge);
  }
};

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL(THREADS, 1)
void backward_dq_features(ATTN_GRID_CONSTANT const BackwardParams x) {
  run_query_task<T, HEAD_DIM, BITS>(x, [](const auto& base, const Score& score, int head) {
    return FeatureQueryGradient<T, HEAD_DIM, BITS>(base, score, head);
  });
}

}  // namespace attn::cuda::sm90
