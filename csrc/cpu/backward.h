// dQ, dK, dV, dBias, dSink by recomputation (FlashAttention-2, Dao 2023), five products a tile pair
// in one pass:
//   S^T = K Q^T,  dP^T = V dO^T,  P = exp(S - LSE),  dS = P * (dP - delta),  delta = rowsum(dO * O)
//   - dLSE dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
// One task = BLOCK_N keys of one K/V head; it loops over the query heads of the group and their
// query tiles, and owns its rows of dK and dV.  dQ tiles are shared: each has a ticket, and key
// blocks add to it in ascending order, so that the result is the same whatever the number of
// threads.  Tasks are handed out by ascending key block, so a task waits only for tasks that were
// handed out before it.

constexpr int64_t kBackwardKeys = 128;  // BLOCK_N; multiple of 4 (dropout words)

template <class T>
class Backward {
 public:
  Backward(const Problem& problem, const Pointers& pointers, int threads)
      : p(problem), ptr(pointers), threads(threads) {
    group = p.heads_q / p.heads_k;
    block_m = std::min<int64_t>(kMaxQueries, round_up(p.seqlen_q));
    m_tiles = block_m ? (p.seqlen_q + block_m - 1) / block_m : 0;
    n_tiles = (p.seqlen_k + kBackwardKeys - 1) / kBackwardKeys;
    d_pad = round_up(p.head_dim), dv_pad = round_up(p.head_dim_v);
  }

