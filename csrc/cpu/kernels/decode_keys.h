// What the kernel for few queries (decode.h) reads at a time, keys of four or two streams, and what
// it keeps of its rows: of their storage nothing depends here.
#pragma once
#include "cpu/kernels/options.h"
#include "cpu/simd/storage.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"
#include "cpu/tiles.h"

namespace attn::cpu::ATTN_ISA {

// logit.h for decode, which has always divided by softcap: its results keep their bits.
struct DecodeWays : VectorWays<float> {
  static ATTN_INLINE Vec<float> over_cap(Vec<float> x, const Terms<float>& t) { return x / t.cap; }
};

// Part t of the keys [from, end) of a task: `each` of each stream, which starts `apart` keys
// after the one before it.
struct DecodeChunk {
  int64_t from, end, each, apart, t;
  int64_t begin_of(int64_t stream) const { return from + stream * apart + t * each; }
  int64_t end_of(int64_t stream) const {
    return std::min(std::min(begin_of(stream) + each, from + (stream + 1) * apart), end);
  }
};

// A query's keys of a chunk, those that mask and bias exclude left out.
struct DecodeKeys {
  static constexpr int64_t kNone = -2;  // no chunk, nor the one before the first
  int64_t n = 0, whole = kNone;         // whole: the chunk whose keys these are, all of them
  const char *K[kDecodeKeys], *V[kDecodeKeys];
  int64_t j[kDecodeKeys];
  float position[kDecodeKeys], bias[kDecodeKeys];  // position: j
  float k_factor[kDecodeKeys], v_factor[kDecodeKeys];
  const char* zeros = nullptr;  // if given: a row of V for keys with P = 0
  // The row of K that is wanted after this chunk: so many bytes from this one, or in other pages.
  int64_t ahead;
  bool paged = false;
  const char* after[kDecodeKeys];
};

// The rows of Q and what is kept of them, whatever K and V are stored as.
class DecodeRows {
  static constexpr int L = kLanes<float>;

 protected:
  using Chunk = DecodeChunk;
  using Keys = DecodeKeys;

  // kept: the factors of rows of int8, else null.
  DecodeRows(const Problem& problem, const Pointers& pointers, int64_t kept_bytes, const Kept* kept)
      : p(problem),
        ptr(pointers),
        terms(Terms<float>::of(problem, pointers, 1)),
        kept_bytes(kept_bytes),
        kept(kept) {
    group = p.heads_q / p.heads_k, rows = group * p.seqlen_q;
  }

  const Problem& p;
  const Pointers& ptr;
  const Terms<float> terms;
  int64_t group, rows, splits;
  int64_t streams = kDecodeStreams;
  int64_t together;          // K/V heads of a unit: all where their rows share pages of memory
  const int64_t kept_bytes;  // of a number of K and V
  const Kept* const kept;
  bool steady;  // whether a chunk's rows are found by one step from those of the chunk before it

  // True when there is no mask (or bias), or it is the same for all query heads of a group.
  template <class S>
  static bool shared(const void* base, const S& s, const Problem& p) {
    return !base || s.h == 0 || p.heads_q == p.heads_k;
  }

  // Keys of a stream in a chunk.
  int64_t each() const { return kDecodeKeys / streams; }

  // A head's state: O [rows][Dv] unnormalised, largest logit [rows], sum of exp(s - max) [rows].
  float* max_of(float* state) const { return state + rows * p.head_dim_v; }
  float* sum_of(float* state) const { return max_of(state) + rows; }

  int64_t head_state() const { return rows * (p.head_dim_v + 2); }

  ATTN_NOINLINE bool finite(const float* state) const {
    bool good = true;
    for (int64_t h = 0; h < together && good; ++h, state += head_state())
      good = all_finite<Plain<float>>(reinterpret_cast<const char*>(state),
                                      p.head_dim_v * int64_t(sizeof(float)), rows, p.head_dim_v);
    return good;
  }

  ATTN_NOINLINE void begin(float* state) const {
    std::fill(state, max_of(state), 0.f);
    std::fill(max_of(state), sum_of(state), -std::numeric_limits<float>::infinity());
    std::fill(sum_of(state), sum_of(state) + rows, 0.f);
  }

