// The micro-benchmark behind ceilings.h.  Its threads are its own: each must run at the same time
// as the others, which a pool that hands out tasks does not promise.
#include "cpu/measure/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/isa/amx.h"
#include "cpu/isa/dispatch.h"
#include "cpu/isa/features.h"
#include "cpu/simd/amx_unit.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ATTN_ISA baseline
#define ATTN_VEC_BYTES 16
#define ATTN_CHAINS 12
#include "cpu/measure/ceiling_loops.h"
#undef ATTN_ISA
#undef ATTN_VEC_BYTES
#undef ATTN_CHAINS

#if defined(__x86_64__)
#pragma GCC push_options
ATTN_TARGET(ATTN_AVX2_FEATURES)
#define ATTN_ISA avx2
#define ATTN_VEC_BYTES 32
#define ATTN_CHAINS 12
#include "cpu/measure/ceiling_loops.h"
#undef ATTN_ISA
#undef ATTN_VEC_BYTES
#undef ATTN_CHAINS
#pragma GCC pop_options

#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_FEATURES)
#define ATTN_ISA avx512
#define ATTN_VEC_BYTES 64
#define ATTN_CHAINS 24
#include "cpu/measure/ceiling_loops.h"
#undef ATTN_ISA
#undef ATTN_VEC_BYTES
#undef ATTN_CHAINS
#pragma GCC pop_options
#endif

namespace attn::cpu {
namespace {

#ifdef ATTN_HAS_AMX
// tdpbf16ps on four tiles of sums: one every 16 cycles, for a latency of 52 (Intel's figures)
double amx_dot(float* sink) {
  using amx::Tiles;
  constexpr int64_t kRounds = 2000;
  alignas(64) float ones[256], sums[256];
  for (float& x : ones) x = sink[0] + 1.00390625f;  // both halves are numbers as bfloat16
  amx::TileUnit unit;
  Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
  Tiles::load<4>(ones, 64), Tiles::load<5>(ones, 64);
  Tiles::load<6>(ones, 64), Tiles::load<7>(ones, 64);
  for (int64_t r = 0; r < kRounds; ++r) {
    Tiles::dot<0, 4, 6>(), Tiles::dot<1, 4, 7>();
    Tiles::dot<2, 5, 6>(), Tiles::dot<3, 5, 7>();
  }
  Tiles::store<0>(sums, 64);
  sink[0] += sums[0] * 0.f;
  return 2.0 * kRounds * 4 * 16 * 16 * 32;
}
#endif

#if defined(__x86_64__)
// vdpbf16ps in 24 chains: with 12 it is bound by latency and 8 % low (Zen 5)
__attribute__((target(ATTN_AVX512_BF16_FEATURES))) double bf16_dot(float* sink) {
  constexpr int kChains = 24;
  constexpr int64_t kRounds = 20000;
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(sink[0] * float(i));
  const __m512i bits = _mm512_set1_epi32(int(sink[0]) + 0x3f803f80);
  __m512bh a, b;
  std::memcpy(&a, &bits, sizeof(a));
  std::memcpy(&b, &bits, sizeof(b));
  for (int64_t r = 0; r < kRounds; ++r) {
#pragma GCC unroll 32
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], a, b);
  }
  __m512 sum = acc[0];
  for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, acc[i]);
  sink[0] += _mm512_cvtss_f32(sum) * 0.f;
  return 4.0 * kRounds * kChains * 16;
}
#endif

bool has_bf16() {
#if defined(__x86_64__)
  return cpu_has(ATTN_AVX512_BF16_FEATURES);
#else
  return false;
#endif
}

struct Loops {
  double (*fma)(float*);
  double (*exp)(float*);
  double (*read)(const float*, int64_t, float*);
};

