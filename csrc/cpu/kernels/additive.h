// Additive attention's scores (Bahdanau et al., arXiv 1409.0473), one tile at a time, queries in
// lanes; the [Sq, Sk, D] tensor of tanh(q_i + k_j) exists in registers only:
//   S^T[j][q] = sum_d w_d tanh(q_qd + k_jd)
// With e = exp(2q) exp(2k) and r = 1 / (1 + e):  tanh = 1 - 2r,  tanh' = 4 r (1 - r).  So the
// exponentials are taken once per row of Q and K, not per pair, and a pair costs half a division:
// two denominators a, b share it as (x b + y a) / (a b).  Where an |x| is so large (or NaN) that a
// product could overflow, r comes from vtanh instead.
#pragma once
#include "cpu/kernels/family_tile.h"

namespace attn::cpu::ATTN_ISA {

// Beyond it exp(2q) exp(2k) squared may overflow: 4 * 10.5 * 2 < ln(FLT_MAX).
template <class T>
constexpr T kFastTanh = sizeof(T) == 4 ? T(10.5) : T(80);

// The rows of one side of a tile, transposed [dim][ld]: exp(2x) for the fast way, x for the other.
template <class T>
struct AdditiveSide {
  T* data;
  int64_t ld;
};

// False when some |x| is over the limit of the fast way, or NaN.
template <class T>
ATTN_NOINLINE bool within_fast_tanh(const T* x, int64_t n) {
  bool within = true;
  for (int64_t i = 0; i < n; ++i) within &= std::abs(x[i]) <= kFastTanh<T>;
  return within;
}

// x = exp(2x) in place; n is a multiple of kLanes<T>.
template <class T>
ATTN_NOINLINE void exponentials(T* x, int64_t n) {
  const T most = kFastTanh<T>;  // beyond it the result is not used, and vexp's integers overflow
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    Vec<T> v = load(x + i);
    v = v > most ? set1(most) : v;
    v = v < -most ? set1(-most) : v;
    store(x + i, vexp(v * T(2)));
  }
}

template <class T, bool FAST>
ATTN_INLINE Vec<T> half_complement(Vec<T> q, T k) {
  if (FAST) return T(1) / (q * k + T(1));
  return (T(1) - vtanh(q + k)) * T(0.5);
}

// S^T[j][q] for nk keys and bm queries (a multiple of kLanes<T>).
template <class T, bool FAST>
ATTN_NOINLINE void additive_scores(int64_t nk, int64_t bm, int64_t dim, AdditiveSide<T> K,
                                   AdditiveSide<T> Q, const T* w, T* S) {
  constexpr int NV = 4;
  T total = 0;
  for (int64_t d = 0; d < dim; ++d) total += w[d];
  for (int64_t q = 0; q < bm; q += NV * kLanes<T>) {
    const int nv = int(std::min<int64_t>(NV, (bm - q) / kLanes<T>));
    for (int64_t j = 0; j < nk; ++j) {
      Vec<T> acc[NV] = {};
      int64_t d = 0;
      if (FAST && nv == NV)
        for (; d + 2 <= dim; d += 2) {
          const T k0 = K.data[d * K.ld + j], k1 = K.data[(d + 1) * K.ld + j];
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            const Vec<T> a = load(Q.data + d * Q.ld + q + v * kLanes<T>) * k0 + T(1);
            const Vec<T> b = load(Q.data + (d + 1) * Q.ld + q + v * kLanes<T>) * k1 + T(1);
            acc[v] += (b * w[d] + a * w[d + 1]) / (a * b);
          }
        }
      for (; d < dim; ++d)
        for (int v = 0; v < nv; ++v)
          acc[v] += w[d] * half_complement<T, FAST>(load(Q.data + d * Q.ld + q + v * kLanes<T>),
                                                    K.data[d * K.ld + j]);
      for (int v = 0; v < nv; ++v)
        store(S + j * kMaxQueries + q + v * kLanes<T>, total - T(2) * acc[v]);
    }
  }
}

