// The launches of one (dtype, HEAD_DIM) pair; launch.cpp picks among them.  Host code.
#pragma once
#include "../launches.h"
#include "../sum_tiles.h"
#include "../tiles.h"
#include "backward_tiles.h"

namespace attn::cuda::sm80 {

// The tiles in which one kernel computes all of a call's backward, zeros: two kernels.
// shared_memory: bytes that a CTA may have.
inline FusedShape fused_shape(const Problem& p, const Pointers& ptr, int head_dim,
                              int shared_memory) {
  if (p.deterministic || p.dtype == DType::kFloat32 || !ptr.dq || !(ptr.dk || ptr.dv))
    return {0, 0};
  return cuda::fused_shape(head_dim, shared_memory);
}

// A forward that knows p.features, in 16 bits.
template <class T, int HEAD_DIM>
void run_features(Executor& to, Params p) {
  using Tile = FeatureForwardTile<HEAD_DIM, false>;
  using Smaller = FeatureForwardTile<HEAD_DIM, true>;
  static_assert(Tile::BLOCK_M == Smaller::BLOCK_M && Tile::THREADS == Smaller::THREADS);
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES;
  const bool both = (p.features & kMask) && (p.features & kBias);
  p.m_tiles = int((p.p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  launch(to, kernel_name<T>("sm80::forward_features", HEAD_DIM, p.features),
         grid_of(p.p.batch * p.p.heads_q * p.m_tiles), Tile::THREADS,
         both ? Smaller::smem(BYTES) : Tile::smem(BYTES), p);
}

// general: false only where the plain kernels know everything that the call asks for.
template <class T, int HEAD_DIM>
void run_forward(Executor& to, Params p, bool general) {
  if constexpr (kIsHalf<T>) {  // floats are rare on GPUs: one kernel serves all their calls
    if (!general) {
      using Tile = PlainForwardTile<HEAD_DIM>;
      p.m_tiles = int((p.p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
      const Grid grid = grid_of(p.p.batch * p.p.heads_q * p.m_tiles);
      return launch(to, kernel_name<T>("sm80::forward_plain", HEAD_DIM), grid, Tile::THREADS,
                    Tile::smem(Row<T, HEAD_DIM>::BYTES), p);
    }
  }
  using Tile = ForwardTile<T, HEAD_DIM>;
  const Grid grid = grid_of(p.p.batch * (p.p.heads_q / p.pack) * p.m_tiles * p.splits);
  if constexpr (kHasDecodeTile<T, HEAD_DIM>) {
    using Few = DecodeTile<T, HEAD_DIM>;
    if (p.pack * p.p.seqlen_q <= Few::BLOCK_M)
      return launch(to, kernel_name<T>("sm80::forward_decode", HEAD_DIM, p.features), grid,
                    Few::THREADS, Few::SMEM, p);
  }
  launch(to, kernel_name<T>("sm80::forward_general", HEAD_DIM, p.features), grid, Tile::THREADS,
         Tile::forward_smem(Row<T, HEAD_DIM>::BYTES), p);
}

// All of dQ, dK and dV, where p.dq_sums is there.
template <class T, int HEAD_DIM, int BLOCK_M, int BLOCK_N = 128>
void run_fused(Executor& to, Params p, bool features) {
  using Tile = FusedBackwardTile<HEAD_DIM, BLOCK_M, BLOCK_N>;
  p.m_tiles = int((p.p.seqlen_q + 63) / 64);
  p.n_tiles = int((p.p.seqlen_k + Tile::BLOCK_N - 1) / Tile::BLOCK_N);
  constexpr bool HALF = BLOCK_N == 64;
  const std::string fused =
      features ? kernel_name<T>(HALF ? "sm80::backward_features_half" : "sm80::backward_features",
                                HEAD_DIM, p.features)
      : HALF   ? kernel_name<T>("sm80::backward_fused_half", HEAD_DIM)
               : kernel_name<T>("sm80::backward_fused", HEAD_DIM, BLOCK_M);
  const std::string convert =
      features ? kernel_name<T>("sm80::convert_dq_features", HEAD_DIM, p.features)
               : kernel_name<T>("sm80::convert_dq", HEAD_DIM);
  launch(to, kernel_name<T>("sm80::clear_dq", HEAD_DIM),
         grid_of(p.p.heads_q * sum_tiles(p.p, p.ptr)), 128, 0, p);
  launch(to, fused, grid_of(p.p.batch * p.p.heads_k * p.n_tiles), Tile::THREADS, Tile::SMEM, p);
  launch(to, convert, grid_of(p.p.batch * p.p.heads_q * p.m_tiles), 128, 0, p);
}

// Each of dQ and (dK, dV) of a plain call whose pointers are not null, without atomics.
template <class T, int HEAD_DIM>
void run_plain_pair(Executor& to, Params p) {
  using Queries = QueryGradientTile<HEAD_DIM>;
  using Keys = KeyGradientTile<HEAD_DIM>;
  p.splits = p.pack = 1;
  p.m_tiles = int((p.p.seqlen_q + Queries::BLOCK_M - 1) / Queries::BLOCK_M);
  p.n_tiles = int((p.p.seqlen_k + Keys::BLOCK_M - 1) / Keys::BLOCK_M);
  if (p.ptr.dq)
    launch(to, kernel_name<T>("sm80::backward_dq_plain", HEAD_DIM),
           grid_of(p.p.batch * p.p.heads_q * p.m_tiles), Queries::THREADS, Queries::SMEM, p);
  if (p.ptr.dk || p.ptr.dv)
    launch(to, kernel_name<T>("sm80::backward_dkdv_plain", HEAD_DIM),
           grid_of(p.p.batch * p.p.heads_k * p.n_tiles), Keys::THREADS, Keys::SMEM, p);
}

template <class T, int HEAD_DIM>
void run_bias_gradient(Executor& to, Params p) {
  using Tile = BackwardTile<T, HEAD_DIM>;
  p.splits = p.pack = 1;
  p.m_tiles = int((p.p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  p.n_tiles = int((p.p.seqlen_k + Tile::BLOCK_N - 1) / Tile::BLOCK_N);
  const ScoreStrides& s = p.p.dbias;
  const Grid grid = grid_of((s.b ? p.p.batch : 1) * (s.h ? p.p.heads_q : 1) *
                            (s.q ? p.m_tiles : 1) * (s.k ? p.n_tiles : 1));
  launch(to, kernel_name<T>("sm80::backward_bias", HEAD_DIM, p.features), grid, Tile::THREADS,
         Tile::backward_smem(Row<T, HEAD_DIM>::BYTES), p);
}

// dQ, dK, dV and dBias, each where its pointer is not null; p.delta is filled.
template <class T, int HEAD_DIM>
void run_backward(Executor& to, Params p, bool general) {
  if (p.ptr.dbias) run_bias_gradient<T, HEAD_DIM>(to, p);
  if constexpr (kIsHalf<T> && HEAD_DIM <= 128) {
    if (p.dq_sums) {
      p.splits = p.pack = 1;
      if constexpr (HEAD_DIM == 64)
        if (p.fused_block_m == 128 && !general) return run_fused<T, HEAD_DIM, 128>(to, p, false);
      if constexpr (kHasHalfTile(HEAD_DIM))
        if (p.fused_block_n == 64) return run_fused<T, HEAD_DIM, 64, 64>(to, p, general);
      return run_fused<T, HEAD_DIM, 64>(to, p, general);
    }
    if (!general) return run_plain_pair<T, HEAD_DIM>(to, p);
  }
  using Tile = BackwardTile<T, HEAD_DIM>;
  const int smem = Tile::backward_smem(Row<T, HEAD_DIM>::BYTES);
  const int64_t units = p.p.batch * p.p.heads_q;
  // float32 has no kernel that masks before it scales
  const int bits = kIsHalf<T> || p.features ? p.features : kScale;
  p.splits = p.pack = 1;
  p.m_tiles = int((p.p.seqlen_q + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  if (p.ptr.dq) {
    const Grid grid = grid_of(units * p.m_tiles);
    launch(to, kernel_name<T>("sm80::backward_dq", HEAD_DIM, bits), grid, Tile::THREADS, smem, p);
  }
  p.n_tiles = int((p.p.seqlen_k + Tile::BLOCK_M - 1) / Tile::BLOCK_M);
  const Grid grid = grid_of(p.p.batch * p.p.heads_k * p.n_tiles);
  constexpr bool TWO = kTwoPasses<T, HEAD_DIM>;
  for (p.pass = 0; p.pass < (TWO ? 2 : 1); ++p.pass) {
    if (TWO ? !(p.pass ? p.ptr.dk : p.ptr.dv) : !p.ptr.dk && !p.ptr.dv) continue;
    launch(to, kernel_name<T>("sm80::backward_dkdv", HEAD_DIM, bits), grid, Tile::THREADS, smem, p);
  }
}

}  // namespace attn::cuda::sm80