Loops loops_of([[maybe_unused]] const std::string& isa) {
#if defined(__x86_64__)
  if (isa.rfind("avx512", 0) == 0)
    return {ceilings::avx512::fma, ceilings::avx512::exp, ceilings::avx512::read};
  if (isa.rfind("avx2", 0) == 0)
    return {ceilings::avx2::fma, ceilings::avx2::exp, ceilings::avx2::read};
#endif
  return {ceilings::baseline::fma, ceilings::baseline::exp, ceilings::baseline::read};
}

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Units a second that `threads` threads reach together within one window.  work(thread) does some
// hundred microseconds of work and returns its units.
double window(int threads, double seconds, const std::function<double(int)>& work) {
  std::atomic<int> waiting{threads};
  std::atomic<bool> cancelled{false};
  std::vector<double> rate(threads);
  auto body = [&](int id) {
    waiting.fetch_sub(1);
    while (waiting.load() > 0) std::this_thread::yield();  // all measure at the same time
    if (cancelled) return;
    const auto start = Clock::now();
    double units = 0, elapsed = 0;
    do {
      units += work(id);
      elapsed = seconds_since(start);
    } while (elapsed < seconds);
    rate[id] = units / elapsed;
  };
  std::vector<std::thread> team;
  try {
    for (int id = 1; id < threads; ++id) team.emplace_back(body, id);
  } catch (...) {  // no more threads to be had: let those that wait go, then say so
    cancelled = true, waiting = 0;
    for (std::thread& t : team) t.join();
    throw;
  }
  body(0);
  for (std::thread& t : team) t.join();
  double sum = 0;
  for (double r : rate) sum += r;
  return sum;
}

void check(const std::string& isa, int threads, double seconds) {
  const std::vector<std::string> known = supported_isas();
  if (!isa.empty() && std::find(known.begin(), known.end(), isa) == known.end())
    throw std::invalid_argument("isa must be one that this machine supports, got '" + isa + "'");
  if (threads < 1 || threads > 4096)
    throw std::invalid_argument("threads must be from 1 to 4096, got " + std::to_string(threads));
  if (!(seconds > 0 && seconds <= 60))
    throw std::invalid_argument("seconds must be above 0 and at most 60, got " +
                                std::to_string(seconds));
}

}  // namespace

double ceiling(const std::string& name, const std::string& isa, int threads, double seconds) {
  check(isa, threads, seconds);
  const std::string used = isa.empty() ? attn::cpu::isa() : isa;
  const Loops loops = loops_of(used);
  struct alignas(64) Line {
    float value[32];
  };
  std::vector<Line> sinks(threads);
  std::function<double(int)> work;
  std::vector<std::vector<float>> data;
  if (name == "fma") {
    work = [&](int id) { return loops.fma(sinks[id].value); };
  } else if (name == "exp") {
    work = [&](int id) { return loops.exp(sinks[id].value); };
  } else if (name == "bf16") {
    if (used.rfind("avx512", 0) != 0 || !has_bf16()) return 0;
#ifdef ATTN_HAS_AMX
    if (used == "avx512_amx") {
      if (!amx::permitted()) return 0;
      work = [&](int id) { return amx_dot(sinks[id].value); };
    } else
#endif
#if defined(__x86_64__)
      work = [&](int id) { return bf16_dot(sinks[id].value); };
#endif
  } else if (name == "read") {
    // beyond every cache, also of a large server's share: 192 MiB a thread, 1 GiB in all
    const int64_t count = std::max<int64_t>(1 << 20, std::min(48 << 20, (256 << 20) / threads));
    for (int t = 0; t < threads; ++t) data.emplace_back(count + 1024, 1.f);  // prefetch runs ahead
    work = [&, count](int id) { return loops.read(data[id].data(), count, sinks[id].value); };
  } else {
    throw std::invalid_argument("name must be fma, bf16, exp or read, got '" + name + "'");
  }
  double best = 0;
  for (int i = 0; i < 5; ++i) best = std::max(best, window(threads, seconds / 5, work));
  return best * 1e-9;
}

}  // namespace attn::cpu
