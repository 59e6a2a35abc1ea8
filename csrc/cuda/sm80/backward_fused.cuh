// dQ, dK and dV of a call in one kernel, compiled for exactly its features (features.h): five
// products of tiles where two kernels need seven (FlashAttention-2, Dao 2023).  dQ is added up in
// float32 in global memory by atomics: the order of the additions, and with it the last bits, is
// not said (deterministic: backward_plain.cuh, with features backward.cuh).
//
// One CTA = BLOCK_N keys of one K/V head, to which the queries of its group come, BLOCK_M at a
// time.
//   S = Q K^T, dP = dO V^T   [BLOCK_M, BLOCK_N]  a warp: half of the queries, 32 keys
//   dV += P^T dO, dK += dS^T Q  [BLOCK_N, D] a warp: 32 keys, half of the columns
//   dQ = dS K                [BLOCK_M, D]    a warp: QUERY_ROWS queries, QUERY_COLUMNS columns
// P and dS go from one layout to the other through shared memory, as [query][key].
//   sums [tiles of 64 queries, by their numbers][HEAD_DIM / 8][4][128 threads], float: fragments,
//   so that the lanes of an addition are neighbours.  convert_dq makes dQ of them.
// No tile is looked at for NaN: what 0 * NaN leaves is computed once more (repair.cuh).
// It is a long file because plain calls and calls with features share every step of one kernel.
#pragma once
#include "../mma_across.cuh"
#include "../query_sums.cuh"
#include "../side.cuh"
#include "rows.cuh"

namespace attn::cuda::sm80 {

template <class T, int HEAD_DIM, int BLOCK_M, int BITS = 0, int BLOCK_N = 128>
struct FusedBackward {
  using Tile = FusedBackwardTile<HEAD_DIM, BLOCK_M, BLOCK_N>;
  static constexpr int M = Tile::BLOCK_M, N = Tile::BLOCK_N, THREADS = Tile::THREADS;
  static constexpr int BYTES = Row<T, HEAD_DIM>::BYTES, SCORE_BYTES = Row<T, N>::BYTES;
  static constexpr int QUERY_BYTES = M * BYTES, KEY_BYTES = N * BYTES;
  // with features a thread has 4 keys in a row (smem.cuh)
  using Order = std::conditional_t<BITS != 0, InFours, InOrder>;
  // columns of dK and dV, rows and columns of dQ that a warp has
  static constexpr int KEY_COLUMNS = HEAD_DIM / 2;
  static constexpr int QUERY_WARPS = M == 64 && 2 * HEAD_DIM / Tile::WARPS % 16 == 0 ? 2 : 4;
  static constexpr int QUERY_ROWS = M / QUERY_WARPS;
  static constexpr int QUERY_COLUMNS = HEAD_DIM * QUERY_WARPS / Tile::WARPS;
  static constexpr int SF = M / 32, QF = QUERY_ROWS / 16, QT = QUERY_COLUMNS / 8,
                       KT = KEY_COLUMNS / 8;

  static constexpr int DOUT_BUFFERS =
      Tile::DOUT_BUFFERS;  // of one, dO is copied once all have read it

  // LSE and delta come a value a thread, by an address that the thread keeps; where registers are
  // few, as with 128 queries or with a mask or a bias at 128 columns, two values a thread.
  static constexpr bool KEEPS_ROW_VALUES =
      M == 64 && !(HEAD_DIM == 128 && may_have<BITS>(kMask | kBias));

  const Params& p;
  const Sequence& seq;
  const Score score;
  int head_k, n0, n1;
  const float* my_row_values;  // what this thread copies of the first queries of head 0
  float dK[2][KT][4] = {}, dV[2][KT][4] = {};

  ATTN_DEVICE FusedBackward(const Params& params, const Sequence& s, int head, int first)
      : p(params),
        seq(s),
        score(params, s),
        head_k(head),
        n0(first),
        n1(min_int(first + N, s.seqlen_k)),
        my_row_values(KEEPS_ROW_VALUES ? all_row_values() + s.lse_offset(params, 0, thread_id() % M)
                                       : nullptr) {}

