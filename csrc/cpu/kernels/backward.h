// dQ, dK, dV, dBias, dSink by recomputation (FlashAttention-2, Dao 2023), five products a pair of
// key block and query panel in one pass:
//   S^T = K Q^T,  dP^T = V dO^T,  P = exp(S - LSE),  dS = P * (dP - delta),
//   delta = rowsum(dO * O) - dLSE,  dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
// One task = block_n keys of one K/V head; it loops over the query heads of the group and their
// panels, and owns its rows of dK and dV.  dQ panels are shared: each has a ticket, and key blocks
// add to it in ascending order, so that the result is the same whatever the number of threads.
// Tasks are handed out by ascending key block, so a task waits only for earlier ones.
#pragma once
#include "cpu/kernels/far_rows.h"
#include "cpu/kernels/gradient.h"
#include "cpu/kernels/key_block.h"
#include "cpu/kernels/key_gradient.h"
#include "cpu/kernels/query_gradient.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tile/row_product.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

template <class Op>
class Backward {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  using Block = KeyBlock<Op>;
  using Next = typename KeyBlocks<Op>::Next;
  static constexpr int L = kLanes<T>;
  // In float32 it makes no difference; a tile unit has its products in memory anyway.
  static constexpr bool kAtOnce = Op::kPack == 2 && Op::kStep == 1;

 public:
  Backward(const Problem& problem, const Pointers& pointers, const Options& options, int threads)
      : p(problem),
        ptr(pointers),
        o(options),
        threads(threads),
        blocks(problem, pointers, options),
        far(problem, pointers, options),
        dQ(problem, pointers, options.w ? T(1) : T(problem.scale), options) {
    group = p.heads_q / p.heads_k;
    m_tiles = (p.seqlen_q + kPanel - 1) / kPanel;
  }

