// Features in the backward by keys on Hopper (backward_features.cuh): mask, bias, ALiBi, soft cap,
// dropout.
//
// A fragment of S^T has keys as rows, and mask and bias lie as [query][key].  Three warps of the
// producer's warpgroup bring them to shared memory, a tile of queries ahead of the consumers, into
// a ring of their own:
//   bias    [BLOCK_M][BLOCK_N], 16 bits as given (ldmatrix turns it over) or float32
//   flags   a bit a pair, [16 keys][BLOCK_M] of 16 bits each: what a mask keeps, and what dropout
//           keeps
// so that a consumer's loop has a load for each 16 queries, and a test and a select for each pair.
// The sign of P says whether dropout took the pair.
#pragma once
#include "../side.cuh"
#include "backward_dkdv.cuh"

namespace attn::cuda::sm90 {

// One stage of the ring in shared memory, and who reads and writes what of it.
template <class T, class Tile>
struct SideTile {
  static constexpr int M = Tile::BLOCK_M, N = Tile::BLOCK_N, BITS = Tile::BITS;
  static constexpr int FLAG_ROW = Tile::FLAG_ROW;           // bytes of the flags of 16 keys
  static constexpr int BIAS_ROW = 2 * N, WIDE_ROW = 4 * N;  // bytes of a query's biases
  // Producers: a lane has 4 keys of a query, LANES of them a row, and a warp so many ROWS at once.
  static constexpr int LANES = N / 4, ROWS = 32 / LANES;
  uint32_t at;

  ATTN_DEVICE static int lane() { return lane_id() % LANES; }  // whose keys are 4 * lane .. + 3

  // Whether the bias lies as float32.
  ATTN_DEVICE static bool wide(const Params& p) { return has<BITS>(p, kBiasFloat); }
  ATTN_DEVICE uint32_t mask_flags(const Params& p) const {
    return at + (has<BITS>(p, kBias) ? M * (wide(p) ? WIDE_ROW : BIAS_ROW) : 0);
  }
  ATTN_DEVICE uint32_t dropout_flags(const Params& p) const {
    return mask_flags(p) + (has<BITS>(p, kMask) ? Tile::FLAG_BYTES : 0);
  }

  // ---- producers
  // A bit for each byte that is not 0.
  ATTN_DEVICE static uint32_t four_flags(uint32_t bytes) {
    const uint32_t high = (((bytes & 0x7f7f7f7fu) + 0x7f7f7f7fu) | bytes) & 0x80808080u;
    return ((high >> 7) * 0x10204080u) >> 28;
  }
  // Those of queries `row` and row + 1 are a word of 16 keys.
  ATTN_DEVICE static void store_flags(uint32_t flags, int row, uint32_t first, uint32_t second) {
    const int lane = SideTile::lane();
    uint32_t word = (first | second << 16) << (4 * (lane & 3));
    word |= shfl_xor(word, 1);
    word |= shfl_xor(word, 2);
    if ((lane & 3) == 0) sts_32(flags + (lane >> 2) * FLAG_ROW + row_place(row) / 2, word);
  }
  // Biases of a query from `element` on; count: of keys that are there.
  ATTN_DEVICE void copy_bias(const Params& p, int row, int64_t element, int count) const {
    const int lane = SideTile::lane();
    if (wide(p)) {
      const float* from = static_cast<const float*>(p.ptr.bias) + element;
      const uint32_t to =
          at + uint32_t(row * WIDE_ROW + ((lane >> 1 ^ (row >> 1 & 3)) << 5) + (lane & 1) * 16);
      if (count == 4) return cp_async_16(to, from);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) sts_f32(to + 4 * e, e < count ? from[e] : 0.0f);
    } else {
      const T* from = static_cast<const T*>(p.ptr.bias) + element;
      const uint32_t to =
          at + uint32_t(row * BIAS_ROW + ((lane >> 1 ^ (row & 7)) << 4) + (lane & 1) * 8);
      if (count == 4) return cp_async_4(to, from), cp_async_4(to + 4, from + 2);
      ATTN_UNROLL
      for (int e = 0; e < 4; ++e) sts_16(to + 2 * e, e < count ? from[e].bits : uint16_t(0));
    }
  }

