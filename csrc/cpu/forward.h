// O = softmax(scale * Q K^T + ...) V and LSE, FlashAttention-2's online softmax (Dao, 2023) on
// vector registers.  One task = kBlockM queries of one head, or a share of its keys when tasks are
// few (split-KV, combined afterwards in fixed order).  All tiles are transposed, queries in lanes:
// row maximum and sum are vertical operations.

constexpr int64_t kForwardKeys = 192;  // BLOCK_N; multiple of 16 (transposed masks, dropout words)
constexpr int64_t kPanels = 2;         // panels of queries that share the packing of K and V
constexpr int64_t kBlockM = kPanels * kPanel;

// The running state of a panel's queries.
template <class T>
struct SoftmaxState {
  T* O;         // [Dv][kPanel], unnormalised
  T* max;       // [kPanel] largest logit
  T* sum;       // [kPanel] sum of exp(s - max)
  T* weighted;  // [kPanel] sum of exp(s - max) * (s - max)
  static int64_t size(int64_t dv) { return (dv + 3) * kPanel; }
  SoftmaxState(T* base, int64_t dv)
      : O(base), max(base + dv * kPanel), sum(max + kPanel), weighted(sum + kPanel) {}
  void clear() {
    std::fill(O, max, T(0));
    std::fill(max, sum, -std::numeric_limits<T>::infinity());
    std::fill(sum, weighted + kPanel, T(0));
  }
};

template <class Op>
class Forward {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  static constexpr int L = kLanes<T>;
  // Weights are rounded to bfloat16 before the product with V; a shorter polynomial is enough.
  static constexpr int kDegree = Op::kPack == 2 ? 4 : 6;

 public:
  Forward(const Problem& problem, const Pointers& pointers, int threads)
      : p(problem), ptr(pointers), threads(threads) {
    block_m = std::min<int64_t>(kBlockM, (p.seqlen_q + kGrain - 1) / kGrain * kGrain);
    m_tiles = block_m ? (p.seqlen_q + block_m - 1) / block_m : 0;
    panels = (block_m + kPanel - 1) / kPanel;
    const int64_t tasks = p.batch * p.heads_q * m_tiles;
    const int64_t n_tiles = (p.seqlen_k + kForwardKeys - 1) / kForwardKeys;
    // Chosen from shapes alone, so that results do not depend on the number of threads.
    splits =
        tasks == 0 || tasks >= 16 ? 1 : std::min<int64_t>((16 + tasks - 1) / tasks, n_tiles / 2);
    splits = std::max<int64_t>(splits, 1);
  }

