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

// The key tiles of a CTA in the order of their turns: first those at an edge of the band, which
// need a mask, then those that every row sees whole.
struct Turns {
  int first, whole_first, whole_end, end;  // tiles
  int lo, hi;                              // keys that some row sees
  ATTN_DEVICE int edges() const { return end - first - (whole_end - whole_first); }
  ATTN_DEVICE int count() const { return end - first; }
  ATTN_DEVICE int tile(int turn) const {
    if (turn >= edges()) return whole_first + turn - edges();
    const int t = first + turn;
    return t < whole_first ? t : t + whole_end - whole_first;
  }

  // Of queries [i0, i1).
  ATTN_DEVICE static Turns of(const Band& band, int i0, int i1, int seqlen_k, int block_n) {
    Turns s;
    band.key_range(i0, i1, seqlen_k, s.lo, s.hi);
    s.first = s.lo / block_n, s.end = s.hi > s.lo ? ceil_div(s.hi, block_n) : s.first;
    const int whole_lo = band.left < 0 ? 0 : max_int(0, i1 - 1 + band.diagonal - band.left);
    const int whole_hi = band.right < 0
                             ? seqlen_k
                             : max_int(0, min_int(seqlen_k, i0 + band.diagonal + band.right + 1));
    s.whole_first = min_int(s.end, max_int(s.first, ceil_div(whole_lo, block_n)));
    s.whole_end = max_int(s.whole_first, min_int(s.end, whole_hi / block_n));
    return s;
  }
};

}  // namespace attn::cuda
