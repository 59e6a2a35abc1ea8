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

// What the copy engine of sm_90 knows of a tensor of 16-bit elements, as the driver encodes it (a
// CUtensorMap); opaque to kernels, which take it as part of their __grid_constant__ parameters.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};
// Dimension 0 is contiguous.  A box is what one load brings: a row of it is 128 bytes, box[0]
// elements, whose 16-byte chunks are swizzled; elements outside of the tensor arrive as zeros.
// Only Triton's kernels, which tests run on the emulator, load 4-byte elements or shorter rows.
struct TensorSpec {
  const void* base;
  bool is_bf16;       // else fp16
  int64_t size[4];    // elements
  int64_t stride[3];  // bytes from one index to the next, of dimensions 1..3
  int box[4];
  int element_bytes = 2;
  int swizzle = 128;  // bytes that are swizzled, and of a row; 0: rows of whole chunks as they are
  int row_step = 1;   // the box[1] rows of a box are this far apart in the tensor
};
// "" or the rule of cuTensorMapEncodeTiled that the spec breaks.
inline const char* tensor_problem(const TensorSpec& t) {
  if (reinterpret_cast<uintptr_t>(t.base) % 16) return "the base is not a multiple of 16 bytes";
  for (int i = 0; i < 4; ++i) {
    if (t.size[i] < 1 || t.size[i] > int64_t(1) << 32) return "a size is not in 1 .. 2^32";
    if (t.box[i] < 1 || t.box[i] > 256) return "a side of the box is not in 1 .. 256";
  }
  for (const int64_t stride : t.stride)
    if (stride % 16 || stride <= 0 || stride >= int64_t(1) << 40)
      return "a stride is not a multiple of 16 bytes in 16 .. 2^40";
  if (t.row_step < 1 || t.row_step > 8) return "the step between rows is not in 1 .. 8";
  if (t.row_step * t.box[1] > 256) return "the rows of the box are more than 256 rows apart";
  const int row = t.box[0] * t.element_bytes;
  if (t.swizzle == 0) return row % 16 ? "rows of the box are not multiples of 16 bytes" : "";
  return row == t.swizzle ? "" : "rows of the box are not as long as the swizzled bytes";
}

}  // namespace attn::ptx
