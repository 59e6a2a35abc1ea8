// From products to logits, one tile S^T [keys][kPanel queries] at a time:
//   s = scale * qk;  s = softcap * tanh(s / softcap);  s += bias - slope * |i + Sk - Sq - j|;
//   -inf where (i, j) is excluded.
// Queries lie in lanes: lane q of a panel is query m0 + q.  Also the dropout multipliers.

// What a panel needs of a tile of keys.  Causal and window bands are cut by grain: products with
// keys that no query of the grain sees are not computed.
struct Tile {
  int64_t n0, nk;                    // first key, number of keys
  int64_t lo[kGrains], hi[kGrains];  // keys that grain g needs, relative to n0
  bool empty;
  bool banded;  // some computed pair lies outside the band
};

struct Segment {
  int64_t lo, hi;      // keys, relative to the tile's first
  int64_t begin, end;  // lanes, multiples of kGrain
};

template <class T>
class Panel {
 public:
  const Sequence& seq;
  int64_t h, m0, nq;  // query head, first query, queries
  int64_t grains, columns;

  // add_scratch, keep_scratch: [BLOCK_N][kPanel]
  Panel(const Sequence& s, int64_t head, int64_t first, int64_t queries, T* add, T* keep)
      : seq(s), h(head), m0(first), nq(queries), add_scratch(add), keep_scratch(keep) {
    grains = (nq + kGrain - 1) / kGrain;
    columns = grains * kGrain;
    for (int64_t g = 0; g < grains; ++g)
      seq.key_range(m0 + g * kGrain, last_query(g) + 1, &lo_[g], &hi_[g]);
    if (seq.p->dropout_p > 0) philox = philox_key(seq.ptr->rng_state[0], seq.ptr->rng_state[1]);
  }

  // The keys that any query of the panel may see.
  int64_t first_key() const { return lo_[0]; }
  int64_t end_key() const { return hi_[grains - 1]; }

  // `pack` keys share an item of a product, so grains begin and end at multiples of it.
  Tile tile(int64_t n0, int64_t nk, int64_t pack) const {
    Tile t{n0, nk, {}, {}, true, !seq.band_full(m0, m0 + nq, n0, n0 + nk)};
    for (int64_t g = 0; g < grains; ++g) {
      t.lo[g] = std::clamp<int64_t>(lo_[g] - n0, 0, nk) / pack * pack;
      t.hi[g] = std::min((std::clamp<int64_t>(hi_[g] - n0, 0, nk) + pack - 1) / pack * pack, nk);
      if (t.hi[g] <= t.lo[g]) t.lo[g] = t.hi[g] = t.hi[g] == 0 ? 0 : t.lo[g];
      t.empty &= t.hi[g] == t.lo[g];
    }
    return t;
  }

  // The tile as rectangles, in ascending order of keys.  Bounds ascend with the grain, so the
  // grains that need a key are neighbours.
  int segments(const Tile& t, Segment (&out)[2 * kGrains + 1]) const {
    int n = 0;
    for (int64_t key = t.lo[0]; key < t.nk;) {
      int64_t begin = 0, end = grains, next = t.nk;
      while (begin < grains && t.hi[begin] <= key) ++begin;
      while (end > begin && t.lo[end - 1] > key) --end;
      for (int64_t g = 0; g < grains; ++g) {
        if (t.lo[g] > key) next = std::min(next, t.lo[g]);
        if (t.hi[g] > key) next = std::min(next, t.hi[g]);
      }
      if (begin < end && t.hi[begin] > key) out[n++] = {key, next, begin * kGrain, end * kGrain};
      key = next;
    }
    return n;
  }

  // True when some computed pair of the tile may be excluded.
  bool partial(const Tile& t) const { return seq.ptr->mask || seq.ptr->bias || t.banded; }