  // ---- consumers: queries 16 pair .. + 15 at keys g and g + 8 of block `keys` of 16 keys
  // Bit 16 q + 8 r of word n: of query 8 n + 2 t + q and key g + 8 r.
  struct Flags {
    uint32_t word[2];
    ATTN_DEVICE bool keeps(int n, int c) const {
      return (word[n] & (1u << (16 * (c & 1) + 8 * (c >> 1)))) != 0;
    }
  };
  ATTN_DEVICE static Flags load_flags(uint32_t flags, int keys, int pair) {
    const int lane = lane_id();
    const U32x2 v = lds_64(flags + keys * FLAG_ROW + 8 * (lane & 3) + 32 * pair);
    return {{v.x >> (lane >> 2), v.y >> (lane >> 2)}};
  }
  ATTN_DEVICE void load_bias(const Params& p, float (&bias)[2][4], int keys, int pair) const {
    const int lane = lane_id(), t = lane & 3;
    if (!wide(p)) {
      uint32_t words[4];
      const int chunk = 2 * keys + (lane >> 3 & 1);
      ldmatrix_x4_trans(words, at + (8 * (lane >> 4) + (lane & 7)) * BIAS_ROW +
                                   ((chunk ^ (lane & 7)) << 4) + pair * (16 * BIAS_ROW));
      ATTN_UNROLL
      for (int x = 0; x < 8; ++x)
        bias[x / 4][x % 4] = x % 2 ? unpack_hi<T>(words[x / 2]) : unpack_lo<T>(words[x / 2]);
    } else {
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        const uint32_t first =
            at + 2 * t * WIDE_ROW + (((2 * keys + r) ^ t) << 5) + 4 * (lane >> 2);
        ATTN_UNROLL
        for (int x = 0; x < 4; ++x)
          bias[x / 2][2 * r + x % 2] =
              lds_f32(first + (16 * pair + 8 * (x / 2) + x % 2) * WIDE_ROW);
      }
    }
  }
};

// KeyMemory, and the ring of sides.
template <class Tile>
struct FeatureMemory : KeyMemory<Tile> {
  Ring<Tile::SIDE_STAGES> sides;

  ATTN_DEVICE static FeatureMemory of(uint32_t base) {
    FeatureMemory m;
    static_cast<KeyMemory<Tile>&>(m) = KeyMemory<Tile>::of(base);
    const uint32_t first = m.extra + Tile::Room::Base::EXTRA_BYTES;
    m.sides = {first, first + Tile::SIDE_STAGES * Tile::SIDE_BYTES, Tile::SIDE_BYTES};
    return m;
  }
  ATTN_DEVICE void init() const {
    KeyMemory<Tile>::init();
    sides.init(SIDE_WARPS, Tile::SIDE_READERS);
  }
};

// A warp of those that bring the sides of every third query, or pair of queries, of each tile (of
// 64 keys: every third two).  It has 24 registers at 128 columns.  Rows behind the last query are
// the last once more, keys behind the last 0: their weights are 0.
template <class T, class Tile>
struct SideProducer {
  static constexpr int BITS = Tile::BITS, M = Tile::BLOCK_M;
  static constexpr int PAIRS = 4;  // of a mask, on their way at a time
  using Side = SideTile<T, Tile>;
  static constexpr int STEP = SIDE_WARPS * Side::ROWS;  // queries, or pairs, of all warps at once
  static_assert(M % (2 * Side::ROWS) == 0);             // a warp's rows end together

  const Params& p;
  const KeyTask& task;

  ATTN_DEVICE int first_key() const { return task.n0 + 4 * Side::lane(); }
  // The first query, or pair of queries, of this lane.
  ATTN_DEVICE static int first_row() {
    return Side::ROWS * (warp_id() - 1) + lane_id() / Side::LANES;
  }
  // Of the 4 keys those that are there.
  ATTN_DEVICE int count() const { return max_int(0, min_int(4, task.seq.seqlen_k - first_key())); }

