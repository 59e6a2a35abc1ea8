// O = softmax(scale * Q K^T + ...) V and LSE, FlashAttention-2's online softmax (Dao, 2023) on
// vector registers.  One task = kBlockM queries of one head, or a share of its keys when tasks are
// few (split-KV, combined afterwards in fixed order).  All tiles are transposed, queries in lanes:
// row maximum and sum are vertical operations.
#pragma once
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/gemm.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// exp(-kFar) is 0; a larger distance, as from finfo.min, would overflow where it meets such a 0.
constexpr double kFar = 1000;

// The running state of a panel's queries.
template <class T>
struct SoftmaxState {
  T* O;         // [Dv][kPanel], unnormalised; nothing before the first product
  T* max;       // [kPanel] largest logit s, or a number near it (see `lazy`)
  T* sum;       // [kPanel] sum of exp(s - max)
  T* weighted;  // [kPanel] sum of exp(s - max) * (s - max)
  static int64_t size(int64_t dv) { return (dv + 3) * kPanel; }
  SoftmaxState(T* base, int64_t dv)
      : O(base), max(base + dv * kPanel), sum(max + kPanel), weighted(sum + kPanel) {}
  void begin() {
    for (int64_t q = 0; q < kPanel; q += kLanes<T>) {
      store(max + q, set1(-std::numeric_limits<T>::infinity()));
      store(sum + q, Vec<T>{});
      store(weighted + q, Vec<T>{});
    }
  }
  void clear_output() { std::fill(O, max, T(0)); }
};

template <class Op>
class Forward {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  static constexpr int L = kLanes<T>;
  // Weights are rounded to bfloat16 before the product with V; a shorter polynomial is enough.
  static constexpr int kDegree = Op::kPack == 2 ? 3 : 5;

 public:
  Forward(const Problem& problem, const Pointers& pointers, int threads)
      : p(problem), ptr(pointers), threads(threads) {
    lazy = !ptr.max_logit && !ptr.entropy;
    // Splits are chosen from shapes alone, so that results do not depend on the number of threads.
    const int64_t tasks = set_panels(2), n_tiles = (p.seqlen_k + kForwardKeys - 1) / kForwardKeys;
    splits =
        tasks == 0 || tasks >= 16 ? 1 : std::min<int64_t>((16 + tasks - 1) / tasks, n_tiles / 2);
    splits = std::max<int64_t>(splits, 1);
    if (tasks >= 16 * threads) set_panels(kPanels);  // what a panel computes stays the same
  }

