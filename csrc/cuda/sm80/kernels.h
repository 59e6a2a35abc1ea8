// Declares what kernels.cuh defines, so that launch.cu need not compile every kernel.  Host code.
#pragma once
#include <stdexcept>
#include <string>

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

// dQ, dK, dV and dBias, each where its pointer is not null; p.delta is filled.
template <class T, int HEAD_DIM>
void run_backward(Params p, bool general, void* stream);

}  // namespace attn::cuda::sm80
