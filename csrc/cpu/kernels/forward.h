// O = softmax(scale * Q K^T + ...) V and LSE, FlashAttention-2's online softmax (Dao, 2023) on
// vector registers.  One task = `block_m` queries of one head, or rows of a group's heads where
// their queries are few, or a share of its keys when tasks are few (split-KV, combined afterwards
// in fixed order).  All tiles are transposed, queries in lanes: row maximum and sum are vertical
// operations.
#pragma once
#include "cpu/kernels/scores.h"
#include "cpu/kernels/sigmoid.h"
#include "cpu/kernels/softmax.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/gemm.h"
#include "cpu/tile/row_product.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

template <class Op>
class Forward {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  static constexpr int L = kLanes<T>;

 public:
  Forward(const Problem& problem, const Pointers& pointers, const Options& options, int threads)
      : p(problem),
        ptr(pointers),
        o(options),
        threads(threads),
        softmax(problem, pointers, options),
        folded(!o.w && heads_share_panels(p, ptr)) {
    // Splits are chosen from shapes alone, so that results do not depend on the number of threads.
    const int64_t tasks = set_panels(2), n_tiles = (p.seqlen_k + kForwardKeys - 1) / kForwardKeys;
    splits =
        tasks == 0 || tasks >= 16 ? 1 : std::min<int64_t>((16 + tasks - 1) / tasks, n_tiles / 2);
    splits = std::max<int64_t>(splits, 1);
    if (tasks >= 16 * threads) set_panels(kPanels);  // what a panel computes stays the same
    if (folded)
      widen();
    else
      share_keys();
  }

