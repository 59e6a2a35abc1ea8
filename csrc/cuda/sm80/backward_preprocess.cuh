// delta = rowsum(dO * O) - dLSE   [B, Hq, Sq] as LSE; one warp a row; and LSE as the other kernels
// take it, +inf in far rows (far.h).  dSink = -sum over rows of exp(sink - LSE) * delta   [Hq];
// one CTA a head, rows in a fixed order, after backward_far_queries.
#pragma once
#include "backward_far.cuh"

namespace attn::cuda::sm80 {

template <class T>
ATTN_KERNEL(kRowThreads)
void backward_delta(ATTN_GRID_CONSTANT const Params p) {
  const int64_t row = int64_t(block_id().x) * (kRowThreads / 32) + warp_id();
  const auto numbers = query_numbers(p, 1);
  const TileOf x = numbers.find(row);
  if (!numbers.has(x)) return;
  const int i = x.tile, h = x.head, b = x.b;
  const Sequence seq = Sequence::of(p, b);
  if (i >= seq.seqlen_q) return;  // packed: a number that stands for no row
  const T* o =
      static_cast<const T*>(p.ptr.o) + b * p.p.o.b + h * p.p.o.h + (seq.q_start + i) * p.p.o.s;
  const T* dout = static_cast<const T*>(p.ptr.dout) + b * p.p.dout.b + h * p.p.dout.h +
                  (seq.q_start + i) * p.p.dout.s;
  float sum = 0.0f;
  for (int d = lane_id(); d < int(p.p.head_dim_v); d += 32)
    sum += to_float(o[d]) * to_float(dout[d]);
  ATTN_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) sum += shfl_xor(sum, mask);
  if (lane_id() != 0) return;
  const int64_t at = seq.lse_offset(p, h, i);
  p.delta[at] = sum - (p.ptr.dlse ? static_cast<const float*>(p.ptr.dlse)[at] : 0.0f);
  const float lse = static_cast<const float*>(p.ptr.lse)[at];
  FarRows::of(p.p, p.ptr, p.delta).near_lse[at] = is_far(lse) ? kInf : lse;
}

template <class>  // T only so that the kernel may stand in a header
ATTN_KERNEL(kRowThreads) void backward_sink(ATTN_GRID_CONSTANT const Params p) {
  const int h = block_id().x;
  const float sink = static_cast<const float*>(p.ptr.sink)[h];
  const FarRows far = FarRows::of(p.p, p.ptr, p.delta);
  double sum = 0;
  for (int b = 0; b < int(p.p.batch); ++b) {
    const Sequence seq = Sequence::of(p, b);
    for (int i = thread_id(); i < seq.seqlen_q; i += kRowThreads) {
      const int64_t at = seq.lse_offset(p, h, i);
      const float lse = static_cast<const float*>(p.ptr.lse)[at];
      if (lse == -kInf) continue;
      const float weight = is_far(lse) ? exp2f(sink_logit(sink) - far.base[at]) * far.inverse[at]
                                       : exp2f((sink - lse) * kLog2e);
      sum -= double(weight) * p.delta[at];
    }
  }
  sts_f32(smem_base() + 4 * thread_id(), float(sum));
  sync_threads();  // every thread's sum is there
  if (thread_id() != 0) return;
  sum = 0;
  for (int t = 0; t < kRowThreads; ++t) sum += lds_f32(smem_base() + 4 * t);
  static_cast<float*>(p.ptr.dsink)[h] = float(sum);
}

}  // namespace attn::cuda::sm80
