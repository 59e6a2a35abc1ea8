// The bf16 kernels of one PART (mutant.h), with KERNELS_GENERAL those of backward on sm_80 that
// know every feature.
#include <vector>

#include "../kernels.h"
#include "mutant.h"
#include "../../cuda/tile_counts.h"
#if PART_HERE == 0
#include "example.cuh"
#elif PART_HERE == 1
#include "../../cuda/sm80/forward.cuh"
#elif PART_HERE == 7
#include "../../cuda/sm80/forward_plain.cuh"
#elif PART_HERE == 8
#include "../../cuda/sm80/kernels.cuh"
#include "../../cuda/sm80/launches.h"
#elif PART_HERE >= 3
#include "../../cuda/sm90/kernels.cuh"
#include "../../cuda/sm90/launches.h"
#else
#include "../../cuda/sm80/backward.cuh"
#endif
#ifndef KERNELS_GENERAL
#define KERNELS_GENERAL false
#endif

namespace attn::planted {

using namespace ptx;
#if PART_HERE == 5
constexpr int D = 192;
#else
constexpr int D = PART_HERE >= 3 && PART_HERE <= 6 || PART_HERE == 8 ? 128 : 64;
#endif
extern const int PART = PART_HERE, HEAD_DIM = D;

#if PART_HERE == 0
void run_example(const bf16* A, const bf16* B, float* C, int m, int n, int k) {
  using namespace example;
  launch(gemm<bf16>, {2, 2, 1}, THREADS, SMEM_BYTES, nullptr, Params{A, B, C, m, n, k});
}
void run_kernels(cuda::Params) {}
#else
void run_example(const bf16*, const bf16*, float*, int, int, int) {}
void run_kernels(cuda::Params p) {
  using namespace cuda;
  [[maybe_unused]] emulation::Device device;
  [[maybe_unused]] const emulation::Enlist enlist;
#if PART_HERE == 1
  using Tile = ForwardTile<bf16, D>;
  const TileCount tiles = query_tiles(p.p, p.ptr, Tile::BLOCK_M);
  p.m_tiles = tiles.of_head;
  launch(sm80::forward_general<bf16, D, kAny>, {int(tiles.all), 1, 1}, Tile::THREADS,
         Tile::forward_smem(Row<bf16, D>::BYTES), nullptr, p);
#elif PART_HERE == 7
  using Tile = PlainForwardTile<D>;
  const TileCount tiles = query_tiles(p.p, p.ptr, Tile::BLOCK_M);
  p.m_tiles = tiles.of_head;
  launch(sm80::forward_plain<bf16, D>, {int(tiles.all), 1, 1}, Tile::THREADS,
         Tile::smem(Row<bf16, D>::BYTES), nullptr, p);
#elif PART_HERE == 2
  using Tile = BackwardTile<bf16, D>;
  const int smem = Tile::backward_smem(Row<bf16, D>::BYTES);
  const TileCount queries = query_tiles(p.p, p.ptr, Tile::BLOCK_M);
  const TileCount keys = key_tiles(p.p, p.ptr, Tile::BLOCK_M);
  p.m_tiles = queries.of_head, p.n_tiles = keys.of_head;
  launch(sm80::backward_dq < bf16, D, KERNELS_GENERAL ? kAny : 0 >, {int(queries.all), 1, 1},
         Tile::THREADS, smem, nullptr, p);
  launch(sm80::backward_dkdv < bf16, D, KERNELS_GENERAL ? kAny : 0 >, {int(keys.all), 1, 1},
         Tile::THREADS, smem, nullptr, p);
#elif PART_HERE == 8
  std::vector<float> sums(sum_tiles(p.p, p.ptr).all * 64 * D + 4, NAN);
  p.dq_sums = sums.data() + (16 - reinterpret_cast<uintptr_t>(sums.data()) % 16) % 16 / 4;
  p.fused_block_m = 64;
  sm80::each_backward<bf16, D>(enlist);
  sm80::run_backward<bf16, D>(device, p, false);
#elif PART_HERE == 3
  sm90::each_forward<bf16, D>(enlist);
  int counter = 7;  // whatever was there
  const int tiles = int(sm90::forward_tiles(p.p, p.ptr).all);
  // Two CTAs for all tiles.
  sm90::run_forward<bf16, D>(device, p, {2, 1 << 18, tiles > 2 ? &counter : nullptr});
#else
#if PART_HERE == 6
  std::vector<float> sums(sm90::query_sums(p.p, p.ptr) + 4, NAN);
  p.dq_sums = sums.data() + (16 - reinterpret_cast<uintptr_t>(sums.data()) % 16) % 16 / 4;
#endif
  sm90::each_backward<bf16, D>(enlist);
  sm90::run_backward<bf16, D>(device, p);
#endif
}
#endif

}  // namespace attn::planted
