// The float32 sums in which a backward of one kernel adds up dQ: a tile of 64 queries has 64 *
// HEAD_DIM of them, by its number (packed.h).  Params::m_tiles are these tiles.
#pragma once
#include "backward_parts.cuh"
#include "forward_parts.cuh"
#include "repair.cuh"

namespace attn::cuda {

// The first tile of a sequence and head in the sums.
ATTN_DEVICE int64_t sum_tile(const Params& p, const Sequence& seq, int head) {
  return query_numbers(p, 64).first(seq.b, int(seq.q_start), head);
}

// dQ of rows m0 + 16 * warp .. of a head, from fragments of their sums.
template <class T, int HEAD_DIM, int BITS>
ATTN_DEVICE void store_query_gradient(const Params& p, const Sequence& seq, int head, int m0,
                                      const float (&acc)[HEAD_DIM / 8][4]) {
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int i = m0 + 16 * warp_id() + (lane_id() >> 2) + 8 * r;
    if (i >= seq.seqlen_q) continue;
    const int64_t at = seq.b * p.p.dq.b + head * p.p.dq.h + (seq.q_start + i) * p.p.dq.s;
    store_result<T, BITS>(p, p.ptr.dq, at, acc, r, p.scale, int(p.p.head_dim));
  }
  if (warp_finds_nan(acc))
    each_row(m0 + 16 * warp_id(), seq.seqlen_q,
             [&](int i) { Repair<T, HEAD_DIM, BITS>{p, seq}.query_gradient(head, i); });
}

// sums = 0, one CTA of 128 threads a tile.
template <int HEAD_DIM>
ATTN_DEVICE void clear_sums(const Params& p) {
  float* sums = p.dq_sums + int64_t(block_id().x) * 64 * HEAD_DIM + 4 * thread_id();
  ATTN_UNROLL
  for (int n = 0; n < HEAD_DIM / 8; ++n) stg_128(sums + n * 128 * 4, {0, 0, 0, 0});
}

// dQ = scale * sums, one CTA of 128 threads a tile.  load(sums, acc) takes a thread's fragments
// from its tile, in the order in which the kernel added them.
template <class T, int HEAD_DIM, int BITS, class Load>
ATTN_DEVICE void convert_sums(const Params& p, const Load& load) {
  const TileOf x = query_numbers(p, 64).find(block_id().x);
  const Sequence seq = Sequence::of<BITS>(p, x.b);
  if (64 * x.tile >= seq.seqlen_q) return;  // packed: a number that stands for no tile
  float acc[HEAD_DIM / 8][4];
  load(p.dq_sums + int64_t(block_id().x) * (64 * HEAD_DIM), acc);
  store_query_gradient<T, HEAD_DIM, BITS>(p, seq, x.head, 64 * x.tile, acc);
}

}  // namespace attn::cuda
