// Tiles of rows in shared memory and the copies that fill them.
//
// A tile is [rows][HEAD_DIM], a row Row::BYTES long.  Its 16-byte chunk c lies at chunk c ^ f(row),
// so that the 8 rows which one ldmatrix phase reads at the same c fall into 8 different bank
// groups: f = row % 8 where a row is a multiple of 128 bytes, else (D = 32 and 96 in 16 bits) pairs
// of rows already differ by 64 bytes and f = row / 2 % 4.
#pragma once
#include "traits.cuh"

namespace attn::cuda {

template <class T, int HEAD_DIM>
ATTN_DEVICE int row_swizzle(int row) {
  return Row<T, HEAD_DIM>::BYTES % 128 == 0 ? row & 7 : (row >> 1) & 3;
}

template <class T, int HEAD_DIM>
ATTN_DEVICE uint32_t tile_address(uint32_t tile, int row, int chunk) {
  return tile +
         uint32_t(row * Row<T, HEAD_DIM>::BYTES + ((chunk ^ row_swizzle<T, HEAD_DIM>(row)) << 4));
}

// Byte offset in its row of chunk `even | odd`: even is known at compile time, odd (0 or 1) depends
// on the lane, and so does f, the swizzle of the row.  Only 4 different values that the lane
// decides (2 where f has 2 bits), so that few registers hold the addresses of a whole row.
template <class T, int HEAD_DIM>
ATTN_DEVICE uint32_t chunk_offset(int f, int even, int odd) {
  constexpr int SPAN = Row<T, HEAD_DIM>::BYTES % 128 == 0 ? 8 : 4;
  return ((((even % SPAN) | odd) ^ f) << 4) + even / SPAN * SPAN * 16;
}

// Rows of one head in global memory.  Without a period: row r at base + r * stride.  Else at
// quotient and remainder of r / period: pages of a KV cache (table), or query heads packed into one
// tile.
struct Rows {
  const char* base;
  int64_t stride;  // bytes
  Divisor period;
  int64_t outer;  // bytes
  const int32_t* table;
  int pages = 0;  // that the table may name; an entry that is not true is cut to them

  template <bool GENERAL>
  ATTN_DEVICE const char* at(int row) const {
    if (!GENERAL || !period.by) return base + row * stride;
    const int q = period.quotient(row);
    return base + int64_t(table ? page(table[q]) : q) * outer + (row - q * period.by) * stride;
  }
  // An entry of the table.
  ATTN_DEVICE int page(int entry) const {
    ATTN_CHECK(entry >= 0 && entry < pages, "an entry of block_table is not below", entry, pages);
    return max_int(0, min_int(entry, pages - 1));
  }
};

// Which key lies in row `row` of a tile of keys: itself, or 4 t + 2 h + e of each 16 in row
// 8 h + 2 t + e, so that the columns 2 t, 2 t + 1 of two neighbouring C fragments, which a thread
// owns (mma.cuh), are 4 keys in a row: one load of a mask or of a bias, one block of Philox.
// Products know nothing of it: a sum over keys does not mind their order.
struct InOrder {
  static constexpr bool FOURS = false;
  ATTN_DEVICE static int key(int row) { return row; }
};
struct InFours {
  static constexpr bool FOURS = true;
  ATTN_DEVICE static int key(int row) {
    return (row & ~15) | ((row & 6) << 1) | ((row & 8) >> 2) | (row & 1);
  }
};

ATTN_DEVICE uint32_t element_bits(const uint16_t* p) { return *p; }
ATTN_DEVICE uint32_t element_bits(const uint32_t* p) { return *p; }

// 16 bytes of a row from `column` on, read element by element; 0 from column `dim` on.
template <class T, class Edit>
ATTN_DEVICE U32x4 gather_chunk(const char* row, int column, int dim, const Edit& edit) {
  uint32_t w[4] = {0, 0, 0, 0};
  if constexpr (kIsHalf<T>) {
    ATTN_UNROLL
    for (int e = 0; e < 8; ++e)
      if (column + e < dim) {
        const T v = edit(reinterpret_cast<const T*>(row)[column + e]);
        w[e / 2] |= uint32_t(v.bits) << (16 * (e % 2));
      }
  } else {
    ATTN_UNROLL
    for (int e = 0; e < 4; ++e)
      if (column + e < dim) w[e] = as_uint(edit(reinterpret_cast<const T*>(row)[column + e]));
  }
  return {w[0], w[1], w[2], w[3]};
}

struct Unchanged {
  template <class T>
  ATTN_DEVICE T operator()(T v) const {
    return v;
  }
};

// tile[r] = rows[first + Order::key(r)]; 0 where that is >= end or column >= dim, so that nothing
// out of range is read or multiplied.  vec: by cp.async (the caller commits and waits), else by
// plain loads.
//
// A thread keeps its chunk and goes down the rows (with 12 or 24 chunks a row some threads rest):
// one pointer that is moved on, where an index per copy would cost a register pair each.
template <class T, int HEAD_DIM, int ROWS, int THREADS, bool GENERAL, class Order = InOrder>
ATTN_DEVICE void copy_tile(uint32_t tile, const Rows& rows, int first, int end, int dim, bool vec) {
  using R = Row<T, HEAD_DIM>;
  constexpr int STEP = THREADS / R::CHUNKS;  // rows that the CTA copies at a time
  static_assert(STEP > 0, "a row has more chunks than the CTA threads");
  const int chunk = thread_id() % R::CHUNKS, column = chunk * R::PER_CHUNK;
  int row = thread_id() / R::CHUNKS;
  if (THREADS % R::CHUNKS && row >= STEP) return;
  const bool inside = column < dim;
  if (!vec) {
    ATTN_NO_UNROLL
    for (; row < ROWS; row += STEP) {
      U32x4 v{0, 0, 0, 0};
      const int key = first + Order::key(row);
      if (inside && key < end) v = gather_chunk<T>(rows.at<GENERAL>(key), column, dim, Unchanged());
      sts_128(tile_address<T, HEAD_DIM>(tile, row, chunk), v);
    }
    return;
  }
  const char* from = rows.base + (first + row) * rows.stride + column * int(sizeof(T));
  ATTN_UNROLL_4
  for (int i = 0; i < (ROWS + STEP - 1) / STEP; ++i, row += STEP, from += STEP * rows.stride) {
    if (ROWS % STEP && row >= ROWS) break;
    const int key = first + Order::key(row);
    const bool valid = inside && key < end;
    if ((GENERAL || Order::FOURS) && valid) from = rows.at<GENERAL>(key) + column * int(sizeof(T));
    cp_async_16(tile_address<T, HEAD_DIM>(tile, row, chunk), valid ? from : rows.base, valid);
  }
}

// Whole tiles of ROWS rows, one behind the other, that come into the same buffer by cp.async.  A
// thread has chunks that are LANES apart, of rows that are a multiple of 8 apart: their swizzle is
// the same, and what is between its chunks of a row is known at compile time, here and there.  So
// one addition moves its pointer to the next row, and a copy is one instruction.
template <class T, int HEAD_DIM, int ROWS, int THREADS, class Order = InOrder>
struct TileStream {
  using R = Row<T, HEAD_DIM>;
  static constexpr int LANES = R::BYTES % 128 == 0 ? 8 : 4;  // of a row: chunk_offset()'s SPAN
  static constexpr int STEP = THREADS / LANES;               // rows that the CTA copies at a time
  static constexpr int CHUNKS = R::CHUNKS / LANES;           // of a row that a thread copies
  static_assert(R::CHUNKS % LANES == 0 && ROWS % STEP == 0);
  // Rows 16 apart hold keys 16 apart in any order.
  static_assert(STEP % (Order::FOURS ? 16 : 8) == 0);
  uint32_t to;
  const char* from;
  int64_t step;  // bytes
  int columns;   // from this thread's first on, that are there; those behind are zeros

