// Vec<T>: one register of float or double lanes, as a GNU vector.  Compiled
// once for each ISA, in its namespace and target region (isa/region.h).
#pragma once
#include "cpu/isa/region.h"

namespace attn::cpu::ATTN_ISA {

#define ATTN_INLINE inline __attribute__((always_inline))
// For work by the row or by the tile, many numbers a call: compiled once, however many places call
// it.  (noclone: nor once more for a constant argument.)  Half of the time to build was copies.
#define ATTN_NOINLINE inline __attribute__((noinline, noclone))

template <class T>
struct VecOf {
  typedef T type __attribute__((vector_size(ATTN_VEC_BYTES)));
};
template <class T>
using Vec = typename VecOf<T>::type;

template <class T>
struct IntOf;
template <>
struct IntOf<float> {
  using type = int32_t;
};
template <>
struct IntOf<double> {
  using type = int64_t;
};
// Lane masks: all ones or all zeros in an integer of T's width.
template <class T>
using Mask = Vec<typename IntOf<T>::type>;

template <class T>
constexpr int kLanes = ATTN_VEC_BYTES / sizeof(T);

template <class T>
ATTN_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
ATTN_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof(v));
}
template <class T>
ATTN_INLINE Vec<T> set1(T x) {
  return x - Vec<T>{};  // broadcast
}
template <class T>
ATTN_INLINE Vec<T> iota() {
  Vec<T> v;
  for (int i = 0; i < kLanes<T>; ++i) v[i] = T(i);
  return v;
}
// x * weight, but 0 where the weight is 0: of an infinite sum nothing is left then, and 0 * inf
// would be NaN.
template <class T>
ATTN_INLINE Vec<T> weighed(Vec<T> x, Vec<T> weight) {
  return (weight == T(0) ? Vec<T>{} : x) * weight;
}
// b where one of them is NaN.
template <class V>
ATTN_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class T>
ATTN_INLINE bool all_lanes(Mask<T> mask) {
  typename IntOf<T>::type all = -1;
  for (int i = 0; i < kLanes<T>; ++i) all &= mask[i];
  return all;
}
template <class T>
ATTN_INLINE bool all_equal(Vec<T> a, Vec<T> b) {
  return all_lanes<T>(a == b);
}
// a < b in every lane (false where one is NaN).
template <class T>
ATTN_INLINE bool all_below(Vec<T> a, Vec<T> b) {
  return all_lanes<T>(a < b);
}

#if ATTN_VEC_BYTES == 64
template <>
ATTN_INLINE bool all_lanes<float>(Mask<float> mask) {
  return _mm512_movepi32_mask((__m512i)mask) == 0xffff;
}
template <>
ATTN_INLINE bool all_below<float>(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LT_OQ) == 0xffff;
}
ATTN_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
template <>
ATTN_INLINE bool all_equal<float>(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ) == 0xffff;
}
#elif ATTN_VEC_BYTES == 32
template <>
ATTN_INLINE bool all_below<float>(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_LT_OQ)) == 0xff;
}
ATTN_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
template <>
ATTN_INLINE bool all_equal<float>(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_EQ_OQ)) == 0xff;
}
#endif

constexpr double kLog2e = 1.44269504088896340736;  // e^x = 2^(x * kLog2e)

// Exponentials are computed abreast, N vectors at a time: the polynomial is one chain of dependent
// instructions, and a scheduler holds too few such chains when they come one after another.
constexpr int kAbreast = ATTN_VEC_BYTES == 64 ? 4 : 2;
#define ATTN_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)

// p * 2^n, where n is in the low mantissa bits of t; not beyond normal numbers.
ATTN_INLINE Vec<float> times_power_of_two(Vec<float> p, Vec<float> t) {
  Vec<uint32_t> bits, exponent;  // unsigned: wraps where the caller replaces the result
  std::memcpy(&bits, &p, sizeof(bits));
  std::memcpy(&exponent, &t, sizeof(exponent));
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof(bits));
  return p;
}

// x[i] = 2^x[i] = 2^n 2^f with n = floor(x), 2^f by its minimax polynomial: error 1.5e-7 for DEGREE
// 5; 7.5e-5 for DEGREE 3, for results that are rounded to bfloat16.  -inf gives 0, NaN stays NaN.
template <int DEGREE, int N>
ATTN_INLINE void vexp2_each(Vec<float> (&x)[N]) {
  Vec<float> f[N], p[N];
#if ATTN_VEC_BYTES == 64
  ATTN_EACH f[i] = (Vec<float>)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEG_INF);  // of -inf: 0
#else
  const Vec<float> magic = set1(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are n
  Vec<float> t[N];
  ATTN_EACH t[i] = (x[i] - 0.5f) + magic;
  ATTN_EACH f[i] = x[i] - (t[i] - magic);
#endif
  if constexpr (DEGREE == 5) {
    ATTN_EACH p[i] = 0.0018775766948238015f * f[i] + 0.00898933969438076f;
    ATTN_EACH p[i] = p[i] * f[i] + 0.05582631751894951f;
    ATTN_EACH p[i] = p[i] * f[i] + 0.24015361070632935f;
    ATTN_EACH p[i] = p[i] * f[i] + 0.6931530833244324f;
    ATTN_EACH p[i] = p[i] * f[i] + 0.9999999403953552f;
  } else {
    static_assert(DEGREE == 3);
    ATTN_EACH p[i] = 0.07802452147006989f * f[i] + 0.22606715559959412f;
    ATTN_EACH p[i] = p[i] * f[i] + 0.6958335638046265f;
    ATTN_EACH p[i] = p[i] * f[i] + 0.9999251961708069f;
  }
#if ATTN_VEC_BYTES == 64
  ATTN_EACH x[i] =
      (Vec<float>)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);  // takes the floor of x
