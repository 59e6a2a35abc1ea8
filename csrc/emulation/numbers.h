// Bit-exact conversions between float and the 16-bit and tf32 formats, as the GPU's cvt does them.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace attn::emulation {

inline float as_float(uint32_t v) {
  float f;
  std::memcpy(&f, &v, 4);
  return f;
}
inline uint32_t as_uint(float f) {
  uint32_t v;
  std::memcpy(&v, &f, 4);
  return v;
}
inline float flush(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// cvt.rn: to nearest even; NaN becomes 0x7fff.
inline uint16_t bf16_bits(float f) {
  const uint32_t v = as_uint(f);
  if ((v & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return uint16_t((v + 0x7fffu + ((v >> 16) & 1)) >> 16);
}

inline uint16_t fp16_bits(float f) {
  const uint32_t v = as_uint(f), sign = (v >> 16) & 0x8000u, magnitude = v & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 puts one unit of the result at the last bit of the float.
    return uint16_t(sign | (as_uint(as_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1)) >> 13));
}

inline float fp16_value(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, magnitude = uint32_t(h & 0x7fffu) << 13;
  if ((h & 0x7c00u) == 0x7c00u) return as_float(sign | 0x7f800000u | magnitude);
  return as_float(sign | as_uint(as_float(magnitude) * 0x1p112f));
}

// cvt.rna.tf32: to nearest, ties away from zero; the low 13 bits are zero.
inline uint32_t tf32_bits(float f) {
  const uint32_t v = as_uint(f);
  if ((v & 0x7f800000u) == 0x7f800000u) return (v & 0x7fffffu) ? 0x7fffffffu : v;
  return (v + 0x1000u) & 0xffffe000u;
}

}  // namespace attn::emulation