  // From rows[first] on.
  ATTN_DEVICE TileStream(uint32_t tile, const Rows& rows, int first, int dim) {
    const int row = thread_id() / LANES, chunk = thread_id() % LANES;
    to = tile_address<T, HEAD_DIM>(tile, row, chunk);
    from = rows.base + (first + Order::key(row)) * rows.stride + 16 * chunk;
    step = STEP * rows.stride;
    columns = dim - chunk * R::PER_CHUNK;
  }
  // The next tile; the caller commits and waits.  opaque: the compiler would keep the distance of
  // two tiles beside that of two rows, and add to the pointer once more.
  ATTN_DEVICE void copy() {
    ATTN_UNROLL
    for (int i = 0; i < ROWS / STEP; ++i, from = opaque(from + step)) ATTN_UNROLL
    for (int c = 0; c < CHUNKS; ++c)
      cp_async_16(to + i * STEP * R::BYTES + 16 * LANES * c, from + 16 * LANES * c,
                  columns > c * LANES * R::PER_CHUNK);
  }
};

ATTN_DEVICE bool word_is_finite(float, uint32_t w) { return (w & 0x7f800000u) != 0x7f800000u; }
ATTN_DEVICE bool word_is_finite(bf16, uint32_t w) {
  return (w & 0x7f80u) != 0x7f80u && (w & 0x7f800000u) != 0x7f800000u;
}
ATTN_DEVICE bool word_is_finite(fp16, uint32_t w) {
  return (w & 0x7c00u) != 0x7c00u && (w & 0x7c000000u) != 0x7c000000u;
}

// Which one a thread is of those that share a tile: those of the CTA, or of a warp that has it
// alone.
template <int THREADS>
ATTN_DEVICE int sharer_id() {
  return THREADS == 32 ? lane_id() : thread_id();
}

// The lanes of a warp that find NaN or an infinity, each in every THREADS-th chunk of a tile.
template <class T, int HEAD_DIM, int ROWS, int THREADS>
ATTN_DEVICE uint32_t lanes_find_nonfinite(uint32_t tile) {
  constexpr int CHUNKS = ROWS * Row<T, HEAD_DIM>::CHUNKS;
  bool bad = false;
  ATTN_NO_UNROLL
  for (int index = sharer_id<THREADS>(); index < CHUNKS; index += THREADS) {
    const U32x4 v = lds_128(tile + 16 * index);
    bad |= !(word_is_finite(T{}, v.x) && word_is_finite(T{}, v.y) && word_is_finite(T{}, v.z) &&
             word_is_finite(T{}, v.w));
  }
  return ballot(bad);
}

// True in every thread of the CTA when some element of the tile is NaN or infinite.  flags: a word
// a warp.
template <class T, int HEAD_DIM, int ROWS, int WARPS>
ATTN_DEVICE bool tile_has_nonfinite(uint32_t tile, uint32_t flags) {
  const uint32_t votes = lanes_find_nonfinite<T, HEAD_DIM, ROWS, 32 * WARPS>(tile);
  if (lane_id() == 0) sts_32(flags + 4 * warp_id(), votes);
  sync_threads();  // every warp's vote is there
  uint32_t any = 0;
  for (int w = 0; w < WARPS; ++w) any |= lds_32(flags + 4 * w);
  return any != 0;
}

}  // namespace attn::cuda
