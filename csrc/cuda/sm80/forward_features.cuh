// The forward of forward_plain.cuh for calls with mask, bias, ALiBi, soft cap, sink, dropout or
// statistics in 16 bits, compiled for exactly the features of a call (features.h).
//
// The same tiles and the same order of copies and products.  What is added to a whole tile: mask
// and bias, 4 keys a load, asked for before S is computed; the logits of S; dropout of P.  Rows of
// K and V lie in shared memory in the order InFours (smem.cuh).  No tile is looked at for NaN: what
// a NaN behind an excluded pair leaves is computed once more (repair.cuh).
#pragma once
#include "../dropout.cuh"
#include "../side.cuh"
#include "forward_plain.cuh"

namespace attn::cuda::sm80 {

template <int HEAD_DIM, int BITS>
using FeatureTileOf = FeatureForwardTile<HEAD_DIM, may_have<BITS>(kMask) && may_have<BITS>(kBias)>;

template <class T, int HEAD_DIM, int BITS>
struct FeatureForward : PlainForward<T, HEAD_DIM, FeatureTileOf<HEAD_DIM, BITS>, InFours> {
  using Base = PlainForward<T, HEAD_DIM, FeatureTileOf<HEAD_DIM, BITS>, InFours>;
  using Base::BYTES, Base::F, Base::M, Base::N, Base::TILES;
  using Base::p, Base::seq, Base::task, Base::turns, Base::state, Base::O;
  using typename Base::Stream;
  using typename Base::Tile;
  using Scores = float[F][TILES][4];
  using Sides = Side<T, BITS>[F][TILES / 2][2];

  // Logits are products times p.scale_log2; else they are computed, in natural units.
  static constexpr bool PRODUCTS = !(BITS & (kAny | kBias | kAlibi | kSoftcap | kScale));
  static constexpr bool FAR = may_have<BITS>(kBias);  // a row may need another unit than log2(e)
  // How many of a tile's 16 keys have their masks and biases asked for before S is computed; the
  // rest after: all of them would take 48 registers.
  static constexpr int EARLY = TILES / 4;
  // Where the rows of masks or biases begin lies in shared memory, not in registers.
  static constexpr bool STORES_ROWS =
      Side<T, BITS>::VECTORS && row_address_bytes(HEAD_DIM, BITS) > 0;
  static constexpr float GROWTH = 8.0f;  // as in WholeSoftmax
  static constexpr float LOWEST = FAR ? kFinfoMin : -3.4e38f;

  Dropout dropout;
  HeadTerms<float> head;
  Query query[F][2];
  using SideRows = typename Side<T, BITS>::Row[F][2];
  SideRows side_rows;
  float row_unit[FAR ? F : 1][2];
  float edges_sum[F][2] = {};  // of the tiles at edges, in the loop over the others (WholeSoftmax)

  ATTN_DEVICE FeatureForward(const Params& params, const Score& score, const QueryTask& t,
                             const Turns& order)
      : Base(params, t, order),
        dropout(Dropout::of(params, score.seq)),
        head(HeadTerms<float>::of(params.ptr, score.seq, t.head, 1.0f)) {
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      query[f][r] = score.query(t.head, min_int(this->row(f) + 8 * r, t.rows - 1));
      if constexpr (Side<T, BITS>::VECTORS)
        side_rows[f][r] = Side<T, BITS>::Row::of(params, query[f][r], first_key(0, 0));
      state[f].max[r] = LOWEST;  // the base of the exponentials, in the row's unit
      if (FAR) row_unit[f][r] = 1.0f;
    }
    if constexpr (STORES_ROWS) store_rows_of_sides();
  }
  // What a logit is multiplied by before the base is taken from it.
  ATTN_DEVICE float unit(int f, int r) const {
    if constexpr (FAR) return row_unit[f][r];
    return PRODUCTS ? p.scale_log2 : kLog2e;
  }
  // The first of this thread's 4 keys in 16 of a tile.
  ATTN_DEVICE static int first_key(int n0, int m) { return n0 + 16 * m + 4 * (lane_id() & 3); }

