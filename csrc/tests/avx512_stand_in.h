// AVX-512 on a machine with AVX2: with `-include` of this file the kernels of avx512 and
// avx512_bf16 are compiled for AVX2.  Their 64-byte vectors, which g++ splits by itself, stay; each
// intrinsic that they call is a loop here.  So their text runs where no processor has AVX-512,
// slowly, and with the meaning of Intel's manual but for two things: vdpbf16ps and the conversions
// to bfloat16 do not take denormals for 0.  tests/cpu/avx512.sh and tests/helpers/cpu_bits.py use
// it.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/isa/features.h"
#include "cpu/simd/convert.h"

#undef ATTN_AVX512_FEATURES
#define ATTN_AVX512_FEATURES ATTN_AVX2_FEATURES
#undef ATTN_AVX512_BF16_FEATURES
#define ATTN_AVX512_BF16_FEATURES ATTN_AVX2_FEATURES
#undef ATTN_AVX512_AMX_FEATURES  // compiled only: its instructions are assembler
#define ATTN_AVX512_AMX_FEATURES ATTN_AVX2_FEATURES

#pragma GCC push_options
ATTN_TARGET(ATTN_AVX2_FEATURES)
namespace attn::cpu::stand_in {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint64_t Longs __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(64)));
typedef uint16_t HalfShorts __attribute__((vector_size(32)));

// f(i) for each lane, as a vector of V.
template <class V, class F>
inline V lanes(F f) {
  V v;
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = f(i);
  return v;
}
template <class F>
inline __m512 floats(F f) {
  return (__m512)lanes<Floats>(f);
}
template <class F>
inline __m512i words(F f) {
  return (__m512i)lanes<Words>(f);
}
template <class F>
inline uint32_t mask(int n, F f) {
  uint32_t bits = 0;
  for (int i = 0; i < n; ++i) bits |= uint32_t(bool(f(i))) << i;
  return bits;
}

inline __m512 set1_ps(float x) {
  return floats([&](size_t) { return x; });
}
inline __m512i set1_epi32(int x) {
  return words([&](size_t) { return uint32_t(x); });
}
template <class... X>
inline __m512i setr_epi32(X... x) {
  return (__m512i)Words{uint32_t(x)...};
}
template <class... X>
inline __m512i set_epi16(X... x) {
  const uint16_t last_first[] = {uint16_t(x)...};
  return (__m512i)lanes<Shorts>([&](size_t i) { return last_first[31 - i]; });
}
inline __m512 loadu_ps(const void* p) {
  __m512 v;
  std::memcpy(&v, p, 64);
  return v;
}
inline void storeu_ps(void* p, __m512 v) { std::memcpy(p, &v, 64); }
inline __m512i loadu_si512(const void* p) { return (__m512i)loadu_ps(p); }
inline void storeu_si512(void* p, __m512i v) { storeu_ps(p, (__m512)v); }
inline __m512i setzero_si512() { return set1_epi32(0); }
inline __m512i set1_epi16(short x) {
  return (__m512i)lanes<Shorts>([&](size_t) { return uint16_t(x); });
}

inline __m512 add_ps(__m512 a, __m512 b) { return a + b; }
// b where one of them is NaN, and where both are zeros
inline __m512 max_ps(__m512 a, __m512 b) {
  return floats([&](size_t i) { return a[i] > b[i] ? a[i] : b[i]; });
}
inline float cvtss_f32(__m512 a) { return a[0]; }
inline uint32_t cmp_ps_mask(__m512 a, __m512 b, int how) {
  return mask(16, [&](int i) {
    return how == _CMP_LT_OQ    ? a[i] < b[i]
           : how == _CMP_EQ_OQ  ? a[i] == b[i]
           : how == _CMP_NLT_UQ ? !(a[i] < b[i])
                                : throw "no such comparison";
  });
}
inline uint32_t movepi32_mask(__m512i a) {
  return mask(16, [&](int i) { return ((Words)a)[i] >> 31; });
}
inline uint32_t cmpge_epu32_mask(__m512i a, __m512i b) {
  return mask(16, [&](int i) { return ((Words)a)[i] >= ((Words)b)[i]; });
}
inline __m512 maskz_mov_ps(uint32_t m, __m512 a) {
  return floats([&](size_t i) { return m >> i & 1 ? a[i] : 0.f; });
}
inline __m512i mask_mov_epi32(__m512i a, uint32_t m, __m512i b) {
  return words([&](size_t i) { return m >> i & 1 ? ((Words)b)[i] : ((Words)a)[i]; });
}

