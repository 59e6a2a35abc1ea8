// Where sequence b of a problem lies and what it is a part of: its lengths and the rows of Q, K, V,
// O, for dense, varlen, ragged and paged layouts.
#pragma once
#include "cpu/simd/convert.h"
#include "cpu/tiles.h"

namespace attn::cpu {

struct Sequence {
  const Problem* p;
  const Pointers* ptr;
  int64_t b;
  int64_t seqlen_q, seqlen_k;
  int64_t q_start = 0, k_start = 0;  // first row of this sequence (varlen)
  int64_t whole_k;                   // keys of the whole sequence
  int64_t past;                      // query i is i + past - j positions after key j
  const Frame* frame = nullptr;      // null where this sequence is a whole one

  Sequence(const Problem& problem, const Pointers& pointers, int64_t batch)
      : p(&problem), ptr(&pointers), b(batch) {
    seqlen_q = problem.seqlen_q;
    seqlen_k = problem.seqlen_k;
    if (pointers.cu_seqlens_q) {
      q_start = pointers.cu_seqlens_q[b];
      seqlen_q = pointers.cu_seqlens_q[b + 1] - q_start;
    }
    if (pointers.cu_seqlens_k) {
      k_start = pointers.cu_seqlens_k[b];
      seqlen_k = pointers.cu_seqlens_k[b + 1] - k_start;
    }
    if (pointers.seqlens_k) seqlen_k = pointers.seqlens_k[b];
    whole_k = seqlen_k, past = seqlen_k - seqlen_q;
    if (pointers.frame) {
      frame = pointers.frame + b;
      whole_k = frame->whole_k;
      past = whole_k - frame->whole_q + frame->q_first - frame->k_first;
    }
  }

  // Position j of the keys is aligned with query j - diagonal().
  int64_t diagonal() const {
    return p->bottom_right ? past : frame ? frame->q_first - frame->k_first : 0;
  }

  int64_t q_offset(const Strides& s, int64_t h, int64_t i) const {
    return b * s.b + h * s.h + (q_start + i) * s.s;
  }
  int64_t k_offset(const Strides& s, int64_t h, int64_t j) const {
    if (ptr->block_table) {
      const int64_t page = ptr->block_table[b * p->block_table_stride + j / p->page_size];
      return page * s.b + h * s.h + (j % p->page_size) * s.s;
    }
    return b * s.b + h * s.h + (k_start + j) * s.s;
  }
  // Row i of head h of Q, or of what is of its dtype and has its rows.
  const char* q_row(const void* base, const Strides& s, int64_t h, int64_t i) const {
    return static_cast<const char*>(base) + q_offset(s, h, i) * int64_t(dtype_size(p->dtype));
  }
  int64_t lse_offset(int64_t h, int64_t i) const {
    return b * p->lse_stride_b + h * p->lse_stride_h + q_start + i;
  }

  // Keys that some query of [m0, m1) may see: [*lo, *hi).
  void key_range(int64_t m0, int64_t m1, int64_t* lo, int64_t* hi) const {
    *lo = 0, *hi = seqlen_k;
    if (p->window_left != kUnbounded) *lo = clamp(m0 + diagonal() - p->window_left, *hi);
    if (p->window_right != kUnbounded) *hi = clamp(m1 + diagonal() + p->window_right, *hi);
    if (*hi < *lo) *hi = *lo;
  }
  // Queries that may see some key of [n0, n1): [*lo, *hi).
  void query_range(int64_t n0, int64_t n1, int64_t* lo, int64_t* hi) const {
    *lo = 0, *hi = seqlen_q;
    if (p->window_right != kUnbounded) *lo = clamp(n0 - diagonal() - p->window_right, *hi);
    if (p->window_left != kUnbounded) *hi = clamp(n1 - diagonal() + p->window_left, *hi);
    if (*hi < *lo) *hi = *lo;
  }
  // True when every query of [m0, m1) sees every key of [n0, n1) as far as the band goes.
  bool band_full(int64_t m0, int64_t m1, int64_t n0, int64_t n1) const {
    const int64_t d = diagonal();
    return (p->window_left == kUnbounded || n0 >= m1 - 1 + d - p->window_left) &&
           (p->window_right == kUnbounded || n1 - 1 <= m0 + d + p->window_right);
  }

 private:
  static int64_t clamp(int64_t x, int64_t hi) { return x < 0 ? 0 : x > hi ? hi : x; }
};

// Whether the queries of all heads of a group may be rows of one panel: nothing but the row of Q
// depends on the head.
inline bool heads_share_panels(const Problem& p, const Pointers& ptr) {
  return p.heads_q > p.heads_k && p.seqlen_q > 0 && p.seqlen_q <= kPanel && !ptr.cu_seqlens_q &&
         !ptr.bias && !ptr.alibi_slopes && p.dropout_p == 0 && (!ptr.mask || p.mask.h == 0);
}

}  // namespace attn::cpu
