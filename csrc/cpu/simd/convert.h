// Storage types <-> compute type.  Rows of float16, bfloat16 and float32 are computed in float,
// float64 in double.
#pragma once
#include <cstdint>
#include <cstring>

#include "params.h"

namespace attn::cpu {

inline size_t dtype_size(DType t) {
  return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
}

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }

inline uint16_t float_to_bf16(float f) {  // round to nearest even; NaN stays NaN
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 0x40u);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  // The exponent is rebased by a multiplication, which also normalises subnormals.
  float f = bits_to_float(uint32_t(h & 0x7fffu) << 13) * bits_to_float(0x77800000u);
  uint32_t u = float_to_bits(f);
  if ((h & 0x7c00u) == 0x7c00u) u |= 0x7f800000u;  // inf and NaN
  return bits_to_float(u | sign);
}

inline uint16_t float_to_half(float f) {  // round to nearest even
  uint32_t u = float_to_bits(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00u);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to inf
  if (u < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded mantissa in the low bits
    const float shifted = bits_to_float(u) + 0.5f;
    return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  u += 0xc8000fffu + ((u >> 13) & 1u);
  return uint16_t(sign | (u >> 13));
}

// dst[i] = src[i] for n elements of a storage row
template <class T>
inline __attribute__((always_inline)) void load_row(DType type, const void* src, int64_t n,
                                                    T* dst) {
  switch (type) {
    case DType::kFloat32:
      for (int64_t i = 0; i < n; ++i) dst[i] = T(static_cast<const float*>(src)[i]);
      break;
    case DType::kFloat64:
      for (int64_t i = 0; i < n; ++i) dst[i] = T(static_cast<const double*>(src)[i]);
      break;
    case DType::kBFloat16:
      for (int64_t i = 0; i < n; ++i)
        dst[i] = T(bf16_to_float(static_cast<const uint16_t*>(src)[i]));
      break;
    case DType::kFloat16:
      for (int64_t i = 0; i < n; ++i)
        dst[i] = T(half_to_float(static_cast<const uint16_t*>(src)[i]));
      break;
  }
}

// Two bytes a number.
inline __attribute__((always_inline)) void store_row(DType type, const float* src, int64_t n,
                                                     void* dst) {
  auto* to = static_cast<uint16_t*>(dst);
  if (type == DType::kBFloat16)
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_bf16(src[i]);
  else
    for (int64_t i = 0; i < n; ++i) to[i] = float_to_half(src[i]);
}

template <class T>
inline T load_one(DType type, const void* base, int64_t index) {
  T x = 0;
  load_row<T>(type, static_cast<const char*>(base) + index * int64_t(dtype_size(type)), 1, &x);
  return x;
}

}  // namespace attn::cpu
