// gemm() on the tile unit: C in blocks of 32 x 32, depth in steps of 16 pairs, for whole tiles of
// 16; what is left of rows and depth goes to vdpbf16ps, so that no operand is read beyond its end
// and no tile changes its shape.  The layouts are those of Bf16Pairs, but A's pairs must lie side
// by side: a tile is loaded by rows.
//
//              B 6    B 7         a step of depth: 4 loads of 1 KiB, 4 x 16^3 pairs of products
//       A 4   C 0    C 1          a tile of C is added to every 4th product: 64 cycles for a
//       latency A 5   C 2    C 3          of 52 (Intel's figures)
#pragma once
#include "cpu/simd/gemm.h"

#ifdef ATTN_AMX
#include "cpu/simd/amx_unit.h"

namespace attn::cpu::ATTN_ISA {

using amx::Tiles;

struct AmxPairs : Bf16Pairs {
  using PerThread = amx::TileUnit;
  static constexpr int kStep = 16;
};

constexpr int64_t kTile = AmxPairs::kStep;  // rows of a tile, and pairs or numbers in each of them

// C (+)= A * B of RT x CT tiles.
template <int RT, int CT>
ATTN_INLINE void tile_block(int64_t steps, const char* A, int64_t row_step, const uint32_t* B,
                            int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  const int64_t b_step = ldb * 4, c_step = ldc * 4;
  Tiles::zero<0>();
  if constexpr (CT == 2) Tiles::zero<1>();
  if constexpr (RT == 2) Tiles::zero<2>();
  if constexpr (RT == 2 && CT == 2) Tiles::zero<3>();
  for (; steps > 0; --steps, A += Tiles::kRowBytes, B += kTile * ldb) {
    Tiles::load<4>(A, row_step);
    Tiles::load<6>(B, b_step);
    Tiles::dot<0, 4, 6>();
    if constexpr (CT == 2) {
      Tiles::load<7>(B + kTile, b_step);
      Tiles::dot<1, 4, 7>();
    }
    if constexpr (RT == 2) {
      Tiles::load<5>(A + kTile * row_step, row_step);
      Tiles::dot<2, 5, 6>();
      if constexpr (CT == 2) Tiles::dot<3, 5, 7>();
    }
  }
  // Sums of sums, as in gemm_block: C joins at the end.
  alignas(64) float sums[RT * CT][kTile * kTile];
  auto put = [&](auto tile, int64_t r, int64_t c, float* sum) {
    float* to = C + r * kTile * ldc + c * kTile;
    if (!accumulate) return Tiles::store<tile.value>(to, c_step);
    Tiles::store<tile.value>(sum, kTile * 4);
    for (int64_t i = 0; i < kTile; ++i)
      store(to + i * ldc, load(sum + i * kTile) + load(to + i * ldc));
  };
  put(std::integral_constant<int, 0>{}, 0, 0, sums[0]);
  if constexpr (CT == 2) put(std::integral_constant<int, 1>{}, 0, 1, sums[1]);
  if constexpr (RT == 2) put(std::integral_constant<int, 2>{}, 1, 0, sums[CT]);
  if constexpr (RT == 2 && CT == 2) put(std::integral_constant<int, 3>{}, 1, 1, sums[3]);
}

// RT x 16 rows, all columns.
template <int RT>
inline void tile_rows(int64_t columns, int64_t steps, const char* A, int64_t row_step,
                      const uint32_t* B, int64_t ldb, float* C, int64_t ldc, bool accumulate) {
  int64_t q = 0;
  for (; q + 2 * kTile <= columns; q += 2 * kTile)
    tile_block<RT, 2>(steps, A, row_step, B + q, ldb, C + q, ldc, accumulate);
  if (q < columns) tile_block<RT, 1>(steps, A, row_step, B + q, ldb, C + q, ldc, accumulate);
}

template <int64_t LD>
__attribute__((noinline)) void gemm_tiles(int64_t rows, int64_t columns, int64_t depth,
                                          const char* A, int64_t row_step, const uint32_t* B,
                                          int64_t ldb, float* C, int64_t ldc, bool accumulate,
                                          Prefetch* soon) {
  if (LD) ldb = ldc = LD;
  const int64_t steps = depth / kTile, whole = steps ? rows / kTile * kTile : 0;
  for (int64_t r = 0; r < whole; r += 2 * kTile) {
    if (soon && columns >= kPanel) soon->some();  // not between short products: as in gemm_rows
    if (r + kTile < whole)
      tile_rows<2>(columns, steps, A + r * row_step, row_step, B, ldb, C + r * ldc, ldc,
                   accumulate);
    else
      tile_rows<1>(columns, steps, A + r * row_step, row_step, B, ldb, C + r * ldc, ldc,
                   accumulate);
  }
  const int64_t deep = steps * kTile;
  if (whole && deep < depth)
    gemm<Bf16Pairs, LD>(whole, columns, depth - deep, A + deep * 4, row_step, 4, B + deep * ldb,
                        ldb, C, ldc, true);
  if (whole < rows)
    gemm<Bf16Pairs, LD>(rows - whole, columns, depth, A + whole * row_step, row_step, 4, B, ldb,
                        C + whole * ldc, ldc, accumulate, soon);
}

// depth_step is 4: see kStep.
template <>
inline void gemm<AmxPairs, 0>(int64_t rows, int64_t columns, int64_t depth, const char* A,
                              int64_t row_step, int64_t, const uint32_t* B, int64_t ldb, float* C,
                              int64_t ldc, bool accumulate, Prefetch* soon) {
  gemm_tiles<0>(rows, columns, depth, A, row_step, B, ldb, C, ldc, accumulate, soon);
}
template <>
inline void gemm<AmxPairs, kPanel>(int64_t rows, int64_t columns, int64_t depth, const char* A,
                                   int64_t row_step, int64_t, const uint32_t* B, int64_t ldb,
                                   float* C, int64_t ldc, bool accumulate, Prefetch* soon) {
  gemm_tiles<kPanel>(rows, columns, depth, A, row_step, B, ldb, C, ldc, accumulate, soon);
}

}  // namespace attn::cpu::ATTN_ISA
#endif