  ATTN_DEVICE static uint32_t K_smem() { return smem_base(); }
  ATTN_DEVICE static uint32_t V_smem() { return K_smem() + KEY_BYTES; }
  // [2][Q, dO] or [2][Q], dO
  ATTN_DEVICE static uint32_t Q_smem(int stage) {
    return V_smem() + KEY_BYTES + uint32_t(stage) * DOUT_BUFFERS * QUERY_BYTES;
  }
  ATTN_DEVICE static uint32_t dO_smem(int stage) {
    return DOUT_BUFFERS == 2 ? Q_smem(stage) + QUERY_BYTES : Q_smem(2);
  }
  ATTN_DEVICE static uint32_t P_smem() { return Q_smem(0) + (2 + DOUT_BUFFERS) * QUERY_BYTES; }
  ATTN_DEVICE static uint32_t dS_smem() { return P_smem() + M * SCORE_BYTES; }
  ATTN_DEVICE static uint32_t rows_smem() {
    return dS_smem() + M * SCORE_BYTES;
  }  // [2][LSE, delta]
  ATTN_DEVICE static int query_row() { return M / 2 * (warp_id() & 1); }  // of S and dP
  ATTN_DEVICE static int key_row() { return 32 * (warp_id() >> 1); }      // of S, dP, dK and dV
  ATTN_DEVICE static int key_column() { return KEY_COLUMNS * (warp_id() & 1); }
  ATTN_DEVICE static int dq_row() { return QUERY_ROWS * (warp_id() % QUERY_WARPS); }
  ATTN_DEVICE static int dq_column() { return QUERY_COLUMNS * (warp_id() / QUERY_WARPS); }

