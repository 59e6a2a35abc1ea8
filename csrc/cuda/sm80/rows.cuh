// Where the rows of a head lie in global memory.
#pragma once
#include "../smem.cuh"

namespace attn::cuda::sm80 {

ATTN_DEVICE Rows query_rows(const Params& p, const Sequence& seq, const void* base,
                            const Strides& s, int head, int bytes) {
  const int64_t first = seq.b * s.b + head * s.h + seq.q_start * s.s;
  return {static_cast<const char*>(base) + first * bytes, s.s * bytes,
          p.pack > 1 ? p.packed : Divisor{}, s.h * bytes, nullptr};
}

ATTN_DEVICE Rows key_rows(const Params& p, const Sequence& seq, const void* base, const Strides& s,
                          int head_k, int bytes) {
  const auto* start = static_cast<const char*>(base) + head_k * s.h * bytes;
  if (p.ptr.block_table)
    return {start,
            s.s * bytes,
            p.page,
            s.b * bytes,
            p.ptr.block_table + seq.b * p.p.block_table_stride,
            int(p.p.rows_k)};
  return {start + (seq.b * s.b + seq.k_start * s.s) * bytes, s.s * bytes, {}, 0, nullptr};
}

}  // namespace attn::cuda::sm80
