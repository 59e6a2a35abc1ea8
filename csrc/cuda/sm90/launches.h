// The launches of one (dtype, HEAD_DIM) pair on Hopper.  Host code.
#pragma once
#include "../launches.h"
#include "kernels.h"

namespace attn::cuda::sm90 {

// What the forward is told of the device, and of the call's workspace.
struct ForwardPlace {
  int multiprocessors = 1;
  int64_t l2_bytes = 0;
  int* counter = nullptr;  // of forward_workspace(); null: a CTA a tile
};

// Heads of queries whose keys and values are read from memory once: half of the L2 cache holds
// them, since on Hopper each half of the chip may keep its own copy.
inline int section_heads(const Problem& p, int64_t l2_bytes) {
  const int64_t bytes = 2 * p.seqlen_k * (p.head_dim + p.head_dim_v);
  const int64_t heads = std::max<int64_t>(1, l2_bytes / 2 / std::max<int64_t>(1, bytes));
  return int(std::min(p.batch * p.heads_q, heads * (p.heads_q / p.heads_k)));
}

// FOURS: rows of K and V in the order of fours.cuh.
template <class Tile, bool FOURS>
void launch_forward(Executor& to, std::string kernel, const Params& params,
                    const ForwardPlace& place) {
  const Problem& p = params.p;
  const auto keys = [](const TensorSpec& spec) { return FOURS ? in_fours(spec) : spec; };
  ForwardParams x{};
  static_assert(Tile::BLOCK_M == ForwardTile90<64>::BLOCK_M);  // as forward_tiles() counts
  static_assert(Tile::VALUE_SLABS <= Tile::SLABS);             // O is stored from where Q lay
  x.p = params;
  const TileCount tiles = forward_tiles(p, params.ptr);
  x.p.m_tiles = tiles.of_head;
  x.Q = to.tensor_map(query_spec(p, params.ptr, Tile::BLOCK_M));
  x.K = to.tensor_map(keys(key_spec(p, params.ptr, Tile::BLOCK_N)));
  x.V = to.tensor_map(keys(value_spec(p, params.ptr, Tile::BLOCK_N)));
  x.section = section_heads(p, place.l2_bytes);
  x.counter = place.counter;
  const TensorSpec out = out_spec(p, params.ptr, 64);
  x.stores_tiles = !p.part && !*tensor_problem(out);
  if (x.stores_tiles) x.O = to.tensor_map(out);
  if (x.counter) to.clear(x.counter, 1);
  launch(to, std::move(kernel), grid_of(x.counter ? place.multiprocessors : tiles.all), THREADS,
         Tile::SMEM, x);
}

// The forward of a plain call, or the one that knows its features.
template <class T, int HEAD_DIM, int VALUE_DIM>
void run_forward_of(Executor& to, const Params& params, const ForwardPlace& place) {
  using Tile = ForwardTile90<HEAD_DIM, VALUE_DIM>;
  if (params.features)
    launch_forward<Tile, true>(
        to, kernel_name<T>("sm90::forward_features", HEAD_DIM, VALUE_DIM, params.features), params,
        place);
  else
    launch_forward<Tile, false>(to, kernel_name<T>("sm90::forward", HEAD_DIM, VALUE_DIM), params,
                                place);
}
template <class T, int HEAD_DIM>
void run_forward(Executor& to, const Params& params, const ForwardPlace& place) {
  constexpr int NARROW = forward_value_dim(HEAD_DIM, 1);
  if (forward_value_dim(HEAD_DIM, params.p.head_dim_v) < HEAD_DIM)
    return run_forward_of<T, HEAD_DIM, NARROW>(to, params, place);
  run_forward_of<T, HEAD_DIM, HEAD_DIM>(to, params, place);
}

// dQ, dK, dV, each where its pointer is not null; p.delta is filled, p.dq_sums where query_sums().
template <class T, int HEAD_DIM>
void run_backward(Executor& to, const Params& params) {
  const Problem& p = params.p;
  const Pointers& ptr = params.ptr;
  // fours: rows of K and V in the order of fours.cuh.
  const auto maps = [&](int rows_q, int rows_k, bool fours = false) {
    const auto keys = [&](const TensorSpec& spec) { return fours ? in_fours(spec) : spec; };
    BackwardParams x{};
    x.p = params;
    x.p.m_tiles = query_tiles(p, ptr, rows_q).of_head;
    x.p.n_tiles = key_tiles(p, ptr, rows_k).of_head;
    x.Q = to.tensor_map(query_spec(p, ptr, rows_q));
    x.K = to.tensor_map(keys(key_spec(p, ptr, rows_k)));
    x.V = to.tensor_map(keys(value_spec(p, ptr, rows_k)));
    x.dO = to.tensor_map(dout_spec(p, ptr, rows_q));
    return x;
  };
  if constexpr (HEAD_DIM <= 128) {
    if (params.dq_sums) {
      using Tile = PlainFusedTile<HEAD_DIM>;
      const int bits = backward_features(p, ptr), others = bits & ~(kOrdered | kBiasGradient);
      BackwardParams x = maps(bits ? 64 : Tile::BLOCK_M, Tile::BLOCK_N);
      x.p.features |= bits;
      x.p.m_tiles = sum_tiles(p, ptr).of_head;
      const Grid tiles = grid_of(sum_tiles(p, ptr).all);
      launch(to, kernel_name<T>("sm90::clear_dq", HEAD_DIM), tiles, 128, 0, x.p);
      launch(to,
             bits ? kernel_name<T>("sm90::backward_features", HEAD_DIM, bits)
                  : kernel_name<T>("sm90::backward_fused", HEAD_DIM),
             grid_of(key_tiles(p, ptr, Tile::BLOCK_N).all), THREADS,
             bits ? SideRoom<HEAD_DIM>::SMEM : Tile::SMEM, x);
      if (!ptr.dq) return;
      return launch(to,
                    others ? kernel_name<T>("sm90::convert_dq_features", HEAD_DIM, others)
                           : kernel_name<T>("sm90::convert_dq", HEAD_DIM),
                    tiles, 128, 0, x.p);
    }
  }
  const int bits = HEAD_DIM > 128 ? backward_features(p, ptr) : 0;
  const auto name = [&](const char* plain, const char* features) {
    return bits ? kernel_name<T>(features, HEAD_DIM, bits) : kernel_name<T>(plain, HEAD_DIM);
  };
  if (ptr.dq) {
    using Tile = QueryGradientTile<HEAD_DIM>;
    const BackwardParams x = maps(Tile::BLOCK_M, Tile::BLOCK_N, bits != 0);
    launch(to, name("sm90::backward_dq", "sm90::backward_dq_features"),
           grid_of(query_tiles(p, ptr, Tile::BLOCK_M).all), THREADS, Tile::SMEM, x);
  }
  if (ptr.dk || ptr.dv) {
    using Tile = KeyGradientTile<HEAD_DIM>;
    const BackwardParams x = maps(Tile::BLOCK_M, Tile::BLOCK_N);
    launch(to, name("sm90::backward_dkdv", "sm90::backward_dkdv_features"),
           grid_of(key_tiles(p, ptr, Tile::BLOCK_N).all), THREADS,
           bits ? SideRoom<HEAD_DIM>::SMEM : Tile::SMEM, x);
  }
}

}  // namespace attn::cuda::sm90
