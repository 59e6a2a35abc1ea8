// The launches of one (dtype, HEAD_DIM) pair on Hopper.  setup.py generates a file for each,
// compiled for sm_90a only.
#pragma once
#include "../sm80/kernels.h"
#include "backward_dq.cuh"
#include "backward_fused.cuh"
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
  launch(forward<T, HEAD_DIM>, sm80::grid_of(p.batch * p.heads_q * x.p.m_tiles), THREADS,
         Tile::SMEM, stream, x);
}

template <class T, int HEAD_DIM>
void run_backward(const Params& params, void* stream) {
  const Problem& p = params.p;
  const Pointers& ptr = params.ptr;
  const auto maps = [&](int rows_q, int rows_k) {
    BackwardParams x{};
    x.p = params;
    x.p.m_tiles = int((p.seqlen_q + rows_q - 1) / rows_q);
    x.p.n_tiles = int((p.seqlen_k + rows_k - 1) / rows_k);
    x.Q = make_tensor_map(query_spec(p, ptr, rows_q));
    x.K = make_tensor_map(key_spec(p, ptr, rows_k));
    x.V = make_tensor_map(value_spec(p, ptr, rows_k));
    x.dO = make_tensor_map(dout_spec(p, ptr, rows_q));
    return x;
  };
  if constexpr (HEAD_DIM <= 128) {
    if (params.dq_sums) {
      using Tile = FusedTile<HEAD_DIM>;
      const BackwardParams x = maps(Tile::BLOCK_M, Tile::BLOCK_N);
      const Grid tiles = sm80::grid_of(p.batch * p.heads_q * x.p.m_tiles);
      launch(clear_dq<T, HEAD_DIM>, sm80::grid_of(p.heads_q * sum_tiles(p, ptr)), 128, 0, stream,
             x.p);
      launch(backward_fused<T, HEAD_DIM>, sm80::grid_of(p.batch * p.heads_k * x.p.n_tiles), THREADS,
             Tile::SMEM, stream, x);
      return launch(convert_dq<T, HEAD_DIM>, tiles, 128, 0, stream, x.p);
    }
  }
  if (ptr.dq) {
    using Tile = QueryGradientTile<HEAD_DIM>;
    const BackwardParams x = maps(Tile::BLOCK_M, Tile::BLOCK_N);
    launch(backward_dq<T, HEAD_DIM>, sm80::grid_of(p.batch * p.heads_q * x.p.m_tiles), THREADS,
           Tile::SMEM, stream, x);
  }
  if (ptr.dk || ptr.dv) {
    using Tile = KeyGradientTile<HEAD_DIM>;
    const BackwardParams x = maps(Tile::BLOCK_M, Tile::BLOCK_N);
    launch(backward_dkdv<T, HEAD_DIM>, sm80::grid_of(p.batch * p.heads_k * x.p.n_tiles), THREADS,
           Tile::SMEM, stream, x);
  }
}

}  // namespace attn::cuda::sm90
