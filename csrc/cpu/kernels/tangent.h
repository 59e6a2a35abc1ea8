// O' and L' (of LSE), the tangents of attention, in one pass over the keys:
//   L' = sum P t' + P_sink sink',   O' = sum P M ((t' - L') V + V')
// with t' as tangent_tile.h says and M dropout's factor.  One task = a panel of queries of one
// head. O and LSE are given: LSE is the base of the exponentials, whose sum is taken again, so that
// its rounding does not show; far from 0 their base is the largest logit (far_rows.h).  t' is taken
// relative to its mean over the first keys that a row sees: a part that the tangents of all keys
// have in common costs no digits.
#pragma once
#include "cpu/kernels/far_rows.h"
#include "cpu/kernels/tangent_tile.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace attn::cpu::ATTN_ISA {

template <class T>
class Tangent {
  using Op = Plain<T>;
  static constexpr int L = kLanes<T>;

 public:
  Tangent(const Dual& dual, int threads)
      : x(dual), p(dual.p), ptr(dual.ptr), threads(threads), far(p, ptr, options) {
    m_tiles = (p.seqlen_q + kPanel - 1) / kPanel;
    products = x.tptr.q || x.tptr.k;
    moving = products || x.tptr.bias || x.tptr.sink;
  }

  // False, and nothing done, where some input is not finite.
  bool run() {
    if (!inputs_finite(x, threads)) return false;
    const int64_t tasks = p.batch * p.heads_q * m_tiles;
    far.begin(tasks);
    // Causal panels see more keys the later they are: the last ones first.
    parallel_for(tasks, threads, [&](int64_t task) { panel(tasks - 1 - task); });
    return true;
  }

 private:
  const Dual& x;
  const Problem& p;
  const Pointers& ptr;
  int threads;
  int64_t m_tiles;
  const Options options{};  // softmax of dot products
  FarRows<Op> far;
  bool products, moving;  // some t' may be other than bias'; than 0

