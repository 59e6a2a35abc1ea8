// From products to logits in units of log2(e), one pair at a time: the formula of logit.h, and -inf
// where length, band or mask exclude (i, j), or where the bias is -inf.
#pragma once
#include "mask.cuh"

namespace attn::cuda {

// Reads element `at` of a bias of any of the three dtypes.
ATTN_DEVICE float load_bias(DType dtype, const void* bias, int64_t at) {
  if (dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(bias)[at]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const fp16*>(bias)[at]);
  return static_cast<const float*>(bias)[at];
}

// logit.h on numbers in units of log2(e).
struct FloatWays {
  ATTN_DEVICE static float tanh(float x) { return tanh_accurate(x); }
  ATTN_DEVICE static float magnitude(float x) { return fabsf(x); }
  ATTN_DEVICE static float over_cap(float x, const Terms<float>& terms) {
    return x * terms.inverse_cap;
  }
  ATTN_DEVICE static float in_units(float bias) { return hold(bias) * kLog2e; }
  ATTN_DEVICE static float excluded() { return -kInf; }
};

// The same in natural units, without a case for a bias of -inf: that comes through the sum, but for
// a product of +inf or NaN, which leaves NaN for the repair.
struct NaturalWays : FloatWays {
  ATTN_DEVICE static float in_units(float bias) { return bias; }
  ATTN_DEVICE static float excluded() { return NAN; }  // which nothing equals
};

// The same where no tanh is of more than MOST: by a polynomial that is within 2^-20 of it, since
// the exponential and the reciprocal of the other take as long as 16 of these additions.
struct SmallWays : NaturalWays {
  static constexpr float MOST = 1.0f;
  ATTN_DEVICE static float tanh(float x) {
    const float y = x * x;
    float sum = fmaf(y, -3.1265002e-3f, 1.6906237e-2f);
    sum = fmaf(y, sum, -5.1768154e-2f);
    sum = fmaf(y, sum, 0.13288486f);
    sum = fmaf(y, sum, -0.3333028f);
    return x * fmaf(y, sum, 1.0f);
  }
};
// Whether that serves all of a warp's products, which `factor` brings over the cap.
template <int TILES>
ATTN_DEVICE bool warp_is_small(const float (&products)[TILES][4], float factor) {
  float most[4] = {};
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) ATTN_UNROLL
  for (int c = 0; c < 4; ++c) most[c] = fmaxf(most[c], fabsf(products[n][c]));
  const float all = fmaxf(fmaxf(most[0], most[1]), fmaxf(most[2], most[3]));
  return ballot(!(all * fabsf(factor) <= SmallWays::MOST)) == 0;  // false where the factor is NaN
}

// A kernel for BITS may have natural logits in another unit, where a soft cap is all that makes
// them of products: the cap itself.
constexpr bool cap_alone(int bits) {
  return (bits & kSoftcap) && !(bits & (kAny | kBias | kAlibi));
}
// p.natural with that unit, and scale and 1 / softcap as one factor.
template <int BITS>
ATTN_DEVICE Terms<float> short_terms(const Params& p) {
  Terms<float> t = p.natural;
  t.inverse_cap *= t.scale, t.scale = 1.0f;
  if (cap_alone(BITS)) t.cap = 1.0f;
  return t;
}
// From there to units of log2(e).
template <int BITS>
ATTN_DEVICE float from_short_terms(const Params& p) {
  return cap_alone(BITS) ? p.terms.cap : kLog2e;
}

// The terms of logits beside the product that a kernel for BITS knows.
template <int BITS>
ATTN_DEVICE auto terms_of_logits(const Params& p) {
  if constexpr (BITS & kAny)
    return p.terms.has;
  else
    return HasExactly<(BITS & kSoftcap) != 0, (BITS & kAlibi) != 0, (BITS & kBias) != 0>();
}

// What a query row needs: its position, head, what its head adds, rows of mask and bias.
struct Query {
  int i, h;
  HeadTerms<float> head;
  int64_t mask_row, bias_row;
};

struct Score {
  const Params& p;
  const Sequence& seq;
  Band band;

  ATTN_DEVICE Score(const Params& params, const Sequence& s)
      : p(params), seq(s), band(Band::of(params, s)) {}

  ATTN_DEVICE Query query(int h, int i) const {
    Query q{i, h, HeadTerms<float>::of(p.ptr, seq, h, kLog2e), 0, 0};
    q.mask_row = seq.b * p.p.mask.b + h * p.p.mask.h + i * p.p.mask.q;
    q.bias_row = seq.b * p.p.bias.b + h * p.p.bias.h + i * p.p.bias.q;
    return q;
  }

  // derivative: d softcap(s) / ds
  template <int BITS>
  ATTN_DEVICE float logit(float product, const Query& q, int j, float& derivative) const {
    derivative = 1.0f;
    if (q.i >= seq.seqlen_q || j >= seq.seqlen_k || !band.keep(q.i, j)) return -kInf;
    if (has<BITS>(p, kMask) &&
        !static_cast<const uint8_t*>(p.ptr.mask)[q.mask_row + j * p.p.mask.k])
      return -kInf;
    return attn::logit<FloatWays>(
        terms_of_logits<BITS>(p), p.terms, q.head, product,
        [&] { return float(q.i + seq.past() - j); },
        [&] { return load_bias(p.p.bias_dtype, p.ptr.bias, q.bias_row + j * p.p.bias.k); },
        [&](float slope) { derivative = slope; });
  }
};

}  // namespace attn::cuda
