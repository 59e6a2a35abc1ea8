// What the forward kernels of every architecture share: which rows a CTA works on, the mask on
// fragments of S, and the end, O and LSE from fragments to memory.  A thread owns rows g and g + 8
// of its warp's 16 (mma.cuh).
#pragma once
#include "score.cuh"
#include "softmax.cuh"

namespace attn::cuda {

// Which rows a CTA works on, and which share of their keys.
struct QueryTask {
  int head, split;  // head: first query head of the rows
  int row0, rows;   // rows of the tile: row0 .. of `rows` in all; row0 < 0: there is no tile
  int end;          // of its rows
  Sequence seq;

  // That of a CTA.  Causal tiles grow: the longest of a sequence come first.
  template <int BITS>
  ATTN_DEVICE static QueryTask of(const Params& p, int block_m) {
    TileNumbers<const int32_t*> numbers = query_numbers(p, block_m);
    numbers.heads /= p.pack;
    const TileOf x = numbers.find(block_id().x / p.splits);
    const Sequence seq = Sequence::of<BITS>(p, x.b);
    const int rows = p.pack * seq.seqlen_q, m = ceil_div(rows, block_m) - 1 - x.tile;
    return of(seq, x.head * p.pack, block_id().x % p.splits, m * block_m, rows, block_m);
  }
  ATTN_DEVICE static QueryTask of(const Sequence& seq, int head, int split, int row0, int rows,
                                  int block_m) {
    return {head, split, row0, rows, min_int(row0 + block_m, rows), seq};
  }
};

// S: products in, logits out; without features products, and -inf where a pair does not count.
template <int BITS, int TILES>
ATTN_DEVICE void mask_scores(float (&S)[TILES][4], const Score& score, const Query (&query)[2],
                             int n0) {
  ATTN_UNROLL
  for (int n = 0; n < TILES; ++n) {
    ATTN_UNROLL
    for (int c = 0; c < 4; ++c) {
      const int j = n0 + 8 * n + 2 * (lane_id() & 3) + (c & 1);
      const Query& q = query[c >> 1];
      float derivative;
      if constexpr (BITS != 0)
        S[n][c] = score.template logit<BITS>(S[n][c], q, j, derivative);
      else
        S[n][c] = j < score.seq.seqlen_k && score.band.keep(q.i, j) ? S[n][c] : -kInf;
    }
  }
}

// Columns 8 n + 2 t + {0, 1} of one row, as T or as the floats of a partial result.  FORGETS: a
// factor of 0 leaves 0 of what is infinite; of a gradient 0 * NaN is NaN.
template <bool FORGETS, class Out, int ACC>
ATTN_DEVICE void store_row(Out* row, const float (&acc)[ACC][4], int r, float factor, int dim) {
  const int t = lane_id() & 3;
  const bool pairs = dim % 2 == 0 && reinterpret_cast<uintptr_t>(row) % (2 * sizeof(Out)) == 0;
  ATTN_UNROLL
  for (int n = 0; n < ACC; ++n) {
    const int d = 8 * n + 2 * t;
    const float a = FORGETS && factor == 0.0f ? 0.0f : acc[n][2 * r] * factor;
    const float b = FORGETS && factor == 0.0f ? 0.0f : acc[n][2 * r + 1] * factor;
    if (pairs && d < dim) {
      if constexpr (sizeof(Out) == 2)
        *reinterpret_cast<uint32_t*>(row + d) = pack<Out>(a, b);
      else
        stg_64(row + d, {as_uint(a), as_uint(b)});
    } else {
      if (d < dim) row[d] = from_float<Out>(a);
      if (d + 1 < dim) row[d + 1] = from_float<Out>(b);
    }
  }
}

// A row of O, dQ, dK or dV at element `at` of a tensor of the call.
template <class T, int BITS, bool FORGETS = false, int ACC>
ATTN_DEVICE void store_result(const Params& p, void* base, int64_t at, const float (&acc)[ACC][4],
                              int r, float factor, int dim) {
  if (has<BITS>(p, kPart))
    store_row<FORGETS>(static_cast<float*>(base) + at, acc, r, factor, dim);
  else
    store_row<FORGETS>(static_cast<T*>(base) + at, acc, r, factor, dim);
}

// O, LSE and statistics of a warp's 16 rows, or one share of them (SHARES: it may be one). factors:
// not O, whose caller stores it times these.
template <class T, int BITS, bool SHARES, int ACC>
ATTN_DEVICE void store_rows(const Params& p, const QueryTask& task, const float (&acc)[ACC][4],
                            const RowState& state, const Query (&query)[2], int row, float scale,
                            float* factors = nullptr) {
  const Sequence& seq = task.seq;
  const bool stats = has<BITS>(p, kStats);
  ATTN_UNROLL
  for (int r = 0; r < 2; ++r) {
    const Query& q = query[r];
    const bool valid = row + 8 * r < task.rows;
    const auto* sinks = static_cast<const float*>(p.ptr.sink);
    const bool partial = SHARES && p.splits > 1;
    const bool sink = has<BITS>(p, kSink) && !partial && valid;
    const RowResult result = finish_row(state, r, scale, sink ? sinks + q.h : nullptr, stats);
    const bool drops = has<BITS>(p, kDropout);
    const float factor = drops ? result.inverse * p.keep_scale : result.inverse;
    if (factors) factors[r] = factor;
    if (!valid) continue;
    const bool writes = (lane_id() & 3) == 0;
    if (partial) {
      const int64_t all = p.p.batch * p.p.heads_q * p.p.seqlen_q;
      const int64_t at = (seq.b * p.p.heads_q + q.h) * p.p.seqlen_q + q.i + task.split * all;
      store_row<true>(p.partial_o + at * p.p.head_dim_v, acc, r, factor, int(p.p.head_dim_v));
      if (!writes) continue;
      p.partial_stats[at] = result.log_sum;
      p.partial_stats[at + p.splits * all] = result.max_logit;
      p.partial_stats[at + 2 * p.splits * all] = result.entropy;
      continue;
    }
    const int64_t at = seq.b * p.p.o.b + q.h * p.p.o.h + (seq.q_start + q.i) * p.p.o.s;
    if (!factors) store_result<T, BITS, true>(p, p.ptr.o, at, acc, r, factor, int(p.p.head_dim_v));
    if (!writes) continue;
    const int64_t lse = seq.lse_offset(p, q.h, q.i);
    static_cast<float*>(p.ptr.lse)[lse] = result.lse;
    if (!stats) continue;
    static_cast<float*>(p.ptr.max_logit)[lse] = result.max_logit;
    static_cast<float*>(p.ptr.entropy)[lse] = result.entropy;
  }
}

}  // namespace attn::cuda
