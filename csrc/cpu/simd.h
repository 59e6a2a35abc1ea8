// Vec<T>: one register of float or double lanes, as a GNU vector.  Included once per ISA inside its
// target region and namespace (see isa_*.cpp), which define
//   ATTN_VEC_BYTES  register width;  ATTN_NV  registers per panel of queries;  ATTN_MR  rows of a
//   micro-kernel block.
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
constexpr int kPanel = kLanes<T> * ATTN_NV;  // queries of one micro-kernel panel

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
template <class V>
ATTN_INLINE V vmax(V a, V b) {
  return a > b ? a : b;
}

// e^x for x <= 88, to about 1 ulp; 0 below -87.3.  Cody-Waite: x = n ln2 + f, |f| <= ln2 / 2, e^f
// by its Taylor polynomial of degree 7 (minimax is not needed at this size), 2^n added to the
// exponent.
ATTN_INLINE Vec<float> vexp(Vec<float> x) {
  const Vec<float> magic = set1(12582912.f);  // 1.5 * 2^23: the sum's low mantissa bits are n
  const Vec<float> t = x * 1.44269504088896341f + magic;
  const Vec<float> n = t - magic;
  Vec<float> f = x - n * 0.693145751953125f;  // ln2 in two parts; the first product is exact
  f = f - n * 1.42860682030941723212e-6f;
  Vec<float> p = set1(1.f / 5040);
  p = p * f + 1.f / 720;
  p = p * f + 1.f / 120;
  p = p * f + 1.f / 24;
  p = p * f + 1.f / 6;
  p = p * f + 0.5f;
  p = p * f + 1.f;
  p = p * f + 1.f;
  Vec<int32_t> bits, exponent;
  std::memcpy(&bits, &p, sizeof(p));
  std::memcpy(&exponent, &t, sizeof(t));
  bits += exponent << 23;
  std::memcpy(&p, &bits, sizeof(p));
  p = x < -87.3f ? Vec<float>{} : p;
  p = x > 88.7f ? set1(__builtin_inff()) : p;
  return x == x ? p : x;  // NaN stays NaN
}

ATTN_INLINE Vec<double> vexp(Vec<double> x) {
  Vec<double> y{};
  for (int i = 0; i < kLanes<double>; ++i) y[i] = std::exp(x[i]);
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
