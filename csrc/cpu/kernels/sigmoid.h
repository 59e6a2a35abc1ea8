// Sigmoid weights (arXiv 2409.04431):  P = 1 / (1 + exp(-(s + bias))).  No row needs another's sum.
#pragma once
#include "cpu/kernels/options.h"
#include "cpu/simd/gemm.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// -ln of the whole sequence's keys, or what the caller says.
template <class T>
inline T sigmoid_bias(const Options& o, const Sequence& seq) {
  return o.length_bias ? T(-std::log(double(std::max<int64_t>(seq.whole_k, 1))))
                       : T(o.sigmoid_bias);
}

// x[i] = 1 / (1 + exp(-x[i])), 0 of -inf.
template <class T, int N>
ATTN_INLINE void vsigmoid_each(Vec<T> (&x)[N]) {
  Vec<T> e[N];
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) e[i] = -x[i];
  vexp_each(e);
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    x[i] = x[i] == -std::numeric_limits<T>::infinity() ? Vec<T>{} : T(1) / (T(1) + e[i]);
}

// One vector of queries, keys [lo, hi), lo a multiple of Op::kPack.  S (at the vector's lane):
// logits / scale in, weights times the dropout multipliers out, as items of Op.
template <class Op>
ATTN_NOINLINE void sigmoid_weights(typename Op::Acc* S, int64_t lo, int64_t hi,
                                   typename Op::Acc scale, typename Op::Acc bias,
                                   const typename Op::Acc* kept) {
  using T = typename Op::Acc;
  for (int64_t j = lo; j < hi; j += 2) {
    const int n = j + 1 < hi ? 2 : 1;
    Vec<T> w[2] = {load(S + j * kPanel), load(S + (j + n - 1) * kPanel)};
    for (Vec<T>& x : w) x = x * scale + bias;
    vsigmoid_each<T>(w);
    for (int i = 0; i < n && kept; ++i) w[i] = dropped(w[i], load(kept + (j + i) * kPanel));
    if constexpr (Op::kPack == 1)
      for (int i = 0; i < n; ++i) store(S + (j + i) * kPanel, w[i]);
    else
      store(reinterpret_cast<typename Op::Item*>(S) + j / 2 * kPanel,
            pair_rows(w[0], n == 2 ? w[1] : Vec<T>{}));
  }
}

// The same for all queries of a panel.
template <class Op>
inline void sigmoid_weights(const Panel<typename Op::Acc>& panel, const Tile& tile,
                            typename Op::Acc* S, typename Op::Acc scale, typename Op::Acc bias,
                            const typename Op::Acc* kept) {
  for (int64_t g = 0; g < panel.grains; ++g)
    for (int64_t v = g * kGrain; v < std::min((g + 1) * kGrain, panel.lanes);
         v += kLanes<typename Op::Acc>)
      sigmoid_weights<Op>(S + v, tile.lo[g], tile.hi[g], scale, bias, kept ? kept + v : nullptr);
}

}  // namespace attn::cpu::ATTN_ISA
