// The launches of one (dtype, HEAD_DIM) pair; launch.cpp picks among them.  Host code.
#pragma once
#include "../launches.h"
#include "../tile_counts.h"
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
  const TileCount tiles = query_tiles(p.p, p.ptr, Tile::BLOCK_M);
  p.m_tiles = tiles.of_head;
  launch(
      to, kernel_name<T>("sm80::forward_features", HEAD_DIM, p.features), grid_of(tiles.all),
      Tile::THREADS,
      (both ? Smaller::smem(BYTES) : Tile::smem(BYTES)) + row_address_bytes(HEAD_DIM, p.features),
      p);
}

// general: false only where the plain kernels know everything that the call asks for.
template <class T, int HEAD_DIM>
void run_forward(Executor& to, Params p, bool general) {
  if constexpr (kIsHalf<T>) {  // floats are rare on GPUs: one kernel serves all their calls
    if (!general) {
      using Tile = PlainForwardTile<HEAD_DIM>;
      const TileCount tiles = query_tiles(p.p, p.ptr, Tile::BLOCK_M);
      p.m_tiles = tiles.of_head;
      return launch(to, kernel_name<T>("sm80::forward_plain", HEAD_DIM), grid_of(tiles.all),
                    Tile::THREADS, Tile::smem(Row<T, HEAD_DIM>::BYTES), p);
    }
  }
  using Tile = ForwardTile<T, HEAD_DIM>;
  const int64_t heads = p.p.heads_q / p.pack * (p.ptr.cu_seqlens_q ? 1 : p.p.batch);
  if constexpr (kHasDecodeTile<T, HEAD_DIM>) {
    using Few = DecodeTile<T, HEAD_DIM>;
    if (p.pack * p.p.seqlen_q <= Few::BLOCK_M) {
      if (p.ptr.cu_seqlens_q) p.m_tiles = query_tiles(p.p, p.ptr, Few::BLOCK_M).of_head;
      return launch(to, kernel_name<T>("sm80::forward_decode", HEAD_DIM, p.features),
                    grid_of(heads * p.m_tiles * p.splits), Few::THREADS, Few::SMEM, p);
    }
  }
  const Grid grid = grid_of(heads * p.m_tiles * p.splits);
  launch(to, kernel_name<T>("sm80::forward_general", HEAD_DIM, p.features), grid, Tile::THREADS,
         Tile::forward_smem(Row<T, HEAD_DIM>::BYTES), p);
}

// All of dQ, dK and dV, where p.dq_sums is there.
template <class T, int HEAD_DIM, int BLOCK_M, int BLOCK_N = 128>
void run_fused(Executor& to, Params p, bool features) {
  const int bits = p.features;
  p.features |= bias_gradient_of(p.p, p.ptr);
  using Tile = FusedBackwardTile<HEAD_DIM, BLOCK_M, BLOCK_N>;
  const TileCount sums = sum_tiles(p.p, p.ptr), keys = key_tiles(p.p, p.ptr, Tile::BLOCK_N);
  p.m_tiles = sums.of_head, p.n_tiles = keys.of_head;
  constexpr bool HALF = BLOCK_N == 64;
  const std::string fused =
      features ? kernel_name<T>(HALF ? "sm80::backward_features_half" : "sm80::backward_features",
                                HEAD_DIM, p.features)
      : HALF   ? kernel_name<T>("sm80::backward_fused_half", HEAD_DIM)
               : kernel_name<T>("sm80::backward_fused", HEAD_DIM, BLOCK_M);
  const std::string convert = features ? kernel_name<T>("sm80::convert_dq_features", HEAD_DIM, bits)
                                       : kernel_name<T>("sm80::convert_dq", HEAD_DIM);
  launch(to, kernel_name<T>("sm80::clear_dq", HEAD_DIM), grid_of(sums.all), 128, 0, p);
  launch(to, fused, grid_of(keys.all), Tile::THREADS, Tile::SMEM, p);
  launch(to, convert, grid_of(sums.all), 128, 0, p);
}

// Each of dQ and (dK, dV) of a plain call whose pointers are not null, without atomics.
template <class T, int HEAD_DIM>
void run_plain_pair(Executor& to, Params p) {
  using Queries = QueryGradientTile<HEAD_DIM>;
  using Keys = KeyGradientTile<HEAD_DIM>;
  const TileCount queries = query_tiles(p.p, p.ptr, Queries::BLOCK_M);
  const TileCount keys = key_tiles(p.p, p.ptr, Keys::BLOCK_M);
  p.splits = p.pack = 1;
  p.m_tiles = queries.of_head, p.n_tiles = keys.of_head;
  if (p.ptr.dq)
    launch(to, kernel_name<T>("sm80::backward_dq_plain", HEAD_DIM), grid_of(queries.all),
           Queries::THREADS, Queries::SMEM, p);
  if (p.ptr.dk || p.ptr.dv)
    launch(to, kernel_name<T>("sm80::backward_dkdv_plain", HEAD_DIM), grid_of(keys.all),
           Keys::THREADS, Keys::SMEM, p);
}

template <class T, int HEAD_DIM>
void run_bias_gradient(Executor& to, Params p) {
  using Tile = BackwardTile<T, HEAD_DIM>;
  p.splits = p.pack = 1;
  // of the bias, which has the rows and columns of the longest sequences
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
  const int added = p.dq_sums ? bias_gradient_of(p.p, p.ptr) : 0;
  if (p.ptr.dbias && !added) run_bias_gradient<T, HEAD_DIM>(to, p);
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
  // float32 has no kernel that masks before it scales
  const int bits = kIsHalf<T> || p.features ? p.features : kScale;
  const TileCount queries = query_tiles(p.p, p.ptr, Tile::BLOCK_M);
  const TileCount keys = key_tiles(p.p, p.ptr, Tile::BLOCK_M);
  p.splits = p.pack = 1;
  p.m_tiles = queries.of_head, p.n_tiles = keys.of_head;
  if (p.ptr.dq)
    launch(to, kernel_name<T>("sm80::backward_dq", HEAD_DIM, bits), grid_of(queries.all),
           Tile::THREADS, smem, p);
  const Grid grid = grid_of(keys.all);
  constexpr bool TWO = kTwoPasses<T, HEAD_DIM>;
  for (p.pass = 0; p.pass < (TWO ? 2 : 1); ++p.pass) {
    if (TWO ? !(p.pass ? p.ptr.dk : p.ptr.dv) : !p.ptr.dk && !p.ptr.dv) continue;
    launch(to, kernel_name<T>("sm80::backward_dkdv", HEAD_DIM, bits), grid, Tile::THREADS, smem, p);
  }
}

}  // namespace attn::cuda::sm80
