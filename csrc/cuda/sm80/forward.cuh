// O = softmax(scale * Q K^T + ...) V and LSE.  Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk,
// Dv], O [B, Hq, Sq, Dv]; D and Dv at most HEAD_DIM.
//
// One CTA = BLOCK_M query rows of one head, or with splits > 1 its share of their keys (decode.h
// plans, combine.cuh merges).  A warp owns 16 rows and all BLOCK_N keys of a tile, so the softmax
// needs only its own quads; where 16 rows are all that there is, every warp has these and 16 keys
// of each tile, with a softmax of its own, and warp 0 merges them at the end.  K and V tiles arrive
// by cp.async one tile ahead.
//
// For float32, decode and caches in pages; `pack` query heads of one K/V head may share a tile of
// rows (row r = query r % Sq of head r / Sq).  It is compiled for the features of a call
// (features.h).  Other calls in 16 bits have forward_plain.cuh and forward_features.cuh.
#pragma once
#include "../dropout.cuh"
#include "../forward_parts.cuh"
#include "key_stream.cuh"

namespace attn::cuda::sm80 {

// Queries [i0, i1) of the tile's rows [row0, row1).
ATTN_DEVICE void task_queries(const Params& p, int row0, int row1, int& i0, int& i1) {
  i0 = row0, i1 = row1;
  if (p.pack == 1) return;
  const int head = p.packed.quotient(row0), before = head * p.packed.by;
  const bool one_head = head == p.packed.quotient(row1 - 1);
  i0 = one_head ? row0 - before : 0, i1 = one_head ? row1 - before : p.packed.by;
}

// Products become logits in units of log2(e), rounded before their maximum is taken off, so that
// the largest is 0 then however large it was.
template <int TILES>
ATTN_DEVICE void scale_products(float (&S)[TILES][4], float scale_log2) {
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) ATTN_UNROLL
  for (int c = 0; c < 4; ++c) S[n][c] = as_float(opaque(as_uint(S[n][c] * scale_log2)));
}

// P: the weights of dropped pairs become 0 (1 / (1 - p) comes with the normalisation)
template <int TILES>
ATTN_DEVICE void drop(float (&P)[TILES][4], const Dropout& dropout, const Query (&query)[2],
                      int n0) {
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) {
    ATTN_UNROLL
    for (int r = 0; r < 2; ++r) {
      bool first, second;
      dropout.keep_pair(query[r].h, query[r].i, n0 + 8 * n + 2 * (lane_id() & 3), first, second);
      if (!first) P[n][2 * r] = 0.0f;
      if (!second) P[n][2 * r + 1] = 0.0f;
    }
  }
}

// Row `at` of packed heads, of which the first is `head`.
ATTN_DEVICE Query packed_query(const Params& p, const Score& score, int head, int at) {
  const int h = p.packed.quotient(at);
  return score.query(head + h, at - h * p.packed.by);
}