  ATTN_DEVICE void copy_bias(const Side& tile, int head, int m0, int last) const {
    const ScoreStrides& s = p.p.bias;
    const int64_t first = task.seq.b * s.b + head * s.h + m0 * s.q + first_key();
    ATTN_NO_UNROLL
    for (int row = first_row(); row < M; row += STEP)
      tile.copy_bias(p, row, first + min_int(row, last) * s.q, count());
    cp_async_commit();
  }
  ATTN_DEVICE void load_mask(const Side& tile, int head, int m0, int last) const {
    const ScoreStrides& s = p.p.mask;
    const uint8_t* first = static_cast<const uint8_t*>(p.ptr.mask) +
                           (task.seq.b * s.b + head * s.h + m0 * s.q + first_key());
    const int n = count();
    ATTN_NO_UNROLL
    for (int pair = 2 * first_row(); pair < M; pair += 2 * STEP * PAIRS) {
      uint32_t bytes[PAIRS][2];
      ATTN_UNROLL
      for (int b = 0; b < 2 * PAIRS; ++b) {
        const int row = pair + 2 * STEP * (b / 2) + b % 2;
        const uint8_t* from = first + min_int(row, last) * s.q;
        bytes[b / 2][b % 2] = n == 4 ? *reinterpret_cast<const uint32_t*>(from) : some(from, n);
      }
      ATTN_UNROLL
      for (int b = 0; b < PAIRS; ++b) {
        const int row = pair + 2 * STEP * b;
        if (row < M)
          tile.store_flags(tile.mask_flags(p), row, tile.four_flags(bytes[b][0]),
                           tile.four_flags(bytes[b][1]));
      }
    }
  }
  ATTN_DEVICE static uint32_t some(const uint8_t* from, int n) {
    uint32_t bytes = 0;
    ATTN_UNROLL
    for (int e = 0; e < 3; ++e)
      if (e < n) bytes |= uint32_t(from[e]) << (8 * e);
    return bytes;
  }
  ATTN_DEVICE void draw(const Side& tile, int head, int m0) const {
    const Dropout dropout = Dropout::of(p, task.seq);
    ATTN_NO_UNROLL
    for (int row = 2 * first_row(); row < M; row += 2 * STEP) {
      uint32_t four[2] = {0, 0};
      ATTN_UNROLL
      for (int r = 0; r < 2; ++r) {
        uint32_t words[4];
        dropout.words(head, m0 + row + r, first_key(), words);
        ATTN_UNROLL
        for (int e = 0; e < 4; ++e) four[r] |= uint32_t(words[e] >= dropout.least_word()) << e;
      }
      tile.store_flags(tile.dropout_flags(p), row, four[0], four[1]);
    }
  }
  ATTN_DEVICE void produce(const FeatureMemory<Tile>& smem, int turn, int head, int m0) const {
    smem.sides.wait_empty(turn);
    const Side tile{smem.sides.tile(turn)};
    const int last = min_int(M, task.seq.seqlen_q - m0) - 1;
    if (has<BITS>(p, kBias)) copy_bias(tile, head, m0, last);
    if (has<BITS>(p, kMask)) load_mask(tile, head, m0, last);
    if (has<BITS>(p, kDropout)) draw(tile, head, m0);
    if (has<BITS>(p, kBias)) cp_async_wait<0>();
    sync_warp();  // every lane has stored
    if (lane_id() == 0) mbarrier_arrive(smem.sides.full_bar(turn));
  }
};

// KeyGradients or SplitGradient with features: the weights take the sides, the gradients what
// dropout keeps.
template <class T, class Tile, class Base>
struct WithSides : Base {
  static constexpr int BITS = Tile::BITS, TILES = Base::TILES;
  // Products are logits but for p.scale_log2; else they are computed, by short_terms().
  static constexpr bool PRODUCTS = !(BITS & (kAny | kBias | kAlibi | kSoftcap));
  static constexpr bool CAPPED = may_have<BITS>(kSoftcap), DROPS = may_have<BITS>(kDropout);
  static constexpr bool SIDES = may_have<BITS>(kMask | kBias | kDropout);
  static constexpr bool BIAS_GRADIENT = may_have<BITS>(kBiasGradient);
  using Base::key, Base::score, Base::smem;
  int head = 0;  // of the tile

  ATTN_DEVICE void begin(int h) { head = h; }
  ATTN_DEVICE const Ring<Tile::SIDE_STAGES>& sides() const {
    return static_cast<const FeatureMemory<Tile>&>(smem).sides;
  }