template <class T>
ATTN_INLINE T lane_sum(Vec<T> x) {
  T lanes[kLanes<T>];
  store(lanes, x);
  for (int n = kLanes<T> / 2; n; n /= 2)
    for (int i = 0; i < n; ++i) lanes[i] += lanes[i + n];
  return lanes[0];
}

// dQ^T[d][q] += 4 w_d sum_j dS r (1 - r),  dK^T[d][j] alike over q,  dw[d] += sum dS (1 - 2 r).
// dS^T [nk][kMaxQueries] is 0 in padding lanes.
template <class T, bool FAST>
ATTN_NOINLINE void additive_gradient(int64_t nk, int64_t bm, int64_t dim, AdditiveSide<T> K,
                                     AdditiveSide<T> Q, const T* w, const T* dS, T* dQt,
                                     int64_t ldq, T* dKt, int64_t ldk, T* dw) {
  constexpr int NV = 4;
  for (int64_t q = 0; q < bm; q += NV * kLanes<T>) {
    const int nv = int(std::min<int64_t>(NV, (bm - q) / kLanes<T>));
    T sum_ds = 0;
    for (int64_t j = 0; j < nk; ++j)
      for (int v = 0; v < nv; ++v)
        sum_ds += lane_sum<T>(load(dS + j * kMaxQueries + q + v * kLanes<T>));
    for (int64_t d = 0; d < dim; ++d) {
      Vec<T> q_side[NV], dq[NV] = {}, weighted{};
      for (int v = 0; v < nv; ++v) q_side[v] = load(Q.data + d * Q.ld + q + v * kLanes<T>);
      const T factor = T(4) * w[d];
      int64_t j = 0;
      if (FAST && nv == NV)
        for (; j + 2 <= nk; j += 2) {
          const T k0 = K.data[d * K.ld + j], k1 = K.data[d * K.ld + j + 1];
          Vec<T> sum0{}, sum1{};
#pragma GCC unroll 4
          for (int v = 0; v < NV; ++v) {
            const Vec<T> a = q_side[v] * k0 + T(1), b = q_side[v] * k1 + T(1);
            const Vec<T> inverse = T(1) / (a * b);
            const Vec<T> r0 = b * inverse, r1 = a * inverse;
            const Vec<T> u0 = load(dS + j * kMaxQueries + q + v * kLanes<T>) * r0;
            const Vec<T> u1 = load(dS + (j + 1) * kMaxQueries + q + v * kLanes<T>) * r1;
            weighted += u0 + u1;
            const Vec<T> f0 = u0 - u0 * r0, f1 = u1 - u1 * r1;
            sum0 += f0, sum1 += f1;
            dq[v] += f0 + f1;
          }
          dKt[d * ldk + j] += factor * lane_sum<T>(sum0);
          dKt[d * ldk + j + 1] += factor * lane_sum<T>(sum1);
        }
      for (; j < nk; ++j) {
        Vec<T> sum{};
        for (int v = 0; v < nv; ++v) {
          const Vec<T> g = load(dS + j * kMaxQueries + q + v * kLanes<T>);
          const Vec<T> r = half_complement<T, FAST>(q_side[v], K.data[d * K.ld + j]);
          Vec<T> u = g * r, f = u * (T(1) - r);
          if (!FAST) u = g == T(0) ? Vec<T>{} : u;  // 0 * NaN of an excluded key
          if (!FAST) f = g == T(0) ? Vec<T>{} : f;
          weighted += u;
          sum += f;
          dq[v] += f;
        }
        dKt[d * ldk + j] += factor * lane_sum<T>(sum);
      }
      for (int v = 0; v < nv; ++v) {
        T* at = dQt + d * ldq + q + v * kLanes<T>;
        store(at, load(at) + factor * dq[v]);
      }
      dw[d] += sum_ds - T(2) * lane_sum<T>(weighted);
    }
  }
}

}  // namespace attn::cpu::ATTN_ISA
