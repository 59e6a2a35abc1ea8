// From products to gradients of logits, one panel of queries against one block of keys:
//   P = exp(S - LSE),  dS = P * (dP - delta),   or
//   P = 1 / (1 + exp(-(S + bias))),  dS = P * (1 - P) * dP,
// with dropout and through softcap, as numbers in place or as bfloat16 operands of the products
// that follow.
#pragma once
#include "cpu/kernels/sigmoid.h"
#include "cpu/simd/gemm.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// What S holds where gradient() begins, and what becomes of it.
enum class Weights { kSoftmax, kReady, kSigmoid };

template <class Op>
struct GradientTile {
  using T = typename Op::Acc;
  using Item = typename Op::Item;
  static constexpr int L = kLanes<T>;
  T *S{}, *dP{}, *dcap{};      // [BLOCK_N][kPanel]; dcap is null without softcap
  T *lse{}, *inverse{};        // [kPanel]; sigmoid: lse is -bias, and inf in padding lanes
  Item *P_rows{}, *dS_rows{};  // A of dV and dK [BLOCK_N][items of kPanel]
  Item* dS_by_key{};           // B of dQ [items of BLOCK_N][kPanel]
  bool nan = false;            // a row of the panel is NaN

  // base(i) of nq rows of the panel.  In padding lanes P = 0.
  template <class F>
  void begin_rows(int64_t nq, const F& base) {
    nan = false;
    for (int64_t q = 0; q < nq; ++q) {
      const T x = base(q);
      lse[q] = x, nan |= x != x;
    }
    std::fill(lse + nq, lse + kPanel, std::numeric_limits<T>::infinity());
  }
  // dS = 0 in padding lanes, whose logits an infinite weight of additive scores makes NaN.
  void clear_padding(int64_t nq, int64_t columns, int64_t keys) const {
    for (int64_t j = 0; j < keys && nq < columns; ++j)
      std::fill(dP + j * kPanel + nq, dP + j * kPanel + columns, T(0));
  }
  // That of a row of this LSE: in empty rows P = 0, too.
  static T base_of(T lse) { return lse == -std::numeric_limits<T>::infinity() ? -lse : lse; }

