// CPUID and XGETBV, read by hand: which names __builtin_cpu_supports knows depends on the compiler.
#include "cpu/isa/features.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace attn::cpu {

#if defined(__x86_64__)
namespace {

enum Register { kA, kB, kC, kD };

struct Feature {
  const char* name;
  unsigned leaf, subleaf;
  Register where;
  int bit;
  uint64_t state;  // of XCR0: the registers that the operating system must save
};

constexpr uint64_t kNone = 0, kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;  // 17 and 18: AMX
constexpr Feature kFeatures[] = {
    {"sse3", 1, 0, kC, 0, kNone},       {"ssse3", 1, 0, kC, 9, kNone},
    {"sse4.1", 1, 0, kC, 19, kNone},    {"sse4.2", 1, 0, kC, 20, kNone},
    {"popcnt", 1, 0, kC, 23, kNone},    {"avx", 1, 0, kC, 28, kYmm},
    {"fma", 1, 0, kC, 12, kYmm},        {"f16c", 1, 0, kC, 29, kYmm},
    {"avx2", 7, 0, kB, 5, kYmm},        {"avx512f", 7, 0, kB, 16, kZmm},
    {"avx512dq", 7, 0, kB, 17, kZmm},   {"avx512bw", 7, 0, kB, 30, kZmm},
    {"avx512vl", 7, 0, kB, 31, kZmm},   {"avx512bf16", 7, 1, kA, 5, kZmm},
    {"amx-bf16", 7, 0, kD, 22, kTiles}, {"amx-tile", 7, 0, kD, 24, kTiles},
};

uint64_t saved_registers() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

bool has(const Feature& feature) {
  unsigned r[4];
  if (!__get_cpuid_count(feature.leaf, feature.subleaf, &r[kA], &r[kB], &r[kC], &r[kD]))
    return false;
  return (r[feature.where] >> feature.bit & 1) &&
         (saved_registers() & feature.state) == feature.state;
}

}  // namespace
#endif

bool cpu_has(const std::string& features) {
  bool all = true;
  for (size_t begin = 0, end; begin < features.size(); begin = end + 1) {
    end = std::min(features.find(',', begin), features.size());
    const std::string name = features.substr(begin, end - begin);
    bool known = false;
#if defined(__x86_64__)
    for (const Feature& feature : kFeatures)
      if (name == feature.name) known = true, all = has(feature) && all;
#endif
    if (!known) throw std::invalid_argument("no CPU feature is called '" + name + "'");
  }
  return all;
}

}  // namespace attn::cpu