  ATTN_DEVICE void copy_keys() const {
    const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, head_k, sizeof(T));
    const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, head_k, sizeof(T));
    const int dim = int(p.p.head_dim), dim_v = int(p.p.head_dim_v);
    copy_tile<T, HEAD_DIM, N, THREADS, false, Order>(K_smem(), K, n0, n1, dim, p.k_vec);
    copy_tile<T, HEAD_DIM, N, THREADS, false, Order>(V_smem(), V, n0, n1, dim_v, p.v_vec);
  }
  // Q, LSE and delta of queries m0.. of a head into buffer `stage`, and dO where it has two.
  ATTN_DEVICE void copy_queries(const Rows& Q, const Rows& dO, int head, int m0, int stage) const {
    const int dim = int(p.p.head_dim);
    if (m0 + M <= seq.seqlen_q && p.q_vec && p.dout_vec) {
      TileStream<T, HEAD_DIM, M, THREADS>(Q_smem(stage), Q, m0, dim).copy();
      if (DOUT_BUFFERS == 2) copy_whole_dout(dO, m0, stage);
    } else {
      copy_tile<T, HEAD_DIM, M, THREADS, false>(Q_smem(stage), Q, m0, seq.seqlen_q, dim, p.q_vec);
      if (DOUT_BUFFERS == 2) copy_some_dout(dO, m0, stage);
    }
    copy_row_values(head, m0, stage);
    if (DOUT_BUFFERS == 2) cp_async_commit();
  }
  ATTN_DEVICE const float* all_row_values() const {
    return thread_id() < M ? static_cast<const float*>(p.ptr.lse) : p.delta;
  }
  ATTN_DEVICE void copy_row_values(int head, int m0, int stage) const {
    const int mine = KEEPS_ROW_VALUES ? thread_id() % M : thread_id();
    const bool valid = m0 + mine < seq.seqlen_q;
    const uint32_t to = rows_smem() + 4 * uint32_t(2 * M * stage + thread_id());
    if constexpr (KEEPS_ROW_VALUES) {
      if (thread_id() >= 2 * M) return;
      const float* from = my_row_values + (head * p.p.lse_stride_h + m0);
      cp_async_4(to, valid ? from : my_row_values, valid);
    } else if (thread_id() < M) {
      const int64_t at = seq.lse_offset(p, head, m0);  // of queries that are there alone it is read
      cp_async_4(to, static_cast<const float*>(p.ptr.lse) + at + thread_id(), valid);
      cp_async_4(to + 4 * M, p.delta + at + thread_id(), valid);
    }
  }
  ATTN_DEVICE void copy_whole_dout(const Rows& dO, int m0, int stage) const {
    TileStream<T, HEAD_DIM, M, THREADS>(dO_smem(stage), dO, m0, int(p.p.head_dim_v)).copy();
  }
  ATTN_DEVICE void copy_some_dout(const Rows& dO, int m0, int stage) const {
    copy_tile<T, HEAD_DIM, M, THREADS, false>(dO_smem(stage), dO, m0, seq.seqlen_q,
                                              int(p.p.head_dim_v), p.dout_vec);
  }
  // The same of dO alone, where it has one buffer.
  ATTN_DEVICE void copy_dout(const Rows& dO, int m0) const {
    if (m0 + M <= seq.seqlen_q && p.dout_vec)
      copy_whole_dout(dO, m0, 0);
    else
      copy_some_dout(dO, m0, 0);
    cp_async_commit();
  }

  // P: products in, weights out.  EDGE: some pair does not count.
  template <bool EDGE>
  ATTN_DEVICE void weigh(float (&P)[SF][4][4], int m0, int stage) const {
    ATTN_UNROLL
    for (int f = 0; f < SF; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = query_row() + 16 * f + 8 * r + (lane_id() >> 2);
      const float value = lds_f32(rows_smem() + 4 * uint32_t(2 * M * stage + row));
      // -inf in a tile that the row sees whole: every logit is, which leaves NaN for the repair
      const float lse = EDGE ? RowGradient::of(value, 0.0f).lse : value * kLog2e;
      ATTN_UNROLL
      for (int n = 0; n < 4; ++n) ATTN_UNROLL
      for (int c = 2 * r; c < 2 * r + 2; ++c) {
        P[f][n][c] = exp2_approx(fmaf(P[f][n][c], p.scale_log2, -lse));
        const int i = m0 + row, j = n0 + key_row() + 8 * n + 2 * (lane_id() & 3) + (c & 1);
        if (EDGE && !(j < seq.seqlen_k && i < seq.seqlen_q && score.band.keep(i, j)))
          P[f][n][c] = 0.0f;
      }
    }
  }
  // dP in, dS out.
  template <bool EDGE>
  ATTN_DEVICE void differentiate(float (&dS)[SF][4][4], const float (&P)[SF][4][4],
                                 int stage) const {
    ATTN_UNROLL
    for (int f = 0; f < SF; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = query_row() + 16 * f + 8 * r + (lane_id() >> 2);
      const float delta = lds_f32(rows_smem() + 4 * uint32_t(2 * M * stage + M + row));
      ATTN_UNROLL
      for (int n = 0; n < 4; ++n) ATTN_UNROLL
      for (int c = 2 * r; c < 2 * r + 2; ++c)  // not P * (..) where P = 0: V there may hold NaN
        dS[f][n][c] = EDGE && P[f][n][c] == 0.0f ? 0.0f : P[f][n][c] * (dS[f][n][c] - delta);
    }
  }

  // ---- with features
  // Products are logits but for p.scale_log2; else they are computed, in natural units.
  static constexpr bool PRODUCTS = !(BITS & (kAny | kBias | kAlibi | kSoftcap | kScale));
  static constexpr bool CAPPED = may_have<BITS>(kSoftcap), DROPS = may_have<BITS>(kDropout);
  static constexpr bool BIAS_GRADIENT = may_have<BITS>(kBiasGradient);
  using Sides = Side<T, BITS>[SF][2][2];        // [..][16 keys][row]
  using Slopes = float[CAPPED ? SF : 1][4][4];  // of the soft cap
  ATTN_DEVICE static int score_row(int f, int r) {
    return query_row() + 16 * f + 8 * r + (lane_id() >> 2);
  }
  // The first of this thread's 4 keys among 16.
  ATTN_DEVICE int first_key(int m) const { return n0 + key_row() + 16 * m + 4 * (lane_id() & 3); }

  ATTN_DEVICE void load_sides(Sides& sides, int head, int m0) const {
    ATTN_UNROLL
    for (int f = 0; f < SF; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Query q = score.query(head, m0 + score_row(f, r));
      ATTN_UNROLL
      for (int m = 0; m < 2; ++m) sides[f][m][r].load(p, q, first_key(m));
    }
  }
  // The weight of a product in a tile that its row sees whole; lse: in units of log2(e).
  ATTN_DEVICE float weight(float product, const HeadTerms<float>& terms, int i, int j,
                           const Side<T, BITS>& side, int e, float lse, float& slope) const {
    float weight;
    if constexpr (PRODUCTS) {
      weight = exp2_approx(fmaf(product, p.scale_log2, -lse));
    } else {
      const float s = attn::logit<NaturalWays>(
          terms_of_logits<BITS>(p), p.natural, terms, product,
          [&] { return float(i + seq.past() - j); }, [&] { return side.bias_of(e); },
          [&](float d) { slope = d; });
      weight = exp2_approx(fmaf(s, kLog2e, -lse));
    }
    if (has<BITS>(p, kMask) && !side.keeps(e)) return 0.0f;
    // what is NaN of a hidden pair is computed once more, but not for the gradient of the bias
    return has<BITS>(p, kBiasGradient) && side.bias_of(e) == -kInf ? 0.0f : weight;
  }
  // P: products in, weights out, below 0 where dropout takes them.  slopes: of the soft cap.  Tiles
  // at an edge go pair by pair.
  template <bool EDGE>
  ATTN_DEVICE void weigh_features(float (&P)[SF][4][4], Slopes& slopes, const Sides& sides,
                                  int head, int m0, int stage) const {
    const auto terms = HeadTerms<float>::of(p.ptr, seq, head, 1.0f);
    const Dropout dropout = Dropout::of(p, seq);
    const uint32_t least = dropout.least_word();
    float lse[SF][2];
    ATTN_UNROLL
    for (int f = 0; f < SF; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float value = lds_f32(rows_smem() + 4 * uint32_t(2 * M * stage + score_row(f, r)));
      lse[f][r] = RowGradient::of(value, 0.0f).lse;
    }
    const auto each_four = [&](const auto& use) {
      ATTN_UNROLL
      for (int f = 0; f < SF; ++f) ATTN_UNROLL
      for (int r = 0; r < 2; ++r) ATTN_UNROLL
      for (int m = 0; m < 2; ++m) use(f, r, m);
    };
    if constexpr (EDGE) {
      each_four([&](int f, int r, int m) {
        const Query q = score.query(head, m0 + score_row(f, r));
        ATTN_UNROLL
        for (int e = 0; e < 4; ++e) {
          float &x = P[f][2 * m + e / 2][2 * r + e % 2], slope;
          const float s = score.template logit<BITS>(x, q, first_key(m) + e, slope);
          x = s == -kInf ? 0.0f : exp2_approx(s - lse[f][r]);
          if (CAPPED) slopes[f][2 * m + e / 2][2 * r + e % 2] = slope;
        }
      });
    } else {
      each_four([&](int f, int r, int m) {
        const int i = m0 + score_row(f, r);
        ATTN_UNROLL
        for (int e = 0; e < 4; ++e) {
          float &x = P[f][2 * m + e / 2][2 * r + e % 2], slope = 1.0f;
          x = weight(x, terms, i, first_key(m) + e, sides[f][m][r], e, lse[f][r], slope);
          if (CAPPED) slopes[f][2 * m + e / 2][2 * r + e % 2] = slope;
        }
      });
    }
    if (!has<BITS>(p, kDropout)) return;
    each_four([&](int f, int r, int m) {
      uint32_t words[4];
      dropout.words(head, m0 + score_row(f, r), first_key(m), words);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& x = P[f][2 * m + e / 2][2 * r + e % 2];
        x = words[e] < least ? -x : x;
      }
    });
  }
  // dP in, dS out.
  template <bool EDGE>
  ATTN_DEVICE void differentiate_features(float (&dS)[SF][4][4], const float (&P)[SF][4][4],
                                          int stage) const {
    ATTN_UNROLL
    for (int f = 0; f < SF; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float delta = lds_f32(rows_smem() + 4 * uint32_t(2 * M * stage + M + score_row(f, r)));
      ATTN_UNROLL
      for (int n = 0; n < 4; ++n) ATTN_UNROLL
      for (int c = 2 * r; c < 2 * r + 2; ++c) {  // not P * (..) where P = 0: V there may hold NaN
        const float weight = P[f][n][c], dP = dS[f][n][c];
        float kept = !DROPS ? dP - delta : fmaf(dP, weight > 0.0f ? p.keep_scale : 0.0f, -delta);
        // nor 0 * dP: no one computes the gradient of the bias once more
        if (DROPS && BIAS_GRADIENT && weight < 0.0f) kept = -delta;
        dS[f][n][c] = (EDGE || BIAS_GRADIENT) && weight == 0.0f ? 0.0f : fabsf(weight) * kept;
      }
    }
  }
  // The gradient of the bias += dS.
  template <bool EDGE>
  ATTN_DEVICE void add_bias_gradient(const float (&dS)[SF][4][4], int head, int m0) const {
    const ScoreStrides& s = p.p.dbias;
    float* first = static_cast<float*>(p.ptr.dbias) +
                   (seq.b * s.b + head * s.h + (m0 + score_row(0, 0)) * s.q + first_key(0));
    ATTN_UNROLL
    for (int f = 0; f < SF; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      float* row = first + (16 * f + 8 * r) * s.q;
      if (EDGE && m0 + score_row(f, r) >= seq.seqlen_q) continue;
      ATTN_UNROLL
      for (int m = 0; m < 2; ++m) ATTN_UNROLL
      for (int e = 0; e < 4; ++e)
        if (!EDGE || first_key(m) + e < seq.seqlen_k)
          atomic_add_global(row + (16 * m + e), dS[f][2 * m + e / 2][2 * r + e % 2]);
    }
  }

  // S or dP of a warp -> [query][key]
  template <bool ABOVE_ZERO = false>  // 0 for what is below
  ATTN_DEVICE static void store_scores(uint32_t tile, const float (&C)[SF][4][4]) {
    const auto stored = [](float x) { return ABOVE_ZERO ? fmaxf(x, 0.0f) : x; };
    const int row = query_row() + (lane_id() >> 2);
    ATTN_UNROLL
    for (int n = 0; n < 4; ++n) {
      const uint32_t at = tile_address<T, N>(tile, row, key_row() / 8 + n) + 4 * (lane_id() & 3);
      ATTN_UNROLL
      for (int f = 0; f < SF; ++f) ATTN_UNROLL
      for (int r = 0; r < 2; ++r)  // rows that are a multiple of 8 apart have the same swizzle
        sts_32(at + (16 * f + 8 * r) * SCORE_BYTES,
               pack<T>(stored(C[f][n][2 * r]), stored(C[f][n][2 * r + 1])));
    }
  }

  ATTN_DEVICE void add_queries(const float (&dQ)[QF][QT][4], int head, int m0) const {
    // a tile of 64 queries behind the last one has no sums
    if (M > 64 && m0 + dq_row() / 64 * 64 >= seq.seqlen_q) return;
    // with 64 queries the warp's rows lie in their tile; without features to say so costs slots
    const int row = M > 64 || BITS == 0 ? m0 + dq_row() : m0;
    const int64_t tile = sum_tile(p, seq, head) + row / 64;
    float* sums = p.dq_sums + tile * (64 * HEAD_DIM) +
                  uint32_t(64 * dq_column() + 2 * (dq_row() % 64) + lane_id());
    ATTN_UNROLL
    for (int f = 0; f < QF; ++f) ATTN_UNROLL
    for (int n = 0; n < QT; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) atomic_add_global(sums + (512 * n + 128 * c + 32 * f), dQ[f][n][c]);
  }

  // Queries m0.. of a head, which are in buffer `stage`; next_dout(): copies those behind them,
  // where dO has one buffer.
  template <bool EDGE, class Copy>
  ATTN_DEVICE void tile(int head, int m0, int stage, const Copy& next_dout) {
    const uint32_t Q = Q_smem(stage), dO = dO_smem(stage);
    float P[SF][4][4], dS[SF][4][4];
    // S = Q K^T, dP = dO V^T   [M / 2, 32] a warp
    if constexpr (BITS == 0) {
      multiply_rows<T, HEAD_DIM>(P, Q, query_row(), K_smem() + key_row() * BYTES);
      weigh<EDGE>(P, m0, stage);
      store_scores(P_smem(), P);
      multiply_rows<T, HEAD_DIM>(dS, dO, query_row(), V_smem() + key_row() * BYTES);
      differentiate<EDGE>(dS, P, stage);
    } else {
      Sides sides;
      Slopes slopes;
      if (!EDGE) load_sides(sides, head, m0);
      multiply_rows<T, HEAD_DIM>(P, Q, query_row(), K_smem() + key_row() * BYTES);
      weigh_features<EDGE>(P, slopes, sides, head, m0, stage);
      store_scores<DROPS>(P_smem(), P);
      if constexpr (CAPPED) {
        ATTN_UNROLL
        for (int f = 0; f < SF; ++f) ATTN_UNROLL
        for (int x = 0; x < 16; ++x) P[f][x / 4][x % 4] *= slopes[f][x / 4][x % 4];
      }
      multiply_rows<T, HEAD_DIM>(dS, dO, query_row(), V_smem() + key_row() * BYTES);
      differentiate_features<EDGE>(dS, P, stage);
      if (has<BITS>(p, kBiasGradient)) add_bias_gradient<EDGE>(dS, head, m0);
    }
    store_scores(dS_smem(), dS);
    sync_threads();  // P and dS of every warp are there
    // dV += P^T dO   [32, KEY_COLUMNS] a warp
    add_across<T, N, HEAD_DIM, M / 16>(dV, P_smem(), key_row(), dO, key_column());
    if constexpr (DOUT_BUFFERS == 1) {
      sync_threads();  // every warp has read dO
      next_dout();
    }
    // dQ = dS K   [QUERY_ROWS, QUERY_COLUMNS] a warp
    float dQ[QF][QT][4] = {};
    add_along<T, N, HEAD_DIM>(dQ, dS_smem(), dq_row(), K_smem(), dq_column());
    add_queries(dQ, head, m0);
    // dK += dS^T Q
    add_across<T, N, HEAD_DIM, M / 16>(dK, dS_smem(), key_row(), Q, key_column());
  }

  ATTN_DEVICE void store() {
    bool bad = false;
    const float factor = has<BITS>(p, kDropout) ? p.keep_scale : 1.0f;
    ATTN_UNROLL
    for (int f = 0; f < 2; ++f) {
      bad |= warp_finds_nan(dK[f]) || warp_finds_nan(dV[f]);
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const int j = n0 + key_row() + Order::key(16 * f + 8 * r + (lane_id() >> 2));
        if (j >= seq.seqlen_k) continue;
        if (p.ptr.dk) store_columns(p.ptr.dk, p.p.dk, j, dK[f], r, p.scale, int(p.p.head_dim));
        if (p.ptr.dv) store_columns(p.ptr.dv, p.p.dv, j, dV[f], r, factor, int(p.p.head_dim_v));
      }
    }
    sync_threads();  // the other half of these rows' columns is stored, too
    if (!bad) return;
    ATTN_NO_UNROLL
    for (int f = 0; f < 2; ++f)
      each_row(n0 + key_row() + 16 * f, seq.seqlen_k, [&](int j) {
        Repair<T, HEAD_DIM, BITS>{p, seq}.key_gradients(head_k, j, true, true);
      });
  }
  ATTN_DEVICE void store_columns(void* base, const Strides& s, int j, const float (&acc)[KT][4],
                                 int r, float factor, int dim) const {
    const int64_t row = seq.b * s.b + head_k * s.h + (seq.k_start + j) * s.s;
    store_result<T, BITS>(p, base, row + key_column(), acc, r, factor, dim - key_column());
  }
};

