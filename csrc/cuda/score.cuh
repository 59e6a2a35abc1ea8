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
