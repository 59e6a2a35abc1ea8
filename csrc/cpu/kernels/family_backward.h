// Gradients of family.h by recomputation.  One task = a share of the keys of one K/V head; it loops
// over its key tiles, the query heads of the group and their query tiles.  It owns its rows of dK
// and dV, a copy of dQ of the heads (there are at most 8 shares, so memory stays O(N)) and of dw;
// copies are summed in fixed order, so that the result does not depend on the number of threads.
//   softmax: dS = P (dP - delta), delta = rowsum(dO * O) - dLSE       sigmoid: dS = P (1 - P) dP
#pragma once
#include "cpu/kernels/family.h"

namespace attn::cpu::ATTN_ISA {

template <class T>
class FamilyBackward : FamilyTiles<T> {
  using Base = FamilyTiles<T>;
  using Base::block_m, Base::d_pad, Base::dv_pad, Base::m_tiles, Base::n_tiles, Base::options,
      Base::p, Base::ptr;
  int threads;
  int64_t group, shares, tiles;
  std::vector<T> delta;  // [B, Hq, m_tiles, block_m]
  std::vector<T> dQt;    // [shares, B, Hq, m_tiles, D, block_m]
  std::vector<T> dw;     // [shares, B, Hq, D]

 public:
  FamilyBackward(const Problem& problem, const Pointers& pointers, const FamilyOptions& o, int n)
      : Base(problem, pointers, o), threads(n) {
    group = p.heads_q / p.heads_k;
    tiles = p.batch * p.heads_q * m_tiles;
    // Chosen from shapes alone, so that results do not depend on the number of threads.
    const int64_t heads = std::max<int64_t>(p.batch * p.heads_k, 1);
    shares = std::max<int64_t>(1, std::min((8 + heads - 1) / heads, n_tiles));
  }

  void run() {
    delta.assign(tiles * block_m, T(0));
    // Where the bias is broadcast, the tasks that add to the same elements become one.
    const bool by_batch = !ptr.dbias || p.dbias.b, by_head = !ptr.dbias || p.dbias.h;
    if (ptr.dbias && !p.dbias.k) shares = 1;
    dQt.assign(shares * tiles * p.head_dim * block_m, T(0));
    dw.assign(shares * p.batch * p.heads_q * p.head_dim, T(0));
    if (!options.sigmoid) parallel_for(tiles, threads, [&](int64_t t) { prepare(t); });
    const int64_t batches = by_batch ? p.batch : 1, heads = by_head ? p.heads_k : 1;
    parallel_for(n_tiles ? shares * batches * heads : 0, threads, [&](int64_t task) {
      const int64_t share = task / (batches * heads), b = task / heads % batches, h = task % heads;
      for (int64_t bi = by_batch ? b : 0; bi < (by_batch ? b + 1 : p.batch); ++bi)
        for (int64_t hi = by_head ? h : 0; hi < (by_head ? h + 1 : p.heads_k); ++hi)
          for (int64_t t = share * n_tiles / shares; t < (share + 1) * n_tiles / shares; ++t)
            key_block(bi, hi, t, share);
    });
    if (ptr.dq) parallel_for(tiles, threads, [&](int64_t t) { store_dq(t); });
    if (options.dw) sum_dw();
  }

 private:
  // delta = rowsum(dO * O) - dLSE
  void prepare(int64_t unit) {
    const int64_t h = unit / m_tiles % p.heads_q, m0 = unit % m_tiles * block_m;
    const Sequence seq(p, ptr, unit / m_tiles / p.heads_q);
    Scratch scratch(int64_t(sizeof(T)) * (2 * p.head_dim_v));
    T *o = scratch.take<T>(p.head_dim_v), *dout = scratch.take<T>(p.head_dim_v);
    for (int64_t q = 0; q < std::min(block_m, seq.seqlen_q - m0); ++q) {
      read(ptr.o, seq.q_offset(p.o, h, m0 + q), o);
      read(ptr.dout, seq.q_offset(p.dout, h, m0 + q), dout);
      T sum = 0;
      for (int64_t d = 0; d < p.head_dim_v; ++d) sum += o[d] * dout[d];
      if (ptr.dlse) sum -= static_cast<const T*>(ptr.dlse)[seq.lse_offset(h, m0 + q)];
      delta[unit * block_m + q] = sum;
    }
  }
  void read(const void* base, int64_t offset, T* row) const {
    convert_row<T>(p.dtype, static_cast<const char*>(base) + offset * this->bytes(), p.head_dim_v,
                   row);
  }