// x - floor(x); 0 of an infinity.
inline __m512 reduce_ps(__m512 a, int how) {
  if (how != _MM_FROUND_TO_NEG_INF) throw "another rounding";
  return floats([&](size_t i) { return std::isinf(a[i]) ? 0.f : a[i] - std::floor(a[i]); });
}
inline __m512 roundscale_ps(__m512 a, int how) {
  if (how != 0) throw "another rounding";
  return floats([&](size_t i) { return std::nearbyint(a[i]); });
}
// a * 2^floor(b)
inline __m512 scalef_ps(__m512 a, __m512 b) {
  return floats([&](size_t i) {
    const float n = std::floor(b[i]);
    if (a[i] != a[i] && std::isinf(n)) return n > 0 ? n : 0.f;  // also of NaN, says the manual
    if (n != n || a[i] != a[i]) return a[i] + b[i];
    return std::ldexp(a[i], int(std::clamp(n, -1000.f, 1000.f)));
  });
}
inline __m512 maskz_scalef_ps(uint32_t m, __m512 a, __m512 b) {
  return maskz_mov_ps(m, scalef_ps(a, b));
}

inline __m512i add_epi16(__m512i a, __m512i b) { return (__m512i)((Shorts)a + (Shorts)b); }
inline __m512i add_epi32(__m512i a, __m512i b) { return (__m512i)((Words)a + (Words)b); }
inline __m512i or_si512(__m512i a, __m512i b) { return (__m512i)((Words)a | (Words)b); }
inline __m512i slli_epi32(__m512i a, unsigned n) { return (__m512i)((Words)a << n); }
inline __m512i slli_epi64(__m512i a, unsigned n) { return (__m512i)((Longs)a << n); }
inline __m512i srli_epi64(__m512i a, unsigned n) { return (__m512i)((Longs)a >> n); }
inline __m512i mul_epu32(__m512i a, __m512i b) {
  return (__m512i)(((Longs)a & 0xffffffffu) * ((Longs)b & 0xffffffffu));
}
// Bit 4a + 2b + c of `table` for bits a, b, c.
inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  if (table != 0x96) throw "another function than a ^ b ^ c";
  return (__m512i)((Words)a ^ (Words)b ^ (Words)c);
}
inline __m512i permutexvar_epi16(__m512i order, __m512i a) {
  return (__m512i)lanes<Shorts>([&](size_t i) { return ((Shorts)a)[((Shorts)order)[i] & 31]; });
}
// Of the numbers of a, then those of b
inline __m512i permutex2var_epi16(__m512i a, __m512i order, __m512i b) {
  return (__m512i)lanes<Shorts>([&](size_t i) {
    const int from = ((Shorts)order)[i] & 63;
    return from < 32 ? ((Shorts)a)[from] : ((Shorts)b)[from - 32];
  });
}
// Of each quarter's numbers two of a and of b in turn, from the first or the third on
inline __m512 unpacklo_ps(__m512 a, __m512 b) {
  return floats([&](size_t i) { return (i & 1 ? b : a)[i / 4 * 4 + i % 4 / 2]; });
}
inline __m512 unpackhi_ps(__m512 a, __m512 b) {
  return floats([&](size_t i) { return (i & 1 ? b : a)[i / 4 * 4 + i % 4 / 2 + 2]; });
}
inline __m512d unpacklo_pd(__m512d a, __m512d b) {
  return (__m512d)lanes<Longs>([&](size_t i) { return (i & 1 ? (Longs)b : (Longs)a)[i / 2 * 2]; });
}
inline __m512d unpackhi_pd(__m512d a, __m512d b) {
  return (__m512d)lanes<Longs>(
      [&](size_t i) { return (i & 1 ? (Longs)b : (Longs)a)[i / 2 * 2 + 1]; });
}
// What lies above a is undefined: NaN here
inline __m512 castps128_ps512(__m128 a) {
  return floats([&](size_t i) { return i < 4 ? a[i] : std::nanf(""); });
}
inline __m512 mask_broadcast_f32x4(__m512 a, uint32_t m, __m128 b) {
  return floats([&](size_t i) { return m >> i & 1 ? b[i % 4] : a[i]; });
}
inline __m512i broadcast_i32x4(__m128i a) {
  return words([&](size_t i) {
    uint32_t x;
    std::memcpy(&x, reinterpret_cast<const char*>(&a) + i % 4 * 4, 4);
    return x;
  });
}
inline __m256i castsi512_si256(__m512i a) {
  __m256i half;
  std::memcpy(&half, &a, 32);
  return half;
}
inline __m256i extracti64x4_epi64(__m512i a, int half) {
  __m256i x;
  std::memcpy(&x, reinterpret_cast<const char*>(&a) + 32 * half, 32);
  return x;
}

