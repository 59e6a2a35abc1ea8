// What attention did, from Q, K and LSE in O(N) memory; scores and weights are those of family.h
// (dot products or additive, softmax or sigmoid).  Tiles are transposed, queries in lanes.
//   kRowStats    LSE, largest logit and entropy of each row, by one online pass
//   kTopK        the n largest logits of each row: a heap a query, entered past its smallest
//   kColumnMass  sum_i P_ij of each key: a task = a share of the query tiles of one head, which
//                owns a copy of the head's row; copies are summed in fixed order
//   kPooledMap   P averaged down to rows x cols: a task = some pooled rows of one head
// Sigmoid weights have no LSE: row statistics are those of P / sum_j P_ij, with LSE = ln sum_j
// P_ij.
#pragma once
#include "cpu/kernels/family.h"

namespace attn::cpu::ATTN_ISA {

template <class T>
class Inspect : FamilyTiles<T> {
  using Base = FamilyTiles<T>;
  using Base::block_m, Base::m_tiles, Base::options, Base::p, Base::ptr;
  const InspectOptions& wanted;
  int threads;

  struct Entry {
    T s;
    int64_t key;
  };
  // Largest first; of equal ones the first key.
  static bool better(const Entry& a, const Entry& b) {
    return a.s > b.s || (a.s == b.s && a.key < b.key);
  }

  // The queries of one task, packed, and its scratch.
  struct Queries {
    T *Qt, *Eq, *S, *K_scratch, *Kt, *lse;
    bool fast;
  };

 public:
  Inspect(const Problem& problem, const Pointers& pointers, const FamilyOptions& o,
          const InspectOptions& w, int n)
      : Base(problem, pointers, o), wanted(w), threads(n) {}

  void run() {
    const int64_t heads = p.batch * p.heads_q;
    if (wanted.what == InspectOptions::kColumnMass) {
      mass(heads);
    } else if (wanted.what == InspectOptions::kPooledMap) {
      // as many pooled rows as their queries, with one shared at each end, fill one tile
      const int64_t fit = (kMaxQueries - 2) * wanted.rows / std::max<int64_t>(p.seqlen_q, 1);
      const int64_t some = std::clamp<int64_t>(fit, 1, wanted.rows);
      const int64_t tasks = (wanted.rows + some - 1) / some;
      parallel_for(heads * tasks, threads, [&](int64_t i) {
        const int64_t r = i % tasks * some;
        pooled(i / tasks, r, std::min(r + some, wanted.rows));
      });
    } else {
      const bool top = wanted.what == InspectOptions::kTopK;
      parallel_for(heads * m_tiles, threads, [&](int64_t i) {
        const int64_t unit = heads * m_tiles - 1 - i;  // with causal the last are longest
        top ? top_k(unit / m_tiles, unit % m_tiles * block_m)
            : row_stats(unit / m_tiles, unit % m_tiles * block_m);
      });
    }
  }

 private:
  int64_t scratch_bytes() const {
    const int64_t dim = p.head_dim;
    return int64_t(sizeof(T)) *
           (kMaxQueries * (2 * dim + 6 + 3 * kFamilyKeys) + (2 * kFamilyKeys + 1) * dim);
  }

  ATTN_NOINLINE Queries pack(const Sequence& seq, int64_t h, int64_t m0, int64_t nq, int64_t bm,
                             Scratch& scratch) const {
    const int64_t dim = p.head_dim;
    Queries q{};
    q.Qt = scratch.take<T>(dim * kMaxQueries), q.Eq = scratch.take<T>(dim * kMaxQueries);
    q.S = scratch.take<T>(kFamilyKeys * kMaxQueries);
    q.K_scratch = scratch.take<T>(kFamilyKeys * dim), q.Kt = scratch.take<T>(kFamilyKeys * dim);
    q.lse = scratch.take<T>(kMaxQueries);
    T* row = scratch.take<T>(dim);
    pack_lanes(p.dtype, ptr.q, seq.q_offset(p.q, h, m0), p.q.s, nq, bm, dim, row, q.Qt);
    q.fast = options.w != nullptr;
    for (int64_t d = 0; options.w && d < dim; ++d) {
      q.fast &= within_fast_tanh(q.Qt + d * kMaxQueries, bm);
      std::copy(q.Qt + d * kMaxQueries, q.Qt + d * kMaxQueries + bm, q.Eq + d * kMaxQueries);
      exponentials(q.Eq + d * kMaxQueries, bm);
    }
    const bool known = ptr.lse && !options.sigmoid && wanted.what != InspectOptions::kRowStats;
    for (int64_t i = 0; i < bm; ++i)
      q.lse[i] = known && i < nq ? static_cast<const T*>(ptr.lse)[seq.lse_offset(h, m0 + i)] : T(0);
    return q;
  }

