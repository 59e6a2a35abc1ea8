// What attention did, from Q, K and LSE in O(N) memory; scores and weights are those of forward.h
// (dot products or additive, softmax or sigmoid).  One panel of queries at a time against tiles of
// keys, transposed, queries in lanes.
//   kRowStats    LSE, largest logit and entropy of each row, by one online pass
//   kTopK        the n largest logits of each row: a heap a query, entered past its smallest
//   kColumnMass  sum_i P_ij of each key: a task = a share of the panels of one head, which owns a
//                copy of the head's row; copies are summed in fixed order
//   kMeanTopK    the n largest of the mean of P over heads: a task = a panel of queries of a batch
//                element, whose P is added up over heads in a buffer [Sk][kPanel]
//   kPooledMap   P averaged down to rows x cols: a task = some pooled rows of one head
// Sigmoid weights have no LSE: row statistics are those of P / sum_j P_ij, with LSE = ln sum_j
// P_ij.
#pragma once
#include "cpu/kernels/scores.h"
#include "cpu/kernels/sigmoid.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace attn::cpu::ATTN_ISA {

template <class T>
class Inspect {
  static constexpr int L = kLanes<T>;
  const Problem& p;
  const Pointers& ptr;
  const Options& o;
  const Map& wanted;
  const int threads;
  const int64_t heads, m_tiles;

  struct Entry {
    T s;
    int64_t key;
  };
  // Largest first; of equal ones the first key.
  static bool better(const Entry& a, const Entry& b) {
    return a.s > b.s || (a.s == b.s && a.key < b.key);
  }

  // A panel of queries of a head, and the logits of one tile.
  struct Rows {
    Rows(const Inspect& all, int64_t head, int64_t m0, int64_t most, Scratch& scratch)
        : seq(all.p, all.ptr, head / all.p.heads_q),
          h(head % all.p.heads_q),
          m0(m0),
          nq(std::min(most, seq.seqlen_q - m0)),
          S(scratch.take<T>(kForwardKeys * kPanel)),
          lse(scratch.take<T>(kPanel)),
          bias(all.o.sigmoid ? sigmoid_bias<T>(all.o, seq) : T(0)),
          panel(seq, h, m0, nq,
                {nullptr, scratch.take<typename IntOf<T>::type>(MaskBits<T>::size(kForwardKeys))}),
          scores(seq, all.o, h, 1, scratch) {
      const bool known = all.ptr.lse && !all.o.sigmoid && all.wanted.what != Map::kRowStats;
      for (int64_t i = 0; i < kPanel; ++i)
        lse[i] =
            known && i < nq ? static_cast<const T*>(all.ptr.lse)[seq.lse_offset(h, m0 + i)] : T(0);
    }
    const Sequence seq;
    const int64_t h, m0, nq;
    T *const S, *const lse;  // [kForwardKeys][kPanel], [kPanel]
    const T bias;            // of sigmoid weights
    const Panel<T> panel;
    Scores<Plain<T>> scores;

