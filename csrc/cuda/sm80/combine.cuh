// Merges the shares of split-KV (Flash-Decoding, Dao et al. 2023), one warp a row, by their largest
// logits m_s and log_sum_s = LSE_s - m_s:
//   w_s = exp(m_s - m + log_sum_s),  LSE = m + ln(sum_s w_s + exp(sink - m)),  O = sum_s w_s O_s /
//   ..
// and entropy = sum_s w_s (entropy_s + LSE - LSE_s) / ..
#pragma once
#include "../softmax.cuh"

namespace attn::cuda::sm80 {

template <class T>
ATTN_KERNEL(kRowThreads)
void combine(ATTN_GRID_CONSTANT const Params p) {
  const int64_t row = int64_t(block_id().x) * (kRowThreads / 32) + warp_id();
  const int64_t all = p.p.batch * p.p.heads_q * p.p.seqlen_q;
  if (row >= all) return;
  const int i = int(row % p.p.seqlen_q), h = int(row / p.p.seqlen_q % p.p.heads_q);
  const Sequence seq = Sequence::of(p, int(row / p.p.seqlen_q / p.p.heads_q));
  const float* log_sum = p.partial_stats + row;
  const float* max_logit = log_sum + p.splits * all;
  const float* entropy = max_logit + p.splits * all;

  float largest = -kInf;  // NaN is passed over, and comes by its weight
  for (int s = 0; s < p.splits; ++s) largest = fmaxf(largest, max_logit[s * all]);
  const float* sink = static_cast<const float*>(p.ptr.sink);
  const bool sinks = sink && largest != -kInf;
  const float top = sinks ? fmaxf(largest, sink[h]) : largest, base = top == -kInf ? 0.0f : top;
  const auto weight = [&](int s) {
    return exp2f((max_logit[s * all] - base + log_sum[s * all]) * kLog2e);
  };
  float total = sinks ? exp2f((sink[h] - base) * kLog2e) : 0.0f;
  for (int s = 0; s < p.splits; ++s) total += weight(s);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total, log_total = logf(total);
  T* out = static_cast<T*>(p.ptr.o) + seq.b * p.p.o.b + h * p.p.o.h + i * p.p.o.s;
  for (int d = lane_id(); d < int(p.p.head_dim_v); d += 32) {
    float o = 0.0f;
    for (int s = 0; s < p.splits; ++s) {
      const float w = weight(s) * inverse;
      // not a share without weight, whose O may be infinite
      if (w != 0.0f) o += w * p.partial_o[(s * all + row) * p.p.head_dim_v + d];
    }
    out[d] = from_float<T>(o);
  }
  if (lane_id() != 0) return;
  float sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) {
    const float w = weight(s) * inverse;
    if (w != 0.0f)
      sum += w * (entropy[s * all] + (base - max_logit[s * all]) + (log_total - log_sum[s * all]));
  }
  const int64_t at = seq.lse_offset(p, h, i);
  static_cast<float*>(p.ptr.lse)[at] = base + log_total;  // -inf for an empty row
  if (!p.ptr.entropy) return;
  static_cast<float*>(p.ptr.max_logit)[at] = total != total ? total : largest;
  static_cast<float*>(p.ptr.entropy)[at] = sum;
}

}  // namespace attn::cuda::sm80
