// Dropout bits: Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11),
// the same on every device, backend and tile size.  Element (b, h, i, j) takes word j % 4 of the
// block with counter (j / 4, i, h, b).  i and j are positions within the sequence, b and h those of
// the call; where it has a part of longer sequences, its Frame (params.h) says what all four count
// from.  It is kept when word >= dropout_threshold(p).
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define ATTN_HOST_DEVICE __host__ __device__
#else
#define ATTN_HOST_DEVICE
#endif

namespace attn {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

struct PhiloxKey {
  uint32_t k0, k1;
};

// splitmix64 of (seed, offset): neighbouring seeds give unrelated keys.
ATTN_HOST_DEVICE inline PhiloxKey philox_key(int64_t seed, int64_t offset) {
  uint64_t z = uint64_t(seed) + 0x9E3779B97F4A7C15ull * (uint64_t(offset) + 1);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  z ^= z >> 31;
  return {uint32_t(z), uint32_t(z >> 32)};
}

// Kept iff word >= threshold, so a word survives with probability 1 - floor(p * 2^32) / 2^32.  p =
// 1 gives 2^32.
ATTN_HOST_DEVICE inline uint64_t dropout_threshold(double p) { return uint64_t(p * 4294967296.0); }

ATTN_HOST_DEVICE inline void philox4x32(PhiloxKey key, const uint32_t counter[4], uint32_t out[4]) {
  uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
#if defined(__GNUC__) && !defined(__CUDACC__)
#pragma GCC unroll 10  // a loop over counters around this one becomes vectors
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ key.k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ key.k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    key.k0 += kPhiloxW0;
    key.k1 += kPhiloxW1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

}  // namespace attn