  // From products to exp(logit - LSE).  distance: of query m0 + 2 t and key g.
  template <class Ways>
  ATTN_DEVICE float weight(float product, const HeadTerms<float>& terms, float distance, float bias,
                           float lse, float& slope) const {
    const Params& p = score.p;
    if constexpr (PRODUCTS) return weight_of(product, p.scale_log2, lse);
    const float s = attn::logit<Ways>(
        terms_of_logits<BITS>(p), short_terms<BITS>(p), terms, product, [&] { return distance; },
        [&] { return bias; }, [&](float d) { slope = d; });
    const float x = weight_of(s, from_short_terms<BITS>(p), lse);
    // what is NaN of a hidden pair is computed once more, but not for the gradient of the bias
    return has<BITS>(p, kBiasGradient) && bias == -kInf ? 0.0f : x;
  }
  // S: products in; out weights times the slope of the soft cap, below 0 where dropout takes them.
  // take(n, V): the same of tile n without the slope.
  template <class Take>
  ATTN_DEVICE void weigh(float (&S)[TILES][4], int turn, int m0, const Take& take) const {
    if constexpr (SIDES) sides().wait(turn);
    if (CAPPED && warp_is_small(S, short_terms<BITS>(score.p).inverse_cap))
      weigh_by<SmallWays>(S, turn, m0, take);
    else
      weigh_by<NaturalWays>(S, turn, m0, take);
    if constexpr (SIDES) sides().release(turn);
  }
  template <class Ways, class Take>
  ATTN_DEVICE void weigh_by(float (&S)[TILES][4], int turn, int m0, const Take& take) const {
    const Params& p = score.p;
    const auto terms = HeadTerms<float>::of(p.ptr, score.seq, head, 1.0f);
    const int shift = score.seq.past() + 2 * (lane_id() & 3);
    const float distance = float(m0 + shift - key);
    const SideTile<T, Tile> tile{sides().tile(turn)};
    ATTN_UNROLL
    for (int pair = 0; pair < TILES / 2; ++pair) {
      const RowValues row = RowValues::of(smem.lse(turn), pair);
      typename SideTile<T, Tile>::Flags kept{}, dropped{};
      float bias[2][4];
      if (has<BITS>(p, kMask)) kept = tile.load_flags(tile.mask_flags(p), this->key_block(), pair);
      if (has<BITS>(p, kDropout))
        dropped = tile.load_flags(tile.dropout_flags(p), this->key_block(), pair);
      if (has<BITS>(p, kBias)) tile.load_bias(p, bias, this->key_block(), pair);
      ATTN_UNROLL
      for (int n = 0; n < 2; ++n) {
        float V[4];
        ATTN_UNROLL
        for (int c = 0; c < 4; ++c) {
          float &x = S[2 * pair + n][c], slope = 1.0f;
          const float away = distance + float(16 * pair + 8 * n + (c & 1) - 8 * (c >> 1));
          x = weight<Ways>(x, terms, away, bias[n][c], row.tile[n][c & 1], slope);
          if (has<BITS>(p, kMask) && !kept.keeps(n, c)) x = 0.0f;
          if (has<BITS>(p, kDropout) && !dropped.keeps(n, c)) x = -x;
          V[c] = x;
          if (CAPPED) x *= slope;
        }
        take(2 * pair + n, V);
      }
    }
  }
  // The same with all that is taken in V; where `edge`, both are 0 of pairs that do not count.
  ATTN_DEVICE void weigh(float (&S)[TILES][4], float (&V)[TILES][4], int turn, int m0,
                         bool edge) const {
    weigh(S, turn, m0, [&](int n, const float (&weights)[4]) {
      ATTN_UNROLL
      for (int c = 0; c < 4; ++c) V[n][c] = weights[c];
    });
    if (!edge) return;
    const Columns columns[2] = {Columns::of_key(score, key, m0),
                                Columns::of_key(score, key + 8, m0)};
    mask_weights(S, columns);
    mask_weights(V, columns);
  }
  // dS^T in place of dP^T.
  template <bool EDGE>
  ATTN_DEVICE void differentiate(float (&dP)[TILES][4], const float (&P)[TILES][4],
                                 uint32_t delta) const {
    if constexpr (!DROPS) return key_gradients < EDGE || BIAS_GRADIENT > (dP, P, delta);
    const float keep_scale = score.p.keep_scale;
    ATTN_UNROLL
    for (int pair = 0; pair < TILES / 2; ++pair) {
      const RowValues row = RowValues::of(delta, pair);
      ATTN_UNROLL
      for (int n = 2 * pair; n < 2 * pair + 2; ++n) ATTN_UNROLL
      for (int c = 0; c < 4; ++c) {  // not P * (..) where P = 0: V of that key may hold NaN
        const float x = P[n][c], factor = x > 0.0f ? keep_scale : 0.0f;
        float kept = fmaf(dP[n][c], factor, -row.tile[n & 1][c & 1]);
        // nor 0 * dP: no one computes the gradient of the bias once more
        if (BIAS_GRADIENT && x < 0.0f) kept = -row.tile[n & 1][c & 1];
        dP[n][c] = (EDGE || BIAS_GRADIENT) && x == 0.0f ? 0.0f : fabsf(x) * kept;
      }
    }
  }
};

}  // namespace attn::cuda::sm90