  // True when logits are scale * product (scale > 0) but for the band.
  bool plain() const {
    return seq.p->scale > 0 && seq.p->softcap <= 0 && !seq.ptr->alibi_slopes && !seq.ptr->mask &&
           !seq.ptr->bias;
  }

  // S: products in, -inf outside of the band; nothing else is touched.
  void apply_band(const Tile& t, T* S) const {
    if (!t.banded) return;
    for (int64_t g = 0; g < grains; ++g) {
      // Between these keys every query of the grain sees every key.
      const int64_t d = seq.diagonal(), first = m0 + g * kGrain, last = last_query(g);
      const int64_t full_lo =
          seq.p->window_left == kUnbounded
              ? t.lo[g]
              : std::clamp(last + d - seq.p->window_left - t.n0, t.lo[g], t.hi[g]);
      const int64_t full_hi =
          seq.p->window_right == kUnbounded
              ? t.hi[g]
              : std::clamp(first + d + seq.p->window_right + 1 - t.n0, full_lo, t.hi[g]);
      for (int64_t j = t.lo[g]; j < full_lo; ++j) band_row(t.n0 + j, g, S + j * kPanel);
      for (int64_t j = full_hi; j < t.hi[g]; ++j) band_row(t.n0 + j, g, S + j * kPanel);
    }
  }

  // S: products in, logits out.  dcap (or null) receives d softcap(s) / ds.
  void logits(const Tile& t, T* S, T* dcap) const {
    const Problem& p = *seq.p;
    const T ninf = -std::numeric_limits<T>::infinity();
    const bool extra = seq.ptr->mask || seq.ptr->bias;
    if (extra) fill_add(t);
    const T scale = T(p.scale), cap = T(p.softcap), inverse_cap = T(1) / cap;
    const T slope = seq.ptr->alibi_slopes
                        ? T(static_cast<const float*>(
                              seq.ptr->alibi_slopes)[seq.b * seq.ptr->alibi_stride_b + h])
                        : T(0);
    const int64_t corner = seq.seqlen_k - seq.seqlen_q;
    for (int64_t g = 0; g < grains; ++g)
      for (int64_t j = t.lo[g]; j < t.hi[g]; ++j)
        for (int64_t q = g * kGrain; q < (g + 1) * kGrain; q += kLanes<T>) {
          T* at = S + j * kPanel + q;
          Vec<T> s = load(at) * scale;
          if (cap > 0) {
            const Vec<T> u = vtanh(s * inverse_cap);
            s = u * cap;
            if (dcap) store(dcap + j * kPanel + q, T(1) - u * u);
          }
          if (seq.ptr->alibi_slopes) {
            const Vec<T> distance = iota<T>() + T(q + m0 + corner - t.n0 - j);
            s -= slope * (distance < T(0) ? -distance : distance);
          }
          if (extra) {
            const Vec<T> a = load(add_scratch + j * kPanel + q);
            s = a == ninf ? set1(ninf) : s + a;
          }
          store(at, s);
        }
    apply_band(t, S);
  }

  // keep_scratch[j][q] = 1 / (1 - p) where (i, j) survives dropout, else 0.  n0 is a multiple of 4.
  const T* keep(const Tile& t) const {
    const double p = seq.p->dropout_p;
    const uint64_t threshold = dropout_threshold(p);
    const T kept = p < 1 ? T(1 / (1 - p)) : T(0);
    for (int64_t g = 0; g < grains; ++g)
      for (int64_t j = t.lo[g] / 4 * 4; j < t.hi[g]; j += 4)
        philox_lanes<T>(philox, uint32_t((t.n0 + j) >> 2), uint32_t(m0 + g * kGrain), uint32_t(h),
                        uint32_t(seq.b), threshold, kept, keep_scratch + j * kPanel + g * kGrain);
    return keep_scratch;
  }

 private:
  T* add_scratch;
  T* keep_scratch;
  PhiloxKey philox{};
  int64_t lo_[kGrains], hi_[kGrains];

