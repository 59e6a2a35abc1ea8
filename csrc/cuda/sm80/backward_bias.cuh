// dBias = dS summed over the dimensions in which the bias was broadcast.  One CTA owns a tile of
// the bias and visits, in a fixed order, every tile of the problem that was added from it: all
// batches, heads, query tiles or key tiles where that dimension is broadcast.  The sum stays in its
// fragments, so there are no atomics, and S and dP are computed once more.
#pragma once
#include "backward.cuh"

namespace attn::cuda::sm80 {

// Indices [first, last) of a dimension that a CTA sums over: all of a broadcast one, else its own.
struct Span {
  int first, last;
  ATTN_DEVICE static Span take(int& x, bool broadcast, int count) {
    if (broadcast) return {0, count};
    const int at = x % count;
    x /= count;
    return {at, at + 1};
  }
};

// total [16, BLOCK_N] a warp -> dBias.  A sum over keys goes through the quad, one over queries
// through the lanes of a column and then through shared memory over the warps.
template <int WARPS, int TILES>
ATTN_DEVICE void store_bias_gradient(const Params& p, float (&total)[TILES][4], float* out, int m0,
                                     int n0, bool by_query, bool by_key, uint32_t sums) {
  const int lane = lane_id(), g = lane >> 2, t = lane & 3;
  if (!by_key) {  // column 0 of each row: the sum of the row
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = 0.0f;
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n) sum += total[n][2 * r] + total[n][2 * r + 1];
      sum = quad_sum(sum);
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n) total[n][2 * r] = total[n][2 * r + 1] = 0.0f;
      total[0][2 * r] = t == 0 ? sum : 0.0f;
    }
  }
  if (!by_query) {  // row 0 of warp 0: the sums of the columns
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) {
      ATTN_UNROLL
      for (int c = 0; c < 2; ++c) {
        float sum = total[n][c] + total[n][c + 2];
        sum += shfl_xor(sum, 4);
        sum += shfl_xor(sum, 8);
        sum += shfl_xor(sum, 16);
        if (g == 0) sts_f32(sums + 4 * (warp_id() * 8 * TILES + 8 * n + 2 * t + c), sum);
      }
    }
    sync_threads();  // the sums of every warp are there
    for (int n = thread_id(); n < (by_key ? 8 * TILES : 1); n += 32 * WARPS) {
      float sum = 0.0f;
      for (int w = 0; w < WARPS; ++w) sum += lds_f32(sums + 4 * (w * 8 * TILES + n));
      if (n0 + n < int(p.p.seqlen_k)) out[(n0 + n) * p.p.dbias.k] = sum;
    }
    return;
  }
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) {
    ATTN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int i = m0 + 16 * warp_id() + g + 8 * (c >> 1), j = n0 + 8 * n + 2 * t + (c & 1);
      if (i < int(p.p.seqlen_q) && j < int(p.p.seqlen_k) && (by_key || j == 0))
        out[i * p.p.dbias.q + j * p.p.dbias.k] = total[n][c];
    }
  }
}

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((BackwardTile<T, HEAD_DIM>::THREADS), 1)
void backward_bias(ATTN_GRID_CONSTANT const Params p) {
  using Tile = BackwardTile<T, HEAD_DIM>;
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES, N = Tile::BLOCK_N, TILES = N / 8;
  const uint32_t Q_smem = smem_base(), dO_smem = Q_smem + Tile::BLOCK_M * BYTES;
  const uint32_t K_smem = dO_smem + Tile::BLOCK_M * BYTES, V_smem = K_smem + N * BYTES;
  const uint32_t sums = V_smem + N * BYTES;

  int x = block_id().x;
  const bool by_key = p.p.dbias.k != 0, by_query = p.p.dbias.q != 0;
  const Span keys = Span::take(x, !by_key, p.n_tiles);
  const Span queries = Span::take(x, !by_query, p.m_tiles);
  const Span heads = Span::take(x, p.p.dbias.h == 0, int(p.p.heads_q));
  const Span batches = Span::take(x, p.p.dbias.b == 0, int(p.p.batch));

  float total[TILES][4] = {};
  for (int b = batches.first; b < batches.last; ++b) {
    const Sequence seq = Sequence::of<BITS>(p, b);
    const Score score(p, seq);
    const Dropout dropout = Dropout::of(p, seq);
    for (int h = heads.first; h < heads.last; ++h) {
      const Rows Q = query_rows(p, seq, p.ptr.q, p.p.q, h, sizeof(T));
      const Rows dO = query_rows(p, seq, p.ptr.dout, p.p.dout, h, sizeof(T));
      const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, h / p.group, sizeof(T));
      const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, h / p.group, sizeof(T));
      for (int m = queries.first; m < queries.last; ++m) {
        const int m0 = m * Tile::BLOCK_M, m1 = min_int(m0 + Tile::BLOCK_M, seq.seqlen_q);
        int lo, hi;
        score.band.key_range(m0, m1, seq.seqlen_k, lo, hi);
        const int row = m0 + 16 * warp_id() + (lane_id() >> 2);
        for (int n = keys.first; n < keys.last; ++n) {
          const int n0 = n * N;
          if (m0 >= m1 || n0 >= hi || n0 + N <= lo) continue;  // the same for all threads
          sync_threads();  // every warp is done with the tiles before
          copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, false>(Q_smem, Q, m0, m1,
                                                                      int(p.p.head_dim), p.q_vec);
          copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, false>(
              dO_smem, dO, m0, m1, int(p.p.head_dim_v), p.dout_vec);
          copy_tile<T, HEAD_DIM, N, Tile::THREADS, false>(K_smem, K, n0, seq.seqlen_k,
                                                          int(p.p.head_dim), p.k_vec);
          copy_tile<T, HEAD_DIM, N, Tile::THREADS, false>(V_smem, V, n0, seq.seqlen_k,
                                                          int(p.p.head_dim_v), p.v_vec);
          cp_async_commit();
          cp_async_wait<0>();
          sync_threads();  // the tiles are complete
          if (m0 + 16 * warp_id() >= m1) continue;

          float S[TILES][4], dP[TILES][4];
          multiply<T, HEAD_DIM, TILES>(S, Q_smem, 16 * warp_id(), K_smem);
          multiply<T, HEAD_DIM, TILES>(dP, dO_smem, 16 * warp_id(), V_smem);
          ATTN_UNROLL
          for (int r = 0; r < 2; ++r) {
            const Query q = score.query(h, row + 8 * r);
            const RowGradient gradient = RowGradient::of<true>(p, seq, h, row + 8 * r);
            ATTN_UNROLL
            for (int tile = 0; tile < TILES; ++tile) {
              ATTN_UNROLL
              for (int c = 2 * r; c < 2 * r + 2; ++c) {
                const int j = n0 + 8 * tile + 2 * (lane_id() & 3) + (c & 1);
                total[tile][c] += pair_gradient<BITS>(score, dropout, q, j, gradient, true,
                                                      S[tile][c], dP[tile][c]);
              }
            }
          }
        }
      }
    }
  }
  sync_threads();  // the tiles' memory is free
  float* out =
      static_cast<float*>(p.ptr.dbias) + batches.first * p.p.dbias.b + heads.first * p.p.dbias.h;
  store_bias_gradient<Tile::WARPS, TILES>(p, total, out, queries.first * Tile::BLOCK_M,
                                          keys.first * N, by_query, by_key, sums);
}

}  // namespace attn::cuda::sm80