  void run() {
    const int64_t units = p.batch * p.heads_q * m_tiles;
    const int64_t state = panels * SoftmaxState<T>::size(p.head_dim_v);
    std::vector<T> partial(splits > 1 ? units * splits * state : 0);
    parallel_for(units * splits, threads, [&](int64_t task) {
      // Causal tiles grow with the query: the last ones first leaves no long task for the end.
      const int64_t unit = units - 1 - task / splits, split = task % splits;
      Scratch scratch(scratch_bytes() + state * int64_t(sizeof(T)));
      T* s = splits > 1 ? partial.data() + (unit * splits + split) * state : scratch.take<T>(state);
      attend(unit, split, s, scratch);
      if (splits == 1) finish(unit, s, scratch);
    });
    if (splits == 1) return;
    parallel_for(units, threads, [&](int64_t unit) {
      T* first = partial.data() + unit * splits * state;
      for (int64_t i = 1; i < splits; ++i)
        for (int64_t panel = 0; panel < panels; ++panel)
          merge(at_panel(first, panel),
                at_panel(partial.data() + (unit * splits + i) * state, panel));
      Scratch scratch(scratch_bytes());
      finish(unit, first, scratch);
    });
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  int threads;
  int64_t block_m, m_tiles, panels, splits;

  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  SoftmaxState<T> at_panel(T* state, int64_t panel) const {
    return {state + panel * SoftmaxState<T>::size(p.head_dim_v), p.head_dim_v};
  }

  int64_t scratch_bytes() const {
    const int64_t d = round_up(p.head_dim), dv = round_up(p.head_dim_v);
    return int64_t(sizeof(T)) * ((panels * kPanel + L) * d + 3 * kForwardKeys * kPanel +
                                 kForwardKeys * (d + dv) + (L + 1) * dv);
  }

  void attend(int64_t unit, int64_t split, T* state, Scratch& scratch) const {
    const int64_t h = unit / m_tiles % p.heads_q, m0 = unit % m_tiles * block_m;
    const int64_t hk = h / (p.heads_q / p.heads_k), d = p.head_dim, dv = p.head_dim_v;
    const Sequence seq(p, ptr, unit / m_tiles / p.heads_q);
    for (int64_t panel = 0; panel < panels; ++panel) at_panel(state, panel).clear();
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    if (nq <= 0) return;

    const int64_t depth_padded = round_up(items<Op>(d));
    Item* Qt = scratch.take<Item>(panels * kPanel * depth_padded);
    Item* block = scratch.take<Item>(L * depth_padded);
    T* S = scratch.take<T>(kForwardKeys * kPanel);
    T* add = scratch.take<T>(kForwardKeys * kPanel);
    T* keep = scratch.take<T>(kForwardKeys * kPanel);
    Item* K_scratch = scratch.take<Item>(kForwardKeys * items<Op>(d));
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
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t n0 = t * kForwardKeys, nk = std::min(kForwardKeys, hi - n0);
      const Operand K = rows_by_depth<Op>(seq, ptr.k, p.k, hk, n0, nk, d, K_scratch);
      const Operand V = rows_by_key<Op>(seq, ptr.v, p.v, hk, n0, nk, dv, V_scratch);
      int finite = -1;  // of V; asked for at most once a tile
      for (int64_t q = 0; q < nq; q += kPanel) {
        const Panel<T> panel(seq, h, m0 + q, std::min(kPanel, nq - q), add, keep);
        const Tile tile = panel.tile(n0, nk, Op::kPack);
        if (tile.empty) continue;
        Segment segments[2 * kGrains + 1];
        const int count = panel.segments(tile, segments);
        // S^T = K Q^T   [nk, columns]
        for (int i = 0; i < count; ++i) {
          const Segment& s = segments[i];
          gemm<Op>(s.hi - s.lo, s.end - s.begin, items<Op>(d), K.data + s.lo * K.row_step,
                   K.row_step, K.depth_step, Qt + q * depth_padded + s.begin, kPanel,
                   S + s.lo * kPanel + s.begin, kPanel, false);
        }
        T scale = T(p.scale);
        if (panel.plain()) {
          panel.apply_band(tile, S);
        } else {
          panel.logits(tile, S, nullptr);
          scale = T(1);
        }
        const T* kept = p.dropout_p > 0 ? panel.keep(tile) : nullptr;
        SoftmaxState<T> running = at_panel(state, q / kPanel);
        for (int64_t g = 0; g < panel.grains; ++g)
          for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L)
            softmax(S + v, tile.lo[g], tile.hi[g], scale, kept ? kept + v : nullptr, running, v);
        // O^T += V^T P^T   [dv, columns]
        if (panel.partial(tile)) {
          if (finite < 0)
            finite = all_finite<Op>(V.data, V.depth_step, (nk + Op::kPack - 1) / Op::kPack, dv);
          if (!finite) {
            add_visible(V, S, panel, tile, running.O);
            continue;
          }
        }
        for (int i = 0; i < count; ++i) {
          const Segment& s = segments[i];
          const int64_t first = s.lo / Op::kPack;
          gemm<Op>(dv, s.end - s.begin, (s.hi + Op::kPack - 1) / Op::kPack - first,
                   V.data + first * V.depth_step, V.row_step, V.depth_step,
                   reinterpret_cast<const Item*>(S) + first * kPanel + s.begin, kPanel,
                   running.O + s.begin, kPanel, true);
        }
      }
    }
  }

  // One vector of queries, keys [lo, hi).  S (at the vector's lane): logits in, weights
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
    store(state.max + lane, now);
    const Vec<T> base = now == ninf ? Vec<T>{} : now;  // -inf - -inf would be NaN
    const Vec<T> alpha = vexp(before - base);
    const Vec<T> sum_before = load(state.sum + lane);
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
    Vec<T> sum[2] = {};
    auto weight = [&](int64_t j, Vec<T>& total) {
      Vec<T> e = vexp<kDegree>(load(S + j * kPanel) * scale - base);
      total += e;
      if constexpr (kDropout) e *= load(kept + j * kPanel);
      return e;
    };
    int64_t j = lo;
    if constexpr (Op::kPack == 1) {
#pragma GCC unroll 2
      for (; j + 2 <= hi; j += 2) {
        const Vec<T> a = weight(j, sum[0]), b = weight(j + 1, sum[1]);
        store(S + j * kPanel, a);
        store(S + (j + 1) * kPanel, b);
      }
      if (j < hi) store(S + j * kPanel, weight(j, sum[0]));
    } else {
      // Pairs of keys go to row j / 2, which lies before or at what was read.
      Item* out = reinterpret_cast<Item*>(S);
#pragma GCC unroll 2
      for (; j + 2 <= hi; j += 2) {
        const Vec<T> a = weight(j, sum[0]), b = weight(j + 1, sum[1]);
        store(out + j / 2 * kPanel, pair_rows(a, b));
      }
      if (j < hi) store(out + j / 2 * kPanel, pair_rows(weight(j, sum[0]), Vec<T>{}));
    }
    return sum[0] + sum[1];
  }

  // weighted = sum of exp(s - max) * (s - max), for the entropy.
  void weigh(const T* S, int64_t lo, int64_t hi, T scale, Vec<T> before, Vec<T> base, Vec<T> alpha,
             Vec<T> sum_before, T* weighted) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    const Vec<T> shift = before == ninf ? Vec<T>{} : before - base;
    Vec<T> total = (load(weighted) + shift * sum_before) * alpha;
    for (int64_t j = lo; j < hi; ++j) {
      const Vec<T> x = load(S + j * kPanel) * scale - base;
      total += vexp(x) * (x == ninf ? Vec<T>{} : x);  // 0 * -inf
    }
    store(weighted, total);
  }

  // O^T += V^T P^T over the pairs with P != 0: what an excluded row of V holds never reaches O.
  void add_visible(const Operand& V, const T* S, const Panel<T>& panel, const Tile& tile,
                   T* O) const {
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
      const Vec<T> shift_a = max_a == ninf ? Vec<T>{} : max_a - base;
      const Vec<T> shift_b = max_b == ninf ? Vec<T>{} : max_b - base;
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
  void finish(int64_t unit, T* state, Scratch& scratch) const {
    const int64_t h = unit / m_tiles % p.heads_q, m0 = unit % m_tiles * block_m;
    const Sequence seq(p, ptr, unit / m_tiles / p.heads_q);
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    T* rows = scratch.take<T>(L * round_up(p.head_dim_v));
    for (int64_t q = 0; q < nq; q += L)
      finish_rows(seq, h, m0 + q, std::min<int64_t>(L, nq - q), at_panel(state, q / kPanel),
                  q % kPanel, rows);
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
    store(max_logit, nan ? sum : top);
    store(entropy, (load(lse) - base) * sum * inverse - load(state.weighted + lane) * inverse);
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
