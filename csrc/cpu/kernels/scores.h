// S^T of a panel of queries against a tile of keys: dot products K Q^T, or additive scores.  What
// forward.h and inspect.h share: Q of a unit and K of a tile as operands, and the way to logits.
#pragma once
#include "cpu/kernels/additive.h"
#include "cpu/kernels/options.h"
#include "cpu/simd/gemm.h"

namespace attn::cpu::ATTN_ISA {

template <class Op>
class Scores {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  static constexpr int L = kLanes<T>;

 public:
  // Scratch for at most `panels` panels.
  static int64_t bytes(const Problem& p, const Options& o, int64_t panels) {
    const int64_t d = round_up(p.head_dim);
    const int64_t additive = AdditiveRows<T>::size(p.head_dim, panels * kPanel + kForwardKeys) + d;
    return int64_t(sizeof(T)) * ((panels * kPanel + L + kForwardKeys) * d + (o.w ? additive : 0));
  }

  Scores(const Sequence& s, const Options& o, int64_t head, int64_t panels, Scratch& scratch)
      : seq(s), p(*s.p), h(head), w(static_cast<const T*>(o.w)) {
    depth = round_up(items<Op>(p.head_dim));
    if (w) {
      row = scratch.take<T>(p.head_dim);
      for (int64_t i = 0; i < panels; ++i) q_rows[i] = {scratch, p.head_dim, kPanel};
      k_rows = {scratch, p.head_dim, kForwardKeys};
      return;
    }
    Qt = scratch.take<Item>(panels * kPanel * depth);
    block = scratch.take<Item>(L * depth);
    K_scratch = scratch.take<Item>(kForwardKeys * depth_of<Op>(p.head_dim));
  }

  // Panel `index`: nq queries of a head from m0, or the rows that `at` points to.
  void load_queries(int64_t index, int64_t head, int64_t m0, int64_t nq,
                    const char* const* at = nullptr) {
    const int64_t size = int64_t(dtype_size(p.dtype)), step = p.q.s * size;
    const char* base = seq.q_row(seq.ptr->q, p.q, head, m0);
    const int64_t columns = (nq + kGrain - 1) / kGrain * kGrain;
    if (w)
      q_rows[index].load(p.dtype, nq, columns, p.head_dim, row,
                         [&](int64_t i) { return base + i * step; });
    else
      pack_transposed<Op>(p.dtype, base, step, nq, columns, p.head_dim, block,
                          Qt + index * kPanel * depth, at);
  }

  // nk keys from n0.
  void load_keys(int64_t n0, int64_t nk) {
    const int64_t hk = h / (p.heads_q / p.heads_k), size = int64_t(dtype_size(p.dtype));
    const auto* base = static_cast<const char*>(seq.ptr->k);
    if (w)
      k_rows.load(p.dtype, nk, round_up(nk), p.head_dim, row,
                  [&](int64_t j) { return base + seq.k_offset(p.k, hk, n0 + j) * size; });
    else
      K = rows_by_depth<Op>(seq, base, p.k, hk, n0, nk, p.head_dim, K_scratch);
  }

  // S^T [nk, lanes] of panel `index`: logits / what is returned.
  T logits(int64_t index, const Panel<T>& panel, const Tile& tile, const Segments& segments, T* S,
           Prefetch* soon) const {
    panel.prefetch_bias(tile);
    if (w)
      Additive<T>(w + h * p.head_dim, p.head_dim).scores(segments, k_rows, q_rows[index], S);
    else
      dot_products(index, segments, S, soon);
    return T(panel.logits(tile, S, nullptr));
  }

 private:
  const Sequence& seq;
  const Problem& p;
  int64_t h, depth;
  const T* w;                          // [Hq, D], or null: dot products
  Item *Qt{}, *block{}, *K_scratch{};  // [panels][items of D, padded to vectors][kPanel]; scratch
  Operand K{};
  AdditiveRows<T> q_rows[kPanels], k_rows;
  T* row{};  // [D]

  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }

  void dot_products(int64_t index, const Segments& segments, T* S, Prefetch* soon) const {
    const Item* Q = Qt + index * kPanel * depth;
    for (const Segment& s : segments)
      gemm_panel<Op>(s.hi - s.lo, s.end - s.begin, depth_of<Op>(p.head_dim),
                     K.data + s.lo * K.row_step, K.row_step, K.depth_step, Q + s.begin,
                     S + s.lo * kPanel + s.begin, false, soon);
  }
};

}  // namespace attn::cpu::ATTN_ISA
