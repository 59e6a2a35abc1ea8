// Backward of far rows (far.h) on every architecture, after the kernels that take P = 0 there:
//   base = max_j S,  inverse = 1 / sum_j 2^(S - base), the sink among them,
//   P = 2^(S - base) * inverse,  dS = P * (dP - delta)
//   backward_far_queries  a warp = 32 queries: marks, base, inverse, and dQ of those that are far
//   backward_far_keys     a warp = 8 keys of a K/V head: adds the share of far rows to dK and dV
//   backward_far_bias     a warp = 32 queries and 32 keys of dBias: adds it to dBias
// Far rows are rare, so a lane takes a pair and reads its row as it is; a call without them pays
// for a look at LSE and at the marks.  Two logits that differ in the last bit may differ by
// thousands here: every kernel computes a logit by the same additions in the same order.
#pragma once
#include "../dropout.cuh"
#include "../far.h"
#include "../repair.cuh"

namespace attn::cuda::sm80 {

ATTN_DEVICE bool is_far(float lse) { return fabsf(lse) > kFarLse && fabsf(lse) < kInf; }

ATTN_DEVICE float warp_max(float x) {
  ATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x = fmaxf(x, shfl_xor(x, mask));
  return x;
}
ATTN_DEVICE float warp_sum(float x) {
  ATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) x += shfl_xor(x, mask);
  return x;
}

// Of one sequence.  All lanes of a warp together, each with a pair (i, j) of its own.
template <class T>
struct Far {
  const Params& p;
  const Sequence& seq;
  const Score score;
  const Dropout dropout;
  const FarRows rows;

  ATTN_DEVICE Far(const Params& params, const Sequence& s)
      : p(params),
        seq(s),
        score(params, s),
        dropout(Dropout::of(params, s)),
        rows(FarRows::of(params.p, params.ptr, params.delta)) {}

  ATTN_DEVICE const T* query(const void* base, const Strides& s, int h, int i) const {
    return Repair<T, kFarDim>{p, seq}.query(base, s, h, i);
  }
  ATTN_DEVICE const T* key(const void* base, const Strides& s, int h, int j) const {
    return Repair<T, kFarDim>{p, seq}.key(base, s, h, j);
  }
  ATTN_DEVICE const uint32_t* marks(int h) const {
    return rows.marks + query_numbers(p, kMarkRows).first(seq.b, int(seq.q_start), h);
  }

  // The two rows that all pairs of the warp share: Q and dO of a query, or K and V of a key.
  ATTN_DEVICE static uint32_t shared_row(int which) {
    return smem_base() + uint32_t(2 * warp_id() + which) * kFarRowBytes;
  }
  ATTN_DEVICE void share(const T* first, const T* second) const {
    sync_warp();  // every lane is done with the rows before
    for (int d = lane_id(); d < int(p.p.head_dim); d += 32)
      sts_f32(shared_row(0) + 4 * d, to_float(first[d]));
    for (int d = lane_id(); d < int(p.p.head_dim_v); d += 32)
      sts_f32(shared_row(1) + 4 * d, to_float(second[d]));
    sync_warp();  // the rows are there
  }
  ATTN_DEVICE void share_query(int h, int i) const {
    share(query(p.ptr.q, p.p.q, h, i), query(p.ptr.dout, p.p.dout, h, i));
  }
  // A lane's row times a shared one.
  ATTN_DEVICE static float product(const T* row, int which, int64_t dim) {
    float sum = 0.0f;
    ATTN_UNROLL_4
    for (int d = 0; d < int(dim); ++d)
      sum = fmaf(to_float(row[d]), lds_f32(shared_row(which) + 4 * d), sum);
    return sum;
  }
  // S of the lane's pair, whose own row of Q or K is given; -inf where `valid` is false.
  ATTN_DEVICE float logit(const T* row, int h, int i, int j, bool valid, float& derivative) const {
    derivative = 1.0f;
    float s = -kInf;
    if (valid)
      s = score.template logit<kAny>(product(row, 0, p.p.head_dim), score.query(h, i), j,
                                     derivative);
    // A lane's own value: what comes out of a shuffle is in no multiply-add with what follows, so
    // that it is rounded in each kernel before base is taken from it.
    return shfl(s, lane_id());
  }

