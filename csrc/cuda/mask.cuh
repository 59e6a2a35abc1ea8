// The band of causal and window attention: query i sees key j when
//   i + diagonal - left <= j <= i + diagonal + right,   each side only where it is not -1.
// keep(i, j) decides a pair, key_range / query_range the tiles worth visiting, full a whole tile.
#pragma once
#include "traits.cuh"

namespace attn::cuda {

struct Band {
  int left, right, diagonal;

  ATTN_DEVICE static Band of(const Params& p, const Sequence& s) {
    return {p.window_left, p.window_right, s.diagonal};
  }
  ATTN_DEVICE bool keep(int i, int j) const {
    return (left < 0 || j >= i + diagonal - left) && (right < 0 || j <= i + diagonal + right);
  }
  // Every query of [i0, i1) sees every key of [j0, j1).
  ATTN_DEVICE bool full(int i0, int i1, int j0, int j1) const {
    return (left < 0 || j0 >= i1 - 1 + diagonal - left) &&
           (right < 0 || j1 - 1 <= i0 + diagonal + right);
  }
  // Keys that some query of [i0, i1) may see: [lo, hi), empty when hi <= lo.
  ATTN_DEVICE void key_range(int i0, int i1, int seqlen_k, int& lo, int& hi) const {
    lo = left < 0 ? 0 : max_int(0, i0 + diagonal - left);
    hi = right < 0 ? seqlen_k : min_int(seqlen_k, i1 + diagonal + right);
  }
  // Queries that may see some key of [j0, j1).
  ATTN_DEVICE void query_range(int j0, int j1, int seqlen_q, int& lo, int& hi) const {
    lo = right < 0 ? 0 : max_int(0, j0 - diagonal - right);
    hi = left < 0 ? seqlen_q : min_int(seqlen_q, j1 - diagonal + left);
  }
};

}  // namespace attn::cuda
