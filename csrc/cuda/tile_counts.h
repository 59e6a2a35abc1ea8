// How many tiles a call has, of which kernels are given Params::m_tiles and n_tiles.  Host code.
#pragma once
#include <stdexcept>
#include <string>

#include "../params.h"
#include "packed.h"

namespace attn::cuda {

// of_head: of a sequence or, packed, of all sequences (TileNumbers).
struct TileCount {
  int of_head;
  int64_t all;
};

inline TileCount count_tiles(const int32_t* starts, int64_t rows, int64_t length, int64_t batch,
                             int64_t heads, int block) {
  const int64_t of_head = starts ? packed_tiles(rows, batch, block) : (length + block - 1) / block;
  if (of_head > 2147483647)
    throw std::invalid_argument("a call has at most 2^31 - 1 rows and sequences, got " +
                                std::to_string(rows) + " and " + std::to_string(batch));
  return {int(of_head), of_head * heads * (starts ? 1 : batch)};
}
inline TileCount query_tiles(const Problem& p, const Pointers& ptr, int block) {
  return count_tiles(ptr.cu_seqlens_q, p.rows_q, p.seqlen_q, p.batch, p.heads_q, block);
}
inline TileCount key_tiles(const Problem& p, const Pointers& ptr, int block) {
  return count_tiles(ptr.cu_seqlens_k, p.rows_k, p.seqlen_k, p.batch, p.heads_k, block);
}
// Tiles of the sums of a backward in one kernel (query_sums.cuh).
inline TileCount sum_tiles(const Problem& p, const Pointers& ptr) {
  return query_tiles(p, ptr, 64);
}

}  // namespace attn::cuda
