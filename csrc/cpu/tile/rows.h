// Rows of storage -> operands of a product, and back: conversion, packing, transposition.
#pragma once
#include "cpu/simd/convert.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/transpose.h"
#include "cpu/tile/sequence.h"

namespace attn::cpu::ATTN_ISA {

// dst[i] = src[i] for n numbers of a storage row.
template <class T>
ATTN_NOINLINE void convert_row(DType type, const void* src, int64_t n, T* dst) {
#if ATTN_VEC_BYTES >= 32
  if constexpr (sizeof(T) == 4)
    if (type == DType::kFloat16) {
      const auto* half = static_cast<const uint16_t*>(src);
      int64_t i = 0;
#if ATTN_VEC_BYTES == 64
      for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(half + i))));
#else
      for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(dst + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(half + i))));
#endif
      for (; i < n; ++i) dst[i] = half_to_float(half[i]);
      return;
    }
#endif
  load_row<T>(type, src, n, dst);
}

// A vector of bfloat16 numbers.
template <class T>
ATTN_INLINE Vec<T> load_bf16(const char* src) {
#if ATTN_VEC_BYTES == 64
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)src)),
                                     16);
#endif
  T row[kLanes<T>] = {};
  load_row<T>(DType::kBFloat16, src, kLanes<T>, row);
  return load(row);
}

template <class T>
ATTN_NOINLINE void restore_row(DType type, const T* src, int64_t n, void* dst) {
  if (sizeof(T) == 8 || type == DType::kFloat32) {  // float64 alone is computed in double
    std::memcpy(dst, src, size_t(n) * sizeof(T));
    return;
  }
#if ATTN_VEC_BYTES >= 32
  if constexpr (sizeof(T) == 4)
    if (type == DType::kFloat16) {
      auto* half = static_cast<uint16_t*>(dst);
      int64_t i = 0;
#if ATTN_VEC_BYTES == 64
      for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i*)(half + i), _mm512_cvtps_ph(_mm512_loadu_ps(src + i), 0));
#else
      for (; i + 8 <= n; i += 8)
        _mm_storeu_si128((__m128i*)(half + i), _mm256_cvtps_ph(_mm256_loadu_ps(src + i), 0));
#endif
      for (; i < n; ++i) half[i] = float_to_half(src[i]);
      return;
    }
#endif
#ifdef ATTN_BF16_DOT
  if (type == DType::kBFloat16) {
    auto* out = static_cast<uint16_t*>(dst);
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store_bf16(out + i, load(src + i));
    for (; i < n; ++i) out[i] = float_to_bf16(src[i]);
    return;
  }
#endif
  if constexpr (sizeof(T) == 4) store_row(type, src, n, dst);
}

// n rows of storage, factor * those of `rows`, which are `pad` numbers apart, `dim` numbers of
// each; row i goes to at(i).  `rows` is scratch.
template <class T, class At>
ATTN_INLINE void restore_rows(DType type, T* rows, int64_t pad, T factor, int64_t n, int64_t dim,
                              const At& at) {
  constexpr int L = kLanes<T>;
#ifdef ATTN_BF16_DOT
  // A call for each row of a few vectors would take as long as the row.
  if (type == DType::kBFloat16 && dim == pad) {
    for (int64_t i = 0; i < n; ++i, rows += pad) {
      auto* out = reinterpret_cast<uint16_t*>(at(i));
      for (int64_t d = 0; d < dim; d += L) store_bf16(out + d, load(rows + d) * factor);
    }
    return;
  }
#endif
  for (int64_t i = 0; i < n; ++i, rows += pad) {
    for (int64_t d = 0; d < pad; d += L) store(rows + d, load(rows + d) * factor);
    restore_row<T>(type, rows, dim, at(i));
  }
}

// Rows of storage from their transposition: out row i = factor[i] * in[.][i] for i < n <= kLanes,
// `dim` numbers each; `in` is [dim][kPanel], `rows` scratch of kLanes x (dim padded to vectors).
// at: where the rows are if they are not row_bytes apart.
template <class T>
ATTN_NOINLINE void store_transposed(DType type, const T* in, Vec<T> factor, int64_t n, int64_t dim,
                                    T* rows, char* out, int64_t row_bytes,
                                    char* const* at = nullptr) {
  constexpr int L = kLanes<T>;
  const int64_t padded = (dim + L - 1) / L * L;
  const bool direct = !at && dtype_size(type) == sizeof(T) && n == L && dim == padded;
#ifdef ATTN_BF16_DOT
  const bool narrow = !at && type == DType::kBFloat16 && dim == padded;
#endif
  for (int64_t d = 0; d < dim; d += L) {
    Vec<T> block[L];
    if (d + L <= dim) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) block[i] = load(in + (d + i) * kPanel) * factor;
    } else {
      for (int i = 0; i < L; ++i)
        block[i] = d + i < dim ? load(in + (d + i) * kPanel) * factor : Vec<T>{};
    }
    transpose_round<T, 1>(block);
