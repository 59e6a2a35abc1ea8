// dV = P^T dO and dK = scale * dS^T Q on Hopper, for the calls of forward.cuh.  Q, dO [B, Hq, Sq, D
// or Dv], K, V, dK, dV [B, Hk, Sk, D or Dv].
//
// One CTA = BLOCK_N keys of one K/V head, three warpgroups.  A producer thread has the copy engine
// bring K and V, then tiles of Q and dO, head after head of the group, through rings; another warp
// of that warpgroup brings LSE and delta.  The two consumers compute S^T = K Q^T and dP^T = V dO^T
// by wgmma from shared memory; P and dS are A operands where they lie, of dV += P^T dO and dK +=
// dS^T Q.  Who does what: KeyGradientTile in tiles.h.
#pragma once
#include "backward_parts.cuh"

namespace attn::cuda::sm90 {

// The keys of a CTA and the tiles of queries that see some of them.
struct KeyTask {
  int head_k, n0, first, tiles;  // tiles: of one head, from tile `first` on
  Sequence seq;

  // number: of the CTA.
  ATTN_DEVICE static KeyTask of(const Params& p, int block_m, int block_n, int number) {
    const TileOf x = key_numbers(p, block_n).find(number);
    KeyTask t{x.head, x.tile * block_n, 0, 0, Sequence::of(p, x.b)};
    const Sequence& seq = t.seq;
    int lo, hi;
    Band::of(p, seq).query_range(t.n0, min_int(t.n0 + block_n, seq.seqlen_k), seq.seqlen_q, lo, hi);
    t.first = lo / block_m;
    t.tiles = hi > lo ? ceil_div(hi, block_m) - t.first : 0;
    return t;
  }
};

// Addresses in shared memory.
template <class Tile>
struct KeyMemory {
  uint32_t K, V, extra, rows, keys_full;
  Ring<STAGES> Q, dO;  // Q's full mbarrier stands for LSE and delta too