  void run() {
    const int64_t units = p.batch * p.heads_q * m_tiles;
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
      attend(unit, split, soon, false, s, scratch);
      if (!finite(unit, s)) {
        scratch.rewind(mark);
        attend(unit, split, soon, true, s, scratch);
      }
      if (splits == 1) finish(unit, s, scratch);
    });
    if (splits == 1) return;
    parallel_for(units, threads, [&](int64_t index) {
      T* first = partial.data() + index * splits * state;
      for (int64_t i = 1; i < splits; ++i)
        for (int64_t panel = 0; panel < panels; ++panel)
          merge(at_panel(first, panel), at_panel(first + i * state, panel));
      Scratch scratch(scratch_bytes());
      finish(unit_at(index), first, scratch);
    });
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  int threads;
  int64_t block_m, m_tiles, panels, splits;

  // Up to kPanels panels of queries of one head.
  struct Unit {
    Sequence seq;
    int64_t h, hk, m0, nq;  // query head, its K/V head, first query, queries (0 or less: none)
  };
  Unit unit_at(int64_t index) const {
    const int64_t head = index / m_tiles, b = head / p.heads_q, h = head - b * p.heads_q;
    const int64_t m0 = (index - head * m_tiles) * block_m;
    Unit unit{Sequence(p, ptr, b), h, h / (p.heads_q / p.heads_k), m0, 0};
    unit.nq = std::min(block_m, unit.seq.seqlen_q - m0);
    return unit;
  }

  // The base of the exponentials need not be the largest logit, only near enough: as long as that
  // of earlier tiles serves, a tile's maxima are not looked for.  Not where they are asked for.
  bool lazy;
  static constexpr double kLazySum = 65536;  // the most that a row's weights may then sum to

  // Returns the number of tasks when each has at most `most` panels.
  int64_t set_panels(int64_t most) {
    block_m = std::min<int64_t>(most * kPanel, (p.seqlen_q + kGrain - 1) / kGrain * kGrain);
    m_tiles = block_m ? (p.seqlen_q + block_m - 1) / block_m : 0;
    panels = (block_m + kPanel - 1) / kPanel;
    return p.batch * p.heads_q * m_tiles;
  }

  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  // What V holds where P = 0, as at excluded pairs and logits of -inf, must not reach O.  That is
  // looked into only when O is not finite (0 * inf and 0 * NaN are NaN).
  bool finite(const Unit& unit, T* state) const {
    for (int64_t q = 0; q < unit.nq; q += kPanel)
      if (!all_finite<Plain<T>>(reinterpret_cast<const char*>(at_panel(state, q / kPanel).O),
                                kPanel * int64_t(sizeof(T)), p.head_dim_v,
                                std::min(kPanel, unit.nq - q)))
        return false;
    return true;
  }

  SoftmaxState<T> at_panel(T* state, int64_t panel) const {
    return {state + panel * SoftmaxState<T>::size(p.head_dim_v), p.head_dim_v};
  }

  int64_t scratch_bytes() const {
    const int64_t d = round_up(p.head_dim), dv = round_up(p.head_dim_v);
    return int64_t(sizeof(T)) *
           ((panels * kPanel + L) * d + 2 * kForwardKeys * kPanel +
            MaskBits<T>::size(kForwardKeys) + kForwardKeys * (d + dv) + (L + 1) * dv);
  }

  // The state of a unit after its share of the keys.  next: a unit to prefetch, or -1.  careful:
  // where a tile of V holds inf or NaN, only pairs with P != 0 enter the products.
  void attend(const Unit& unit, int64_t split, int64_t next, bool careful, T* state,
              Scratch& scratch) const {
    bool begun[kPanels] = {};
    for (int64_t panel = 0; panel < panels; ++panel) at_panel(state, panel).begin();
    if (unit.nq > 0) add_tiles(unit, split, next, careful, state, begun, scratch);
    for (int64_t panel = 0; panel < panels; ++panel)
      if (!begun[panel]) at_panel(state, panel).clear_output();
  }

  // begun: the panels whose O holds something; set.
  void add_tiles(const Unit& unit, int64_t split, int64_t next, bool careful, T* state,
                 bool (&begun)[kPanels], Scratch& scratch) const {
    const auto& [seq, h, hk, m0, nq] = unit;
    const int64_t d = p.head_dim, dv = p.head_dim_v;
    const int64_t depth_padded = round_up(items<Op>(d));
    Item* Qt = scratch.take<Item>(panels * kPanel * depth_padded);
    Item* block = scratch.take<Item>(L * depth_padded);
    T* S = scratch.take<T>(kForwardKeys * kPanel);
    const PanelScratch<T> side{
        scratch.take<T>(kForwardKeys * kPanel),
        scratch.take<typename IntOf<T>::type>(MaskBits<T>::size(kForwardKeys))};
    Item* K_scratch = scratch.take<Item>(kForwardKeys * depth_of<Op>(d));
    Item* V_scratch = scratch.take<Item>(kForwardKeys * dv);

    int64_t lo, hi;
    seq.key_range(m0, m0 + nq, &lo, &hi);
    int64_t t0 = lo / kForwardKeys, t1 = (hi + kForwardKeys - 1) / kForwardKeys;
    const int64_t share = (t1 - t0 + splits - 1) / splits;
    t0 += split * share;
    t1 = std::min(t1, t0 + share);
    if (t0 >= t1) return;
    for (int64_t q = 0; q < nq; q += kPanel) {
      const int64_t n = std::min(kPanel, nq - q);
      pack_transposed<Op>(
          p.dtype, static_cast<const char*>(ptr.q) + seq.q_offset(p.q, h, m0 + q) * bytes(),
          p.q.s * bytes(), n, (n + kGrain - 1) / kGrain * kGrain, d, block, Qt + q * depth_padded);
    }
    Prefetch soon(nq < kPanel && t1 - t0 == 1);
    bool exact[kPanels] = {}, first = true;
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t n0 = t * kForwardKeys, nk = std::min(kForwardKeys, hi - n0);
      Operand K{}, V{};  // packed for the first panel that needs them
      int finite = -1;   // of V; asked for at most once a tile
      for (int64_t q = 0; q < nq; q += kPanel) {
        const Panel<T> panel(seq, h, m0 + q, std::min(kPanel, nq - q), side);
        const Tile tile = panel.tile(n0, nk, Op::kPack);
        if (t + 1 < t1) panel.prefetch_mask(panel.m0, panel.nq, n0 + kForwardKeys, kForwardKeys);
        if (tile.empty) continue;
        if (!K.data) {
          K = rows_by_depth<Op>(seq, ptr.k, p.k, hk, n0, nk, d, K_scratch);
          V = rows_by_key<Op>(seq, ptr.v, p.v, hk, n0, nk, dv, V_scratch);
          if (t + 1 < t1) {
            prefetch_keys(seq, ptr.k, p.k, hk, n0 + kForwardKeys, kForwardKeys, d, soon);
            prefetch_keys(seq, ptr.v, p.v, hk, n0 + kForwardKeys, kForwardKeys, dv, soon);
          }
          if (first) prefetch_output(unit, soon);
          if (first && next >= 0) prefetch_inputs(unit_at(next), soon);
          first = false;
        }
        Segment segments[2 * kGrains + 1];
        const int count = panel.segments(tile, segments);
        SoftmaxState<T> running = at_panel(state, q / kPanel);
        const Item* Q = Qt + q * depth_padded;
        const T* kept = p.dropout_p > 0 ? panel.keep(tile) : nullptr;
        const bool try_lazy = lazy && !exact[q / kPanel] && bases_serve(running, panel.columns);
        T scale = scores(panel, tile, segments, count, K, Q, S, soon);
        if (!try_lazy || !lazy_softmax(panel, tile, S, scale, kept, running)) {
          if (try_lazy) {  // rising logits: not tried again
            exact[q / kPanel] = true;
            scale = scores(panel, tile, segments, count, K, Q, S, soon);
          }
          for (int64_t g = 0; g < panel.grains; ++g)
            for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L)
              softmax(S + v, tile.lo[g], tile.hi[g], scale, kept ? kept + v : nullptr, running, v);
        }
        // O^T += V^T P^T   [dv, columns]; the first product over all columns need not add
        if (careful && finite < 0) {
          if constexpr (Op::kStep > 1)
            finite = all_finite<Op>(V.data, V.row_step, dv, items<Op>(nk));
          else
            finite = all_finite<Op>(V.data, V.depth_step, items<Op>(nk), dv);
        }
        const bool visible_only = careful && !finite;
        const bool begins =
            !begun[q / kPanel] && !visible_only && segments[0].covers(panel.columns);
        if (!begun[q / kPanel] && !begins) running.clear_output();
        begun[q / kPanel] = true;
        if (visible_only) {
          add_visible(V, S, panel, tile, running.O);
          continue;
        }
        for (int i = 0; i < count; ++i) {
          const Segment& s = segments[i];
          const int64_t first = s.lo / Op::kPack;
          gemm_panel<Op>(dv, s.end - s.begin, (s.hi + Op::kPack - 1) / Op::kPack - first,
                         V.data + first * V.depth_step, V.row_step, V.depth_step,
                         reinterpret_cast<const Item*>(S) + first * kPanel + s.begin,
                         running.O + s.begin, i > 0 || !begins, &soon);
        }
      }
    }
  }

  // Memory that is touched for the first time comes closer while products are computed: a unit's
  // output, and the inputs of the next.
  void prefetch_output(const Unit& unit, Prefetch& soon) const {
    soon.add(static_cast<char*>(ptr.o) + unit.seq.q_offset(p.o, unit.h, unit.m0) * bytes(), unit.nq,
             p.o.s * bytes(), p.head_dim_v * bytes());
  }
  void prefetch_inputs(const Unit& unit, Prefetch& soon) const {
    const auto& [seq, h, hk, m0, nq] = unit;
    if (nq <= 0) return;
    soon.add(static_cast<const char*>(ptr.q) + seq.q_offset(p.q, h, m0) * bytes(), nq,
             p.q.s * bytes(), p.head_dim * bytes());
    int64_t lo, hi;
    seq.key_range(m0, m0 + nq, &lo, &hi);
    prefetch_keys(seq, ptr.k, p.k, hk, lo, kForwardKeys, p.head_dim, soon);
    prefetch_keys(seq, ptr.v, p.v, hk, lo, kForwardKeys, p.head_dim_v, soon);
  }

  // S^T = K Q^T  [nk, columns], then logits / what is returned.
  T scores(const Panel<T>& panel, const Tile& tile, const Segment* segments, int count,
           const Operand& K, const Item* Q, T* S, Prefetch& soon) const {
    panel.prefetch_bias(tile);
    for (int i = 0; i < count; ++i) {
      const Segment& s = segments[i];
      gemm_panel<Op>(s.hi - s.lo, s.end - s.begin, depth_of<Op>(p.head_dim),
                     K.data + s.lo * K.row_step, K.row_step, K.depth_step, Q + s.begin,
                     S + s.lo * kPanel + s.begin, false, &soon);
    }
    return T(panel.logits(tile, S, nullptr));
  }

  static bool bases_serve(const SoftmaxState<T>& state, int64_t columns) {
    const Vec<T> ninf = set1(-std::numeric_limits<T>::infinity());
    for (int64_t q = 0; q < columns; q += L)
      if (!all_below<T>(ninf, load(state.max + q)) ||
          !all_below<T>(load(state.sum + q), set1(T(kLazySum))))
        return false;
    return true;
  }

  // The tile's weights on the bases that are there.  False, and the state as it was, when they are
  // too large: S is spent then.
  bool lazy_softmax(const Panel<T>& panel, const Tile& tile, T* S, T scale, const T* kept,
                    SoftmaxState<T>& state) const {
    T sums[kPanel];
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L) {
        const Vec<T> base = load(state.max + v);
        const int64_t lo = tile.lo[g], hi = tile.hi[g];
        const Vec<T> sum = kept ? exponentials<true>(S + v, lo, hi, scale, base, kept + v)
                                : exponentials<false>(S + v, lo, hi, scale, base, kept);
        if (!all_below<T>(sum, set1(T(kLazySum)))) return false;  // also NaN
        store(sums + v, load(state.sum + v) + sum);
      }
    std::copy(sums, sums + panel.columns, state.sum);
    return true;
  }

  // One vector of queries, keys [lo, hi).  S (at the vector's lane): logits / scale in, weights
  // exp(s - max) out as items of Op; moves the state on to the new maxima.
  void softmax(T* S, int64_t lo, int64_t hi, T scale, const T* kept, SoftmaxState<T>& state,
               int64_t lane) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    Vec<T> top[4] = {set1(ninf), set1(ninf), set1(ninf), set1(ninf)};  // four chains
    int64_t j = lo;
    for (; j + 4 <= hi; j += 4)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) top[i] = vmax(load(S + (j + i) * kPanel), top[i]);
    for (; j < hi; ++j) top[0] = vmax(load(S + j * kPanel), top[0]);
    const Vec<T> before = load(state.max + lane);
    Vec<T> now = vmax(vmax(top[0], top[1]), vmax(top[2], top[3]));
    now = vmax(now == ninf ? now : now * scale, before);
    const Vec<T> sum_before = load(state.sum + lane);
    if (lazy) {  // the largest weight so far may be far above 1
      const Vec<T> level = before + vlog(vmax(sum_before, set1(T(1))));
      now = vmax(level, now);
    }
    store(state.max + lane, now);
    const Vec<T> base = now == ninf ? Vec<T>{} : now;  // -inf - -inf would be NaN
    const Vec<T> alpha = vexp(before - base);
    if (ptr.entropy)
      weigh(S, lo, hi, scale, before, base, alpha, sum_before, state.weighted + lane);
    Vec<T> sum;
    if (kept)
      sum = exponentials<true>(S, lo, hi, scale, base, kept);
    else
      sum = exponentials<false>(S, lo, hi, scale, base, kept);
    store(state.sum + lane, sum_before * alpha + sum);
    // Before the first visible key O is 0: nothing to rescale.
    if (!all_equal<T>(alpha, set1(T(1))) && !all_equal<T>(before, set1(ninf)))
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        T* at = state.O + d * kPanel + lane;
        store(at, load(at) * alpha);
      }
  }

  // S = exp(scale * S - base), times the dropout multipliers; returns the sum without them.
  template <bool kDropout>
  static Vec<T> exponentials(T* S, int64_t lo, int64_t hi, T scale, Vec<T> base, const T* kept) {
    // In units of ln 2 from the start is one operation less, and near enough for bfloat16; but all
    // logits may be the smallest numbers.
    const Vec<T> size = base < T(0) ? -base : base;
    if (Op::kPack == 2 && scale < T(1e38) && all_below<T>(size, set1(T(1e38))))
      return exponentials_base2<kDropout, true>(S, lo, hi, scale * T(kLog2e), base * T(kLog2e),
                                                kept);
    return exponentials_base2<kDropout, false>(S, lo, hi, scale, base, kept);
  }

  // kScaled: scale and base hold log2(e) already.
  template <bool kDropout, bool kScaled>
  static ATTN_NOINLINE Vec<T> exponentials_base2(T* S, int64_t lo, int64_t hi, T scale, Vec<T> base,
                                                 const T* kept) {
    Vec<T> sum[2] = {};
    // N keys abreast.  Pairs of keys go to row j / 2, which lies before or at what was read.
    auto weigh_keys = [&](int64_t j, auto count) {
      constexpr int N = count.value;
      Vec<T> e[N];
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        e[i] = load(S + (j + i) * kPanel) * scale - base;
        if constexpr (!kScaled) e[i] *= T(kLog2e);
      }
      vexp2_each<kDegree>(e);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        sum[i % 2] += e[i];
        if constexpr (kDropout) e[i] *= load(kept + (j + i) * kPanel);
      }
