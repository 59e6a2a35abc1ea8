// Which tiles of queries a CTA of the Hopper forward works on, one after the other, and the frame
// in which it does.
//
// There are as many CTAs as multiprocessors where there are more tiles than that.  A CTA begins
// with the tile of its number and claims every further one by a counter in global memory, so that
// none waits for a longer tile of another.  The producer claims, and is at the next tile while the
// consumers finish one: what a tile is lies beside its Q in shared memory, behind the same
// mbarrier.
#pragma once
#include "parts.cuh"

namespace attn::cuda::sm90 {

constexpr int NO_TILE = 2147483647;  // a number behind all

// A tile of queries: sequence, head, first row.  b < 0: none is left; row0 < 0: the number stands
// for none.
struct QueryTile {
  int b, head, row0;

  template <int BITS>
  ATTN_DEVICE QueryTask task(const Params& p, int block_m) const {
    const Sequence seq = Sequence::of<BITS>(p, b);
    return QueryTask::of(seq, head, 0, row0, seq.seqlen_q, block_m);
  }
};

// The tiles of a call in the order in which they are claimed.  Of a section, the heads whose keys
// and values fit the L2 cache together, the longest tiles of all heads come first: a causal tile
// is the longer the later its queries are.
struct TileOrder {
  PackedTiles<const int32_t*> sequences;  // of a packed call

  ATTN_DEVICE static TileOrder of(const Params& p, int block_m) {
    return {{p.ptr.cu_seqlens_q, int(p.p.batch), block_m}};
  }
  // That of a number; the numbers that are asked for grow.
  ATTN_DEVICE QueryTile find(const ForwardParams& x, int number) {
    return sequences.starts ? packed(x.p, number) : dense(x, number, sequences.block);
  }

 private:
  ATTN_DEVICE static QueryTile dense(const ForwardParams& x, int number, int block_m) {
    const int heads = int(x.p.p.heads_q), all = heads * int(x.p.p.batch);
    if (number >= all * x.p.m_tiles) return {-1, 0, 0};
    const int section = number / (x.section * x.p.m_tiles), first = section * x.section;
    const int within = number - first * x.p.m_tiles, count = min_int(x.section, all - first);
    const int head = first + within % count, m = x.p.m_tiles - 1 - within / count;
    return {head / heads, head % heads, m * block_m};
  }
  // One sequence after the other, each a section.
  ATTN_DEVICE QueryTile packed(const Params& p, int number) {
    const int heads = int(p.p.heads_q), block = sequences.block;
    if (number >= heads * p.m_tiles) return {-1, 0, 0};
    const int tile = number / heads, b = sequences.find(tile);
    const int last = ceil_div(Sequence::of(p, b).seqlen_q, block) - 1;
    return {b, number % heads, (last - (tile - sequences.first(b))) * block};
  }
};

// The number of this CTA's next tile.
ATTN_DEVICE int claim(const ForwardParams& x) {
  return x.counter ? grid_size().x + atomic_add_global(x.counter, 1) : NO_TILE;
}

using KeyRing = Ring<STAGES, uint32_t>;

// Shared memory: tiles of Q with what they are, from which O is stored again, and rings of K and V.
template <class Tile>
struct ForwardMemory {
  static constexpr int QUERIES = Tile::QUERY_STAGES;
  static constexpr uint32_t VALUES = STAGES * Tile::KEY_BYTES;  // from a tile of K to that of V
  Ring<QUERIES, uint32_t> Q;
  KeyRing K, V;
  uint32_t tiles;  // a QueryTile beside each of Q, 16 bytes