  void key_block(int64_t b, int64_t hk, int64_t t, int64_t share) {
    const Sequence seq(p, ptr, b);
    const int64_t n0 = t * kFamilyKeys, nk = std::min(kFamilyKeys, seq.seqlen_k - n0);
    if (nk <= 0) return;
    const int64_t dim = p.head_dim, dv = p.head_dim_v;
    Scratch scratch(int64_t(sizeof(T)) *
                    (kFamilyKeys * (4 * dim + dv + d_pad + dv_pad) +
                     kMaxQueries * (2 * dim + dv + d_pad + dv_pad + 5 * kFamilyKeys + 1)));
    T *K_scratch = scratch.take<T>(kFamilyKeys * dim),
      *V_scratch = scratch.take<T>(kFamilyKeys * dv);
    T *Kt = scratch.take<T>(kFamilyKeys * dim), *Ek = scratch.take<T>(kFamilyKeys * dim);
    T *dKt = scratch.take<T>(kFamilyKeys * dim), *dK = scratch.take<T>(kFamilyKeys * d_pad);
    T* dV = scratch.take<T>(kFamilyKeys * dv_pad);
    std::fill(dKt, dKt + kFamilyKeys * dim, T(0));
    std::fill(dK, dK + kFamilyKeys * d_pad, T(0));
    std::fill(dV, dV + kFamilyKeys * dv_pad, T(0));
    const KeyRows<T> K = family_rows(seq, ptr.k, p.k, hk, n0, nk, dim, K_scratch);
    const KeyRows<T> V = family_rows(seq, ptr.v, p.v, hk, n0, nk, dv, V_scratch);
    bool fast_k = false;
    if (options.w) {
      this->pack_keys(K, nk, Kt);
      fast_k = within_fast_tanh(Kt, kFamilyKeys * dim);
      std::copy(Kt, Kt + kFamilyKeys * dim, Ek);
      exponentials(Ek, kFamilyKeys * dim);
    }
    const size_t mark = scratch.used();
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t m = 0; m < m_tiles; ++m) {
        const int64_t m0 = m * block_m, nq = std::min(block_m, seq.seqlen_q - m0);
        if (nq <= 0) break;
        int64_t lo, hi;
        seq.key_range(m0, m0 + nq, &lo, &hi);
        if (n0 + nk <= lo || n0 >= hi) continue;
        scratch.rewind(mark);
        tile_pair(seq, h, m, nq, n0, nk, share, K, V, fast_k, Kt, Ek, dKt, dK, dV, scratch);
      }
    if (options.w)
      for (int64_t d = 0; d < dim; ++d)
        for (int64_t j = 0; j < nk; ++j) dK[j * d_pad + d] = dKt[d * kFamilyKeys + j];
    store_rows(seq, ptr.dk, p.dk, hk, n0, nk, dim, d_pad, dK, options.w ? T(1) : T(p.scale));
    store_rows(seq, ptr.dv, p.dv, hk, n0, nk, dv, dv_pad, dV, T(1));
  }

