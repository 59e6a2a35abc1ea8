// What a panel of queries needs of a tile of keys, and the boolean mask there as bits.
#pragma once
#include "cpu/simd/vector.h"
#include "cpu/tile/sequence.h"
#include "cpu/tiles.h"

namespace attn::cpu::ATTN_ISA {

// Causal and window bands are cut by grain: products with keys that no query of the grain sees are
// not computed.
struct Tile {
  int64_t n0, nk;                    // first key, number of keys
  int64_t lo[kGrains], hi[kGrains];  // keys that grain g needs, relative to n0; both ascend with g
  bool empty;
  bool banded;  // some computed pair lies outside the band

  // Keys outside of [first, end) are not needed.
  void narrow(int64_t first, int64_t end, int64_t grains) {
    empty = true;
    for (int64_t g = 0; g < grains; ++g) {
      lo[g] = std::clamp(lo[g], first, end);
      hi[g] = std::max(lo[g], std::clamp(hi[g], first, end));
      empty &= hi[g] == lo[g];
    }
  }
};

// Bit c of word(w)[q]: query q of the panel sees key 32 * w + c of the tile, as far as the mask
// goes.  Read once a tile: first to leave out keys that no query sees, then for the logits.
template <class T>
class MaskBits {
 public:
  using Int = typename IntOf<T>::type;
  static constexpr int64_t size(int64_t keys) { return (keys + 31) / 32 * kPanel; }
  explicit MaskBits(Int* scratch) : words(scratch) {}  // [size(keys of a tile)]

  // Queries [m0, m0 + nq) of head h; the tile is narrowed to what some of them see.  cycle: where
  // not 0, the rows of some heads, one head after the other: row r is query r % cycle.
  void read(const Sequence& seq, int64_t h, int64_t m0, int64_t nq, int64_t cycle, int64_t grains,
            int64_t pack, Tile* t) const {
    const auto& s = seq.p->mask;
    const auto* base =
        static_cast<const uint8_t*>(seq.ptr->mask) + seq.b * s.b + h * s.h + t->n0 * s.k;
    int64_t first = t->nk, end = 0;
    for (int64_t j = t->lo[0] / 32 * 32; j < t->hi[grains - 1]; j += 32) {
      const int64_t n = std::min<int64_t>(32, t->nk - j), rows = s.q == 0 ? 1 : nq;
      Int* word = words + j / 32 * kPanel;
      uint32_t any = 0;
      for (int64_t q = 0; q < rows; ++q) {
        const int64_t i = cycle ? (m0 + q) % cycle : m0 + q;
        const uint32_t bits = load_bits(base + i * s.q + j * s.k, s.k, n);
        word[q] = Int(bits);
        any |= bits;
      }
      std::fill(word + rows, word + grains * kGrain, word[rows - 1]);  // broadcast, or padding
      if (any == 0) continue;
      first = std::min(first, j + __builtin_ctz(any));
      end = j + 32 - __builtin_clz(any);
    }
    first = first / pack * pack;
    end = std::max(first, std::min((end + pack - 1) / pack * pack, t->nk));
    t->narrow(first, end, grains);
  }

  // S = -inf where the mask excludes.
  void apply(const Tile& t, int64_t grains, T* S) const {
    constexpr int L = kLanes<T>;
    const T ninf = -std::numeric_limits<T>::infinity();
    for (int64_t g = 0; g < grains; ++g)
      for (int64_t j = t.lo[g] / 32 * 32; j < t.hi[g]; j += 32) {
        const int64_t begin = std::max(t.lo[g] - j, int64_t(0)),
                      end = std::min<int64_t>(t.hi[g] - j, 32);
        const Int full = Int(~0u >> (32 - std::min<int64_t>(32, t.nk - j)));
        for (int64_t q = g * kGrain; q < (g + 1) * kGrain; q += L) {
          const Mask<T> bits = load(words + j / 32 * kPanel + q);
          if (all_lanes<T>(bits == full)) continue;
          for (int64_t c = begin; c < end; ++c) {
            T* at = S + (j + c) * kPanel + q;
            store(at, (bits & Int(1u << c)) == 0 ? set1(ninf) : load(at));
          }
        }
      }
  }

 private:
  Int* words;

  // n bytes `step` apart as bits: 1 where not 0.
  static ATTN_INLINE uint32_t load_bits(const uint8_t* at, int64_t step, int64_t n) {
#if ATTN_VEC_BYTES == 64
    if (step == 1 && n == 32) {
      const __m256i bytes = _mm256_loadu_si256((const __m256i*)at);
      return _mm256_test_epi8_mask(bytes, bytes);
    }
#elif ATTN_VEC_BYTES == 32
    if (step == 1 && n == 32) {
      const __m256i bytes = _mm256_loadu_si256((const __m256i*)at);
      return ~uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256())));
    }
#endif
    if (step == 0) return *at ? ~0u >> (32 - n) : 0;
    uint32_t bits = 0;
    for (int64_t c = 0; c < n; ++c) bits |= uint32_t(at[c * step] != 0) << c;
    return bits;
  }
};

}  // namespace attn::cpu::ATTN_ISA
