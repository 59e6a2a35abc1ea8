// The online softmax of a panel of queries (Milakov and Gimelshein, arXiv 1805.02867): from a tile
// of logits to weights exp(s - base), as items of the product with V, and what is known of the
// rows.
#pragma once
#include "cpu/kernels/options.h"
#include "cpu/simd/gemm.h"
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

// A base of this size has digits of a half: what it has lost of a logit is no small number.
template <class T>
constexpr T kCoarse = sizeof(T) == 4 ? T(4194304) : T(2251799813685248);

// a: of the keys of a and of b.
template <class T>
ATTN_NOINLINE void merge(SoftmaxState<T> a, const SoftmaxState<T>& b, int64_t dv) {
  constexpr int L = kLanes<T>;
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
    for (int64_t d = 0; d < dv; ++d) {
      T* at = a.O + d * kPanel + q;
      store(at, weighed<T>(load(at), wa) + weighed<T>(load(b.O + d * kPanel + q), wb));
    }
  }
}

template <class Op>
class Softmax {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  static constexpr int L = kLanes<T>;
  // Weights are rounded to bfloat16 before the product with V; a shorter polynomial is enough.
  static constexpr int kDegree = Op::kPack == 2 ? 3 : 5;

 public:
  Softmax(const Problem& problem, const Pointers& pointers, const Options& o)
      : p(problem),
        ptr(pointers),
        lazy(o.plain() && (o.partial || !ptr.max_logit) && !ptr.entropy) {}

  // True when the bases of earlier tiles may serve the next one.
  bool bases_serve(const SoftmaxState<T>& state, int64_t end) const {
    if (!lazy) return false;
    const Vec<T> ninf = set1(-std::numeric_limits<T>::infinity());
    for (int64_t q = 0; q < end; q += L)
      if (!all_below<T>(ninf, load(state.max + q)) ||
          !all_below<T>(load(state.sum + q), set1(T(kLazySum))))
        return false;
    return true;
  }

  // The tile's weights on the bases that are there.  False, and the state as it was, when they are
  // too large: S is spent then.
  bool on_bases(const Panel<T>& panel, const Tile& tile, T* S, T scale, const T* kept,
                SoftmaxState<T>& state) const {
    T sums[kPanel];
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < std::min((g + 1) * kGrain, panel.lanes); v += L) {
        const Vec<T> base = load(state.max + v);
        const int64_t lo = tile.lo[g], hi = tile.hi[g];
        const T factor = settled(S + v, lo, hi, scale, base);
        const Vec<T> sum = kept ? exponentials<true>(S + v, lo, hi, factor, base, kept + v)
                                : exponentials<false>(S + v, lo, hi, factor, base, kept);
        if (!all_below<T>(sum, set1(T(kLazySum)))) return false;  // also NaN
        store(sums + v, load(state.sum + v) + sum);
      }
    std::copy(sums, sums + panel.lanes, state.sum);
    return true;
  }

  // The tile's weights, on bases that its own maxima raise.
  void on_new_bases(const Panel<T>& panel, const Tile& tile, T* S, T scale, const T* kept,
                    SoftmaxState<T>& state) const {
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < std::min((g + 1) * kGrain, panel.lanes); v += L)
        lanes(S + v, tile.lo[g], tile.hi[g], scale, kept ? kept + v : nullptr, state, v);
  }

 private:
  const Problem& p;
  const Pointers& ptr;

  // The base of the exponentials need not be the largest logit, only near enough: as long as that
  // of of earlier tiles serves, a tile's maxima are not looked for.  Not where they are asked for,
  // and not where scores that must be computed again are dear.
  bool lazy;
  static constexpr double kLazySum = 65536;  // the most that a row's weights may then sum to

  // One vector of queries, keys [lo, hi).  S (at the vector's lane): logits / scale in, weights
  // exp(s - max) out as items of Op; moves the state on to the new maxima.
  void lanes(T* S, int64_t lo, int64_t hi, T scale, const T* kept, SoftmaxState<T>& state,
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
    const bool first = all_equal<T>(before, set1(ninf));  // nothing to rescale: sum and O are 0
    if (lazy && !first) {  // the largest weight so far may be far above 1
      const Vec<T> level = before + vlog(vmax(sum_before, set1(T(1))));
      now = vmax(level, now);
    }
    store(state.max + lane, now);
    Vec<T> base = now == ninf ? Vec<T>{} : now;  // -inf - -inf would be NaN
    // A logit of +inf makes the row NaN; a fused scale * S - inf of a finite S would be -inf.
    base = now == -ninf ? now - now : base;
    const Vec<T> alpha = first ? Vec<T>{} : vexp(before - base);
    scale = settled(S, lo, hi, scale, base);
    if (ptr.entropy)
      weigh(S, lo, hi, scale, before, base, alpha, sum_before, state.weighted + lane);
    Vec<T> sum;
    if (kept)
      sum = exponentials<true>(S, lo, hi, scale, base, kept);
    else
      sum = exponentials<false>(S, lo, hi, scale, base, kept);
    store(state.sum + lane, sum_before * alpha + sum);
    if (!first && !all_equal<T>(alpha, set1(T(1))))
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        T* at = state.O + d * kPanel + lane;
        store(at, weighed<T>(load(at), alpha));
      }
  }

  // The factor with which S gives the logits from here on: `scale`, or 1 where bases are so large
  // that S is multiplied by it in memory first (see scale_scores).
  static T settled(T* S, int64_t lo, int64_t hi, T scale, Vec<T> base) {
    const Vec<T> size = base < T(0) ? -base : base;
    const Mask<T> number = size < std::numeric_limits<T>::infinity();
    if (scale == T(1) || all_below<T>(number ? size : Vec<T>{}, set1(kCoarse<T>))) return scale;
    scale_scores(S, lo, hi, scale);
    return 1;
  }

  // S = exp(scale * S - base), times the dropout multipliers; returns the sum without them.
  template <bool kDropout>
  static Vec<T> exponentials(T* S, int64_t lo, int64_t hi, T scale, Vec<T> base, const T* kept) {
    // In units of ln 2 from the start is one operation less, and near enough for bfloat16, but not
    // far from 0.
    const Vec<T> size = base < T(0) ? -base : base;
    if (Op::kPack == 2 && scale < T(1e38) && all_below<T>(size, set1(kCoarse<T>)))
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
};

}  // namespace attn::cpu::ATTN_ISA
