// The launches of one (dtype, HEAD_DIM) pair on Hopper.  setup.py generates a file for each,
// compiled for sm_90a only.
#pragma once
#include "../sm80/kernels.h"
#include "forward.cuh"
#include "kernels.h"

namespace attn::cuda::sm90 {

template <class T, int HEAD_DIM>
void run_forward(const Params& params, void* stream) {
  using Tile = ForwardTile90<HEAD_DIM>;
  const Problem& p = params.p;
  ForwardParams x{};
  x.p = params;
  x.p.m_tiles = int((p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  x.Q = make_tensor_map(query_spec(p, params.ptr, Tile::BLOCK_M));
  x.K = make_tensor_map(key_spec(p, params.ptr, Tile::BLOCK_N));
  x.V = make_tensor_map(value_spec(p, params.ptr, Tile::BLOCK_N));
  launch(forward<T, HEAD_DIM>, sm80::grid_of(p.batch * p.heads_q * x.p.m_tiles), Tile::THREADS,
         Tile::SMEM, stream, x);
}

}  // namespace attn::cuda::sm90
