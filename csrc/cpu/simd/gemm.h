// The one product of this backend:  C[r][q] (+)= sum_k A(r, k) * B[k][q],  items of A broadcast
// against rows of B.
//   forward   S^T[key][query]   = K[key][d]    * Q^T[d][query]
//             O^T[dv][query]   += V^T[dv][key] * P^T[key][query]
//   backward  dP^T[key][query]  = V * dO^T,   dV[key][dv] += P^T * dO,   dK[key][d] += dS^T * Q,
//             dQ^T[d][query]   += K^T * dS^T
// A is read where it lies (any byte steps), exactly `rows` x `depth` of it; B and C are scratch,
// padded to whole vectors.
#pragma once
#include "cpu/simd/prefetch.h"
#include "cpu/simd/vector.h"
#include "cpu/tiles.h"

namespace attn::cpu::ATTN_ISA {

// How a product multiplies: numbers one by one ...
template <class T>
struct Plain {
  using Acc = T;
  using Item = T;
  static constexpr int kPack = 1;  // numbers of the depth in an item
  static constexpr int kStep = 1;  // items of A taken at once; they lie side by side if above 1
  struct PerThread {};             // what a thread holds during its tasks
  using Items = Plain;             // whose items are the same: what only makes them is its
  static ATTN_INLINE Vec<T> broadcast(Item a) { return set1(a); }
  static ATTN_INLINE Vec<T> fma(Vec<T> acc, Vec<T> a, Vec<T> b) { return acc + a * b; }
};

// ... or pairs of bfloat16 along the depth, products and sum in float (vdpbf16ps).
#ifdef ATTN_BF16_DOT
struct Bf16Pairs {
  using Acc = float;
  using Item = uint32_t;
  static constexpr int kPack = 2;
  static constexpr int kStep = 1;
  struct PerThread {};
  using Items = Bf16Pairs;  // those of AmxPairs, too
  static ATTN_INLINE Vec<uint32_t> broadcast(Item a) { return (Vec<uint32_t>)_mm512_set1_epi32(a); }
  static ATTN_INLINE Vec<float> fma(Vec<float> acc, Vec<uint32_t> a, Vec<uint32_t> b) {
    return (Vec<float>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)(__m512i)a, (__m512bh)(__m512i)b);
  }
};
#endif

#ifdef ATTN_BF16_DOT
// Two rows as bfloat16: one after the other, and from there (even[i], odd[i]) as pairs.
ATTN_INLINE __m512i two_rows(Vec<float> even, Vec<float> odd) {
  return (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
}
ATTN_INLINE Vec<uint32_t> pairs_of(__m512i two) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec<uint32_t>)_mm512_permutexvar_epi16(order, two);
}
ATTN_INLINE Vec<uint32_t> pair_rows(Vec<float> even, Vec<float> odd) {
  return pairs_of(two_rows(even, odd));
}
ATTN_INLINE void store_two_rows(uint16_t* even, uint16_t* odd, __m512i two) {
  _mm256_storeu_si256((__m256i*)even, _mm512_castsi512_si256(two));
  _mm256_storeu_si256((__m256i*)odd, _mm512_extracti64x4_epi64(two, 1));
}
ATTN_INLINE void store_bf16(uint16_t* p, Vec<float> x) {
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh((__m512)x));
}
#endif

template <class Item>
ATTN_INLINE Item item_at(const char* p) {
  Item x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

// One block of ROWS x (NV vectors), whose sums stay in registers over the whole depth.
template <class Op, int ROWS, int NV>
ATTN_INLINE void multiply(int64_t depth, const char* A, int64_t row_step, int64_t depth_step,
                          const typename Op::Item* B, int64_t ldb,
                          Vec<typename Op::Acc> (&acc)[ROWS][NV], Lines soon) {
  using Item = typename Op::Item;
  constexpr int L = kLanes<typename Op::Acc>;
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) acc[r][v] = Vec<typename Op::Acc>{};
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    Vec<Item> b[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) b[v] = load(B + v * L);
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r) {
      const Vec<Item> a = Op::broadcast(item_at<Item>(A + r * row_step));
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = Op::fma(acc[r][v], a, b[v]);
    }
    // Pairs of bfloat16 take half of the turns for as many lines of a row, and half of the time.
#pragma GCC unroll 2
    for (int i = 0; i < Op::kPack; ++i) soon.one();
    A += depth_step;
    B += ldb;
  }
}

// The sums start from 0 and C joins at the end: sums of sums, whose rounding grows less with the
// length.
template <class Op, int ROWS, int NV>
ATTN_INLINE void gemm_block(int64_t depth, const char* A, int64_t row_step, int64_t depth_step,
                            const typename Op::Item* B, int64_t ldb, typename Op::Acc* C,
                            int64_t ldc, bool accumulate, Lines soon) {
  using T = typename Op::Acc;
  constexpr int L = kLanes<T>;
  Vec<T> acc[ROWS][NV];
  multiply<Op>(depth, A, row_step, depth_step, B, ldb, acc, soon);
  if (accumulate) {
#pragma GCC unroll 24
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] += load(C + r * ldc + v * L);
  }