  // w[i] = P of key j + i and the vector of queries v.
  template <Weights WEIGHTS, int N>
  ATTN_INLINE void weights(int64_t j, int64_t v, T scale, Vec<T> (&w)[N]) const {
    const T* at = S + j * kPanel + v;
    const Vec<T> base = load(lse + v);
    const Mask<T> nobody = base == std::numeric_limits<T>::infinity();
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) w[i] = load(at + i * kPanel) * scale - base;
    if constexpr (WEIGHTS == Weights::kSigmoid) {
      vsigmoid_each<T>(w);
    } else if constexpr (Op::kPack == 2) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) w[i] *= T(kLog2e);
      vexp2_each<3>(w);
    } else {
      vexp_each(w);  // 2^(x * log2(e)) would round once more
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {  // also where LSE is NaN, or a logit of a padding lane
      const Mask<T> excluded = load(at + i * kPanel) == -std::numeric_limits<T>::infinity();
      w[i] = (excluded | nobody) ? Vec<T>{} : w[i];
    }
  }

  // dP = 0 where dropout drops the weight, also where V holds NaN or inf.
  ATTN_NOINLINE void clear_dropped(const Panel<T>& panel, const Tile& tile, const T* kept) const {
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t j = tile.lo[g]; j < tile.hi[g]; ++j)
        for (int64_t at = j * kPanel + g * kGrain; at < j * kPanel + (g + 1) * kGrain; at += L)
          store(dP + at, load(kept + at) == T(0) ? Vec<T>{} : load(dP + at));
  }

  // S = -inf where scale * S is: such a pair does not count, which only a row of NaN shows, where P
  // of all other pairs is NaN.
  ATTN_NOINLINE void exclude_overflows(const Panel<T>& panel, const Tile& tile, T scale) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L)
        for (int64_t at = tile.lo[g] * kPanel + v; at < tile.hi[g] * kPanel; at += kPanel) {
          const Vec<T> s = load(S + at);
          store(S + at, s * scale == ninf ? set1(ninf) : s);
        }
  }

  // S = exp(scale * S - lse): what weights() makes, ahead of gradient().
  ATTN_NOINLINE void weigh(const Panel<T>& panel, const Tile& tile, T scale) const {
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L) {
        scale_scores(S + v, tile.lo[g], tile.hi[g], scale);
        for (int64_t j = tile.lo[g]; j < tile.hi[g]; ++j) {
          Vec<T> w[1];
          weights<Weights::kSoftmax>(j, v, T(1), w);
          store(S + j * kPanel + v, w[0]);
        }
      }
  }

  // delta = rowsum(P * dP) - dLSE where one block holds all keys of the rows, and S = P, with
  // `inverse` 1 / rowsum(P): LSE is rounded, and where one key dominates dP - delta cancels.  It is
  // rowsum(dO * O), but O need not be read, and its rounding would show there.
  void exact_delta(const Panel<T>& panel, const Tile& tile, T scale, const T* kept, const T* dlse,
                   T* row_delta) const {
    const T* sinks = static_cast<const T*>(panel.seq.ptr->sink);
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L) {
        Vec<T> sum[2] = {}, total[2] = {};
        int64_t j = tile.lo[g];
        auto keys = [&](auto count) {
          constexpr int N = count.value;
          for (; j + N <= tile.hi[g]; j += N) {
            T* at = S + j * kPanel + v;
            Vec<T> w[N];
            weights<Weights::kSoftmax>(j, v, scale, w);
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) {
              store(at + i * kPanel, w[i]);
              total[i % 2] += w[i];
              Vec<T> x = load(dP + (j + i) * kPanel + v) * w[i];
              if (kept) x *= load(kept + (j + i) * kPanel + v);
              sum[i % 2] += w[i] == T(0) ? Vec<T>{} : x;
            }
          }
        };
        keys(std::integral_constant<int, kAbreast>{});
        keys(std::integral_constant<int, 1>{});
        Vec<T> whole = total[0] + total[1];
        if (sinks) {
          Vec<T> sink[1] = {set1(sinks[panel.h]) - load(lse + v)};
          vexp_each(sink);
          whole += sink[0];
        }
        // empty rows, and NaN, which is to stay with the keys that the row sees
        const Mask<T> usable = (whole > T(0)) & (whole < std::numeric_limits<T>::infinity());
        whole = T(1) / (usable ? whole : set1(T(1)));
        store(inverse + v, whole);
        const Vec<T> delta = (sum[0] + sum[1]) * whole;
        for (int i = 0; i < L && v + i < panel.nq; ++i)
          row_delta[v + i] = dlse ? delta[i] - dlse[v + i] : delta[i];
      }
  }

  // One vector of queries (lane v), keys [lo, hi).  S: logits in (kReady: weights / inverse),
  // dropped-out weights out; dP in, dS out: as numbers in place (late), or as operands of the
  // products that follow.
  void gradient(Weights weights, int64_t v, int64_t lo, int64_t hi, T scale, const T* row_delta,
                const T* kept, bool late) const {
    if (weights == Weights::kSigmoid)
      gradient_of<Weights::kSigmoid>(v, lo, hi, scale, row_delta, kept, late);
    else if (weights == Weights::kReady)
      gradient_of<Weights::kReady>(v, lo, hi, scale, row_delta, kept, late);
    else
      gradient_of<Weights::kSoftmax>(v, lo, hi, scale, row_delta, kept, late);
  }

  template <Weights WEIGHTS>
  void gradient_of(int64_t v, int64_t lo, int64_t hi, T scale, const T* row_delta, const T* kept,
                   bool late) const {
    int64_t j = lo;
    auto keys = [&](auto count) {
      for (; j + count.value <= hi; j += count.value)
        if (kept)
          gradient_keys<WEIGHTS, count.value, true>(j, v, scale, row_delta, kept, late);
        else
          gradient_keys<WEIGHTS, count.value, false>(j, v, scale, row_delta, kept, late);
    };
    keys(std::integral_constant<int, kAbreast>{});
    keys(std::integral_constant<int, 2>{});
    keys(std::integral_constant<int, 1>{});
  }

  template <Weights WEIGHTS, int N, bool kDropout>
  ATTN_INLINE void gradient_keys(int64_t j, int64_t v, T scale, const T* row_delta, const T* kept,
                                 bool late) const {
    const Vec<T> row = load(row_delta + v);
    const int64_t at = j * kPanel + v;
    Vec<T> w[N], g[N];
    if constexpr (WEIGHTS == Weights::kReady) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) w[i] = load(S + at + i * kPanel) * load(inverse + v);
    } else {
      weights<WEIGHTS>(j, v, scale, w);
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      Vec<T> dp = load(dP + at + i * kPanel);
      const Mask<T> none = w[i] == T(0);  // an excluded V may hold NaN
      if constexpr (kDropout) dp *= load(kept + at + i * kPanel);
      const Vec<T> slope = WEIGHTS == Weights::kSigmoid ? w[i] * (T(1) - w[i]) : w[i];
      g[i] = none ? Vec<T>{} : slope * (dp - row);
      if constexpr (kDropout) w[i] = dropped(w[i], load(kept + at + i * kPanel));
    }
    if (Op::kPack == 1 || late) {
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        store(S + at + i * kPanel, w[i]);
        store(dP + at + i * kPanel, g[i]);
      }
    } else {
      emit_keys(j, v, w, g);
    }
  }

  // gradient() with the products before it, for keys [lo, hi) that every query of a full panel sees
  // (lo even), where all is finite: S and dP stay in registers, only the operands of the products
  // that follow are written.
  void products_and_gradient(const Operand& K, const Operand& V, const Item* Qt, const Item* dOt,
                             int64_t d, int64_t dv, int64_t lo, int64_t hi, T scale,
                             const T* row_delta, Prefetch& soon) const {
    const Factors keys{K.data, K.row_step, K.depth_step, Qt, depth_of<Op>(d)},
        values{V.data, V.row_step, V.depth_step, dOt, depth_of<Op>(dv)};
    auto take = [&](auto rows) {
      const int64_t blocks = (hi - lo) / rows.value;
      if (blocks) gradient_blocks<rows.value>(lo, blocks, keys, values, scale, row_delta, soon);
      lo += blocks * rows.value;
    };
    take(std::integral_constant<int, ATTN_MR>{});
    take(std::integral_constant<int, 2>{});
    take(std::integral_constant<int, 1>{});
  }

  // bf16 operands of what gradient() left as numbers.
  void emit(int64_t v, int64_t lo, int64_t hi) const {
    for (int64_t j = lo; j < hi; j += 2) {
      const int64_t at = j * kPanel + v;
      if (j + 1 < hi) {
        const Vec<T> w[2] = {load(S + at), load(S + at + kPanel)};
        const Vec<T> g[2] = {load(dP + at), load(dP + at + kPanel)};
        emit_keys(j, v, w, g);
      } else {
        const Vec<T> w[1] = {load(S + at)}, g[1] = {load(dP + at)};
        emit_keys(j, v, w, g);
      }
    }
  }

  // N keys from an even j as bf16: rows for dV and dK, pairs of keys for dQ.
  template <int N>
  ATTN_INLINE void emit_keys(int64_t j, int64_t v, const Vec<T> (&w)[N],
                             const Vec<T> (&g)[N]) const {
    if constexpr (Op::kPack == 2) {
      emit_weights(j, v, w);
      emit_gradients(j, v, g);
    }
  }
  template <int N>
  ATTN_INLINE void emit_weights(int64_t j, int64_t v, const Vec<T> (&w)[N]) const {
    auto* out = reinterpret_cast<uint16_t*>(P_rows) + j * kPanel + v;
#pragma GCC unroll 8
    for (int i = 0; i + 1 < N; i += 2)
      store_two_rows(out + i * kPanel, out + (i + 1) * kPanel, two_rows(w[i], w[i + 1]));
    if constexpr (N % 2) store_bf16(out + (N - 1) * kPanel, w[N - 1]);
  }
  template <int N>
  ATTN_INLINE void emit_gradients(int64_t j, int64_t v, const Vec<T> (&g)[N]) const {
    auto* out = reinterpret_cast<uint16_t*>(dS_rows) + j * kPanel + v;
    Item* pairs = dS_by_key + j / 2 * kPanel + v;
#pragma GCC unroll 8
    for (int i = 0; i + 1 < N; i += 2) {
      const auto two = two_rows(g[i], g[i + 1]);
      store_two_rows(out + i * kPanel, out + (i + 1) * kPanel, two);
      store(pairs + i / 2 * kPanel, pairs_of(two));
    }
    if constexpr (N % 2) {
      store_bf16(out + (N - 1) * kPanel, g[N - 1]);
      store(pairs + N / 2 * kPanel, pair_rows(g[N - 1], Vec<T>{}));
    }
  }

  void through_softcap(const Panel<T>& panel, const Tile& tile) const {
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t j = tile.lo[g]; j < tile.hi[g]; ++j)
        for (int64_t v = g * kGrain; v < (g + 1) * kGrain; v += L) {
          T* at = dP + j * kPanel + v;
          const Vec<T> x = load(at);  // dcap is NaN where an excluded K is
          store(at, x == T(0) ? Vec<T>{} : x * load(dcap + j * kPanel + v));
        }
  }

  // dBias += dS; where the bias is broadcast, sums over it.
  ATTN_NOINLINE void add_bias_gradient(const Panel<T>& panel, const Tile& tile, int64_t n0) const {
    const Problem& p = *panel.seq.p;
    T* out = static_cast<T*>(panel.seq.ptr->dbias) + panel.seq.b * p.dbias.b + panel.h * p.dbias.h +
             panel.m0 * p.dbias.q + n0 * p.dbias.k;
    for (int64_t g = 0; g < panel.grains; ++g)
      for (int64_t j = tile.lo[g] / L * L; j < tile.hi[g]; j += L)
        for (int64_t v = g * kGrain; v < (g + 1) * kGrain && v < panel.nq; v += L) {
          Vec<T> block[L];  // [L keys][L queries] -> [L queries][L keys]
          for (int i = 0; i < L; ++i)
            block[i] = j + i >= tile.lo[g] && j + i < tile.hi[g] ? load(dP + (j + i) * kPanel + v)
                                                                 : Vec<T>{};
          transpose_round<T, 1>(block);
          const int64_t n = std::min<int64_t>(L, tile.hi[g] - j);
          for (int i = 0; i < L && v + i < panel.nq; ++i) {
            T* at = out + (v + i) * p.dbias.q + j * p.dbias.k;
            if (p.dbias.k == 1 && n == L) {
              store(at, load(at) + block[i]);
            } else if (p.dbias.k == 0) {  // short sums first: one of thousands of keys is inexact
              T sum = 0;
              for (int64_t c = 0; c < n; ++c) sum += block[i][c];
              at[0] += sum;
            } else {
              for (int64_t c = 0; c < n; ++c) at[c * p.dbias.k] += block[i][c];
            }
          }
        }
  }

 private:
  // One product of a panel.
  struct Factors {
    const char* A;
    int64_t row_step, depth_step;
    const Item* B;
    int64_t depth;
    template <int ROWS>
    ATTN_INLINE void multiply_rows(int64_t first, Vec<T> (&acc)[ROWS][ATTN_NV],
                                   Prefetch& soon) const {
      const char* rows = A + first * row_step;
      multiply<Op>(depth, rows, row_step, depth_step, B, kPanel, acc,
                   soon.some(depth * Op::kPack, rows));
    }
  };

  template <int ROWS>
  __attribute__((noinline)) void gradient_blocks(int64_t j, int64_t blocks, Factors keys,
                                                 Factors values, T scale, const T* row_delta,
                                                 Prefetch& soon) const {
    static_assert(ATTN_NV * L == kPanel);
    Vec<T> P[ATTN_NV][ROWS];
    for (; blocks > 0; --blocks, j += ROWS) {
      Vec<T> acc[ROWS][ATTN_NV];
      keys.multiply_rows(j, acc, soon);
#pragma GCC unroll 8
      for (int v = 0; v < ATTN_NV; ++v) {
        const Vec<T> base = load(lse + v * L);
        Vec<T> w[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) w[i] = (acc[i][v] * scale - base) * T(kLog2e);
        vexp2_each<3>(w);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) P[v][i] = w[i];
        emit_weights(j, v * L, w);
      }
      values.multiply_rows(j, acc, soon);
#pragma GCC unroll 8
      for (int v = 0; v < ATTN_NV; ++v) {
        const Vec<T> row = load(row_delta + v * L);
        Vec<T> g[ROWS];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; ++i) g[i] = P[v][i] * (acc[i][v] - row);
        emit_gradients(j, v * L, g);
      }
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
