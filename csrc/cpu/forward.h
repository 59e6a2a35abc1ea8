// O = softmax(scale * Q K^T + ...) V and LSE, FlashAttention-2's online softmax (Dao, 2023) on
// vector registers. One task = BLOCK_M queries of one head, or a share of its keys when tasks are
// few (split-KV, combined afterwards in fixed order).  All tiles are transposed, queries in lanes:
// row maximum and sum are vertical operations.

constexpr int64_t kForwardKeys = 192;  // BLOCK_N; multiple of 4 (dropout words)

// The running state of a tile's queries.
template <class T>
struct SoftmaxState {
  T* O;         // [Dv][kMaxQueries], unnormalised
  T* max;       // [kMaxQueries] largest logit
  T* sum;       // [kMaxQueries] sum of exp(s - max)
  T* weighted;  // [kMaxQueries] sum of exp(s - max) * (s - max)
  static int64_t size(int64_t dv) { return (dv + 3) * kMaxQueries; }
  SoftmaxState(T* base, int64_t dv)
      : O(base),
        max(base + dv * kMaxQueries),
        sum(max + kMaxQueries),
        weighted(sum + kMaxQueries) {}
  void clear(int64_t dv) {
    std::fill(O, max, T(0));
    std::fill(max, sum, -std::numeric_limits<T>::infinity());
    std::fill(sum, weighted + kMaxQueries, T(0));
    (void)dv;
  }
};

template <class T>
class Forward {
 public:
  Forward(const Problem& problem, const Pointers& pointers, int threads)
      : p(problem), ptr(pointers), threads(threads) {
    block_m = p.seqlen_q < kMaxQueries ? (p.seqlen_q + kLanes<T> - 1) / kLanes<T> * kLanes<T>
                                       : int64_t(kMaxQueries);
    m_tiles = block_m ? (p.seqlen_q + block_m - 1) / block_m : 0;
    const int64_t tasks = p.batch * p.heads_q * m_tiles;
    const int64_t n_tiles = (p.seqlen_k + kForwardKeys - 1) / kForwardKeys;
    // Chosen from shapes alone, so that results do not depend on the number of threads.
    splits =
        tasks == 0 || tasks >= 16 ? 1 : std::min<int64_t>((16 + tasks - 1) / tasks, n_tiles / 2);
    splits = std::max<int64_t>(splits, 1);
  }

