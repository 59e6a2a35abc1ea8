// What the backward kernels of every architecture share: the row values that dS needs.
#pragma once
#include "score.cuh"

namespace attn::cuda {

// What a query brings to dS: LSE in units of log2(e), +inf where no pair counts; delta.
struct RowGradient {
  float lse, delta;

  // BIAS: the call may have one, whose size hold() bounds (Score::logit).
  template <bool BIAS = false>
  ATTN_DEVICE static RowGradient of(float lse, float delta) {
    if (BIAS) lse = hold(lse);
    return {lse == -kInf ? kInf : lse * kLog2e, delta};  // -inf: an empty row
  }
  template <bool BIAS = false>
  ATTN_DEVICE static RowGradient of(const Params& p, const Sequence& seq, int h, int i) {
    if (i >= seq.seqlen_q) return {kInf, 0.0f};
    const int64_t at = seq.lse_offset(p, h, i);
    return of<BIAS>(static_cast<const float*>(p.ptr.lse)[at], p.delta[at]);
  }
};

}  // namespace attn::cuda
