// Which tile of which sequence a number stands for in a packed call, whose lengths only the device
// knows, without a look at the sequences before it.
//
// Sequence b has the numbers from starts[b] / block + b on, the first those from 0: one for each of
// its tiles of `block` rows, and at most one more, which stands for no tile.  With `rows` rows in
// all there are rows / block + batch numbers.  Where those of a sequence begin grows with b, so
// that the sequence of a number is found by steps that double and then by halves.  For the host and
// for kernels.
#pragma once
#include <cstdint>

namespace attn::cuda {

constexpr int64_t packed_tiles(int64_t rows, int64_t batch, int block) {
  return rows / block + batch;
}

// Starts: [b] is the first row of sequence b; const int32_t* in kernels.
template <class Starts>
struct PackedTiles {
  Starts starts;
  int batch, block;
  int b = 0;  // the sequence of the number that was asked for last

  // 0 for the first sequence, wherever it is said to start: no number comes before a first one.
  static constexpr int first(int sequence, int start, int block) {
    return sequence ? start / block + sequence : 0;
  }
  constexpr int first(int sequence) const { return first(sequence, starts[sequence], block); }
  constexpr bool begins_by(int sequence, int number) const {
    return sequence < batch && first(sequence) <= number;
  }
  // The sequence of a number; numbers that are asked for grow.  Twice the logarithm of how many
  // sequences it is away from the last one.
  constexpr int find(int number) {
    int step = 1;
    for (; begins_by(b + step, number); step *= 2) b += step;
    while (step > 1) {
      step /= 2;
      if (begins_by(b + step, number)) b += step;
    }
    return b;
  }
};

struct TileOf {
  int b, head, tile;  // packed: the tile behind a sequence's last is none
};

// The numbers of all tiles of a call: [batch][heads][tiles of a sequence] or, packed (starts is
// there), [heads][tiles of all sequences].
template <class Starts>
struct TileNumbers {
  Starts starts;
  int batch, heads, tiles, block;  // tiles: of a head, as above

  template <class Number>  // int or, where rows are numbered, int64_t
  constexpr TileOf find(Number x) const {
    const int above = int(x / tiles), tile = int(x % tiles);
    if (!starts) return {above / heads, above % heads, tile};
    PackedTiles<Starts> packed{starts, batch, block};
    const int b = packed.find(tile);
    return {b, above, tile - packed.first(b)};
  }
  // Whether a number was one of the call's.
  constexpr bool has(const TileOf& x) const { return x.b < batch && x.head < heads; }
  // The number of the first tile of a sequence, which starts there, and head.
  constexpr int64_t first(int b, int start, int head) const {
    if (!starts) return (int64_t(b) * heads + head) * tiles;
    return int64_t(head) * tiles + PackedTiles<Starts>::first(b, start, block);
  }
};

}  // namespace attn::cuda