#else
  ATTN_EACH {
    p[i] = times_power_of_two(p[i], t[i]);
    p[i] = x[i] < -126.f ? Vec<float>{} : p[i];
    p[i] = x[i] >= 128.f ? set1(__builtin_inff()) : p[i];
    x[i] = x[i] == x[i] ? p[i] : x[i];
  }
#endif
}

// x[i] = e^x[i] = 2^n e^f with n = round(x / ln2), |f| <= ln2 / 2, e^f by its minimax polynomial:
// 1 ulp for x > -16, where f is exact.  0 below -87.3, NaN stays NaN.
template <int N>
ATTN_INLINE void vexp_each(Vec<float> (&x)[N]) {
  Vec<float> n[N], f[N], p[N];
#if ATTN_VEC_BYTES == 64
  ATTN_EACH n[i] = (Vec<float>)_mm512_roundscale_ps((__m512)(x[i] * 1.44269504088896341f), 0);
  ATTN_EACH f[i] = x[i] - n[i] * 0.693147182464599609375f;
#else
  const Vec<float> magic = set1(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are n
  ATTN_EACH n[i] = x[i] * 1.44269504088896341f + magic;
  ATTN_EACH f[i] = x[i] - (n[i] - magic) * 0.693145751953125f;  // ln2 in two parts: exact products
  ATTN_EACH f[i] = f[i] - (n[i] - magic) * 1.42860682030941723212e-6f;
#endif
  ATTN_EACH p[i] = 0.0013843653723597527f * f[i] + 0.00837415549904108f;
  ATTN_EACH p[i] = p[i] * f[i] + 0.04166800156235695f;
  ATTN_EACH p[i] = p[i] * f[i] + 0.16666431725025177f;
  ATTN_EACH p[i] = p[i] * f[i] + 0.4999999403953552f;
  ATTN_EACH p[i] = p[i] * f[i] + 1.f;
  ATTN_EACH p[i] = p[i] * f[i] + 1.f;
  ATTN_EACH {
#if ATTN_VEC_BYTES == 64
    const __mmask16 visible = _mm512_cmp_ps_mask((__m512)x[i], _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
    x[i] = (Vec<float>)_mm512_maskz_scalef_ps(visible, (__m512)p[i], (__m512)n[i]);
#else
    p[i] = times_power_of_two(p[i], n[i]);
    p[i] = x[i] < -87.3f ? Vec<float>{} : p[i];
    p[i] = x[i] > 88.7f ? set1(__builtin_inff()) : p[i];
    x[i] = x[i] == x[i] ? p[i] : x[i];
#endif
  }
}

// float64 is computed by the C library, lane by lane.
template <double (*F)(double)>
ATTN_NOINLINE Vec<double> each_lane(Vec<double> x) {
#pragma GCC unroll 8
  for (int i = 0; i < kLanes<double>; ++i) x[i] = F(x[i]);
  return x;
}
template <int DEGREE, int N>
ATTN_INLINE void vexp2_each(Vec<double> (&x)[N]) {
  ATTN_EACH {  // inline: the forward pass is 10 % slower with each_lane
    Vec<double> y{};
    for (int lane = 0; lane < kLanes<double>; ++lane) y[lane] = std::exp2(x[i][lane]);
    x[i] = y;
  }
}
template <int N>
ATTN_INLINE void vexp_each(Vec<double> (&x)[N]) {
  ATTN_EACH x[i] = each_lane<std::exp>(x[i]);
}
#undef ATTN_EACH

template <class V>
ATTN_INLINE V vexp(V x) {
  V one[1] = {x};
  vexp_each(one);
  return one[0];
}
// ln x for positive normal x: x = 2^n m, m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m-1) / (m+1)).
ATTN_INLINE Vec<float> vlog(Vec<float> x) {
  Vec<int32_t> bits;
  std::memcpy(&bits, &x, sizeof(x));
  const Vec<int32_t> n = (bits - 0x3f3504f3) >> 23;
  bits -= n << 23;
  Vec<float> m;
  std::memcpy(&m, &bits, sizeof(m));
  const Vec<float> s = (m - 1.f) / (m + 1.f), z = s * s;
  Vec<float> p = set1(2.f / 9);
  p = p * z + 2.f / 7;
  p = p * z + 2.f / 5;
  p = p * z + 2.f / 3;
  p = p * z * s + 2.f * s;
  return __builtin_convertvector(n, Vec<float>) * 0.693147180559945f + p;
}

ATTN_INLINE Vec<double> vlog(Vec<double> x) { return each_lane<std::log>(x); }

// tanh: its odd Taylor polynomial below 0.25, (1 - e) / (1 + e) with e = exp(-2|x|) above.
ATTN_INLINE Vec<float> vtanh(Vec<float> x) {
  const Vec<float> a = x < 0.f ? -x : x;
  const Vec<float> e = vexp(a * -2.f);
  Vec<float> large = (1.f - e) / (1.f + e);
  large = x < 0.f ? -large : large;
  const Vec<float> y = x * x;
  Vec<float> p = set1(62.f / 2835);
  p = p * y - 17.f / 315;
  p = p * y + 2.f / 15;
  p = p * y - 1.f / 3;
  const Vec<float> small = x + x * y * p;
  return a < 0.25f ? small : large;
}

ATTN_INLINE Vec<double> vtanh(Vec<double> x) { return each_lane<std::tanh>(x); }

}  // namespace attn::cpu::ATTN_ISA
