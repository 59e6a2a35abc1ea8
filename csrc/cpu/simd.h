// Vec<T>: one register of float or double lanes, as a GNU vector.  Included once per ISA inside its
// target region and namespace (see isa_*.cpp), which define
//   ATTN_VEC_BYTES  register width;  ATTN_NV  vectors of queries in a micro-kernel block;
//   ATTN_MR  its rows.
// ATTN_MR * ATTN_NV accumulators + ATTN_NV operands + 1 broadcast must fit the register file.

#define ATTN_INLINE inline __attribute__((always_inline))

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
// b where one of them is NaN.
template <class V>
ATTN_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class T>
ATTN_INLINE bool all_equal(Vec<T> a, Vec<T> b) {
  Mask<T> same = a == b;
  typename IntOf<T>::type all = -1;
  for (int i = 0; i < kLanes<T>; ++i) all &= same[i];
  return all;
}

#if ATTN_VEC_BYTES == 64
ATTN_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
}
template <>
ATTN_INLINE bool all_equal<float>(Vec<float> a, Vec<float> b) {
  return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_EQ_OQ) == 0xffff;
}
#elif ATTN_VEC_BYTES == 32
ATTN_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
}
template <>
ATTN_INLINE bool all_equal<float>(Vec<float> a, Vec<float> b) {
  return _mm256_movemask_ps(_mm256_cmp_ps((__m256)a, (__m256)b, _CMP_EQ_OQ)) == 0xff;
}
#endif

// e^x = 2^n e^f with n = round(x / ln2), |f| <= ln2 / 2, e^f by its minimax polynomial; 0 below
// -87.3, NaN stays NaN.  DEGREE 6: 1 ulp (x > -16, where f is exact); 4: 3e-6, for results that
// are rounded to bfloat16.
template <int DEGREE>
ATTN_INLINE Vec<float> exp_reduced(Vec<float> f) {
  Vec<float> p;
  if constexpr (DEGREE == 6) {
    p = 0.0013843653723597527f * f + 0.00837415549904108f;
    p = p * f + 0.04166800156235695f;
    p = p * f + 0.16666431725025177f;
    p = p * f + 0.4999999403953552f;
    p = p * f + 1.f;
  } else {
    p = 0.041513849049806595f * f + 0.16787473857402802f;
    p = p * f + 0.5000301599502563f;
    p = p * f + 0.9999668598175049f;
  }
  return p * f + 1.f;
}

template <int DEGREE = 6>
ATTN_INLINE Vec<float> vexp(Vec<float> x) {
#if ATTN_VEC_BYTES == 64
  const __m512 n = _mm512_roundscale_ps((__m512)(x * 1.44269504088896341f), 0);
  const Vec<float> f = x - (Vec<float>)n * 0.693147182464599609375f;
  const __mmask16 visible = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.3f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(visible, (__m512)exp_reduced<DEGREE>(f), n);
#else
  const Vec<float> magic = set1(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are n
  const Vec<float> t = x * 1.44269504088896341f + magic;
  const Vec<float> n = t - magic;
  Vec<float> f = x - n * 0.693145751953125f;  // ln2 in two parts; the first product is exact
  f = f - n * 1.42860682030941723212e-6f;
  Vec<float> p = exp_reduced<DEGREE>(f);
  Vec<uint32_t> bits, exponent;  // unsigned: wraps where the result is replaced below
  std::memcpy(&bits, &p, sizeof(p));
  std::memcpy(&exponent, &t, sizeof(t));
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof(p));
  p = x < -87.3f ? Vec<float>{} : p;
  p = x > 88.7f ? set1(__builtin_inff()) : p;
  return x == x ? p : x;
#endif
}

template <int DEGREE = 6>
ATTN_INLINE Vec<double> vexp(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
  return y;
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

ATTN_INLINE Vec<double> vlog(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::log(x[i]);
  return y;
}

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

ATTN_INLINE Vec<double> vtanh(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::tanh(x[i]);
  return y;
}