inline __m512i cvtepu16_epi32(__m256i a) {
  return words([&](size_t i) { return uint32_t(((HalfShorts)a)[i]); });
}
inline __m512i cvtepi8_epi32(__m128i a) {
  return words([&](size_t i) { return uint32_t(int32_t(((const signed char*)&a)[i])); });
}
inline __m512 cvtepi32_ps(__m512i a) {
  return floats([&](size_t i) { return float(int32_t(((Words)a)[i])); });
}
inline __m512 cvtph_ps(__m256i a) {
  return floats([&](size_t i) { return half_to_float(((HalfShorts)a)[i]); });
}
inline __m256i cvtps_ph(__m512 a, int) {
  return (__m256i)lanes<HalfShorts>([&](size_t i) { return float_to_half(a[i]); });
}
inline __m256i cvtneps_pbh(__m512 a) {
  return (__m256i)lanes<HalfShorts>([&](size_t i) { return float_to_bf16(a[i]); });
}
inline __m512i cvtne2ps_pbh(__m512 high, __m512 low) {
  return (__m512i)lanes<Shorts>(
      [&](size_t i) { return float_to_bf16(i < 16 ? low[i] : high[i - 16]); });
}
template <class Pairs>
inline __m512 dpbf16_ps(__m512 sum, Pairs a, Pairs b) {
  Shorts x, y;
  std::memcpy(&x, &a, 64), std::memcpy(&y, &b, 64);
  return floats([&](size_t i) {
    auto product = [&](size_t k, float c) {
      return std::fma(bf16_to_float(x[k]), bf16_to_float(y[k]), c);
    };
    return product(2 * i, product(2 * i + 1, sum[i]));
  });
}

inline uint32_t test_epi8_mask(__m256i a, __m256i b) {
  uint8_t x[32], y[32];
  std::memcpy(x, &a, 32), std::memcpy(y, &b, 32);
  return mask(32, [&](int i) { return (x[i] & y[i]) != 0; });
}
inline __m256i maskz_loadu_epi16(uint32_t m, const void* p) {
  return (__m256i)lanes<HalfShorts>([&](size_t i) {
    uint16_t x = 0;
    if (m >> i & 1) std::memcpy(&x, static_cast<const char*>(p) + 2 * i, 2);
    return x;
  });
}

}  // namespace attn::cpu::stand_in
#pragma GCC pop_options