  ATTN_DEVICE static ForwardMemory of(uint32_t base) {
    const uint32_t K_smem = base + QUERIES * Tile::QUERY_BYTES;
    const uint32_t V_smem = K_smem + VALUES;
    const uint32_t tiles = V_smem + STAGES * Tile::VALUE_BYTES;
    const uint32_t bars = tiles + 16 * QUERIES;
    return {{base, bars, Tile::QUERY_BYTES},
            {K_smem, bars + 16 * QUERIES, Tile::KEY_BYTES},
            {V_smem, bars + 16 * QUERIES + RING_BARS, Tile::VALUE_BYTES},
            tiles};
  }
  ATTN_DEVICE void init() const {
    Q.init(1, CONSUMER_WARPS / 4);
    K.init();
    V.init();
  }
  // Before the arrival that ends the wait for Q.
  ATTN_DEVICE void tell(int n, const QueryTile& t) const {
    sts_128(tiles + 16 * uint32_t(n % QUERIES),
            {uint32_t(t.b), uint32_t(t.head), uint32_t(t.row0), 0});
  }
  // Behind that wait.  The same in all lanes, and known to be: what loops are over stays uniform.
  ATTN_DEVICE QueryTile told(int n) const {
    const U32x4 t = lds_128(tiles + 16 * uint32_t(n % QUERIES));
    return {int(warp_uniform(t.x)), int(warp_uniform(t.y)), int(warp_uniform(t.z))};
  }
};

// A tile of queries in the order of a CTA's tiles, and its turns of keys.
struct Work {
  QueryTask task;
  Turns turns;
  int n, start;  // the tile's number in the ring of Q, its first turn's in those of K and V

  template <int BITS, class Tile>
  ATTN_DEVICE static Work of(const Params& p, const QueryTile& t, int n, int start) {
    Work w{t.task<BITS>(p, Tile::BLOCK_M), {}, n, start};
    w.turns = Turns::of(Band::of(p, w.task.seq), w.task.row0, w.task.end, w.task.seq.seqlen_k,
                        Tile::BLOCK_N);
    return w;
  }
  ATTN_DEVICE int end() const { return start + turns.count(); }
  // Of the tile behind.  Rings go round: parities and buffers repeat.
  template <class Tile>
  ATTN_DEVICE static int next_n(int n) {
    return (n + 1) % (2 * Tile::QUERY_STAGES);
  }
};

// The producer's thread, a tile: K of the first turn, Q, and the rest of K and V; K of a turn is
// needed before V of the one in front of it.  The number of the next tile.  FOURS: of load_rows().
template <class Tile, bool FOURS>
ATTN_DEVICE int produce(const ForwardParams& x, const QueryTile& tile, const Work& w,
                        const ForwardMemory<Tile>& smem) {
  constexpr int M = Tile::BLOCK_M, N = Tile::BLOCK_N, S = Tile::SLABS, SV = Tile::VALUE_SLABS;
  const Coordinates at(x.p, w.task.seq);
  const int head_k = w.task.head / x.p.group, count = w.turns.count();
  const auto load_k = [&](int i) {
    smem.K.template load<S, N, FOURS>(w.start + i, x.K, at.k + w.turns.tile(i) * N, head_k, at.b);
  };
  if (count) load_k(0);
  smem.Q.wait_empty(w.n);  // O of the tile before in this buffer is stored, and that tile is over
  smem.tell(w.n, tile);
  if (!count) {
    mbarrier_arrive(smem.Q.full_bar(w.n));
    return claim(x);
  }
  mbarrier_arrive_expect_tx(smem.Q.full_bar(w.n), Tile::QUERY_BYTES);
  load_rows<S, M>(smem.Q.tile(w.n), x.Q, smem.Q.full_bar(w.n), at.q + w.task.row0, w.task.head,
                  at.b);
  int next = NO_TILE;
  ATTN_NO_UNROLL
  for (int i = 0; i < count; ++i) {
    if (i + 1 < count)
      load_k(i + 1);
    else
      next = claim(x);  // late, so that it goes to who is first; V's buffer is waited for meanwhile
    smem.V.template load<SV, N, FOURS>(w.start + i, x.V, at.k + w.turns.tile(i) * N, head_k, at.b);
  }
  return next;
}
template <int BITS, class Tile, bool FOURS>
ATTN_DEVICE void produce_tiles(const ForwardParams& x, const ForwardMemory<Tile>& smem) {
  TileOrder order = TileOrder::of(x.p, Tile::BLOCK_M);
  int number = block_id().x, n = 0, start = 0;
  ATTN_NO_UNROLL
  while (true) {
    const QueryTile tile = order.find(x, number);
    if (tile.b < 0) break;
    if (tile.row0 < 0) {
      number = claim(x);
      continue;
    }
    const Work w = Work::of<BITS, Tile>(x.p, tile, n, start);
    number = produce<Tile, FOURS>(x, tile, w, smem);
    n = Work::next_n<Tile>(n), start = w.end() % (2 * STAGES);
  }
  smem.Q.wait_empty(n);
  smem.tell(n, {-1, 0, 0});
  mbarrier_arrive(smem.Q.full_bar(n));
}

// Which of two consumer warpgroups may issue its products: the first begins, then they alternate,
// from tile to tile.  Nothing but speed depends on it.
struct TakeTurns {
  static constexpr int FIRST = 3;  // named barriers FIRST + group: it is the group's turn
  int group;
  bool both;  // else the other warpgroup has no such tiles

