// How many sums a backward of one kernel adds dQ up in.  Host code.
#pragma once
#include "../params.h"

namespace attn::cuda {

// Tiles of 64 queries of a head, in all batches (query_sums.cuh: sum_tile).
inline int64_t sum_tiles(const Problem& p, const Pointers& ptr) {
  return ptr.cu_seqlens_q ? p.rows_q / 64 + p.batch : p.batch * ((p.seqlen_q + 63) / 64);
}

}  // namespace attn::cuda
