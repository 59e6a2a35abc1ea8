// Intel AMX's tile unit for machines without one: a handler of SIGILL that decodes the instruction
// at hand, does what Intel's manual says of it, and goes on behind it.  The machine code of
// isa/avx512_bf16.cpp runs as it is shipped.  A shared library without Python
// (tests/helpers/amx_unit.py).
//
// What a processor answers with #UD or #GP is kept as the first error, to be read with
// amx_error(), and the instruction is left out.  Tiles belong to a thread.  The signal comes from
// an instruction of the kernels, never from within the C library, so locks and allocation are safe.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>

#include <atomic>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>

namespace {

constexpr int kTiles = 8, kRows = 16, kRowBytes = 64;

struct Config {  // of ldtilecfg and sttilecfg
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

struct Unit {
  Config config;
  uint8_t data[kTiles][kRows][kRowBytes];
};

thread_local Unit unit;
std::atomic<int64_t> configured{0}, products{0};
std::atomic<bool> failed{false};
char error[256];
struct sigaction previous;

__attribute__((format(printf, 1, 2))) void fault(const char* format, ...) {
  if (failed.exchange(true)) return;
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error, sizeof(error), format, arguments);
  va_end(arguments);
}

bool usable(const char* instruction, int tile) {
  if (unit.config.palette == 0) {
    fault("#UD: %s without ldtilecfg on this thread", instruction);
  } else if (tile >= kTiles || unit.config.rows[tile] == 0) {
    fault("#UD: %s of tile %d, which is not configured", instruction, tile);
  } else if (unit.config.row_bytes[tile] % 4) {
    fault("#UD: %s of tile %d with rows of %d bytes", instruction, tile,
          unit.config.row_bytes[tile]);
  } else {
    return true;
  }
  return false;
}

void configure(const Config& c) {
  const uint8_t zeros[14] = {};
  if (c.palette > 1) return fault("#GP: ldtilecfg with palette %d", c.palette);
  if (c.palette == 1) {
    if (std::memcmp(c.reserved, zeros, sizeof(zeros)))
      return fault("#GP: ldtilecfg with reserved bytes");
    for (int i = 0; i < 16; ++i) {
      if (i >= kTiles && (c.rows[i] || c.row_bytes[i]))
        return fault("#GP: ldtilecfg of tile %d", i);
      if (c.rows[i] > kRows || c.row_bytes[i] > kRowBytes)
        return fault("#GP: ldtilecfg of %d rows of %d bytes", c.rows[i], c.row_bytes[i]);
      if ((c.rows[i] == 0) != (c.row_bytes[i] == 0))
        return fault("#GP: ldtilecfg of a tile with rows or bytes alone");
    }
  }
  // Legal on a processor, but in these kernels the sign of a tilerelease left out.
  if (unit.config.palette && c.palette) return fault("ldtilecfg without tilerelease before");
  configured += int(c.palette != 0) - int(unit.config.palette != 0);
  std::memset(&unit, 0, sizeof(unit));
  if (c.palette) unit.config = c;
}

void release() {
  configured -= unit.config.palette != 0;
  std::memset(&unit, 0, sizeof(unit));
}

void zero(int tile) {
  if (usable("tilezero", tile)) std::memset(unit.data[tile], 0, sizeof(unit.data[tile]));
  unit.config.start_row = 0;
}

void load(int tile, const char* base, int64_t stride) {
  if (!usable("tileloadd", tile)) return;
  const Config& c = unit.config;
  std::memset(unit.data[tile], 0, sizeof(unit.data[tile]));
  for (int r = 0; r < c.rows[tile]; ++r)
    std::memcpy(unit.data[tile][r], base + r * stride, c.row_bytes[tile]);
}

void store(int tile, char* base, int64_t stride) {
  if (!usable("tilestored", tile)) return;
  for (int r = 0; r < unit.config.rows[tile]; ++r)
    std::memcpy(base + r * stride, unit.data[tile][r], unit.config.row_bytes[tile]);
}

float number(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

// TDPBF16PS as in the manual: even and odd sums apart, each a chain of fused multiply-adds, then
// both together, then C.  MXCSR is set to what the instruction always does.
__attribute__((noinline, target("avx512f,fma"))) void products_of(int c, int a, int b) {
  const Config& config = unit.config;
  const int depth = config.row_bytes[a] / 4, columns = config.row_bytes[c] / 4;
  float even_b[16][16], odd_b[16][16];
  for (int k = 0; k < depth; ++k)
    for (int n = 0; n < columns; ++n) {
      uint16_t pair[2];
      std::memcpy(pair, unit.data[b][k] + 4 * n, 4);
      even_b[k][n] = number(pair[0]), odd_b[k][n] = number(pair[1]);
    }
  for (int m = 0; m < config.rows[c]; ++m) {
    float even[16] = {}, odd[16] = {}, sums[16];
    for (int k = 0; k < depth; ++k) {
      uint16_t pair[2];
      std::memcpy(pair, unit.data[a][m] + 4 * k, 4);
      const float x = number(pair[0]), y = number(pair[1]);
      for (int n = 0; n < columns; ++n) {
        even[n] = __builtin_fmaf(x, even_b[k][n], even[n]);
        odd[n] = __builtin_fmaf(y, odd_b[k][n], odd[n]);
      }
    }
    std::memcpy(sums, unit.data[c][m], sizeof(sums));
    for (int n = 0; n < columns; ++n) {
      const float pairs = even[n] + odd[n];
      sums[n] += pairs;
    }
    std::memcpy(unit.data[c][m], sums, sizeof(sums));
  }
}

void dot(int c, int a, int b) {
  if (!usable("tdpbf16ps", c) || !usable("tdpbf16ps", a) || !usable("tdpbf16ps", b)) return;
  const Config& t = unit.config;
  if (c == a || c == b || a == b) return fault("#UD: tdpbf16ps of tiles %d, %d, %d", c, a, b);
  if (t.rows[c] != t.rows[a] || t.row_bytes[c] != t.row_bytes[b] || t.row_bytes[a] / 4 != t.rows[b])
    return fault("#UD: tdpbf16ps of shapes C %dx%d, A %dx%d, B %dx%d", t.rows[c], t.row_bytes[c],
                 t.rows[a], t.row_bytes[a], t.rows[b], t.row_bytes[b]);
  constexpr unsigned kFlushMaskedNearest = 0x9fc0;
  _mm_setcsr(kFlushMaskedNearest);  // the handler's return restores it
  products_of(c, a, b);
  ++products;
}

// One VEX instruction of the map 0F38 with W = 0 and L = 0, and its operands.
struct Instruction {
  int prefix, opcode, mod, reg, rm, source, length;  // prefix: none, 66, F3, F2; source: vvvv
  char* base;                                        // of memory: without index, and with it
  int64_t index;
  bool has_index, has_memory;
};

// ModRM: memory operands by [base + index * scale + displacement].
bool decode(const uint8_t* at, const greg_t* registers, Instruction* x) {
  static const int kOrder[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                 REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                 REG_R12, REG_R13, REG_R14, REG_R15};
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || at[2] & 0x84) return false;
  const int high_index = at[1] & 0x40 ? 0 : 8, high_base = at[1] & 0x20 ? 0 : 8;
  x->prefix = at[2] & 3, x->source = ~at[2] >> 3 & 15, x->opcode = at[3];
  const int modrm = at[4];
  x->mod = modrm >> 6, x->reg = (modrm >> 3 & 7) | (at[1] & 0x80 ? 0 : 8), x->rm = modrm & 7;
  const uint8_t* end = at + 5;
  x->has_memory = x->mod != 3, x->has_index = false, x->index = 0, x->base = nullptr;
  if (x->mod == 3) x->rm |= high_base;
  if (x->has_memory) {
    int base = x->rm;
    if (base == 4) {
      const int sib = *end++, index = (sib >> 3 & 7) | high_index;
      base = sib & 7;
      x->has_index = index != 4;
      if (x->has_index) x->index = registers[kOrder[index]] << (sib >> 6);
    }
    int64_t address = 0;
    const bool bare = x->mod == 0 && base == 5;  // displacement alone, or relative to rip
    if (!bare) address = registers[kOrder[base | high_base]];
    if (x->mod == 1) {
      address += int8_t(*end++);
    } else if (x->mod == 2 || bare) {
      int32_t displacement;
      std::memcpy(&displacement, end, 4);
      end += 4, address += displacement;
    }
    if (bare && x->rm == 5) address += reinterpret_cast<int64_t>(end);
    x->base = reinterpret_cast<char*>(address);
  }
  x->length = int(end - at);
  return true;
}

bool execute(const Instruction& x) {
  enum { kNone, k66, kF3, kF2 };
  if (x.opcode == 0x49 && x.has_memory && x.reg == 0 && x.prefix == kNone) {
    Config config;
    std::memcpy(&config, x.base + x.index, sizeof(config));
    configure(config);
  } else if (x.opcode == 0x49 && x.has_memory && x.reg == 0 && x.prefix == k66) {
    std::memcpy(x.base + x.index, &unit.config, sizeof(Config));
  } else if (x.opcode == 0x49 && !x.has_memory && x.prefix == kNone && x.reg == 0 && x.rm == 0) {
    release();
  } else if (x.opcode == 0x49 && !x.has_memory && x.prefix == kF2 && x.rm == 0) {
    zero(x.reg);
  } else if (x.opcode == 0x4b && x.has_memory && x.rm == 4 && x.prefix == kF2) {
    load(x.reg, x.base, x.index);
  } else if (x.opcode == 0x4b && x.has_memory && x.rm == 4 && x.prefix == kF3) {
    store(x.reg, x.base, x.index);
  } else if (x.opcode == 0x5c && !x.has_memory && x.prefix == kF3) {
    dot(x.reg, x.rm, x.source);
  } else {
    return false;
  }
  return true;
}

void handler(int signal, siginfo_t* info, void* context) {
  greg_t* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  // A trap costs microseconds: instructions that follow one another share it.
  int done = 0;
  for (Instruction x;; ++done) {
    const auto* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    if (!decode(at, registers, &x) || !execute(x)) break;
    registers[REG_RIP] += x.length;
  }
  if (done) return;
  if (previous.sa_flags & SA_SIGINFO && previous.sa_sigaction) {
    previous.sa_sigaction(signal, info, context);
  } else {
    sigaction(SIGILL, &previous, nullptr);  // comes again, to whom it belongs
  }
}

}  // namespace

extern "C" {

int amx_install() {
  struct sigaction action = {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_NODEFER;
  return sigaction(SIGILL, &action, &previous);
}
int amx_remove() { return sigaction(SIGILL, &previous, nullptr); }

// The first error since the last call, or "".
const char* amx_error() {
  static char text[sizeof(error)];
  std::memcpy(text, error, sizeof(error));
  error[0] = 0, failed = false;
  return text;
}

int64_t amx_configured() { return configured; }  // threads that hold tiles
int64_t amx_products() { return products; }      // tdpbf16ps so far
}