constexpr int merge_bytes(int warps, int head_dim) {
  return 32 * (8 * warps + (warps - 1) * (16 + 2 * head_dim));
}
// O and state of warp 0: those of all warps, which have the same rows, each with keys of its own.
// smem: merge_bytes() that no warp reads any more.  All threads of the CTA.
template <bool STATS, int WARPS, int ACC>
ATTN_DEVICE void merge_warps(float (&O)[ACC][4], RowState& state, bool stats, uint32_t smem) {
  constexpr int SHARE = 32 * (16 + 16 * ACC);  // bytes of a warp: sums, then O
  const uint32_t tops = smem + 8 * lane_id(), shares = smem + 256 * WARPS + 16 * lane_id();
  sts_64(tops + 256 * warp_id(), {as_uint(state.max[0]), as_uint(state.max[1])});
  sync_threads();  // every warp's maxima are there
  float top[2] = {state.max[0], state.max[1]};
  ATTN_UNROLL
  for (int w = 0; w < WARPS; ++w) {
    const U32x2 other = lds_64(tops + 256 * w);
    top[0] = fmaxf(top[0], as_float(other.x)), top[1] = fmaxf(top[1], as_float(other.y));
  }
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r)
    rescale_row<true>(O, r, move_base<STATS>(state, r, top[r], 1.0f, stats).alpha);
  float* const sums[4] = {&state.sum[0], &state.sum[1], &state.weighted[0], &state.weighted[1]};
  if (warp_id() != 0) {
    const uint32_t share = shares + SHARE * (warp_id() - 1);
    sts_128(share, {as_uint(*sums[0]), as_uint(*sums[1]), as_uint(*sums[2]), as_uint(*sums[3])});
    ATTN_UNROLL
    for (int n = 0; n < ACC; ++n)
      sts_128(share + 512 * (n + 1),
              {as_uint(O[n][0]), as_uint(O[n][1]), as_uint(O[n][2]), as_uint(O[n][3])});
  }
  sync_threads();  // every other warp's share is there
  if (warp_id() != 0) return;
  ATTN_UNROLL
  for (int w = 0; w < WARPS - 1; ++w) {
    const auto add = [&](float& a, uint32_t b) { a += as_float(b); };
    const U32x4 s = lds_128(shares + SHARE * w);
    add(*sums[0], s.x), add(*sums[1], s.y), add(*sums[2], s.z), add(*sums[3], s.w);
    ATTN_UNROLL
    for (int n = 0; n < ACC; ++n) {
      const U32x4 o = lds_128(shares + SHARE * w + 512 * (n + 1));
      add(O[n][0], o.x), add(O[n][1], o.y), add(O[n][2], o.z), add(O[n][3], o.w);
    }
  }
}