  void run() {
    const int64_t units = p.batch * p.heads_k * sets * m_tiles;
    const int64_t state = panels * SoftmaxState<T>::size(p.head_dim_v);
    std::vector<T> partial(splits > 1 ? units * splits * state : 0);
    parallel_for(units * splits, threads, [&](int64_t task) {
      [[maybe_unused]] typename Op::PerThread held;
      // Causal tiles grow with the query: the last ones first leaves no long task for the end.
      const int64_t index = units - 1 - task / splits, split = task % splits;
      const int64_t after = task + threads;  // probably this thread's next one
      const int64_t next = after < units * splits ? units - 1 - after / splits : index;
      Scratch scratch(scratch_bytes() + state * int64_t(sizeof(T)));
      T* s =
          splits > 1 ? partial.data() + (index * splits + split) * state : scratch.take<T>(state);
      const Unit unit = unit_at(index);
      const size_t mark = scratch.used();
      const int64_t soon = next == index ? -1 : next;
      Outcome outcome = attend(unit, split, soon, false, s, scratch);
      if (!outcome.finite) {
        scratch.rewind(mark);
        outcome = attend(unit, split, soon, true, s, scratch);
      }
      if (splits == 1) finish(unit, outcome, s, scratch);
    });
    if (splits == 1) return;
    parallel_for(units, threads, [&](int64_t index) {
      T* first = partial.data() + index * splits * state;
      for (int64_t i = 1; i < splits; ++i)
        for (int64_t panel = 0; panel < panels; ++panel)
          merge(at_panel(first, panel), at_panel(first + i * state, panel), p.head_dim_v);
      Scratch scratch(scratch_bytes());
      finish(unit_at(index), {}, first, scratch);
    });
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  const Options& o;
  int threads;
  const Softmax<typename Op::Items> softmax;
  const bool folded;  // a unit's rows are the queries of all heads of a group, head after head
  int64_t block_m, m_tiles, panels, splits;
  int64_t together = 1, sets = 1;  // heads of a unit, and units that a group's heads make

  int64_t group() const { return p.heads_q / p.heads_k; }
  int64_t rows() const { return folded ? group() * p.seqlen_q : p.seqlen_q; }

  // Up to kPanels panels of queries, of one head or of several with one panel each.
  struct Unit {
    Sequence seq;
    int64_t h, hk, m0, nq;  // query head, its K/V head, first row, rows (0 or less: none)
    int64_t heads;          // from h; 1 where they are folded
    int64_t per_head() const { return (nq + kPanel - 1) / kPanel; }
    int64_t panels() const { return nq > 0 ? heads * per_head() : 0; }
  };
  ATTN_NOINLINE Unit unit_at(int64_t index) const {
    const int64_t set = index / m_tiles, kv = set / sets;
    const int64_t b = kv / p.heads_k, hk = kv - b * p.heads_k, first = (set - kv * sets) * together;
    const int64_t m0 = (index - set * m_tiles) * block_m;
    Unit unit{
        Sequence(p, ptr, b), hk * group() + first, hk, m0, 0, std::min(together, group() - first)};
    unit.nq = std::min(block_m, (folded ? rows() : unit.seq.seqlen_q) - m0);
    return unit;
  }

  // The head and the query of row r of a unit whose first head is h.
  struct Row {
    int64_t h, i;
  };
  ATTN_NOINLINE Row row(int64_t h, int64_t r) const {
    return folded ? Row{h + r / p.seqlen_q, r % p.seqlen_q} : Row{h, r};
  }
  int64_t lse_of_row(const Sequence& seq, int64_t h, int64_t r) const {
    const Row one = row(h, r);
    return seq.lse_offset(one.h, one.i);
  }
  // Row r of Q or O, of which a number has `size` bytes.
  template <class Base>
  auto at(const Sequence& seq, Base* base, const Strides& s, int64_t size, int64_t h,
          int64_t r) const {
    using Bytes = std::conditional_t<std::is_const_v<Base>, const char, char>;
    const Row one = row(h, r);
    return static_cast<Bytes*>(base) + seq.q_offset(s, one.h, one.i) * size;
  }

  // The head and the rows of a panel of a unit.
  struct Part {
    int64_t h, m0, nq;
  };
  static Part part(const Unit& unit, int64_t panel) {
    const int64_t h = panel / unit.per_head(), q = (panel - h * unit.per_head()) * kPanel;
    return {unit.h + h, unit.m0 + q, std::min(kPanel, unit.nq - q)};
  }

  // Heads of a group share the packing of K and V where each has one panel, as long as every thread
  // still gets some tasks.  What a panel computes stays the same.
  void share_keys() {
    const int64_t others = p.batch * p.heads_k * splits;
    sets = group();
    if (p.seqlen_q > kPanel || o.w) return;
    for (int64_t n = kPanels; n > 1 && together == 1; n /= 2)
      if (others * ((group() + n - 1) / n) >= 2 * threads) together = std::min(n, group());
    sets = (group() + together - 1) / together;
    panels = std::max(panels, together);
  }

  // The same for folded heads.
  void widen() {
    const int64_t each = kPanels * kPanel, tasks = p.batch * p.heads_k * splits;
    if (tasks * ((rows() + each - 1) / each) >= 2 * threads) set_panels(kPanels);
  }

  // Returns the number of tasks when each has at most `most` panels.
  ATTN_NOINLINE int64_t set_panels(int64_t most) {
    block_m = std::min<int64_t>(most * kPanel, (rows() + kGrain - 1) / kGrain * kGrain);
    m_tiles = block_m ? (rows() + block_m - 1) / block_m : 0;
    panels = (block_m + kPanel - 1) / kPanel;
    return p.batch * (folded ? p.heads_k : p.heads_q) * m_tiles;
  }

  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  // What a unit's share of the keys has become.
  struct Outcome {
    bool finite = true;          // not where O or a sum of its rows is inf or NaN
    bool written[kPanels] = {};  // O of the panel, with all that finish() writes
  };

  // What V holds where P = 0, as at excluded pairs and logits of -inf, must not reach O.  That is
  // looked into only when O is not finite (0 * inf and 0 * NaN are NaN).
  bool finite(const Unit& unit, const Outcome& outcome, T* state) const {
    for (int64_t i = 0; i < unit.panels(); ++i)
      if (!outcome.written[i] &&
          !all_finite<Plain<T>>(reinterpret_cast<const char*>(at_panel(state, i).O),
                                kPanel * int64_t(sizeof(T)), p.head_dim_v, part(unit, i).nq))
        return false;
    return true;
  }

  SoftmaxState<T> at_panel(T* state, int64_t panel) const {
    return {state + panel * SoftmaxState<T>::size(p.head_dim_v), p.head_dim_v};
  }

  int64_t scratch_bytes() const {
    const int64_t dv = round_up(p.head_dim_v),
                  rest = kForwardKeys * kPanel + Panel<T>::keep_size(kForwardKeys) + (L + 1) * dv +
                         MaskBits<T>::size(kForwardKeys) + kForwardKeys * dv;
    return Scores<Op>::bytes(p, o, panels) + int64_t(sizeof(T)) * rest;
  }

  // What a task keeps while it walks over its tiles of keys, and its scratch.
  struct Work {
    Work(const Unit& u, const Options& o, bool careful, T* state, int64_t panels, bool narrow,
         Scratch& scratch)
        : unit(u),
          careful(careful),
          state(state),
          bias(o.sigmoid ? sigmoid_bias<T>(o, u.seq) : T(0)),
          scores(u.seq, o, u.h, panels, scratch),
          S(scratch.take<T>(kForwardKeys * kPanel)),
          side{scratch.take<T>(Panel<T>::keep_size(kForwardKeys)),
               scratch.take<typename IntOf<T>::type>(MaskBits<T>::size(kForwardKeys))},
          V_scratch(scratch.take<Item>(kForwardKeys * u.seq.p->head_dim_v)),
          soon(narrow) {}
    const Unit& unit;
    const bool careful;  // where a tile of V holds inf or NaN, only pairs with P != 0 enter O
    T* const state;
    const T bias;                // of sigmoid weights
    Scores<Op> scores;           // Q of the panels, K of the tile
    T* const S;                  // [kForwardKeys][kPanel]
    const PanelScratch<T> side;  // of masks and dropout
    Item* const V_scratch;       // [kForwardKeys][Dv], where V is copied
    bool begun[kPanels]{};       // O of the panel holds something
    Outcome outcome;
    bool exact[kPanels]{};  // the panel's logits rise: see Softmax
    bool loaded = false;    // some tile of keys was
    Operand V{};            // of this tile; packed, as K, for the first panel that needs it
    int finite = -1;        // no inf or NaN in V; -1: not asked yet
    Prefetch soon;
  };

  // Keys that some row of a unit sees.
  ATTN_NOINLINE void key_range(const Unit& unit, int64_t* lo, int64_t* hi) const {
    if (folded)
      unit.seq.key_range(0, p.seqlen_q, lo, hi);
    else
      unit.seq.key_range(unit.m0, unit.m0 + unit.nq, lo, hi);
  }

  // Tiles of keys.
  struct Range {
    int64_t first, end, last_key;
  };
  // The tiles that a split of the unit's keys has.
  Range key_tiles(const Unit& unit, int64_t split) const {
    if (unit.nq <= 0) return {0, 0, 0};
    int64_t lo, hi;
    key_range(unit, &lo, &hi);
    const int64_t t0 = lo / kForwardKeys, t1 = (hi + kForwardKeys - 1) / kForwardKeys;
    const int64_t share = (t1 - t0 + splits - 1) / splits, first = t0 + split * share;
    return {first, std::min(t1, first + share), hi};
  }

  // The state of a unit after its share of the keys.  next: a unit to prefetch, or -1.
  Outcome attend(const Unit& unit, int64_t split, int64_t next, bool careful, T* state,
                 Scratch& scratch) const {
    for (int64_t panel = 0; panel < panels; ++panel) at_panel(state, panel).begin();
    const Range tiles = key_tiles(unit, split);
    Work w(unit, o, careful, state, panels, unit.nq < kPanel && tiles.end - tiles.first == 1,
           scratch);
    for (int64_t i = 0; tiles.first < tiles.end && i < unit.panels(); ++i) {
      const auto [h, m0, nq] = part(unit, i);
      const char* from[kPanel];
      for (int64_t r = 0; folded && r < nq; ++r)
        from[r] = at(unit.seq, ptr.q, p.q, bytes(), h, m0 + r);
      w.scores.load_queries(i, h, m0, nq, folded ? from : nullptr);
    }
    for (int64_t t = tiles.first; t < tiles.end; ++t)
      add_tile(w, t * kForwardKeys, tiles.last_key, t + 1 == tiles.end, next);
    for (int64_t panel = 0; panel < panels; ++panel)
      if (!w.begun[panel]) at_panel(state, panel).clear_output();
    w.outcome.finite = careful || (w.outcome.finite && finite(unit, w.outcome, state));
    return w.outcome;
  }

  // Lanes of a panel that products are made of: additive scores are rounded as whole grains are.
  int64_t lanes(const Panel<T>& panel) const { return o.w ? panel.columns : panel.lanes; }

  // One tile of keys, from n0 and before `end`, against all panels.  last: of this task.
  void add_tile(Work& w, int64_t n0, int64_t end, bool last, int64_t next) const {
    const int64_t nk = std::min(kForwardKeys, end - n0);
    w.V = {}, w.finite = -1;
    for (int64_t i = 0; i < w.unit.panels(); ++i) {
      const auto [h, m0, nq] = part(w.unit, i);
      const Panel<T> panel(w.unit.seq, h, m0, nq, w.side, folded ? p.seqlen_q : 0);
      const Tile tile = panel.tile(n0, nk, Op::kPack);
      if (!last) panel.prefetch_mask(panel.m0, panel.nq, n0 + kForwardKeys, kForwardKeys);
      if (tile.empty) continue;
      if (!w.V.data) load_keys(w, tile, last, next);
      const Segments segments = panel.segments(tile, lanes(panel));
      weigh(w, i, panel, tile, segments);
      if (whole(w, i, panel, tile))
        write_rows(w, i, panel, tile);
      else
        add_values(w, i, panel, tile, segments);
    }
  }

  // Whether the panel's rows see no other tile, and O need not be kept.
  bool whole(const Work& w, int64_t index, const Panel<T>& panel, const Tile& tile) const {
    if (splits > 1 || folded || w.careful || w.begun[index] ||
        !RowProduct<Op>::serves(p.head_dim_v))
      return false;
    int64_t lo, hi;
    w.unit.seq.key_range(panel.m0, panel.m0 + panel.nq, &lo, &hi);
    return lo >= tile.n0 && hi <= tile.n0 + tile.nk;
  }

  // O = P V / sums   [nq, dv], and what else is known of such rows
  void write_rows(Work& w, int64_t index, const Panel<T>& panel, const Tile& tile) const {
    const SoftmaxState<T> state = at_panel(w.state, index);
    T factor[kPanel];
    for (int64_t q = 0; q < panel.nq; q += L)
      store(factor + q, finish_sums(w.unit.seq, panel.h, panel.m0 + q,
                                    std::min<int64_t>(L, panel.nq - q), state, q));
    const RowProduct<Op> product(w.V, p.head_dim_v, o.written(p));
    const auto* P = reinterpret_cast<const Item*>(w.S);
    w.outcome.finite &= product.write(panel, tile, P, factor, ptr.o, p.o, w.soon);
    w.begun[index] = w.outcome.written[index] = true;
  }

  // K and V of the tile as operands, and what comes after them on its way.
  void load_keys(Work& w, const Tile& tile, bool last, int64_t next) const {
    const Sequence& seq = w.unit.seq;
    const int64_t hk = w.unit.hk, d = p.head_dim, dv = p.head_dim_v, after = tile.n0 + kForwardKeys;
    w.scores.load_keys(tile.n0, tile.nk);
    w.V = rows_by_key<Op>(seq, ptr.v, p.v, hk, tile.n0, tile.nk, dv, w.V_scratch);
    if (!last) {
      prefetch_keys(seq, ptr.k, p.k, hk, after, kForwardKeys, d, w.soon);
      prefetch_keys(seq, ptr.v, p.v, hk, after, kForwardKeys, dv, w.soon);
    }
    if (w.loaded) return;
    w.loaded = true;
    prefetch_output(w.unit, w.soon);
    if (next >= 0) prefetch_inputs(unit_at(next), w.soon);
    if (last) w.soon.spread(blocks(w.unit, tile));
  }

  // About how many blocks of products a unit has in its only tile: of S^T, of which a band leaves
  // half or less, and of O.
  static int64_t blocks(const Unit& unit, const Tile& tile) {
    const int64_t keys = tile.banded ? tile.nk / 2 : tile.nk;
    return unit.panels() * (keys / ATTN_MR + kPanel / 5);
  }

  // P^T as items of Op in S; the panel's state goes along.
  void weigh(Work& w, int64_t index, const Panel<T>& panel, const Tile& tile,
             const Segments& segments) const {
    SoftmaxState<T> state = at_panel(w.state, index);
    const T* kept = p.dropout_p > 0 ? panel.keep(tile) : nullptr;
    const bool try_lazy = !w.exact[index] && softmax.bases_serve(state, panel.lanes);
    T scale = w.scores.logits(index, panel, tile, segments, w.S, &w.soon);
    if (o.sigmoid)
      return sigmoid_weights<typename Op::Items>(panel, tile, w.S, scale, w.bias, kept);
    if (try_lazy) {
      if (softmax.on_bases(panel, tile, w.S, scale, kept, state)) return;
      w.exact[index] = true;  // rising logits: not tried again
      scale = w.scores.logits(index, panel, tile, segments, w.S, &w.soon);
    }
    softmax.on_new_bases(panel, tile, w.S, scale, kept, state);
  }

  // O^T += V^T P^T   [dv, lanes]; the first product over all lanes need not add
  void add_values(Work& w, int64_t index, const Panel<T>& panel, const Tile& tile,
                  const Segments& segments) const {
    T* O = at_panel(w.state, index).O;
    if (w.careful && w.finite < 0) w.finite = values_finite(w.V, tile.nk);
    const bool visible_only = w.careful && !w.finite;
    bool begins = !w.begun[index] && !visible_only && segments.at[0].covers(lanes(panel));
    if (!w.begun[index] && !begins) at_panel(w.state, index).clear_output();
    w.begun[index] = true;
    if (visible_only) return add_visible(w.V, w.S, panel, tile, O);
    for (const Segment& s : segments) {
      const int64_t first = s.lo / Op::kPack;
      gemm_panel<Op>(p.head_dim_v, s.end - s.begin, (s.hi + Op::kPack - 1) / Op::kPack - first,
                     w.V.data + first * w.V.depth_step, w.V.row_step, w.V.depth_step,
                     reinterpret_cast<const Item*>(w.S) + first * kPanel + s.begin, O + s.begin,
                     !begins, &w.soon);
      begins = false;
    }
  }

  bool values_finite(const Operand& V, int64_t nk) const {
    if constexpr (Op::kStep > 1)
      return all_finite<Op>(V.data, V.row_step, p.head_dim_v, items<Op>(nk));
    else
      return all_finite<Op>(V.data, V.depth_step, items<Op>(nk), p.head_dim_v);
  }

  // Memory that is touched for the first time comes closer while products are computed: a unit's
  // output, and the inputs of the next.
  void prefetch_output(const Unit& unit, Prefetch& soon) const {
    const int64_t size = int64_t(dtype_size(o.written(p)));
    if (folded) return;
    for (int64_t h = unit.h; h < unit.h + unit.heads; ++h)
      soon.add(static_cast<char*>(ptr.o) + unit.seq.q_offset(p.o, h, unit.m0) * size, unit.nq,
               p.o.s * size, p.head_dim_v * size);
  }
  void prefetch_inputs(const Unit& unit, Prefetch& soon) const {
    const auto& [seq, first, hk, m0, nq, heads] = unit;
    if (nq <= 0) return;
    for (int64_t h = first; !folded && h < first + heads; ++h)
      soon.add(seq.q_row(ptr.q, p.q, h, m0), nq, p.q.s * bytes(), p.head_dim * bytes());
    int64_t lo, hi;
    key_range(unit, &lo, &hi);
    prefetch_keys(seq, ptr.k, p.k, hk, lo, kForwardKeys, p.head_dim, soon);
    prefetch_keys(seq, ptr.v, p.v, hk, lo, kForwardKeys, p.head_dim_v, soon);
  }

  // O^T += V^T P^T over the pairs with P != 0: what an excluded row of V holds never reaches O.
  ATTN_NOINLINE void add_visible(const Operand& V, const T* S, const Panel<T>& panel,
                                 const Tile& tile, T* O) const {
    for (int64_t q = 0; q < panel.nq; ++q)
      for (int64_t j = tile.lo[q / kGrain]; j < tile.hi[q / kGrain]; ++j) {
        const Operand P{reinterpret_cast<const char*>(S), int64_t(sizeof(T)),
                        kPanel * int64_t(sizeof(T))};
        const T w = number_at<Op>(P, j, q);
        if (w == T(0)) continue;
        for (int64_t d = 0; d < p.head_dim_v; ++d) O[d * kPanel + q] += w * number_at<Op>(V, j, d);
      }
  }

  // Writes what no tile has written: O, LSE and the statistics.
  void finish(const Unit& unit, const Outcome& outcome, T* state, Scratch& scratch) const {
    T* rows = scratch.take<T>(L * round_up(p.head_dim_v));
    for (int64_t i = 0; i < unit.panels(); ++i) {
      const auto [h, m0, nq] = part(unit, i);
      for (int64_t q = 0; !outcome.written[i] && q < nq; q += L)
        finish_rows(unit.seq, h, m0 + q, std::min<int64_t>(L, nq - q), at_panel(state, i), q, rows);
    }
  }

  // The sinks of rows m0 ... m0 + n - 1.
  ATTN_NOINLINE Vec<T> sinks(int64_t h, int64_t m0, int64_t n) const {
    T sink[L] = {};
    for (int64_t i = 0; i < n; ++i) sink[i] = static_cast<const T*>(ptr.sink)[row(h, m0 + i).h];
    return load(sink);
  }

  void finish_rows(const Sequence& seq, int64_t h, int64_t m0, int64_t n,
                   const SoftmaxState<T>& state, int64_t lane, T* rows) const {
    const DType type = o.written(p);
    const int64_t size = int64_t(dtype_size(type));
    char* to[L];
    for (int64_t i = 0; i < (folded ? n : 1); ++i) to[i] = at(seq, ptr.o, p.o, size, h, m0 + i);
    const Vec<T> factor = finish_sums(seq, h, m0, n, state, lane);
    if (ptr.sink && !all_lanes<T>(factor != T(0))) forget(state.O + lane, factor);
    store_transposed<T>(type, state.O + lane, factor, n, p.head_dim_v, rows, to[0], p.o.s * size,
                        folded ? to : nullptr);
  }
  // O [..][kPanel] of which a sink leaves nothing, whatever it was: 0 * inf would be NaN.
  ATTN_NOINLINE void forget(T* O, Vec<T> factor) const {
    for (T* at = O; at < O + p.head_dim_v * kPanel; at += kPanel)
      store(at, factor == T(0) ? Vec<T>{} : load(at));
  }

  // Adds the sink's share, writes LSE and the statistics of rows m0 ... m0 + n - 1; what their O is
  // multiplied with.
  Vec<T> finish_sums(const Sequence& seq, int64_t h, int64_t m0, int64_t n,
                     const SoftmaxState<T>& state, int64_t lane) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    const Vec<T> sum = load(state.sum + lane), top = load(state.max + lane);
    const Vec<T> base = top == ninf ? Vec<T>{} : top;
    Vec<T> total = sum, scale = set1(T(1)), shift = base;
    if (ptr.sink) {  // joins the normaliser only
      const Vec<T> sink = sinks(h, m0, n);
      shift = vmax(sink, base);
      scale = vexp(base - shift);
      total = sum * scale + vexp(sink - shift);
    }
    const Mask<T> empty = (top == ninf) & (sum == sum), nan = (total != total) & ~empty;
    const Vec<T> safe = empty ? set1(T(1)) : total;
    const Vec<T> inverse = o.sigmoid ? set1(T(1)) : empty ? Vec<T>{} : scale / safe;
    if (o.sigmoid || !(ptr.lse || ptr.max_logit || ptr.entropy)) return inverse;
    const Vec<T> log = vlog(safe), apart = -vmax(base - shift, set1(T(-kFar)));
    // of a part of the keys: log(1) = 0 where a row is empty
    const Vec<T> lse = nan ? total : o.partial ? log : empty ? set1(ninf) : shift + log;
    const Vec<T> entropy = ((apart + log) * sum - load(state.weighted + lane)) * inverse;
    write_known(ptr.lse, lse, seq, h, m0, n);
    write_known(ptr.max_logit, sum == sum ? top : sum, seq, h, m0, n);  // the sink is no logit
    write_known(ptr.entropy, empty ? Vec<T>{} : entropy, seq, h, m0, n);
    return inverse;
  }

  // One number a row, of n rows.
  void write_known(void* to, Vec<T> x, const Sequence& seq, int64_t h, int64_t m0,
                   int64_t n) const {
    if (!to) return;
    T* out = static_cast<T*>(to);
    if (n == L && !folded) return store(out + seq.lse_offset(h, m0), x);
    T numbers[L];
    store(numbers, x);
    for (int64_t i = 0; i < n; ++i)
      out[folded ? lse_of_row(seq, h, m0 + i) : seq.lse_offset(h, m0 + i)] = numbers[i];
  }
};

}  // namespace attn::cpu::ATTN_ISA
