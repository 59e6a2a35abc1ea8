// What the Hopper backward kernels share: from products to P and dS, on the fragments of a consumer
// warpgroup (mma.cuh).
//   P = exp2(scale_log2 * S - LSE), 0 where the pair does not count;  dS = P * (dP - delta)
#pragma once
#include "../backward_parts.cuh"
#include "parts.cuh"

namespace attn::cuda::sm90 {

// The columns of a fragment's row that count, lo <= column < hi, from the range that the band
// gives.
struct Columns {
  int lo, hi;

  // Queries m0.. of key j.
  ATTN_DEVICE static Columns of_key(const Score& score, int j, int m0) {
    int lo, hi;
    score.band.query_range(j, j + 1, score.seq.seqlen_q, lo, hi);
    return {lo - m0, j < score.seq.seqlen_k ? hi - m0 : lo - m0};
  }
  // Keys n0.. of query i.
  ATTN_DEVICE static Columns of_query(const Score& score, int i, int n0) {
    int lo, hi;
    score.band.key_range(i, i + 1, score.seq.seqlen_k, lo, hi);
    return {lo - n0, i < score.seq.seqlen_q ? hi - n0 : lo - n0};
  }
};

// P of rows g and g + 8: 0 where the pair does not count.
template <int TILES>
ATTN_DEVICE void mask_weights(float (&P)[TILES][4], const Columns (&rows)[2]) {
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int t = 2 * (lane_id() & 3), lo = rows[r].lo - t, hi = rows[r].hi - t;
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) ATTN_UNROLL
    for (int c = 0; c < 2; ++c)
      P[n][2 * r + c] = (8 * n + c >= lo) & (8 * n + c < hi) ? P[n][2 * r + c] : 0.0f;
  }
}
// Some pair of queries [i0, i1) and keys [j0, j1) does not count.
ATTN_DEVICE bool has_edge(const Score& score, int i0, int i1, int j0, int j1) {
  return i1 > score.seq.seqlen_q || j1 > score.seq.seqlen_k || !score.band.full(i0, i1, j0, j1);
}

// The tiles of block_m queries whose every pair with keys [j0, j1) counts: those whose first query
// is lo .. hi.
struct WholeTiles {
  int lo, hi;

  ATTN_DEVICE static WholeTiles of(const Score& score, int j0, int j1, int block_m) {
    const Band& band = score.band;
    if (j1 > score.seq.seqlen_k) return {0, -1};
    const int end = band.left < 0 ? score.seq.seqlen_q
                                  : min_int(score.seq.seqlen_q, j0 - band.diagonal + band.left + 1);
    return {band.right < 0 ? 0 : max_int(0, j1 - 1 - band.diagonal - band.right), end - block_m};
  }
  ATTN_DEVICE bool has(int m0) const { return m0 >= lo && m0 <= hi; }
};

ATTN_DEVICE float weight_of(float product, float scale_log2, float lse) {
  return exp2_approx(fmaf(product, scale_log2, -lse));
}
// EDGE: not P * (..) where P = 0, since V of an excluded key may hold NaN.  In a tile whose every
// pair counts only a logit of -inf is excluded, and a NaN beside that is mended by repair.cuh.
template <bool EDGE>
ATTN_DEVICE float gradient_of(float P, float dP, float delta) {
  return EDGE && P == 0.0f ? 0.0f : P * (dP - delta);
}

}  // namespace attn::cuda::sm90
