// Arithmetic of PTX on plain words, as the manual of its instruction set defines it.  A register is
// an unsigned integer of its width (predicates: bool); each operation says as what it reads it.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../machine.h"
#include "../numbers.h"

namespace attn::compiled {

using emulation::flush;
using emulation::machine;
using emulation::Where;
#define PTX_AT ::attn::emulation::Where at = {__builtin_FILE(), __builtin_LINE()}

// The bits of a register as another type of its width.
template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// ---- floats -----------------------------------------------------------------------------------
struct Keep {  // how subnormal numbers are taken: as they are, or (.ftz) as zeros
  static float in(float x) { return x; }
};
struct Flush {
  static float in(float x) { return flush(x); }
};
template <class Subnormal>
inline float add(float a, float b) {
  return Subnormal::in(Subnormal::in(a) + Subnormal::in(b));
}
template <class Subnormal>
inline float mul(float a, float b) {
  return Subnormal::in(Subnormal::in(a) * Subnormal::in(b));
}
template <class Subnormal>
inline float fma(float a, float b, float c) {
  return Subnormal::in(__builtin_fmaf(Subnormal::in(a), Subnormal::in(b), Subnormal::in(c)));
}
// .sat: within [0, 1], NaN becomes 0.
inline float saturate(float x) { return x > 0 ? std::min(x, 1.0f) : 0.0f; }

// The other operand where one is NaN, unless .NaN is given; -0 lies below +0.
template <class T>
inline T maximum(T a, T b) {
  if (std::isnan(a)) return std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : b;
  if (std::isnan(b)) return a;
  return a > b || (a == b && std::signbit(b)) ? a : b;
}
template <class T>
inline T minimum(T a, T b) {
  if (std::isnan(a)) return std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : b;
  if (std::isnan(b)) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
inline T maximum_or_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : maximum(a, b);
}
template <class T>
inline T minimum_or_nan(T a, T b) {
  return std::isnan(a) || std::isnan(b) ? std::numeric_limits<T>::quiet_NaN() : minimum(a, b);
}

// Approximate on hardware (2 units in the last place or so), exact here.
inline float exp2_kept(float x) { return exp2f(x); }
inline float exp2_flushed(float x) { return flush(exp2f(flush(x))); }

// copysign.f32 d, a, b: the magnitude of b with the sign of a.
inline float with_sign(float sign, float magnitude) { return std::copysign(magnitude, sign); }

// bf16 and fp16 in the low half of a register.
inline float bf16_value(uint16_t bits) { return emulation::as_float(uint32_t(bits) << 16); }
inline float fp16_value(uint16_t bits) { return emulation::fp16_value(bits); }
inline uint16_t to_bf16(float x) { return emulation::bf16_bits(x); }
inline uint16_t to_fp16(float x) { return emulation::fp16_bits(x); }
// .relu: negative numbers and -0 become 0, NaN stays.
inline float relu(float x) { return x > 0 || std::isnan(x) ? x : 0.0f; }

// ---- conversions to integers ------------------------------------------------------------------
// x is a whole number already (.rni, .rzi, .rmi, .rpi).  Out of range: the nearest that there is.
// NaN: 0, but the highest bit alone where either side has 64 bits.
template <class To, class From>
inline To to_integer(From x) {
  constexpr bool WIDE = sizeof(To) == 8 || sizeof(From) == 8;
  if (std::isnan(x)) return WIDE ? To(uint64_t(1) << (8 * sizeof(To) - 1)) : To(0);
  const long double whole = x;
  if (whole <= (long double)(std::numeric_limits<To>::min())) return std::numeric_limits<To>::min();
  if (whole >= (long double)(std::numeric_limits<To>::max())) return std::numeric_limits<To>::max();
  return To(x);
}
// cvt.sat between integers.
template <class To, class From>
inline To clamped(From x) {
  const __int128 v = x;
  const __int128 low = std::numeric_limits<To>::min(), high = std::numeric_limits<To>::max();
  return To(v < low ? low : v > high ? high : v);
}

// ---- integers ---------------------------------------------------------------------------------
// Shifts by the width or more leave zeros, or copies of the sign.
template <class T>
inline T shift_left(T a, uint32_t n) {
  return n >= 8 * sizeof(T) ? T(0) : T(a << n);
}
template <class T>
inline T shift_right(T a, uint32_t n) {
  if (n >= 8 * sizeof(T)) return a < 0 ? T(-1) : T(0);
  return T(a >> n);
}
// shf: the 64 bits of hi and lo, moved by n, the upper (left) or lower (right) half.
inline uint32_t funnel_left(uint32_t lo, uint32_t hi, uint32_t n) {
  return n >= 32 ? lo : uint32_t((uint64_t(hi) << 32 | lo) << n >> 32);
}
inline uint32_t funnel_right(uint32_t lo, uint32_t hi, uint32_t n) {
  return n >= 32 ? hi : uint32_t((uint64_t(hi) << 32 | lo) >> n);
}
template <class T>
inline T high_half(T a, T b) {
  using Wide =
      std::conditional_t<sizeof(T) == 8,
                         std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                         std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
  return T((Wide(a) * Wide(b)) >> (8 * sizeof(T)));
}
// Of x / 0 PTX says nothing.
template <class T>
inline T divide(T a, T b, PTX_AT) {
  if (b == 0) machine.fail(at, "integer division by zero");
  return T(a / b);
}
template <class T>
inline T remainder(T a, T b, PTX_AT) {
  if (b == 0) machine.fail(at, "integer division by zero");
  return T(a % b);
}
// Bits pos .. pos + length - 1 of b are the low ones of a.
template <class T>
T insert_bits(T a, T b, uint32_t pos, uint32_t length) {
  pos &= 255, length &= 255;
  for (uint32_t i = 0; i < length && pos + i < 8 * sizeof(T); ++i) {
    const T bit = T(1) << (pos + i);
    b = a >> i & 1 ? b | bit : b & ~bit;
  }
  return b;
}
// Bits pos .. of a; signed types repeat the highest bit that was taken.
template <class T>
inline T extract_bits(T a, uint32_t pos, uint32_t length) {
  constexpr uint32_t TOP = 8 * sizeof(T) - 1;
  using U = std::make_unsigned_t<T>;
  pos &= 255, length &= 255;
  const U bits = U(a);
  U sign = 0;
  if (std::is_signed_v<T> && length) sign = bits >> std::min(pos + length - 1, TOP) & 1;
  U out = 0;
  for (uint32_t i = 0; i <= TOP; ++i) {
    const U bit = i < length && pos + i <= TOP ? bits >> (pos + i) & 1 : sign;
    out |= bit << i;
  }
  return T(out);
}
// Byte i of the result is the byte of {b, a} that digit i of the selector names; 8: its sign.
inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t from = uint64_t(b) << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t digit = selector >> (4 * i) & 15;
    uint32_t byte = uint32_t(from >> (8 * (digit & 7))) & 255;
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    out |= byte << (8 * i);
  }
  return out;
}
// lop3: bit i of the table is the result for inputs (a, b, c) = the bits of i.
inline uint32_t logic3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t out = 0;
  for (int i = 0; i < 8; ++i)
    if (table >> i & 1) out |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return out;
}

}  // namespace attn::compiled