  void run() {
    const int64_t tiles = p.batch * p.heads_q * m_tiles, n_tiles = blocks.n_tiles;
    delta.assign(tiles * kPanel, T(0));
    far.begin(tiles);
    // Panels whose keys all lie in one block need neither: they find delta and dQ at once.
    dQ.begin(tiles, n_tiles > 1);
    dw.assign(o.w ? n_tiles * p.batch * p.heads_q * p.head_dim : 0, T(0));
    parallel_for(tiles, n_tiles > 1 ? threads : 1, [&](int64_t tile) { prepare(tile); });

    // Where the bias is broadcast, the tasks that add to the same elements become one, in fixed
    // order.
    const bool by_key = !ptr.dbias || p.dbias.k != 0, by_batch = !ptr.dbias || p.dbias.b != 0,
               by_head = !ptr.dbias || p.dbias.h != 0;
    const int64_t keys = by_key ? n_tiles : 1, batches = by_batch ? p.batch : 1,
                  heads = by_head ? p.heads_k : 1;
    parallel_for(n_tiles ? keys * batches * heads : 0, threads, [&](int64_t task) {
      [[maybe_unused]] typename Op::PerThread held;
      const int64_t key = task / (batches * heads), b = task / heads % batches, h = task % heads;
      const int64_t after = task + threads;  // probably this thread's next one
      const bool all = keys * batches * heads == n_tiles * p.batch * p.heads_k;
      const Next next{after / heads % batches, after % heads,
                      all ? after / (batches * heads) : n_tiles};
      for (int64_t bi = by_batch ? b : 0; bi < (by_batch ? b + 1 : p.batch); ++bi)
        for (int64_t hi = by_head ? h : 0; hi < (by_head ? h + 1 : p.heads_k); ++hi)
          for (int64_t ni = by_key ? key : 0; ni < (by_key ? key + 1 : n_tiles); ++ni)
            key_block(bi, hi, ni, next);
    });
    if (ptr.dsink) parallel_for(p.heads_q, threads, [&](int64_t h) { far.add_sink(h, delta); });
    if (o.dw) sum_parts(dw, p.heads_q * p.head_dim, static_cast<T*>(o.dw));
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  const Options& o;
  int threads;
  const KeyBlocks<Op> blocks;
  int64_t group, m_tiles;  // query heads of a K/V head; panels of a head
  std::vector<T> delta;    // [B, Hq, m_tiles, kPanel]
  FarRows<Op> far;
  QueryGradient<T> dQ;
  std::vector<T> dw;  // [n_tiles, B, Hq, D], of additive scores

  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  // Whether the rows' only block of keys holds all that they see: their sums are found there.
  bool alone(const Rows& r) const { return r.whole() && !o.partial; }

  // Whether their weights are in memory before those of dS are computed.
  bool ready(const Rows& r) const { return alone(r) || far.has(r); }

  // delta = rowsum(dO * O) - dLSE, and the panel's first ticket.  Panels without keys end here.
  void prepare(int64_t tile) {
    const int64_t h = tile / m_tiles % p.heads_q, m0 = tile % m_tiles * kPanel;
    const Sequence seq(p, ptr, tile / m_tiles / p.heads_q);
    const int64_t nq = std::min(kPanel, seq.seqlen_q - m0);
    if (nq <= 0) return;
    int64_t t0, t1;
    blocks.of_queries(seq, m0, nq, &t0, &t1);
    if (t0 >= t1) return dQ.write_zeros(seq, h, m0, nq);
    if (t1 - t0 > 1) dQ.first_block(tile, t0);
    const Rows r{h, m0, nq, tile, t0, t1};
    if (o.sigmoid || alone(r)) return;  // see exact_delta
    if (far.any(seq, r)) far.find(seq, r);
    T* const found = delta.data() + tile * kPanel;
    if (o.partial)
      return void(std::copy_n(static_cast<const T*>(o.delta) + seq.lse_offset(h, m0), nq, found));
    Scratch scratch(2 * blocks.dv_pad * int64_t(sizeof(T)));
    T* rows = scratch.take<T>(2 * blocks.dv_pad);
    std::fill(rows, rows + 2 * blocks.dv_pad, T(0));
    for (int64_t i = 0; i < nq; ++i) {
      T total = product_of_rows(p.dtype, seq.q_row(ptr.o, p.o, h, m0 + i),
                                seq.q_row(ptr.dout, p.dout, h, m0 + i), p.head_dim_v, rows);
      if (ptr.dlse) total -= static_cast<const T*>(ptr.dlse)[seq.lse_offset(h, m0 + i)];
      found[i] = total;
    }
  }

  void key_block(int64_t b, int64_t hk, int64_t t, const Next& next) {
    const Sequence seq(p, ptr, b);
    Block k(seq);
    const int64_t n0 = t * blocks.block_n;
    k.t = t, k.hk = hk, k.n0 = n0, k.nk = std::min(blocks.block_n, seq.seqlen_k - n0);
    if (k.nk <= 0) return;
    Scratch scratch(blocks.scratch_bytes());
    blocks.load(k, scratch);
    each_panel(k, [&](const Rows& r) { ++k.panels, k.last_unit = r.unit; });
    if (k.panels) blocks.prefetch(k, next);
    each_panel(k, [&](const Rows& r) { panel_pair(k, r); });
    blocks.write(k);
  }

  // f(rows) for the panels that see some key of a block.
  template <class F>
  ATTN_INLINE void each_panel(const Block& k, const F& f) const {
    for (int64_t h = k.hk * group; h < (k.hk + 1) * group; ++h)
      for (int64_t m = 0; m < m_tiles; ++m) {
        const int64_t m0 = m * kPanel, nq = std::min(kPanel, k.seq.seqlen_q - m0);
        Rows rows{h, m0, nq, (k.seq.b * p.heads_q + h) * m_tiles + m, 0, 0};
        if (nq <= 0) break;
        blocks.of_queries(k.seq, m0, nq, &rows.t0, &rows.t1);
        if (k.t >= rows.t0 && k.t < rows.t1) f(rows);
      }
  }

  // How P and dS of a pair come about.
  enum Route {
    kFused,     // from the registers of the products, where every query sees the key
    kInMemory,  // S and dP are written, then become P and dS in place
    kCareful,   // the same; inf or NaN may meet P = 0 or dS = 0, so the products that follow take
                // only pairs with P != 0
  };

  // A panel of queries against a block of keys: what its phases share.
  struct Pair {
    Pair(Block& k, const Rows& r) : r(r), panel(k.seq, r.h, r.m0, r.nq, k.side) {}
    const Rows& r;
    const Panel<T> panel;
    Tile tile{};
    Segments segments{};
    Route route = kInMemory;
    Keys fused{0, 0};                  // whose P and dS never are in memory as numbers
    bool late = false;                 // P and dS are needed as numbers first
    bool ends = false;                 // dK and dV leave its products as rows of storage
    bool finite = true;                // no inf or NaN was seen in such rows, nor in those of dQ
    const char *Q_rows{}, *dO_rows{};  // [nq][D] and [nq][Dv], as they are stored
    T *dQ{}, *delta{};                 // [D][kPanel]; [kPanel]
  };

  void panel_pair(Block& k, const Rows& r) {
    Pair x(k, r);
    x.tile = x.panel.tile(k.n0, k.nk, Op::kPack);
    x.panel.prefetch_mask(r.m0 + kPanel, kPanel, k.n0, k.nk);
    x.dQ = r.whole() ? k.dQt : dQ.panel(r.unit);
    if (x.tile.empty) return turn_of(k, x).clear_first();  // by mask or bias
    x.segments = x.panel.segments(x.tile);
    load_queries(k, x);
    x.ends = r.unit == k.last_unit && rows_leave();
    if (x.ends && k.panels == 1 && r.whole() && alone(r) && o.plain() && x.panel.plain()) {
      k.soon.spread(products_of(x));
      products(k, x);
      add_products(k, x);
      if (x.finite || finite(k, x.panel)) return;
      load_queries(k, x);  // inf or NaN may have met P = 0
      k.begun = k.written = false;
    }
    choose_route(k, x);
    products(k, x);
    add_products(k, x);
  }

  // From S and dP to the gradients.
  ATTN_NOINLINE void add_products(Block& k, Pair& x) {
    gradient(k, x);
    if (x.route == kCareful)
      add_visible_dv(k, x);
    else
      add_dkdv(k, x);
    if (o.w)
      add_additive(k, x);
    else if (x.route == kCareful)
      add_visible(k, x);
    else if (ptr.dq)
      add_dq(k, x);
  }

  // Whether dK and dV may leave products as rows.
  bool rows_leave() const {
    return !o.w && !ptr.block_table && RowProduct<Op>::serves(p.head_dim) &&
           RowProduct<Op>::serves(p.head_dim_v);
  }

  // About how many blocks of products a pair has: of S^T and dP^T, of which a band leaves half or
  // less, and of dV, dK and dQ.
  static int64_t products_of(const Pair& x) {
    const int64_t keys = x.tile.nk;
    return (x.tile.banded ? 1 : 2) * keys / ATTN_MR + (2 * keys + kPanel) / 5;
  }

  // Q^T, dO^T, LSE of the panel.
  void load_queries(Block& k, Pair& x) {
    const Sequence& seq = k.seq;
    const auto& [h, m0, nq, unit, t0, t1] = x.r;
    const int64_t d = p.head_dim, dv = p.head_dim_v;
    x.Q_rows = seq.q_row(ptr.q, p.q, h, m0);
    x.dO_rows = seq.q_row(ptr.dout, p.dout, h, m0);
    pack_transposed<Op>(p.dtype, x.Q_rows, p.q.s * bytes(), nq, x.panel.columns, d, k.block, k.Qt);
    pack_transposed<Op>(p.dtype, x.dO_rows, p.dout.s * bytes(), nq, x.panel.columns, dv, k.block,
                        k.dOt);
    // What this pair adds to at its end, and what the next one begins with, come from L3 meanwhile.
    const int64_t next = std::min(kPanel, seq.seqlen_q - (m0 + kPanel));
    k.soon.add_first(x.dO_rows + kPanel * p.dout.s * bytes(), next, p.dout.s * bytes(),
                     dv * bytes());
    k.soon.add_first(x.Q_rows + kPanel * p.q.s * bytes(), next, p.q.s * bytes(), d * bytes());
    if (ptr.dq && k.t + 1 == t1)
      k.soon.add_first(seq.q_row(ptr.dq, p.dq, h, m0), nq, p.dq.s * bytes(), d * bytes());
    if (ptr.dq && !(x.r.whole() && RowProduct<Op>::serves(d)))
      k.soon.add_first(x.dQ, 1, 0, d * kPanel * int64_t(sizeof(T)));
    x.panel.prefetch_bias(x.tile);
    const T* lse = static_cast<const T*>(ptr.lse) + seq.lse_offset(h, m0);
    const T bias = o.sigmoid ? sigmoid_bias<T>(o, seq) : T(0);
    k.begin_rows(nq, [&](int64_t q) { return o.sigmoid ? -bias : k.base_of(lse[q]); });
    far.copy(x.r, k.lse, k.inverse);
    if (o.w)
      k.additive.q_rows.load(p.dtype, nq, x.panel.columns, p.head_dim, k.row,
                             [&](int64_t i) { return x.Q_rows + i * p.q.s * bytes(); });
    x.delta = delta.data() + unit * kPanel;
  }

  void choose_route(Block& k, Pair& x) const {
    const Panel<T>& panel = x.panel;
    const bool at_once =
        kAtOnce && o.plain() && !ready(x.r) && !k.nan && panel.plain() && panel.columns == kPanel;
    x.route = !finite(k, panel) ? kCareful : at_once ? kFused : kInMemory;
    if (x.route == kFused) x.fused = panel.seen_by_all(x.tile, Op::kPack);
    x.late = ptr.dbias || k.dcap || o.w || x.route == kCareful;
  }

  // S^T = K Q^T, dP^T = V dO^T   [nk, columns], but for the fused keys
  void products(Block& k, const Pair& x) const {
    if (o.w) additive_of(x).scores(x.segments, k.additive.k_rows, k.additive.q_rows, k.S);
    auto product = [&](int64_t lo, int64_t hi, const Segment& s, int64_t dim, const Operand& A,
                       const Item* B, T* C) {
      gemm_panel<Op>(hi - lo, s.end - s.begin, depth_of<Op>(dim), A.data + lo * A.row_step,
                     A.row_step, A.depth_step, B + s.begin, C + lo * kPanel + s.begin, false,
                     &k.soon);
    };
    for (const Segment& s : x.segments)
      x.fused.rest({s.lo, s.hi}, [&](int64_t lo, int64_t hi) {
        if (!o.w) product(lo, hi, s, p.head_dim, k.K, k.Qt, k.S);
        product(lo, hi, s, p.head_dim_v, k.V, k.dOt, k.dP);
      });
  }

  // P and dS as operands of the products that follow; dBias on the way.
  void gradient(Block& k, const Pair& x) {
    const Rows& r = x.r;
    const T scale = T(x.panel.logits(x.tile, k.S, k.dcap));
    if (k.nan) k.exclude_overflows(x.panel, x.tile, scale);
    const T* kept = p.dropout_p > 0 ? x.panel.keep(x.tile) : nullptr;
    const T* dlse =
        ptr.dlse ? static_cast<const T*>(ptr.dlse) + k.seq.lse_offset(r.h, r.m0) : nullptr;
    if (kept && x.route == kCareful) k.clear_dropped(x.panel, x.tile, kept);
    const bool here = alone(r) && !o.sigmoid, is_far = here && far.any(k.seq, r);
    if (is_far) far.find_here(x.panel, r, x.tile, scale, k.S, k.lse);
    if (here) k.exact_delta(x.panel, x.tile, is_far ? T(1) : scale, kept, dlse, x.delta);
    if (is_far) far.keep_inverse(r, k.inverse);
    if (!here && far.has(r)) k.weigh(x.panel, x.tile, scale);
    if constexpr (kAtOnce)
      if (x.fused.lo < x.fused.hi)
        k.products_and_gradient(k.K, k.V, k.Qt, k.dOt, p.head_dim, p.head_dim_v, x.fused.lo,
                                x.fused.hi, scale, x.delta, k.soon);
    const Weights weights = o.sigmoid  ? Weights::kSigmoid
                            : ready(r) ? Weights::kReady
                                       : Weights::kSoftmax;
    for (int64_t g = 0; g < x.panel.grains; ++g)
      x.fused.rest({x.tile.lo[g], x.tile.hi[g]}, [&](int64_t lo, int64_t hi) {
        for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L)
          k.gradient(weights, v, lo, hi, scale, x.delta, kept, x.late);
      });
    if (ptr.dbias) k.add_bias_gradient(x.panel, x.tile, k.n0);
    if (k.dcap) k.through_softcap(x.panel, x.tile);
    if constexpr (Op::kPack == 2)
      for (int64_t g = 0; x.late && x.route != kCareful && g < x.panel.grains; ++g)
        k.emit(g * kGrain, x.tile.lo[g], x.tile.hi[g]);
  }