  // The first chunk of a task.
  ATTN_NOINLINE Chunk chunk_of(const Sequence& seq, int64_t split) const {
    int64_t lo, hi;
    seq.key_range(0, seq.seqlen_q, &lo, &hi);
    const int64_t t0 = lo / kDecodeKeys, t1 = (hi + kDecodeKeys - 1) / kDecodeKeys;
    const int64_t share = (t1 - t0 + splits - 1) / splits, first = t0 + split * share;
    const int64_t from = std::max(first * kDecodeKeys, lo);
    const int64_t end = std::max(from, std::min((first + share) * kDecodeKeys, hi));
    const int64_t chunks = (end - from + kDecodeKeys - 1) / kDecodeKeys;
    return {from, end, each(), chunks * each(), 0};
  }

  const uint8_t* mask_row(const Sequence& seq, int64_t hk, int64_t i) const {
    if (!ptr.mask) return nullptr;
    return static_cast<const uint8_t*>(ptr.mask) + seq.b * p.mask.b + hk * group * p.mask.h +
           i * p.mask.q;
  }

  // Whether query i sees the same keys of a chunk as query `other`, with the same bias.
  ATTN_NOINLINE bool same_keys(const Sequence& seq, int64_t hk, const Chunk& chunk, int64_t i,
                               int64_t other) const {
    if (ptr.bias && p.bias.q != 0) return false;
    int64_t first[2], last[2];
    seq.key_range(i, i + 1, &first[0], &last[0]);
    seq.key_range(other, other + 1, &first[1], &last[1]);
    const uint8_t *one = mask_row(seq, hk, i), *two = mask_row(seq, hk, other);
    for (int64_t s = 0; s < streams; ++s) {
      const int64_t begin = chunk.begin_of(s), end = std::max(begin, chunk.end_of(s));
      const auto in = [&](int64_t j) { return std::min(std::max(j, begin), end); };
      if (in(first[0]) != in(first[1]) || in(last[0]) != in(last[1])) return false;
      for (int64_t j = begin; one != two && j < end; ++j)
        if (!one[j * p.mask.k] != !two[j * p.mask.k]) return false;
    }
    return true;
  }

  // The row of K that the chunk after this one reads for each row of `add_rows`, in pages.
  void add_rows_after(const Sequence& seq, int64_t hk, int64_t j, int64_t end, int64_t at,
                      int64_t step, Keys* keys) const {
    for (j += each(), end += each(); j < end;) {
      const int64_t stop = std::min(end, (j / p.page_size + 1) * p.page_size);
      const int64_t row = std::min(j, seq.seqlen_k - 1);  // beyond the last: any that there is
      const char* K = static_cast<const char*>(ptr.k) + seq.k_offset(p.k, hk, row) * kept_bytes;
      for (; j < stop; ++j, at += step, K += p.k.s * kept_bytes) keys->after[at] = K;
    }
  }

  // Rows j ... end - 1 of K and V, as keys at, at + step ...
  void add_rows(const Sequence& seq, int64_t hk, int64_t j, int64_t end, int64_t at, int64_t step,
                Keys* keys) const {
    const int64_t k_step = p.k.s * kept_bytes, v_step = p.v.s * kept_bytes;
    if (keys->paged) add_rows_after(seq, hk + 1 - together, j, end, at, step, keys);
    while (j < end) {
      const int64_t page = p.page_size, stop = ptr.block_table ? (j / page + 1) * page : end;
      const char* K = static_cast<const char*>(ptr.k) + seq.k_offset(p.k, hk, j) * kept_bytes;
      const char* V = static_cast<const char*>(ptr.v) + seq.k_offset(p.v, hk, j) * kept_bytes;
      if (kept) add_factors(seq, hk, j, std::min(stop, end), at, step, keys);
      for (; j < std::min(stop, end); ++j, at += step, K += k_step, V += v_step)
        keys->K[at] = K, keys->V[at] = V, keys->j[at] = j, keys->position[at] = float(j);
    }
  }

  // The factors of rows j ... end - 1, which lie in one page.
  void add_factors(const Sequence& seq, int64_t hk, int64_t j, int64_t end, int64_t at,
                   int64_t step, Keys* keys) const {
    const float* k = kept->k + seq.k_offset(kept->k_at, hk, j);
    const float* v = kept->v + seq.k_offset(kept->v_at, hk, j);
    for (; j < end; ++j, at += step, k += kept->k_at.s, v += kept->v_at.s)
      keys->k_factor[at] = *k, keys->v_factor[at] = *v;
  }

