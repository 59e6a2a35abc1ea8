// The tangents of dQ, dK, dV, dBias and dSink, and these gradients themselves where they are asked
// for.  With dZ, dZ', c as in gradient_tangent.h, G = dO and M dropout's factor, up to thirteen
// products a pair of key block and query panel:
//   dQ' = scale (dZ' K + dZ K')       dK' = scale (dZ'^T Q + dZ^T Q')
//   dV' = (P M c)^T G + (P M)^T G'    dSink' = -sum P_sink [(sink' - L') D + D']
// Tasks, and the order in which they add to dQ and dQ', are those of backward.h.
//
// O' and L' are read where a row's keys may lie in several blocks.  Where one block holds the keys
// of all rows, they are not needed, and written where they are asked for: O' = (P M c) V + (P M) V'
// is two products more here, and a pass of five alone (tangent.h).
#pragma once
#include "cpu/kernels/far_rows.h"
#include "cpu/kernels/gradient_tangent.h"
#include "cpu/kernels/key_gradient.h"
#include "cpu/kernels/query_gradient.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace attn::cpu::ATTN_ISA {

template <class T>
class BackwardTangent {
  using Op = Plain<T>;
  static constexpr int L = kLanes<T>;

 public:
  BackwardTangent(const Dual& dual, int threads)
      : x(dual),
        p(dual.p),
        ptr(dual.ptr),
        tp(dual.tp),
        tptr(dual.tptr),
        threads(threads),
        far(p, ptr, options),
        dQ(p, ptr, T(p.scale)),
        tdQ(tp, tptr, T(p.scale)) {
    group = p.heads_q / p.heads_k;
    m_tiles = (p.seqlen_q + kPanel - 1) / kPanel;
    // Scratch of short rows is no larger than they are: it stays in L1.
    block_n = p.seqlen_k <= kSecondWhole ? (p.seqlen_k + 31) / 32 * 32 : kSecondKeys;
    block_n = std::max<int64_t>(block_n, 32);
    n_tiles = (p.seqlen_k + block_n - 1) / block_n;
    d_pad = round_up(p.head_dim), dv_pad = round_up(p.head_dim_v);
  }

  // False, and nothing done, where some input is not finite.
  bool run() {
    if (!inputs_finite(x, threads)) return false;
    const int64_t panels = p.batch * p.heads_q * m_tiles;
    for (auto* rows : {&delta, &tdelta, &tlse}) rows->assign(panels * kPanel, T(0));
    dQ.begin(panels, n_tiles > 1), tdQ.begin(panels, n_tiles > 1), far.begin(panels);
    parallel_for(panels, n_tiles > 1 ? threads : 1, [&](int64_t panel) { prepare(panel); });
    // Where the bias is broadcast, the tasks that add to the same elements become one, in fixed
    // order.
    const bool biased = ptr.dbias || tptr.dbias;
    const ScoreStrides& s = tptr.dbias ? tp.dbias : p.dbias;
    const Part keys(!biased || s.k, n_tiles), batches(!biased || s.b, p.batch),
        heads(!biased || s.h, p.heads_k);
    parallel_for(keys.tasks * batches.tasks * heads.tasks, threads, [&](int64_t task) {
      const int64_t key = task / (batches.tasks * heads.tasks);
      batches.each(task / heads.tasks % batches.tasks, [&](int64_t b) {
        heads.each(task % heads.tasks,
                   [&](int64_t h) { keys.each(key, [&](int64_t t) { key_block(b, h, t); }); });
      });
    });
    if (ptr.dsink || tptr.dsink)
      parallel_for(p.heads_q, threads, [&](int64_t h) { sink_gradient(h); });
    return true;
  }

 private:
  // One dimension of the tasks: a task for each of its elements, or one for all.
  struct Part {
    int64_t tasks, size;
    Part(bool apart, int64_t n) : tasks(apart ? n : n ? 1 : 0), size(n) {}
    template <class F>
    void each(int64_t task, const F& f) const {
      if (tasks == size) return f(task);
      for (int64_t i = 0; i < size; ++i) f(i);
    }
  };

  const Dual& x;
  const Problem& p;
  const Pointers& ptr;
  const Problem& tp;
  const Pointers& tptr;
  int threads;
  int64_t group, m_tiles, n_tiles, block_n, d_pad, dv_pad;
  std::vector<T> delta, tdelta, tlse;  // D, D', L' [B, Hq, m_tiles, kPanel]
  const Options options{};             // softmax of dot products
  FarRows<Op> far;
  QueryGradient<T> dQ, tdQ;