#ifdef ATTN_BF16_DOT
    if (narrow) {
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        if (i < n) store_bf16(reinterpret_cast<uint16_t*>(out + i * row_bytes) + d, block[i]);
      continue;
    }
#endif
    T* to = direct ? reinterpret_cast<T*>(out) + d : rows + d;
    const int64_t stride = direct ? row_bytes / int64_t(sizeof(T)) : padded;
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) store(to + i * stride, block[i]);
  }
#ifdef ATTN_BF16_DOT
  if (narrow) return;
#endif
  if (!direct)
    for (int64_t i = 0; i < n; ++i)
      restore_row<T>(type, rows + i * padded, dim, at ? at[i] : out + i * row_bytes);
}

// One storage row as items of Op: numbers, or pairs of bfloat16 (an odd last one is paired with 0).
template <class Op>
ATTN_INLINE void item_row(DType type, const void* src, int64_t dim, typename Op::Item* dst) {
  if constexpr (Op::kPack == 1) {
    convert_row(type, src, dim, dst);
  } else {
    if (dim & 1) dst[dim / 2] = 0;
    std::memcpy(dst, src, size_t(dim) * 2);
  }
}

// out[d] = (even[d], odd[d]): two rows of bfloat16 as pairs.  No odd row: pairs with 0.
ATTN_INLINE void interleave_rows(const uint16_t* even, const uint16_t* odd, int64_t dim,
                                 uint32_t* out) {
  int64_t d = 0;
#ifdef ATTN_BF16_DOT
  for (; d + 32 <= dim; d += 32) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40,
                                         8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    const __m512i a = _mm512_loadu_si512(even + d);
    const __m512i b = odd ? _mm512_loadu_si512(odd + d) : _mm512_setzero_si512();
    _mm512_storeu_si512(out + d, _mm512_permutex2var_epi16(a, low, b));
    _mm512_storeu_si512(out + d + 16, _mm512_permutex2var_epi16(a, high, b));
  }
#endif
  for (; d < dim; ++d) out[d] = even[d] | uint32_t(odd ? odd[d] : 0) << 16;
}

template <class Op>
constexpr int64_t items(int64_t dim) {
  return (dim + Op::kPack - 1) / Op::kPack;
}

// The depth of products over the head dimension: whole steps, as pack_transposed (whose padding is
// to whole vectors) and rows_by_depth fill with 0.
template <class Op>
constexpr int64_t depth_of(int64_t dim) {
  return (items<Op>(dim) + Op::kStep - 1) / Op::kStep * Op::kStep;
}

// X^T [items of dim][kPanel] of n <= kPanel storage rows `row_bytes` apart; the padding queries up
// to `columns` are 0.  `block` holds kLanes rows of items, padded to whole vectors.  at: where the
// rows are if they are not row_bytes apart.
template <class Op>
ATTN_NOINLINE void pack_transposed(DType type, const char* base, int64_t row_bytes, int64_t n,
                                   int64_t columns, int64_t dim, typename Op::Item* block,
                                   typename Op::Item* out, const char* const* at = nullptr) {
  using Item = typename Op::Item;
  using Lane = typename Op::Acc;  // transposition moves bits: float lanes carry bf16 pairs as well
  constexpr int L = kLanes<Lane>;
  const int64_t depth = items<Op>(dim), padded = (depth + L - 1) / L * L;
  const bool direct = depth == padded && dim % Op::kPack == 0 &&
                      (Op::kPack == 2 || dtype_size(type) == sizeof(Item));
  for (int64_t q = 0; q < columns; q += L) {
    const int64_t rows = std::min<int64_t>(L, n - q);
    const Lane* from = reinterpret_cast<const Lane*>(base + q * row_bytes);
    int64_t stride = row_bytes / int64_t(sizeof(Lane));
    if (at || !direct || rows < L || row_bytes % int64_t(sizeof(Lane))) {
      for (int64_t r = 0; r < L; ++r) {
        Item* row = block + r * padded;
        if (r >= rows || depth != padded) std::memset(row, 0, size_t(padded) * sizeof(Item));
        if (r < rows) item_row<Op>(type, at ? at[q + r] : base + (q + r) * row_bytes, dim, row);
      }
      from = reinterpret_cast<const Lane*>(block);
      stride = padded;
    }
    transpose<Lane>(from, stride, L, padded, reinterpret_cast<Lane*>(out) + q, kPanel);
  }
}

