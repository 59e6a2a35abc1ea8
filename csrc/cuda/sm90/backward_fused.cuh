// dQ, dK and dV in one kernel on Hopper: backward_dkdv.cuh, and dQ of each tile of queries, added
// up in global memory.  Five products of tiles where two kernels need seven.  The order of the
// additions to dQ, and with it the last bits, is not said but with kOrdered, of deterministic
// calls.
//
// dS goes from registers to shared memory as [query][key], by stmatrix, a slab of 64 keys a
// warpgroup.  When both are there, dQ = dS K, both operands from shared memory, and the fragments
// of dQ go to a staging buffer that the copy engine adds to the sums:
//   sums [tiles of 64 queries, by their numbers][HEAD_DIM / 8][128 threads][4], float, fragments
// as they are.  convert_dq makes dQ of them.
//
// With kOrdered there are two words behind the sums for each tile, and one more (SumOrder).  A tile
// gets its sums by ascending blocks of keys: a CTA adds where the word says that the block before
// has added, and says so itself once its own addition is there.  CTAs take their blocks from a
// counter, the last word, so that what a CTA waits for has begun before it, whatever the order of
// CTAs. Queries come from the last tile to the first: under a causal band a CTA then meets no tile
// that a longer one has not long left, and where all begin with one tile each is a turn behind the
// last.
#pragma once
#include "../query_sums.cuh"
#include "backward_dkdv.cuh"

namespace attn::cuda::sm90 {

// The words behind the sums: of a tile of queries, for each warpgroup that adds to it (0 alone
// where they take turns), 1 + the block of keys that was added last; then the next block to begin.
struct SumOrder {
  int* words;
  int64_t tiles;

  ATTN_DEVICE static SumOrder of(const Params& p, int head_dim) {
    const int64_t tiles = p.p.heads_q * p.m_tiles * (p.ptr.cu_seqlens_q ? 1 : p.p.batch);
    return {reinterpret_cast<int*>(p.dq_sums + tiles * (64 * head_dim)), tiles};
  }
  ATTN_DEVICE int* word(int64_t tile, int group) const { return words + 2 * tile + group; }
  ATTN_DEVICE int* next() const { return words + 2 * tiles; }
};

// KeyGradients or what has features: P and dS of a tile, dV and dK.
template <class T, class Tile, class Base = KeyGradients<T, Tile>>
struct FusedGradients : Base {
  static constexpr int M = Tile::BLOCK_M, TILES = Base::TILES, ACC = Base::ACC;
  static constexpr int SUM_TILES = Tile::SUM_TILES, SLAB = Tile::BLOCK_N * 128;
  static constexpr int BOTH = 3;  // the named barrier of both consumers
  static constexpr int BITS = Tile::BITS;
  using Base::dK, Base::dV, Base::group, Base::key, Base::score, Base::smem;
  uint32_t columns = 0;  // wgmma_word of the slab of K that gives its columns of dQ

  ATTN_DEVICE uint32_t scores_at(int turn) const {
    return smem.extra + uint32_t(turn % 2) * 2 * Tile::SCORE_BYTES;
  }
  ATTN_DEVICE uint32_t staging() const {
    return smem.extra + 4 * Tile::SCORE_BYTES + uint32_t(group) * Tile::SUM_BYTES;
  }
  // A word that says whether K of this CTA holds NaN or infinities; no register is left for it.
  ATTN_DEVICE uint32_t bad_keys() const { return smem.extra + Tile::WORDS + 4 * uint32_t(group); }
  // kOrdered: 1 + the word of the tile that this warpgroup has added to and not released, or 0.
  ATTN_DEVICE uint32_t unreleased() const { return bad_keys() + 8; }
  ATTN_DEVICE void look_at_keys() const {
    const bool bad = warpgroup_finds_nonfinite<T, Tile::KEY_BYTES>(smem.K, group);
    if (issues()) sts_32(bad_keys(), bad);
    group == 0 ? named_barrier_sync<1>(128) : named_barrier_sync<2>(128);  // it is there
  }
  // The columns of dQ that this warpgroup computes: K from this slab on, and whether in this turn.
  ATTN_DEVICE int column_slab() const { return Tile::BY_COLUMNS ? group : 0; }
  static constexpr bool ALWAYS = Tile::BY_COLUMNS || Tile::BY_ROWS;
  ATTN_DEVICE bool computes(int turn) const { return ALWAYS || turn % 2 == group; }
  // The first of the 64 queries of a tile whose dQ this warpgroup computes.
  ATTN_DEVICE int first_query() const { return Tile::BY_ROWS ? 64 * group : 0; }
  ATTN_DEVICE bool issues() const { return thread_id() % 128 == 0; }

