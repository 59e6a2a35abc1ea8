// gemm() on the tile unit against sums of integers, which are exact in any order, and what the unit
// itself promises.  A shared library for tests/cpu/test_cpu_amx.py: each function returns what is
// wrong, or "".
#include <string>

#define ATTN_ISA products
#define ATTN_VEC_BYTES 64
#define ATTN_NV 4
#define ATTN_MR 6
#define ATTN_AMX
#define ATTN_BF16_DOT
#include "cpu/isa/region.h"

#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_AMX_FEATURES)
#include "cpu/simd/gemm_amx.h"

namespace attn::cpu::products {

using amx::TileConfig;
using amx::Tiles;
using amx::TileUnit;

std::string text;

uint32_t random_bits() {
  static uint32_t state = 1;
  return (state = state * 1664525u + 1013904223u) >> 16;
}
uint16_t bf16(float x) { return float_to_bf16(x); }

// rows x depth pairs of A, row_step bytes apart, times depth x columns of B.
template <int64_t LD>
bool product(int64_t rows, int64_t columns, int64_t depth, int64_t gap, bool accumulate) {
  const int64_t ld = LD ? LD : columns + gap / 4 * 16;
  const int64_t row = depth * 4 + gap;  // bytes; any step is allowed
  std::vector<char> A(rows * row - gap);
  std::vector<uint32_t> B((depth - 1) * ld + columns);
  std::vector<float> C((rows - 1) * ld + columns + 1, 77.f), expected;
  auto pair = [] {
    return bf16(random_bits() % 15 - 7.f) | uint32_t(bf16(random_bits() % 9)) << 16;
  };
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t k = 0; k < depth; ++k) {
      const uint32_t x = pair();
      std::memcpy(A.data() + r * row + k * 4, &x, 4);
    }
  for (uint32_t& x : B) x = pair();
  expected = C;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t q = 0; q < columns; ++q) {
      float sum = accumulate ? 77 : 0;
      for (int64_t k = 0; k < depth; ++k) {
        const uint32_t a = item_at<uint32_t>(A.data() + r * row + k * 4), b = B[k * ld + q];
        sum += bf16_to_float(uint16_t(a)) * bf16_to_float(uint16_t(b)) +
               bf16_to_float(uint16_t(a >> 16)) * bf16_to_float(uint16_t(b >> 16));
      }
      expected[r * ld + q] = sum;
    }
  gemm<AmxPairs, LD>(rows, columns, depth, A.data(), row, 4, B.data(), ld, C.data(), ld,
                     accumulate);
  if (C == expected) return true;
  for (size_t i = 0; i < C.size(); ++i)
    if (C[i] != expected[i]) {
      text = std::to_string(rows) + " x " + std::to_string(columns) + ", depth " +
             std::to_string(depth) + (accumulate ? ", accumulating" : "") + ": C[" +
             std::to_string(i / ld) + "][" + std::to_string(i % ld) + "] is " +
             std::to_string(C[i]) + ", not " + std::to_string(expected[i]);
      break;
    }
  return false;
}

// C[0][0] of one tdpbf16ps: `c` + sum over k of even[k] * 1 + odd[k] * 1.
float sum_of(float c, const float (&even)[16], const float (&odd)[16], float factor = 1) {
  alignas(64) float C[256];
  uint16_t A[512], B[512];
  for (float& x : C) x = c;
  for (int i = 0; i < 512; ++i) {
    // not (i % 2 ? odd : even)[..]: with -fsanitize=bounds g++ 12 reads neither
    const float pair[2] = {even[i / 2 % 16], odd[i / 2 % 16]};
    A[i] = bf16(pair[i % 2]), B[i] = bf16(factor);
  }
  TileUnit unit;
  Tiles::load<0>(C, 64);
  Tiles::load<4>(A, 64);
  Tiles::load<6>(B, 64);
  Tiles::dot<0, 4, 6>();
  Tiles::store<0>(C, 64);
  for (float x : C)
    if (std::memcmp(&x, C, 4)) return -12345;
  return C[0];
}

TileConfig shapes(int rows, int row_bytes, int tiles = 8) {
  TileConfig config{};
  config.palette = 1;
  for (int i = 0; i < tiles; ++i)
    config.rows[i] = uint8_t(rows), config.row_bytes[i] = uint16_t(row_bytes);
  return config;
}

}  // namespace attn::cpu::products

using namespace attn::cpu::products;

