// Declares what kernels.cuh defines, so that launch.cu need not compile every kernel.  Host code.
#pragma once
#include <stdexcept>
#include <string>

#include "../sum_tiles.h"
#include "../traits.cuh"

namespace attn::cuda::sm80 {

inline Grid grid_of(int64_t blocks) {
  if (blocks > 2147483647)
    throw std::invalid_argument("the call needs " + std::to_string(blocks) +
                                " blocks, more than a CUDA grid holds (2^31 - 1)");
  return Grid{int(blocks), 1, 1};
}

// general: false only where the plain kernels know everything that the call asks for.
template <class T, int HEAD_DIM>
void run_forward(Params p, bool general, void* stream);

// Queries of the tiles in which one kernel computes all of a plain call's backward, 0: two kernels.
// shared_memory: bytes that a CTA may have.
inline int fused_queries(const Problem& p, const Pointers& ptr, int head_dim, int shared_memory) {
  if (p.deterministic || p.dtype == DType::kFloat32 || !ptr.dq || !(ptr.dk || ptr.dv)) return 0;
  return fused_block_m(head_dim, shared_memory);
}

// dQ, dK, dV and dBias, each where its pointer is not null; p.delta is filled.
template <class T, int HEAD_DIM>
void run_backward(Params p, bool general, void* stream);

}  // namespace attn::cuda::sm80