  int64_t last_query(int64_t g) const { return m0 + std::min((g + 1) * kGrain, nq) - 1; }

  void band_row(int64_t key, int64_t g, T* row) const {
    const T ninf = -std::numeric_limits<T>::infinity();
    const int64_t aligned = key - seq.diagonal() - m0;  // the lane on the diagonal
    auto clamp = [](int64_t x) { return std::clamp<int64_t>(x, -1, kPanel); };
    const bool left = seq.p->window_left != kUnbounded, right = seq.p->window_right != kUnbounded;
    const T first = right ? T(clamp(aligned - seq.p->window_right)) : T(-1);
    const T last = left ? T(clamp(aligned + seq.p->window_left)) : T(kPanel);
    for (int64_t q = g * kGrain; q < (g + 1) * kGrain; q += kLanes<T>) {
      const Vec<T> lane = iota<T>() + T(q);
      Vec<T> s = load(row + q);
      s = lane < first ? set1(ninf) : s;
      s = lane > last ? set1(ninf) : s;
      store(row + q, s);
    }
  }

  // add_scratch[j][q] = bias, or -inf where the mask excludes.
  void fill_add(const Tile& t) const {
    const Problem& p = *seq.p;
    constexpr int L = kLanes<T>;
    const auto* mask = static_cast<const uint8_t*>(seq.ptr->mask);
    const bool same_rows = (!mask || p.mask.q == 0) && (!seq.ptr->bias || p.bias.q == 0);
    T row[L][L];
    for (int64_t g = 0; g < grains; ++g)
      for (int64_t j = t.lo[g] / L * L; j < t.hi[g]; j += L) {
        const int64_t n = std::min<int64_t>(L, t.nk - j);
        if (same_rows) {  // a row for all queries: padding masks
          add_row(m0, t.n0 + j, n, row[0]);
          for (int64_t c = 0; c < n; ++c)
            for (int64_t q = 0; q < kGrain; q += L)
              store(add_scratch + (j + c) * kPanel + g * kGrain + q, set1(row[0][c]));
          continue;
        }
        for (int64_t q = g * kGrain; q < (g + 1) * kGrain; q += L) {
          for (int64_t r = 0; r < L; ++r)
            add_row(m0 + std::min(q + r, nq - 1), t.n0 + j, n, row[r]);
          transpose<T>(&row[0][0], L, L, L, add_scratch + j * kPanel + q, kPanel);
        }
      }
  }

  // Bias and mask of query i for n keys from key; the rest of the vector is 0.
  ATTN_INLINE void add_row(int64_t i, int64_t key, int64_t n, T* out) const {
    const Problem& p = *seq.p;
    constexpr int L = kLanes<T>;
    const T ninf = -std::numeric_limits<T>::infinity();
    store(out, Vec<T>{});
    if (seq.ptr->bias) {
      const int64_t at = seq.b * p.bias.b + h * p.bias.h + i * p.bias.q + key * p.bias.k;
      if (p.bias.k == 1 && n == L)
        load_row<T>(
            p.bias_dtype,
            static_cast<const char*>(seq.ptr->bias) + at * int64_t(dtype_size(p.bias_dtype)), L,
            out);
      else
        for (int64_t c = 0; c < n; ++c)
          out[c] = load_one<T>(p.bias_dtype, seq.ptr->bias, at + c * p.bias.k);
    }
    if (seq.ptr->mask) {
      const uint8_t* at = static_cast<const uint8_t*>(seq.ptr->mask) + seq.b * p.mask.b +
                          h * p.mask.h + i * p.mask.q + key * p.mask.k;
      if (p.mask.k == 1 && n == L)
        for (int64_t c = 0; c < L; ++c) out[c] = at[c] ? out[c] : ninf;
      else
        for (int64_t c = 0; c < n; ++c)
          if (!at[c * p.mask.k]) out[c] = ninf;
    }
  }
};