extern "C" {

const char* amx_check_products(int count) {
  TileUnit unit;
  text.clear();
  for (int i = 0; i < count; ++i) {
    // whole tiles, one more, one less: each leftover alone and together
    auto size = [](int64_t most) {
      const int64_t whole = random_bits() % (most + 1) * 16, odd = random_bits() % 4;
      const int64_t n = odd == 0 ? whole : odd == 1 ? whole + 1 : odd == 2 ? whole - 1 : whole + 7;
      return n < 1 ? 1 : n;
    };
    const int64_t rows = size(4), depth = size(3), columns = 16 * (1 + random_bits() % 6);
    const int64_t gap = int64_t(random_bits() % 3) * 2;
    if (!product<0>(rows, columns, depth, gap, i % 2) ||
        !product<64>(rows, std::min<int64_t>(columns, 64), depth, gap, i % 2))
      break;
  }
  return text.c_str();
}

// The arithmetic of tdpbf16ps, where it differs from other ways to add up.
const char* amx_check_arithmetic() {
  text.clear();
  const float tiny = 1.1754944e-38f;  // the smallest normal number
  auto expect = [](const char* what, float got, float wanted) {
    if (std::memcmp(&got, &wanted, 4))
      text +=
          std::string(what) + ": " + std::to_string(got) + ", not " + std::to_string(wanted) + "; ";
  };
  const float none[16] = {}, one[16] = {1}, two[16] = {1, 1}, big[16] = {0x1p24f};
  expect("even and odd sums are apart", sum_of(0, big, two), 0x1p24f + 2);
  expect("chains by ascending pair", sum_of(0, {0x1p24f, 1, -0x1p24f}, none), 0);
  expect("C joins last", sum_of(0x1p24f, one, one), 0x1p24f + 2);
  expect("rounds to nearest even", sum_of(0, {0x1p24f, 1, 1, 1, 3}, none), 0x1p24f + 4);
  expect("denormal operands are 0", sum_of(0, {tiny / 2}, none, 0x1p60f), 0);
  expect("denormal sums are 0", sum_of(0, {tiny}, none, 0.5f), 0);
  expect("denormal C is 0", sum_of(tiny / 2, none, none), 0);
  expect("smallest normal", sum_of(0, {tiny}, none), tiny);
  return text.c_str();
}

// Misuse that a processor refuses (and a release left out); the emulator says so, nothing else is
// to happen.
int amx_misuse(int which) {
  alignas(64) float memory[256] = {};
  switch (which) {
    case 0:
      Tiles::zero<0>();
      break;
    case 1: {
      TileConfig config = shapes(16, 64);
      config.palette = 2;
      Tiles::configure(config);
      break;
    }
    case 2:
      Tiles::configure(shapes(17, 64));
      break;
    case 3:
      Tiles::configure(shapes(16, 68));
      break;
    case 4:
      Tiles::configure(shapes(16, 64, 9));
      break;
    case 5:
      Tiles::configure(shapes(16, 64, 6));
      Tiles::load<6>(memory, 64);
      break;
    case 6:
      Tiles::configure(shapes(8, 64));
      Tiles::dot<0, 4, 6>();
      break;
    case 7:
      Tiles::configure(shapes(16, 64));
      asm volatile(".byte 0xc4, 0xe2, 0x5a, 0x5c, 0xc4");  // 0, 4, 4: no assembler takes it
      break;
    case 8:
      Tiles::configure(shapes(16, 64));
      Tiles::configure(shapes(16, 64));
      break;
    case 9: {
      TileConfig config = shapes(16, 64);
      config.reserved[3] = 1;
      Tiles::configure(config);
      break;
    }
    case 10:
      Tiles::configure(shapes(16, 62));
      Tiles::store<1>(memory, 64);
      break;
    case 11:
      Tiles::configure(shapes(16, 64));
      Tiles::release();
      Tiles::store<1>(memory, 64);
      break;
    default:
      return 0;
  }
  Tiles::release();
  return 1;
}

// The wrappers and the compiler's own intrinsics, for a look at their encoding.
void amx_wrapped(void* memory, int64_t step, const TileConfig& config) {
  Tiles::configure(config);
  Tiles::zero<3>();
  Tiles::load<5>(memory, step);
  Tiles::dot<1, 4, 7>();
  Tiles::store<2>(memory, step);
  Tiles::release();
}
void amx_intrinsic(void* memory, int64_t step, const TileConfig& config) {
  _tile_loadconfig(&config);
  _tile_zero(3);
  _tile_loadd(5, memory, step);
  _tile_dpbf16ps(1, 4, 7);
  _tile_stored(2, memory, step);
  _tile_release();
}
}

#pragma GCC pop_options
