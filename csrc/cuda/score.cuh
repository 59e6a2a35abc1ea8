// From products to logits in units of log2(e), one pair at a time:
//   s = scale * qk;  s = softcap * tanh(s / softcap);  s += bias - slope * |i + Sk - Sq - j|
// and -inf where length, band or mask exclude (i, j), or where the bias is -inf.
#pragma once
#include "mask.cuh"

namespace attn::cuda {

// Reads element `at` of a bias of any of the three dtypes.
ATTN_DEVICE float load_bias(DType dtype, const void* bias, int64_t at) {
  if (dtype == DType::kBFloat16) return to_float(static_cast<const bf16*>(bias)[at]);
  if (dtype == DType::kFloat16) return to_float(static_cast<const fp16*>(bias)[at]);
  return static_cast<const float*>(bias)[at];
}

// What a query row needs: its position, head, ALiBi slope, rows of mask and bias.
struct Query {
  int i, h;
  float slope;
  int64_t mask_row, bias_row;
};

struct Score {
  const Params& p;
  const Sequence& seq;
  Band band;

  ATTN_DEVICE Score(const Params& params, const Sequence& s)
      : p(params), seq(s), band(Band::of(params, s)) {}

  ATTN_DEVICE Query query(int h, int i) const {
    Query q{i, h, 0.0f, 0, 0};
    if (p.ptr.alibi_slopes)
      q.slope =
          static_cast<const float*>(p.ptr.alibi_slopes)[seq.b * p.ptr.alibi_stride_b + h] * kLog2e;
    q.mask_row = seq.b * p.p.mask.b + h * p.p.mask.h + i * p.p.mask.q;
    q.bias_row = seq.b * p.p.bias.b + h * p.p.bias.h + i * p.p.bias.q;
    return q;
  }

  // derivative: d softcap(s) / ds
  ATTN_DEVICE float logit(float product, const Query& q, int j, float& derivative) const {
    derivative = 1.0f;
    if (q.i >= seq.seqlen_q || j >= seq.seqlen_k || !band.keep(q.i, j)) return -kInf;
    if (p.ptr.mask && !static_cast<const uint8_t*>(p.ptr.mask)[q.mask_row + j * p.p.mask.k])
      return -kInf;
    float s;
    if (p.softcap > 0.0f) {
      const float t = tanh_accurate(product * p.scale * p.inverse_softcap);
      derivative = 1.0f - t * t;
      s = t * p.softcap * kLog2e;
    } else {
      s = product * p.scale_log2;
    }
    if (p.ptr.alibi_slopes) {
      const int distance = q.i + seq.seqlen_k - seq.seqlen_q - j;
      s -= q.slope * float(distance < 0 ? -distance : distance);
    }
    if (p.ptr.bias) {
      const float bias = load_bias(p.p.bias_dtype, p.ptr.bias, q.bias_row + j * p.p.bias.k);
      s = bias == -kInf ? -kInf : s + (bias < kLeast ? kLeast : bias) * kLog2e;
    }
    return s;
  }
};

}  // namespace attn::cuda
