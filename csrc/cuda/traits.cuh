// What every kernel shares beside tiles.h: constants, and where the sequences of a call begin and
// end.
#pragma once
#include <cmath>

#include "packed.h"
#include "ptx.cuh"
#include "tiles.h"

#ifdef __CUDACC__
#define ATTN_UNROLL _Pragma("unroll")
#define ATTN_UNROLL_4 _Pragma("unroll 4")
#define ATTN_NO_UNROLL _Pragma("unroll 1")  // loops off the fast path: registers, code size
#else
#define ATTN_UNROLL
#define ATTN_UNROLL_4
#define ATTN_NO_UNROLL
#endif

namespace attn::cuda {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kInf = INFINITY;
// A bias below kLeast counts as kLeast, and a finite one above -kLeast as -kLeast: times log2(e),
// finfo.min, of which additive masks are made, would be the -inf that excludes, and finfo.max the
// +inf of which only NaN comes.  Base-2 logits beyond kLeast2 come of that alone, and are finfo.min
// or finfo.max again in base e.
constexpr float kLeast = -2.3e38f, kLeast2 = -3.3e38f, kFinfoMin = -3.4028234663852886e38f;
// 2^-kFar is 0; a larger distance might overflow where it is multiplied by such a 0.
constexpr float kFar = 200.0f;

// x between kLeast and -kLeast; infinities and NaN stay.
ATTN_DEVICE float hold(float x) { return fabsf(x) < kInf ? fminf(fmaxf(x, kLeast), -kLeast) : x; }

ATTN_DEVICE int min_int(int a, int b) { return a < b ? a : b; }
ATTN_DEVICE int max_int(int a, int b) { return a > b ? a : b; }
ATTN_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Whether the call has a feature, in a kernel that is compiled for BITS.
template <int BITS>
ATTN_DEVICE bool has(const Params& p, int feature) {
  return (((BITS & kAny) ? p.features : BITS) & feature) != 0;
}
// Whether it may have: known when the kernel is compiled.
template <int BITS>
ATTN_FORMULA constexpr bool may_have(int feature) {
  return (BITS & (feature | kAny)) != 0;
}

// Lengths and first rows of sequence b, for dense, varlen and decode.  Python does not read lengths
// back from the device: one that breaks its promise is cut to 0 .. the longest that was told, so
// that masks, caches and block tables are not read beyond their ends.
struct Sequence {
  int b, seqlen_q, seqlen_k;
  int64_t q_start, k_start;
  int diagonal;  // key i + diagonal is aligned with query i
  Frame frame;   // where it stands in a longer sequence; a whole one in itself

  template <int BITS = 0>
  ATTN_DEVICE static Sequence of(const Params& p, int b) {
    Sequence s{b, int(p.p.seqlen_q), int(p.p.seqlen_k), 0, 0, 0, {b, 0, 0, 0, 0, 0}};
    if (p.ptr.cu_seqlens_q) {
      s.q_start = p.ptr.cu_seqlens_q[b];
      s.seqlen_q = cut(p.ptr.cu_seqlens_q[b + 1] - s.q_start, p.p.seqlen_q);
    }
    if (p.ptr.cu_seqlens_k) {
      s.k_start = p.ptr.cu_seqlens_k[b];
      s.seqlen_k = cut(p.ptr.cu_seqlens_k[b + 1] - s.k_start, p.p.seqlen_k);
    }
    if (p.ptr.seqlens_k) s.seqlen_k = cut(p.ptr.seqlens_k[b], p.p.seqlen_k);
    s.frame.whole_q = s.seqlen_q, s.frame.whole_k = s.seqlen_k;
    if (has<BITS>(p, kFrame)) s.frame = p.ptr.frame[b];
    s.diagonal = p.p.bottom_right ? s.past() : s.frame.q_first - s.frame.k_first;
    return s;
  }
  // Query i is i + past() - j positions after key j.
  ATTN_DEVICE int past() const {
    return frame.whole_k - frame.whole_q + (frame.q_first - frame.k_first);
  }
  ATTN_DEVICE static int cut(int64_t length, int64_t longest) {
    ATTN_CHECK(length >= 0 && length <= longest, "a length is not from 0 to", length, longest);
    return max_int(0, min_int(int(length), int(longest)));
  }
  ATTN_DEVICE int64_t lse_offset(const Params& p, int h, int i) const {
    return b * p.p.lse_stride_b + h * p.p.lse_stride_h + q_start + i;
  }
};

// The numbers of tiles of `block` queries, or keys, where the host has counted such tiles.
ATTN_DEVICE TileNumbers<const int32_t*> query_numbers(const Params& p, int block) {
  return {p.ptr.cu_seqlens_q, int(p.p.batch), int(p.p.heads_q), p.m_tiles, block};
}
ATTN_DEVICE TileNumbers<const int32_t*> key_numbers(const Params& p, int block) {
  return {p.ptr.cu_seqlens_k, int(p.p.batch), int(p.p.heads_k), p.n_tiles, block};
}

}  // namespace attn::cuda