#pragma GCC unroll 24
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) store(C + r * ldc + v * L, acc[r][v]);
}

// `blocks` blocks of ROWS rows, one below the other.  LD: both leading dimensions, when it is known
// at compile time (else 0): their multiples are then parts of the instructions.
template <class Op, int ROWS, int NV, int64_t LD>
__attribute__((noinline)) void gemm_rows(int64_t blocks, int64_t depth, const char* A,
                                         int64_t row_step, int64_t depth_step,
                                         const typename Op::Item* B, int64_t ldb,
                                         typename Op::Acc* C, int64_t ldc, bool accumulate,
                                         Prefetch* soon) {
  if (LD) ldb = ldc = LD;
  for (; blocks > 0; --blocks, A += ROWS * row_step, C += ROWS * ldc) {
    const Lines lines = soon ? soon->some(depth * Op::kPack, A) : Lines{A, A};
    gemm_block<Op, ROWS, NV>(depth, A, row_step, depth_step, B, ldb, C, ldc, accumulate, lines);
  }
}

template <class Op, int NV, int64_t LD>
inline void gemm_columns(int64_t rows, int64_t depth, const char* A, int64_t row_step,
                         int64_t depth_step, const typename Op::Item* B, int64_t ldb,
                         typename Op::Acc* C, int64_t ldc, bool accumulate, Prefetch* soon) {
  // Fewer vectors leave registers for more rows: the chains of additions must cover their latency.
  constexpr int kRows = NV == ATTN_NV                 ? ATTN_MR
                        : ATTN_MR * ATTN_NV / NV > 16 ? 16
                                                      : ATTN_MR * ATTN_NV / NV;
  int64_t r = 0;
  auto take = [&](auto count, int64_t blocks) {
    if (blocks == 0) return;
    // The last rows, at most one block of two and of one: a copy serves every leading dimension.
    constexpr int64_t kLD = count.value > 2 ? LD : 0;
    gemm_rows<Op, count.value, NV, kLD>(blocks, depth, A + r * row_step, row_step, depth_step, B,
                                        ldb, C + r * ldc, ldc, accumulate, soon);
    r += blocks * count.value;
  };
  // Not down to the last full block when 2 rows would be left: 4 + 4 beat 6 + 2.
  take(std::integral_constant<int, kRows>{},
       kRows == 6 && rows % 6 == 2 && rows > 2 ? rows / 6 - 1 : rows / kRows);
  if constexpr (kRows > 8) take(std::integral_constant<int, 8>{}, (rows - r) / 8);
  take(std::integral_constant<int, 4>{}, (rows - r) / 4);
  take(std::integral_constant<int, 2>{}, (rows - r) / 2);
  take(std::integral_constant<int, 1>{}, rows - r);
}

// columns is a multiple of kLanes<Acc>.  soon: what to prefetch meanwhile, or null.
template <class Op, int64_t LD = 0>
inline void gemm(int64_t rows, int64_t columns, int64_t depth, const char* A, int64_t row_step,
                 int64_t depth_step, const typename Op::Item* B, int64_t ldb, typename Op::Acc* C,
                 int64_t ldc, bool accumulate, Prefetch* soon = nullptr) {
  constexpr int L = kLanes<typename Op::Acc>;
  int64_t q = 0;
  auto columns_of = [&](auto vectors) {
    // Narrow blocks of float64 are rare: one copy of them serves every leading dimension.
    constexpr int64_t kLD = vectors.value == ATTN_NV || sizeof(typename Op::Acc) == 4 ? LD : 0;
    gemm_columns<Op, vectors.value, kLD>(rows, depth, A, row_step, depth_step, B + q, ldb, C + q,
                                         ldc, accumulate, soon);
    q += vectors.value * L;
  };
  while (columns - q >= ATTN_NV * L) columns_of(std::integral_constant<int, ATTN_NV>{});
#if ATTN_NV > 2
  if (columns - q >= 3 * L) columns_of(std::integral_constant<int, 3>{});
  if (columns - q >= 2 * L) columns_of(std::integral_constant<int, 2>{});
#endif
  if (columns - q >= L) columns_of(std::integral_constant<int, 1>{});
}

// The same where B and C are rows of a panel.
template <class Op>
inline void gemm_panel(int64_t rows, int64_t columns, int64_t depth, const char* A,
                       int64_t row_step, int64_t depth_step, const typename Op::Item* B,
                       typename Op::Acc* C, bool accumulate, Prefetch* soon = nullptr) {
  gemm<Op, kPanel>(rows, columns, depth, A, row_step, depth_step, B, kPanel, C, kPanel, accumulate,
                   soon);
}

}  // namespace attn::cpu::ATTN_ISA
