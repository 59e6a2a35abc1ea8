// How a call with few queries is cut (Flash-Decoding): the query heads of one K/V head share a
// tile's rows, so that a key is read once for all of them, and when tiles are fewer than
// multiprocessors the keys of a tile are shared by several CTAs, whose results combine.cuh merges.
// forward.cuh runs both; only the plan is here.  Host code.
#pragma once
#include <algorithm>

#include "../tile_counts.h"
#include "../tiles.h"

namespace attn::cuda::sm80 {

constexpr int kMaxSplits = 128;  // parts that the merge adds up one after the other

// Calls whose queries leave most rows of a tile empty, and have keys to share among warps.
inline bool few_queries(const Problem& p) { return p.seqlen_q <= 16 && p.seqlen_k >= 256; }

struct Plan {
  int pack, m_tiles, splits;
};

// block_m, block_n: the forward tile.  multiprocessors: of the device.
inline Plan plan_forward(const Problem& p, const Pointers& ptr, int block_m, int block_n,
                         int multiprocessors) {
  const bool varlen = ptr.cu_seqlens_q != nullptr;
  const int64_t group = p.heads_q / p.heads_k;
  const bool pack = !varlen && group > 1 && p.seqlen_q * 2 <= block_m;
  const int64_t m_tiles =
      pack ? (group * p.seqlen_q + block_m - 1) / block_m : query_tiles(p, ptr, block_m).of_head;
  const int64_t tiles = p.batch * (pack ? p.heads_k : p.heads_q) * m_tiles;
  int64_t splits = 1;
  const int64_t n_tiles = (p.seqlen_k + block_n - 1) / block_n;
  if (p.num_splits > 0)  // the caller's wish, as far as there are tiles to share
    splits = varlen ? 1 : std::min({p.num_splits, n_tiles, int64_t(kMaxSplits)});
  // A CTA wants a few key tiles of its own, or the merge costs more than it saves.
  else if (!varlen && tiles > 0 && tiles * 10 < 8 * int64_t(multiprocessors))
    splits = std::min({2 * int64_t(multiprocessors) / tiles, n_tiles / 2, int64_t(kMaxSplits)});
  return {pack ? int(group) : 1, int(m_tiles), int(std::max<int64_t>(splits, 1))};
}

}  // namespace attn::cuda::sm80
