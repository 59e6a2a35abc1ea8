// dV += P^T dO and dK += dS^T Q: the gradients that a block of keys owns.
#pragma once
#include "cpu/simd/gemm.h"
#include "cpu/tile/row_product.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// C += A^T B for dV (P and dO) or dK (dS and Q).
template <class Op>
struct KeyGradient {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  DType type;        // of the rows
  const char* rows;  // [nq][dim] of dO or Q as stored,
  int64_t stride;    // in numbers
  int64_t dim, pad;  // pad: dim in whole vectors
  const Item* A;     // [BLOCK_N][items of kPanel]
  Item* packed;      // [items of kPanel][pad], of the rows where they are copied
  T* C;              // [BLOCK_N][pad]

  // The rows as B, whose rows are `*ld` apart.
  const Item* query_rows(int64_t nq, int64_t depth, int64_t* ld) const {
    if (Op::kPack == 1 && int64_t(dtype_size(type)) == int64_t(sizeof(T)) && dim == pad &&
        (stride == dim || stride * int64_t(dtype_size(type)) < 1024)) {
      *ld = stride;
      return reinterpret_cast<const Item*>(rows);
    }
    *ld = pad;
    for (int64_t i = 0; i < depth; ++i) {
      Item* row = packed + i * pad;
      std::fill(row + dim, row + pad, Item(0));
      const char* from = rows + i * Op::kPack * stride * int64_t(dtype_size(type));
      if constexpr (Op::kPack == 1) {
        convert_row(type, from, dim, row);
      } else {
        const auto* even = reinterpret_cast<const uint16_t*>(from);
        interleave_rows(even, 2 * i + 1 < nq ? even + stride : nullptr, dim, row);
      }
    }
    return packed;
  }

  // C [keys][dim] += A [keys][queries] * rows [queries][dim]; = where nothing has begun.
  ATTN_NOINLINE void add(int64_t nq, int64_t nk, const Segments& segments, bool begun,
                         Prefetch& soon) const {
    constexpr int64_t pairs = kPanel / Op::kPack;
    const int64_t depth = (nq + Op::kPack - 1) / Op::kPack;
    int64_t ldb, key = 0;  // segments ascend and do not overlap
    const Item* B = query_rows(nq, depth, &ldb);
    auto clear_to = [&](int64_t end) {
      if (!begun && key < end) std::fill(C + key * pad, C + end * pad, T(0));
    };
    for (const Segment& s : segments) {
      const int64_t begin = s.begin / Op::kPack, end = std::min(s.end / Op::kPack, depth);
      clear_to(s.lo);
      gemm<Op>(s.hi - s.lo, pad, end - begin,
               reinterpret_cast<const char*>(A + s.lo * pairs + begin),
               pairs * int64_t(sizeof(Item)), int64_t(sizeof(Item)), B + begin * ldb, ldb,
               C + s.lo * pad, pad, begun, &soon);
      key = s.hi;
    }
    clear_to(nk);
  }

  // The same for the last panel that adds: factor * C as rows of storage of type `to`, row_bytes
  // apart.  False where a sum is inf or NaN.
  ATTN_NOINLINE bool finish(const Panel<T>& panel, const Tile& tile, const Segments& segments,
                            bool begun, T factor, DType to, char* out, int64_t row_bytes,
                            Prefetch& soon) const {
    int64_t ldb, key = 0;
    const Item* B = query_rows(panel.nq, items<Op>(panel.nq), &ldb);
    const int64_t step = int64_t(sizeof(Item));
    const RowProduct<Op> product({reinterpret_cast<const char*>(B), step, ldb * step}, dim, to);
    bool finite = true;
    auto store_to = [&](int64_t end) {  // rows that this panel does not see
      if (key >= end) return;
      if (!begun) std::fill(C + key * pad, C + end * pad, T(0));
      restore_rows<T>(to, C + key * pad, pad, factor, end - key, dim,
                      [&](int64_t j) { return out + (key + j) * row_bytes; });
    };
    for (const Segment& s : segments) {
      store_to(s.lo);
      finite &=
          product.write_keys(panel, tile, s, A, factor, begun ? C : nullptr, out, row_bytes, soon);
      key = s.hi;
    }
    store_to(tile.nk);
    return finite;
  }
};

}  // namespace attn::cpu::ATTN_ISA