  void tile_pair(const Sequence& seq, int64_t h, int64_t m, int64_t nq, int64_t n0, int64_t nk,
                 int64_t share, KeyRows<T> K, KeyRows<T> V, bool fast, T* Kt, T* Ek, T* dKt, T* dK,
                 T* dV, Scratch& scratch) {
    const int64_t m0 = m * block_m, unit = (seq.b * p.heads_q + h) * m_tiles + m;
    T *Qt = scratch.take<T>(p.head_dim * kMaxQueries),
      *Eq = scratch.take<T>(p.head_dim * kMaxQueries);
    T* dOt = scratch.take<T>(p.head_dim_v * kMaxQueries);
    T *Q = scratch.take<T>(d_pad * kMaxQueries), *dO = scratch.take<T>(dv_pad * kMaxQueries);
    T *P = scratch.take<T>(kFamilyKeys * kMaxQueries),
      *dP = scratch.take<T>(kFamilyKeys * kMaxQueries);
    T *add = scratch.take<T>(kFamilyKeys * kMaxQueries),
      *keep = scratch.take<T>(kFamilyKeys * kMaxQueries);
    T* dcap = p.softcap > 0 ? scratch.take<T>(kFamilyKeys * kMaxQueries) : nullptr;
    T* lse = scratch.take<T>(kMaxQueries);
    const FamilyScores<T> tile(seq, h, m0, nq, add, keep);
    pack(ptr.q, seq.q_offset(p.q, h, m0), p.q.s, nq, tile.bm, p.head_dim, d_pad, Q, Qt);
    pack(ptr.dout, seq.q_offset(p.dout, h, m0), p.dout.s, nq, tile.bm, p.head_dim_v, dv_pad, dO,
         dOt);
    // A NaN query has dS = NaN at each key it sees; 0 * NaN must not reach dK of the others.
    for (int64_t i = 0; i < tile.bm * d_pad; ++i) Q[i] = Q[i] - Q[i] == T(0) ? Q[i] : T(0);
    for (int64_t d = 0; options.w && d < p.head_dim; ++d) {
      fast = fast && within_fast_tanh(Qt + d * kMaxQueries, tile.bm);
      std::copy(Qt + d * kMaxQueries, Qt + d * kMaxQueries + tile.bm, Eq + d * kMaxQueries);
      exponentials(Eq + d * kMaxQueries, tile.bm);
    }
    for (int64_t q = 0; q < tile.bm; ++q)  // padding lanes: P = 0
      lse[q] = q < nq && !options.sigmoid
                   ? static_cast<const T*>(ptr.lse)[seq.lse_offset(h, m0 + q)]
                   : -std::numeric_limits<T>::infinity();
    // S^T, dP^T = V dO^T   [nk, bm]
    this->products(h, nk, tile.bm, K, fast ? Ek : Kt, fast ? Eq : Qt, fast, P);
    product<T>(nk, tile.bm, p.head_dim_v, V.data, V.stride, 1, dOt, kMaxQueries, dP, kMaxQueries,
               false);
    tile.logits(n0, nk, P, dcap);
    const T* kept = p.dropout_p > 0 ? tile.keep(n0, nk) : nullptr;
    if (options.sigmoid)
      sigmoid_gradient(nk, nq, tile.bm, this->sigmoid_bias(seq), kept, P, dP);
    else
      softmax_gradient(nk, tile.bm, lse, delta.data() + unit * block_m, kept, P, dP);
    if (ptr.dbias) add_bias_gradient(seq, h, m0, nq, n0, nk, dP);
    if (dcap)
      for (int64_t i = 0; i < nk * kMaxQueries; ++i)  // dcap is NaN where an excluded K is
        dP[i] = dP[i] == T(0) ? T(0) : dP[i] * dcap[i];

    // dV += P^T dO   [nk, dv]
    if (ptr.dv) product<T>(nk, dv_pad, tile.bm, P, kMaxQueries, 1, dO, dv_pad, dV, dv_pad, true);
    T* dq = dQt.data() + (share * tiles + unit) * p.head_dim * block_m;
    if (options.w) {
      T* row = dw.data() + ((share * p.batch + seq.b) * p.heads_q + h) * p.head_dim;
      const AdditiveSide<T> k{fast ? Ek : Kt, kFamilyKeys}, q{fast ? Eq : Qt, kMaxQueries};
      if (fast)
        additive_gradient<T, true>(nk, tile.bm, p.head_dim, k, q, this->w(h), dP, dq, block_m, dKt,
                                   kFamilyKeys, row);
      else
        additive_gradient<T, false>(nk, tile.bm, p.head_dim, k, q, this->w(h), dP, dq, block_m, dKt,
                                    kFamilyKeys, row);
      return;
    }
    // dK += dS^T Q   [nk, d],  dQ^T += K^T dS^T   [d, bm]
    product<T>(nk, d_pad, tile.bm, dP, kMaxQueries, 1, Q, d_pad, dK, d_pad, true);
    if (!tile.partial(n0, nk) || finite_rows(K, nk, p.head_dim))
      product<T>(p.head_dim, tile.bm, nk, K.data, 1, K.stride, dP, kMaxQueries, dq, block_m, true);
    else
      add_visible(K, dP, nk, nq, dq);
  }

