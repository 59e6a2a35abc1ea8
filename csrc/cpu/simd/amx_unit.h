// The tile unit of Intel AMX, an instruction a function: eight registers ("tiles") of 16 rows x 64
// bytes a thread.  In assembler: the intrinsics of g++ 12 take literals for tile numbers only, and
// its _tile_loadd and _tile_loadconfig do not tell the compiler which memory they read.
#pragma once
#include <cstdint>

namespace attn::cpu::amx {

// The operand of ldtilecfg: the shape of each tile.
struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64, "as the instruction reads it");

struct Tiles {
  static constexpr int64_t kRows = 16, kRowBytes = 64;

  static void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
  static void release() { asm volatile("tilerelease"); }
  template <int TILE>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
  }
  template <int TILE>
  static void load(const void* base, int64_t row_step) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(base), "r"(row_step), "i"(TILE) : "memory");
  }
  template <int TILE>
  static void store(void* base, int64_t row_step) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(base), "r"(row_step), "i"(TILE) : "memory");
  }
  // C[m][n] += sum over pairs k of A[m][k] . B[k][n], pairs of bfloat16 and sums in float.
  template <int C, int A, int B>
  static void dot() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
  }
};

// This thread's tiles, all of the full shape, for the life of the object: once a task, not once a
// product.  Released afterwards, else every switch of context would save 8 KiB more.
class TileUnit {
 public:
  TileUnit() {
    TileConfig config{};
    config.palette = 1;
    for (int i = 0; i < 8; ++i) {
      config.row_bytes[i] = uint16_t(Tiles::kRowBytes);
      config.rows[i] = uint8_t(Tiles::kRows);
    }
    Tiles::configure(config);
  }
  ~TileUnit() { Tiles::release(); }
  TileUnit(const TileUnit&) = delete;
  TileUnit& operator=(const TileUnit&) = delete;
};

}  // namespace attn::cpu::amx