  struct Weights {
    float P, used, dS, raw;  // used: as dropout leaves it; raw: dS before softcap
  };
  // Of the lane's pair; row, row_v: its own rows, of Q and dO or of K and V.
  ATTN_DEVICE Weights weigh(const T* row, const T* row_v, int h, int i, int j, bool valid,
                            float base, float inverse, float delta) const {
    float derivative;
    const float s = logit(row, h, i, j, valid, derivative);
    if (s == -kInf) return {0.0f, 0.0f, 0.0f, 0.0f};
    const float P = exp2_approx(fminf(s - base, 0.0f)) * inverse;
    const float weight = p.p.dropout_p <= 0 ? 1.0f : dropout.keep(h, i, j) ? p.keep_scale : 0.0f;
    // not 0 * dP: V of a key that is dropped may hold NaN
    const float dP = weight == 0.0f ? 0.0f : weight * product(row_v, 1, p.p.head_dim_v);
    const float dS = P == 0.0f ? 0.0f : P * (dP - delta);
    return {P, P * weight, dS, P == 0.0f ? 0.0f : dS * derivative};
  }
  // Of key j0 + lane of a shared query.
  ATTN_DEVICE Weights of_key(int h, int i, int j0, float base, float inverse, float delta) const {
    const int j = j0 + lane_id();
    const bool valid = j < seq.seqlen_k;
    const int at = valid ? j : 0;
    return weigh(key(p.ptr.k, p.p.k, h, at), key(p.ptr.v, p.p.v, h, at), h, i, j, valid, base,
                 inverse, delta);
  }

  // base and inverse of a shared query, in every lane.
  ATTN_DEVICE void sums(int h, int i, float& base, float& inverse) const {
    int lo, hi;
    score.band.key_range(i, i + 1, seq.seqlen_k, lo, hi);
    float top = -kInf, sum = 0.0f, derivative;
    ATTN_NO_UNROLL
    for (int j0 = lo / 32 * 32; j0 < hi; j0 += 32) {
      const int j = j0 + lane_id();
      const bool valid = j < seq.seqlen_k;
      const T* row = key(p.ptr.k, p.p.k, h, valid ? j : 0);
      const float s = logit(row, h, i, j, valid, derivative), before = top;
      top = fmaxf(top, s);
      const float usable = top == -kInf ? 0.0f : top;  // -inf - -inf would be NaN
      sum = sum * exp2_approx(before - usable) + exp2_approx(s - usable);
    }
    const float sink = p.ptr.sink ? sink_logit(static_cast<const float*>(p.ptr.sink)[h]) : -kInf;
    base = fmaxf(warp_max(top), sink);
    sum = warp_sum(top == -kInf ? 0.0f : sum * exp2_approx(top - base));
    inverse = 1.0f / (p.ptr.sink ? sum + exp2_approx(sink - base) : sum);
  }

  // dQ of a shared query.
  ATTN_DEVICE void query_gradient(int h, int i, float base, float inverse, float delta) const {
    int lo, hi;
    score.band.key_range(i, i + 1, seq.seqlen_k, lo, hi);
    RowSum<kFarDim> dQ;
    ATTN_NO_UNROLL
    for (int j0 = lo / 32 * 32; j0 < hi; j0 += 32) {
      const float dS = of_key(h, i, j0, base, inverse, delta).raw;
      ATTN_NO_UNROLL
      for (int lane = 0; lane < min_int(32, seq.seqlen_k - j0); ++lane)
        dQ.add(shfl(dS, lane), key(p.ptr.k, p.p.k, h, j0 + lane), int(p.p.head_dim));
    }
    dQ.scale(p.scale);
    dQ.store(const_cast<T*>(query(p.ptr.dq, p.p.dq, h, i)), int(p.p.head_dim));
  }