  // What a block adds to its rows of a gradient: [BLOCK_N][dim in whole vectors].
  struct Sum {
    T* rows{};  // null: not wanted
    bool begun = false;
  };

  // What the loop over panels keeps of a key block, and its scratch.
  struct Block : GradientTangent<T> {
    Block(const Sequence& s, const Sequence& t) : seq(s), tseq(t) {}
    const Sequence &seq, &tseq;
    int64_t t{}, hk{}, n0{}, nk{};  // the block's number, K/V head, first key, number of keys
    Operand K{}, V{}, tK{}, tV{};   // with the head dimension as depth
    Sum dK{}, dV{}, tdK{}, tdV{};
    T *Qt{}, *tQt{}, *Gt{}, *tGt{};  // [d][kPanel]
    T *dQt{}, *tdQt{};               // [D][kPanel], of whole rows
    T *packed{}, *block{};           // [kPanel] rows; kLanes rows
    PanelScratch<T> side{};
    Prefetch soon;
  };

  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  void key_tiles(const Sequence& seq, int64_t m0, int64_t nq, int64_t* t0, int64_t* t1) const {
    int64_t lo, hi;
    seq.key_range(m0, m0 + nq, &lo, &hi);
    *t0 = lo / block_n;
    *t1 = hi > lo ? (hi + block_n - 1) / block_n : *t0;
  }

  // L', D = G.O - lam, D' = G'.O + G.O' - lam' and the panel's first ticket.  Panels without keys
  // end here; those of one block need nothing.
  void prepare(int64_t panel) {
    const int64_t h = panel / m_tiles % p.heads_q, m0 = panel % m_tiles * kPanel;
    const Sequence seq(p, ptr, panel / m_tiles / p.heads_q);
    const int64_t nq = std::min(kPanel, seq.seqlen_q - m0);
    int64_t t0, t1;
    if (nq <= 0) return;
    key_tiles(seq, m0, nq, &t0, &t1);
    if (t0 >= t1) {
      dQ.write_zeros(seq, h, m0, nq), tdQ.write_zeros(seq, h, m0, nq);
      write_empty_rows(seq, h, m0, nq);
    }
    if (t1 - t0 <= 1) return;
    dQ.first_block(panel, t0), tdQ.first_block(panel, t0);
    const int64_t at = seq.lse_offset(h, m0);
    const Rows all{h, m0, nq, panel, t0, t1};
    if (far.any(seq, all)) far.find(seq, all);
    auto of = [&](const void* rows, int64_t i) {
      return rows ? static_cast<const T*>(rows)[at + i] : T(0);
    };
    Scratch scratch(2 * dv_pad * int64_t(sizeof(T)));
    T* both = scratch.take<T>(2 * dv_pad);
    std::fill(both, both + 2 * dv_pad, T(0));
    auto dot = [&](const void* a, const Strides& sa, const void* b, const Strides& sb, int64_t i) {
      if (!a || !b) return T(0);
      return product_of_rows<T>(p.dtype, seq.q_row(a, sa, h, m0 + i), seq.q_row(b, sb, h, m0 + i),
                                p.head_dim_v, both);
    };
    for (int64_t i = 0; i < nq; ++i) {
      const int64_t row = panel * kPanel + i;
      tlse[row] = of(tptr.lse, i);
      delta[row] = dot(ptr.dout, p.dout, ptr.o, p.o, i) - of(ptr.dlse, i);
      tdelta[row] = dot(tptr.dout, tp.dout, ptr.o, p.o, i) +
                    dot(ptr.dout, p.dout, tptr.o, tp.o, i) - of(tptr.dlse, i);
    }
  }

  int64_t scratch_bytes() const {
    const int64_t dims = d_pad + dv_pad, most = std::max(d_pad, dv_pad);
    return int64_t(sizeof(T)) *
           (block_n * (4 * dims + 6 * kPanel) + Panel<T>::keep_size(block_n) +
            kPanel * (2 * dims + 2 * d_pad + most + 3) + L * most + MaskBits<T>::size(block_n));
  }

