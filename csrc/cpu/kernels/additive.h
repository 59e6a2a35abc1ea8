// Additive attention's scores (Bahdanau et al., arXiv 1409.0473), one tile at a time, queries in
// lanes; the [Sq, Sk, D] tensor of tanh(q_i + k_j) exists in registers only:
//   S^T[j][q] = sum_d w_d tanh(q_qd + k_jd)
// With e = exp(2q) exp(2k) and r = 1 / (1 + e):  tanh = 1 - 2r,  tanh' = 4 r (1 - r).  So the
// exponentials are taken once per row of Q and K, not per pair, and a pair costs half a division:
// two denominators a, b share it as (x b + y a) / (a b).  Where an |x| or a weight is so large (or
// NaN) that a product could overflow, tanh comes from vtanh instead, and a pair of dS = 0 adds
// nothing: 0 * inf would be NaN.
#pragma once
#include "cpu/scratch.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// Beyond it exp(2q) exp(2k) squared may overflow: 4 * 10.5 * 2 < ln(FLT_MAX).
template <class T>
constexpr T kFastTanh = sizeof(T) == 4 ? T(10.5) : T(80);

// Up to it exp(2q) exp(2k) times w, and sums of w, stay far from the largest number.
template <class T>
constexpr T kFastWeight = sizeof(T) == 4 ? T(1e15) : T(1e150);

// Some rows of Q or K, transposed [D][ld]: x, and exp(2x) for the fast way.
template <class T>
struct AdditiveRows {
  T *plain{}, *exp{};
  int64_t ld = 0;
  bool fast = false;  // no |x| is over its limit, or NaN

  static int64_t size(int64_t dim, int64_t ld) { return 2 * dim * ld; }
  AdditiveRows() = default;
  AdditiveRows(Scratch& scratch, int64_t dim, int64_t columns)
      : plain(scratch.take<T>(dim * columns)), exp(scratch.take<T>(dim * columns)), ld(columns) {}

  // n rows `at(i)` of storage; 0 in the lanes up to `columns`, whole vectors.  row: [D].
  template <class At>
  void load(DType type, int64_t n, int64_t columns, int64_t dim, T* row, const At& at) {
    const RowAt find = [](const void* at, int64_t i) { return (*static_cast<const At*>(at))(i); };
    load_rows(type, n, columns, dim, row, find, &at);
  }

 private:
  using RowAt = const char* (*)(const void* at, int64_t i);
  ATTN_NOINLINE void load_rows(DType type, int64_t n, int64_t columns, int64_t dim, T* row,
                               RowAt find, const void* at) {
    for (int64_t i = 0; i < columns; ++i) {
      if (i < n)
        convert_row<T>(type, find(at, i), dim, row);
      else
        std::fill(row, row + dim, T(0));
      for (int64_t d = 0; d < dim; ++d) plain[d * ld + i] = row[d];
    }
    fast = true;
    for (int64_t d = 0; d < dim; ++d) fast &= exponentials(d * ld, columns);
  }

  // exp = exp(2x) of n numbers, whole vectors; false where one is over the limit.
  ATTN_NOINLINE bool exponentials(int64_t first, int64_t n) {
    const T most = kFastTanh<T>;  // beyond it the result is not used, and vexp's integers overflow
    bool within = true;
    for (int64_t i = first; i < first + n; ++i) within &= std::abs(plain[i]) <= most;
    for (int64_t i = first; i < first + n; i += kLanes<T>) {
      Vec<T> v = ATTN_ISA::load(plain + i);
      v = v > most ? set1(most) : v;
      v = v < -most ? set1(-most) : v;
      store(exp + i, vexp(v * T(2)));
    }
    return within;
  }
};