  ATTN_DEVICE static KeyMemory of(uint32_t base) {
    KeyMemory m;
    m.K = base, m.V = m.K + Tile::KEY_BYTES;
    const uint32_t Q_smem = m.V + Tile::KEY_BYTES, dO_smem = Q_smem + STAGES * Tile::QUERY_BYTES;
    m.extra = dO_smem + STAGES * Tile::QUERY_BYTES;
    m.rows = m.extra + Tile::EXTRA_BYTES;
    m.keys_full = m.rows + STAGES * Tile::ROW_BYTES;
    m.Q = {Q_smem, m.keys_full + 8, Tile::QUERY_BYTES};
    m.dO = {dO_smem, m.keys_full + 8 + RING_BARS, Tile::QUERY_BYTES};
    return m;
  }
  ATTN_DEVICE void init() const {
    mbarrier_init(keys_full, 1);
    Q.init(2);  // the copy engine's thread, and the warp of LSE and delta
    dO.init();
  }
  // LSE [BLOCK_M] and delta [BLOCK_M] of the tile whose turn it is.
  ATTN_DEVICE uint32_t lse(int turn) const {
    return rows + uint32_t(turn % STAGES) * Tile::ROW_BYTES;
  }
  ATTN_DEVICE uint32_t delta(int turn) const { return lse(turn) + 4 * Tile::BLOCK_M; }
  // wgmma_word of Q of this turn; dO lies further on by OUTPUT bytes, V behind K by KEY_BYTES.
  ATTN_DEVICE uint32_t queries(int turn) const { return wgmma_word(Q.tile(turn)); }
  static constexpr uint32_t OUTPUT = STAGES * Tile::QUERY_BYTES;
};

// Where LSE and delta of query r of a tile lie: what a thread needs of two neighbouring tiles of 8
// queries, 2 t + {0, 1} and 8 + 2 t + {0, 1}, is 16 bytes.
ATTN_DEVICE uint32_t row_place(int r) {
  return 4 * uint32_t((r & ~15) | (r & 6) << 1 | (r & 8) >> 2 | (r & 1));
}
// Those of queries 16 pair .. + 15 that meet this thread's columns of tiles 2 pair and + 1.
struct RowValues {
  float tile[2][2];
  ATTN_DEVICE static RowValues of(uint32_t rows, int pair) {
    const U32x4 v = lds_128(rows + uint32_t(16 * (lane_id() & 3)) + uint32_t(64 * pair));
    return {{{as_float(v.x), as_float(v.y)}, {as_float(v.z), as_float(v.w)}}};
  }
};

// P^T in place of S^T   [64 keys, BLOCK_M]: keys `key` and key + 8 of this thread, queries m0..
template <int TILES>
ATTN_DEVICE void key_weights(float (&S)[TILES][4], const Score& score, uint32_t lse, int key,
                             int m0, bool edge) {
  ATTN_UNROLL
  for (int pair = 0; pair < TILES / 2; ++pair) {
    const RowValues row = RowValues::of(lse, pair);
    ATTN_UNROLL
    for (int n = 0; n < 2; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c) {
      float& s = S[2 * pair + n][c];
      s = weight_of(s, score.p.scale_log2, row.tile[n][c & 1]);
    }
  }
  if (edge) mask_weights(S, {Columns::of_key(score, key, m0), Columns::of_key(score, key + 8, m0)});
}

// dS^T in place of dP^T.
template <bool EDGE, int TILES>
ATTN_DEVICE void key_gradients(float (&dP)[TILES][4], const float (&P)[TILES][4], uint32_t delta) {
  ATTN_UNROLL
  for (int pair = 0; pair < TILES / 2; ++pair) {
    const RowValues row = RowValues::of(delta, pair);
    ATTN_UNROLL
    for (int n = 2 * pair; n < 2 * pair + 2; ++n) ATTN_UNROLL
    for (int c = 0; c < 4; ++c)
      dP[n][c] = gradient_of<EDGE>(P[n][c], dP[n][c], row.tile[n & 1][c & 1]);
  }
}

// acc += C B   [64, HEAD_DIM], C [64, 8 * TILES] in registers, B: its address; until it is there.
// DROPS: of pack_pair().
template <class T, int TILE_BYTES, bool DROPS = false, int TILES, int ACC>
ATTN_DEVICE void add_product(float (&acc)[ACC][4], const float (&C)[TILES][4], uint32_t B,
                             bool edge, int group) {
  if (edge && warpgroup_finds_nonfinite<T, TILE_BYTES>(B, group))
    return add_visible<T, DROPS>(acc, C, B);
  uint32_t A[TILES / 2][4];
  pack_weights<T, DROPS>(A, C);
  wgmma_hold(acc);
  wgmma_hold(A);
  wgmma_fence();
  issue_sum<T>(acc, A, wgmma_word(B));
  wgmma_wait<0>();
  wgmma_hold(acc);
  wgmma_hold(A);  // the tensor cores have read it only now
}

// A consumer warpgroup with 64 keys of its own: registers, and a tile of queries at a time.
template <class T, class Tile>
struct KeyGradients {
  static constexpr int HEAD_DIM = Tile::HEAD_DIM;
  // A tile is taken 64 queries at a time, HALF bytes of Q and of dO.
  static constexpr int M = Tile::BLOCK_M, TILES = 8, ACC = HEAD_DIM / 8;
  static constexpr int HALVES = M / 64, HALF = Tile::QUERY_BYTES / HALVES;
  static_assert(HALVES == 1 || Tile::SLABS == 1);

  const Score& score;
  const KeyMemory<Tile>& smem;
  int key, group;
  uint32_t keys;  // wgmma_word of its 64 rows of K
  float dK[ACC][4] = {}, dV[ACC][4] = {};
  static constexpr int BITS = 0;

  ATTN_DEVICE void begin(int) const {}  // a tile of this head; plain calls need not know
  ATTN_DEVICE int key_block() const { return 4 * group + warp_id() % 4; }  // of 16 keys, a warp's

  // smem.queries(turn) of a half.
  ATTN_DEVICE uint32_t queries_of(uint32_t queries, int half) const {
    return queries + uint32_t(half * (HALF >> 4));
  }
  // S^T = K Q^T and dP^T = V dO^T   [64, 64].  Issued.
  ATTN_DEVICE void scores(float (&S)[TILES][4], int turn, uint32_t queries) {
    smem.Q.wait(turn);
    wgmma_fence();
    issue_rows<T, HEAD_DIM, Tile::BLOCK_N>(S, wgmma_operand(wgmma_held(keys), 0),
                                           wgmma_operand(wgmma_held(queries), 0));
  }
  ATTN_DEVICE void value_products(float (&dP)[TILES][4], int turn, uint32_t queries) {
    smem.dO.wait(turn);
    wgmma_fence();  // for each, else ptxas finds the wait's loop in the way of dP's registers
    issue_rows<T, HEAD_DIM, Tile::BLOCK_N>(dP, wgmma_operand(wgmma_held(keys), Tile::KEY_BYTES),
                                           wgmma_operand(wgmma_held(queries), smem.OUTPUT));
  }

