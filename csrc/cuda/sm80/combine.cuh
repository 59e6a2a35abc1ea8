// Merges the shares of split-KV (Flash-Decoding, Dao et al. 2023), one warp a row:
//   LSE = ln(sum_s exp(LSE_s) + exp(sink)),  O = sum_s exp(LSE_s - LSE) O_s
// and entropy = sum_s w_s (entropy_s + LSE - LSE_s), w_s = exp(LSE_s - LSE).
#pragma once
#include "../softmax.cuh"

namespace attn::cuda::sm80 {

constexpr int kCombineThreads = 128;

template <class T>
ATTN_KERNEL(kCombineThreads)
void combine(ATTN_GRID_CONSTANT const Params p) {
  const int64_t row = int64_t(block_id().x) * (kCombineThreads / 32) + warp_id();
  const int64_t all = p.p.batch * p.p.heads_q * p.p.seqlen_q;
  if (row >= all) return;
  const int i = int(row % p.p.seqlen_q), h = int(row / p.p.seqlen_q % p.p.heads_q);
  const Sequence seq = Sequence::of(p, int(row / p.p.seqlen_q / p.p.heads_q));
  const float* lse = p.partial_stats + row;
  const float* max_logit = lse + p.splits * all;
  const float* entropy = max_logit + p.splits * all;

  float top = -kInf, largest = -kInf;
  for (int s = 0; s < p.splits; ++s) top = fmaxf(top, lse[s * all]);
  const bool empty = top == -kInf;  // but for NaN, which fmaxf passes over
  const float* sink = static_cast<const float*>(p.ptr.sink);
  if (sink && !empty) top = fmaxf(top, sink[h]);
  const float base = top == -kInf ? 0.0f : top;
  float total = sink && !empty ? exp2f((sink[h] - base) * kLog2e) : 0.0f;
  float nan = 0.0f;
  for (int s = 0; s < p.splits; ++s) {
    total += exp2f((lse[s * all] - base) * kLog2e);
    nan += lse[s * all] != lse[s * all] ? lse[s * all] : 0.0f;
    largest = fmaxf(largest, max_logit[s * all]);
  }
  const float result = base + logf(total) + nan;  // -inf for an empty row
  float sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) {
    const float w = exp2f((lse[s * all] - result) * kLog2e);
    if (lse[s * all] != -kInf) sum += w * (entropy[s * all] + result - lse[s * all]);
  }
  T* out = static_cast<T*>(p.ptr.o) + seq.b * p.p.o.b + h * p.p.o.h + i * p.p.o.s;
  for (int d = lane_id(); d < int(p.p.head_dim_v); d += 32) {
    float o = 0.0f;
    for (int s = 0; s < p.splits; ++s) {
      const float w = exp2f((lse[s * all] - result) * kLog2e);
      // not an empty share (-inf - -inf), nor one without weight, whose O may be infinite
      if (lse[s * all] != -kInf && w != 0.0f)
        o += w * p.partial_o[(s * all + row) * p.p.head_dim_v + d];
    }
    out[d] = from_float<T>(o);
  }
  if (lane_id() != 0) return;
  const int64_t at = seq.lse_offset(p, h, i);
  static_cast<float*>(p.ptr.lse)[at] = result;
  if (!p.ptr.entropy) return;
  static_cast<float*>(p.ptr.max_logit)[at] = largest + nan;
  static_cast<float*>(p.ptr.entropy)[at] = sum + nan;
}

}  // namespace attn::cuda::sm80