// n rows of K or V from n0, which may lie beyond the end, are needed soon.
ATTN_NOINLINE void prefetch_keys(const Sequence& seq, const void* base, const Strides& s, int64_t h,
                                 int64_t n0, int64_t n, int64_t dim, Prefetch& soon) {
  if (seq.ptr->block_table) return;
  const int64_t size = int64_t(dtype_size(seq.p->dtype));
  n = std::min(n, seq.seqlen_k - n0);
  soon.add(static_cast<const char*>(base) + seq.k_offset(s, h, n0) * size, n, s.s * size,
           dim * size);
}

// An operand of broadcasts: element (row, depth) at data + row * row_step + depth * depth_step, in
// bytes.
struct Operand {
  const char* data;
  int64_t row_step, depth_step;
};

// True where the n rows from n0 lie evenly spaced in memory.
inline bool evenly_spaced(const Sequence& seq, int64_t n0, int64_t n) {
  return !seq.ptr->block_table || n0 / seq.p->page_size == (n0 + n - 1) / seq.p->page_size;
}

// Rows of K (or V) with the head dimension as depth: in place where their storage is already Op's
// items, else copied.  Rows far apart are copied too: at strides of 4 KiB they would share a few
// cache sets.
template <class Op>
ATTN_NOINLINE Operand rows_by_depth(const Sequence& seq, const void* base, const Strides& s,
                                    int64_t h, int64_t n0, int64_t n, int64_t dim,
                                    typename Op::Item* scratch) {
  using Item = typename Op::Item;
  const DType type = seq.p->dtype;
  const int64_t size = int64_t(dtype_size(type)), depth = depth_of<Op>(dim);
  const auto* bytes = static_cast<const char*>(base);
  const bool same = Op::kPack == 2 ? dim % (2 * Op::kStep) == 0 : size == int64_t(sizeof(Item));
  if (same && evenly_spaced(seq, n0, n) && (s.s * size < 1024 || s.s == dim))
    return {bytes + seq.k_offset(s, h, n0) * size, s.s * size, int64_t(sizeof(Item))};
  for (int64_t j = 0; j < n; ++j) {
    Item* row = scratch + j * depth;
    item_row<Op>(type, bytes + seq.k_offset(s, h, n0 + j) * size, dim, row);
    if constexpr (Op::kStep > 1) std::fill(row + items<Op>(dim), row + depth, Item(0));
  }
  return {reinterpret_cast<const char*>(scratch), depth * int64_t(sizeof(Item)),
          int64_t(sizeof(Item))};
}

#ifdef ATTN_AMX
// Bytes between the dimensions of rows_by_key: an odd number of cache lines, so that the rows of a
// tile spread over the sets.
inline int64_t by_key_step(int64_t n) { return ((n + 31) / 32 | 1) * 64; }

// out[d][pair of keys]: 16 x 16 pairs at a time, transposed in registers.  What lies beyond the
// last key is 0.
ATTN_NOINLINE Operand pairs_by_dimension(const Sequence& seq, const char* bytes, const Strides& s,
                                         int64_t h, int64_t n0, int64_t n, int64_t dim,
                                         uint32_t* out) {
  const int64_t step = by_key_step(n) / 4;
  for (int64_t j = 0; j < n; j += 32)
    for (int64_t d = 0; d < dim; d += 16) {
      const auto lanes = __mmask16(dim - d >= 16 ? 0xffff : (1 << (dim - d)) - 1);
      auto row = [&](int64_t key) {
        const char* from = key < n ? bytes + (seq.k_offset(s, h, n0 + key) + d) * 2 : nullptr;
        return _mm512_cvtepu16_epi32(from ? _mm256_maskz_loadu_epi16(lanes, from)
                                          : _mm256_setzero_si256());
      };
      Vec<float> block[16];
      for (int i = 0; i < 16; ++i)
        block[i] =
            (Vec<float>)_mm512_or_si512(row(j + 2 * i), _mm512_slli_epi32(row(j + 2 * i + 1), 16));
      transpose_round<float, 1>(block);
      for (int i = 0; i < 16 && d + i < dim; ++i)
        store(reinterpret_cast<float*>(out) + (d + i) * step + j / 2, block[i]);
    }
  return {reinterpret_cast<const char*>(out), step * 4, 4};
}
#endif

