// Plain types of the wrappers in ptx.cuh, the same for nvcc and g++.
#pragma once
#include <cstdint>

namespace attn::ptx {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
struct alignas(8) U32x2 {
  uint32_t x, y;
};
struct alignas(16) U32x4 {
  uint32_t x, y, z, w;
};
struct Grid {
  int x = 1, y = 1, z = 1;
};

}  // namespace attn::ptx