  // dV += P^T dO   [nk, dv],  dK += dS^T Q   [nk, d]
  void add_dkdv(Block& k, Pair& x) const {
    const DType type = p.dtype;
    const int64_t d = blocks.d_pad, dv = blocks.dv_pad;
    const KeyGradient<Op> V{type, x.dO_rows, p.dout.s, p.head_dim_v, dv, k.P_rows, k.dO, k.dV};
    const KeyGradient<Op> K{type, x.Q_rows, p.q.s, p.head_dim, d, k.dS_rows, k.Q, k.dK};
    auto add = [&](const KeyGradient<Op>& sum, void* base, const Strides& s, T factor) {
      if (!base || !x.ends)
        return base ? sum.add(x.panel.nq, k.nk, x.segments, k.begun, k.soon) : void();
      const int64_t size = int64_t(dtype_size(o.written(p)));
      char* out = static_cast<char*>(base) + k.seq.k_offset(s, k.hk, k.n0) * size;
      x.finite &= sum.finish(x.panel, x.tile, x.segments, k.begun, factor, o.written(p), out,
                             s.s * size, k.soon);
    };
    add(V, ptr.dv, p.dv, T(1));
    add(K, o.w ? nullptr : ptr.dk, p.dk, T(p.scale));
    k.begun = true;
    k.written = x.ends;
  }

