// Checks the numbers of tiles of packed sequences (cuda/packed.h), and prints the cases that are
// wrong: which tile a number stands for, and how often a start of a sequence is read for it.  Steps
// are counted, so that a walk over all sequences shows whatever the machine.
#include "../cuda/packed.h"

#include <cstdio>
#include <vector>

namespace {

using attn::cuda::PackedTiles;
using attn::cuda::TileNumbers, attn::cuda::TileOf;
using Lengths = std::vector<int>;

struct CountedStarts {
  const int32_t* at = nullptr;
  int64_t* reads = nullptr;
  constexpr explicit operator bool() const { return at != nullptr; }
  constexpr int32_t operator[](int b) const { return ++*reads, at[b]; }
};

struct Packed {
  std::vector<int32_t> starts{0};
  int64_t reads = 0;

  explicit Packed(const Lengths& lengths) {
    for (int n : lengths) starts.push_back(starts.back() + n);
  }
  int batch() const { return int(starts.size()) - 1; }
  int tiles(int b, int block) const { return (starts[b + 1] - starts[b] + block - 1) / block; }
  int numbers(int block) const {
    return int(attn::cuda::packed_tiles(starts.back(), batch(), block));
  }
  CountedStarts counted() { return {starts.data(), &reads}; }
};

// Every tile of every head has one number, whether the search begins anew or goes on.
bool each_tile_once(const Lengths& lengths, int block, int ctas) {
  Packed packed(lengths);
  const int heads = 2, numbers = packed.numbers(block);
  std::vector<std::vector<int>> met(size_t(packed.batch() * heads));
  for (int b = 0; b < packed.batch(); ++b)
    for (int h = 0; h < heads; ++h) met[b * heads + h].resize(packed.tiles(b, block));
  std::vector<PackedTiles<CountedStarts>> order(
      ctas, PackedTiles<CountedStarts>{packed.counted(), packed.batch(), block});
  const TileNumbers<CountedStarts> all{packed.counted(), packed.batch(), heads, numbers, block};
  for (int x = 0; x < numbers * heads; ++x) {
    const TileOf t = all.find(x);
    if (t.b < 0 || !all.has(t) || t.tile < 0) return false;
    if (all.first(t.b, packed.starts[t.b], t.head) + t.tile != x) return false;
    if (t.tile < packed.tiles(t.b, block)) ++met[t.b * heads + t.head][t.tile];
    if (x < numbers && order[x % ctas].find(x) != t.b) return false;
  }
  for (const auto& tiles : met)
    for (int times : tiles)
      if (times != 1) return false;
  return !all.has(all.find(numbers * heads));
}

// Starts that are not true: no number stands for a tile in front of a sequence.
bool no_tile_in_front(const std::vector<int32_t>& starts, int rows, int block) {
  const int batch = int(starts.size()) - 1;
  const int numbers = int(attn::cuda::packed_tiles(rows, batch, block));
  for (int x = 0; x < numbers; ++x)
    if (TileNumbers<const int32_t*>{starts.data(), batch, 1, numbers, block}.find(x).tile < 0)
      return false;
  return true;
}

// Reads a number, where CTAs take numbers in turn and remember where they were.
double reads_going_on(const Lengths& lengths, int block, int ctas) {
  Packed packed(lengths);
  const int numbers = packed.numbers(block);
  std::vector<PackedTiles<CountedStarts>> order(
      ctas, PackedTiles<CountedStarts>{packed.counted(), packed.batch(), block});
  for (int x = 0; x < numbers; ++x) order[x % ctas].find(x);
  return double(packed.reads) / numbers;
}
// The most for one number, where each is looked for anew; every 97th is asked for.
int64_t reads_anew(const Lengths& lengths, int block) {
  Packed packed(lengths);
  const int numbers = packed.numbers(block);
  int64_t most = 0;
  for (int x = 0; x < numbers; x += 97) {
    packed.reads = 0;
    TileNumbers<CountedStarts>{packed.counted(), packed.batch(), 1, numbers, block}.find(x);
    most = packed.reads > most ? packed.reads : most;
  }
  return most;
}

}  // namespace

int main() {
  const Lengths shapes[] = {{1},         {0, 0, 5},          {128, 128, 128}, {127, 129, 1, 0, 300},
                            {0, 64, 65}, {1, 1, 1, 1000, 1}, {5, 0, 0, 0, 7}, Lengths(300, 1)};
  bool ones = true, dense = true;
  for (const Lengths& lengths : shapes)
    for (int block : {1, 64, 128})
      for (int ctas : {1, 3}) ones = ones && each_tile_once(lengths, block, ctas);
  if (!ones) std::puts("tiles");
  const TileNumbers<const int32_t*> each{nullptr, 2, 4, 3, 128};
  for (int64_t x = 0; x < 25; ++x) {
    const TileOf t = each.find(x);
    dense = dense && (t.b * 4 + t.head) * 3 + t.tile == x && t.tile < 3 && t.head < 4 &&
            each.first(t.b, 0, t.head) + t.tile == x && each.has(t) == (x < 24);
  }
  if (!dense) std::puts("dense");
  if (!no_tile_in_front({200, 210, 300}, 300, 64) || !no_tile_in_front({290, 20, 300}, 300, 64))
    std::puts("lies");
  const Lengths many(100000, 1);  // 2^17 sequences: 17 steps that double, and 17 back
  if (reads_anew(many, 128) > 2 * 17 + 2) std::puts("anew");
  if (reads_going_on(many, 128, 132) > 2 * 8 + 2) std::puts("further");  // 2^8 > 132
  return 0;
}