  // f(n0, nk) for each key tile that the queries see, with their logits in q.S.
  template <class F>
  void each_tile(const Sequence& seq, int64_t h, int64_t m0, const FamilyScores<T>& tile,
                 const Queries& q, F f) const {
    const int64_t hk = h / (p.heads_q / p.heads_k), dim = p.head_dim;
    int64_t lo, hi;
    seq.key_range(m0, m0 + tile.nq, &lo, &hi);
    for (int64_t n0 = lo / kFamilyKeys * kFamilyKeys; n0 < hi; n0 += kFamilyKeys) {
      const int64_t nk = std::min(kFamilyKeys, hi - n0);
      const KeyRows<T> K = family_rows(seq, ptr.k, p.k, hk, n0, nk, dim, q.K_scratch);
      bool fast = q.fast;
      if (options.w) {
        this->pack_keys(K, nk, q.Kt);
        fast = fast && within_fast_tanh(q.Kt, dim * kFamilyKeys);
        if (fast) exponentials(q.Kt, dim * kFamilyKeys);
      }
      this->products(h, nk, tile.bm, K, q.Kt, fast ? q.Eq : q.Qt, fast, q.S);
      tile.logits(n0, nk, q.S, nullptr);
      f(n0, nk);
    }
  }

  // S: logits in, weights out; 0 in padding lanes.
  ATTN_NOINLINE void to_weights(const Sequence& seq, const Queries& q, int64_t nk, int64_t nq,
                                int64_t bm) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    if (options.sigmoid) this->sigmoid(q.S, nk, bm, this->sigmoid_bias(seq));
    for (int64_t i = 0; i < bm; i += kLanes<T>) {
      const Vec<T> lse = load(q.lse + i), lane = iota<T>() + T(i);
      for (int64_t j = 0; j < nk; ++j) {
        T* at = q.S + j * kMaxQueries + i;
        Vec<T> w = load(at);
        if (!options.sigmoid) {
          const Vec<T> s = w;
          w = vexp(s - lse);
          w = s == ninf ? Vec<T>{} : w;  // also where LSE is NaN, or -inf in an empty row
        }
        store(at, lane >= T(nq) ? Vec<T>{} : w);
      }
    }
  }

  void row_stats(int64_t head, int64_t m0) const {
    const int64_t b = head / p.heads_q, h = head % p.heads_q;
    const Sequence seq(p, ptr, b);
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    if (nq <= 0) return;
    Scratch scratch(scratch_bytes());
    T *add = scratch.take<T>(kFamilyKeys * kMaxQueries), *top = scratch.take<T>(kMaxQueries);
    T *sum = scratch.take<T>(kMaxQueries), *spread = scratch.take<T>(kMaxQueries);
    const FamilyScores<T> tile(seq, h, m0, nq, add, nullptr);
    const Queries q = pack(seq, h, m0, nq, tile.bm, scratch);
    const T ninf = -std::numeric_limits<T>::infinity();
    std::fill(top, top + kMaxQueries, ninf);
    std::fill(sum, sum + kMaxQueries, T(0));
    std::fill(spread, spread + kMaxQueries, T(0));
    each_tile(seq, h, m0, tile, q, [&](int64_t, int64_t nk) {
      for (int64_t i = 0; i < tile.bm; i += kLanes<T>) {
        const Vec<T> before = load(top + i);
        Vec<T> now = before;
        for (int64_t j = 0; j < nk; ++j) now = vmax(load(q.S + j * kMaxQueries + i), now);
        store(top + i, now);
        if (options.sigmoid) continue;
        // l = sum e^(s - m),  spread = sum e^(s - m) (s - m):  both follow m as it grows
        const Vec<T> base = now == ninf ? Vec<T>{} : now;  // -inf - -inf would be NaN
        const Vec<T> alpha = vexp(before - base), shift = before == ninf ? Vec<T>{} : before - base;
        Vec<T> l = load(sum + i) * alpha, e = load(spread + i) * alpha + l * shift;
        for (int64_t j = 0; j < nk; ++j) {
          const Vec<T> s = load(q.S + j * kMaxQueries + i) - base, w = vexp(s);
          l += w;
          e += w == T(0) ? Vec<T>{} : w * s;
        }
        store(sum + i, l), store(spread + i, e);
      }
      if (!options.sigmoid) return;
      to_weights(seq, q, nk, nq, tile.bm);
      for (int64_t j = 0; j < nk; ++j)
        for (int64_t i = 0; i < tile.bm; i += kLanes<T>) {
          const Vec<T> w = load(q.S + j * kMaxQueries + i);
          const Vec<T> safe = w > std::numeric_limits<T>::min() ? w : Vec<T>{} + T(1);
          store(sum + i, load(sum + i) + w);
          store(spread + i, load(spread + i) + w * vlog(safe));
        }
    });
    for (int64_t i = 0; i < nq; ++i) {
      const int64_t at = seq.lse_offset(h, m0 + i);
      const bool empty = top[i] == ninf && sum[i] == sum[i];
      const T base = options.sigmoid ? T(0) : top[i], l = sum[i];
      // sigmoid weights that are all 0, or as denormal as to be missing in `spread`
      constexpr T kFaint = std::numeric_limits<T>::min() / std::numeric_limits<T>::epsilon();
      static_cast<T*>(ptr.lse)[at] = empty ? ninf : base + std::log(l);
      static_cast<T*>(wanted.out)[at] = l == l ? top[i] : l;
      static_cast<T*>(wanted.entropy)[at] =
          empty || l < kFaint ? T(0) : std::log(l) - spread[i] / l;
    }
  }

