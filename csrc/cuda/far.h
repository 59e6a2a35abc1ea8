// Far rows of a backward: those whose LSE is so far from 0 that float32 has lost the sum in it, and
// exp(S - LSE) would be a multiple of P.  The preprocess kernel gives the other kernels LSE = +inf
// for them, where P = 0; sm80/backward_far.cuh computes them afterwards.  Where their numbers lie:
// behind delta, each as delta is.  Host and device.
#pragma once
#include "tiles.h"

namespace attn::cuda {

// Beyond this |LSE| half of float32's last bit is 1.5e-5 of a weight exp(S - LSE); the CPU's bound.
constexpr float kFarLse = 256.0f;

constexpr int kMarkRows = 32;              // queries that share a mark: a bit each
constexpr int kFarKeys = 8;                // keys of a warp of backward_far_keys
constexpr int kFarDim = 256;               // the widest head
constexpr int kFarRowBytes = 4 * kFarDim;  // a row as float32
constexpr int kFarSmem = 2 * kFarRowBytes * (kRowThreads / 32);  // two rows a warp

// Floats of delta, a multiple of 128 bytes.  Not lse_stride_h: torch may say anything of one head.
ATTN_FORMULA int64_t row_floats(const Problem& p, const Pointers& ptr) {
  const int64_t rows = p.heads_q * (ptr.cu_seqlens_q ? p.rows_q : p.batch * p.seqlen_q);
  return (rows + 31) / 32 * 32;
}
// Floats of what is kept of far rows.
ATTN_FORMULA int64_t far_floats(const Problem& p, const Pointers& ptr, int64_t marks) {
  return 3 * row_floats(p, ptr) + (marks + 31) / 32 * 32;
}

struct FarRows {
  float* near_lse;  // LSE, +inf in far rows
  float* base;      // of far rows: the largest logit or sink in units of log2(e)
  float* inverse;   // of far rows: 1 / sum of 2^(S - base), the sink among them
  uint32_t* marks;  // which of kMarkRows rows are far, by the numbers of such tiles (packed.h)

  static ATTN_FORMULA FarRows of(const Problem& p, const Pointers& ptr, float* delta) {
    const int64_t rows = row_floats(p, ptr);
    float* first = delta + rows;
    return {first, first + rows, first + 2 * rows, reinterpret_cast<uint32_t*>(first + 3 * rows)};
  }
};

}  // namespace attn::cuda
