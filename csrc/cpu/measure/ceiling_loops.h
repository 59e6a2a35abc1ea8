// The measured loops for one ISA.  No include guard: ceilings.cpp includes it once per ISA inside
// its target region, after it defined ATTN_ISA, ATTN_VEC_BYTES and ATTN_CHAINS, the number of
// independent accumulators: enough to cover latency, few enough for the register file.
#ifndef ATTN_ISA  // read alone, as an editor does
#include <cstdint>
#include <cstring>
#define ATTN_ISA baseline
#define ATTN_VEC_BYTES 16
#define ATTN_CHAINS 12
#endif

namespace attn::cpu::ceilings::ATTN_ISA {

typedef float V __attribute__((vector_size(ATTN_VEC_BYTES)));
typedef int32_t I __attribute__((vector_size(ATTN_VEC_BYTES)));
constexpr int kWidth = ATTN_VEC_BYTES / 4;

inline __attribute__((always_inline)) V get(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline __attribute__((always_inline)) void put(float* p, V v) { std::memcpy(p, &v, sizeof(v)); }

// acc += a * b in ATTN_CHAINS chains; returns FLOPs
inline double fma(float* sink) {
  V acc[ATTN_CHAINS], a = get(sink), b = get(sink + kWidth);
  for (int i = 0; i < ATTN_CHAINS; ++i) acc[i] = a * float(i);
  constexpr int64_t kRounds = 20000;
  for (int64_t r = 0; r < kRounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < ATTN_CHAINS; ++i) acc[i] = a * b + acc[i];
  }
  V sum = acc[0];
  for (int i = 1; i < ATTN_CHAINS; ++i) sum += acc[i];
  put(sink, sum * 0.f + a);
  return 2.0 * kRounds * ATTN_CHAINS * kWidth;
}

// 2^x for kCount values in L1, as a softmax without range checks would; returns exponentials
inline double exp(float* sink) {
  constexpr int kCount = 2048, kRounds = 64;
  alignas(64) float in[kCount], out[kCount];
  for (int i = 0; i < kCount; ++i) in[i] = -0.01f * float(i % 512) + sink[0] * 0.f;
  const V magic = V{} + 12582912.f;  // 1.5 * 2^23: the sum's low mantissa bits are round(x)
  for (int r = 0; r < kRounds; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kCount; i += kWidth) {
      const V x = get(in + i);
      const V t = x + magic;
      const V f = x - (t - magic);
      V p = f * 1.33335581e-3f + 9.61812911e-3f;
      p = p * f + 5.55041087e-2f;
      p = p * f + 2.40226507e-1f;
      p = p * f + 6.93147181e-1f;
      p = p * f + 1.f;
      I bits, exponent;
      std::memcpy(&bits, &p, sizeof(p));
      std::memcpy(&exponent, &t, sizeof(t));
      bits += exponent << 23;
      std::memcpy(&p, &bits, sizeof(p));
      put(out + i, p);
    }
    asm volatile("" ::"r"(in), "r"(out) : "memory");  // no round may be left out
  }
  sink[0] += out[0] * 0.f;
  return double(kCount) * kRounds;
}

// Sum of `count` floats at `data` in eight streams (more misses in flight); returns bytes
inline double read(const float* data, int64_t count, float* sink) {
  constexpr int kStreams = 8, kStep = 64;  // 4 cache lines of each stream in turn
  const int64_t part = count / kStreams / kStep * kStep;
  V acc[kStreams] = {};
  for (int64_t i = 0; i < part; i += kStep)
    for (int s = 0; s < kStreams; ++s) {
      const float* p = data + s * part + i;
      for (int j = 0; j < kStep; j += 16) __builtin_prefetch(p + 512 + j);
      for (int j = 0; j < kStep; j += kWidth) acc[s] += get(p + j);
    }
  V sum = acc[0];
  for (int s = 1; s < kStreams; ++s) sum += acc[s];
  sink[0] += sum[0] * 0.f;
  return 4.0 * kStreams * double(part);
}

}  // namespace attn::cpu::ceilings::ATTN_ISA