  static int64_t round_up(int64_t n) { return (n + L - 1) / L * L; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  // What a task keeps while it walks over its tiles of keys.
  struct Work : TangentTile<T> {
    Work(const Sequence& s, const Sequence& t, const Sink<T>& k, int64_t head)
        : seq(s), tseq(t), sink(k), h(head) {}
    const Sequence &seq, &tseq;
    const Sink<T> sink;
    const int64_t h;
    int64_t hk{}, m0{}, nq{};
    T *Qt{}, *tQt{};              // [D][kPanel]
    T *K{}, *V{};                 // scratch of a tile's K or K', and V or V'
    T* W{};                       // [Dv][kPanel] sum P M ((t' - mean) V + V')
    T *sum{}, *moved{}, *mean{};  // [kPanel] sum P, sum P (t' - mean)
    T* block{};                   // kLanes rows
    PanelScratch<T> side{};
    bool begun = false;   // W holds something
    bool is_far = false;  // some rows' base is other than LSE
  };

  int64_t scratch_bytes() const {
    const int64_t d = round_up(p.head_dim), dv = round_up(p.head_dim_v), most = std::max(d, dv);
    return int64_t(sizeof(T)) * ((most + d + dv + 4) * kPanel + L * most + kForwardKeys * (d + dv) +
                                 4 * kForwardKeys * kPanel + Panel<T>::keep_size(kForwardKeys) +
                                 MaskBits<T>::size(kForwardKeys));
  }

  void panel(int64_t task) {
    const int64_t b = task / m_tiles / p.heads_q, h = task / m_tiles % p.heads_q;
    const Sequence seq(p, ptr, b), tseq(x.tp, x.tptr, b);
    Work w(seq, tseq, Sink<T>(x, h), h);
    w.hk = h / (p.heads_q / p.heads_k);
    w.m0 = task % m_tiles * kPanel, w.nq = std::min(kPanel, seq.seqlen_q - w.m0);
    if (w.nq <= 0) return;
    Scratch scratch(scratch_bytes());
    begin(w, scratch);
    const Rows rows{h, w.m0, w.nq, task, 0, 0};
    w.is_far = far.any(seq, rows);
    if (w.is_far) {
      T inverse[kPanel];
      far.find(seq, rows);
      far.copy(rows, w.lse, inverse);
    }
    int64_t lo, hi;
    seq.key_range(w.m0, w.m0 + w.nq, &lo, &hi);
    for (int64_t n0 = lo / kForwardKeys * kForwardKeys; n0 < hi; n0 += kForwardKeys)
      add_tile(w, n0, std::min(kForwardKeys, hi - n0));
    finish(w);
  }

  void begin(Work& w, Scratch& scratch) const {
    const int64_t d = p.head_dim, dv = p.head_dim_v, most = round_up(std::max(d, dv));
    auto tile_of = [&] { return scratch.take<T>(kForwardKeys * kPanel); };
    w.Qt = scratch.take<T>(most * kPanel), w.tQt = scratch.take<T>(round_up(d) * kPanel);
    w.K = scratch.take<T>(kForwardKeys * d), w.V = scratch.take<T>(kForwardKeys * dv);
    w.W = scratch.take<T>(round_up(dv) * kPanel);
    w.sum = scratch.take<T>(kPanel), w.moved = scratch.take<T>(kPanel);
    w.mean = scratch.take<T>(kPanel), w.lse = scratch.take<T>(kPanel);
    w.block = scratch.take<T>(L * most);
    w.S = tile_of(), w.tS = tile_of();
    w.side = {scratch.take<T>(Panel<T>::keep_size(kForwardKeys)),
              scratch.take<typename IntOf<T>::type>(MaskBits<T>::size(kForwardKeys))};
    if (p.softcap > 0) w.slope = tile_of(), w.bend = tile_of();
    for (T* row : {w.sum, w.moved, w.mean}) std::fill(row, row + kPanel, T(0));
    pack(w, ptr.q, p.q, d, w.Qt);
    pack(w, x.tptr.q, x.tp.q, d, w.tQt);
    load_lse(static_cast<const T*>(ptr.lse) + w.seq.lse_offset(w.h, w.m0), w.nq, w.lse);
  }

  // The panel's rows of a tensor, transposed: [dim][kPanel].
  void pack(const Work& w, const void* base, const Strides& s, int64_t dim, T* out) const {
    if (!base) return;
    pack_transposed<Op>(p.dtype, w.seq.q_row(base, s, w.h, w.m0), s.s * bytes(), w.nq,
                        (w.nq + kGrain - 1) / kGrain * kGrain, dim, w.block, out);
  }

  Operand keys(const Work& w, const void* base, const Strides& s, int64_t n0, int64_t nk,
               int64_t dim, T* copy) const {
    return rows_by_depth<Op>(w.seq, base, s, w.hk, n0, nk, dim, copy);
  }

  void add_tile(Work& w, int64_t n0, int64_t nk) const {
    const Panel<T> panel(w.seq, w.h, w.m0, w.nq, w.side), moved(w.tseq, w.h, w.m0, w.nq, w.side);
    const Tile tile = panel.tile(n0, nk, 1);
    if (tile.empty) return;
    const Segments segments = panel.segments(tile);
    // S^T = K Q^T,  S'^T = K Q'^T + K' Q^T   [nk, columns]
    const Operand K = keys(w, ptr.k, p.k, n0, nk, p.head_dim, w.K);
    multiply_tile(segments, K, w.Qt, p.head_dim, w.S, false);
    if (x.tptr.q) multiply_tile(segments, K, w.tQt, p.head_dim, w.tS, false);
    if (x.tptr.k)
      multiply_tile(segments, keys(w, x.tptr.k, x.tp.k, n0, nk, p.head_dim, w.K), w.Qt, p.head_dim,
                    w.tS, x.tptr.q != nullptr);
    if (!products) clear_tile(segments, w.tS);
    auto factors = w.logits(panel, moved, tile);
    if (w.is_far) {  // scale * S - base in one operation has digits that the base has not
      const T scale = factors.logit;
      factors.logit = T(1);
      TangentTile<T>::each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
        scale_scores(w.S + v, lo, hi, scale);
      });
    }
    const T* kept = p.dropout_p > 0 ? panel.keep(tile) : nullptr;
    TangentTile<T>::each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
      weigh(w, v, lo, hi, factors);
      centre(w, v, lo, hi, factors.tangent, kept);
    });
    // W^T += V^T (P M (t' - mean))^T + V'^T (P M)^T   [dv, columns]
    auto add = [&](const void* base, const Strides& s, const T* weights) {
      sum_over_keys(segments, panel.columns, keys(w, base, s, n0, nk, p.head_dim_v, w.V),
                    p.head_dim_v, weights, w.W, w.begun);
      w.begun = true;
    };
    if (moving) add(ptr.v, p.v, w.tS);
    if (x.tptr.v) add(x.tptr.v, x.tp.v, w.S);
  }

  // One vector of queries, keys [lo, hi).  S: logits in, P out.  Where they are the first keys of a
  // row, `mean` becomes that of t' over them and the sink.
  void weigh(Work& w, int64_t v, int64_t lo, int64_t hi, typename Work::Factors factors) const {
    Vec<T> sum[2] = {}, moved[2] = {};
    int64_t j = lo;
    auto keys = [&](auto count) {
      constexpr int N = count.value;
      for (; j + N <= hi; j += N) {
        const int64_t at = j * kPanel + v;
        Vec<T> P[N];
        w.template weights<Weights::kSoftmax>(j, v, factors.logit, P);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          sum[i % 2] += P[i];
          const Vec<T> t = load(w.tS + at + i * kPanel);
          moved[i % 2] += P[i] == T(0) ? Vec<T>{} : P[i] * t;  // an excluded K may be far away
          store(w.S + at + i * kPanel, P[i]);
        }
      }
    };
    keys(std::integral_constant<int, kAbreast>{});
    keys(std::integral_constant<int, 1>{});
    const Vec<T> before = load(w.sum + v), found = sum[0] + sum[1];
    const Vec<T> of_sink = w.sink.weight(load(w.lse + v));
    const Vec<T> total = found + of_sink;
    const Vec<T> mean =
        ((moved[0] + moved[1]) * factors.tangent + of_sink * w.sink.tangent) / total;
    const Mask<T> first = (before == T(0)) & (found != T(0));  // NaN: also, and stays
    store(w.mean + v, first ? mean : load(w.mean + v));
    store(w.sum + v, before + found);
  }

  // tS: t' in, P M (t' - mean) out; S: P in, P M out.
  void centre(Work& w, int64_t v, int64_t lo, int64_t hi, T factor, const T* kept) const {
    const Vec<T> mean = load(w.mean + v);
    Vec<T> moved[2] = {};
    for (int64_t j = lo; j < hi; ++j) {
      const int64_t at = j * kPanel + v;
      Vec<T> P = load(w.S + at), t = load(w.tS + at) * factor - mean;
      t = P == T(0) ? Vec<T>{} : P * t;
      moved[j % 2] += t;
      if (kept) {
        t *= load(kept + at);
        store(w.S + at, P * load(kept + at));
      }
      store(w.tS + at, t);
    }
    store(w.moved + v, load(w.moved + v) + moved[0] + moved[1]);
  }

  // L' = mean + (sum P (t' - mean) + P_sink (sink' - mean)) / sum P,  O' = W / sum P - (L' - mean)
  // O
  void finish(Work& w) const {
    const int64_t dv = p.head_dim_v;
    if (!w.begun) std::fill(w.W, w.W + dv * kPanel, T(0));
    T* Ot = w.Qt;  // [Dv][kPanel]
    pack(w, ptr.o, p.o, dv, Ot);
    T* tlse = static_cast<T*>(x.tptr.lse) + w.seq.lse_offset(w.h, w.m0);
    char* out = static_cast<char*>(x.tptr.o) + w.seq.q_offset(x.tp.o, w.h, w.m0) * bytes();
    for (int64_t v = 0; v < w.nq; v += L) {
      const Vec<T> of_sink = w.sink.weight(load(w.lse + v)), mean = load(w.mean + v);
      const Vec<T> total = load(w.sum + v) + of_sink;
      const Vec<T> inverse = T(1) / (total == T(0) ? set1(T(1)) : total);
      const Vec<T> rest = (load(w.moved + v) + of_sink * (w.sink.tangent - mean)) * inverse;
      for (int64_t at = v; at < dv * kPanel; at += kPanel)
        store(w.W + at, load(w.W + at) * inverse - rest * load(Ot + at));
      const Vec<T> found = mean + rest;
      const int64_t n = std::min<int64_t>(L, w.nq - v);
      for (int64_t i = 0; i < n; ++i) tlse[v + i] = found[i];
      store_transposed<T>(p.dtype, w.W + v, set1(T(1)), n, dv, w.block,
                          out + v * x.tp.o.s * bytes(), x.tp.o.s * bytes());
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
