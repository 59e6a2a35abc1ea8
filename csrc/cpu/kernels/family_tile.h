// What the kernels of family.h stand on: rows of K and V, packed queries, and the way from a tile's
// products S^T [keys][queries] to logits (softcap, bias, ALiBi, mask, window) and dropout's
// multipliers.  Queries lie in lanes: lane q of a tile is query m0 + q.
#pragma once
#include "cpu/simd/gemm.h"
#include "cpu/tile/rows.h"

namespace attn::cpu::ATTN_ISA {

// The product of gemm.h over numbers:  C[r][q] (+)= sum_k A[r][k] B[k][q];  strides in numbers.
template <class T>
ATTN_NOINLINE void product(int64_t rows, int64_t columns, int64_t depth, const T* A,
                           int64_t row_stride, int64_t depth_stride, const T* B, int64_t ldb, T* C,
                           int64_t ldc, bool accumulate) {
  gemm<Plain<T>>(rows, columns, depth, reinterpret_cast<const char*>(A),
                 row_stride * int64_t(sizeof(T)), depth_stride * int64_t(sizeof(T)), B, ldb, C, ldc,
                 accumulate);
}

// Rows of K or V as the compute type: in place where the storage is that type and rows are evenly
// spaced, else a copy.
template <class T>
struct KeyRows {
  const T* data;
  int64_t stride;
};

template <class T>
ATTN_NOINLINE KeyRows<T> family_rows(const Sequence& seq, const void* base, const Strides& s,
                                     int64_t h, int64_t n0, int64_t n, int64_t dim, T* scratch) {
  const DType type = seq.p->dtype;
  const bool same = (type == DType::kFloat32 && sizeof(T) == 4) || type == DType::kFloat64;
  const bool even =
      !seq.ptr->block_table || n0 / seq.p->page_size == (n0 + n - 1) / seq.p->page_size;
  if (same && even) return {static_cast<const T*>(base) + seq.k_offset(s, h, n0), s.s};
  const auto* bytes = static_cast<const char*>(base);
  for (int64_t j = 0; j < n; ++j)
    convert_row<T>(type, bytes + seq.k_offset(s, h, n0 + j) * int64_t(dtype_size(type)), dim,
                   scratch + j * dim);
  return {scratch, dim};
}

template <class T>
struct FamilyScores {
  const Sequence& seq;
  int64_t h;           // query head
  int64_t m0, nq, bm;  // first query, queries, queries padded to whole vectors
  T* add_scratch;      // [BLOCK_N][kMaxQueries]
  T* keep_scratch;     // [BLOCK_N][kMaxQueries]
  PhiloxKey philox{};

