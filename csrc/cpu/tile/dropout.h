// Dropout multipliers, queries in lanes: csrc/philox.h's bits, a vector of counters at a time.
#pragma once
#include "cpu/simd/vector.h"
#include "cpu/tiles.h"

namespace attn::cpu::ATTN_ISA {

#if ATTN_VEC_BYTES == 64
// High and low halves of x * m for 16 lanes.
ATTN_INLINE void multiply_wide(__m512i x, uint32_t m, __m512i* high, __m512i* low) {
  const __m512i factor = _mm512_set1_epi32(int(m));
  const __m512i even = _mm512_mul_epu32(x, factor);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), factor);
  *high = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  *low = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
}

// philox_lanes() for 16 queries, the words of all at once.
inline void philox_words(PhiloxKey key, uint32_t block, uint32_t query, uint32_t h, uint32_t b,
                         uint64_t threshold, float kept, float* keep) {
  __m512i c0 = _mm512_set1_epi32(int(block)), c2 = _mm512_set1_epi32(int(h));
  __m512i c1 =
      _mm512_add_epi32(_mm512_set1_epi32(int(query)),
                       _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  __m512i c3 = _mm512_set1_epi32(int(b));
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    __m512i high0, low0, high1, low1;
    multiply_wide(c0, kPhiloxM0, &high0, &low0);
    multiply_wide(c2, kPhiloxM1, &high1, &low1);
    c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(int(key.k0)), 0x96);
    c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(int(key.k1)), 0x96);
    c1 = low1;
    c3 = low0;
    key.k0 += kPhiloxW0;
    key.k1 += kPhiloxW1;
  }
  const bool none = threshold > 0xffffffffull;
  const __m512i least = _mm512_set1_epi32(int(uint32_t(threshold)));
  const __m512i words[4] = {c0, c1, c2, c3};
  for (int w = 0; w < 4; ++w)
    _mm512_storeu_ps(keep + w * kPanel,
                     _mm512_maskz_mov_ps(none ? 0 : _mm512_cmpge_epu32_mask(words[w], least),
                                         _mm512_set1_ps(kept)));
}
#endif

// A weight times its multiplier; 0 where dropout takes it, be it NaN.
template <class V>
ATTN_INLINE V dropped(V weight, V kept) {
  return kept == 0 ? V{} : weight * kept;
}

// keep[w * kPanel + q] for w < 4 keys (4 * block + w) and the kGrain queries from `query`.
template <class T>
inline void philox_lanes(PhiloxKey key, uint32_t block, uint32_t query, uint32_t h, uint32_t b,
                         uint64_t threshold, T kept, T* keep) {
#if ATTN_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4) return philox_words(key, block, query, h, b, threshold, kept, keep);
#endif
  for (uint32_t q = 0; q < kGrain; ++q) {
    const uint32_t counter[4] = {block, query + q, h, b};
    uint32_t out[4];
    philox4x32(key, counter, out);
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) keep[w * kPanel + q] = out[w] >= threshold ? kept : T(0);
  }
}

}  // namespace attn::cpu::ATTN_ISA
