// Which calls the Hopper kernels serve.  Host code.
#pragma once
#include <algorithm>
#include <cmath>
#include <string>

#include "../head_dims.h"
#include "../tile_counts.h"
#include "tiles.h"

namespace attn::cuda::sm90 {

// HEAD_DIM of the kernel for these sizes, 0: none.
inline int kernel_head_dim(const Problem& p) {
  const int64_t dim = std::max(p.head_dim, p.head_dim_v);
  if (dim <= 32) return 0;  // sm80 has a kernel of its own for 32
  for (int padded : kSm90HeadDims)
    if (dim <= padded) return padded;
  return 0;
}

// [batch, heads, length, dim] as the copy engine sees it; rows: of a box.  Varlen: one batch, all
// sequences one behind the other.
inline TensorSpec tensor_spec(const Problem& p, const Pointers& ptr, const void* base,
                              const Strides& s, int64_t heads, int64_t length, int64_t dim,
                              int rows) {
  const int64_t batch = ptr.cu_seqlens_q ? 1 : p.batch;
  TensorSpec t{
      base, p.dtype == DType::kBFloat16, {dim, length, heads, batch}, {}, {64, rows, 1, 1}};
  const int64_t strides[3] = {2 * s.s, 2 * s.h, 2 * s.b};
  int64_t packed = (2 * dim + 15) / 16 * 16;
  for (int i = 0; i < 3; ++i) {
    // torch may say anything where there is one element; the driver gets what a packed tensor has
    t.stride[i] = t.size[i + 1] == 1 ? packed : strides[i];
    packed = t.stride[i] * t.size[i + 1] % (int64_t(1) << 40);
  }
  return t;
}
// The same tile by boxes of every other row (fours.cuh).
inline TensorSpec in_fours(TensorSpec t) {
  t.box[1] /= 2, t.row_step = 2;
  return t;
}
inline int64_t query_rows(const Problem& p, const Pointers& ptr) {
  return ptr.cu_seqlens_q ? p.rows_q : p.seqlen_q;
}
inline int64_t key_rows(const Problem& p, const Pointers& ptr) {
  return ptr.cu_seqlens_k ? p.rows_k : p.seqlen_k;
}
inline TensorSpec query_spec(const Problem& p, const Pointers& ptr, int rows) {
  return tensor_spec(p, ptr, ptr.q, p.q, p.heads_q, query_rows(p, ptr), p.head_dim, rows);
}
inline TensorSpec key_spec(const Problem& p, const Pointers& ptr, int rows) {
  return tensor_spec(p, ptr, ptr.k, p.k, p.heads_k, key_rows(p, ptr), p.head_dim, rows);
}
inline TensorSpec value_spec(const Problem& p, const Pointers& ptr, int rows) {
  return tensor_spec(p, ptr, ptr.v, p.v, p.heads_k, key_rows(p, ptr), p.head_dim_v, rows);
}
inline TensorSpec out_spec(const Problem& p, const Pointers& ptr, int rows) {
  return tensor_spec(p, ptr, ptr.o, p.o, p.heads_q, query_rows(p, ptr), p.head_dim_v, rows);
}
inline TensorSpec dout_spec(const Problem& p, const Pointers& ptr, int rows) {
  return tensor_spec(p, ptr, ptr.dout, p.dout, p.heads_q, query_rows(p, ptr), p.head_dim_v, rows);
}

// Whether scale and 1 / softcap can be one factor (short_terms() of score.cuh): a normal float, or
// 0.
inline bool short_terms_hold(const Problem& p) {
  const double factor = p.softcap > 0 ? std::fabs(p.scale / p.softcap) : 0;
  return factor == 0 || (factor >= 0x1p-126 && factor < 0x1p127);
}

// "" when the kernels serve a call, else what they lack.
inline std::string forward_problem(const Problem& p, const Pointers& ptr) {
  if (p.dtype != DType::kBFloat16 && p.dtype != DType::kFloat16) return "dtype";
  if (!ptr.cu_seqlens_q != !ptr.cu_seqlens_k) return "one of cu_seqlens_q and cu_seqlens_k";
  if (!kernel_head_dim(p)) return "head_dim";
  if (ptr.block_table) return "pages";
  if (!short_terms_hold(p)) return "softcap so far from scale";
  for (const TensorSpec& t : {query_spec(p, ptr, 1), key_spec(p, ptr, 1), value_spec(p, ptr, 1)})
    if (const char* why = tensor_problem(t); *why) return why;
  return "";
}

inline std::string backward_problem(const Problem& p, const Pointers& ptr) {
  const std::string why = forward_problem(p, ptr);
  return why.empty() ? tensor_problem(dout_spec(p, ptr, 1)) : why;
}

inline TileCount forward_tiles(const Problem& p, const Pointers& ptr) {
  return query_tiles(p, ptr, ForwardTile90<64>::BLOCK_M);
}
// Floats of workspace: one, the counter of tiles, where there are more tiles than multiprocessors
// and no number that is claimed leaves int; the last go past the tiles by at most one a CTA.
inline int64_t forward_workspace(const Problem& p, const Pointers& ptr, int multiprocessors) {
  const int64_t tiles = forward_tiles(p, ptr).all;
  return tiles > multiprocessors && tiles + 2 * int64_t(multiprocessors) < 2147483647 ? 1 : 0;
}

// What a call has that the backward kernels must know, and their HEAD_DIM.
inline int backward_call(const Problem& p, const Pointers& ptr) {
  return backward_features_of(features_of(p, ptr));
}
inline int backward_head_dim(const Problem& p, const Pointers& ptr) {
  return feature_head_dim(kernel_head_dim(p), backward_call(p, ptr));
}
// Whether one kernel computes all gradients.  Those of a plain call that wants dQ, or dK and dV,
// alone have kernels of their own; of one with features what is not wanted is not stored.
inline bool in_one_kernel(const Problem& p, const Pointers& ptr) {
  const int head_dim = backward_head_dim(p, ptr);
  const bool keys = ptr.dk || ptr.dv;
  return head_dim && head_dim <= 128 && (backward_call(p, ptr) ? ptr.dq || keys : ptr.dq && keys);
}
// What that kernel is compiled for.
inline int backward_features(const Problem& p, const Pointers& ptr) {
  if (!in_one_kernel(p, ptr)) return backward_call(p, ptr);
  return backward_call(p, ptr) | (p.deterministic ? kOrdered : 0) | bias_gradient_of(p, ptr);
}
// Floats of the sums that it adds dQ up in, and of the words of their order (SumOrder); 0: it does
// not run.
inline int64_t query_sums(const Problem& p, const Pointers& ptr) {
  if (!in_one_kernel(p, ptr)) return 0;
  const int64_t tiles = sum_tiles(p, ptr).all;
  return tiles * 64 * backward_head_dim(p, ptr) + (p.deterministic ? 2 * tiles + 1 : 0);
}
// Whether they serve what a call has beside Q, K and V (features.h): of masks and biases those
// whose rows come 4 keys at a time; no frames and no parts.
inline bool backward_knows_features(const Problem& p, const Pointers& ptr) {
  const int bits = backward_call(p, ptr);
  const bool wants = (ptr.dq || ptr.dk || ptr.dv) && backward_head_dim(p, ptr);
  const bool fours = (!(bits & kMask) || bits & kMaskVectors) &&
                     (!(bits & kBias) || (bits & kBiasVectors && !(bits & kCast)));
  return !bits || (fours && !(bits & (kPaged | kFrame | kPart)) && wants);
}

}  // namespace attn::cuda::sm90