  // The keys of a chunk that query i sees: of all streams in turns where it sees them all.
  ATTN_NOINLINE void collect(const Sequence& seq, int64_t hk, const Chunk& chunk, int64_t i,
                             Keys* keys) const {
    int64_t first, last, begin[kDecodeStreams], end[kDecodeStreams], n = 0;
    seq.key_range(i, i + 1, &first, &last);
    for (int64_t s = 0; s < streams; ++s) {
      begin[s] = std::max(chunk.begin_of(s), first);
      end[s] = std::max(begin[s], std::min(chunk.end_of(s), last));
      n += end[s] - begin[s];
    }
    const bool full = n == kDecodeKeys;
    if (full && steady && keys->whole == chunk.t - 1) step(chunk, keys);
    if (full && steady && keys->whole == chunk.t) return;
    keys->n = 0, keys->whole = full ? chunk.t : DecodeKeys::kNone;
    for (int64_t s = 0; s < streams; ++s) {
      add_rows(seq, hk, begin[s], end[s], full ? s : keys->n, full ? streams : 1, keys);
      keys->n += end[s] - begin[s];
    }
    if (ptr.mask || ptr.bias) keep_visible(seq, hk, i, keys);
  }

  // From all keys of the chunk before this one to all keys of this one.
  void step(const Chunk& chunk, Keys* keys) const {
    const int64_t k_step = each() * p.k.s * kept_bytes, v_step = each() * p.v.s * kept_bytes;
    for (int64_t at = 0; at < kDecodeKeys; ++at) keys->K[at] += k_step;
    for (int64_t at = 0; at < kDecodeKeys; ++at) keys->V[at] += v_step;
    for (int64_t at = 0; at < kDecodeKeys; ++at) {
      keys->j[at] += each();
      keys->position[at] = float(keys->j[at]);
    }
    keys->whole = chunk.t;
  }

  // Leaves out the keys that mask or bias exclude.
  void keep_visible(const Sequence& seq, int64_t hk, int64_t i, Keys* keys) const {
    const auto* mask = mask_row(seq, hk, i);
    const int64_t bias_at = seq.b * p.bias.b + hk * group * p.bias.h + i * p.bias.q;
    int64_t n = 0;
    for (int64_t at = 0; at < keys->n; ++at) {
      const int64_t j = keys->j[at];
      if (mask && !mask[j * p.mask.k]) continue;
      if (ptr.bias) {
        const float bias = load_one<float>(p.bias_dtype, ptr.bias, bias_at + j * p.bias.k);
        if (bias == -std::numeric_limits<float>::infinity()) continue;
        keys->bias[n] = bias;
      }
      keys->j[n] = j, keys->position[n] = keys->position[at], keys->K[n] = keys->K[at];
      if (keys->paged) keys->after[n] = keys->after[at];
      if (kept) keys->k_factor[n] = keys->k_factor[at], keys->v_factor[n] = keys->v_factor[at];
      keys->V[n++] = keys->V[at];
    }
    keys->n = n;
  }

