#include "cpu/amx.h"

#include <atomic>
#include <cstdint>

#ifdef ATTN_HAS_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace attn::cpu::amx {
namespace {

std::atomic<bool> emulated{false};

#ifdef ATTN_HAS_AMX
// Of Linux's <asm/prctl.h>, since 5.16.
constexpr long kGetSupported = 0x1021, kRequestPermission = 0x1023;
constexpr unsigned kTileConfig = 17, kTileData = 18;  // bits of XCR0

bool processor_has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
  uint32_t low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr uint32_t kBoth = 1u << kTileConfig | 1u << kTileData;
  if ((low & kBoth) != kBoth) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTile);
}

bool kernel_has_tiles() {
  uint64_t features = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &features) == 0 && (features >> kTileData & 1);
}
#endif

}  // namespace

bool present() {
#ifdef ATTN_HAS_AMX
  static const bool here = processor_has_tiles() && kernel_has_tiles();
  return here || emulated.load();
#else
  return false;
#endif
}

bool permitted() {
#ifdef ATTN_HAS_AMX
  return emulated.load() || syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

void emulate(bool on) { emulated = on; }

}  // namespace attn::cpu::amx