#pragma GCC unroll 8
      for (int i = 0; i < N; i += Op::kPack) {
        if constexpr (Op::kPack == 1)
          store(S + (j + i) * kPanel, e[i]);
        else
          store(reinterpret_cast<Item*>(S) + (j + i) / 2 * kPanel,
                pair_rows(e[i], i + 1 < N ? e[i + 1] : Vec<T>{}));
      }
    };
    int64_t j = lo;
    for (; j + kAbreast <= hi; j += kAbreast)
      weigh_keys(j, std::integral_constant<int, kAbreast>{});
    for (; j + 2 <= hi; j += 2) weigh_keys(j, std::integral_constant<int, 2>{});
    if (j < hi) weigh_keys(j, std::integral_constant<int, 1>{});
    return sum[0] + sum[1];
  }

  // weighted = sum of exp(s - max) * (s - max), for the entropy.
  ATTN_NOINLINE void weigh(const T* S, int64_t lo, int64_t hi, T scale, Vec<T> before, Vec<T> base,
                           Vec<T> alpha, Vec<T> sum_before, T* weighted) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    const Vec<T> shift = before == ninf ? Vec<T>{} : vmax(before - base, set1(T(-kFar)));
    Vec<T> total = (load(weighted) + shift * sum_before) * alpha;
    for (int64_t j = lo; j < hi; ++j) {
      const Vec<T> x = load(S + j * kPanel) * scale - base;
      total += vexp(x) * (x == ninf ? Vec<T>{} : x);  // 0 * -inf
    }
    store(weighted, total);
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

  void merge(SoftmaxState<T> a, const SoftmaxState<T>& b) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < kPanel; q += L) {
      const Vec<T> max_a = load(a.max + q), max_b = load(b.max + q), top = vmax(max_a, max_b);
      const Vec<T> base = top == ninf ? Vec<T>{} : top;
      const Vec<T> shift_a = max_a == ninf ? Vec<T>{} : vmax(max_a - base, set1(T(-kFar)));
      const Vec<T> shift_b = max_b == ninf ? Vec<T>{} : vmax(max_b - base, set1(T(-kFar)));
      const Vec<T> wa = vexp(shift_a), wb = vexp(shift_b);
      const Vec<T> sum_a = load(a.sum + q), sum_b = load(b.sum + q);
      store(a.weighted + q, wa * (load(a.weighted + q) + shift_a * sum_a) +
                                wb * (load(b.weighted + q) + shift_b * sum_b));
      store(a.sum + q, wa * sum_a + wb * sum_b);
      store(a.max + q, top);
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        T* at = a.O + d * kPanel + q;
        store(at, wa * load(at) + wb * load(b.O + d * kPanel + q));
      }
    }
  }

  // Normalises, adds the sink's share, writes O, LSE and the statistics.
  void finish(const Unit& unit, T* state, Scratch& scratch) const {
    T* rows = scratch.take<T>(L * round_up(p.head_dim_v));
    for (int64_t q = 0; q < unit.nq; q += L)
      finish_rows(unit.seq, unit.h, unit.m0 + q, std::min<int64_t>(L, unit.nq - q),
                  at_panel(state, q / kPanel), q % kPanel, rows);
  }

  void finish_rows(const Sequence& seq, int64_t h, int64_t m0, int64_t n,
                   const SoftmaxState<T>& state, int64_t lane, T* rows) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    const Vec<T> sum = load(state.sum + lane), top = load(state.max + lane);
    const Vec<T> base = top == ninf ? Vec<T>{} : top;
    Vec<T> total = sum, scale = set1(T(1)), shift = base;
    if (ptr.sink) {  // joins the normaliser only
      const Vec<T> sink = set1(static_cast<const T*>(ptr.sink)[h]);
      shift = vmax(sink, base);
      scale = vexp(base - shift);
      total = sum * scale + vexp(sink - shift);
    }
    const Mask<T> nan = sum != sum, empty = (top == ninf) & ~nan;
    const Vec<T> safe = empty ? set1(T(1)) : total;
    const Vec<T> inverse = empty ? Vec<T>{} : scale / safe;
    T lse[L], max_logit[L], entropy[L];
    store(lse, empty ? set1(ninf) : nan ? sum : shift + vlog(safe));
    store(max_logit, nan ? sum : top == ninf ? top : base);
    const Vec<T> apart = -vmax(base - shift, set1(T(-kFar)));
    store(entropy, ((apart + vlog(safe)) * sum - load(state.weighted + lane)) * inverse);
    store_transposed<T>(p.dtype, state.O + lane, inverse, n, p.head_dim_v, rows,
                        static_cast<char*>(ptr.o) + seq.q_offset(p.o, h, m0) * bytes(),
                        p.o.s * bytes());
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = seq.lse_offset(h, m0 + i);
      if (ptr.lse) static_cast<T*>(ptr.lse)[at] = lse[i];
      if (ptr.max_logit) static_cast<T*>(ptr.max_logit)[at] = max_logit[i];
      if (ptr.entropy) static_cast<T*>(ptr.entropy)[at] = lse[i] == ninf ? T(0) : entropy[i];
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
