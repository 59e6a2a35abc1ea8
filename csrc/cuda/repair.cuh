// Results that hold a NaN, computed once more by the kernels whose loops look at no operand.  Their
// loops multiply all pairs of a tile, also those whose weight is 0, and 0 * inf and 0 * NaN are the
// only ways in which such a pair reaches a sum.  Both leave NaN, so the loops need not look at
// their operands: afterwards a warp whose results hold a NaN computes its rows again from global
// memory, row by row, only with pairs that count (logit not -inf, weight not 0).  What is NaN by
// right is NaN again.  Rows of O with logits beyond 2^24 are computed once more, too
// (warp_finds_huge).
#pragma once
#include "backward_parts.cuh"
#include "dropout.cuh"
#include "softmax.cuh"

namespace attn::cuda {

// True in the whole warp when some element of its fragments is NaN.  first, second: whether the
// thread's rows g and g + 8 are there; others are not looked at.
template <int ACC>
ATTN_DEVICE bool warp_finds_nan(const float (&acc)[ACC][4], bool first = true, bool second = true) {
  if (!repairs()) return false;
  bool bad[2] = {false, false};
  ATTN_UNROLL
  for (int n = 0; n < ACC; ++n) ATTN_UNROLL
  for (int i = 0; i < 4; ++i) bad[i / 2] |= acc[n][i] != acc[n][i];
  return ballot((bad[0] && first) || (bad[1] && second)) != 0;
}

// a . b, in every lane.
template <class T>
ATTN_DEVICE float warp_dot(const T* a, const T* b, int dim) {
  float sum = 0.0f;
  ATTN_NO_UNROLL
  for (int d = lane_id(); d < dim; d += 32) sum = fmaf(to_float(a[d]), to_float(b[d]), sum);
  ATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  return sum;
}

// Columns lane, lane + 32, ... of a row: a lane's share of a sum of rows.
template <int HEAD_DIM>
struct RowSum {
  static constexpr int SHARE = HEAD_DIM / 32;
  float x[SHARE] = {};

  // += weight * row, where the weight is not 0.
  template <class T>
  ATTN_DEVICE void add(float weight, const T* row, int dim) {
    if (weight == 0.0f) return;
    ATTN_UNROLL
    for (int c = 0; c < SHARE; ++c) {
      const int d = lane_id() + 32 * c;
      if (d < dim) x[c] = fmaf(weight, to_float(row[d]), x[c]);
    }
  }
  ATTN_DEVICE void scale(float factor) {
    ATTN_UNROLL
    for (int c = 0; c < SHARE; ++c) x[c] *= factor;
  }
  // The same, but by 0 it is 0 whatever it was: what does not count any more may be infinite.
  ATTN_DEVICE void rescale(float factor) {
    ATTN_UNROLL
    for (int c = 0; c < SHARE; ++c) x[c] = factor == 0.0f ? 0.0f : x[c] * factor;
  }
  template <class T>
  ATTN_DEVICE void store(T* row, int dim) const {
    ATTN_UNROLL
    for (int c = 0; c < SHARE; ++c)
      if (lane_id() + 32 * c < dim) row[lane_id() + 32 * c] = from_float<T>(x[c]);
  }
};

// Of one head and sequence of a call with these features.  All lanes of a warp together.
template <class T, int HEAD_DIM, int BITS = 0>
struct Repair {
  const Params& p;
  const Sequence& seq;

  template <class E = T>
  ATTN_DEVICE const E* query(const void* base, const Strides& s, int h, int i) const {
    return static_cast<const E*>(base) + seq.b * s.b + h * s.h + (seq.q_start + i) * s.s;
  }
  template <class E = T>
  ATTN_DEVICE const E* key(const void* base, const Strides& s, int h, int j) const {
    return static_cast<const E*>(base) + seq.b * s.b + h / p.group * s.h + (seq.k_start + j) * s.s;
  }
  // The row of O, dQ, dK or dV that belongs to a query or a key.
  ATTN_DEVICE void store_query(const RowSum<HEAD_DIM>& sum, const void* base, const Strides& s,
                               int h, int i, int dim) const {
    if (has<BITS>(p, kPart))
      sum.store(const_cast<float*>(query<float>(base, s, h, i)), dim);
    else
      sum.store(const_cast<T*>(query(base, s, h, i)), dim);
  }
  ATTN_DEVICE void store_key(const RowSum<HEAD_DIM>& sum, const void* base, const Strides& s, int h,
                             int j, int dim) const {
    if (has<BITS>(p, kPart))
      sum.store(const_cast<float*>(key<float>(base, s, h, j)), dim);
    else
      sum.store(const_cast<T*>(key(base, s, h, j)), dim);
  }
  ATTN_DEVICE float logit(int h, int i, int j, float& derivative) const {
    const float product =
        warp_dot(query(p.ptr.q, p.p.q, h, i), key(p.ptr.k, p.p.k, h, j), int(p.p.head_dim));
    // A lane's own value: what comes out of a shuffle is in no multiply-add with what follows.
    if constexpr (BITS == 0) return shfl(p.scale_log2 * product, lane_id());
    const Score score(p, seq);
    return score.template logit<BITS>(product, score.query(h, i), j, derivative);
  }
  // What dropout makes of a weight of 1.
  ATTN_DEVICE float kept(int h, int i, int j) const {
    if (!has<BITS>(p, kDropout)) return 1.0f;
    return Dropout::of(p, seq).keep(h, i, j) ? p.keep_scale : 0.0f;
  }
  // P and dS of a pair; row: of query i.
  ATTN_DEVICE void gradient(int h, int i, int j, const RowGradient& row, float& P,
                            float& dS) const {
    float derivative = 1.0f;
    const float s = logit(h, i, j, derivative), weight = kept(h, i, j);
    P = s == -kInf ? 0.0f : exp2_approx(s - row.lse);
    const float dP =
        warp_dot(query(p.ptr.dout, p.p.dout, h, i), key(p.ptr.v, p.p.v, h, j), int(p.p.head_dim_v));
    // not 0 * dP: V of a key that dropout drops may hold NaN
    const float passed = may_have<BITS>(kDropout) && weight == 0.0f ? 0.0f : dP * weight;
    dS = P == 0.0f ? 0.0f : P * (passed - row.delta) * derivative;
    P = weight == 0.0f ? 0.0f : P * weight;  // nor 0 * P of a row of NaN
  }