  void run() {
    const int64_t units = p.batch * p.heads_q * m_tiles;
    const int64_t state = SoftmaxState<T>::size(p.head_dim_v);
    std::vector<T> partial(splits > 1 ? units * splits * state : 0);
    parallel_for(units * splits, threads, [&](int64_t task) {
      const int64_t unit = longest_first(task / splits, units), split = task % splits;
      Scratch<T> scratch(scratch_size() + state);
      SoftmaxState<T> s(
          splits > 1 ? partial.data() + (unit * splits + split) * state : scratch.take(state),
          p.head_dim_v);
      attend(unit, split, s, scratch);
      if (splits == 1) finish(unit, s);
    });
    if (splits == 1) return;
    parallel_for(units, threads, [&](int64_t unit) {
      SoftmaxState<T> first(partial.data() + unit * splits * state, p.head_dim_v);
      for (int64_t i = 1; i < splits; ++i)
        merge(first, SoftmaxState<T>(partial.data() + (unit * splits + i) * state, p.head_dim_v));
      finish(unit, first);
    });
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  int threads;
  int64_t block_m, m_tiles, splits;

  // Causal tiles grow with the query: the last ones first leaves no long task for the end.
  int64_t longest_first(int64_t i, int64_t units) const { return units - 1 - i; }

  int64_t scratch_size() const {
    return kMaxQueries * (p.head_dim + 3 * kForwardKeys) +
           kForwardKeys * (p.head_dim + p.head_dim_v) + std::max(p.head_dim, p.head_dim_v);
  }

  void attend(int64_t unit, int64_t split, SoftmaxState<T>& state, Scratch<T>& scratch) const {
    const int64_t h = unit / m_tiles % p.heads_q, m0 = unit % m_tiles * block_m;
    const int64_t hk = h / (p.heads_q / p.heads_k);
    const Sequence seq(p, ptr, unit / m_tiles / p.heads_q);
    state.clear(p.head_dim_v);
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    if (nq <= 0) return;

    T* Qt = scratch.take(p.head_dim * kMaxQueries);
    T* S = scratch.take(kForwardKeys * kMaxQueries);
    T* add = scratch.take(kForwardKeys * kMaxQueries);
    T* keep = scratch.take(kForwardKeys * kMaxQueries);
    T* K_scratch = scratch.take(kForwardKeys * p.head_dim);
    T* V_scratch = scratch.take(kForwardKeys * p.head_dim_v);
    const ScoreTile<T> tile(seq, h, m0, nq, add, keep);
    pack_transposed(p.dtype, ptr.q, seq.q_offset(p.q, h, m0), p.q.s, nq, tile.bm, p.head_dim,
                    scratch.take(p.head_dim), Qt);

    int64_t lo, hi;
    seq.key_range(m0, m0 + nq, &lo, &hi);
    int64_t t0 = lo / kForwardKeys, t1 = (hi + kForwardKeys - 1) / kForwardKeys;
    const int64_t share = (t1 - t0 + splits - 1) / splits;
    t0 += split * share;
    t1 = std::min(t1, t0 + share);
    for (int64_t t = t0; t < t1; ++t) {
      const int64_t n0 = t * kForwardKeys, nk = std::min(kForwardKeys, hi - n0);
      // S^T = K Q^T   [nk, bm]
      const Rows<T> K = key_rows(seq, ptr.k, p.k, hk, n0, nk, p.head_dim, K_scratch);
      gemm<T>(nk, tile.bm, p.head_dim, K.data, K.stride, 1, Qt, kMaxQueries, S, kMaxQueries, false);
      tile.logits(n0, nk, S, nullptr);
      softmax(S, nk, tile.bm, state);
      if (p.dropout_p > 0) {
        const T* kept = tile.keep(n0, nk);
        for (int64_t j = 0; j < nk; ++j)
          for (int64_t q = 0; q < tile.bm; ++q) S[j * kMaxQueries + q] *= kept[j * kMaxQueries + q];
      }
      // O^T += V^T P^T   [dv, bm]
      const Rows<T> V = key_rows(seq, ptr.v, p.v, hk, n0, nk, p.head_dim_v, V_scratch);
      if (tile.partial(n0, nk) && !all_finite(V, nk, p.head_dim_v))
        add_visible(V, S, nk, nq, state.O);
      else
        gemm<T>(p.head_dim_v, tile.bm, nk, V.data, 1, V.stride, S, kMaxQueries, state.O,
                kMaxQueries, true);
    }
  }

  // S: logits in, exp(s - max) out; moves the state on to the new maxima.
  void softmax(T* S, int64_t nk, int64_t bm, SoftmaxState<T>& state) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < bm; q += kLanes<T>) {
      const Vec<T> before = load(state.max + q);
      Vec<T> top = before;
      for (int64_t j = 0; j < nk; ++j) top = vmax(load(S + j * kMaxQueries + q), top);
      store(state.max + q, top);
      const Vec<T> base = top == ninf ? Vec<T>{} : top;  // -inf - -inf would be NaN
      const Vec<T> alpha = vexp(before - base);
      const Vec<T> sum_before = load(state.sum + q);
      Vec<T> sum = sum_before * alpha;
      if (ptr.entropy) {
        const Vec<T> shift = before == ninf ? Vec<T>{} : before - base;
        Vec<T> weighted = (load(state.weighted + q) + shift * sum_before) * alpha;
        for (int64_t j = 0; j < nk; ++j) {
          const Vec<T> x = load(S + j * kMaxQueries + q) - base;
          const Vec<T> y = x == ninf ? Vec<T>{} : x;  // 0 * -inf
          weighted += vexp(x) * y;
        }
        store(state.weighted + q, weighted);
      }
      for (int64_t j = 0; j < nk; ++j) {
        const Vec<T> e = vexp(load(S + j * kMaxQueries + q) - base);
        sum += e;
        store(S + j * kMaxQueries + q, e);
      }
      store(state.sum + q, sum);
      bool moved = false;
      for (int i = 0; i < kLanes<T>; ++i) moved |= !(alpha[i] == T(1));
      if (moved)
        for (int64_t d = 0; d < p.head_dim_v; ++d) {
          T* at = state.O + d * kMaxQueries + q;
          store(at, load(at) * alpha);
        }
    }
  }

  // O^T += V^T P^T over the pairs with P != 0: what an excluded row of V holds never reaches O.
  void add_visible(Rows<T> V, const T* P, int64_t nk, int64_t nq, T* O) const {
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t q = 0; q < nq; ++q) {
        const T w = P[j * kMaxQueries + q];
        if (w == T(0)) continue;
        for (int64_t d = 0; d < p.head_dim_v; ++d)
          O[d * kMaxQueries + q] += w * V.data[j * V.stride + d];
      }
  }

  void merge(SoftmaxState<T>& a, const SoftmaxState<T>& b) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < block_m; ++q) {
      const T top = std::max(a.max[q], b.max[q]), base = top == ninf ? T(0) : top;
      const T shift_a = a.max[q] == ninf ? T(0) : a.max[q] - base;
      const T shift_b = b.max[q] == ninf ? T(0) : b.max[q] - base;
      const T wa = std::exp(shift_a), wb = std::exp(shift_b);
      a.weighted[q] =
          wa * (a.weighted[q] + shift_a * a.sum[q]) + wb * (b.weighted[q] + shift_b * b.sum[q]);
      a.sum[q] = wa * a.sum[q] + wb * b.sum[q];
      a.max[q] = top;
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        const int64_t at = d * kMaxQueries + q;
        a.O[at] = wa * a.O[at] + wb * b.O[at];
      }
    }
  }

  // Normalises, adds the sink's share, writes O, LSE and the statistics.
  void finish(int64_t unit, const SoftmaxState<T>& state) const {
    const int64_t h = unit / m_tiles % p.heads_q, m0 = unit % m_tiles * block_m;
    const Sequence seq(p, ptr, unit / m_tiles / p.heads_q);
    const T ninf = -std::numeric_limits<T>::infinity();
    Scratch<T> scratch(p.head_dim_v);
    T* row = scratch.take(p.head_dim_v);
    for (int64_t q = 0; q < std::min(block_m, seq.seqlen_q - m0); ++q) {
      const T sum = state.sum[q], top = state.max[q];
      const bool nan = sum != sum, empty = top == ninf && !nan;
      T inverse = T(0), lse = ninf, entropy = T(0);
      if (!empty) {
        const T base = top == ninf ? T(0) : top;
        T total = sum, scale = T(1), shift = base;
        if (ptr.sink) {  // joins the normaliser only
          const T sink = static_cast<const T*>(ptr.sink)[h];
          if (sink > base) shift = sink, scale = std::exp(base - sink);
          total = sum * scale + std::exp(sink - shift);
        }
        inverse = scale / total;
        lse = shift + std::log(total);
        entropy = (lse - base) * sum * inverse - state.weighted[q] * inverse;
      }
      for (int64_t d = 0; d < p.head_dim_v; ++d)
        row[d] = empty ? T(0) : state.O[d * kMaxQueries + q] * inverse;
      store_row<T>(
          p.dtype, row, p.head_dim_v,
          static_cast<char*>(ptr.o) + seq.q_offset(p.o, h, m0 + q) * int64_t(dtype_size(p.dtype)));
      const int64_t at = seq.lse_offset(h, m0 + q);
      static_cast<T*>(ptr.lse)[at] = nan ? sum : lse;
      if (ptr.max_logit) static_cast<T*>(ptr.max_logit)[at] = nan ? sum : top;
      if (ptr.entropy) static_cast<T*>(ptr.entropy)[at] = entropy;
    }
  }
};