  // dQ^T += K^T dS^T   [d, columns]; the first product over all columns need not add
  void add_dq(Block& k, Pair& x) {
    if (x.r.whole() && RowProduct<Op>::serves(p.head_dim)) {  // dQ = dS K   [nq, d]
      T scale[kPanel];
      std::fill(scale, scale + kPanel, T(p.scale));
      const RowProduct<Op> product(k.K_by_key, p.head_dim, o.written(p));
      x.finite &= product.write(x.panel, x.tile, k.dS_by_key, scale, ptr.dq, p.dq, k.soon);
      return;
    }
    const Turn turn = turn_of(k, x);
    bool begins = turn.first && x.segments.at[0].covers(x.panel.columns);
    if (!begins) turn.clear_first();
    for (const Segment& s : x.segments) {
      const int64_t first = s.lo / Op::kPack;
      gemm_panel<Op>(p.head_dim, s.end - s.begin, (s.hi + Op::kPack - 1) / Op::kPack - first,
                     k.K_by_key.data + first * k.K_by_key.depth_step, k.K_by_key.row_step,
                     k.K_by_key.depth_step, k.dS_by_key + first * kPanel + s.begin, x.dQ + s.begin,
                     !begins, &k.soon);
      begins = false;
    }
  }

  using Turn = typename QueryGradient<T>::Turn;
  Turn turn_of(const Block& k, const Pair& x) {
    return {dQ, k.seq, x.r, k.t, x.dQ, reinterpret_cast<T*>(k.block)};
  }