  // dS of this warpgroup's keys as [query][key]: a fragment of dS^T is four tiles of 8 x 8, which
  // stmatrix turns over.  first: query of the tile.
  ATTN_DEVICE void store_scores(const uint32_t (&dS)[TILES / 2][4], int turn, int first) const {
    const int lane = lane_id(), chunk = 2 * (warp_id() % 4) + (lane >> 3 & 1);
    const int row = first + (lane >> 4) * 8 + (lane & 7);
    const uint32_t at = scores_at(turn) + uint32_t(group) * Tile::SCORE_BYTES +
                        uint32_t(row * 128 + ((chunk ^ (lane & 7)) << 4));
    ATTN_UNROLL
    for (int step = 0; step < TILES / 2; ++step) stmatrix_x4_trans(at + step * 16 * 128, dS[step]);
    fence_proxy_async();  // wgmma reads it
  }
  // dS of both warpgroups is there, and the staging buffer may be written again.
  ATTN_DEVICE void meet() const {
    if (issues()) finish_addition();
    named_barrier_sync<BOTH>(256);
  }

  // ---- by the thread that issues
  ATTN_DEVICE int block() const { return key / Tile::BLOCK_N; }
  // The staging buffer has been read; with kOrdered it is added, and the next block may add.
  ATTN_DEVICE void finish_addition() const {
    const Params& p = score.p;
    if (!has<BITS>(p, kOrdered)) return bulk_wait_read<0>();
    const uint32_t word = lds_32(unreleased());
    if (word == 0) return;
    bulk_wait<0>();
    store_release(SumOrder::of(p, Tile::HEAD_DIM).words + (word - 1), block() + 1);
    sts_32(unreleased(), 0);
  }
  // Until the block of keys before, if it sees queries of this tile, has added.
  ATTN_DEVICE void wait_for_turn(const int* word, int m0) const {
    const int n0 = block() * Tile::BLOCK_N;
    int lo, hi;
    score.band.query_range(n0 - Tile::BLOCK_N, n0, score.seq.seqlen_q, lo, hi);
    if (n0 == 0 || hi <= lo || m0 >= hi || m0 + M <= lo) return;
    for (int asked = 0; load_acquire(word) != block(); ++asked)
      ATTN_CHECK(asked < ATTN_CUDA_DEBUG, "a block of keys never adds to dQ", n0, m0);
  }