template <class T>
ATTN_INLINE T lane_sum(Vec<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int n = kLanes<T> / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// What a block of keys keeps for the gradients.
template <class T>
struct AdditiveBlock {
  AdditiveRows<T> k_rows, q_rows;
  T* dKt{};  // [D][k_rows.ld]

  static int64_t size(int64_t dim, int64_t keys) {
    return AdditiveRows<T>::size(dim, keys + kPanel) + dim * keys;
  }
  void begin(Scratch& scratch, int64_t dim, int64_t keys) {
    k_rows = {scratch, dim, keys}, q_rows = {scratch, dim, kPanel};
    dKt = scratch.take<T>(dim * keys);
    std::fill(dKt, dKt + dim * keys, T(0));
  }
  // dK [nk][pad]
  void write_dk(int64_t nk, int64_t dim, int64_t pad, T* dK) const {
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t d = 0; d < pad; ++d) dK[j * pad + d] = d < dim ? dKt[d * k_rows.ld + j] : T(0);
  }
};

// out[i] = the sum of parts[.][i] in order.
template <class T>
inline void sum_parts(const std::vector<T>& parts, int64_t size, T* out) {
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t at = i; at < int64_t(parts.size()); at += size) sum += parts[at];
    out[i] = T(sum);
  }
}

// Additive scores of one head and their gradients, between rows of K and a panel of Q.
template <class T>
class Additive {
  static constexpr int L = kLanes<T>, NV = 4;

 public:
  Additive(const T* w, int64_t dim) : w(w), dim(dim) {  // w [D]
    for (int64_t d = 0; d < dim; ++d) fast &= std::abs(w[d]) <= kFastWeight<T>;
  }

  // S^T of the segments.
  void scores(const Segments& segments, const AdditiveRows<T>& K, const AdditiveRows<T>& Q,
              T* S) const {
    for (const Segment& s : segments)
      fast&& K.fast&& Q.fast ? scores_of<true>(s, K.exp, K.ld, Q.exp, S)
                             : scores_of<false>(s, K.plain, K.ld, Q.plain, S);
  }

  // dQ^T[d][q] += 4 w_d sum_j dS r (1 - r),  dK^T[d][j] alike over q,  dw[d] += sum dS (1 - 2 r).
  // dS^T is 0 in padding lanes.  dQ^T [D][kPanel], dK^T [D][K.ld].
  void gradient(const Segments& segments, const AdditiveRows<T>& K, const AdditiveRows<T>& Q,
                const T* dS, T* dQt, T* dKt, T* dw) const {
    for (const Segment& s : segments)
      fast&& K.fast&& Q.fast ? gradient_of<true>(s, K.exp, K.ld, Q.exp, dS, dQt, dKt, dw)
                             : gradient_of<false>(s, K.plain, K.ld, Q.plain, dS, dQt, dKt, dw);
  }

 private:
  const T* w;
  int64_t dim;
  bool fast = true;  // no |w| is over its limit, or NaN

  // r of a query and a key; FAST: of their exponentials.
  template <bool FAST>
  static ATTN_INLINE Vec<T> half_complement(Vec<T> q, T k) {
    if (FAST) return T(1) / (q * k + T(1));
    return (T(1) - vtanh(q + k)) * T(0.5);
  }