  void top_k(int64_t head, int64_t m0) const {
    const int64_t b = head / p.heads_q, h = head % p.heads_q, n = wanted.n;
    const Sequence seq(p, ptr, b);
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    if (nq <= 0) return;
    Scratch scratch(scratch_bytes());
    T *add = scratch.take<T>(kFamilyKeys * kMaxQueries), *least = scratch.take<T>(kMaxQueries);
    const FamilyScores<T> tile(seq, h, m0, nq, add, nullptr);
    const Queries q = pack(seq, h, m0, nq, tile.bm, scratch);
    const T inf = std::numeric_limits<T>::infinity();
    std::vector<Entry> heaps(size_t(nq) * size_t(n));  // of each query, the worst on top
    std::vector<int64_t> size(size_t(nq), 0);
    for (int64_t i = 0; i < kMaxQueries; ++i) least[i] = i < nq ? -inf : inf;
    each_tile(seq, h, m0, tile, q, [&](int64_t n0, int64_t nk) {
      for (int64_t j = 0; j < nk; ++j)
        for (int64_t i = 0; i < tile.bm; i += kLanes<T>) {
          T* at = q.S + j * kMaxQueries + i;
          Vec<T> s = load(at);
          s = s == s ? s : Vec<T>{} + inf;  // NaN counts as the largest
          const Vec<T> bar = load(least + i);
          if (all_equal<T>(vmax(s, bar), bar)) continue;
          for (int64_t lane = 0; lane < kLanes<T>; ++lane)
            if (s[lane] > least[i + lane])
              enter(heaps.data() + (i + lane) * n, &size[size_t(i + lane)], {s[lane], n0 + j},
                    least + i + lane);
        }
    });
    for (int64_t i = 0; i < nq; ++i) {
      Entry* heap = heaps.data() + i * n;
      std::sort_heap(heap, heap + size[size_t(i)], better);
      T* out = static_cast<T*>(wanted.out) + ((head * p.seqlen_q) + m0 + i) * n;
      int64_t* keys = wanted.keys + ((head * p.seqlen_q) + m0 + i) * n;
      for (int64_t e = 0; e < n; ++e) {
        const bool there = e < size[size_t(i)];
        out[e] = there ? heap[e].s : -inf;
        keys[e] = there ? heap[e].key : -1;
      }
      for (int64_t e = 0; e < size[size_t(i)]; ++e) out[e] = weight(seq, heap[e].s, q.lse[i]);
      for (int64_t e = size[size_t(i)]; e < n; ++e) out[e] = T(0);
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

  T weight(const Sequence& seq, T s, T lse) const {
    return options.sigmoid ? T(1) / (T(1) + std::exp(-(s + this->sigmoid_bias(seq))))
                           : std::exp(s - lse);
  }

  void mass(int64_t heads) const {
    const int64_t shares =
        std::max<int64_t>(1, std::min((8 + heads - 1) / std::max<int64_t>(heads, 1), m_tiles));
    std::vector<T> copies(size_t(shares * heads * p.seqlen_k), T(0));
    parallel_for(heads * shares, threads, [&](int64_t i) {
      const int64_t head = i % heads, share = i / heads;
      T* total = copies.data() + i * p.seqlen_k;
      for (int64_t m = share; m < m_tiles; m += shares) add_mass(head, m * block_m, total);
    });
    T* out = static_cast<T*>(wanted.out);
    for (int64_t i = 0; i < heads * p.seqlen_k; ++i) {
      T sum = 0;
      for (int64_t s = 0; s < shares; ++s) sum += copies[size_t(s * heads * p.seqlen_k + i)];
      out[i] = sum;
    }
  }

  void add_mass(int64_t head, int64_t m0, T* total) const {
    const int64_t h = head % p.heads_q;
    const Sequence seq(p, ptr, head / p.heads_q);
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    if (nq <= 0) return;
    Scratch scratch(scratch_bytes());
    T* add = scratch.take<T>(kFamilyKeys * kMaxQueries);
    const FamilyScores<T> tile(seq, h, m0, nq, add, nullptr);
    const Queries q = pack(seq, h, m0, nq, tile.bm, scratch);
    each_tile(seq, h, m0, tile, q, [&](int64_t n0, int64_t nk) {
      to_weights(seq, q, nk, nq, tile.bm);
      for (int64_t j = 0; j < nk; ++j) {
        Vec<T> sum{};
        for (int64_t i = 0; i < tile.bm; i += kLanes<T>) sum += load(q.S + j * kMaxQueries + i);
        total[n0 + j] += lane_sum<T>(sum);
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
    const int64_t h = head % p.heads_q, cols = wanted.cols, rows = wanted.rows;
    const Sequence seq(p, ptr, head / p.heads_q);
    T* out = static_cast<T*>(wanted.out) + head * rows * cols;
    const int64_t end = cell_high(r1 - 1, rows, p.seqlen_q);
    for (int64_t m0 = cell_low(r0, rows, p.seqlen_q); m0 < end; m0 += kMaxQueries) {
      const int64_t nq = std::min<int64_t>(kMaxQueries, end - m0);
      Scratch scratch(scratch_bytes() + int64_t(sizeof(T)) * cols * kMaxQueries);
      T *add = scratch.take<T>(kFamilyKeys * kMaxQueries),
        *acc = scratch.take<T>(cols * kMaxQueries);
      std::fill(acc, acc + cols * kMaxQueries, T(0));
      const FamilyScores<T> tile(seq, h, m0, nq, add, nullptr);
      const Queries q = pack(seq, h, m0, nq, tile.bm, scratch);
      each_tile(seq, h, m0, tile, q, [&](int64_t n0, int64_t nk) {
        to_weights(seq, q, nk, nq, tile.bm);
        int64_t c = n0 * cols / p.seqlen_k;  // the first cell of key n0
        for (; c < cols && cell_low(c, cols, p.seqlen_k) < n0 + nk; ++c) {
          const int64_t low = std::max(cell_low(c, cols, p.seqlen_k), n0) - n0;
          const int64_t high = std::min(cell_high(c, cols, p.seqlen_k), n0 + nk) - n0;
          for (int64_t i = 0; i < tile.bm; i += kLanes<T>) {
            Vec<T> sum = load(acc + c * kMaxQueries + i);
            for (int64_t j = low; j < high; ++j) sum += load(q.S + j * kMaxQueries + i);
            store(acc + c * kMaxQueries + i, sum);
          }
        }
      });
      for (int64_t r = r0; r < r1; ++r) {
        const int64_t low = cell_low(r, rows, p.seqlen_q), high = cell_high(r, rows, p.seqlen_q);
        for (int64_t c = 0; c < cols; ++c) {
          const int64_t wide = cell_high(c, cols, p.seqlen_k) - cell_low(c, cols, p.seqlen_k);
          T sum = 0;
          for (int64_t i = std::max(low, m0) - m0; i < std::min(high, m0 + nq) - m0; ++i)
            sum += acc[c * kMaxQueries + i];
          out[r * cols + c] += sum / T((high - low) * wide);
        }
      }
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