  // dQ = dS K   [64, 8 * SUM_TILES], K [BLOCK_N, ..] read across.  Issued.
  ATTN_DEVICE void issue_queries(float (&dQ)[SUM_TILES][4], int turn) const {
    const uint64_t dS = wgmma_operand(wgmma_word(scores_at(turn) + first_query() * 128), 0);
    const uint64_t K = wgmma_operand(wgmma_held(columns), 0, SLAB);
    ATTN_UNROLL
    for (int step = 0; step < Tile::BLOCK_N / 16; ++step)
      wgmma_ss<T, true>(dQ, wgmma_moved(dS, step / 4 * Tile::SCORE_BYTES + step % 4 * 32),
                        wgmma_moved(K, step * 2048), step > 0);
    wgmma_commit();
  }
  // The same key by key, only where dS != 0.  Slow.
  ATTN_DEVICE void visible_queries(float (&dQ)[SUM_TILES][4], int turn) const {
    const int lane = lane_id(), row = first_query() + 16 * (warp_id() % 4) + (lane >> 2);
    ATTN_UNROLL
    for (int n = 0; n < SUM_TILES; ++n) dQ[n][0] = dQ[n][1] = dQ[n][2] = dQ[n][3] = 0.0f;
    ATTN_NO_UNROLL
    for (int j = 0; j < Tile::BLOCK_N; ++j) {
      const uint32_t dS = scores_at(turn) + j / 64 * Tile::SCORE_BYTES +
                          uint32_t(row * 128 + ((j % 64 / 8 ^ (row & 7)) << 4) + j % 8 * 2);
      const float weight[2] = {to_float(T{lds_16(dS)}), to_float(T{lds_16(dS + 8 * 128)})};
      const uint32_t K = smem.K + column_slab() * SLAB + uint32_t(j * 128 + 4 * (lane & 3));
      ATTN_UNROLL
      for (int n = 0; n < SUM_TILES; ++n) {
        const uint32_t word = lds_32(K + n / 8 * SLAB + uint32_t((n % 8 ^ (j & 7)) << 4));
        ATTN_UNROLL
        for (int r = 0; r < 2; ++r)
          if (weight[r] != 0.0f) {
            dQ[n][2 * r] = fmaf(weight[r], unpack_lo<T>(word), dQ[n][2 * r]);
            dQ[n][2 * r + 1] = fmaf(weight[r], unpack_hi<T>(word), dQ[n][2 * r + 1]);
          }
      }
    }
  }
  // dQ to the staging buffer, and from there to the sums of this tile.
  ATTN_DEVICE void add_queries(const float (&dQ)[SUM_TILES][4], int head, int m0) const {
    m0 += first_query();
    if (Tile::BY_ROWS && m0 >= score.seq.seqlen_q) return;  // there are no sums
    const uint32_t at = staging() + uint32_t(thread_id() % 128) * 16;
    ATTN_UNROLL
    for (int n = 0; n < SUM_TILES; ++n)
      sts_128(at + n * 128 * 16,
              {as_uint(dQ[n][0]), as_uint(dQ[n][1]), as_uint(dQ[n][2]), as_uint(dQ[n][3])});
    fence_proxy_async();  // the copy engine reads it
    group == 0 ? named_barrier_sync<1>(128) : named_barrier_sync<2>(128);  // all of dQ is there
    if (!issues()) return;
    const Params& p = score.p;
    const int64_t tile = sum_tile(p, score.seq, head) + m0 / 64;
    if (has<BITS>(p, kOrdered)) {
      const SumOrder order = SumOrder::of(p, Tile::HEAD_DIM);
      int* const word = order.word(tile, Tile::BY_COLUMNS ? group : 0);
      wait_for_turn(word, m0);
      fence_proxy_async_global();  // the copy engine adds behind what the wait has seen
      sts_32(unreleased(), uint32_t(word - order.words) + 1);
    }
    bulk_add(p.dq_sums + tile * (64 * Tile::HEAD_DIM) + column_slab() * (Tile::SUM_BYTES / 4),
             staging(), Tile::SUM_BYTES);
    bulk_commit();
  }

  ATTN_DEVICE void edge(int turn, int head, int m0) {
    float dQ[SUM_TILES][4];
    ATTN_NO_UNROLL
    for (int half = 0; half < Base::HALVES; ++half) {
      float dP[TILES][4];
      uint32_t dS[TILES / 2][4];
      this->edge_scores(dP, turn, m0 + 64 * half, half);
      pack_weights<T>(dS, dP);
      store_scores(dS, turn, 64 * half);
      const uint32_t Q = smem.Q.tile(turn) + uint32_t(half * Base::HALF);
      add_product<T, Base::HALF>(dK, dP, Q, true, group);
    }
    smem.Q.release(turn);
    meet();
    if (!computes(turn)) return;
    if (lds_32(bad_keys())) {
      visible_queries(dQ, turn);
    } else {
      wgmma_fence();
      issue_queries(dQ, turn);
      wgmma_wait<0>();
      wgmma_hold(dQ);
    }
    add_queries(dQ, head, m0);
  }

