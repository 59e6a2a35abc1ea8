// Fragments of S whose rows are queries, with 4 neighbouring keys a thread, for features on Hopper
// (forward_features.cuh, backward_dq_features.cuh).
//
// Keys lie in shared memory in another order: of a tile of N, the even ones and then the odd ones,
// which the copy engine does by boxes of every other row.  The columns 2 t, 2 t + 1 of fragments m
// and m + N / 16, which a thread owns, are then keys 16 m + 4 t .. + 3: one load of a mask or of a
// bias, one block of Philox.  Products know nothing of it: a sum over keys does not mind their
// order.
#pragma once
#include "../dropout.cuh"
#include "../side.cuh"

namespace attn::cuda::sm90 {

// What a thread's two rows, query g and g + 8 of a warp's 16, have beside their products.
template <class T, int BITS, int TILES>
struct FourSides {
  static constexpr int GROUPS = TILES / 2;  // of 4 keys of a row, which a thread has of a tile
  using Scores = float[TILES][4];
  using Sides = Side<T, BITS>[GROUPS][2];
  // Logits are products times p.scale_log2; else they are computed, by short_terms().
  static constexpr bool PRODUCTS = !(BITS & (kAny | kBias | kAlibi | kSoftcap | kScale));

  static constexpr bool CAPPED = may_have<BITS>(kSoftcap);

  const Score& score;
  const Dropout dropout;
  const Threshold threshold;
  const HeadTerms<float> head;
  Query query[2];
  typename Side<T, BITS>::Row side_rows[2];

  // Rows behind the last of `rows` are the last once more.
  ATTN_DEVICE FourSides(const Params& params, const Score& of, int h, int row, int rows)
      : score(of),
        dropout(Dropout::of(params, of.seq)),
        threshold(may_have<BITS>(kDropout) ? Threshold::of(dropout) : Threshold{}),
        head(HeadTerms<float>::of(params.ptr, of.seq, h, 1.0f)) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      query[r] = score.query(h, min_int(row + 8 * r, rows - 1));
      if constexpr (Side<T, BITS>::VECTORS)
        side_rows[r] = Side<T, BITS>::Row::of(params, query[r], first_key(0, 0));
    }
  }
  ATTN_DEVICE static int first_key(int n0, int m) {
    return 4 * ((n0 >> 2) + (lane_id() & 3) + 4 * m);  // a multiple of 4 to the compiler, too
  }
  // Key e of group m of row r.
  ATTN_DEVICE static float& at(Scores& S, int m, int r, int e) {
    return S[m + e % 2 * GROUPS][2 * r + e / 2];
  }
  ATTN_DEVICE static float at(const Scores& S, int m, int r, int e) {
    return S[m + e % 2 * GROUPS][2 * r + e / 2];
  }
  ATTN_DEVICE void load_sides(Sides& sides, int n0, int first, int last) const {
    ATTN_UNROLL
    for (int m = first; m < last; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      if constexpr (Side<T, BITS>::VECTORS)
        sides[m][r].load(side_rows[r], n0 + 16 * m);
      else
        sides[m][r].load(score.p, query[r], first_key(n0, m));
    }
  }
  // The logit of a product; distance: i + Sk - Sq - j; capped: of attn::logit.
  template <class Ways, class Capped>
  ATTN_DEVICE float logit(float product, float distance, const Side<T, BITS>& side, int e,
                          const Capped& capped) const {
    if constexpr (PRODUCTS)
      return product;
    else
      return attn::logit<Ways>(
          terms_of_logits<BITS>(score.p), short_terms<BITS>(score.p), head, product,
          [&] { return distance; }, [&] { return side.bias_of(e); }, capped);
  }
  // What logits are multiplied by to be in units of log2(e).
  ATTN_DEVICE float unit() const {
    return PRODUCTS ? score.p.scale_log2 : from_short_terms<BITS>(score.p);
  }
  // use(Ways()) with what logit() of these products is computed by.
  template <class Use>
  ATTN_DEVICE void with_ways(const Scores& products, const Use& use) const {
    if (CAPPED && warp_is_small(products, short_terms<BITS>(score.p).inverse_cap))
      use(SmallWays());
    else
      use(NaturalWays());
  }
  ATTN_DEVICE float distance_of(int r, int n0) const {
    return float(query[r].i + score.seq.past() - first_key(n0, 0));
  }
};

}  // namespace attn::cuda::sm90
