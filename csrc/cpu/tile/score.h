// From products to logits, one tile S^T [keys][kPanel queries] at a time: the formula of logit.h,
// and -inf where (i, j) is excluded. Queries lie in lanes: lane q of a panel is query m0 + q.  Also
// the dropout multipliers.
#pragma once
#include "cpu/simd/prefetch.h"
#include "cpu/simd/transpose.h"
#include "cpu/tile/dropout.h"
#include "cpu/tile/mask.h"
#include "cpu/tile/rows.h"
#include "logit.h"

namespace attn::cpu::ATTN_ISA {

// logit.h on vectors of T, in natural logarithms.
template <class T>
struct VectorWays {
  static ATTN_INLINE Vec<T> tanh(Vec<T> x) { return vtanh(x); }
  static ATTN_INLINE Vec<T> magnitude(Vec<T> x) { return x < T(0) ? -x : x; }
  static ATTN_INLINE Vec<T> over_cap(Vec<T> x, const Terms<T>& terms) {
    return x * terms.inverse_cap;
  }
  static ATTN_INLINE Vec<T> in_units(Vec<T> bias) { return bias; }
  static ATTN_INLINE T excluded() { return -std::numeric_limits<T>::infinity(); }
};

struct Keys {
  int64_t lo, hi;  // relative to the tile's first
  // f(lo, hi) for what these keys leave of others.
  template <class F>
  void rest(Keys of, const F& f) const {
    if (lo >= hi) return f(of.lo, of.hi);
    if (of.lo < lo) f(of.lo, std::min(of.hi, lo));
    if (of.hi > hi) f(std::max(of.lo, hi), of.hi);
  }
};

struct Segment {
  int64_t lo, hi;      // keys, relative to the tile's first
  int64_t begin, end;  // lanes, multiples of kGrain but for the last
  bool covers(int64_t columns) const { return begin == 0 && end == columns; }
};

// One vector of queries: S = scale * S for keys [lo, hi).  Where logits are far from 0, the digits
// that a fused scale * S - base has beyond those of the base are large numbers.
template <class T>
ATTN_NOINLINE void scale_scores(T* S, int64_t lo, int64_t hi, T scale) {
  for (int64_t j = lo; j < hi; ++j) store(S + j * kPanel, load(S + j * kPanel) * scale);
}

// The rectangles of a tile, in ascending order of keys.
struct Segments {
  Segment at[2 * kGrains + 1];
  int count = 0;
  const Segment* begin() const { return at; }
  const Segment* end() const { return at + count; }
};

template <class T>
struct PanelScratch {
  T* keep;                        // [Panel::keep_size(BLOCK_N)]
  typename IntOf<T>::type* mask;  // [MaskBits::size(BLOCK_N)]
};

template <class T>
class Panel {
 public:
  const Sequence& seq;
  int64_t h, m0, nq;  // query head, first query, queries
  int64_t cycle;      // of rows of several heads: how many each has; else 0
  int64_t grains, columns;
  int64_t lanes;  // that hold queries, in whole vectors

