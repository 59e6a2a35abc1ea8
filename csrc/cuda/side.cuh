// Mask and bias of 4 neighbouring keys of a query, read before the product that they belong to and
// used behind it.
#pragma once
#include <type_traits>

#include "score.cuh"

namespace attn::cuda {

template <class T, int BITS>
struct Side {
  static constexpr bool MASK = may_have<BITS>(kMask), BIAS = may_have<BITS>(kBias);
  // The bias as it was given, two to a word; else floats.
  static constexpr bool ASKS = (BITS & (kAny | kCast)) != 0;  // for its dtype, at run time
  static constexpr bool PACKED = kIsHalf<T> && !ASKS && !(BITS & kBiasFloat);
  using Element = std::conditional_t<PACKED, T, float>;  // of a bias, if not ASKS
  // Whether all that is there comes 4 keys a load, known when the kernel is compiled.
  static constexpr bool VECTORS =
      !ASKS && (!MASK || (BITS & kMaskVectors)) && (!BIAS || (BITS & kBiasVectors));
  uint32_t mask;  // a byte a key
  uint32_t bias[PACKED ? 2 : 4];

  ATTN_DEVICE bool keeps(int e) const { return (mask & (0xffu << (8 * e))) != 0; }
  ATTN_DEVICE float bias_of(int e) const {
    if constexpr (PACKED)
      return e % 2 ? unpack_hi<T>(bias[e / 2]) : unpack_lo<T>(bias[e / 2]);
    else
      return as_float(bias[e]);
  }

  // Where a row's masks and biases begin.  The compiler does not know where that is, and keeps the
  // address: a tile's keys are one addition away.
  struct Row {
    const uint8_t* mask;
    const Element* bias;

    ATTN_DEVICE static Row of(const Params& p, const Query& q, int j) {
      return {MASK ? opaque(static_cast<const uint8_t*>(p.ptr.mask) + (q.mask_row + j)) : nullptr,
              BIAS ? opaque(static_cast<const Element*>(p.ptr.bias) + (q.bias_row + j)) : nullptr};
    }
    // As one word, where there is a mask or a bias alone.
    ATTN_DEVICE uint64_t address() const {
      static_assert(MASK != BIAS);
      return MASK ? reinterpret_cast<uint64_t>(mask) : reinterpret_cast<uint64_t>(bias);
    }
    ATTN_DEVICE static Row of_address(uint32_t low, uint32_t high) {
      static_assert(MASK != BIAS);
      const uint64_t at = uint64_t(high) << 32 | low;
      return {MASK ? reinterpret_cast<const uint8_t*>(at) : nullptr,
              BIAS ? reinterpret_cast<const Element*>(at) : nullptr};
    }
  };
  // The 4 keys from `offset` on of a row, if VECTORS.
  ATTN_DEVICE void load(const Row& row, int offset) {
    if (MASK) mask = ldg_const_32(row.mask + offset);
    if constexpr (BIAS && PACKED) {
      const U32x2 v = ldg_const_64(row.bias + offset);
      bias[0] = v.x, bias[1] = v.y;
    } else if constexpr (BIAS) {
      const U32x4 v = ldg_const_128(row.bias + offset);
      bias[0] = v.x, bias[1] = v.y, bias[2] = v.z, bias[3] = v.w;
    }
  }

  // Keys j .. j + 3, all of which are there; j: a multiple of 4.
  ATTN_DEVICE void load(const Params& p, const Query& q, int j) {
    if (MASK && has<BITS>(p, kMask)) {
      const uint8_t* at = static_cast<const uint8_t*>(p.ptr.mask) + q.mask_row;
      if (has<BITS>(p, kMaskVectors)) {
        mask = *reinterpret_cast<const uint32_t*>(at + j);
      } else {
        mask = 0;
        ATTN_UNROLL
        for (int e = 0; e < 4; ++e) mask |= uint32_t(at[(j + e) * p.p.mask.k]) << (8 * e);
      }
    }
    if (BIAS && has<BITS>(p, kBias)) {
      if (has<BITS>(p, kBiasVectors))
        load_bias_vector(p, q.bias_row + j);
      else
        load_bias_elements(p, q.bias_row + j * p.p.bias.k, 4);
    }
  }
  // The same at an edge, where only keys before `end` are there; of others nothing is read.
  ATTN_DEVICE void load_some(const Params& p, const Query& q, int j, int end) {
    const int count = max_int(0, min_int(4, end - j));
    mask = 0;
    if (MASK && has<BITS>(p, kMask)) {
      const uint8_t* at = static_cast<const uint8_t*>(p.ptr.mask) + q.mask_row;
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e)
        if (e < count) mask |= uint32_t(at[(j + e) * p.p.mask.k]) << (8 * e);
    }
    if (BIAS && has<BITS>(p, kBias)) load_bias_elements(p, q.bias_row + j * p.p.bias.k, count);
  }

 private:
  ATTN_DEVICE void load_bias_vector(const Params& p, int64_t at) {
    if constexpr (PACKED) {
      const U32x2 v = ldg_64(static_cast<const T*>(p.ptr.bias) + at);
      bias[0] = v.x, bias[1] = v.y;
    } else if constexpr (ASKS) {
      load_bias_elements(p, at, 4);
    } else {
      const U32x4 v = ldg_128(static_cast<const float*>(p.ptr.bias) + at);
      bias[0] = v.x, bias[1] = v.y, bias[2] = v.z, bias[3] = v.w;
    }
  }
  ATTN_DEVICE void load_bias_elements(const Params& p, int64_t first, int count) {
    ATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int64_t at = first + e * p.p.bias.k;
      if constexpr (PACKED) {
        const uint32_t bits = e < count ? static_cast<const T*>(p.ptr.bias)[at].bits : 0;
        bias[e / 2] = e % 2 ? bias[e / 2] | bits << 16 : bits;
      } else {
        const DType dtype = ASKS ? p.p.bias_dtype : DType::kFloat32;
        bias[e] = as_uint(e < count ? load_bias(dtype, p.ptr.bias, at) : 0.0f);
      }
    }
  }
};

}  // namespace attn::cuda