  FamilyScores(const Sequence& s, int64_t head, int64_t first, int64_t queries, T* add, T* keep)
      : seq(s), h(head), m0(first), nq(queries), add_scratch(add), keep_scratch(keep) {
    bm = (nq + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    if (seq.p->dropout_p > 0) philox = philox_key(seq.ptr->rng_state[0], seq.ptr->rng_state[1]);
  }

  // True when some pair of the tile may be excluded.
  bool partial(int64_t n0, int64_t nk) const {
    return seq.ptr->mask || seq.ptr->bias || !seq.band_full(m0, m0 + nq, n0, n0 + nk);
  }

  // S: products in, logits out.  dcap (or null) receives d softcap(s) / ds.
  ATTN_NOINLINE void logits(int64_t n0, int64_t nk, T* S, T* dcap) const {
    const Problem& p = *seq.p;
    const T ninf = -std::numeric_limits<T>::infinity();
    const bool extra = seq.ptr->mask || seq.ptr->bias;
    if (extra) fill_add(n0, nk);
    const bool band = !seq.band_full(m0, m0 + nq, n0, n0 + nk);
    const T scale = T(p.scale), cap = T(p.softcap);
    const T slope = seq.ptr->alibi_slopes
                        ? T(static_cast<const float*>(
                              seq.ptr->alibi_slopes)[seq.b * seq.ptr->alibi_stride_b + h])
                        : T(0);
    const int64_t corner = seq.seqlen_k - seq.seqlen_q;
    for (int64_t j = 0; j < nk; ++j) {
      const int64_t key = n0 + j;
      T first = T(-1), last = T(kMaxQueries);  // lanes that see this key
      if (band) band_lanes(key, &first, &last);
      for (int64_t q = 0; q < bm; q += kLanes<T>) {
        T* at = S + j * kMaxQueries + q;
        Vec<T> s = load(at) * scale;
        if (cap > 0) {
          const Vec<T> t = vtanh(s / cap);
          s = t * cap;
          if (dcap) store(dcap + j * kMaxQueries + q, T(1) - t * t);
        }
        const Vec<T> lane = iota<T>() + T(q);
        if (seq.ptr->alibi_slopes) {
          const Vec<T> distance = lane + T(m0 + corner - key);
          s -= slope * (distance < T(0) ? -distance : distance);
        }
        if (extra) {
          const Vec<T> a = load(add_scratch + j * kMaxQueries + q);
          s = a == ninf ? set1(ninf) : s + a;
        }
        if (band) {
          s = lane < first ? set1(ninf) : s;
          s = lane > last ? set1(ninf) : s;
        }
        store(at, s);
      }
    }
  }

  // keep_scratch[j][q] = 1 / (1 - p) where (i, j) survives dropout, else 0.  n0 is a multiple of 4.
  ATTN_NOINLINE const T* keep(int64_t n0, int64_t nk) const {
    const double p = seq.p->dropout_p;
    const uint64_t threshold = dropout_threshold(p);
    const T kept = p < 1 ? T(1 / (1 - p)) : T(0);
    for (int64_t j = 0; j < nk; j += 4) {
      const int64_t words = nk - j < 4 ? nk - j : 4;
      for (int64_t q = 0; q < bm; ++q) {
        const uint32_t counter[4] = {uint32_t((n0 + j) >> 2), uint32_t(m0 + q), uint32_t(h),
                                     uint32_t(seq.b)};
        uint32_t out[4];
        philox4x32(philox, counter, out);
        for (int64_t w = 0; w < words; ++w)
          keep_scratch[(j + w) * kMaxQueries + q] = out[w] >= threshold ? kept : T(0);
      }
    }
    return keep_scratch;
  }

 private:
  void band_lanes(int64_t key, T* first, T* last) const {
    const int64_t aligned = key - seq.diagonal() - m0;
    auto clamp = [](int64_t x) { return x < -1 ? -1 : x > kMaxQueries ? kMaxQueries : x; };
    if (seq.p->window_right != kUnbounded) *first = T(clamp(aligned - seq.p->window_right));
    if (seq.p->window_left != kUnbounded) *last = T(clamp(aligned + seq.p->window_left));
  }

  // add_scratch[j][q] = bias, or -inf where the mask excludes
  ATTN_NOINLINE void fill_add(int64_t n0, int64_t nk) const {
    const Problem& p = *seq.p;
    const T ninf = -std::numeric_limits<T>::infinity();
    const auto* mask = static_cast<const uint8_t*>(seq.ptr->mask);
    for (int64_t q = 0; q < bm; ++q) {
      const int64_t i = m0 + (q < nq ? q : nq - 1);
      const int64_t bias_row = seq.b * p.bias.b + h * p.bias.h + i * p.bias.q + n0 * p.bias.k;
      const int64_t mask_row = seq.b * p.mask.b + h * p.mask.h + i * p.mask.q + n0 * p.mask.k;
      for (int64_t j = 0; j < nk; ++j) {
        T a = seq.ptr->bias ? load_one<T>(p.bias_dtype, seq.ptr->bias, bias_row + j * p.bias.k)
                            : T(0);
        if (mask && !mask[mask_row + j * p.mask.k]) a = ninf;
        add_scratch[j * kMaxQueries + q] = a;
      }
    }
  }
};

// False when some value of the tile is inf or NaN: x - x is 0 for finite x only.
template <class T>
ATTN_NOINLINE bool finite_rows(KeyRows<T> rows, int64_t n, int64_t dim) {
  T bad = 0;
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < dim; ++d)
      bad += rows.data[j * rows.stride + d] - rows.data[j * rows.stride + d];
  return bad == T(0);
}

// X^T [dim][kMaxQueries] of nq storage rows; padding lanes are 0.
template <class T>
ATTN_NOINLINE void pack_lanes(DType type, const void* base, int64_t offset, int64_t row_stride,
                              int64_t nq, int64_t bm, int64_t dim, T* row, T* out) {
  for (int64_t q = 0; q < bm; ++q) {
    if (q < nq)
      convert_row<T>(
          type,
          static_cast<const char*>(base) + (offset + q * row_stride) * int64_t(dtype_size(type)),
          dim, row);
    for (int64_t d = 0; d < dim; ++d) out[d * kMaxQueries + q] = q < nq ? row[d] : T(0);
  }
}

}  // namespace attn::cpu::ATTN_ISA
