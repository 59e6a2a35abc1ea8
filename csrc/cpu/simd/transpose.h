// Blocks of L x L lanes transposed in registers: log2(L) rounds of two-register shuffles.
#pragma once
#include "cpu/simd/vector.h"

namespace attn::cpu::ATTN_ISA {

// Round S exchanges the elements whose index has bit S set in the lower row with those that lack
// it in the upper row.
template <class T, int S>
ATTN_INLINE void transpose_round(Vec<T> (&rows)[kLanes<T>]) {
  Mask<T> lower, upper;
  for (int e = 0; e < kLanes<T>; ++e) {
    lower[e] = e & S ? kLanes<T> + e - S : e;
    upper[e] = e & S ? kLanes<T> + e : e + S;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i) {
    if (i & S) continue;
    const Vec<T> a = rows[i], b = rows[i + S];
    rows[i] = __builtin_shuffle(a, b, lower);
    rows[i + S] = __builtin_shuffle(a, b, upper);
  }
  if constexpr (2 * S < kLanes<T>) transpose_round<T, 2 * S>(rows);
}

// out[c][r] = in[r][c] of one block.
template <class T>
ATTN_INLINE void transpose_block(const T* in, int64_t in_stride, T* out, int64_t out_stride) {
  constexpr int L = kLanes<T>;
  Vec<T> block[L];
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) block[i] = load(in + i * in_stride);
  transpose_round<T, 1>(block);
#pragma GCC unroll 16
  for (int i = 0; i < L; ++i) store(out + i * out_stride, block[i]);
}

#if ATTN_VEC_BYTES == 64
// Four numbers of rows i, i + 4, i + 8 and i + 12 come together as they are loaded, which leaves
// two rounds, of shuffles within quarters of a register.
ATTN_INLINE void transpose_block(const float* in, int64_t in_stride, float* out,
                                 int64_t out_stride) {
#pragma GCC unroll 4
  for (int c = 0; c < 16; c += 4) {
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      auto quarter = [&](int row) { return _mm_loadu_ps(in + (i + row) * in_stride + c); };
      x[i] = _mm512_castps128_ps512(quarter(0));
      x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, quarter(4));
      x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, quarter(8));
      x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, quarter(12));
    }
    const __m512d low[2] = {(__m512d)_mm512_unpacklo_ps(x[0], x[1]),
                            (__m512d)_mm512_unpacklo_ps(x[2], x[3])};
    const __m512d high[2] = {(__m512d)_mm512_unpackhi_ps(x[0], x[1]),
                             (__m512d)_mm512_unpackhi_ps(x[2], x[3])};
    store(out + c * out_stride, (Vec<float>)_mm512_unpacklo_pd(low[0], low[1]));
    store(out + (c + 1) * out_stride, (Vec<float>)_mm512_unpackhi_pd(low[0], low[1]));
    store(out + (c + 2) * out_stride, (Vec<float>)_mm512_unpacklo_pd(high[0], high[1]));
    store(out + (c + 3) * out_stride, (Vec<float>)_mm512_unpackhi_pd(high[0], high[1]));
  }
}
#endif

// out[c][r] = in[r][c] for r < rows, c < columns; both are multiples of kLanes<T>.
template <class T>
inline void transpose(const T* in, int64_t in_stride, int64_t rows, int64_t columns, T* out,
                      int64_t out_stride) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; r += L)
    for (int64_t c = 0; c < columns; c += L)
      transpose_block(in + r * in_stride + c, in_stride, out + c * out_stride + r, out_stride);
}

// R vectors of R parts each, part k of vector i and part i of vector k change places.
template <int R, int I>
ATTN_INLINE void exchange_parts(Vec<float> (&x)[R]) {
  if constexpr (I < R) {
    constexpr int L = kLanes<float>, S = I * (L / R);
    Mask<float> lower, upper;
    for (int e = 0; e < L; ++e) {
      lower[e] = e & S ? L + e - S : e;
      upper[e] = e & S ? L + e : e + S;
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      if (i & I) continue;
      const Vec<float> a = x[i], b = x[i + I];
      x[i] = __builtin_shuffle(a, b, lower);
      x[i + I] = __builtin_shuffle(a, b, upper);
    }
    exchange_parts<R, 2 * I>(x);
  }
}

}  // namespace attn::cpu::ATTN_ISA