// Some are macros already where g++ does not optimise.
#undef _mm512_set1_ps
#define _mm512_set1_ps attn::cpu::stand_in::set1_ps
#undef _mm512_set1_epi32
#define _mm512_set1_epi32 attn::cpu::stand_in::set1_epi32
#undef _mm512_setr_epi32
#define _mm512_setr_epi32 attn::cpu::stand_in::setr_epi32
#undef _mm512_set_epi16
#define _mm512_set_epi16 attn::cpu::stand_in::set_epi16
#undef _mm512_loadu_ps
#define _mm512_loadu_ps attn::cpu::stand_in::loadu_ps
#undef _mm512_storeu_ps
#define _mm512_storeu_ps attn::cpu::stand_in::storeu_ps
#undef _mm512_add_ps
#define _mm512_add_ps attn::cpu::stand_in::add_ps
#undef _mm512_max_ps
#define _mm512_max_ps attn::cpu::stand_in::max_ps
#undef _mm512_cvtss_f32
#define _mm512_cvtss_f32 attn::cpu::stand_in::cvtss_f32
#undef _mm512_cmp_ps_mask
#define _mm512_cmp_ps_mask attn::cpu::stand_in::cmp_ps_mask
#undef _mm512_movepi32_mask
#define _mm512_movepi32_mask attn::cpu::stand_in::movepi32_mask
#undef _mm512_cmpge_epu32_mask
#define _mm512_cmpge_epu32_mask attn::cpu::stand_in::cmpge_epu32_mask
#undef _mm512_maskz_mov_ps
#define _mm512_maskz_mov_ps attn::cpu::stand_in::maskz_mov_ps
#undef _mm512_mask_mov_epi32
#define _mm512_mask_mov_epi32 attn::cpu::stand_in::mask_mov_epi32
#undef _mm512_reduce_ps
#define _mm512_reduce_ps attn::cpu::stand_in::reduce_ps
#undef _mm512_roundscale_ps
#define _mm512_roundscale_ps attn::cpu::stand_in::roundscale_ps
#undef _mm512_scalef_ps
#define _mm512_scalef_ps attn::cpu::stand_in::scalef_ps
#undef _mm512_maskz_scalef_ps
#define _mm512_maskz_scalef_ps attn::cpu::stand_in::maskz_scalef_ps
#undef _mm512_add_epi32
#define _mm512_add_epi32 attn::cpu::stand_in::add_epi32
#undef _mm512_or_si512
#define _mm512_or_si512 attn::cpu::stand_in::or_si512
#undef _mm512_slli_epi32
#define _mm512_slli_epi32 attn::cpu::stand_in::slli_epi32
#undef _mm512_slli_epi64
#define _mm512_slli_epi64 attn::cpu::stand_in::slli_epi64
#undef _mm512_srli_epi64
#define _mm512_srli_epi64 attn::cpu::stand_in::srli_epi64
#undef _mm512_mul_epu32
#define _mm512_mul_epu32 attn::cpu::stand_in::mul_epu32
#undef _mm512_ternarylogic_epi32
#define _mm512_ternarylogic_epi32 attn::cpu::stand_in::ternarylogic_epi32
#undef _mm512_permutexvar_epi16
#define _mm512_permutexvar_epi16 attn::cpu::stand_in::permutexvar_epi16
#undef _mm512_broadcast_i32x4
#define _mm512_broadcast_i32x4 attn::cpu::stand_in::broadcast_i32x4
#undef _mm512_castsi512_si256
#define _mm512_castsi512_si256 attn::cpu::stand_in::castsi512_si256
#undef _mm512_extracti64x4_epi64
#define _mm512_extracti64x4_epi64 attn::cpu::stand_in::extracti64x4_epi64
#undef _mm512_cvtepu16_epi32
#define _mm512_cvtepu16_epi32 attn::cpu::stand_in::cvtepu16_epi32
#undef _mm512_cvtepi8_epi32
#define _mm512_cvtepi8_epi32 attn::cpu::stand_in::cvtepi8_epi32
#undef _mm512_cvtepi32_ps
#define _mm512_cvtepi32_ps attn::cpu::stand_in::cvtepi32_ps
#undef _mm512_cvtph_ps
#define _mm512_cvtph_ps attn::cpu::stand_in::cvtph_ps
#undef _mm512_cvtps_ph
#define _mm512_cvtps_ph attn::cpu::stand_in::cvtps_ph
#undef _mm512_cvtneps_pbh
#define _mm512_cvtneps_pbh attn::cpu::stand_in::cvtneps_pbh
#undef _mm512_cvtne2ps_pbh
#define _mm512_cvtne2ps_pbh attn::cpu::stand_in::cvtne2ps_pbh
#undef _mm512_dpbf16_ps
#define _mm512_dpbf16_ps attn::cpu::stand_in::dpbf16_ps
#undef _mm256_test_epi8_mask
#define _mm256_test_epi8_mask attn::cpu::stand_in::test_epi8_mask
#undef _mm256_maskz_loadu_epi16
#define _mm256_maskz_loadu_epi16 attn::cpu::stand_in::maskz_loadu_epi16
#undef _mm512_loadu_si512
#define _mm512_loadu_si512 attn::cpu::stand_in::loadu_si512
#undef _mm512_storeu_si512
#define _mm512_storeu_si512 attn::cpu::stand_in::storeu_si512
#undef _mm512_setzero_si512
#define _mm512_setzero_si512 attn::cpu::stand_in::setzero_si512
#undef _mm512_set1_epi16
#define _mm512_set1_epi16 attn::cpu::stand_in::set1_epi16
#undef _mm512_permutex2var_epi16
#define _mm512_permutex2var_epi16 attn::cpu::stand_in::permutex2var_epi16
#undef _mm512_unpacklo_ps
#define _mm512_unpacklo_ps attn::cpu::stand_in::unpacklo_ps
#undef _mm512_unpackhi_ps
#define _mm512_unpackhi_ps attn::cpu::stand_in::unpackhi_ps
#undef _mm512_unpacklo_pd
#define _mm512_unpacklo_pd attn::cpu::stand_in::unpacklo_pd
#undef _mm512_unpackhi_pd
#define _mm512_unpackhi_pd attn::cpu::stand_in::unpackhi_pd
#undef _mm512_castps128_ps512
#define _mm512_castps128_ps512 attn::cpu::stand_in::castps128_ps512
#undef _mm512_mask_broadcast_f32x4
#define _mm512_mask_broadcast_f32x4 attn::cpu::stand_in::mask_broadcast_f32x4
#undef _mm512_add_epi16
#define _mm512_add_epi16 attn::cpu::stand_in::add_epi16
