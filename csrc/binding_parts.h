// What the bindings of every device share: a Problem from Python's numbers, and the checks of what
// a wrong struct could break.
#pragma once
#include <array>
#include <stdexcept>
#include <string>

#include "params.h"

namespace attn {

using Triple = std::array<int64_t, 3>;
using Quad = std::array<int64_t, 4>;

inline Strides strides(const Triple& t) { return {t[0], t[1], t[2]}; }
inline ScoreStrides score_strides(const Quad& t) { return {t[0], t[1], t[2], t[3]}; }

// sizes: batch, heads_q, heads_k, seqlen_q, seqlen_k, head_dim, head_dim_v; lse: strides of batch
// and head; pages: stride of the block table, page_size.
inline Problem make_problem(int dtype, int bias_dtype, const std::array<int64_t, 7>& sizes,
                            const Triple& q, const Triple& k, const Triple& v, const Triple& o,
                            const Quad& mask, const Quad& bias, const std::array<int64_t, 2>& lse,
                            const std::array<int64_t, 2>& pages, double scale, double softcap,
                            double dropout_p, int64_t window_left, int64_t window_right,
                            int bottom_right, int64_t num_splits) {
  Problem p;
  p.dtype = DType(dtype), p.bias_dtype = DType(bias_dtype);
  p.batch = sizes[0], p.heads_q = sizes[1], p.heads_k = sizes[2];
  p.seqlen_q = sizes[3], p.seqlen_k = sizes[4];
  p.head_dim = sizes[5], p.head_dim_v = sizes[6];
  p.q = strides(q), p.k = strides(k), p.v = strides(v), p.o = strides(o);
  p.mask = score_strides(mask), p.bias = score_strides(bias);
  p.lse_stride_b = lse[0], p.lse_stride_h = lse[1];
  p.block_table_stride = pages[0], p.page_size = pages[1];
  p.scale = scale, p.softcap = softcap, p.dropout_p = dropout_p;
  p.window_left = window_left, p.window_right = window_right;
  p.bottom_right = bottom_right, p.num_splits = num_splits;
  return p;
}

inline void set_gradient_strides(Problem& p, const Triple& dout, const Triple& dq, const Triple& dk,
                                 const Triple& dv, const Quad& dbias) {
  p.dout = strides(dout), p.dq = strides(dq), p.dk = strides(dk), p.dv = strides(dv);
  p.dbias = score_strides(dbias);
}

inline void check_at_least(const char* name, int64_t value, int64_t least) {
  if (value < least)
    throw std::invalid_argument(std::string(name) + " must be at least " + std::to_string(least) +
                                ", got " + std::to_string(value));
}

inline void check(const Problem& p, const Pointers& ptr) {
  check_at_least("batch", p.batch, 0), check_at_least("seqlen_q", p.seqlen_q, 0);
  check_at_least("seqlen_k", p.seqlen_k, 0), check_at_least("heads_k", p.heads_k, 1);
  check_at_least("heads_q", p.heads_q, 1), check_at_least("head_dim", p.head_dim, 1);
  check_at_least("head_dim_v", p.head_dim_v, 1);
  if (p.heads_q % p.heads_k) throw std::invalid_argument("heads_q must be a multiple of heads_k");
  if (p.dropout_p > 0 && !ptr.rng_state)
    throw std::invalid_argument("rng_state is needed when dropout_p > 0");
  if (ptr.block_table && p.page_size < 1)
    throw std::invalid_argument("page_size must be at least 1 with a block_table");
}

}  // namespace attn