  // dS^T of a tile with pairs that do not count, and dV: one product after the other, which needs
  // fewer registers.  m0: the first query of this half.
  ATTN_DEVICE void edge_scores(float (&dP)[TILES][4], int turn, int m0, int half = 0) {
    float S[TILES][4];
    const uint32_t queries = queries_of(smem.queries(turn), half);
    scores(S, turn, queries);
    wgmma_wait<0>();
    wgmma_hold(S);
    key_weights(S, score, smem.lse(turn) + uint32_t(half * 256), key, m0, true);
    smem.dO.wait(turn);
    add_product<T, HALF>(dV, S, smem.dO.tile(turn) + uint32_t(half * HALF), true, group);
    value_products(dP, turn, queries);
    wgmma_wait<0>();
    wgmma_hold(dP);
    if (half == HALVES - 1) smem.dO.release(turn);
    key_gradients<true>(dP, S, smem.delta(turn) + uint32_t(half * 256));
  }
  ATTN_DEVICE void edge(int turn, int m0) {
    float dS[TILES][4];
    edge_scores(dS, turn, m0);
    add_product<T, Tile::QUERY_BYTES>(dK, dS, smem.Q.tile(turn), true, group);
    smem.Q.release(turn);
  }

  // P^T and dS^T, packed, of a tile whose every pair counts: P is computed while dP is, dS while dV
  // is.  dV is under way, P in use.
  ATTN_DEVICE void whole_scores(uint32_t (&P)[TILES / 2][4], uint32_t (&dS)[TILES / 2][4], int turn,
                                int m0, uint32_t queries, int half = 0) {
    float S[TILES][4], dP[TILES][4];
    scores(S, turn, queries);
    value_products(dP, turn, queries);
    wgmma_wait<1>();  // S is there
    wgmma_hold(S);
    key_weights(S, score, smem.lse(turn) + uint32_t(half * 256), key, m0, false);
    pack_weights<T>(P, S);
    wgmma_hold(dV);
    wgmma_hold(P);
    wgmma_fence();
    issue_sum<T>(dV, P, wgmma_held(queries), smem.OUTPUT);
    wgmma_wait<1>();  // dP is there
    wgmma_hold(dP);
    key_gradients<false>(dP, S, smem.delta(turn) + uint32_t(half * 256));
    pack_weights<T>(dS, dP);
  }
  // dK += dS^T Q.  Issued.
  ATTN_DEVICE void key_sums(uint32_t (&dS)[TILES / 2][4], uint32_t queries) {
    wgmma_hold(dK);
    wgmma_hold(dS);
    wgmma_fence();
    issue_sum<T>(dK, dS, wgmma_held(queries));
  }
  ATTN_DEVICE void whole(int turn, int m0) {
    uint32_t P[TILES / 2][4], dS[TILES / 2][4];
    const uint32_t queries = smem.queries(turn);
    whole_scores(P, dS, turn, m0, queries);
    key_sums(dS, queries);
    wgmma_wait<1>();  // dV is there
    wgmma_hold(dV);
    wgmma_hold(P);  // the tensor cores have read it only now
    smem.dO.release(turn);
    wgmma_wait<0>();  // dK is there
    wgmma_hold(dK);
    wgmma_hold(dS);
    smem.Q.release(turn);
  }

  ATTN_DEVICE void add(int turn, int m0, bool check) { check ? edge(turn, m0) : whole(turn, m0); }
  ATTN_DEVICE void skip(int turn) const {
    smem.Q.skip(turn);
    smem.dO.skip(turn);
  }
};

// One of two consumer warpgroups with the same 64 keys (Tile::SPLIT): the first has P^T and dV, the
// second dP^T and dK, and gets P through shared memory, [tile][thread] 16 bytes of a fragment.
template <class T, class Tile>
struct SplitGradient {
  static constexpr int HEAD_DIM = Tile::HEAD_DIM;
  static constexpr int M = Tile::BLOCK_M, TILES = M / 8, ACC = HEAD_DIM / 8;
  static constexpr int WEIGHTS_FULL = 3, WEIGHTS_EMPTY = 4;  // named barriers