  // What far rows add to dK and dV of key j of a K/V head.
  ATTN_DEVICE void key_gradients(int head_k, int j) const {
    int lo, hi;
    score.band.query_range(j, j + 1, seq.seqlen_q, lo, hi);
    share(key(p.ptr.k, p.p.k, head_k * p.group, j), key(p.ptr.v, p.p.v, head_k * p.group, j));
    RowSum<kFarDim> dK, dV;
    ATTN_NO_UNROLL
    for (int h = head_k * p.group; h < (head_k + 1) * p.group; ++h) {
      ATTN_NO_UNROLL
      for (int m = lo / kMarkRows; m * kMarkRows < hi; ++m) {
        const uint32_t mark = marks(h)[m];
        if (!mark) continue;
        const int i = m * kMarkRows + lane_id();
        const bool valid = mark >> lane_id() & 1;
        const int own = valid ? i : m * kMarkRows;
        const int64_t at = seq.lse_offset(p, h, own);
        const Weights w = weigh(query(p.ptr.q, p.p.q, h, own), query(p.ptr.dout, p.p.dout, h, own),
                                h, i, j, valid, valid ? rows.base[at] : 0.0f,
                                valid ? rows.inverse[at] : 0.0f, p.delta[at]);
        ATTN_NO_UNROLL
        for (int lane = 0; lane < kMarkRows; ++lane) {
          if (!(mark >> lane & 1)) continue;
          const int from = m * kMarkRows + lane;
          dV.add(shfl(w.used, lane), query(p.ptr.dout, p.p.dout, h, from), int(p.p.head_dim_v));
          dK.add(shfl(w.raw, lane), query(p.ptr.q, p.p.q, h, from), int(p.p.head_dim));
        }
      }
    }
    dK.scale(p.scale);
    const int h = head_k * p.group;
    if (p.ptr.dk) add(const_cast<T*>(key(p.ptr.dk, p.p.dk, h, j)), dK, int(p.p.head_dim));
    if (p.ptr.dv) add(const_cast<T*>(key(p.ptr.dv, p.p.dv, h, j)), dV, int(p.p.head_dim_v));
  }
  // row + sum, rounded once more.
  ATTN_DEVICE static void add(T* row, RowSum<kFarDim>& sum, int dim) {
    ATTN_UNROLL
    for (int c = 0; c < RowSum<kFarDim>::SHARE; ++c)
      if (lane_id() + 32 * c < dim) sum.x[c] += to_float(row[lane_id() + 32 * c]);
    sum.store(row, dim);
  }
};

template <class T>
ATTN_KERNEL(kRowThreads)
void backward_far_queries(ATTN_GRID_CONSTANT const Params p) {
  const int64_t unit = int64_t(block_id().x) * (kRowThreads / 32) + warp_id();
  const auto numbers = query_numbers(p, kMarkRows);
  const TileOf x = numbers.find(unit);
  if (!numbers.has(x)) return;
  const Sequence seq = Sequence::of<kAny>(p, x.b);
  const int h = x.head, m0 = x.tile * kMarkRows, i = m0 + lane_id();
  const auto* lse = static_cast<const float*>(p.ptr.lse);
  const uint32_t mark = ballot(i < seq.seqlen_q && is_far(lse[seq.lse_offset(p, h, i)]));
  const FarRows rows = FarRows::of(p.p, p.ptr, p.delta);
  if (lane_id() == 0) rows.marks[unit] = mark;
  if (!mark) return;
  const Far<T> far(p, seq);
  ATTN_NO_UNROLL
  for (int row = 0; row < kMarkRows; ++row) {
    if (!(mark >> row & 1)) continue;
    const int64_t at = seq.lse_offset(p, h, m0 + row);
    float base, inverse;
    far.share_query(h, m0 + row);
    far.sums(h, m0 + row, base, inverse);
    if (lane_id() == 0) rows.base[at] = base, rows.inverse[at] = inverse;
    if (p.ptr.dq) far.query_gradient(h, m0 + row, base, inverse, p.delta[at]);
  }
}