template <class T, int HEAD_DIM, int BLOCK_M, int BITS, int BLOCK_N = 128>
ATTN_DEVICE void run_fused_backward(const Params& p) {
  using Kernel = FusedBackward<T, HEAD_DIM, BLOCK_M, BITS, BLOCK_N>;
  constexpr int M = Kernel::M;
  const TileOf x = key_numbers(p, Kernel::N).find(block_id().x);
  const Sequence seq = Sequence::of<BITS>(p, x.b);
  const int n0 = x.tile * Kernel::N, head_k = x.head;
  if (n0 >= seq.seqlen_k) return;  // a shorter cache, or packed: a number that stands for no tile
  Kernel mine(p, seq, head_k, n0);
  const Band& band = mine.score.band;
  int lo, hi;
  band.query_range(mine.n0, mine.n1, seq.seqlen_q, lo, hi);
  const int first = lo / M * M;  // the first query of each head's tiles

  // What is copied next: queries m of head h.
  int h = head_k * p.group, m = first;
  const int h_end = lo < hi ? h + p.group : h;
  Rows Q{}, dO{};
  const auto take_head = [&] {
    Q = query_rows(p, seq, p.ptr.q, p.p.q, h, sizeof(T));
    dO = query_rows(p, seq, p.ptr.dout, p.p.dout, h, sizeof(T));
  };
  mine.copy_keys();
  if (h < h_end) {
    take_head();
    mine.copy_queries(Q, dO, h, m, 0);
    if (Kernel::DOUT_BUFFERS == 1) mine.copy_dout(dO, m);
  }
  const auto next_dout = [&] {
    if (h < h_end) mine.copy_dout(dO, m);
  };
  ATTN_NO_UNROLL
  for (int stage = 0; h < h_end; stage ^= 1) {
    const int head = h, m0 = m;
    m += M;
    if (m >= hi) {
      m = first, ++h;
      if (h < h_end) take_head();
    }
    cp_async_wait<0>();
    sync_threads();  // this tile is complete, and every warp is done with P, dS and the tile before
    if (h < h_end) mine.copy_queries(Q, dO, h, m, stage ^ 1);
    if (m0 + M > seq.seqlen_q || mine.n0 + Kernel::N > seq.seqlen_k ||
        !band.full(m0, m0 + M, mine.n0, mine.n1))
      mine.template tile<true>(head, m0, stage, next_dout);
    else
      mine.template tile<false>(head, m0, stage, next_dout);
  }
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  mine.store();
}