  // O, LSE and statistics of query i: a product of NaN may have met an excluded pair.
  ATTN_DEVICE void output(int h, int i) const {
    int lo, hi;
    Band::of(p, seq).key_range(i, i + 1, seq.seqlen_k, lo, hi);
    float top = -kInf, sum = 0.0f, weighted = 0.0f;
    RowSum<HEAD_DIM> O;
    ATTN_NO_UNROLL
    for (int j = lo; j < hi; ++j) {
      float derivative;
      const float s = logit(h, i, j, derivative), before = top;
      top = fmaxf(top, s);
      const float base = top == -kInf ? 0.0f : top, alpha = exp2_approx(before - base);
      const float weight = exp2_approx(s - base);
      if (has<BITS>(p, kStats))
        weighted = alpha * (weighted + fmaxf(before - base, -kFar) * sum) +
                   (s == -kInf ? 0.0f : weight * (s - base));
      sum = sum * alpha + weight;
      O.rescale(alpha);
      O.add(weight * kept(h, i, j), key(p.ptr.v, p.p.v, h, j), int(p.p.head_dim_v));
    }
    if constexpr (BITS == 0) {
      O.rescale(sum == 0.0f ? 0.0f : 1.0f / sum);
      if (lane_id() == 0)
        static_cast<float*>(p.ptr.lse)[seq.lse_offset(p, h, i)] =
            sum == 0.0f ? -kInf : (top + log2f(sum)) * kLn2;
    } else {
      O.rescale(finish(h, i, top, sum, weighted));
    }
    store_query(O, p.ptr.o, p.p.o, h, i, int(p.p.head_dim_v));
  }

  // LSE and statistics of query i; what O is to be multiplied by.
  ATTN_DEVICE float finish(int h, int i, float top, float sum, float weighted) const {
    RowState state;  // whose sums are shared out in a quad
    const bool first = (lane_id() & 3) == 0;
    state.max[0] = top, state.sum[0] = first ? sum : 0.0f;
    state.weighted[0] = first ? weighted : 0.0f;
    const auto* sinks = static_cast<const float*>(p.ptr.sink);
    const bool stats = has<BITS>(p, kStats);
    const RowResult result =
        finish_row(state, 0, 1.0f, has<BITS>(p, kSink) ? sinks + h : nullptr, stats);
    const int64_t at = seq.lse_offset(p, h, i);
    if (lane_id() == 0) {
      static_cast<float*>(p.ptr.lse)[at] = result.lse;
      if (stats) static_cast<float*>(p.ptr.max_logit)[at] = result.max_logit;
      if (stats) static_cast<float*>(p.ptr.entropy)[at] = result.entropy;
    }
    return result.inverse;
  }

  // dQ of query i.
  ATTN_DEVICE void query_gradient(int h, int i) const {
    int lo, hi;
    Band::of(p, seq).key_range(i, i + 1, seq.seqlen_k, lo, hi);
    const RowGradient row = RowGradient::of<may_have<BITS>(kBias)>(p, seq, h, i);
    RowSum<HEAD_DIM> dQ;
    ATTN_NO_UNROLL
    for (int j = lo; j < hi; ++j) {
      float P, dS;
      gradient(h, i, j, row, P, dS);
      dQ.add(dS, key(p.ptr.k, p.p.k, h, j), int(p.p.head_dim));
    }
    dQ.scale(p.scale);
    store_query(dQ, p.ptr.dq, p.p.dq, h, i, int(p.p.head_dim));
  }

  // dK and dV of key j of a K/V head, each where it is asked for.
  ATTN_DEVICE void key_gradients(int head_k, int j, bool for_k, bool for_v) const {
    int lo, hi;
    Band::of(p, seq).query_range(j, j + 1, seq.seqlen_q, lo, hi);
    RowSum<HEAD_DIM> dK, dV;
    ATTN_NO_UNROLL
    for (int h = head_k * p.group; h < (head_k + 1) * p.group; ++h) {
      ATTN_NO_UNROLL
      for (int i = lo; i < hi; ++i) {
        float P, dS;
        gradient(h, i, j, RowGradient::of<may_have<BITS>(kBias)>(p, seq, h, i), P, dS);
        dV.add(P, query(p.ptr.dout, p.p.dout, h, i), int(p.p.head_dim_v));
        dK.add(dS, query(p.ptr.q, p.p.q, h, i), int(p.p.head_dim));
      }
    }
    dK.scale(p.scale);
    const int h = head_k * p.group;
    if (for_k && p.ptr.dk) store_key(dK, p.ptr.dk, p.p.dk, h, j, int(p.p.head_dim));
    if (for_v && p.ptr.dv) store_key(dV, p.ptr.dv, p.p.dv, h, j, int(p.p.head_dim_v));
  }
};

// work(row) for the 16 rows of a warp, of those before `end`.  The stores of the results before
// come first, of other lanes too.
template <class Work>
ATTN_DEVICE void each_row(int first, int end, const Work& work) {
  sync_warp();
  ATTN_NO_UNROLL
  for (int row = first; row < min_int(first + 16, end); ++row) work(row);
}

}  // namespace attn::cuda
