// The attention functions beyond softmax over dot products, forward: scores are dot products or
// additive (additive.h), the normaliser is softmax or sigmoid (arXiv 2409.04431):
//   P = exp(S - LSE)   or   P = 1 / (1 + exp(-(S + bias))), which needs no LSE;   O = P V
// One task = BLOCK_M queries of one head; tiles are transposed, queries in lanes, as in forward.h.
#pragma once
#include "cpu/kernels/additive.h"
#include "cpu/kernels/options.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"

namespace attn::cpu::ATTN_ISA {

// What both directions share: the logits of a tile, and the weights of the sigmoid.
template <class T>
struct FamilyTiles {
  const Problem& p;
  const Pointers& ptr;
  const FamilyOptions& options;
  int64_t block_m, m_tiles, n_tiles, d_pad, dv_pad;

  FamilyTiles(const Problem& problem, const Pointers& pointers, const FamilyOptions& o)
      : p(problem), ptr(pointers), options(o) {
    block_m = std::min<int64_t>(kMaxQueries, round_up(p.seqlen_q));
    m_tiles = block_m ? (p.seqlen_q + block_m - 1) / block_m : 0;
    n_tiles = (p.seqlen_k + kFamilyKeys - 1) / kFamilyKeys;
    d_pad = round_up(p.head_dim), dv_pad = round_up(p.head_dim_v);
  }

  static int64_t round_up(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }
  const T* w(int64_t h) const { return static_cast<const T*>(options.w) + h * p.head_dim; }

  T sigmoid_bias(const Sequence& seq) const {
    return options.length_bias ? T(-std::log(double(std::max<int64_t>(seq.seqlen_k, 1))))
                               : T(options.sigmoid_bias);
  }

  // K^T [dim][kFamilyKeys] of the additive scores; padding is 0.
  ATTN_NOINLINE void pack_keys(KeyRows<T> K, int64_t nk, T* Kt) const {
    for (int64_t d = 0; d < p.head_dim; ++d)
      for (int64_t j = 0; j < kFamilyKeys; ++j)
        Kt[d * kFamilyKeys + j] = j < nk ? K.data[j * K.stride + d] : T(0);
  }

  // S^T [nk][kMaxQueries].  fast: both sides hold exponentials.
  ATTN_NOINLINE void products(int64_t h, int64_t nk, int64_t bm, KeyRows<T> K, const T* Kt, T* Qt,
                              bool fast, T* S) const {
    if (!options.w) {
      product<T>(nk, bm, p.head_dim, K.data, K.stride, 1, Qt, kMaxQueries, S, kMaxQueries, false);
      return;
    }
    const AdditiveSide<T> k{const_cast<T*>(Kt), kFamilyKeys}, q{Qt, kMaxQueries};
    if (fast)
      additive_scores<T, true>(nk, bm, p.head_dim, k, q, w(h), S);
    else
      additive_scores<T, false>(nk, bm, p.head_dim, k, q, w(h), S);
  }

  // S: logits in, sigmoid weights out.
  ATTN_NOINLINE void sigmoid(T* S, int64_t nk, int64_t bm, T bias) const {
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t q = 0; q < bm; q += kLanes<T>) {
        T* at = S + j * kMaxQueries + q;
        store(at, T(1) / (T(1) + vexp(-(load(at) + bias))));
      }
  }
};

template <class T>
class FamilyForward : FamilyTiles<T> {
  using Base = FamilyTiles<T>;
  using Base::block_m, Base::m_tiles, Base::options, Base::p, Base::ptr;
  int threads;

 public:
  FamilyForward(const Problem& problem, const Pointers& pointers, const FamilyOptions& o, int n)
      : Base(problem, pointers, o), threads(n) {}

  void run() {
    const int64_t units = p.batch * p.heads_q * m_tiles;
    parallel_for(units, threads, [&](int64_t i) { attend(units - 1 - i); });
  }

