// Two vectors of a row of storage as float, in the order that costs least, and sums and maxima
// across lanes: what kernels need that keep the head dimension in lanes.
#pragma once
#include "cpu/simd/convert.h"
#include "cpu/simd/vector.h"

namespace attn::cpu::ATTN_ISA {

// Of rows of a cache alone (options.h); no call has it.
constexpr DType kInt8 = DType(8);

constexpr int64_t storage_bytes(DType type) {
  return type == DType::kFloat32 ? 4 : type == kInt8 ? 1 : 2;
}

// L numbers of int8 as float.
ATTN_INLINE Vec<float> load_int8(const char* p) {
#if ATTN_VEC_BYTES == 64
  return (Vec<float>)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif ATTN_VEC_BYTES == 32
  return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  Vec<float> x{};
  for (int lane = 0; lane < kLanes<float>; ++lane)
    x[lane] = float(reinterpret_cast<const signed char*>(p)[lane]);
  return x;
#endif
}

// 2 L numbers of storage as float: *a has the first L and *b the rest, but for bfloat16 *a has the
// even ones and *b the odd ones, which takes one instruction each.
template <DType TYPE>
ATTN_INLINE void load_storage(const char* p, Vec<float>* a, Vec<float>* b) {
  if constexpr (TYPE == DType::kFloat32) {
    *a = load(reinterpret_cast<const float*>(p));
    *b = load(reinterpret_cast<const float*>(p) + kLanes<float>);
  } else if constexpr (TYPE == kInt8) {
    *a = load_int8(p);
    *b = load_int8(p + kLanes<float>);
  } else if constexpr (TYPE == DType::kBFloat16) {
    Vec<uint32_t> x;
    std::memcpy(&x, p, sizeof(x));
    *a = (Vec<float>)(x << 16);
    *b = (Vec<float>)(x & 0xffff0000u);
  } else {
#if ATTN_VEC_BYTES == 64
    *a = (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    *b = (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1));
#elif ATTN_VEC_BYTES == 32
    *a = (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    *b = (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
#elif defined(__aarch64__)
    const uint16x8_t x = vld1q_u16(reinterpret_cast<const uint16_t*>(p));
    *a = (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(x)));
    *b = (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(x)));
#else
    float x[2 * kLanes<float>];
    load_row(TYPE, p, 2 * kLanes<float>, x);
    *a = load(x);
    *b = load(x + kLanes<float>);
#endif
  }
}

// Where number c of a row stands in load_storage's order.
template <DType TYPE>
inline int64_t storage_order(int64_t c) {
  constexpr int64_t L = kLanes<float>;
  return TYPE == DType::kBFloat16 ? c / (2 * L) * (2 * L) + c % 2 * L + c % (2 * L) / 2 : c;
}

// The sums of L vectors' lanes, in order: neighbours are joined in each round.
template <int N>
ATTN_INLINE void sum_round(Vec<float> (&x)[kLanes<float>]) {
  constexpr int L = kLanes<float>, S = L / (2 * N);  // N pairs remain; lanes S apart are summed
  Mask<float> lower, upper;
  for (int e = 0; e < L; ++e) {
    lower[e] = e & S ? L + e - S : e;
    upper[e] = e & S ? L + e : e + S;
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], lower) +
           __builtin_shuffle(x[2 * i], x[2 * i + 1], upper);
  if constexpr (N > 1) sum_round<N / 2>(x);
}

// One half of the lanes onto the other, S apart, and so on: four steps of a wide vector, where lane
// after lane is fifteen that wait for each other.
template <int S, class F>
ATTN_INLINE float fold_lanes(Vec<float> x, const F& f) {
  if constexpr (S == 0) {
    return x[0];
  } else {
    Mask<float> other;
    for (int e = 0; e < kLanes<float>; ++e) other[e] = e ^ S;
    return fold_lanes<S / 2>(f(x, __builtin_shuffle(x, other)), f);
  }
}

ATTN_INLINE float largest(Vec<float> x) {
  if constexpr (kLanes<float> == 16)
    return fold_lanes<8>(x, [](Vec<float> a, Vec<float> b) { return vmax(a, b); });
  float top = x[0];
  for (int lane = 1; lane < kLanes<float>; ++lane) top = std::max(top, x[lane]);
  return top;
}

// start + the sum of the lanes.
ATTN_INLINE float add_lanes(float start, Vec<float> x) {
  if constexpr (kLanes<float> == 16)
    return start + fold_lanes<8>(x, [](Vec<float> a, Vec<float> b) { return a + b; });
  for (int lane = 0; lane < kLanes<float>; ++lane) start += x[lane];
  return start;
}

}  // namespace attn::cpu::ATTN_ISA
