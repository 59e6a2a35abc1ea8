// From products to gradients of logits and their tangents, one panel of queries against one block
// of keys.  With ' the tangent, M dropout's factor, G = dO, lam = dLSE, c = t' - L' and D = G.O -
// lam = sum P M dP - lam:
//   dT = P (M dP - D)            dT' = P [c (M dP - D) + M dP' - D']
//   dZ = (ds/dz) dT              dZ' = (ds/dz) dT' + (d2s/dz2) z' dT
#pragma once
#include "cpu/kernels/tangent_tile.h"

namespace attn::cpu::ATTN_ISA {

template <class T>
struct GradientTangent : TangentTile<T> {
  using Base = TangentTile<T>;
  using typename Base::Factors;
  using GradientTile<Plain<T>>::S;
  using GradientTile<Plain<T>>::dP;
  using GradientTile<Plain<T>>::lse;
  using GradientTile<Plain<T>>::inverse;
  using Base::bend;
  using Base::slope;
  using Base::tS;
  static constexpr int L = kLanes<T>;
  T* tdP{};                        // [BLOCK_N][kPanel]: G V'^T + G' V^T
  T* rest{};                       // [kPanel]: of exact_rows
  T *delta{}, *tdelta{}, *tlse{};  // D, D' and L' of the panel's rows [kPanel]

  // What a panel's rows have beside their products.
  struct RowInputs {
    const T *kept, *dlse, *tdlse;  // null: 1, 0, 0
    Sink<T> sink;
    Vec<T> at(const T* x, int64_t v, int64_t nq) const {
      Vec<T> found{};
      for (int64_t i = 0; x && i < L && v + i < nq; ++i) found[i] = x[v + i];
      return found;
    }
  };

  // L', D and D' where one block holds all keys of the rows, as sums over them: LSE, O and O' have
  // been rounded.  S: sum-normalised by `inverse` afterwards; tS: t' without its mean, of which
  // `rest` is what rounding left.
  void exact_rows(int64_t v, int64_t lo, int64_t hi, int64_t nq, Factors factors,
                  const RowInputs& in) const {
    const Vec<T> of_sink = in.sink.weight(load(lse + v));
    const Sums first = weigh(v, lo, hi, factors, in.kept);
    const Vec<T> total = first.weight + of_sink;
    const Vec<T> scale = T(1) / (total == T(0) ? set1(T(1)) : total), P_sink = of_sink * scale;
    const Vec<T> lam = in.at(in.dlse, v, nq), D = first.gradient * scale - lam;
    const Vec<T> mean = (first.moved + of_sink * in.sink.tangent) * scale;
    store(inverse + v, scale);
    const Sums second = centre(v, lo, hi, factors.tangent, mean, D, in.kept);
    const Vec<T> left = second.weight * scale + P_sink * (in.sink.tangent - mean);
    const Vec<T> of_keys = lam + D * P_sink;  // sum P (M dP - D)
    const Vec<T> sink_moved = in.sink.there ? in.sink.tangent - mean - left : Vec<T>{};
    const Vec<T> tD =
        second.gradient * scale - left * of_keys - D * P_sink * sink_moved - in.at(in.tdlse, v, nq);
    store(rest + v, left), store(tlse + v, mean + left);
    store(delta + v, D), store(tdelta + v, tD);
  }