  // No inf or NaN in K, V and the panel's Q and dO.
  ATTN_NOINLINE bool finite(Block& k, const Panel<T>& panel) const {
    constexpr int64_t row = kPanel * int64_t(sizeof(Item));
    if (!all_finite<Op>(reinterpret_cast<const char*>(k.Qt), row, items<Op>(p.head_dim),
                        panel.columns) ||
        !all_finite<Op>(reinterpret_cast<const char*>(k.dOt), row, items<Op>(p.head_dim_v),
                        panel.columns))
      return false;
    if (k.finite < 0)
      k.finite = all_finite<Op>(k.K.data, k.K.row_step, k.nk, items<Op>(p.head_dim)) &&
                 all_finite<Op>(k.V.data, k.V.row_step, k.nk, items<Op>(p.head_dim_v));
    return k.finite;
  }

  // dV over the pairs with P != 0: what an excluded row holds never reaches a gradient.
  ATTN_NOINLINE void add_visible_dv(Block& k, const Pair& x) const {
    if (!k.begun) blocks.clear(k);
    k.begun = true;
    const int64_t dv = p.head_dim_v;
    for (int64_t q = 0; q < x.panel.nq && ptr.dv; ++q)
      for (int64_t j = x.tile.lo[q / kGrain]; j < x.tile.hi[q / kGrain]; ++j) {
        const T w = k.S[j * kPanel + q];
        if (w == T(0)) continue;
        convert_row(p.dtype, x.dO_rows + q * p.dout.s * bytes(), dv, k.row);
        for (int64_t c = 0; c < dv; ++c) k.dV[j * blocks.dv_pad + c] += w * k.row[c];
      }
  }