  template <bool FAST>
  ATTN_NOINLINE void scores_of(const Segment& s, const T* K, int64_t ld, const T* Q, T* S) const {
    T total = 0;
    for (int64_t d = 0; d < dim; ++d) total += w[d];
    for (int64_t q = s.begin; q < s.end; q += NV * L) {
      const int nv = int(std::min<int64_t>(NV, (s.end - q) / L));
      for (int64_t j = s.lo; j < s.hi; ++j) {
        Vec<T> acc[NV] = {};
        int64_t d = 0;
        if (FAST && nv == NV)
          for (; d + 2 <= dim; d += 2) {
            const T k0 = K[d * ld + j], k1 = K[(d + 1) * ld + j];
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              const Vec<T> a = load(Q + d * kPanel + q + v * L) * k0 + T(1);
              const Vec<T> b = load(Q + (d + 1) * kPanel + q + v * L) * k1 + T(1);
              acc[v] += (b * w[d] + a * w[d + 1]) / (a * b);
            }
          }
        for (; d < dim; ++d)
          for (int v = 0; v < nv; ++v) {
            const Vec<T> x = load(Q + d * kPanel + q + v * L);
            const T k = K[d * ld + j];
            acc[v] += w[d] * (FAST ? half_complement<FAST>(x, k) : vtanh(x + k));
          }
        for (int v = 0; v < nv; ++v)
          store(S + j * kPanel + q + v * L, FAST ? total - T(2) * acc[v] : acc[v]);
      }
    }
  }

  // One dimension of up to NV vectors of queries.
  struct Lanes {
    int nv;
    const T* dS;  // of the first query
    Vec<T> q[NV], dq[NV] = {}, weighted{};

    // Keys j and j + 1, which share a division: what they add to dK / (4 w).
    ATTN_INLINE void two_keys(int64_t j, T k0, T k1, T* sum0, T* sum1) {
      Vec<T> total0{}, total1{};
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vec<T> a = q[v] * k0 + T(1), b = q[v] * k1 + T(1);
        const Vec<T> inverse = T(1) / (a * b);
        const Vec<T> r0 = b * inverse, r1 = a * inverse;
        const Vec<T> u0 = load(dS + j * kPanel + v * L) * r0;
        const Vec<T> u1 = load(dS + (j + 1) * kPanel + v * L) * r1;
        weighted += u0 + u1;
        const Vec<T> f0 = u0 - u0 * r0, f1 = u1 - u1 * r1;
        total0 += f0, total1 += f1;
        dq[v] += f0 + f1;
      }
      *sum0 = lane_sum<T>(total0), *sum1 = lane_sum<T>(total1);
    }

    // One key: the same, or if not FAST what it adds to dK.
    template <bool FAST>
    ATTN_INLINE T one_key(int64_t j, T k, T weight) {
      Vec<T> sum{};
      for (int v = 0; v < nv; ++v) {
        const Vec<T> g = load(dS + j * kPanel + v * L);
        const Vec<T> r = half_complement<FAST>(q[v], k);
        Vec<T> u = g * r, f = u * (T(1) - r);
        if (!FAST) f *= T(4), f *= weight;
        if (!FAST) u = g == T(0) ? Vec<T>{} : u;  // 0 * NaN of an excluded key
        if (!FAST) f = g == T(0) ? Vec<T>{} : f;
        weighted += u;
        sum += f;
        dq[v] += f;
      }
      return lane_sum<T>(sum);
    }
  };

  template <bool FAST>
  ATTN_NOINLINE void gradient_of(const Segment& s, const T* K, int64_t ld, const T* Q, const T* dS,
                                 T* dQt, T* dKt, T* dw) const {
    for (int64_t q = s.begin; q < s.end; q += NV * L) {
      Lanes x{int(std::min<int64_t>(NV, (s.end - q) / L)), dS + q, {}};
      T sum_ds = 0;
      for (int64_t j = s.lo; j < s.hi; ++j)
        for (int v = 0; v < x.nv; ++v) sum_ds += lane_sum<T>(load(x.dS + j * kPanel + v * L));
      for (int64_t d = 0; d < dim; ++d) {
        const T factor = FAST ? T(4) * w[d] : T(1), *k = K + d * ld;
        T* dk = dKt + d * ld;
        x.weighted = Vec<T>{};
        for (int v = 0; v < x.nv; ++v)
          x.q[v] = load(Q + d * kPanel + q + v * L), x.dq[v] = Vec<T>{};
        int64_t j = s.lo;
        if (FAST && x.nv == NV)
          for (T sum[2]; j + 2 <= s.hi; j += 2) {
            x.two_keys(j, k[j], k[j + 1], &sum[0], &sum[1]);
            dk[j] += factor * sum[0], dk[j + 1] += factor * sum[1];
          }
        for (; j < s.hi; ++j) dk[j] += factor * x.template one_key<FAST>(j, k[j], w[d]);
        for (int v = 0; v < x.nv; ++v) {
          T* at = dQt + d * kPanel + q + v * L;
          store(at, load(at) + factor * x.dq[v]);
        }
        dw[d] += sum_ds - T(2) * lane_sum<T>(x.weighted);
      }
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