template <class T, int HEAD_DIM, int BITS, class Tile>
ATTN_DEVICE void forward_tile(const Params& p) {
  constexpr int BYTES = Row<T, HEAD_DIM>::BYTES, N = Tile::BLOCK_N;
  constexpr bool SHARED = Tile::KEY_WARPS > 1;  // warps have the same rows, and keys of their own
  constexpr int KEYS = N / Tile::KEY_WARPS, TILES = KEYS / 8;
  constexpr int LOGITS = BITS & ~kPaged;  // 0: products times a factor
  const uint32_t Q_smem = smem_base(), K_smem = Q_smem + Tile::BLOCK_M * BYTES;
  const uint32_t V_smem = K_smem + Tile::STAGES * N * BYTES;
  const uint32_t flags = V_smem + Tile::STAGES * N * BYTES;

  const QueryTask task = QueryTask::of<BITS>(p, Tile::BLOCK_M);
  if (task.row0 < 0) return;  // packed: a number that stands for no tile
  const Sequence& seq = task.seq;
  const Score score(p, seq);
  const Dropout dropout = Dropout::of(p, seq);
  int i0, i1;
  task_queries(p, task.row0, task.end, i0, i1);
  const Turns turns = Turns::of(score.band, i0, i1, seq.seqlen_k, N);
  int t0 = turns.first, t1 = turns.end;
  if (p.splits > 1) {
    const int share = ceil_div(t1 - t0, p.splits);
    t0 += task.split * share;
    t1 = min_int(t1, t0 + share);
  }

  // Each thread's two rows; the warp rests (but meets every barrier) when all its rows are padding.
  const int warp_row = SHARED ? 0 : 16 * warp_id(), warp_key = SHARED ? KEYS * warp_id() : 0;
  const int row = task.row0 + warp_row + (lane_id() >> 2);
  const bool active = task.row0 + warp_row < task.rows;
  Query query[2];
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int at = min_int(row + 8 * r, task.rows - 1);
    query[r] = p.pack > 1 ? packed_query(p, score, task.head, at) : score.query(task.head, at);
  }

  const Rows Q = query_rows(p, seq, p.ptr.q, p.p.q, task.head, sizeof(T));
  const Rows K = key_rows(p, seq, p.ptr.k, p.p.k, task.head / p.group, sizeof(T));
  const Rows V = key_rows(p, seq, p.ptr.v, p.p.v, task.head / p.group, sizeof(T));
  const int dim = int(p.p.head_dim), dim_v = int(p.p.head_dim_v);
  using Stream = KeyStream<T, HEAD_DIM, N, Tile::THREADS, may_have<BITS>(kPaged)>;
  const int whole = Stream::serves(p) ? seq.seqlen_k / N : 0;  // tiles before it come as they lie
  Stream stream;
  if (t0 < t1 && t0 < whole) stream.begin(p, K, V, t0 * N, seq.seqlen_k);
  auto copy_keys = [&](int t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    if (t < whole) {
      stream.copy(p, K, V, K_smem + stage, V_smem + stage);
    } else {
      copy_tile<T, HEAD_DIM, N, Tile::THREADS, true>(K_smem + stage, K, t * N, seq.seqlen_k, dim,
                                                     p.k_vec);
      copy_tile<T, HEAD_DIM, N, Tile::THREADS, true>(V_smem + stage, V, t * N, seq.seqlen_k, dim_v,
                                                     p.v_vec);
    }
    cp_async_commit();
  };

  float O[HEAD_DIM / 8][4] = {};
  RowState state;
  copy_tile<T, HEAD_DIM, Tile::BLOCK_M, Tile::THREADS, true>(Q_smem, Q, task.row0, task.end, dim,
                                                             p.q_vec);
  if (t0 < t1) copy_keys(t0);
  for (int t = t0; t < t1; ++t) {
    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;
    const int n0 = t * N;
    cp_async_wait<0>();
    sync_threads();  // tile t is complete, and every warp is done with the buffer of t - 1
    if (Tile::STAGES > 1 && t + 1 < t1) copy_keys(t + 1);

    float S[TILES][4];
    if (active) {
      // S = Q K^T   [16, KEYS] a warp
      multiply<T, HEAD_DIM, TILES>(S, Q_smem, warp_row, K_smem + stage + warp_key * BYTES);
      if (LOGITS || t < turns.whole_first || t >= turns.whole_end)
        mask_scores<LOGITS>(S, score, query, n0 + warp_key);
      if (!LOGITS) scale_products(S, p.scale_log2);
      online_softmax<may_have<BITS>(kStats), true>(S, O, state, 1.0f, has<BITS>(p, kStats));
      if (has<BITS>(p, kDropout)) drop(S, dropout, query, n0 + warp_key);
    }
    // O += P V   [16, Dv] a warp
    const uint32_t V_rows = V_smem + stage + warp_key * BYTES;
    bool bad;
    if constexpr (SHARED)
      bad = lanes_find_nonfinite<T, HEAD_DIM, KEYS, 32>(V_rows) != 0;
    else
      bad = tile_has_nonfinite<T, HEAD_DIM, N, Tile::WARPS>(V_smem + stage, flags);
    accumulate_visible<T, HEAD_DIM, TILES, SHARED ? 32 : Tile::THREADS, true>(
        O, S, V_rows, V, n0 + warp_key, seq.seqlen_k, dim_v, bad, false, active);
    if (Tile::STAGES == 1 && t + 1 < t1) {
      sync_threads();  // every warp has read K and V
      copy_keys(t + 1);
    }
  }
  // Nothing may be in flight at the end, and without a tile the first copies are in no group yet.
  cp_async_commit();
  cp_async_wait<0>();
  if constexpr (SHARED) {
    sync_threads();  // every warp has read the last tile, in whose place shares are left
    merge_warps<may_have<BITS>(kStats), Tile::WARPS>(O, state, has<BITS>(p, kStats), K_smem);
    static_assert(merge_bytes(Tile::WARPS, HEAD_DIM) <= 2 * Tile::STAGES * N * BYTES);
    if (warp_id() != 0) return;
  }
  if (active) store_rows<T, BITS, true>(p, task, O, state, query, row, 1.0f);
}

template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((ForwardTile<T, HEAD_DIM>::THREADS), 1)
void forward_general(ATTN_GRID_CONSTANT const Params p) {
  forward_tile<T, HEAD_DIM, BITS, ForwardTile<T, HEAD_DIM>>(p);
}

// Calls with at most 16 rows a tile: decode of small groups.
template <class T, int HEAD_DIM, int BITS>
ATTN_KERNEL((DecodeTile<T, HEAD_DIM>::THREADS), 1)
void forward_decode(ATTN_GRID_CONSTANT const Params p) {
  forward_tile<T, HEAD_DIM, BITS, DecodeTile<T, HEAD_DIM>>(p);
}

}  // namespace attn::cuda::sm80
