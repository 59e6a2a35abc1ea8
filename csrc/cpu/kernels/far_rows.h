// Rows whose LSE is far from 0, as beside a bias of -1e9 or of the smallest float over a whole row:
// LSE = max + ln(sum) rounds the sum away there, and exp(S - LSE) is a multiple of P.  The kernels
// of gradients and of second derivatives take P = exp(S - base) * inverse for their panels, with
// numbers of the row's own:
//   base = max_j S,  inverse = 1 / sum_j exp(S - base), the sink among them.
// Their scores are computed once more for it where they lie in several blocks of keys.
#pragma once
#include "cpu/kernels/gradient.h"
#include "cpu/kernels/query_gradient.h"
#include "cpu/kernels/scores.h"
#include "cpu/scratch.h"

namespace attn::cpu::ATTN_ISA {

template <class Op>
class FarRows {
  using T = typename Op::Acc;
  static constexpr int L = kLanes<T>;

 public:
  FarRows(const Problem& problem, const Pointers& pointers, const Options& options)
      : p(problem), ptr(pointers), o(options) {}
  void begin(int64_t units) { known = std::vector<std::unique_ptr<T[]>>(units); }

  // Whether a row's LSE is far.  Sigmoid weights have none.
  bool any(const Sequence& seq, const Rows& r) const {
    if (o.sigmoid) return false;
    const T* lse = lse_of(seq, r);
    bool found = false;
    for (int64_t i = 0; i < r.nq; ++i) found |= is_far(lse[i]);
    return found;
  }

  // Whether base and inverse of a panel are known, and both [kPanel] if so.
  bool has(const Rows& r) const { return known[r.unit] != nullptr; }
  void copy(const Rows& r, T* base, T* inverse) const {
    if (!has(r)) return;
    std::copy_n(known[r.unit].get(), kPanel, base);
    std::copy_n(known[r.unit].get() + kPanel, kPanel, inverse);
  }