  const Score& score;
  const KeyMemory<Tile>& smem;
  int key, count;  // count: of turns
  float acc[ACC][4] = {};
  static constexpr int BITS = 0;

  ATTN_DEVICE void begin(int) const {}  // as in KeyGradients
  ATTN_DEVICE int key_block() const { return warp_id() % 4; }

  ATTN_DEVICE uint32_t weight(int n) const {
    return smem.extra + uint32_t(n * 128 + thread_id() % 128) * 16;
  }
  // C = A B^T   [64, BLOCK_M], both resident; until it is there.
  ATTN_DEVICE void product(float (&C)[TILES][4], uint32_t A, uint32_t B) {
    wgmma_hold(acc);
    wgmma_fence();
    issue_rows<T, HEAD_DIM, Tile::BLOCK_N>(C, wgmma_operand(wgmma_word(A), 0),
                                           wgmma_operand(wgmma_word(B), 0));
    wgmma_wait<0>();
    wgmma_hold(C);
  }
  ATTN_DEVICE void release(int turn) const {
    smem.Q.release(turn);
    smem.dO.release(turn);
  }

  // From the first to the second.
  ATTN_DEVICE void pass_weights(const float (&P)[TILES][4], int turn) const {
    if (turn) named_barrier_sync<WEIGHTS_EMPTY>(256);  // the second has read P of the turn before
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n)
      sts_128(weight(n), {as_uint(P[n][0]), as_uint(P[n][1]), as_uint(P[n][2]), as_uint(P[n][3])});
    named_barrier_arrive<WEIGHTS_FULL>(256);
  }
  // dV += P^T dO.
  template <bool DROPS = false>
  ATTN_DEVICE void add_weights(const float (&P)[TILES][4], int turn, bool edge) {
    smem.dO.wait(turn);
    add_product<T, Tile::QUERY_BYTES, DROPS>(acc, P, smem.dO.tile(turn), edge, 0);
    release(turn);
  }
  // The first: S^T = K Q^T, dV += P^T dO.
  ATTN_DEVICE void add_values(int turn, int m0, bool edge) {
    float P[TILES][4];
    smem.Q.wait(turn);
    product(P, smem.K, smem.Q.tile(turn));
    key_weights(P, score, smem.lse(turn), key, m0, edge);
    pass_weights(P, turn);
    add_weights(P, turn, edge);
  }

  // The second: dP^T = V dO^T, dK += dS^T Q.
  ATTN_DEVICE void take_weights(float (&P)[TILES][4], float (&dP)[TILES][4], int turn) {
    smem.dO.wait(turn);
    product(dP, smem.V, smem.dO.tile(turn));
    named_barrier_sync<WEIGHTS_FULL>(256);  // P of this turn is there
    ATTN_UNROLL
    for (int n = 0; n < TILES; ++n) {
      const U32x4 w = lds_128(weight(n));
      P[n][0] = as_float(w.x), P[n][1] = as_float(w.y);
      P[n][2] = as_float(w.z), P[n][3] = as_float(w.w);
    }
    if (turn + 1 < count) named_barrier_arrive<WEIGHTS_EMPTY>(256);
    smem.Q.wait(turn);
  }
  ATTN_DEVICE void add_gradients(const float (&dS)[TILES][4], int turn, bool edge) {
    add_product<T, Tile::QUERY_BYTES>(acc, dS, smem.Q.tile(turn), edge, 1);
    release(turn);
  }
  ATTN_DEVICE void add_keys(int turn, bool edge) {
    float P[TILES][4], dP[TILES][4];
    take_weights(P, dP, turn);
    key_gradients<true>(dP, P, smem.delta(turn));
    add_gradients(dP, turn, edge);
  }
};

// rows key and key + 8 of dK or dV from fragments
template <class T, int ACC>
ATTN_DEVICE void store_keys(const Params& p, const KeyTask& task, void* out, const Strides& stride,
                            const float (&acc)[ACC][4], int key, float factor, int64_t dim) {
  if (!out) return;
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int j = key + 8 * r;
    if (j >= task.seq.seqlen_k) continue;
    const int64_t at =
        task.seq.b * stride.b + task.head_k * stride.h + (task.seq.k_start + j) * stride.s;
    store_row<false>(static_cast<T*>(out) + at, acc, r, factor, int(dim));
  }
}