  // Tiles that every row sees are of both, or of one.
  ATTN_DEVICE static TakeTurns of(const QueryTask& task, int group) {
    // Held: ptxas would compare again at each turn.
    return {group, wgmma_held(task.row0 + 64 < task.rows) != 0};
  }
  ATTN_DEVICE static void begin(int group) {
    if (group == 1) named_barrier_arrive<FIRST>(256);
  }
  ATTN_DEVICE void wait() const {
    if (both) named_barrier_sync(FIRST + group, 256);
  }
  ATTN_DEVICE void pass() const {
    if (both) named_barrier_arrive(FIRST + 1 - group, 256);
  }
  // The second's last pass() is awaited, so that no barrier stays half full.
  ATTN_DEVICE static void finish(int group) {
    if (group == 0) named_barrier_sync<FIRST>(256);
  }
};

// What a consumer warpgroup owes: the buffer of Q that the copy engine stores O from.
struct Stored {
  int n = -1;

  // The buffer is free once it has been read.
  template <class Tile>
  ATTN_DEVICE void settle(const ForwardMemory<Tile>& smem) {
    if (n < 0) return;
    if (thread_id() % 128 == 0) {
      bulk_wait_read<0>();
      mbarrier_arrive(smem.Q.empty_bar(n));
    }
    n = -1;
  }
};

// The consumers: consume(work, stored) for each tile, which tells the turn behind its last.
template <int BITS, class Tile, class Consume>
ATTN_DEVICE void consume_tiles(const ForwardParams& x, const ForwardMemory<Tile>& smem,
                               const Consume& consume) {
  const int group = warp_id() / 4 - 1;
  TakeTurns::begin(group);
  Stored stored;
  int n = 0, start = 0;
  ATTN_NO_UNROLL
  while (true) {
    smem.Q.wait(n);
    const QueryTile tile = smem.told(n);
    if (tile.b < 0) break;
    start = consume(Work::of<BITS, Tile>(x.p, tile, n, start), stored) % (2 * STAGES);
    stored.n = n;
    // One buffer of Q: nothing can be loaded before.
    if constexpr (Tile::QUERY_STAGES == 1) stored.settle(smem);
    n = Work::next_n<Tile>(n);
  }
  stored.settle(smem);  // shared memory is read before the CTA ends
  TakeTurns::finish(group);
}

// A consumer warpgroup's tiles of keys in the order of their turns: edge(turn, first key) for each
// at an edge of the band, then whole(turn, end, first key) for all that every row sees.  The turn
// behind the last.
template <class Tile, class Edge, class Whole>
ATTN_DEVICE int consume_turns(const Work& w, const Score& score, Stored& stored,
                              const ForwardMemory<Tile>& smem, const Edge& edge,
                              const Whole& whole) {
  constexpr int N = Tile::BLOCK_N;
  const QueryTask& task = w.task;
  const int group_row = task.row0 + 64 * (warp_id() / 4 - 1);
  const int group_end = min_int(group_row + 64, task.rows);
  int lo = 0, hi = 0;  // keys that some row of the warpgroup sees
  if (group_row < group_end) score.band.key_range(group_row, group_end, task.seq.seqlen_k, lo, hi);
  const int end = w.end();
  int turn = w.start;
  ATTN_NO_UNROLL
  for (; turn < (lo < hi ? w.start + w.turns.edges() : end); ++turn) {
    const int n0 = w.turns.tile(turn - w.start) * N;
    if (n0 < hi && n0 + N > lo) {
      edge(turn, n0);
    } else {  // nothing for this warpgroup
      smem.K.skip(turn);
      smem.V.skip(turn);
    }
  }
  stored.settle(smem);
  whole(turn, end, w.turns.tile(turn - w.start) * N);
  return end;
}

// The whole kernel.
template <int BITS, class Tile, bool FOURS, class Consume>
ATTN_DEVICE void run_tiles(const ForwardParams& x, const ForwardMemory<Tile>& smem,
                           const Consume& consume) {
  const auto load = [&] {
    if (warp_id() == 0 && elect_one()) produce_tiles<BITS, Tile, FOURS>(x, smem);
  };
  run_roles(smem, load, [&] { consume_tiles<BITS>(x, smem, consume); });
}

// O of a warpgroup's 64 rows, times factor, to shared memory, over the rows of Q that it was
// computed from, and from there by the copy engine, 128 bytes a row; what lies behind the tensor it
// leaves out.
template <class T, class Tile, int ACC>
ATTN_DEVICE void store_by_engine(const ForwardParams& x, const QueryTask& task, uint32_t O,
                                 const float (&acc)[ACC][4], const float (&factor)[2], int group) {
  const int lane = lane_id(),
            at = 16 * (warp_id() % 4) + lane % 16;  // the row whose address is given
  ATTN_UNROLL
  for (int n = 0; n < 8 * Tile::VALUE_SLABS; n += 2) {
    uint32_t words[4] = {};  // zeros behind O: the engine reads whole rows of 128 bytes
    ATTN_UNROLL
    for (int i = 0; i < 4 && n < ACC; ++i) {
      const int r = i % 2;
      const float* c = acc[n + i / 2] + 2 * r;
      words[i] = factor[r] == 0.0f ? 0 : pack<T>(c[0] * factor[r], c[1] * factor[r]);
    }
    const int chunk = (n + lane / 16) % 8 ^ at % 8;
    stmatrix_x4(O + uint32_t(n / 8 * Tile::BLOCK_M * 128 + at * 128 + chunk * 16), words);
  }
  fence_proxy_async();
  named_barrier_sync(1 + group, 128);  // O of all four warps is there
  const int first = task.row0 + 64 * group;
  if (thread_id() % 128 != 0 || first >= task.rows) return;
  const Coordinates from(x.p, task.seq);
  ATTN_NO_UNROLL
  for (int slab = 0; 64 * slab < int(x.p.p.head_dim_v); ++slab)
    tma_store_4d(x.O, O + uint32_t(slab * Tile::BLOCK_M * 128), 64 * slab, from.q + first,
                 task.head, from.b);
  bulk_commit();
}

// O and LSE of a warpgroup's 64 rows of the tile in buffer n of Q.  Behind the end of a packed
// sequence the next one begins: rows of a tile that ends there are stored by its threads, as are
// those of a warpgroup of which some are computed once more (bad), and any that the engine cannot.
//
// What tile it is, is read again: the loop over keys needs the registers.
template <class T, int BITS, class Tile, int ACC>
ATTN_DEVICE void finish_tile(const ForwardParams& x, int n, const ForwardMemory<Tile>& smem,
                             const float (&acc)[ACC][4], const RowState& state, float scale,
                             bool bad) {
  const Params& p = x.p;
  const QueryTask task = smem.told(n).template task<BITS>(p, Tile::BLOCK_M);
  const int group = warp_id() / 4 - 1, warp_row = task.row0 + 64 * group + 16 * (warp_id() % 4);
  const int row = warp_row + (lane_id() >> 2);
  Query query[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r)
    query[r] = Query{min_int(row + 8 * r, task.rows - 1), task.head, {}, 0, 0};
  // All warps of the warpgroup are done with Q.
  const bool some = group == 0 ? named_barrier_or<1>(128, bad) : named_barrier_or<2>(128, bad);
  const bool others = p.ptr.cu_seqlens_q && task.row0 + 64 * group + 64 > task.rows;
  if (some || others || !x.stores_tiles) {
    store_rows<T, BITS, false>(p, task, acc, state, query, row, scale);
    if (bad)
      each_row(warp_row, task.rows,
               [&](int i) { Repair<T, 8 * ACC, BITS>{p, task.seq}.output(task.head, i); });
    return;
  }
  float factor[2];
  store_rows<T, BITS, false>(p, task, acc, state, query, row, scale, factor);
  store_by_engine<T, Tile>(x, task, smem.Q.tile(n) + uint32_t(group * 64 * 128), acc, factor,
                           group);
}

}  // namespace attn::cuda::sm90