  ATTN_DEVICE void whole(int turn, int head, int m0) {
    float dQ[SUM_TILES][4];
    uint32_t P[Base::HALVES][TILES / 2][4], dS[Base::HALVES][TILES / 2][4];
    const uint32_t tile = smem.queries(turn);
    ATTN_UNROLL
    for (int half = 0; half < Base::HALVES; ++half) {
      const uint32_t queries = this->queries_of(tile, half);
      this->whole_scores(P[half], dS[half], turn, m0 + 64 * half, queries, half);
      store_scores(dS[half], turn, 64 * half);
      this->key_sums(dS[half], queries);
    }
    meet();
    if constexpr (ALWAYS) {
      wgmma_fence();
      issue_queries(dQ, turn);
      wgmma_wait<1>();  // dV and dK are there
    } else {
      wgmma_wait<0>();  // dV and dK are there
    }
    wgmma_hold(dV);
    wgmma_hold(dK);
    ATTN_UNROLL
    for (int half = 0; half < Base::HALVES; ++half) {
      wgmma_hold(P[half]);  // the tensor cores have read them only now
      wgmma_hold(dS[half]);
    }
    smem.Q.release(turn);
    smem.dO.release(turn);
    if (!computes(turn)) return;
    if constexpr (!ALWAYS) {
      wgmma_fence();
      issue_queries(dQ, turn);
    }
    wgmma_wait<0>();  // dQ is there
    wgmma_hold(dQ);
    add_queries(dQ, head, m0);
  }
};

template <class T, class Tile, class Base = KeyGradients<T, Tile>>
ATTN_DEVICE void consume_all(const Params& p, const KeyTask& task, const KeyMemory<Tile>& smem) {
  constexpr int M = Tile::BLOCK_M, BITS = Base::BITS;
  const int group = warp_id() / 4 - 1, first_key = task.n0 + 64 * group;
  const int key = first_key + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, task.seq);
  FusedGradients<T, Tile, Base> mine{
      {score, smem, key, group, wgmma_word(smem.K + group * 64 * 128)}};
  mine.columns = wgmma_word(smem.K + mine.column_slab() * mine.SLAB);
  if (has<BITS>(p, kOrdered) && mine.issues()) sts_32(mine.unreleased(), 0);
  WholeTiles whole = WholeTiles::of(score, first_key, first_key + 64, M);
  if (task.tiles) {
    mbarrier_wait(smem.keys_full, 0);
    mine.look_at_keys();
    // dQ is of the keys of both: what the other warpgroup excludes must not reach it either.
    if (lds_32(mine.bad_keys())) whole = WholeTiles::of(score, task.n0, task.n0 + Tile::BLOCK_N, M);
  }
  each_query_tile<Tile>(p, task, [&](int turn, int h, int m0) {
    const int head = task.head_k * p.group + h;
    mine.begin(head);
    whole.has(m0) ? mine.whole(turn, head, m0) : mine.edge(turn, head, m0);
  });
  if (mine.issues()) mine.finish_addition();  // shared memory must last until it is read
  const bool bad = warp_finds_nan(mine.dK) || warp_finds_nan(mine.dV);
  store_keys<T>(p, task, p.ptr.dk, p.p.dk, mine.dK, key, p.scale, p.p.head_dim);
  const float factor = has<BITS>(p, kDropout) ? p.keep_scale : 1.0f;
  store_keys<T>(p, task, p.ptr.dv, p.p.dv, mine.dV, key, factor, p.p.head_dim_v);
  if (bad)
    repair_keys<T, Tile::HEAD_DIM, BITS>(p, task, first_key + 16 * (warp_id() % 4), true, true);
}

template <class T, int HEAD_DIM>
ATTN_KERNEL(THREADS, 1)
void backward_fused(ATTN_GRID_CONSTANT const BackwardParams x) {
  using Tile = PlainFusedTile<HEAD_DIM>;
  run_plain_key_task<Tile>(x, [&](const KeyTask& task, const KeyMemory<Tile>& smem) {
    consume_all<T>(x.p, task, smem);
  });
}

// sums = 0, and the words of their order, one CTA a tile of 64 queries.
template <class T, int HEAD_DIM>
ATTN_KERNEL(128)
void clear_dq(ATTN_GRID_CONSTANT const Params p) {
  clear_sums<HEAD_DIM>(p);
  if (!p.p.deterministic || thread_id() > 2) return;
  const SumOrder order = SumOrder::of(p, HEAD_DIM);
  if (thread_id() < 2) *order.word(block_id().x, thread_id()) = 0;
  if (thread_id() == 2 && block_id().x == 0) *order.next() = 0;
}

// dQ = scale * sums, one CTA a tile of 64 queries.
template <class T, int HEAD_DIM, int BITS>
ATTN_DEVICE void convert_fused_sums(const Params& p) {
  convert_sums<T, HEAD_DIM, BITS>(p, [](const float* sums, float (&acc)[HEAD_DIM / 8][4]) {
    sums += 4 * thread_id();
    ATTN_UNROLL
    for (int n = 0; n < HEAD_DIM / 8; ++n) {
      const U32x4 v = ldg_128(sums + n * 128 * 4);
      acc[n][0] = as_float(v.x), acc[n][1] = as_float(v.y);
      acc[n][2] = as_float(v.z), acc[n][3] = as_float(v.w);
    }
  });
}
template <class T, int HEAD_DIM>
ATTN_KERNEL(128)
void convert_dq(ATTN_GRID_CONSTANT const Params p) {
  convert_fused_sums<T, HEAD_DIM, 0>(p);
}

}  // namespace attn::cuda::sm90
