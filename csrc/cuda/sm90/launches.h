// The launches of one (dtype, HEAD_DIM) pair on Hopper.  Host code.
#pragma once
#include "../launches.h"
#include "kernels.h"

namespace attn::cuda::sm90 {

template <class T, int HEAD_DIM>
void run_forward(Executor& to, const Params& params) {
  using Tile = ForwardTile90<HEAD_DIM>;
  const Problem& p = params.p;
  ForwardParams x{};
  x.p = params;
  x.p.m_tiles = int((p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  x.Q = to.tensor_map(query_spec(p, params.ptr, Tile::BLOCK_M));
  x.K = to.tensor_map(key_spec(p, params.ptr, Tile::BLOCK_N));
  x.V = to.tensor_map(value_spec(p, params.ptr, Tile::BLOCK_N));
  launch(to, kernel_name<T>("sm90::forward", HEAD_DIM), grid_of(p.batch * p.heads_q * x.p.m_tiles),
         THREADS, Tile::SMEM, x);
}

// A forward that knows p.features.
template <class T, int HEAD_DIM>
void run_features(Executor& to, const Params& params) {
  const Problem& p = params.p;
  using Tile = ForwardTile90<HEAD_DIM>;
  ForwardParams x{};
  x.p = params;
  x.p.m_tiles = int((p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  x.Q = to.tensor_map(query_spec(p, params.ptr, Tile::BLOCK_M));
  x.K = to.tensor_map(in_fours(key_spec(p, params.ptr, Tile::BLOCK_N)));
  x.V = to.tensor_map(in_fours(value_spec(p, params.ptr, Tile::BLOCK_N)));
  launch(to, kernel_name<T>("sm90::forward_features", HEAD_DIM, params.features),
         grid_of(p.batch * p.heads_q * x.p.m_tiles), THREADS, Tile::SMEM, x);
}

// dQ, dK, dV, each where its pointer is not null; p.delta is filled, p.dq_sums where query_sums().
template <class T, int HEAD_DIM>
void run_backward(Executor& to, const Params& params) {
  const Problem& p = params.p;
  const Pointers& ptr = params.ptr;
  const auto maps = [&](int rows_q, int rows_k) {
    BackwardParams x{};
    x.p = params;
    x.p.m_tiles = int((p.seqlen_q + rows_q - 1) / rows_q);
    x.p.n_tiles = int((p.seqlen_k + rows_k - 1) / rows_k);
    x.Q = to.tensor_map(query_spec(p, ptr, rows_q));
    x.K = to.tensor_map(key_spec(p, ptr, rows_k));
    x.V = to.tensor_map(value_spec(p, ptr, rows_k));
    x.dO = to.tensor_map(dout_spec(p, ptr, rows_q));
    return x;
  };
  if constexpr (HEAD_DIM <= 128) {
    if (params.dq_sums) {
      using Tile = PlainFusedTile<HEAD_DIM>;
      const int bits = backward_features(p, ptr), others = bits & ~kOrdered;
      BackwardParams x = maps(bits ? 64 : Tile::BLOCK_M, Tile::BLOCK_N);
      x.p.features |= bits;
      x.p.m_tiles = int((p.seqlen_q + 63) / 64);  // of the sums
      const Grid tiles = grid_of(p.batch * p.heads_q * x.p.m_tiles);
      launch(to, kernel_name<T>("sm90::clear_dq", HEAD_DIM), grid_of(p.heads_q * sum_tiles(p, ptr)),
             128, 0, x.p);
      launch(to,
             bits ? kernel_name<T>("sm90::backward_features", HEAD_DIM, bits)
                  : kernel_name<T>("sm90::backward_fused", HEAD_DIM),
             grid_of(p.batch * p.heads_k * x.p.n_tiles), THREADS,
             bits ? SideRoom<HEAD_DIM>::SMEM : Tile::SMEM, x);
      if (!ptr.dq) return;
      return launch(to,
                    others ? kernel_name<T>("sm90::convert_dq_features", HEAD_DIM, others)
                           : kernel_name<T>("sm90::convert_dq", HEAD_DIM),
                    tiles, 128, 0, x.p);
    }
  }
  if (ptr.dq) {
    using Tile = QueryGradientTile<HEAD_DIM>;
    const BackwardParams x = maps(Tile::BLOCK_M, Tile::BLOCK_N);
    launch(to, kernel_name<T>("sm90::backward_dq", HEAD_DIM),
           grid_of(p.batch * p.heads_q * x.p.m_tiles), THREADS, Tile::SMEM, x);
  }
  if (ptr.dk || ptr.dv) {
    using Tile = KeyGradientTile<HEAD_DIM>;
    const BackwardParams x = maps(Tile::BLOCK_M, Tile::BLOCK_N);
    launch(to, kernel_name<T>("sm90::backward_dkdv", HEAD_DIM),
           grid_of(p.batch * p.heads_k * x.p.n_tiles), THREADS, Tile::SMEM, x);
  }
}

}  // namespace attn::cuda::sm90