  // P: logits in, dropped-out weights out.  dP in, dS out.
  void softmax_gradient(int64_t nk, int64_t bm, const T* lse, const T* row_delta, const T* kept,
                        T* P, T* dP) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < bm; q += kLanes<T>) {
      const Vec<T> l = load(lse + q);
      const Vec<T> minus = load(row_delta + q);
      for (int64_t j = 0; j < nk; ++j) {
        const int64_t at = j * kMaxQueries + q;
        const Vec<T> s = load(P + at);
        Vec<T> w = vexp(s - l);
        w = s == ninf ? Vec<T>{} : w;  // also where LSE is NaN
        w = l == ninf ? Vec<T>{} : w;  // empty rows
        store_pair(w, w, minus, kept, at, P, dP);
      }
    }
  }
  // The same for sigmoid weights: dS = P (1 - P) dP
  void sigmoid_gradient(int64_t nk, int64_t nq, int64_t bm, T bias, const T* kept, T* P,
                        T* dP) const {
    this->sigmoid(P, nk, bm, bias);
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t q = 0; q < bm; q += kLanes<T>) {
        const int64_t at = j * kMaxQueries + q;
        Vec<T> w = load(P + at);
        w = iota<T>() + T(q) >= T(nq) ? Vec<T>{} : w;  // padding lanes
        store_pair(w, w * (T(1) - w), Vec<T>{}, kept, at, P, dP);
      }
  }
  void store_pair(Vec<T> w, Vec<T> slope, Vec<T> minus, const T* kept, int64_t at, T* P,
                  T* dP) const {
    Vec<T> g = load(dP + at), dropped = w;
    if (kept) {
      g *= load(kept + at);
      dropped *= load(kept + at);
    }
    g = slope * (g - minus);
    g = w == T(0) ? Vec<T>{} : g;  // an excluded V may hold NaN
    store(P + at, dropped);
    store(dP + at, g);
  }

  // Over the pairs with dS != 0: what an excluded row of K holds never reaches dQ.
  void add_visible(KeyRows<T> K, const T* dS, int64_t nk, int64_t nq, T* dq) const {
    for (int64_t j = 0; j < nk; ++j)
      for (int64_t q = 0; q < nq; ++q) {
        const T g = dS[j * kMaxQueries + q];
        if (g == T(0)) continue;
        for (int64_t d = 0; d < p.head_dim; ++d)
          dq[d * block_m + q] += g * K.data[j * K.stride + d];
      }
  }

  void add_bias_gradient(const Sequence& seq, int64_t h, int64_t m0, int64_t nq, int64_t n0,
                         int64_t nk, const T* dS) const {
    T* out = static_cast<T*>(ptr.dbias) + seq.b * p.dbias.b + h * p.dbias.h + m0 * p.dbias.q +
             n0 * p.dbias.k;
    for (int64_t q = 0; q < nq; ++q)
      for (int64_t j = 0; j < nk; ++j)
        out[q * p.dbias.q + j * p.dbias.k] += dS[j * kMaxQueries + q];
  }

  // Rows natural [bm][pad] and transposed [dim][kMaxQueries]; padding is 0.
  void pack(const void* base, int64_t offset, int64_t stride, int64_t nq, int64_t bm, int64_t dim,
            int64_t pad, T* rows, T* transposed) const {
    for (int64_t q = 0; q < bm; ++q) {
      T* row = rows + q * pad;
      std::fill(row, row + pad, T(0));
      if (q < nq)
        convert_row<T>(p.dtype,
                       static_cast<const char*>(base) + (offset + q * stride) * this->bytes(), dim,
                       row);
      for (int64_t d = 0; d < dim; ++d) transposed[d * kMaxQueries + q] = row[d];
    }
  }

  void store_rows(const Sequence& seq, void* base, const Strides& s, int64_t hk, int64_t n0,
                  int64_t nk, int64_t dim, int64_t pad, T* rows, T scale) const {
    if (!base) return;
    for (int64_t j = 0; j < nk; ++j) {
      T* row = rows + j * pad;
      for (int64_t d = 0; d < dim; ++d) row[d] *= scale;
      restore_row<T>(p.dtype, row, dim,
                     static_cast<char*>(base) + seq.k_offset(s, hk, n0 + j) * this->bytes());
    }
  }

  void store_dq(int64_t unit) const {
    const int64_t h = unit / m_tiles % p.heads_q, m0 = unit % m_tiles * block_m;
    const Sequence seq(p, ptr, unit / m_tiles / p.heads_q);
    Scratch scratch(int64_t(sizeof(T)) * (p.head_dim));
    T* row = scratch.take<T>(p.head_dim);
    const T scale = options.w ? T(1) : T(p.scale);
    for (int64_t q = 0; q < std::min(block_m, seq.seqlen_q - m0); ++q) {
      for (int64_t d = 0; d < p.head_dim; ++d) {
        T sum = 0;
        for (int64_t s = 0; s < shares; ++s)
          sum += dQt[((s * tiles + unit) * p.head_dim + d) * block_m + q];
        row[d] = sum * scale;
      }
      restore_row<T>(p.dtype, row, p.head_dim,
                     static_cast<char*>(ptr.dq) + seq.q_offset(p.dq, h, m0 + q) * this->bytes());
    }
  }

  void sum_dw() const {
    for (int64_t i = 0; i < p.heads_q * p.head_dim; ++i) {
      double sum = 0;
      for (int64_t s = 0; s < shares * p.batch; ++s) sum += dw[s * p.heads_q * p.head_dim + i];
      static_cast<T*>(options.dw)[i] = T(sum);
    }
  }
};

}  // namespace attn::cpu::ATTN_ISA
