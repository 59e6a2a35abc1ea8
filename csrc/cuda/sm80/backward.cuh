// dK, dV and dQ by recomputation from LSE (FlashAttention-2, Dao 2023), in two kernels without
// atomics, so that a result never depends on the order of CTAs:
//   backward_dkdv  a CTA owns BLOCK_M keys of one K/V head and streams the queries of its group:
//                  S^T = K Q^T, dP^T = V dO^T, dV += P^T dO, dK += dS^T Q
//   backward_dq    a CTA owns BLOCK_M queries and streams the keys:
//                  S = Q K^T, dP = dO V^T, dQ += dS K
// with P = exp(S - LSE), dS = P * (dP - delta), delta = rowsum(dO * O) - dLSE.  The streamed index
// is always the column of a fragment, so P and dS go from registers straight into the second
// product (mma.cuh).  For float32, for features, and in 16 bits for heads of more than 128 columns;
// other plain calls have backward_plain.cuh.
#pragma once
#include "../backward_parts.cuh"
#include "../repair.cuh"
#include "forward.cuh"

namespace attn::cuda::sm80 {

// One pair: product and dP in; P (as it weighs V) and dS (as it reaches the product) out.  Returns
// dS before softcap, the gradient of the bias.
template <int BITS>
ATTN_DEVICE float pair_gradient(const Score& score, const Dropout& dropout, const Query& q, int j,
                                const RowGradient& row, bool check, float& product, float& dP) {
  const Params& p = score.p;
  float derivative = 1.0f, P;
  if constexpr (BITS != 0) {
    const float s = score.template logit<BITS>(product, q, j, derivative);
    P = s == -kInf ? 0.0f : exp2_approx(s - row.lse);
  } else {
    P = exp2_approx(fmaf(product, p.scale_log2, -row.lse));
    if (check && !(j < score.seq.seqlen_k && q.i < score.seq.seqlen_q && score.band.keep(q.i, j)))
      P = 0.0f;
  }
  float weight = 1.0f;
  if (has<BITS>(p, kDropout)) weight = dropout.keep(q.h, q.i, j) ? p.keep_scale : 0.0f;
  // not P * (..) where P = 0: V of an excluded key may hold NaN
  // and not 0 * dP: V of a key that dropout drops may hold NaN
  const float passed = may_have<BITS>(kDropout) && weight == 0.0f ? 0.0f : dP * weight;
  const float dS = P == 0.0f ? 0.0f : P * (passed - row.delta);
  // nor 0 * P of a row of NaN
  product = may_have<BITS>(kDropout) && weight == 0.0f ? 0.0f : P * weight;
  dP = P == 0.0f ? 0.0f : dS * derivative;
  return dS;
}

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((BackwardTile<T, HEAD_DIM>::THREADS), 1)
void backward_dq(ATTN_GRID_CONSTANT const Params p) {
  using Tile = BackwardTile<T, HEAD_DIM>;
  constexpr bool GENERAL = BITS != 0;
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES, N = Tile::BLOCK_N, TILES = N / 8;
  const uint32_t Q_smem = smem_base(), dO_smem = Q_smem + Tile::BLOCK_M * BYTES;
  const uint32_t K_smem = dO_smem + Tile::BLOCK_M * BYTES;
  const uint32_t V_smem = K_smem + Tile::STAGES * N * BYTES;
  const uint32_t flags = V_smem + Tile::STAGES * N * BYTES;

  const QueryTask task = QueryTask::of<BITS>(p, Tile::BLOCK_M);
  if (task.row0 < 0) return;  // packed: a number that stands for no tile
  const Sequence& seq = task.seq;
  const Score score(p, seq);
  const Dropout dropout = Dropout::of(p, seq);
  int lo, hi;
  score.band.key_range(task.row0, task.end, seq.seqlen_k, lo, hi);
  const int t0 = lo / N, t1 = hi > lo ? ceil_div(hi, N) : t0;

  const int row = task.row0 + 16 * warp_id() + (lane_id() >> 2);
  const bool active = task.row0 + 16 * warp_id() < seq.seqlen_q;
  Query query[2];
  RowGradient gradient[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    query[r] =
        GENERAL ? score.query(task.head, row + 8 * r) : Query{row + 8 * r, task.head, 0.0f, 0, 0};
    gradient[r] = RowGradient::of<may_have<BITS>(kBias)>(p, seq, task.head, row + 8 * r);
  }

  const Rows Q = query_rows(p, seq, p.ptr.q, p.p.q, task.head, sizeof(T));
  const Rows dO = query_rows(p, seq, p.ptr.dout, p.p.dout, task.head, sizeof(T));
  const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, task.head / p.group, sizeof(T));
  const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, task.head / p.group, sizeof(T));
  const int dim = int(p.p.head_dim), dim_v = int(p.p.head_dim_v);
  auto copy_keys = [&](int t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, false>(K_smem + stage, K, t * N, seq.seqlen_k, dim,
                                                    p.k_vec);
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, false>(V_smem + stage, V, t * N, seq.seqlen_k, dim_v,
                                                    p.v_vec);
    cp_async_commit();
  };

  float dQ[HEAD_DIM / 8][4] = {};
  copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, false>(Q_smem, Q, task.row0, task.end, dim,
                                                              p.q_vec);
  copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, false>(dO_smem, dO, task.row0, task.end,
                                                              dim_v, p.dout_vec);
  if (t0 < t1) copy_keys(t0);
  for (int t = t0; t < t1; ++t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    const int n0 = t * N;
    cp_async_wait<0>();
    sync_threads();  // tile t is complete, and every warp is done with the buffer of t - 1
    if (Tile::STAGES > 1 && t + 1 < t1) copy_keys(t + 1);
    const bool check = n0 + N > seq.seqlen_k || !score.band.full(task.row0, task.end, n0, n0 + N);

    float S[TILES][4], dS[TILES][4];
    if (active) {
      // S = Q K^T, dP = dO V^T   [16, BLOCK_N] a warp
      multiply<T, HEAD_DIM, TILES>(S, Q_smem, 16 * warp_id(), K_smem + stage);
      multiply<T, HEAD_DIM, TILES>(dS, dO_smem, 16 * warp_id(), V_smem + stage);
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n) {
        ATTN_UNROLL
        for (int c = 0; c < 4; ++c)
          pair_gradient<BITS>(score, dropout, query[c >> 1],
                              n0 + 8 * n + 2 * (lane_id() & 3) + (c & 1), gradient[c >> 1], check,
                              S[n][c], dS[n][c]);
      }
    }
    // dQ += dS K   [16, D] a warp.  A NaN in K is already in dS of who sees it.
    const bool bad = (GENERAL || check) &&
                     tile_has_nonfinite<T, HEAD_DIM, N, Tile::WARPS>(K_smem + stage, flags);
    accumulate_visible<T, HEAD_DIM, TILES, Tile::THREADS, false>(
        dQ, dS, K_smem + stage, K, n0, seq.seqlen_k, dim, bad, true, active);
    if (Tile::STAGES == 1 && t + 1 < t1) {
      sync_threads();  // every warp has read K and V
      copy_keys(t + 1);
    }
  }
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  const bool bad = !GENERAL && warp_finds_nan(dQ);
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    if (row + 8 * r >= seq.seqlen_q) continue;
    const int64_t at =
        seq.b * p.p.dq.b + task.head * p.p.dq.h + (seq.q_start + row + 8 * r) * p.p.dq.s;
    store_result<T, BITS>(p, p.ptr.dq, at, dQ, r, p.scale, dim);
  }
  if (bad)
    each_row(task.row0 + 16 * warp_id(), seq.seqlen_q,
             [&](int i) { Repair<T, HEAD_DIM>{p, seq}.query_gradient(task.head, i); });
}

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((BackwardTile<T, HEAD_DIM>::THREADS), 1)
void backward_dkdv(ATTN_GRID_CONSTANT const Params p) {
  using Tile = BackwardTile<T, HEAD_DIM>;
  constexpr bool GENERAL = BITS != 0;
  constexpr bool WIDE = kTwoPasses<T, HEAD_DIM>;
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES, N = Tile::BLOCK_N, TILES = N / 8;
  const uint32_t K_smem = smem_base(), V_smem = K_smem + Tile::BLOCK_M * BYTES;
  const uint32_t Q_smem = V_smem + Tile::BLOCK_M * BYTES;
  const uint32_t dO_smem = Q_smem + Tile::STAGES * N * BYTES;
  const uint32_t flags = dO_smem + Tile::STAGES * N * BYTES;
  const uint32_t rows_smem = flags + Tile::FLAG_BYTES;  // [STAGES][LSE, delta][BLOCK_N]

  const TileOf x = key_numbers(p, Tile::BLOCK_M).find(block_id().x);
  const Sequence seq = Sequence::of<BITS>(p, x.b);
  const int head_k = x.head;
  const int n0 = x.tile * Tile::BLOCK_M, n1 = min_int(n0 + Tile::BLOCK_M, seq.seqlen_k);
  if (n0 >= seq.seqlen_k) return;  // a shorter cache, or packed: a number that stands for no tile
  const Score score(p, seq);
  const Dropout dropout = Dropout::of(p, seq);
  int lo, hi;
  score.band.query_range(n0, n1, seq.seqlen_q, lo, hi);
  const int t0 = lo / N, per_head = hi > lo ? ceil_div(hi, N) - t0 : 0, last = per_head * p.group;

  const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, head_k, sizeof(T));
  const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, head_k, sizeof(T));
  const int dim = int(p.p.head_dim), dim_v = int(p.p.head_dim_v);
  auto q_rows = [&](int h) { return query_rows(p, seq, p.ptr.q, p.p.q, h, sizeof(T)); };
  auto dout_rows = [&](int h) { return query_rows(p, seq, p.ptr.dout, p.p.dout, h, sizeof(T)); };
  auto copy_queries = [&](int u) {
    const uint32_t stage = uint32_t(u % Tile::STAGES) * N * BYTES;
    const int h = head_k * p.group + u / per_head, m0 = (t0 + u % per_head) * N;
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, false>(Q_smem + stage, q_rows(h), m0, seq.seqlen_q,
                                                    dim, p.q_vec);
    copy_tile<T, HEAD_DIM, N, Tile::THREADS, false>(dO_smem + stage, dout_rows(h), m0, seq.seqlen_q,
                                                    dim_v, p.dout_vec);
    if (thread_id() < 2 * N) {
      const float* from = thread_id() < N ? static_cast<const float*>(p.ptr.lse) : p.delta;
      const int i = m0 + thread_id() % N;
      const bool valid = i < seq.seqlen_q;
      cp_async_4(rows_smem + 4 * (2 * N * (u % Tile::STAGES) + thread_id()),
                 valid ? from + seq.lse_offset(p, h, i) : from, valid);
    }
    cp_async_commit();
  };

  const int row = n0 + 16 * warp_id() + (lane_id() >> 2);
  const bool active = n0 + 16 * warp_id() < seq.seqlen_k;
  float dV[HEAD_DIM / 8][4] = {};  // when WIDE: of whichever this pass is for
  float dK[WIDE ? 1 : HEAD_DIM / 8][4] = {};
  copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, false>(K_smem, K, n0, n1, dim, p.k_vec);
  copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, false>(V_smem, V, n0, n1, dim_v, p.v_vec);
  if (last > 0) copy_queries(0);
  for (int u = 0; u < last; ++u) {
    const uint32_t stage = uint32_t(u % Tile::STAGES) * N * BYTES;
    const int h = head_k * p.group + u / per_head, m0 = (t0 + u % per_head) * N;
    cp_async_wait<0>();
    sync_threads();  // tile u is complete, and every warp is done with the buffer of u - 1
    if (Tile::STAGES > 1 && u + 1 < last) copy_queries(u + 1);
    const bool check = m0 + N > seq.seqlen_q || !score.band.full(m0, m0 + N, n0, n1);

    float P[TILES][4], dS[TILES][4];
    if (active) {
      // S^T = K Q^T, dP^T = V dO^T   [16, BLOCK_N] a warp
      multiply<T, HEAD_DIM, TILES>(P, K_smem, 16 * warp_id(), Q_smem + stage);
      multiply<T, HEAD_DIM, TILES>(dS, V_smem, 16 * warp_id(), dO_smem + stage);
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n) {
        ATTN_UNROLL
        for (int c = 0; c < 2; ++c) {
          const int column = 8 * n + 2 * (lane_id() & 3) + c, i = m0 + column;
          const Query q = GENERAL ? score.query(h, i) : Query{i, h, 0.0f, 0, 0};
          const uint32_t at = rows_smem + 4 * (2 * N * (u % Tile::STAGES) + column);
          const RowGradient gradient =
              RowGradient::of<may_have<BITS>(kBias)>(lds_f32(at), lds_f32(at + 4 * N));
          ATTN_UNROLL
          for (int r = 0; r < 2; ++r)
            pair_gradient<BITS>(score, dropout, q, row + 8 * r, gradient, check, P[n][2 * r + c],
                                dS[n][2 * r + c]);
        }
      }
    }
    // dV += P^T dO, dK += dS^T Q   [16, D] a warp
    const bool suspect = GENERAL || check;
    const bool bad_dout =
        suspect && tile_has_nonfinite<T, HEAD_DIM, N, Tile::WARPS>(dO_smem + stage, flags);
    const bool bad_q =
        suspect && tile_has_nonfinite<T, HEAD_DIM, N, Tile::WARPS>(Q_smem + stage, flags + 64);
    if constexpr (WIDE) {
      if (p.pass) {
        ATTN_UNROLL
        for (int n = 0; n < TILES; ++n) ATTN_UNROLL
        for (int c = 0; c < 4; ++c) P[n][c] = dS[n][c];
      }
      accumulate_visible<T, HEAD_DIM, TILES, Tile::THREADS, false>(
          dV, P, (p.pass ? Q_smem : dO_smem) + stage, p.pass ? q_rows(h) : dout_rows(h), m0,
          seq.seqlen_q, p.pass ? dim : dim_v, p.pass ? bad_q : bad_dout, p.pass, active);
    } else {
      accumulate_visible<T, HEAD_DIM, TILES, Tile::THREADS, false>(
          dV, P, dO_smem + stage, dout_rows(h), m0, seq.seqlen_q, dim_v, bad_dout, false, active);
      accumulate_visible<T, HEAD_DIM, TILES, Tile::THREADS, false>(
          dK, dS, Q_smem + stage, q_rows(h), m0, seq.seqlen_q, dim, bad_q, true, active);
    }
    if (Tile::STAGES == 1 && u + 1 < last) {
      sync_threads();  // every warp has read Q and dO
      copy_queries(u + 1);
    }
  }
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  bool bad = !GENERAL && warp_finds_nan(dV);
  if constexpr (!WIDE) bad = bad || (!GENERAL && warp_finds_nan(dK));
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int j = row + 8 * r;
    if (j >= seq.seqlen_k) continue;
    const int64_t at_k = seq.b * p.p.dk.b + head_k * p.p.dk.h + (seq.k_start + j) * p.p.dk.s;
    const int64_t at_v = seq.b * p.p.dv.b + head_k * p.p.dv.h + (seq.k_start + j) * p.p.dv.s;
    if constexpr (WIDE) {
      store_result<T, BITS>(p, p.pass ? p.ptr.dk : p.ptr.dv, p.pass ? at_k : at_v, dV, r,
                            p.pass ? p.scale : 1.0f, p.pass ? dim : dim_v);
    } else {
      if (p.ptr.dv) store_result<T, BITS>(p, p.ptr.dv, at_v, dV, r, 1.0f, dim_v);
      if (p.ptr.dk) store_result<T, BITS>(p, p.ptr.dk, at_k, dK, r, p.scale, dim);
    }
  }
  if (bad)
    each_row(n0 + 16 * warp_id(), seq.seqlen_k, [&](int j) {
      Repair<T, HEAD_DIM>{p, seq}.key_gradients(head_k, j, !WIDE || p.pass, !WIDE || !p.pass);
    });
}

}  // namespace attn::cuda::sm80