 private:
  void attend(int64_t unit) const {
    const int64_t h = unit / m_tiles % p.heads_q, m0 = unit % m_tiles * block_m;
    const int64_t hk = h / (p.heads_q / p.heads_k), dim = p.head_dim, dv = p.head_dim_v;
    const Sequence seq(p, ptr, unit / m_tiles / p.heads_q);
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    if (nq <= 0) return;
    Scratch scratch(int64_t(sizeof(T)) * (kMaxQueries * (2 * dim + dv + 2 + 3 * kFamilyKeys) +
                                          kFamilyKeys * (2 * dim + dv) + std::max(dim, dv)));
    T *Qt = scratch.take<T>(dim * kMaxQueries), *Eq = scratch.take<T>(dim * kMaxQueries);
    T *Ot = scratch.take<T>(dv * kMaxQueries), *S = scratch.take<T>(kFamilyKeys * kMaxQueries);
    T *add = scratch.take<T>(kFamilyKeys * kMaxQueries),
      *keep = scratch.take<T>(kFamilyKeys * kMaxQueries);
    T *top = scratch.take<T>(kMaxQueries), *sum = scratch.take<T>(kMaxQueries);
    T *K_scratch = scratch.take<T>(kFamilyKeys * dim), *Kt = scratch.take<T>(kFamilyKeys * dim);
    T *V_scratch = scratch.take<T>(kFamilyKeys * dv), *row = scratch.take<T>(std::max(dim, dv));
    std::fill(Ot, Ot + dv * kMaxQueries, T(0));
    std::fill(top, top + kMaxQueries, -std::numeric_limits<T>::infinity());
    std::fill(sum, sum + kMaxQueries, T(0));
    const FamilyScores<T> tile(seq, h, m0, nq, add, keep);
    pack_lanes(p.dtype, ptr.q, seq.q_offset(p.q, h, m0), p.q.s, nq, tile.bm, dim, row, Qt);
    bool fast_q = false;
    if (options.w) {
      fast_q = true;
      for (int64_t d = 0; d < dim; ++d) {
        fast_q &= within_fast_tanh(Qt + d * kMaxQueries, tile.bm);
        std::copy(Qt + d * kMaxQueries, Qt + d * kMaxQueries + tile.bm, Eq + d * kMaxQueries);
        exponentials(Eq + d * kMaxQueries, tile.bm);
      }
    }
    int64_t lo, hi;
    seq.key_range(m0, m0 + nq, &lo, &hi);
    for (int64_t n0 = lo / kFamilyKeys * kFamilyKeys; n0 < hi; n0 += kFamilyKeys) {
      const int64_t nk = std::min(kFamilyKeys, hi - n0);
      // S^T [nk, bm]
      const KeyRows<T> K = family_rows(seq, ptr.k, p.k, hk, n0, nk, dim, K_scratch);
      bool fast = fast_q;
      if (options.w) {
        this->pack_keys(K, nk, Kt);
        fast = fast && within_fast_tanh(Kt, dim * kFamilyKeys);
        if (fast) exponentials(Kt, dim * kFamilyKeys);
      }
      this->products(h, nk, tile.bm, K, Kt, fast ? Eq : Qt, fast, S);
      tile.logits(n0, nk, S, nullptr);
      if (options.sigmoid)
        this->sigmoid(S, nk, tile.bm, this->sigmoid_bias(seq));
      else
        softmax(S, nk, tile.bm, top, sum, Ot);
      if (p.dropout_p > 0) {
        const T* kept = tile.keep(n0, nk);
        for (int64_t j = 0; j < nk; ++j)
          for (int64_t q = 0; q < tile.bm; ++q) S[j * kMaxQueries + q] *= kept[j * kMaxQueries + q];
      }
      // O^T += V^T P^T   [dv, bm]
      const KeyRows<T> V = family_rows(seq, ptr.v, p.v, hk, n0, nk, dv, V_scratch);
      if (tile.partial(n0, nk) && !finite_rows(V, nk, dv))
        add_visible(V, S, nk, nq, Ot);
      else
        product<T>(dv, tile.bm, nk, V.data, 1, V.stride, S, kMaxQueries, Ot, kMaxQueries, true);
    }
    for (int64_t q = 0; q < nq; ++q) finish(seq, h, m0, q, top[q], sum[q], Ot, row);
  }

  // The online softmax of forward.h, without its statistics.
  ATTN_NOINLINE void softmax(T* S, int64_t nk, int64_t bm, T* top_row, T* sum_row, T* Ot) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < bm; q += kLanes<T>) {
      const Vec<T> before = load(top_row + q);
      Vec<T> top = before;
      for (int64_t j = 0; j < nk; ++j) top = vmax(load(S + j * kMaxQueries + q), top);
      const Vec<T> base = top == ninf ? Vec<T>{} : top;  // -inf - -inf would be NaN
      const Vec<T> alpha = vexp(before - base);
      Vec<T> sum = load(sum_row + q) * alpha;
      for (int64_t j = 0; j < nk; ++j) {
        const Vec<T> e = vexp(load(S + j * kMaxQueries + q) - base);
        sum += e;
        store(S + j * kMaxQueries + q, e);
      }
      store(top_row + q, top);
      store(sum_row + q, sum);
      for (int64_t d = 0; d < p.head_dim_v; ++d) {
        T* at = Ot + d * kMaxQueries + q;
        store(at, load(at) * alpha);
      }
    }
  }

  // O^T += V^T P^T over the pairs with P != 0: what an excluded row of V holds never reaches O.
  ATTN_NOINLINE void add_visible(KeyRows<T> V, const T* P, int64_t nk, int64_t nq, T* Ot) const {
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t q = 0; q < nq; ++q) {
        const T w = P[j * kMaxQueries + q];
        if (w == T(0)) continue;
        for (int64_t d = 0; d < p.head_dim_v; ++d)
          Ot[d * kMaxQueries + q] += w * V.data[j * V.stride + d];
      }
  }

  void finish(const Sequence& seq, int64_t h, int64_t m0, int64_t q, T top, T sum, const T* Ot,
              T* row) const {
    const bool nan = sum != sum, empty = top == -std::numeric_limits<T>::infinity() && !nan;
    const T factor = options.sigmoid ? T(1) : empty ? T(0) : T(1) / sum;
    for (int64_t d = 0; d < p.head_dim_v; ++d) row[d] = Ot[d * kMaxQueries + q] * factor;
    restore_row<T>(p.dtype, row, p.head_dim_v,
                   static_cast<char*>(ptr.o) + seq.q_offset(p.o, h, m0 + q) * this->bytes());
    if (!options.sigmoid)
      static_cast<T*>(ptr.lse)[seq.lse_offset(h, m0 + q)] = nan     ? sum
                                                            : empty ? top
                                                                    : top + std::log(sum);
  }
};

}  // namespace attn::cpu::ATTN_ISA
