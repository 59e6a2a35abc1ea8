// The launches of one (dtype, HEAD_DIM) pair.  setup.py generates a file for each pair, which
// instantiates them; launch.cu picks among them by kernels.h.
#pragma once
#include "backward.cuh"
#include "backward_bias.cuh"
#include "backward_fused.cuh"
#include "forward.cuh"
#include "forward_plain.cuh"
#include "kernels.h"

namespace attn::cuda::sm80 {

template <class T, int HEAD_DIM>
void run_forward(Params p, bool general, void* stream) {
  if constexpr (kIsHalf<T>) {  // floats are rare on GPUs: one kernel serves all their calls
    if (!general) {
      using Tile = PlainForwardTile<HEAD_DIM>;
      p.m_tiles = int((p.p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
      const Grid grid = grid_of(p.p.batch * p.p.heads_q * p.m_tiles);
      return launch(forward_plain<T, HEAD_DIM>, grid, Tile::THREADS,
                    Tile::smem(Row<T, HEAD_DIM>::BYTES), stream, p);
    }
  }
  using Tile = ForwardTile<T, HEAD_DIM>;
  const Grid grid = grid_of(p.p.batch * (p.p.heads_q / p.pack) * p.m_tiles * p.splits);
  launch(forward_general<T, HEAD_DIM>, grid, Tile::THREADS,
         Tile::forward_smem(Row<T, HEAD_DIM>::BYTES), stream, p);
}

// All of dQ, dK and dV, where p.dq_sums is there.
template <class T, int HEAD_DIM, int BLOCK_M>
void run_fused(Params p, void* stream) {
  using Tile = FusedBackwardTile<HEAD_DIM, BLOCK_M>;
  p.m_tiles = int((p.p.seqlen_q + 63) / 64);
  p.n_tiles = int((p.p.seqlen_k + Tile::BLOCK_N - 1) / Tile::BLOCK_N);
  launch(clear_dq<T, HEAD_DIM>, grid_of(p.p.heads_q * sum_tiles(p.p, p.ptr)), 128, 0, stream, p);
  launch(backward_fused<T, HEAD_DIM, BLOCK_M>, grid_of(p.p.batch * p.p.heads_k * p.n_tiles),
         Tile::THREADS, Tile::SMEM, stream, p);
  launch(convert_dq<T, HEAD_DIM>, grid_of(p.p.batch * p.p.heads_q * p.m_tiles), 128, 0, stream, p);
}

template <class T, int HEAD_DIM>
void run_backward(Params p, bool general, void* stream) {
  if constexpr (kIsHalf<T> && HEAD_DIM <= 128) {
    if (p.dq_sums) {
      p.splits = p.pack = 1;
      if constexpr (HEAD_DIM == 64)
        if (p.fused_block_m == 128) return run_fused<T, HEAD_DIM, 128>(p, stream);
      return run_fused<T, HEAD_DIM, 64>(p, stream);
    }
  }
  using Tile = BackwardTile<T, HEAD_DIM>;
  const int smem = Tile::backward_smem(Row<T, HEAD_DIM>::BYTES);
  const int64_t units = p.p.batch * p.p.heads_q;
  general = general || !kIsHalf<T>;
  p.splits = p.pack = 1;
  p.m_tiles = int((p.p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  if (p.ptr.dq) {
    const Grid grid = grid_of(units * p.m_tiles);
    if constexpr (kIsHalf<T>) {
      if (!general) launch(backward_dq<T, HEAD_DIM, false>, grid, Tile::THREADS, smem, stream, p);
    }
    if (general) launch(backward_dq<T, HEAD_DIM, true>, grid, Tile::THREADS, smem, stream, p);
  }
  if (p.ptr.dbias) {
    p.n_tiles = int((p.p.seqlen_k + Tile::BLOCK_N - 1) / Tile::BLOCK_N);
    const ScoreStrides& s = p.p.dbias;
    const Grid grid = grid_of((s.b ? p.p.batch : 1) * (s.h ? p.p.heads_q : 1) *
                              (s.q ? p.m_tiles : 1) * (s.k ? p.n_tiles : 1));
    launch(backward_bias<T, HEAD_DIM>, grid, Tile::THREADS, smem, stream, p);
  }
  p.n_tiles = int((p.p.seqlen_k + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  const Grid grid = grid_of(p.p.batch * p.p.heads_k * p.n_tiles);
  constexpr bool TWO = kTwoPasses<T, HEAD_DIM>;
  for (p.pass = 0; p.pass < (TWO ? 2 : 1); ++p.pass) {
    if (TWO ? !(p.pass ? p.ptr.dk : p.ptr.dv) : !p.ptr.dk && !p.ptr.dv) continue;
    if constexpr (kIsHalf<T>) {
      if (!general) launch(backward_dkdv<T, HEAD_DIM, false>, grid, Tile::THREADS, smem, stream, p);
    }
    if (general) launch(backward_dkdv<T, HEAD_DIM, true>, grid, Tile::THREADS, smem, stream, p);
  }
}

}  // namespace attn::cuda::sm80