  void run() {
    const int64_t tiles = p.batch * p.heads_q * m_tiles;
    delta.assign(tiles * block_m, T(0));
    dQt.assign(ptr.dq ? tiles * p.head_dim * block_m : 0, T(0));
    tickets = std::vector<std::atomic<int32_t>>(ptr.dq ? tiles : 0);
    parallel_for(tiles, threads, [&](int64_t tile) { prepare(tile); });

    // Where the bias is broadcast, the tasks that add to the same elements become one, in fixed
    // order.
    const bool by_key = !ptr.dbias || p.dbias.k != 0, by_batch = !ptr.dbias || p.dbias.b != 0,
               by_head = !ptr.dbias || p.dbias.h != 0;
    const int64_t keys = by_key ? n_tiles : 1, batches = by_batch ? p.batch : 1,
                  heads = by_head ? p.heads_k : 1;
    parallel_for(n_tiles ? keys * batches * heads : 0, threads, [&](int64_t task) {
      const int64_t key = task / (batches * heads), b = task / heads % batches, h = task % heads;
      for (int64_t bi = by_batch ? b : 0; bi < (by_batch ? b + 1 : p.batch); ++bi)
        for (int64_t hi = by_head ? h : 0; hi < (by_head ? h + 1 : p.heads_k); ++hi)
          for (int64_t ni = by_key ? key : 0; ni < (by_key ? key + 1 : n_tiles); ++ni)
            key_block(bi, hi, ni);
    });
    if (ptr.dq) parallel_for(tiles, threads, [&](int64_t tile) { store_dq(tile); });
    if (ptr.dsink) parallel_for(p.heads_q, threads, [&](int64_t h) { sink_gradient(h); });
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  int threads;
  int64_t group, block_m, m_tiles, n_tiles, d_pad, dv_pad;
  std::vector<T> delta;                       // [B, Hq, m_tiles, block_m]
  std::vector<T> dQt;                         // [B, Hq, m_tiles, D, block_m]
  std::vector<std::atomic<int32_t>> tickets;  // [B, Hq, m_tiles]: the key block that may add next

  static int64_t round_up(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T> * kLanes<T>; }
  int64_t bytes() const { return int64_t(dtype_size(p.dtype)); }

  void key_tiles(const Sequence& seq, int64_t m0, int64_t nq, int64_t* t0, int64_t* t1) const {
    int64_t lo, hi;
    seq.key_range(m0, m0 + nq, &lo, &hi);
    *t0 = lo / kBackwardKeys;
    *t1 = hi > lo ? (hi + kBackwardKeys - 1) / kBackwardKeys : *t0;
  }

  // delta = rowsum(dO * O) - dLSE, and the tile's first ticket
  void prepare(int64_t tile) {
    const int64_t h = tile / m_tiles % p.heads_q, m0 = tile % m_tiles * block_m;
    const Sequence seq(p, ptr, tile / m_tiles / p.heads_q);
    const int64_t nq = std::min(block_m, seq.seqlen_q - m0);
    if (nq <= 0) return;
    Scratch<T> scratch(2 * p.head_dim_v);
    T *o = scratch.take(p.head_dim_v), *dout = scratch.take(p.head_dim_v);
    for (int64_t q = 0; q < nq; ++q) {
      load_row<T>(p.dtype, static_cast<const char*>(ptr.o) + seq.q_offset(p.o, h, m0 + q) * bytes(),
                  p.head_dim_v, o);
      load_row<T>(p.dtype,
                  static_cast<const char*>(ptr.dout) + seq.q_offset(p.dout, h, m0 + q) * bytes(),
                  p.head_dim_v, dout);
      T sum = 0;
      for (int64_t d = 0; d < p.head_dim_v; ++d) sum += o[d] * dout[d];
      if (ptr.dlse) sum -= static_cast<const T*>(ptr.dlse)[seq.lse_offset(h, m0 + q)];
      delta[tile * block_m + q] = sum;
    }
    int64_t t0, t1;
    key_tiles(seq, m0, nq, &t0, &t1);
    if (ptr.dq) tickets[tile].store(int32_t(t0), std::memory_order_relaxed);
  }

  void key_block(int64_t b, int64_t hk, int64_t t) {
    const Sequence seq(p, ptr, b);
    const int64_t n0 = t * kBackwardKeys, nk = std::min(kBackwardKeys, seq.seqlen_k - n0);
    if (nk <= 0) return;
    Scratch<T> scratch(kMaxQueries *
                           (p.head_dim + p.head_dim_v + 5 * kBackwardKeys + d_pad + dv_pad + 1) +
                       kBackwardKeys * (p.head_dim + p.head_dim_v + d_pad + dv_pad) +
                       std::max(p.head_dim, p.head_dim_v) * 2);
    T* K_scratch = scratch.take(kBackwardKeys * p.head_dim);
    T* V_scratch = scratch.take(kBackwardKeys * p.head_dim_v);
    T* dK = scratch.take(kBackwardKeys * d_pad);
    T* dV = scratch.take(kBackwardKeys * dv_pad);
    std::fill(dK, dK + kBackwardKeys * d_pad, T(0));
    std::fill(dV, dV + kBackwardKeys * dv_pad, T(0));
    const Rows<T> K = key_rows(seq, ptr.k, p.k, hk, n0, nk, p.head_dim, K_scratch);
    const Rows<T> V = key_rows(seq, ptr.v, p.v, hk, n0, nk, p.head_dim_v, V_scratch);
    const bool finite = all_finite(K, nk, p.head_dim) && all_finite(V, nk, p.head_dim_v);

    const size_t mark = scratch.used();
    for (int64_t h = hk * group; h < (hk + 1) * group; ++h)
      for (int64_t m = 0; m < m_tiles; ++m) {
        const int64_t m0 = m * block_m, nq = std::min(block_m, seq.seqlen_q - m0);
        if (nq <= 0) break;
        int64_t t0, t1;
        key_tiles(seq, m0, nq, &t0, &t1);
        if (t < t0 || t >= t1) continue;
        scratch.rewind(mark);
        tile_pair(seq, h, m, nq, t, nk, K, V, finite, t1 - t0 == 1, dK, dV, scratch);
      }
    store_rows(seq, ptr.dk, p.dk, hk, n0, nk, p.head_dim, d_pad, dK, T(p.scale));
    store_rows(seq, ptr.dv, p.dv, hk, n0, nk, p.head_dim_v, dv_pad, dV, T(1));
  }

  void tile_pair(const Sequence& seq, int64_t h, int64_t m, int64_t nq, int64_t t, int64_t nk,
                 Rows<T> K, Rows<T> V, bool finite, bool whole_rows, T* dK, T* dV,
                 Scratch<T>& scratch) {
    const int64_t m0 = m * block_m, n0 = t * kBackwardKeys;
    const int64_t unit = (seq.b * p.heads_q + h) * m_tiles + m;
    T* Qt = scratch.take(p.head_dim * kMaxQueries);
    T* dOt = scratch.take(p.head_dim_v * kMaxQueries);
    T* Q = scratch.take(d_pad * kMaxQueries);
    T* dO = scratch.take(dv_pad * kMaxQueries);
    T* P = scratch.take(kBackwardKeys * kMaxQueries);
    T* dP = scratch.take(kBackwardKeys * kMaxQueries);
    T* add = scratch.take(kBackwardKeys * kMaxQueries);
    T* keep = scratch.take(kBackwardKeys * kMaxQueries);
    T* dcap = p.softcap > 0 ? scratch.take(kBackwardKeys * kMaxQueries) : nullptr;
    T* lse = scratch.take(kMaxQueries);
    const ScoreTile<T> tile(seq, h, m0, nq, add, keep);
    pack(ptr.q, seq.q_offset(p.q, h, m0), p.q.s, nq, tile.bm, p.head_dim, d_pad, Q, Qt);
    pack(ptr.dout, seq.q_offset(p.dout, h, m0), p.dout.s, nq, tile.bm, p.head_dim_v, dv_pad, dO,
         dOt);
    // A NaN query has dS = NaN at each key it sees; 0 * NaN must not reach dK of the others.
    for (int64_t i = 0; i < tile.bm * d_pad; ++i) Q[i] = Q[i] - Q[i] == T(0) ? Q[i] : T(0);
    for (int64_t q = 0; q < tile.bm; ++q)  // padding lanes: P = 0
      lse[q] = q < nq ? static_cast<const T*>(ptr.lse)[seq.lse_offset(h, m0 + q)]
                      : -std::numeric_limits<T>::infinity();

    // S^T = K Q^T, dP^T = V dO^T   [nk, bm]
    gemm<T>(nk, tile.bm, p.head_dim, K.data, K.stride, 1, Qt, kMaxQueries, P, kMaxQueries, false);
    gemm<T>(nk, tile.bm, p.head_dim_v, V.data, V.stride, 1, dOt, kMaxQueries, dP, kMaxQueries,
            false);
    tile.logits(n0, nk, P, dcap);
    const T* kept = p.dropout_p > 0 ? tile.keep(n0, nk) : nullptr;
    T* row_delta = delta.data() + unit * block_m;
    if (whole_rows) exact_delta(seq, h, m0, nq, tile.bm, nk, lse, kept, P, dP, row_delta);
    softmax_gradient(nk, tile.bm, lse, row_delta, kept, P, dP);
    if (ptr.dbias) add_bias_gradient(seq, h, m0, nq, n0, nk, dP);
    if (dcap)
      for (int64_t i = 0; i < nk * kMaxQueries; ++i)  // dcap is NaN where an excluded K is
        dP[i] = dP[i] == T(0) ? T(0) : dP[i] * dcap[i];

    // dV += P^T dO   [nk, dv],  dK += dS^T Q   [nk, d]
    if (ptr.dv) gemm<T>(nk, dv_pad, tile.bm, P, kMaxQueries, 1, dO, dv_pad, dV, dv_pad, true);
    if (ptr.dk) gemm<T>(nk, d_pad, tile.bm, dP, kMaxQueries, 1, Q, d_pad, dK, d_pad, true);
    if (!ptr.dq) return;
    // dQ^T += K^T dS^T   [d, bm], after all earlier key blocks have added theirs
    while (tickets[unit].load(std::memory_order_acquire) != t) std::this_thread::yield();
    T* dq = dQt.data() + unit * p.head_dim * block_m;
    if (finite || !tile.partial(n0, nk))
      gemm<T>(p.head_dim, tile.bm, nk, K.data, 1, K.stride, dP, kMaxQueries, dq, block_m, true);
    else
      add_visible(K, dP, nk, nq, dq);
    tickets[unit].store(int32_t(t + 1), std::memory_order_release);
  }

  // delta = rowsum(P * dP) - dLSE where one tile holds all keys of the rows.  rowsum(dO * O) is the
  // same but for the rounding of O to 16 bits, which shows where a row has few keys and dS nearly
  // cancels.
  void exact_delta(const Sequence& seq, int64_t h, int64_t m0, int64_t nq, int64_t bm, int64_t nk,
                   const T* lse, const T* kept, const T* S, const T* dP, T* row_delta) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < bm; q += kLanes<T>) {
      Vec<T> sum{};
      const Vec<T> row_lse = load(lse + q);
      for (int64_t j = 0; j < nk; ++j) {
        const int64_t at = j * kMaxQueries + q;
        Vec<T> w = vexp(load(S + at) - row_lse);
        w = row_lse == ninf ? Vec<T>{} : w;
        Vec<T> g = load(dP + at) * w;
        if (kept) g *= load(kept + at);
        sum += w == T(0) ? Vec<T>{} : g;
      }
      for (int i = 0; i < kLanes<T> && q + i < nq; ++i) {
        const T dlse =
            ptr.dlse ? static_cast<const T*>(ptr.dlse)[seq.lse_offset(h, m0 + q + i)] : T(0);
        row_delta[q + i] = sum[i] - dlse;
      }
    }
  }

  // P: logits in, dropped-out weights out.  dP in, dS out.
  void softmax_gradient(int64_t nk, int64_t bm, const T* lse, const T* delta_row, const T* kept,
                        T* P, T* dP) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t q = 0; q < bm; q += kLanes<T>) {
      const Vec<T> row_lse = load(lse + q), row_delta = load(delta_row + q);
      for (int64_t j = 0; j < nk; ++j) {
        const int64_t at = j * kMaxQueries + q;
        const Vec<T> s = load(P + at);
        Vec<T> w = vexp(s - row_lse);
        w = s == ninf ? Vec<T>{} : w;        // also where LSE is NaN
        w = row_lse == ninf ? Vec<T>{} : w;  // empty rows
        Vec<T> g = load(dP + at);
        Vec<T> dropped = w;
        if (kept) {
          g *= load(kept + at);
          dropped *= load(kept + at);
        }
        g = w * (g - row_delta);
        g = w == T(0) ? Vec<T>{} : g;  // an excluded V may hold NaN
        store(P + at, dropped);
        store(dP + at, g);
      }
    }
  }

  // Over the pairs with dS != 0: what an excluded row of K holds never reaches dQ.
  void add_visible(Rows<T> K, const T* dS, int64_t nk, int64_t nq, T* dq) const {
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
        load_row<T>(p.dtype, static_cast<const char*>(base) + (offset + q * stride) * bytes(), dim,
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
      store_row<T>(p.dtype, row, dim,
                   static_cast<char*>(base) + seq.k_offset(s, hk, n0 + j) * bytes());
    }
  }

  void store_dq(int64_t tile) const {
    const int64_t h = tile / m_tiles % p.heads_q, m0 = tile % m_tiles * block_m;
    const Sequence seq(p, ptr, tile / m_tiles / p.heads_q);
    Scratch<T> scratch(p.head_dim);
    T* row = scratch.take(p.head_dim);
    const T* dq = dQt.data() + tile * p.head_dim * block_m;
    for (int64_t q = 0; q < std::min(block_m, seq.seqlen_q - m0); ++q) {
      for (int64_t d = 0; d < p.head_dim; ++d) row[d] = T(p.scale) * dq[d * block_m + q];
      store_row<T>(p.dtype, row, p.head_dim,
                   static_cast<char*>(ptr.dq) + seq.q_offset(p.dq, h, m0 + q) * bytes());
    }
  }

  // dsink[h] = -sum over rows of exp(sink - LSE) * delta; one head a task, rows in order
  void sink_gradient(int64_t h) const {
    const double sink = static_cast<const T*>(ptr.sink)[h];
    double sum = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const Sequence seq(p, ptr, b);
      for (int64_t i = 0; i < seq.seqlen_q; ++i) {
        const double lse = static_cast<const T*>(ptr.lse)[seq.lse_offset(h, i)];
        const int64_t unit = (b * p.heads_q + h) * m_tiles + i / block_m;
        if (lse != -std::numeric_limits<double>::infinity())
          sum -= std::exp(sink - lse) * double(delta[unit * block_m + i % block_m]);
      }
    }
    static_cast<T*>(ptr.dsink)[h] = T(sum);
  }
};