  // One row: S products in, exp(s - max) out; the factor for what was summed before.
  ATTN_NOINLINE float softmax(const Sequence& seq, int64_t h, int64_t i, const Keys& keys, float* S,
                              float* max, float* sum) const {
    constexpr int N = kAbreast;
    const int64_t padded = (keys.n + N * L - 1) / (N * L) * (N * L);
    const float ninf = -std::numeric_limits<float>::infinity();
    const float now = std::max(*max, largest(logits(seq, h, i, keys, S)));
    for (int64_t j = (keys.n + L - 1) / L * L; j < padded; j += L) store(S + j, set1(ninf));
    const float base = now == ninf ? 0.f : now;
    Vec<float> total{};
    for (int64_t j = 0; j < padded; j += N * L) {
      Vec<float> e[N];
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) e[k] = load(S + j + k * L) - base;
      vexp_each(e);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) store(S + j + k * L, e[k]), total += e[k];
    }
    const float alpha = *max == base ? 1.f : std::exp(*max - base);
    *sum = add_lanes(*sum * alpha, total);
    *max = now;
    return alpha;
  }

  // S products in, logits out, -inf up to whole vectors; the largest of each lane.
  Vec<float> logits(const Sequence& seq, int64_t h, int64_t i, const Keys& keys, float* S) const {
    const HeadTerms<float> head = HeadTerms<float>::of(ptr, seq, h, 1);
    const Vec<float> ninf = set1(-std::numeric_limits<float>::infinity());
    const float query = float(i + seq.seqlen_k - seq.seqlen_q);
    Vec<float> top = ninf;
    const auto run = [&](const auto& has) {
      for (int64_t j = 0; j < keys.n; j += L) {
        Vec<float> s = logit<DecodeWays>(
            has, terms, head, load(S + j), [&] { return query - load(keys.position + j); },
            [&] { return load(keys.bias + j); }, [](Vec<float>) {});
        if (j + L > keys.n) s = iota<float>() + float(j) < float(keys.n) ? s : ninf;
        store(S + j, s);
        top = vmax(s, top);
      }
    };
    if (terms.has.cap || terms.has.distance || terms.has.bias)
      run(terms.has);
    else
      run(HasExactly<false, false, false>{});
    return top;
  }

  ATTN_NOINLINE void merge(float* a, float* b) const {
    const float ninf = -std::numeric_limits<float>::infinity();
    for (int64_t r = 0; r < rows; ++r) {
      float &max_a = max_of(a)[r], &sum_a = sum_of(a)[r];
      const float max_b = max_of(b)[r], now = std::max(max_a, max_b);
      const float base = now == ninf ? 0.f : now;
      const float wa = std::exp(max_a - base), wb = std::exp(max_b - base);
      for (int64_t c = 0; c < p.head_dim_v; c += L) {
        float* at = a + r * p.head_dim_v + c;
        store(at, weighed<float>(load(at), set1(wa)) +
                      weighed<float>(load(b + r * p.head_dim_v + c), set1(wb)));
      }
      sum_a = sum_a * wa + sum_of(b)[r] * wb;
      max_a = now;
    }
  }

  // O and LSE of a unit from its state, in which O has the order of load_storage.
  ATTN_NOINLINE void finish(int64_t unit, float* state, Scratch& scratch) const {
    const Sequence seq(p, ptr, unit * together / p.heads_k);
    float* row = scratch.take<float>(p.head_dim_v);
    for (int64_t h = 0; h < together; ++h)
      finish_head(seq, unit * together % p.heads_k + h, state + h * head_state(), row);
  }

  void finish_head(const Sequence& seq, int64_t hk, float* state, float* row) const {
    const float ninf = -std::numeric_limits<float>::infinity();
    const int64_t dv = p.head_dim_v, size = int64_t(dtype_size(p.dtype));
    const auto order = [&](int64_t c) {
      return p.dtype == DType::kBFloat16 ? storage_order<DType::kBFloat16>(c) : c;
    };
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = hk * group + r % group, i = r / group;
      const float sum = sum_of(state)[r], top = max_of(state)[r];
      const bool nan = sum != sum, empty = top == ninf && !nan;
      float inverse = 0, lse = ninf;
      if (!empty) {
        const float base = top == ninf ? 0.f : top;
        float total = sum, scale = 1, shift = base;
        if (ptr.sink) {  // joins the normaliser only
          const float sink = static_cast<const float*>(ptr.sink)[h];
          if (sink > base) shift = sink, scale = std::exp(base - sink);
          total = sum * scale + std::exp(sink - shift);
        }
        inverse = scale / total;
        lse = nan ? sum : shift + std::log(total);
      }
      const float* O = state + r * dv;
      for (int64_t c = 0; c < dv; ++c) row[c] = inverse == 0 ? 0.f : O[order(c)] * inverse;
      restore_row<float>(p.dtype, row, dv,
                         static_cast<char*>(ptr.o) + seq.q_offset(p.o, h, i) * size);
      const int64_t at = seq.lse_offset(h, i);
      if (ptr.lse) static_cast<float*>(ptr.lse)[at] = lse;
      if (ptr.max_logit) static_cast<float*>(ptr.max_logit)[at] = nan ? sum : top;
    }
  }
};

// S[i][j] *= factor[j].  Of weights, a 0 stays one, whatever its factor is.
template <int R, bool WEIGHTS>
inline void multiply_each(const float* factor, int64_t n, float* S) {
  for (int i = 0; i < R; ++i)
    for (int64_t j = 0; j < n; ++j) {
      float& s = S[i * kDecodeKeys + j];
      s = WEIGHTS && s == 0.f ? 0.f : s * factor[j];
    }
}

}  // namespace attn::cpu::ATTN_ISA