  // What exact_rows leaves, of rows that have keys in other blocks, too: with `inverse` and a base
  // in place of LSE at hand, and L' in `tlse`.
  ATTN_NOINLINE void ready_rows(const Panel<T>& panel, const Tile& tile, Factors factors) {
    GradientTile<Plain<T>>::weigh(panel, tile, factors.logit);
    Base::each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
      for (int64_t at = lo * kPanel + v; at < hi * kPanel; at += kPanel)
        store(tS + at, load(tS + at) * factors.tangent);
    });
    std::copy_n(tlse, kPanel, rest);
  }

  // S: logits in (READY: what exact_rows left), P M out; tS: t' in, P M c out; dP in, dT out; tdP
  // in, dT' out.
  template <bool READY>
  void gradients(int64_t v, int64_t lo, int64_t hi, Factors factors, const T* kept) const {
    int64_t j = lo;
    auto keys = [&](auto count) {
      for (; j + count.value <= hi; j += count.value)
        gradient_keys<READY, count.value>(j, v, factors, kept);
    };
    keys(std::integral_constant<int, kAbreast>{});
    keys(std::integral_constant<int, 1>{});
  }

  // dT to dZ, dT' to dZ'.
  ATTN_NOINLINE void gradients_through_softcap(const Panel<T>& panel, const Tile& tile) const {
    Base::each_vector(panel, tile, [&](int64_t v, int64_t lo, int64_t hi) {
      for (int64_t at = lo * kPanel + v; at < hi * kPanel; at += kPanel) {
        const Vec<T> dT = load(dP + at), tdT = load(tdP + at), g = load(slope + at);
        const Vec<T> bent = dT == T(0) ? Vec<T>{} : load(bend + at) * dT;  // hidden: NaN perhaps
        store(dP + at, dT == T(0) ? Vec<T>{} : dT * g);
        store(tdP + at, (tdT == T(0) ? Vec<T>{} : tdT * g) + bent);
      }
    });
  }

 private:
  struct Sums {
    Vec<T> weight, moved, gradient;
  };

  // S: logits in, exp(S - LSE) out.  Their sum, that of them times t', and that times M dP.
  Sums weigh(int64_t v, int64_t lo, int64_t hi, Factors factors, const T* kept) const {
    Sums sum{};
    int64_t j = lo;
    auto keys = [&](auto count) {
      constexpr int N = count.value;
      for (; j + N <= hi; j += N) {
        Vec<T> P[N];
        this->template weights<Weights::kSoftmax>(j, v, factors.logit, P);
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          const int64_t at = (j + i) * kPanel + v;
          const Mask<T> none = P[i] == T(0);
          Vec<T> g = load(dP + at);
          if (kept) g *= load(kept + at);
          sum.weight += P[i];
          sum.moved += none ? Vec<T>{} : P[i] * (load(tS + at) * factors.tangent);
          sum.gradient += none ? Vec<T>{} : P[i] * g;
          store(S + at, P[i]);
        }
      }
    };
    keys(std::integral_constant<int, kAbreast>{});
    keys(std::integral_constant<int, 1>{});
    return sum;
  }

  // tS: t' in, t' - mean out.  Sums of weights times t' - mean, and times
  // (t' - mean) (M dP - D) + M dP'.
  Sums centre(int64_t v, int64_t lo, int64_t hi, T factor, Vec<T> mean, Vec<T> D,
              const T* kept) const {
    Sums sum{};
    for (int64_t at = lo * kPanel + v; at < hi * kPanel; at += kPanel) {
      const Vec<T> P = load(S + at), t = load(tS + at) * factor - mean;
      Vec<T> g = load(dP + at), tg = load(tdP + at);
      if (kept) g *= load(kept + at), tg *= load(kept + at);
      const Mask<T> none = P == T(0);
      sum.weight += none ? Vec<T>{} : P * t;
      sum.gradient += none ? Vec<T>{} : P * (t * (g - D) + tg);
      store(tS + at, t);
    }
    return sum;
  }

  template <bool READY, int N>
  ATTN_INLINE void gradient_keys(int64_t j, int64_t v, Factors factors, const T* kept) const {
    const Vec<T> D = load(delta + v), tD = load(tdelta + v);
    const Vec<T> mean = load((READY ? rest : tlse) + v);
    Vec<T> P[N];
    if constexpr (READY) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) P[i] = load(S + (j + i) * kPanel + v) * load(inverse + v);
    } else {
      this->template weights<Weights::kSoftmax>(j, v, factors.logit, P);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const int64_t at = (j + i) * kPanel + v;
      const Mask<T> none = P[i] == T(0);  // products with an excluded key may be anything
      Vec<T> c = load(tS + at), g = load(dP + at), tg = load(tdP + at);
      c = (READY ? c : c * factors.tangent) - mean;
      Vec<T> kept_P = P[i];
      if (kept) {
        const Vec<T> M = load(kept + at);
        g *= M, tg *= M, kept_P = dropped(kept_P, M);
      }
      g -= D;
      store(S + at, kept_P);
      store(tS + at, none ? Vec<T>{} : kept_P * c);
      store(dP + at, none ? Vec<T>{} : P[i] * g);
      store(tdP + at, none ? Vec<T>{} : P[i] * (c * g + (tg - tD)));
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
