// C = A B^T.  A [grid.x * 64, K], B [grid.y * 32, K] (K a multiple of 32), C [M, N] fp32,
// row-major. The smallest kernel that uses every step of an attention kernel: double-buffered
// cp.async copies, an XOR swizzle, ldmatrix, mma.  One CTA = 4 warps = 64 x 32 of C; warp w owns
// rows 16 w..16 w + 15.
#pragma once
#include "../../cuda/ptx.cuh"

namespace attn::example {
using namespace ptx;

constexpr int BLOCK_M = 64, BLOCK_N = 32, BLOCK_K = 32, THREADS = 128;
constexpr int TILE_BYTES = (BLOCK_M + BLOCK_N) * BLOCK_K * 2, SMEM_BYTES = 2 * TILE_BYTES;

struct Params {
  const void* A;  // [M, K] of T
  const void* B;  // [N, K] of T
  float* C;       // [M, N]
  int M, N, K;
};

// A tile row is 64 bytes = 4 chunks of 16; two rows share 128 bytes of banks, hence row / 2.
ATTN_DEVICE uint32_t swizzle(int row, int chunk) {
  return uint32_t(row * 64 + ((chunk ^ ((row >> 1) & 3)) << 4));
}

template <class T>
ATTN_DEVICE void copy_tile(uint32_t smem, const void* gmem, int rows, int row0, int limit, int k0,
                           int K) {
  for (int i = thread_id(); i < rows * 4; i += THREADS) {
    const int row = i / 4, chunk = i % 4;
    const bool valid = row0 + row < limit;
    const T* src = static_cast<const T*>(gmem) + (valid ? int64_t(row0 + row) * K : 0);
    cp_async_16(smem + swizzle(row, chunk), src + k0 + chunk * 8, valid);
  }
}

template <class T>
ATTN_KERNEL(THREADS)
void gemm(ATTN_GRID_CONSTANT const Params p) {
  const int lane = lane_id(), warp = warp_id(), m0 = block_id().x * BLOCK_M,
            n0 = block_id().y * BLOCK_N;
  auto copy_stage = [&](int step) {
    const uint32_t stage = smem_base() + (step & 1) * TILE_BYTES;
    copy_tile<T>(stage, p.A, BLOCK_M, m0, p.M, step * BLOCK_K, p.K);
    copy_tile<T>(stage + BLOCK_M * 64, p.B, BLOCK_N, n0, p.N, step * BLOCK_K, p.K);
  };
  float acc[BLOCK_N / 8][4] = {};
  const int steps = p.K / BLOCK_K;
  copy_stage(0);
  cp_async_commit();
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) copy_stage(step + 1);
    cp_async_commit();
    cp_async_wait<1>();
    sync_threads();  // the copies of all threads for this step have landed
    const uint32_t A_smem = smem_base() + (step & 1) * TILE_BYTES, B_smem = A_smem + BLOCK_M * 64;
#pragma unroll
    for (int k = 0; k < BLOCK_K / 16; ++k) {
      uint32_t a[4];  // A [16, 16]: tiles (rows 0-7, k 0-7), (8-15, 0-7), (0-7, 8-15), (8-15, 8-15)
      ldmatrix_x4(a, A_smem + swizzle(warp * 16 + (lane & 15), k * 2 + (lane >> 4)));
#pragma unroll
      for (int n = 0; n < BLOCK_N / 16; ++n) {
        uint32_t b[4];  // B [16 n, 16 k]: tiles (n 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), ...
        ldmatrix_x4(b, B_smem + swizzle(n * 16 + (lane & 7) + ((lane >> 4) << 3),
                                        k * 2 + ((lane >> 3) & 1)));
        mma_m16n8k16<T>(acc[2 * n], a, b[0], b[1]);
        mma_m16n8k16<T>(acc[2 * n + 1], a, b[2], b[3]);
      }
    }
    sync_threads();  // all warps have read this stage before the next copy overwrites it
  }
  for (int n = 0; n < BLOCK_N / 8; ++n) {
    for (int i = 0; i < 4; ++i) {
      const int row = m0 + warp * 16 + lane / 4 + (i >> 1) * 8;
      const int col = n0 + n * 8 + 2 * (lane % 4) + (i & 1);
      if (row < p.M && col < p.N) p.C[int64_t(row) * p.N + col] = acc[n][i];
    }
  }
}

}  // namespace attn::example
