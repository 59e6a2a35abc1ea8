#include "cpu/isa/amx.h"

#include <atomic>
#include <cstdint>

#ifdef ATTN_HAS_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/isa/features.h"

namespace attn::cpu::amx {
namespace {

std::atomic<bool> emulated{false};

#ifdef ATTN_HAS_AMX
// Of Linux's <asm/prctl.h>, since 5.16.
constexpr long kGetSupported = 0x1021, kRequestPermission = 0x1023;
constexpr unsigned kTileData = 18;  // of XCR0's bits

bool kernel_has_tiles() {
  uint64_t features = 0;
  return syscall(SYS_arch_prctl, kGetSupported, &features) == 0 && (features >> kTileData & 1);
}
#endif

}  // namespace

bool present() {
#ifdef ATTN_HAS_AMX
  static const bool here = cpu_has("amx-tile,amx-bf16") && kernel_has_tiles();
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