  // 32 bytes of each thread, in two pieces 128 bytes apart, as its chunks of a row of TileStream:
  // so they have one register for their address.
  ATTN_DEVICE static uint32_t row_addresses() {
    return tile_address<T, HEAD_DIM>(Base::flags(), thread_id() / 8, thread_id() % 8);
  }
  ATTN_DEVICE void store_rows_of_sides() const {
    static_assert(F == 2 && 16 * BYTES == row_address_bytes(HEAD_DIM, BITS));
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      const uint64_t a = side_rows[f][0].address(), b = side_rows[f][1].address();
      sts_128(row_addresses() + 128 * f,
              {uint32_t(a), uint32_t(a >> 32), uint32_t(b), uint32_t(b >> 32)});
    }
  }
  // Where the masks and biases begin in this thread's rows, if VECTORS.
  ATTN_DEVICE void find_sides(SideRows& rows, uint32_t addresses) const {
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      if constexpr (STORES_ROWS) {
        const U32x4 at = lds_128(addresses + 128 * f);
        rows[f][0] = Side<T, BITS>::Row::of_address(at.x, at.y);
        rows[f][1] = Side<T, BITS>::Row::of_address(at.z, at.w);
      } else if constexpr (Side<T, BITS>::VECTORS) {
        rows[f][0] = side_rows[f][0], rows[f][1] = side_rows[f][1];
      }
    }
  }
  ATTN_DEVICE void load_sides(Sides& sides, const SideRows& rows, int n0, int first,
                              int last) const {
    ATTN_UNROLL
    for (int m = first; m < last; ++m) ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      if constexpr (Side<T, BITS>::VECTORS)
        sides[f][m][r].load(rows[f][r], n0 + 16 * m);
      else
        sides[f][m][r].load(p, query[f][r], first_key(n0, m));
    }
  }
  // The logit of a product.
  ATTN_DEVICE float logit(float product, const Query& q, int j, const Side<T, BITS>& side,
                          int e) const {
    if constexpr (PRODUCTS)
      return product;
    else
      return attn::logit<NaturalWays>(
          terms_of_logits<BITS>(p), p.natural, head, product,
          [&] { return float(q.i + seq.past() - j); }, [&] { return side.bias_of(e); },
          [](float) {});
  }
  // S: products in, logits out; -inf where a pair does not count.
  ATTN_DEVICE void logits(Scores& S, const Sides& sides, int n0) const {
    ATTN_UNROLL
    for (int m = 0; m < TILES / 2; ++m) ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      float& s = S[f][2 * m + e / 2][2 * r + e % 2];
      s = logit(s, query[f][r], first_key(n0, m) + e, sides[f][m][r], e);
    }
    if (!has<BITS>(p, kMask)) return;
    // Bytes are 0 or 1: of a row's words one, whose bits become predicates many at a time.
    constexpr uint32_t ALL = ((1u << TILES / 2) - 1) * 0x01010101u;
    uint32_t bits[F][2], common = ALL;
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      bits[f][r] = 0;
      ATTN_UNROLL
      for (int m = TILES / 2 - 1; m >= 0; --m) bits[f][r] = 2 * bits[f][r] + sides[f][m][r].mask;
      common &= bits[f][r];
    }
    if (!ballot(common != ALL)) return;  // most masks keep all of most tiles
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) ATTN_UNROLL
    for (int e = 0; e < 4; ++e) ATTN_UNROLL
    for (int m = 0; m < TILES / 2; ++m) {
      float& s = S[f][2 * m + e / 2][2 * r + e % 2];
      if (!(bits[f][r] & (1u << (8 * e + m)))) s = -kInf;
    }
  }
  // The same at an edge, where a pair must be within length and band.
  ATTN_DEVICE void edge_logits(Scores& S, const Band& band, int n0) const {
    ATTN_UNROLL
    for (int m = 0; m < TILES / 2; ++m) ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      const Query& q = query[f][r];
      Side<T, BITS> side;
      side.load_some(p, q, first_key(n0, m), seq.seqlen_k);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int j = first_key(n0, m) + e;
        float& s = S[f][2 * m + e / 2][2 * r + e % 2];
        s = logit(s, q, j, side, e);
        const bool keeps = !has<BITS>(p, kMask) || side.keeps(e);
        if (!(keeps && j < seq.seqlen_k && band.keep(q.i, j))) s = -kInf;
      }
    }
  }

  // Moves the bases, and rescales O, where a logit has grown too large for one; with statistics
  // where it has grown at all, so that the base is the largest logit.
  ATTN_DEVICE void follow(const Scores& S) {
    float top[F][2];
    bool grown = false;
    const float growth = has<BITS>(p, kStats) ? 0.0f : GROWTH;
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      top[f][r] = S[f][0][2 * r];
      ATTN_UNROLL
      for (int n = 0; n < TILES; ++n)
        top[f][r] = fmaxf(top[f][r], fmaxf(S[f][n][2 * r], S[f][n][2 * r + 1]));
      top[f][r] = quad_max(top[f][r]);
      grown |= fmaf(top[f][r], unit(f, r), -state[f].max[r]) > growth;
    }
    if (!ballot(grown)) return;
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) move(f, r, top[f][r]);
  }
  ATTN_DEVICE void move(int f, int r, float top) {
    const float before = state[f].max[r];
    if (!(fmaf(top, unit(f, r), -before) > 0.0f)) return;
    bool other_unit = false;
    if constexpr (FAR) {
      const float now = is_far_logit(top) ? 1.0f : kLog2e;
      other_unit = now != row_unit[f][r];
      row_unit[f][r] = now;
    }
    const float base = top * unit(f, r), shift = other_unit ? -kInf : before - base;
    const float alpha = exp2_approx(shift);
    state[f].max[r] = base;
    if (has<BITS>(p, kStats)) {
      const float sum = state[f].sum[r] + edges_sum[f][r];
      state[f].weighted[r] = alpha * (state[f].weighted[r] + fmaxf(shift, -kFar) * sum);
    }
    state[f].sum[r] *= alpha, edges_sum[f][r] *= alpha;
    ATTN_UNROLL
    for (int n = 0; n < Base::ACC; ++n) O[f][n][2 * r] *= alpha, O[f][n][2 * r + 1] *= alpha;
  }
  // S: logits in, weights out; those of dropped pairs are 0 (1 / (1 - p) comes with the
  // normalisation).
  ATTN_DEVICE void weights(Scores& S, int n0) {
    const uint32_t least = dropout.least_word();
    ATTN_UNROLL
    for (int m = 0; m < TILES / 2; ++m) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      uint32_t words[4] = {};
      if (has<BITS>(p, kDropout)) dropout.words(task.head, query[f][r].i, first_key(n0, m), words);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& s = S[f][2 * m + e / 2][2 * r + e % 2];
        const float x = fmaf(s, unit(f, r), -state[f].max[r]), weight = exp2_approx(x);
        if (has<BITS>(p, kStats)) state[f].weighted[r] += x == -kInf ? 0.0f : weight * x;
        state[f].sum[r] += weight;
        s = has<BITS>(p, kDropout) && words[e] < least ? 0.0f : weight;
      }
    }
  }
  // From bases to what store_rows() takes: -inf where no key counts, and finfo.min as it is there.
  // True where the rounding of a base counts (warp_finds_huge).
  ATTN_DEVICE bool finish() {
    bool huge = false;
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      state[f].sum[r] += edges_sum[f][r];
      if (quad_sum(state[f].sum[r]) == 0.0f)
        state[f].max[r] = -kInf;
      else if (FAR && unit(f, r) == 1.0f)
        state[f].max[r] = far_base(state[f].max[r]);
      else
        huge |= rounds_away(state[f].max[r]);
    }
    return repairs() && ballot(huge) != 0;
  }

  ATTN_DEVICE void edge(const Band& band, int turn) {
    const int n0 = turns.tile(turn) * N;
    Scores S;
    cp_async_wait<0>();
    sync_threads();  // K of this turn is complete, and every warp has read V of the turn before
    this->copy_V(turn);
    multiply_rows<T, HEAD_DIM>(S, Base::Q_smem(), Base::warp_row(), Base::K_smem());
    cp_async_wait<0>();
    sync_threads();  // V is complete, and every warp has read K
    if (turn + 1 < turns.count()) this->copy_K(turn + 1);
    edge_logits(S, band, n0);
    follow(S);
    weights(S, n0);
    accumulate_rows<T, HEAD_DIM>(O, S, Base::V_smem());
  }
  // Tiles within length and band, from `turn` to the last.
  ATTN_DEVICE void whole(int turn) {
    int left = turns.count() - turn, n0 = turns.tile(turn) * N;
    Stream next_V(Base::V_smem(), this->V, n0, int(p.p.head_dim_v));
    Stream next_K(Base::K_smem(), this->K, n0 + N, int(p.p.head_dim));
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) ATTN_UNROLL
    for (int r = 0; r < 2; ++r) edges_sum[f][r] = state[f].sum[r], state[f].sum[r] = 0.0f;
    if constexpr (STORES_ROWS) {  // one register for these three
      next_V.to = opaque(next_V.to);
      next_K.to = next_V.to - (Base::V_smem() - Base::K_smem());
    }
    ATTN_NO_UNROLL
    for (; left > 0; --left, n0 += N) {
      Scores S;
      Sides sides;
      SideRows rows;
      cp_async_wait<0>();
      sync_threads();  // K of this turn is complete, and every warp has read V of the turn before
      next_V.copy();
      cp_async_commit();
      find_sides(rows, next_V.to + (Base::flags() - Base::V_smem()));
      load_sides(sides, rows, n0, 0, EARLY);
      // S = Q K^T   [WARP_ROWS, BLOCK_N] a warp
      multiply_rows<T, HEAD_DIM>(S, Base::Q_smem(), Base::warp_row(), Base::K_smem());
      cp_async_wait<0>();
      sync_threads();  // V is complete, and every warp has read K
      if (left > 1) next_K.copy();
      cp_async_commit();
      load_sides(sides, rows, n0, EARLY, TILES / 2);
      logits(S, sides, n0);
      follow(S);
      weights(S, n0);
      // O += P V   [WARP_ROWS, Dv] a warp
      accumulate_rows<T, HEAD_DIM>(O, S, Base::V_smem());
    }
  }

  ATTN_DEVICE void store() {
    bool bad = finish();
    ATTN_UNROLL
    for (int f = 0; f < F; ++f) {
      bad |= warp_finds_nan(O[f]);
      store_rows<T, BITS, false>(p, task, O[f], state[f], query[f], this->row(f), 1.0f);
    }
    if (!bad) return;
    ATTN_NO_UNROLL
    for (int f = 0; f < F; ++f)
      each_row(task.row0 + Base::warp_row() + 16 * f, task.rows,
               [&](int i) { Repair<T, HEAD_DIM, BITS>{p, seq}.output(task.head, i); });
  }
};

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((FeatureTileOf<HEAD_DIM, BITS>::THREADS), 1)
void forward_features(ATTN_GRID_CONSTANT const Params p) {
  using Kernel = FeatureForward<T, HEAD_DIM, BITS>;
  const QueryTask task = QueryTask::of<BITS>(p, Kernel::M);
  if (task.row0 < 0) return;  // packed: a number that stands for no tile
  const Score score(p, task.seq);
  Turns turns = Turns::of(score.band, task.row0, task.end, task.seq.seqlen_k, Kernel::N);
  // rows that come element by element are not for the fast loop
  if (!(p.k_vec && p.v_vec)) turns.whole_first = turns.whole_end = turns.end;

  Kernel mine(p, score, task, turns);
  mine.copy_queries();
  if (turns.count()) mine.copy_K(0);
  ATTN_NO_UNROLL
  for (int turn = 0; turn < turns.edges(); ++turn) mine.edge(score.band, turn);
  if (turns.edges() < turns.count()) mine.whole(turns.edges());
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  mine.store();
}

}  // namespace attn::cuda::sm80