  void key_block(int64_t b, int64_t hk, int64_t t) {
    const Sequence seq(p, ptr, b), tseq(tp, tptr, b);
    Block k(seq, tseq);
    k.t = t, k.hk = hk, k.n0 = t * block_n, k.nk = std::min(block_n, seq.seqlen_k - k.n0);
    if (k.nk <= 0) return;
    Scratch scratch(scratch_bytes());
    take_scratch(k, scratch);
    load_keys(k, scratch);
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t m = 0; m < m_tiles; ++m) {
        const int64_t m0 = m * kPanel, nq = std::min(kPanel, seq.seqlen_q - m0);
        Rows rows{h, m0, nq, (b * p.heads_q + h) * m_tiles + m, 0, 0};
        if (nq <= 0) break;
        key_tiles(seq, m0, nq, &rows.t0, &rows.t1);
        if (t >= rows.t0 && t < rows.t1) panel_pair(k, rows);
      }
    store_rows(k, k.dK, ptr.dk, p.dk, p.head_dim, T(p.scale));
    store_rows(k, k.dV, ptr.dv, p.dv, p.head_dim_v, T(1));
    store_rows(k, k.tdK, tptr.dk, tp.dk, p.head_dim, T(p.scale));
    store_rows(k, k.tdV, tptr.dv, tp.dv, p.head_dim_v, T(1));
  }

  void take_scratch(Block& k, Scratch& scratch) const {
    auto tile_of = [&] { return scratch.take<T>(block_n * kPanel); };
    auto panel_of = [&](int64_t dim) { return scratch.take<T>(dim * kPanel); };
    k.S = tile_of(), k.tS = tile_of(), k.dP = tile_of(), k.tdP = tile_of();
    if (p.softcap > 0) k.slope = tile_of(), k.bend = tile_of();
    k.side = {scratch.take<T>(Panel<T>::keep_size(block_n)),
              scratch.take<typename IntOf<T>::type>(MaskBits<T>::size(block_n))};
    k.Qt = panel_of(d_pad), k.tQt = panel_of(d_pad);
    k.Gt = panel_of(dv_pad), k.tGt = panel_of(dv_pad);
    k.dQt = panel_of(d_pad), k.tdQt = panel_of(d_pad);
    k.packed = panel_of(std::max(d_pad, dv_pad));
    k.block = scratch.take<T>(L * std::max(d_pad, dv_pad));
    k.lse = scratch.take<T>(kPanel), k.inverse = scratch.take<T>(kPanel);
    k.rest = scratch.take<T>(kPanel);
  }

  // K, V and their tangents as operands, and room for the sums of those that are wanted.
  void load_keys(Block& k, Scratch& scratch) const {
    auto rows = [&](const void* base, const Strides& s, int64_t dim) {
      if (!base) return Operand{};
      T* copy = scratch.take<T>(block_n * round_up(dim));
      return rows_by_depth<Op>(k.seq, base, s, k.hk, k.n0, k.nk, dim, copy);
    };
    k.K = rows(ptr.k, p.k, p.head_dim), k.tK = rows(tptr.k, tp.k, p.head_dim);
    k.V = rows(ptr.v, p.v, p.head_dim_v), k.tV = rows(tptr.v, tp.v, p.head_dim_v);
    auto sum = [&](const void* wanted, int64_t pad) {
      return Sum{wanted ? scratch.take<T>(block_n * pad) : nullptr};
    };
    k.dK = sum(ptr.dk, d_pad), k.tdK = sum(tptr.dk, d_pad);
    k.dV = sum(ptr.dv, dv_pad), k.tdV = sum(tptr.dv, dv_pad);
  }

  // A panel of queries against the block of keys.
  void panel_pair(Block& k, const Rows& r) {
    const Panel<T> panel(k.seq, r.h, r.m0, r.nq, k.side), moved(k.tseq, r.h, r.m0, r.nq, k.side);
    const Tile tile = panel.tile(k.n0, k.nk, 1);
    const Segments segments = tile.empty ? Segments{} : panel.segments(tile);
    if (!tile.empty) {
      load_queries(k, r, panel.columns);
      products(k, segments);
      gradient(k, r, panel, moved, tile);
      add_to_keys(k, r, segments);
    }
    if (n_tiles == 1 && tptr.o)
      tile.empty ? write_empty_rows(k.seq, r.h, r.m0, r.nq)
                 : write_rows(k, r, segments, panel.columns);
    add_to_queries(k, r, dQ, k.dQt, segments, panel.columns, {{&k.K, k.dP}, {nullptr, nullptr}});
    add_to_queries(k, r, tdQ, k.tdQt, segments, panel.columns, {{&k.K, k.tdP}, {&k.tK, k.dP}});
  }

  // Q^T, G^T, their tangents and LSE of the panel.
  void load_queries(Block& k, const Rows& r, int64_t columns) const {
    auto pack = [&](const void* base, const Strides& s, int64_t dim, T* out) {
      if (base)
        pack_transposed<Op>(p.dtype, k.seq.q_row(base, s, r.h, r.m0), s.s * bytes(), r.nq, columns,
                            dim, k.block, out);
    };
    pack(ptr.q, p.q, p.head_dim, k.Qt), pack(tptr.q, tp.q, p.head_dim, k.tQt);
    pack(ptr.dout, p.dout, p.head_dim_v, k.Gt), pack(tptr.dout, tp.dout, p.head_dim_v, k.tGt);
    load_lse(static_cast<const T*>(ptr.lse) + k.seq.lse_offset(r.h, r.m0), r.nq, k.lse);
    const int64_t at = r.unit * kPanel;
    k.delta = const_cast<T*>(delta.data()) + at, k.tdelta = const_cast<T*>(tdelta.data()) + at;
    k.tlse = const_cast<T*>(tlse.data()) + at;
  }

  // S = K Q^T,  S' = K Q'^T + K' Q^T,  dP = V G^T,  dP' = V' G^T + V G'^T   [nk, columns]
  void products(Block& k, const Segments& segments) const {
    auto multiply = [&](const Operand& A, const T* B, int64_t depth, T* C, bool adds) {
      multiply_tile(segments, A, B, depth, C, adds);
    };
    multiply(k.K, k.Qt, p.head_dim, k.S, false), multiply(k.V, k.Gt, p.head_dim_v, k.dP, false);
    if (tptr.q) multiply(k.K, k.tQt, p.head_dim, k.tS, false);
    if (tptr.k) multiply(k.tK, k.Qt, p.head_dim, k.tS, tptr.q);
    if (!tptr.q && !tptr.k) clear_tile(segments, k.tS);
    if (tptr.v) multiply(k.tV, k.Gt, p.head_dim_v, k.tdP, false);
    if (tptr.dout) multiply(k.V, k.tGt, p.head_dim_v, k.tdP, tptr.v);
    if (!tptr.v && !tptr.dout) clear_tile(segments, k.tdP);
  }

  // The tiles as operands of the products that follow; dBias on the way.
  void gradient(Block& k, const Rows& r, const Panel<T>& panel, const Panel<T>& moved,
                const Tile& tile) {
    auto factors = k.logits(panel, moved, tile);
    const bool whole_far = r.whole() && far.any(k.seq, r), part_far = !r.whole() && far.has(r);
    if (whole_far) {
      far.find_here(panel, r, tile, factors.logit, k.S, k.lse);
      factors.logit = T(1);
    } else if (part_far) {
      far.copy(r, k.lse, k.inverse);
      k.ready_rows(panel, tile, factors);
    }
    const T* kept = p.dropout_p > 0 ? panel.keep(tile) : nullptr;
    auto rows = [&](const void* base) {
      return base ? static_cast<const T*>(base) + k.seq.lse_offset(r.h, r.m0) : nullptr;
    };
    const typename Block::RowInputs in{kept, rows(ptr.dlse), rows(tptr.dlse), Sink<T>(x, r.h)};
    Block::each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
      if (r.whole()) k.exact_rows(v, lo, hi, r.nq, factors, in);
      if (r.whole() || part_far)
        k.template gradients<true>(v, lo, hi, factors, kept);
      else
        k.template gradients<false>(v, lo, hi, factors, kept);
    });
    if (whole_far) far.keep_inverse(r, k.inverse);
    if (ptr.dbias) k.add_bias_gradient(panel, tile, k.n0);
    if (tptr.dbias) {
      GradientTile<Op> of_tangent;
      of_tangent.dP = k.tdP;
      of_tangent.add_bias_gradient(moved, tile, k.n0);
    }
    if (k.slope) k.gradients_through_softcap(panel, tile);
  }

  void add_to_keys(Block& k, const Rows& r, const Segments& segments) const {
    auto add = [&](Sum& sum, const void* base, const Strides& s, int64_t dim, const T* weights) {
      if (!sum.rows || !base) return;
      const KeyGradient<Op> rows{
          p.dtype, k.seq.q_row(base, s, r.h, r.m0), s.s, dim, round_up(dim), weights, k.packed,
          sum.rows};
      rows.add(r.nq, k.nk, segments, sum.begun, k.soon);
      sum.begun = true;
    };
    add(k.dK, ptr.q, p.q, p.head_dim, k.dP), add(k.dV, ptr.dout, p.dout, p.head_dim_v, k.S);
    add(k.tdK, ptr.q, p.q, p.head_dim, k.tdP), add(k.tdK, tptr.q, tp.q, p.head_dim, k.dP);
    add(k.tdV, ptr.dout, p.dout, p.head_dim_v, k.tS);
    add(k.tdV, tptr.dout, tp.dout, p.head_dim_v, k.S);
  }

  // O'^T = V^T (P M c)^T + V'^T (P M)^T  [Dv, columns], and L'.
  void write_rows(const Block& k, const Rows& r, const Segments& segments, int64_t columns) const {
    T* Ot = k.Gt;  // G^T has been used
    sum_over_keys(segments, columns, k.V, p.head_dim_v, k.tS, Ot, false);
    if (tptr.v) sum_over_keys(segments, columns, k.tV, p.head_dim_v, k.S, Ot, true);
    for (int64_t v = 0; v < r.nq; v += L)
      store_transposed<T>(p.dtype, Ot + v, set1(T(1)), std::min<int64_t>(L, r.nq - v), p.head_dim_v,
                          k.block, rows_moved(k.seq, r.h, r.m0 + v), tp.o.s * bytes());
    std::copy_n(k.tlse, r.nq, static_cast<T*>(tptr.lse) + k.seq.lse_offset(r.h, r.m0));
  }

  // The same of rows that see no key: 0.
  void write_empty_rows(const Sequence& seq, int64_t h, int64_t m0, int64_t nq) const {
    if (n_tiles > 1 || !tptr.o) return;
    for (int64_t i = 0; i < nq; ++i)
      std::memset(rows_moved(seq, h, m0 + i), 0, size_t(p.head_dim_v * bytes()));
    std::fill_n(static_cast<T*>(tptr.lse) + seq.lse_offset(h, m0), nq, T(0));
  }

  char* rows_moved(const Sequence& seq, int64_t h, int64_t i) const {
    return static_cast<char*>(tptr.o) + seq.q_offset(tp.o, h, i) * bytes();
  }

  struct Term {
    const Operand* keys;  // with the head dimension as depth; no data: 0
    const T* weights;
  };

  // dQ^T += K^T dZ^T [d, columns], of two terms.
  void add_to_queries(Block& k, const Rows& r, QueryGradient<T>& all, T* own,
                      const Segments& segments, int64_t columns, const Term (&terms)[2]) const {
    if (!all.wanted()) return;
    T* sum = r.whole() ? own : all.panel(r.unit);
    const typename QueryGradient<T>::Turn turn(all, k.seq, r, k.t, sum, k.block);
    if (segments.count == 0) return turn.clear_first();
    bool adds = !turn.first;
    for (const Term& term : terms) {
      if (!term.keys || !term.keys->data) continue;
      sum_over_keys(segments, columns, *term.keys, p.head_dim, term.weights, sum, adds);
      adds = true;
    }
  }

  // The rows of a sum, times `scale`.
  ATTN_NOINLINE void store_rows(const Block& k, const Sum& sum, void* base, const Strides& s,
                                int64_t dim, T scale) const {
    if (!sum.rows) return;
    const int64_t pad = round_up(dim);
    for (int64_t j = 0; j < k.nk; ++j) {
      T* row = sum.rows + j * pad;
      for (int64_t d = 0; d < pad; d += L)
        store(row + d, sum.begun ? load(row + d) * scale : Vec<T>{});
      restore_row<T>(p.dtype, row, dim,
                     static_cast<char*>(base) + k.seq.k_offset(s, k.hk, k.n0 + j) * bytes());
    }
  }

  // dSink = -sum P_sink D,  dSink' = -sum P_sink [(sink' - L') D + D']; rows in order
  void sink_gradient(int64_t h) const {
    const Sink<T> sink(x, h);
    double first = 0, second = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence seq(p, ptr, b);
      for (int64_t i = 0; i < seq.seqlen_q; ++i) {
        const double lse = static_cast<const T*>(ptr.lse)[seq.lse_offset(h, i)];
        if (lse == -std::numeric_limits<double>::infinity()) continue;
        const int64_t unit = (b * p.heads_q + h) * m_tiles + i / kPanel, lane = i % kPanel;
        const int64_t row = unit * kPanel + lane;
        const double P = far.sink_weight(unit, lane, sink.value, lse), D = delta[row];
        first -= P * D;
        second -= P * ((double(sink.tangent) - tlse[row]) * D + tdelta[row]);
      }
    }
    if (ptr.dsink) static_cast<T*>(ptr.dsink)[h] = T(first);
    if (tptr.dsink) static_cast<T*>(tptr.dsink)[h] = T(second);
  }
};

}  // namespace attn::cpu::ATTN_ISA