  // dK and dQ over the pairs with dS != 0.
  ATTN_NOINLINE void add_visible(Block& k, const Pair& x) {
    const Turn turn = turn_of(k, x);
    turn.clear_first();
    const int64_t d = p.head_dim;
    for (int64_t q = 0; q < x.panel.nq; ++q)
      for (int64_t j = x.tile.lo[q / kGrain]; j < x.tile.hi[q / kGrain]; ++j) {
        const T g = k.dP[j * kPanel + q];
        if (g == T(0)) continue;
        convert_row(p.dtype, x.Q_rows + q * p.q.s * bytes(), d, k.row);
        for (int64_t c = 0; c < d; ++c) {
          k.dK[j * blocks.d_pad + c] += g * k.row[c];
          if (ptr.dq) x.dQ[c * kPanel + q] += g * number_at<Op>(k.K_by_key, j, c);
        }
      }
  }

  Additive<T> additive_of(const Pair& x) const {
    return {static_cast<const T*>(o.w) + x.r.h * p.head_dim, p.head_dim};
  }

  // dQ, dK and dw of additive scores: nearly all of the work, so its turn is awaited after it.
  ATTN_NOINLINE void add_additive(Block& k, const Pair& x) {
    const int64_t size = p.head_dim * kPanel;
    T* row = dw.data() + ((k.t * p.batch + k.seq.b) * p.heads_q + x.r.h) * p.head_dim;
    std::fill(k.dQt, k.dQt + size, T(0));
    k.clear_padding(x.r.nq, x.panel.columns, k.nk);
    additive_of(x).gradient(x.segments, k.additive.k_rows, k.additive.q_rows, k.dP, k.dQt,
                            k.additive.dKt, row);
    const Turn turn = turn_of(k, x);
    if (!ptr.dq || x.dQ == k.dQt) return;
    turn.clear_first();
    for (int64_t i = 0; i < size; i += L) store(x.dQ + i, load(x.dQ + i) + load(k.dQt + i));
  }
};

}  // namespace attn::cpu::ATTN_ISA