template <class T>
ATTN_KERNEL(kRowThreads)
void backward_far_keys(ATTN_GRID_CONSTANT const Params p) {
  const int64_t unit = int64_t(block_id().x) * (kRowThreads / 32) + warp_id();
  const auto numbers = key_numbers(p, kFarKeys);
  const TileOf x = numbers.find(unit);
  if (!numbers.has(x)) return;
  const int n0 = x.tile * kFarKeys, head_k = x.head;
  const Sequence seq = Sequence::of<kAny>(p, x.b);
  const Far<T> far(p, seq);
  const int marks = ceil_div(seq.seqlen_q, kMarkRows);
  uint32_t found = 0;
  ATTN_NO_UNROLL
  for (int h = head_k * p.group; h < (head_k + 1) * p.group; ++h) {
    ATTN_NO_UNROLL
    for (int m = lane_id(); m < marks; m += 32) found |= far.marks(h)[m];
  }
  if (!ballot(found != 0)) return;
  ATTN_NO_UNROLL
  for (int j = n0; j < min_int(n0 + kFarKeys, seq.seqlen_k); ++j) far.key_gradients(head_k, j);
}

// Indices [first, last) of a dimension that a warp sums over: all of a broadcast one, else its own.
struct FarSpan {
  int first, last;
  ATTN_DEVICE static FarSpan take(int64_t& x, bool broadcast, int count) {
    if (broadcast) return {0, count};
    const int at = int(x % count);
    x /= count;
    return {at, at + 1};
  }
};

template <class T>
ATTN_KERNEL(kRowThreads)
void backward_far_bias(ATTN_GRID_CONSTANT const Params p) {
  const ScoreStrides& s = p.p.dbias;
  // Of the bias, which has the rows and columns of the longest sequences.
  const int marks = ceil_div(int(p.p.seqlen_q), kMarkRows);
  const int parts = ceil_div(int(p.p.seqlen_k), 32);
  int64_t x = int64_t(block_id().x) * (kRowThreads / 32) + warp_id();
  const FarSpan keys = FarSpan::take(x, s.k == 0, parts);
  const FarSpan queries = FarSpan::take(x, s.q == 0, marks);
  const FarSpan heads = FarSpan::take(x, s.h == 0, int(p.p.heads_q));
  const FarSpan batches = FarSpan::take(x, s.b == 0, int(p.p.batch));
  if (x != 0) return;  // a warp beyond the last unit
  float* out = static_cast<float*>(p.ptr.dbias) + batches.first * s.b + heads.first * s.h;
  // With rows of its own: one after the other; else the sum over all in one go.
  ATTN_NO_UNROLL
  for (int row = 0; row < (s.q ? kMarkRows : 1); ++row) {
    float total = 0.0f;
    bool found = false;
    ATTN_NO_UNROLL
    for (int b = batches.first; b < batches.last; ++b) {
      const Sequence seq = Sequence::of<kAny>(p, b);
      const Far<T> far(p, seq);
      const int last = ceil_div(seq.seqlen_q, kMarkRows);
      ATTN_NO_UNROLL
      for (int h = heads.first; h < heads.last; ++h) {
        ATTN_NO_UNROLL
        for (int m = queries.first; m < min_int(queries.last, last); ++m) {
          const uint32_t mark = far.marks(h)[m] & (s.q ? 1u << row : ~0u);
          if (!mark) continue;
          found = true;
          ATTN_NO_UNROLL
          for (int r = 0; r < kMarkRows; ++r) {
            if (!(mark >> r & 1)) continue;
            const int i = m * kMarkRows + r;
            const int64_t at = seq.lse_offset(p, h, i);
            far.share_query(h, i);
            ATTN_NO_UNROLL
            for (int n = keys.first; n < keys.last; ++n)
              total +=
                  far.of_key(h, i, 32 * n, far.rows.base[at], far.rows.inverse[at], p.delta[at]).dS;
          }
        }
      }
    }
    if (!found) continue;
    if (s.k == 0) total = warp_sum(total);
    const int j = s.k ? 32 * keys.first + lane_id() : lane_id();
    if (j < (s.k ? int(p.p.seqlen_k) : 1))
      out[(s.q ? queries.first * kMarkRows + row : 0) * s.q + j * s.k] += total;
  }
}

}  // namespace attn::cuda::sm80