    // f(v, lo, hi): the vector of queries v sees keys [lo, hi) of the tile.
    template <class F>
    void each_vector(const Tile& tile, const F& f) const {
      for (int64_t g = 0; g < panel.grains; ++g)
        for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L) f(v, tile.lo[g], tile.hi[g]);
    }
  };

 public:
  Inspect(const Problem& problem, const Pointers& pointers, const Options& options, const Map& w,
          int n)
      : p(problem),
        ptr(pointers),
        o(options),
        wanted(w),
        threads(n),
        heads(p.batch * p.heads_q),
        m_tiles((p.seqlen_q + kPanel - 1) / kPanel) {}

  void run() {
    if (wanted.what == Map::kColumnMass) {
      mass();
    } else if (wanted.what == Map::kPooledMap) {
      // as many pooled rows as their queries, with one shared at each end, fill one panel
      const int64_t fit = (kPanel - 2) * wanted.rows / std::max<int64_t>(p.seqlen_q, 1);
      const int64_t some = std::clamp<int64_t>(fit, 1, wanted.rows);
      const int64_t tasks = (wanted.rows + some - 1) / some;
      parallel_for(heads * tasks, threads, [&](int64_t i) {
        const int64_t r = i % tasks * some;
        pooled(i / tasks, r, std::min(r + some, wanted.rows));
      });
    } else if (wanted.what == Map::kMeanTopK) {
      parallel_for(p.batch * m_tiles, threads, [&](int64_t i) {
        const int64_t unit = p.batch * m_tiles - 1 - i;
        mean_top_k(unit / m_tiles, unit % m_tiles * kPanel);
      });
    } else {
      const bool top = wanted.what == Map::kTopK;
      parallel_for(heads * m_tiles, threads, [&](int64_t i) {
        const int64_t unit = heads * m_tiles - 1 - i;  // with causal the last are longest
        top ? top_k(unit / m_tiles, unit % m_tiles * kPanel)
            : row_stats(unit / m_tiles, unit % m_tiles * kPanel);
      });
    }
  }

 private:
  int64_t scratch_bytes() const {
    return Scores<Plain<T>>::bytes(p, o, 1) +
           int64_t(sizeof(T)) *
               (kForwardKeys * kPanel + MaskBits<T>::size(kForwardKeys) + 4 * kPanel);
  }

  // f(tile) for each tile of keys that the queries see, with their logits in S.
  template <class F>
  void each_tile(Rows& r, const F& f) const {
    walk(r, [](const void* use, const Tile& tile) { (*static_cast<const F*>(use))(tile); }, &f);
  }
  ATTN_NOINLINE void walk(Rows& r, void (*use)(const void*, const Tile&), const void* f) const {
    int64_t lo, hi;
    r.seq.key_range(r.m0, r.m0 + r.nq, &lo, &hi);
    if (r.nq > 0) r.scores.load_queries(0, r.h, r.m0, r.nq);
    for (int64_t n0 = lo / kForwardKeys * kForwardKeys; r.nq > 0 && n0 < hi; n0 += kForwardKeys) {
      const Tile tile = r.panel.tile(n0, std::min(kForwardKeys, hi - n0), 1);
      if (tile.empty) continue;
      r.scores.load_keys(n0, tile.nk);
      const T scale = r.scores.logits(0, r.panel, tile, r.panel.segments(tile), r.S, nullptr);
      r.each_vector(tile, [&](int64_t v, int64_t first, int64_t end) {
        for (int64_t j = first; j < end; ++j)
          store(r.S + j * kPanel + v, load(r.S + j * kPanel + v) * scale);
      });
      use(f, tile);
    }
  }

  // S: logits in, weights out; 0 in padding lanes.
  ATTN_NOINLINE void to_weights(const Rows& r, const Tile& tile) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    r.each_vector(tile, [&](int64_t v, int64_t lo, int64_t hi) {
      const Vec<T> lse = load(r.lse + v), lane = iota<T>() + T(v);
      for (int64_t j = lo; j < hi; ++j) {
        const Vec<T> s = load(r.S + j * kPanel + v);
        Vec<T> w[1] = {o.sigmoid ? s + r.bias : s - lse};
        o.sigmoid ? vsigmoid_each<T>(w) : vexp_each(w);
        w[0] = s == ninf ? Vec<T>{} : w[0];  // also where LSE is NaN, or -inf in an empty row
        store(r.S + j * kPanel + v, lane >= T(r.nq) ? Vec<T>{} : w[0]);
      }
    });
  }

  // Of each row: the largest logit, sum of weights, and sum of weights * their logarithm.
  struct Statistics {
    T top[kPanel], sum[kPanel], spread[kPanel];
  };

  void row_stats(int64_t head, int64_t m0) const {
    Scratch scratch(scratch_bytes());
    Rows r(*this, head, m0, kPanel, scratch);
    Statistics x;
    std::fill(x.top, x.top + kPanel, -std::numeric_limits<T>::infinity());
    std::fill(x.sum, x.sum + kPanel, T(0));
    std::fill(x.spread, x.spread + kPanel, T(0));
    each_tile(r, [&](const Tile& tile) {
      r.each_vector(tile, [&](int64_t v, int64_t lo, int64_t hi) { add_logits(r, v, lo, hi, &x); });
      if (!o.sigmoid) return;
      to_weights(r, tile);
      r.each_vector(tile,
                    [&](int64_t v, int64_t lo, int64_t hi) { add_sigmoid(r, v, lo, hi, &x); });
    });
    for (int64_t i = 0; i < r.nq; ++i)
      write_stats(r.seq.lse_offset(r.h, m0 + i), x.top[i], x.sum[i], x.spread[i]);
  }

  // l = sum e^(s - m),  spread = sum e^(s - m) (s - m):  both follow m as it grows
  ATTN_NOINLINE void add_logits(const Rows& r, int64_t v, int64_t lo, int64_t hi,
                                Statistics* x) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    const Vec<T> before = load(x->top + v);
    Vec<T> now = before;
    for (int64_t j = lo; j < hi; ++j) now = vmax(load(r.S + j * kPanel + v), now);
    store(x->top + v, now);
    if (o.sigmoid) return;
    const Vec<T> base = now == ninf ? Vec<T>{} : now;  // -inf - -inf would be NaN
    const Vec<T> alpha = vexp(before - base), shift = before == ninf ? Vec<T>{} : before - base;
    Vec<T> l = load(x->sum + v) * alpha, e = load(x->spread + v) * alpha + l * shift;
    for (int64_t j = lo; j < hi; ++j) {
      const Vec<T> s = load(r.S + j * kPanel + v) - base, w = vexp(s);
      l += w;
      e += w == T(0) ? Vec<T>{} : w * s;
    }
    store(x->sum + v, l), store(x->spread + v, e);
  }

  ATTN_NOINLINE void add_sigmoid(const Rows& r, int64_t v, int64_t lo, int64_t hi,
                                 Statistics* x) const {
    Vec<T> sum = load(x->sum + v), spread = load(x->spread + v);
    for (int64_t j = lo; j < hi; ++j) {
      const Vec<T> w = load(r.S + j * kPanel + v);
      const Vec<T> safe = w > std::numeric_limits<T>::min() ? w : Vec<T>{} + T(1);
      sum += w;
      spread += w * vlog(safe);
    }
    store(x->sum + v, sum), store(x->spread + v, spread);
  }

  void write_stats(int64_t at, T top, T l, T spread) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    const bool empty = top == ninf && l == l;
    const T base = o.sigmoid ? T(0) : top;
    // sigmoid weights that are all 0, or as denormal as to be missing in `spread`
    constexpr T kFaint = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
    static_cast<T*>(ptr.lse)[at] = empty ? ninf : base + std::log(l);
    static_cast<T*>(wanted.out)[at] = l == l ? top : l;
    static_cast<T*>(wanted.entropy)[at] = empty || l < kFaint ? T(0) : std::log(l) - spread / l;
  }

  void top_k(int64_t head, int64_t m0) const {
    const int64_t n = wanted.n;
    Scratch scratch(scratch_bytes());
    Rows r(*this, head, m0, kPanel, scratch);
    const T inf = std::numeric_limits<T>::infinity();
    std::vector<Entry> heaps(size_t(r.nq * n));  // of each query, the worst on top
    std::vector<int64_t> size(size_t(r.nq), 0);
    T* least = scratch.take<T>(kPanel);
    for (int64_t i = 0; i < kPanel; ++i) least[i] = i < r.nq ? -inf : inf;
    each_tile(r, [&](const Tile& tile) {
      r.each_vector(tile, [&](int64_t v, int64_t lo, int64_t hi) {
        for (int64_t j = lo; j < hi; ++j) {
          Vec<T> s = load(r.S + j * kPanel + v);
          s = s == s ? s : Vec<T>{} + inf;  // NaN counts as the largest
          const Vec<T> bar = load(least + v);
          if (all_equal<T>(vmax(s, bar), bar)) continue;
          for (int64_t i = v; i < v + L; ++i)
            if (s[i - v] > least[i])
              enter(heaps.data() + i * n, &size[size_t(i)], {s[i - v], tile.n0 + j}, least + i);
        }
      });
    });
    for (int64_t i = 0; i < r.nq; ++i) write_top(r, head, i, heaps.data() + i * n, size[size_t(i)]);
  }

  void write_top(const Rows& r, int64_t head, int64_t i, Entry* heap, int64_t size) const {
    std::sort_heap(heap, heap + size, better);
    const int64_t at = (head * p.seqlen_q + r.m0 + i) * wanted.n;
    for (int64_t e = 0; e < wanted.n; ++e) {
      static_cast<T*>(wanted.out)[at + e] = e < size ? weight(r, heap[e].s, r.lse[i]) : T(0);
      wanted.keys[at + e] = e < size ? heap[e].key : -1;
    }
  }

  void enter(Entry* heap, int64_t* size, Entry entry, T* least) const {
    if (*size == wanted.n) {
      std::pop_heap(heap, heap + *size, better);
      --*size;
    }
    heap[(*size)++] = entry;
    std::push_heap(heap, heap + *size, better);
    if (*size == wanted.n) *least = heap[0].s;
  }

  T weight(const Rows& r, T s, T lse) const {
    return o.sigmoid ? T(1) / (T(1) + std::exp(-(s + r.bias))) : std::exp(s - lse);
  }

  // The results of kMeanTopK: three arrays of integers, one after the other.
  struct MeanKeys {
    explicit MeanKeys(const Inspect& all)
        : keys(all.wanted.keys),
          seen(keys + all.p.batch * all.p.seqlen_q * all.wanted.n),
          any(seen + all.heads * all.p.seqlen_q) {}
    int64_t *keys, *seen, *any;  // [B, Sq, n]; keys that a head sees [B, Hq, Sq]; that any [B, Sq]
  };

  void mean_top_k(int64_t b, int64_t m0) const {
    // sum over heads of P of each key and query, -1 while no head has seen the key
    std::vector<T> sums(size_t(p.seqlen_k * kPanel), T(-1));
    const int64_t nq = std::min(kPanel, p.seqlen_q - m0);
    for (int64_t h = 0; h < p.heads_q; ++h) add_head(b * p.heads_q + h, m0, sums.data());
    for (int64_t i = 0; i < nq; ++i) write_mean(b * p.seqlen_q + m0 + i, sums.data() + i);
  }

  // sums += P of a head's panel; the head's sums of rows and counts of seen keys are written.
  void add_head(int64_t head, int64_t m0, T* sums) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    Scratch scratch(scratch_bytes() + 2 * int64_t(sizeof(T)) * kPanel);
    Rows r(*this, head, m0, kPanel, scratch);
    T *total = scratch.take<T>(kPanel), *count = scratch.take<T>(kPanel);
    std::fill(total, total + kPanel, T(0)), std::fill(count, count + kPanel, T(0));
    each_tile(r, [&](const Tile& tile) {
      r.each_vector(tile, [&](int64_t v, int64_t lo, int64_t hi) {
        for (int64_t j = lo; j < hi; ++j) {
          T* at = sums + (tile.n0 + j) * kPanel + v;
          const Vec<T> s = load(r.S + j * kPanel + v), before = load(at);
          const Vec<T> known = before < T(0) ? Vec<T>{} : before;
          store(at, s == ninf ? before : known);
          store(count + v, load(count + v) + (s == ninf ? Vec<T>{} : Vec<T>{} + T(1)));
        }
      });
      to_weights(r, tile);
      r.each_vector(tile, [&](int64_t v, int64_t lo, int64_t hi) {
        Vec<T> row = load(total + v);
        for (int64_t j = lo; j < hi; ++j) {
          T* at = sums + (tile.n0 + j) * kPanel + v;
          const Vec<T> w = load(r.S + j * kPanel + v);
          row += w;
          store(at, load(at) + w);  // w is 0 where the key is not seen, so that -1 stays
        }
        store(total + v, row);
      });
    });
    for (int64_t i = 0; i < r.nq; ++i) {
      const int64_t at = head * p.seqlen_q + m0 + i;
      static_cast<T*>(wanted.entropy)[at] = total[i];
      MeanKeys(*this).seen[at] = int64_t(count[i]);
    }
  }

  // The largest of one query's sums, [Sk] with a stride of kPanel.
  void write_mean(int64_t row, const T* sums) const {
    const int64_t n = wanted.n;
    const MeanKeys out(*this);
    const T inf = std::numeric_limits<T>::infinity();
    std::vector<Entry> heap(static_cast<size_t>(n));
    int64_t size = 0, any = 0;
    T least = -inf;
    for (int64_t j = 0; j < p.seqlen_k; ++j) {
      const T sum = sums[j * kPanel];
      if (sum < T(0)) continue;
      ++any;
      const T s = sum == sum ? sum : inf;  // NaN counts as the largest
      if (s > least) enter(heap.data(), &size, {s, j}, &least);
    }
    out.any[row] = any;
    std::sort_heap(heap.data(), heap.data() + size, better);
    for (int64_t e = 0; e < n; ++e) {
      const T s = e < size ? heap[size_t(e)].s : T(0);
      static_cast<T*>(wanted.out)[row * n + e] = s == inf ? s - s : s / T(p.heads_q);
      out.keys[row * n + e] = e < size ? heap[size_t(e)].key : -1;
    }
  }

  void mass() const {
    const int64_t shares =
        std::max<int64_t>(1, std::min((8 + heads - 1) / std::max<int64_t>(heads, 1), m_tiles));
    std::vector<T> copies(size_t(shares * heads * p.seqlen_k), T(0));
    parallel_for(heads * shares, threads, [&](int64_t i) {
      T* total = copies.data() + i * p.seqlen_k;
      for (int64_t m = i / heads; m < m_tiles; m += shares) add_mass(i % heads, m * kPanel, total);
    });
    T* out = static_cast<T*>(wanted.out);
    for (int64_t i = 0; i < heads * p.seqlen_k; ++i) {
      T sum = 0;
      for (int64_t s = 0; s < shares; ++s) sum += copies[size_t(s * heads * p.seqlen_k + i)];
      out[i] = sum;
    }
  }

  void add_mass(int64_t head, int64_t m0, T* total) const {
    Scratch scratch(scratch_bytes());
    Rows r(*this, head, m0, kPanel, scratch);
    each_tile(r, [&](const Tile& tile) {
      to_weights(r, tile);
      for (int64_t j = tile.lo[0]; j < tile.hi[r.panel.grains - 1]; ++j) {
        Vec<T> sum{};
        for (int64_t g = 0; g < r.panel.grains; ++g)
          for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L)
            if (j >= tile.lo[g] && j < tile.hi[g]) sum += load(r.S + j * kPanel + v);
        total[tile.n0 + j] += lane_sum<T>(sum);
      }
    });
  }

  // First position of cell c of `cells` over `length` positions, and one past its last.
  static int64_t cell_low(int64_t c, int64_t cells, int64_t length) { return c * length / cells; }
  static int64_t cell_high(int64_t c, int64_t cells, int64_t length) {
    return ((c + 1) * length + cells - 1) / cells;
  }

  // Pooled rows [r0, r1) of one head.
  void pooled(int64_t head, int64_t r0, int64_t r1) const {
    const int64_t end = cell_high(r1 - 1, wanted.rows, p.seqlen_q), cols = wanted.cols;
    for (int64_t m0 = cell_low(r0, wanted.rows, p.seqlen_q); m0 < end; m0 += kPanel) {
      Scratch scratch(scratch_bytes() + int64_t(sizeof(T)) * cols * kPanel);
      Rows r(*this, head, m0, std::min(kPanel, end - m0), scratch);
      T* sums = scratch.take<T>(cols * kPanel);  // of each cell's keys, by query
      std::fill(sums, sums + cols * kPanel, T(0));
      each_tile(r, [&](const Tile& tile) {
        to_weights(r, tile);
        add_cells(r, tile, sums);
      });
      for (int64_t row = r0; row < r1; ++row) add_pooled_row(r, head, row, sums);
    }
  }

  void add_cells(const Rows& r, const Tile& tile, T* sums) const {
    const int64_t cols = wanted.cols, n0 = tile.n0;
    int64_t c = n0 * cols / p.seqlen_k;  // the first cell of key n0
    for (; c < cols && cell_low(c, cols, p.seqlen_k) < n0 + tile.nk; ++c) {
      const int64_t low = cell_low(c, cols, p.seqlen_k) - n0;
      const int64_t high = cell_high(c, cols, p.seqlen_k) - n0;
      r.each_vector(tile, [&](int64_t v, int64_t lo, int64_t hi) {
        Vec<T> sum = load(sums + c * kPanel + v);
        for (int64_t j = std::max(low, lo); j < std::min(high, hi); ++j)
          sum += load(r.S + j * kPanel + v);
        store(sums + c * kPanel + v, sum);
      });
    }
  }

  void add_pooled_row(const Rows& r, int64_t head, int64_t row, const T* sums) const {
    const int64_t rows = wanted.rows, cols = wanted.cols;
    T* out = static_cast<T*>(wanted.out) + (head * rows + row) * cols;
    const int64_t low = cell_low(row, rows, p.seqlen_q), high = cell_high(row, rows, p.seqlen_q);
    for (int64_t c = 0; c < cols; ++c) {
      const int64_t wide = cell_high(c, cols, p.seqlen_k) - cell_low(c, cols, p.seqlen_k);
      T sum = 0;
      for (int64_t i = std::max(low, r.m0) - r.m0; i < std::min(high, r.m0 + r.nq) - r.m0; ++i)
        sum += sums[c * kPanel + i];
      out[c] += sum / T((high - low) * wide);
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