// Items that rows_by_key needs for n keys, an even number.
template <class Op>
inline int64_t by_key_items(int64_t n, int64_t dim) {
#ifdef ATTN_AMX
  if (Op::kStep > 1) return by_key_step(n) / 4 * dim;
#endif
  return n / Op::kPack * dim;
}

// The same rows with the keys as depth: bf16 pairs hold two keys, so they are always interleaved.
template <class Op>
ATTN_NOINLINE Operand rows_by_key(const Sequence& seq, const void* base, const Strides& s,
                                  int64_t h, int64_t n0, int64_t n, int64_t dim,
                                  typename Op::Item* scratch) {
  if constexpr (Op::kPack == 1) {
    const Operand rows = rows_by_depth<Op>(seq, base, s, h, n0, n, dim, scratch);
    return {rows.data, rows.depth_step, rows.row_step};
  } else {
    const auto* bytes = static_cast<const char*>(base);
#ifdef ATTN_AMX
    if constexpr (Op::kStep > 1) return pairs_by_dimension(seq, bytes, s, h, n0, n, dim, scratch);
#endif
    auto row = [&](int64_t j) {
      return reinterpret_cast<const uint16_t*>(bytes + seq.k_offset(s, h, n0 + j) * 2);
    };
    for (int64_t j = 0; j < n; j += 2)
      interleave_rows(row(j), j + 1 < n ? row(j + 1) : nullptr, dim, scratch + j / 2 * dim);
    return {reinterpret_cast<const char*>(scratch), 4, dim * 4};
  }
}

// Number (key j, dimension d) of rows_by_key's operand.
template <class Op>
ATTN_INLINE typename Op::Acc number_at(const Operand& a, int64_t j, int64_t d) {
  const auto item =
      item_at<typename Op::Item>(a.data + d * a.row_step + j / Op::kPack * a.depth_step);
  if constexpr (Op::kPack == 1)
    return item;
  else
    return bf16_to_float(uint16_t(item >> (j & 1) * 16));
}

// False when some of n rows of `count` pairs of bfloat16 is inf or NaN: an exponent of ones, and no
// other, carries into the sign.
inline bool all_pairs_finite(const char* data, int64_t row_bytes, int64_t n, int64_t count) {
  constexpr int L = kLanes<float>;
  const auto carried = [](auto x) { return (x & 0x7f807f80u) + 0x00800080u; };
  uint32_t bad = 0;
  Vec<uint32_t> lanes{};
  for (int64_t j = 0; j < n; ++j) {
    const char* row = data + j * row_bytes;
    int64_t d = 0;
    for (; d + L <= count; d += L) {
      Vec<uint32_t> x;
      std::memcpy(&x, row + d * 4, sizeof(x));
      lanes |= carried(x);
    }
    for (; d < count; ++d) bad |= carried(item_at<uint32_t>(row + d * 4));
  }
  for (int lane = 0; lane < L; ++lane) bad |= lanes[lane];
  return !(bad & 0x80008000u);
}

// False when some number of n rows of items is inf or NaN.
template <class Op>
ATTN_NOINLINE bool all_finite(const char* data, int64_t row_bytes, int64_t n, int64_t count) {
  using Item = typename Op::Item;
  if constexpr (Op::kPack == 1) {
    constexpr int L = kLanes<Item>;
    Item bad = 0;             // x - x is 0 for finite x only
    Vec<Item> lanes[4] = {};  // of every fourth row, since one sum would wait for itself
    for (int64_t j = 0; j < n; j += 4) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) {
        if (j + u >= n) break;
        const auto* row = reinterpret_cast<const Item*>(data + (j + u) * row_bytes);
        int64_t d = 0;
        for (; d + L <= count; d += L) {
          const Vec<Item> x = load(row + d);
          lanes[u] += x - x;
        }
        for (; d < count; ++d) {
          const Item x = item_at<Item>(reinterpret_cast<const char*>(row + d));
          bad += x - x;
        }
      }
    }
    return bad == 0 && all_equal<Item>((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]), Vec<Item>{});
  } else {
    return all_pairs_finite(data, row_bytes, n, count);
  }
}

}  // namespace attn::cpu::ATTN_ISA