template <class T, int HEAD_DIM, int BLOCK_M>
ATTN_KERNEL((FusedBackwardTile<HEAD_DIM, BLOCK_M>::THREADS), 1)
void backward_fused(ATTN_GRID_CONSTANT const Params p) {
  run_fused_backward<T, HEAD_DIM, BLOCK_M, 0>(p);
}
template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((FusedBackwardTile<HEAD_DIM, 64>::THREADS), 1)
void backward_features(ATTN_GRID_CONSTANT const Params p) {
  run_fused_backward<T, HEAD_DIM, 64, BITS>(p);
}
// The same with 64 keys a CTA, where shared memory has no room for 128.
template <class T, int HEAD_DIM>
ATTN_KERNEL((FusedBackwardTile<HEAD_DIM, 64, 64>::THREADS), 1)
void backward_fused_half(ATTN_GRID_CONSTANT const Params p) {
  run_fused_backward<T, HEAD_DIM, 64, 0, 64>(p);
}
template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((FusedBackwardTile<HEAD_DIM, 64, 64>::THREADS), 1)
void backward_features_half(ATTN_GRID_CONSTANT const Params p) {
  run_fused_backward<T, HEAD_DIM, 64, BITS, 64>(p);
}

// sums = 0, one CTA a tile of 64 queries.
template <class T, int HEAD_DIM>
ATTN_KERNEL(128)
void clear_dq(ATTN_GRID_CONSTANT const Params p) {
  clear_sums<HEAD_DIM>(p);
}

// dQ = scale * sums, one CTA a tile of 64 queries.
template <class T, int HEAD_DIM, int BITS>
ATTN_DEVICE void convert_fused_sums(const Params& p) {
  convert_sums<T, HEAD_DIM, BITS>(p, [](const float* sums, float (&acc)[HEAD_DIM / 8][4]) {
    sums += thread_id();
    ATTN_UNROLL
    for (int n = 0; n < HEAD_DIM / 8; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) acc[n][c] = sums[n * 512 + 128 * c];
  });
}
template <class T, int HEAD_DIM>
ATTN_KERNEL(128)
void convert_dq(ATTN_GRID_CONSTANT const Params p) {
  convert_fused_sums<T, HEAD_DIM, 0>(p);
}
template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL(128)
void convert_dq_features(ATTN_GRID_CONSTANT const Params p) {
  convert_fused_sums<T, HEAD_DIM, BITS>(p);
}

}  // namespace attn::cuda::sm80