  // rows_of_head: where not 0, the panel's rows are the queries of heads that share it, one head
  // after the other, so many each; `first` counts them from the first head's.
  ATTN_NOINLINE Panel(const Sequence& s, int64_t head, int64_t first, int64_t queries,
                      PanelScratch<T> scratch, int64_t rows_of_head = 0)
      : seq(s),
        h(head),
        m0(first),
        nq(queries),
        cycle(rows_of_head),
        keep_scratch(scratch.keep),
        mask(scratch.mask),
        terms(Terms<T>::of(*s.p, *s.ptr, 1)) {
    grains = (nq + kGrain - 1) / kGrain;
    columns = grains * kGrain;
    lanes = (nq + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    for (int64_t g = 0; g < grains; ++g)
      seq.key_range(first_query(g), last_query(g) + 1, &lo_[g], &hi_[g]);
    if (seq.p->dropout_p > 0) philox = philox_key(seq.ptr->rng_state[0], seq.ptr->rng_state[1]);
  }

  // `pack` keys share an item of a product, so grains begin and end at multiples of it.  Keys that
  // no query of the panel sees are left out.
  ATTN_NOINLINE Tile tile(int64_t n0, int64_t nk, int64_t pack) const {
    Tile t{n0, nk, {}, {}, true, false};
    t.banded = !seq.band_full(first_query(0), last_query(grains - 1) + 1, n0, n0 + nk);
    for (int64_t g = 0; g < grains; ++g) {
      t.lo[g] = std::clamp<int64_t>(lo_[g] - n0, 0, nk) / pack * pack;
      t.hi[g] = std::min((std::clamp<int64_t>(hi_[g] - n0, 0, nk) + pack - 1) / pack * pack, nk);
      if (t.hi[g] <= t.lo[g]) t.lo[g] = t.hi[g] = t.hi[g] == 0 ? 0 : t.lo[g];
      t.empty &= t.hi[g] == t.lo[g];
    }
    if (seq.ptr->mask && !t.empty) mask.read(seq, h, m0, nq, cycle, grains, pack, &t);
    if (seq.ptr->bias && !t.empty && bias_excludes(t)) t.narrow(t.lo[0], t.lo[0], grains);
    return t;
  }

  // The tile as rectangles.  Bounds ascend with the grain, so the grains that need a key are
  // neighbours.  lanes: how many are needed.
  Segments segments(const Tile& t) const { return segments(t, columns); }
  Segments segments(const Tile& t, int64_t lanes) const {
    Segments all;
    for (int64_t key = t.lo[0]; key < t.nk;) {
      int64_t begin = 0, end = grains, next = t.nk;
      while (begin < grains && t.hi[begin] <= key) ++begin;
      while (end > begin && t.lo[end - 1] > key) --end;
      for (int64_t g = 0; g < grains; ++g) {
        if (t.lo[g] > key) next = std::min(next, t.lo[g]);
        if (t.hi[g] > key) next = std::min(next, t.hi[g]);
      }
      if (begin < end && t.hi[begin] > key)
        all.at[all.count++] = {key, next, begin * kGrain, std::min(end * kGrain, lanes)};
      key = next;
    }
    return all;
  }

  // True when some computed pair of the tile may be excluded.
  bool partial(const Tile& t) const { return seq.ptr->mask || seq.ptr->bias || t.banded; }

  // Brings a mask or bias of these queries and keys closer, while products are computed.
  void prefetch_mask(int64_t first, int64_t queries, int64_t key, int64_t keys) const {
    prefetch_pairs(seq.ptr->mask, 1, seq.p->mask, first, queries, key, keys);
  }
  void prefetch_bias(const Tile& t) const {
    const int64_t lo = t.lo[0], hi = t.hi[grains - 1];
    prefetch_pairs(seq.ptr->bias, int64_t(dtype_size(seq.p->bias_dtype)), seq.p->bias, m0, nq,
                   t.n0 + lo, hi - lo);
  }

  // S: products in; logits = factor * S out, with the factor that is returned.  dcap (or null)
  // receives d softcap(s) / ds.
  ATTN_NOINLINE double logits(const Tile& t, T* S, T* dcap) const {
    const bool scaled_later = terms.plain();
    if (!scaled_later) compute(t, S, dcap);
    apply_band(t, S);
    if (seq.ptr->mask) mask.apply(t, grains, S);
    return scaled_later ? seq.p->scale : 1;
  }

  // X = factor * X + bias, for an X that is -inf nowhere.
  ATTN_NOINLINE void add_bias(const Tile& t, T factor, T* X) const {
    constexpr int L = kLanes<T>, N = 2 * L;
    T bias[N][L];  // [key][query]
    for (int64_t g = 0; g < grains; ++g)
      for (int64_t j0 = t.lo[g] / N * N; j0 < t.hi[g]; j0 += N)
        for (int64_t q = g * kGrain; q < (g + 1) * kGrain; q += L) {
          load_bias(q, t.n0 + j0, std::min<int64_t>(N, t.nk - j0), bias);
          for (int64_t j = std::max(t.lo[g], j0); j < std::min<int64_t>(t.hi[g], j0 + N); ++j) {
            T* at = X + j * kPanel + q;
            store(at, load(at) * factor + load(bias[j - j0]));
          }
        }
  }

  // Numbers that keep() needs for tiles of n keys.
  static constexpr int64_t keep_size(int64_t n) { return (n + 8) * kPanel; }

  // True when only the band stands between products and weights.
  bool plain() const { return terms.plain() && !seq.ptr->mask && seq.p->dropout_p <= 0; }

  // The tile's keys that every query of the panel sees as far as the band goes, from an even one.
  Keys seen_by_all(const Tile& t, int64_t pack) const {
    Keys all = seen_by_grain(t, 0);
    for (int64_t g = 1; g < grains; ++g) {
      const Keys keys = seen_by_grain(t, g);
      all = {std::max(all.lo, keys.lo), std::min(all.hi, keys.hi)};
    }
    all.lo = (all.lo + pack - 1) / pack * pack;
    if (all.hi < t.nk) all.hi = all.hi / pack * pack;
    return all;
  }

  // [j][q] = 1 / (1 - p) where (i, j) survives dropout, else 0.  n0 is a multiple of 4; the first
  // key's position need not be, and blocks of four keys may begin before a tile and end after it.
  ATTN_NOINLINE const T* keep(const Tile& t) const {
    const double p = seq.p->dropout_p;
    const uint64_t threshold = dropout_threshold(p);
    const T kept = p < 1 ? T(1 / (1 - p)) : T(0);
    const Frame at = seq.frame ? *seq.frame : Frame{int32_t(seq.b), 0, 0, 0, 0, 0};
    const int64_t i0 = at.q_first + m0, j0 = at.k_first + t.n0, before = j0 & 3;
    T* const begin = keep_scratch + before * kPanel;
    for (int64_t g = 0; g < grains; ++g)
      for (int64_t j = (t.lo[g] + before) / 4 * 4 - before; j < t.hi[g]; j += 4)
        philox_lanes<T>(philox, uint32_t((j0 + j) >> 2), uint32_t(i0 + g * kGrain),
                        uint32_t(at.first_h + h), uint32_t(at.first_b), threshold, kept,
                        begin + j * kPanel + g * kGrain);
    return begin;
  }

 private:
  T* keep_scratch;
  MaskBits<T> mask;
  const Terms<T> terms;
  PhiloxKey philox{};
  int64_t lo_[kGrains], hi_[kGrains];

  // Of a grain; with rows of several heads each grain counts as having all of their queries.
  int64_t first_query(int64_t g) const { return cycle ? 0 : m0 + g * kGrain; }
  int64_t last_query(int64_t g) const {
    return cycle ? cycle - 1 : m0 + std::min((g + 1) * kGrain, nq) - 1;
  }

  // The queries of lanes q ... q + L - 1, counted from query 0 with rows of several heads, else
  // from m0.
  Vec<T> queries(int64_t q) const {
    constexpr int L = kLanes<T>;
    if (!cycle) return iota<T>() + T(q);
    T at[L];
    for (int64_t lane = 0; lane < L; ++lane) at[lane] = T((m0 + q + lane) % cycle);
    return load(at);
  }

  template <class S>
  void prefetch_pairs(const void* base, int64_t size, const S& s, int64_t first, int64_t queries,
                      int64_t key, int64_t keys) const {
    if (!base || s.q == 0 || s.k != 1 || cycle) return;
    const int64_t at = seq.b * s.b + h * s.h + first * s.q + key;
    prefetch_rows(static_cast<const char*>(base) + at * size,
                  std::min(queries, seq.seqlen_q - first), s.q * size,
                  std::min(keys, seq.seqlen_k - key) * size);
  }

  // True when the bias is -inf for all pairs of the tile.
  bool bias_excludes(const Tile& t) const {
    switch (seq.p->bias_dtype) {
      case DType::kFloat64:
        return bias_equals(t, 0xfff0000000000000u);
      case DType::kFloat32:
        return bias_equals(t, 0xff800000u);
      case DType::kBFloat16:
        return bias_equals(t, uint16_t(0xff80));
      default:
        return bias_equals(t, uint16_t(0xfc00));
    }
  }
  template <class Bits>
  bool bias_equals(const Tile& t, Bits bits) const {
    const auto& s = seq.p->bias;
    const Bits* from = static_cast<const Bits*>(seq.ptr->bias) + seq.b * s.b + h * s.h + m0 * s.q +
                       (t.n0 + t.lo[0]) * s.k;
    const int64_t n = s.k == 0 ? 1 : t.hi[grains - 1] - t.lo[0], rows = s.q == 0 ? 1 : nq;
    for (int64_t q = 0; q < rows; ++q, from += s.q) {
      if (from[0] != bits || from[(n - 1) * s.k] != bits) return false;  // where most tiles end
      Bits other = 0;
      if (s.k == 1)
        for (int64_t j = 0; j < n; ++j) other |= from[j] ^ bits;
      else
        for (int64_t j = 0; j < n; ++j) other |= from[j * s.k] ^ bits;
      if (other) return false;
    }
    return true;
  }

  // The tile's keys that every query of a grain sees, as far as the band goes.
  Keys seen_by_grain(const Tile& t, int64_t g) const {
    const int64_t d = seq.diagonal(), first = first_query(g), last = last_query(g);
    const int64_t lo = seq.p->window_left == kUnbounded
                           ? t.lo[g]
                           : std::clamp(last + d - seq.p->window_left - t.n0, t.lo[g], t.hi[g]);
    const int64_t hi = seq.p->window_right == kUnbounded
                           ? t.hi[g]
                           : std::clamp(first + d + seq.p->window_right + 1 - t.n0, lo, t.hi[g]);
    return {lo, hi};
  }

  // S = -inf outside of the band; nothing else is touched.
  void apply_band(const Tile& t, T* S) const {
    if (!t.banded) return;
    for (int64_t g = 0; g < grains; ++g)
      seen_by_grain(t, g).rest({t.lo[g], t.hi[g]},
                               [&](int64_t lo, int64_t hi) { band_rows(t.n0, lo, hi, g, S); });
  }

  // What stays beyond all lanes, however many keys of a tile it moves by.
  static constexpr int64_t kFarLane = 4096;
  static_assert(kFarLane > std::max(kForwardKeys, kBackwardKeys[0]) + kPanel);

  // Keys [lo, hi) of a grain.
  ATTN_NOINLINE void band_rows(int64_t n0, int64_t lo, int64_t hi, int64_t g, T* S) const {
    const Vec<T> ninf = set1(-std::numeric_limits<T>::infinity());
    // The lane (or the query) on the diagonal of key lo; each key's is one further.
    const int64_t aligned = n0 + lo - seq.diagonal() - (cycle ? 0 : m0);
    auto clamp = [](int64_t x) { return T(std::clamp<int64_t>(x, -kFarLane, kFarLane)); };
    const bool left = seq.p->window_left != kUnbounded, right = seq.p->window_right != kUnbounded;
    const T begin = right ? clamp(aligned - seq.p->window_right) : T(-kFarLane);
    const T end = left ? clamp(aligned + seq.p->window_left) : T(kFarLane);
    for (int64_t q = g * kGrain; q < (g + 1) * kGrain; q += kLanes<T>) {
      const Vec<T> lane = queries(q);
      Vec<T> first = set1(begin), last = set1(end);
      for (int64_t j = lo; j < hi; ++j, first += T(1), last += T(1)) {
        T* at = S + j * kPanel + q;
        const Vec<T> s = lane < first ? ninf : load(at);
        store(at, lane > last ? ninf : s);
      }
    }
  }

  void compute(const Tile& t, T* S, T* dcap) const {
    with_exactly(terms.has, [&](auto has) { compute_some(has, t, S, dcap); });
  }

  template <class Flags>
  void compute_some(Flags has, const Tile& t, T* S, T* dcap) const {
    constexpr int L = kLanes<T>, N = 2 * L;
    const HeadTerms<T> head = HeadTerms<T>::of(*seq.ptr, seq, h, 1);
    const int64_t corner = m0 + seq.past - t.n0;
    T bias[N][L];  // [key][query]
    for (int64_t g = 0; g < grains; ++g)
      for (int64_t j0 = t.lo[g] / N * N; j0 < t.hi[g]; j0 += N)
        for (int64_t q = g * kGrain; q < (g + 1) * kGrain; q += L) {
          const int64_t begin = std::max(t.lo[g], j0), end = std::min<int64_t>(t.hi[g], j0 + N);
          if constexpr (Flags::bias) load_bias(q, t.n0 + j0, std::min<int64_t>(N, t.nk - j0), bias);
          const Vec<T> position = iota<T>() + T(q + corner);
          for (int64_t j = begin; j < end; ++j) {
            T* at = S + j * kPanel + q;
            const auto capped = [&](Vec<T> slope) {
              if (dcap) store(dcap + j * kPanel + q, slope);
            };
            store(at, logit<VectorWays<T>>(
                          has, terms, head, load(at), [&] { return position - T(j); },
                          [&] { return load(bias[j - j0]); }, capped));
          }
        }
  }

  using BiasBlock = T[2 * kLanes<T>][kLanes<T>];  // [key][query]

  // bias[c][r] = that of lane q + r and key + c, c < n.
  ATTN_NOINLINE void load_bias(int64_t q, int64_t key, int64_t n, BiasBlock& bias) const {
    const Problem& p = *seq.p;
    constexpr int L = kLanes<T>;
    if (p.bias.q == 0) return repeat_bias_row(q, key, n, bias);
    // The rows begin in as many pages: all at once.
    const bool rows_lie = p.bias.k == 1 && q + L <= nq;
    const int64_t size = int64_t(dtype_size(p.bias_dtype)), step = p.bias.q * size;
    const char* from = static_cast<const char*>(seq.ptr->bias) +
                       (seq.b * p.bias.b + h * p.bias.h + (m0 + q) * p.bias.q + key) * size;
    if constexpr (sizeof(T) == 4)
      if (rows_lie && n == 2 * L && p.bias_dtype == DType::kBFloat16)
        return load_bias_pairs(from, step, bias);
    for (int64_t c = 0; c < n; c += L) {
      Vec<T> block[L];
      if (rows_lie && n - c >= L)
        load_bias_rows(from + c * size, step, block);
      else
        for (int r = 0; r < L; ++r)
          block[r] = bias_row(q + r, key + c, std::min<int64_t>(L, n - c));
      transpose_round<T, 1>(block);
      for (int i = 0; i < L; ++i) store(bias[c + i], block[i]);
    }
  }

  // One row for all queries.
  ATTN_INLINE void repeat_bias_row(int64_t q, int64_t key, int64_t n, BiasBlock& bias) const {
    constexpr int L = kLanes<T>;
    for (int64_t c = 0; c < n; c += L) {
      T row[L];
      store(row, bias_row(q, key + c, std::min<int64_t>(L, n - c)));
      for (int64_t i = 0; i < std::min<int64_t>(L, n - c); ++i) store(bias[c + i], set1(row[i]));
    }
  }

  // 2 L keys of L rows of bfloat16, `step` bytes apart: neighbouring keys stay together as a pair.
  static ATTN_INLINE void load_bias_pairs(const char* from, int64_t step, BiasBlock& bias) {
    constexpr int L = kLanes<T>;
    Vec<T> pairs[L];
#pragma GCC unroll 16
    for (int r = 0; r < L; ++r) pairs[r] = load(reinterpret_cast<const T*>(from + r * step));
    transpose_round<T, 1>(pairs);
#pragma GCC unroll 16
    for (int c = 0; c < L; ++c) {
      const Mask<T> x = (Mask<T>)pairs[c];
      store(bias[2 * c], (Vec<T>)(x << 16));
      store(bias[2 * c + 1], (Vec<T>)(x & typename IntOf<T>::type(0xffff0000u)));
    }
  }

  // L keys of L rows, `step` bytes apart.
  ATTN_INLINE void load_bias_rows(const char* from, int64_t step,
                                  Vec<T> (&block)[kLanes<T>]) const {
    constexpr int L = kLanes<T>;
    const DType type = seq.p->bias_dtype;
    auto rows = [&](auto load_one_row) {
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) block[r] = load_one_row(from + r * step);
    };
    if (type == DType::kBFloat16)
      rows([](const char* at) { return load_bf16<T>(at); });
    else if (dtype_size(type) == sizeof(T))
      rows([](const char* at) { return load(reinterpret_cast<const T*>(at)); });
    else
      rows([&](const char* at) {
        T row[L] = {};
        convert_row<T>(type, at, L, row);
        return load(row);
      });
  }

  ATTN_NOINLINE Vec<T> bias_row(int64_t q, int64_t key, int64_t n) const {
    const Problem& p = *seq.p;
    constexpr int L = kLanes<T>;
    const int64_t i = m0 + std::min(q, nq - 1);
    const int64_t at = seq.b * p.bias.b + h * p.bias.h + i * p.bias.q + key * p.bias.k;
    T row[L];
    store(row, Vec<T>{});
    if (p.bias.k == 1)
      convert_row<T>(
          p.bias_dtype,
          static_cast<const char*>(seq.ptr->bias) + at * int64_t(dtype_size(p.bias_dtype)), n, row);
    else
      for (int64_t c = 0; c < n; ++c)
        row[c] = load_one<T>(p.bias_dtype, seq.ptr->bias, at + c * p.bias.k);
    return load(row);
  }
};

}  // namespace attn::cpu::ATTN_ISA