  // Finds them, for a panel with any() and several blocks of keys.
  ATTN_NOINLINE void find(const Sequence& seq, const Rows& r) {
    if (o.partial) return take(seq, r);
    [[maybe_unused]] typename Op::PerThread held;
    T* base = begin_panel(r);
    T *inverse = base + kPanel, sum[kPanel];
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < kPanel; ++q) sum[q] = base[q] == ninf ? T(0) : T(1);  // the sink's
    each_tile(seq, r, [&](const Panel<T>& panel, const Tile& tile, const T* S) {
      each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
        const Vec<T> before = load(base + v), now = largest(S + v, lo, hi, before);
        const Vec<T> usable = now == ninf ? Vec<T>{} : now;  // -inf - -inf would be NaN
        Vec<T> total = load(sum + v) * vexp(before - usable);
        for (int64_t j = lo; j < hi; ++j) total += vexp(load(S + j * kPanel + v) - usable);
        store(base + v, now), store(sum + v, total);
      });
    });
    for (int64_t q = 0; q < kPanel; ++q) inverse[q] = T(1) / sum[q];
    leave_near_rows(seq, r, base);
  }

  // The same for a panel whose keys lie in one block, with the scores at hand, but for `inverse`:
  // S = scale * S, and `lse` [kPanel] becomes base.
  ATTN_NOINLINE void find_here(const Panel<T>& panel, const Rows& r, const Tile& tile, T scale,
                               T* S, T* lse) {
    T* base = begin_panel(r);
    each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
      scale_scores(S + v, lo, hi, scale);
      store(base + v, largest(S + v, lo, hi, load(base + v)));
    });
    leave_near_rows(panel.seq, r, base);
    std::copy_n(base, kPanel, lse);
  }
  void keep_inverse(const Rows& r, const T* inverse) {
    std::copy_n(inverse, kPanel, known[r.unit].get() + kPanel);
  }

  // exp(sink - LSE) of a row, lane `lane` of a panel.
  double sink_weight(int64_t unit, int64_t lane, double sink, double lse) const {
    const T* own = known[unit].get();
    return own ? std::exp(sink - own[lane]) * own[kPanel + lane] : std::exp(sink - lse);
  }

  // dsink[h] = -sum over rows of exp(sink - LSE) * delta [B, Hq, m_tiles, kPanel], rows in order
  void add_sink(int64_t h, const std::vector<T>& delta) const {
    const double sink = static_cast<const T*>(ptr.sink)[h];
    const int64_t m_tiles = (p.seqlen_q + kPanel - 1) / kPanel;
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence seq(p, ptr, b);
      for (int64_t i = 0; i < seq.seqlen_q; ++i) {
        const double lse = static_cast<const T*>(ptr.lse)[seq.lse_offset(h, i)];
        const int64_t unit = (b * p.heads_q + h) * m_tiles + i / kPanel, lane = i % kPanel;
        if (lse == -std::numeric_limits<double>::infinity()) continue;
        sum -= sink_weight(unit, lane, sink, lse) * double(delta[unit * kPanel + lane]);
      }
    }
    static_cast<T*>(ptr.dsink)[h] = T(sum);
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  const Options& o;
  std::vector<std::unique_ptr<T[]>> known;  // [B, Hq, m_tiles], most of them null

  static bool is_far(T lse) {
    return std::abs(lse) > T(kFarLse) && std::abs(lse) < std::numeric_limits<T>::infinity();
  }
  const T* lse_of(const Sequence& seq, const Rows& r) const {
    return static_cast<const T*>(ptr.lse) + seq.lse_offset(r.h, r.m0);
  }

  // Those of the whole rows, where the keys here are a part.
  void take(const Sequence& seq, const Rows& r) {
    T* base = begin_panel(r);
    const int64_t at = seq.lse_offset(r.h, r.m0);
    for (int64_t q = 0; q < r.nq; ++q) {
      base[q] = static_cast<const T*>(o.base)[at + q];
      base[kPanel + q] = std::exp(-static_cast<const T*>(o.rest)[at + q]);
    }
    leave_near_rows(seq, r, base);
  }

  // base = what there is beside the keys.
  T* begin_panel(const Rows& r) {
    known[r.unit].reset(new T[2 * kPanel]);
    const T none = -std::numeric_limits<T>::infinity();
    std::fill_n(known[r.unit].get(), kPanel,
                ptr.sink ? static_cast<const T*>(ptr.sink)[r.h] : none);
    std::fill_n(known[r.unit].get() + kPanel, kPanel, T(1));
    return known[r.unit].get();
  }

  // Rows whose LSE has all digits keep it; padding lanes and empty rows: P = 0.
  void leave_near_rows(const Sequence& seq, const Rows& r, T* base) const {
    constexpr T inf = std::numeric_limits<T>::infinity();
    const T* lse = lse_of(seq, r);
    for (int64_t q = 0; q < kPanel; ++q)
      if (q >= r.nq || !is_far(lse[q]))
        base[q] = q >= r.nq || lse[q] == -inf ? inf : lse[q], base[kPanel + q] = T(1);
  }

  static Vec<T> largest(const T* S, int64_t lo, int64_t hi, Vec<T> top) {
    for (int64_t j = lo; j < hi; ++j) top = vmax(load(S + j * kPanel), top);
    return top;
  }

  template <class F>
  static void each_vector(const Panel<T>& panel, const Tile& tile, const F& f) {
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L) f(v, tile.lo[g], tile.hi[g]);
  }

  // f(panel, tile, S) for the tiles of keys that the panel sees, S its logits.
  template <class F>
  void each_tile(const Sequence& seq, const Rows& r, const F& f) const {
    const int64_t scores_size = kForwardKeys * kPanel, keep = Panel<T>::keep_size(kForwardKeys),
                  mask = MaskBits<T>::size(kForwardKeys);
    Scratch scratch(Scores<Op>::bytes(p, o, 1) + int64_t(sizeof(T)) * (scores_size + keep + mask));
    Scores<Op> scores(seq, o, r.h, 1, scratch);
    T* S = scratch.take<T>(scores_size);
    const Panel<T> panel(seq, r.h, r.m0, r.nq,
                         {scratch.take<T>(keep), scratch.take<typename IntOf<T>::type>(mask)});
    scores.load_queries(0, r.h, r.m0, r.nq);
    int64_t first, end;
    seq.key_range(r.m0, r.m0 + r.nq, &first, &end);
    for (int64_t n0 = first / kForwardKeys * kForwardKeys; n0 < end; n0 += kForwardKeys) {
      const Tile tile = panel.tile(n0, std::min(kForwardKeys, seq.seqlen_k - n0), Op::kPack);
      if (tile.empty) continue;
      scores.load_keys(tile.n0, tile.nk);
      const T scale = scores.logits(0, panel, tile, panel.segments(tile), S, nullptr);
      each_vector(panel, tile,
                  [&](int64_t v, int64_t lo, int64_t hi) { scale_scores(S + v, lo, hi, scale); });
      f(panel, tile, S);
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