// Keys first.. of a warp once more.
template <class T, int HEAD_DIM, int BITS = 0>
ATTN_DEVICE void repair_keys(const Params& p, const KeyTask& task, int first, bool for_k,
                             bool for_v) {
  each_row(first, task.seq.seqlen_k, [&](int j) {
    Repair<T, HEAD_DIM, BITS>{p, task.seq}.key_gradients(task.head_k, j, for_k, for_v);
  });
}

// add(turn, head of the group, first query) for each tile of queries, with kOrdered from the last
// to the first.
template <class Tile, class Add>
ATTN_DEVICE void each_query_tile(const Params& p, const KeyTask& task, const Add& add) {
  int turn = 0;
  ATTN_NO_UNROLL
  for (int h = 0; h < p.group; ++h) {
    ATTN_NO_UNROLL
    for (int t = 0; t < task.tiles; ++t, ++turn) {
      const int at = has<Tile::BITS>(p, kOrdered) ? task.tiles - 1 - t : t;
      add(turn, h, (task.first + at) * Tile::BLOCK_M);
    }
  }
}

// Consumers of which each has dV or dK.  Mine: SplitGradient or what has features.
template <class T, class Tile, class Mine>
ATTN_DEVICE void consume_split(const Params& p, const KeyTask& task, const KeyMemory<Tile>& smem) {
  constexpr int M = Tile::BLOCK_M, BITS = Mine::BITS;
  const int group = warp_id() / 4 - 1, first_key = task.n0;
  const int key = first_key + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, task.seq);
  if (task.tiles) mbarrier_wait(smem.keys_full, 0);
  Mine mine{score, smem, key, p.group * task.tiles};
  const WholeTiles whole = WholeTiles::of(score, first_key, first_key + 64, M);
  each_query_tile<Tile>(p, task, [&](int turn, int h, int m0) {
    const bool edge = !whole.has(m0);
    mine.begin(task.head_k * p.group + h);
    group ? mine.add_keys(turn, edge) : mine.add_values(turn, m0, edge);
  });
  const bool bad = warp_finds_nan(mine.acc);
  const float factor = has<BITS>(p, kDropout) ? p.keep_scale : 1.0f;
  if (group)
    store_keys<T>(p, task, p.ptr.dk, p.p.dk, mine.acc, key, p.scale, p.p.head_dim);
  else
    store_keys<T>(p, task, p.ptr.dv, p.p.dv, mine.acc, key, factor, p.p.head_dim_v);
  if (bad)
    repair_keys<T, Tile::HEAD_DIM, BITS>(p, task, first_key + 16 * (warp_id() % 4), group, !group);
}

template <class T, class Tile>
ATTN_DEVICE void consume_queries(const Params& p, const KeyTask& task,
                                 const KeyMemory<Tile>& smem) {
  constexpr int M = Tile::BLOCK_M;
  const Sequence& seq = task.seq;
  const int group = warp_id() / 4 - 1, first_key = task.n0 + 64 * group;
  const int key = first_key + 16 * (warp_id() % 4) + (lane_id() >> 2);
  const Score score(p, seq);
  if (task.tiles) mbarrier_wait(smem.keys_full, 0);
  int lo = 0, hi = 0;  // queries that see some key of the warpgroup
  const int end_key = min_int(first_key + 64, seq.seqlen_k);
  if (first_key < end_key) score.band.query_range(first_key, end_key, seq.seqlen_q, lo, hi);
  KeyGradients<T, Tile> mine{score, smem, key, group, wgmma_word(smem.K + group * 64 * 128)};
  const WholeTiles whole = WholeTiles::of(score, first_key, first_key + 64, M);
  each_query_tile<Tile>(p, task, [&](int turn, int, int m0) {
    if (m0 < hi && m0 + M > lo)
      mine.add(turn, m0, !whole.has(m0));
    else
      mine.skip(turn);
  });
  const bool bad = warp_finds_nan(mine.dK) || warp_finds_nan(mine.dV);
  store_keys<T>(p, task, p.ptr.dk, p.p.dk, mine.dK, key, p.scale, p.p.head_dim);
  store_keys<T>(p, task, p.ptr.dv, p.p.dv, mine.dV, key, 1.0f, p.p.head_dim_v);
  if (bad) repair_keys<T, Tile::HEAD_DIM>(p, task, first_key + 16 * (warp_id() % 4), true, true);
}

// The producer's thread: K and V, then all tiles of queries.
template <class Tile>
ATTN_DEVICE void produce_queries(const BackwardParams& x, const KeyTask& task,
                                 const KeyMemory<Tile>& smem) {
  constexpr int S = Tile::SLABS, M = Tile::BLOCK_M, N = Tile::BLOCK_N;
  mbarrier_arrive_expect_tx(smem.keys_full, 2 * Tile::KEY_BYTES);
  const Coordinates at(x.p, task.seq);
  load_rows<S, N>(smem.K, x.K, smem.keys_full, at.k + task.n0, task.head_k, at.b);
  load_rows<S, N>(smem.V, x.V, smem.keys_full, at.k + task.n0, task.head_k, at.b);
  each_query_tile<Tile>(x.p, task, [&](int turn, int h, int m0) {
    const int head = task.head_k * x.p.group + h;
    smem.Q.template load<S, M>(turn, x.Q, at.q + m0, head, at.b);
    smem.dO.template load<S, M>(turn, x.dO, at.q + m0, head, at.b);
  });
}

// The producer's second warp: LSE and delta of a tile of queries.
template <class Tile>
ATTN_DEVICE void produce_row_values(const Params& p, const KeyTask& task,
                                    const KeyMemory<Tile>& smem, int turn, int head, int m0) {
  smem.Q.wait_empty(turn);
  ATTN_NO_UNROLL
  for (int r = lane_id(); r < Tile::BLOCK_M; r += 32) {
    const RowGradient row = RowGradient::of(p, task.seq, head, m0 + r);
    sts_f32(smem.lse(turn) + row_place(r), row.lse);
    sts_f32(smem.delta(turn) + row_place(r), row.delta);
  }
  sync_warp();  // every lane has stored
  if (lane_id() == 0) mbarrier_arrive(smem.Q.full_bar(turn));
}

// A kernel with a task of keys; produce(task, smem): what the producer's warps do beside the
// copies, consume(task, smem): what its consumers do.  number: of the CTA.
template <class Tile, class Memory, class Produce, class Consume>
ATTN_DEVICE void run_key_task(const BackwardParams& x, const Produce& produce,
                              const Consume& consume, int number) {
  const auto smem = Memory::of(smem_base());
  const KeyTask task = KeyTask::of(x.p, Tile::BLOCK_M, Tile::BLOCK_N, number);
  if (task.n0 >= task.seq.seqlen_k) return;  // packed: a number that stands for no tile
  const auto load = [&] {
    if (warp_id() == 0 && elect_one() && task.tiles) produce_queries<Tile>(x, task, smem);
    produce(task, smem);
  };
  run_roles<Tile::PRODUCER_REGISTERS, Tile::CONSUMER_REGISTERS>(smem, load,
                                                                [&] { consume(task, smem); });
}
// Of a plain call.
template <class Tile, class Consume>
ATTN_DEVICE void run_plain_key_task(const BackwardParams& x, const Consume& consume) {
  const auto produce = [&](const KeyTask& task, const KeyMemory<Tile>& smem) {
    if (warp_id() == 1)
      each_query_tile<Tile>(x.p, task, [&](int turn, int h, int m0) {
        produce_row_values(x.p, task, smem, turn, task.head_k * x.p.group + h, m0);
      });
  };
  run_key_task<Tile, KeyMemory<Tile>>(x, produce, consume, block_id().x);
}

template <class T, int HEAD_DIM>
ATTN_KERNEL(THREADS, 1)
void backward_dkdv(ATTN_GRID_CONSTANT const BackwardParams x) {
  using Tile = KeyGradientTile<HEAD_DIM>;
  run_plain_key_task<Tile>(x, [&](const KeyTask& task, const KeyMemory<Tile>& smem) {
    if constexpr (Tile::SPLIT)
      consume_split<T, Tile, SplitGradient<T, Tile>>(x.p, task, smem);
    else
      consume_queries<T>(x.p, task, smem);
  });
}

}  // namespace attn::cuda::sm90
