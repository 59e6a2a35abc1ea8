// Few queries against many keys (decode): bound by reading K and V, so each row of them is read
// once for all query heads of its group and with the head dimension in lanes, as it lies.
// One task = one K/V head, or a share of its keys when heads are few (split-KV, combined in fixed
// order).  Rows are ordered by query, then by head of the group: the rows of one query see the
// same keys, so rows of V that a query does not see are not touched.
#pragma once
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// logit.h for decode, which has always divided by softcap: its results keep their bits.
struct DecodeWays : VectorWays<float> {
  static ATTN_INLINE Vec<float> over_cap(Vec<float> x, const Terms<float>& t) { return x / t.cap; }
};

// 2 L numbers of storage as float: *a has the first L and *b the rest, but for bfloat16 *a has the
// even ones and *b the odd ones, which takes one instruction each.
template <DType TYPE>
ATTN_INLINE void load_storage(const char* p, Vec<float>* a, Vec<float>* b) {
  if constexpr (TYPE == DType::kFloat32) {
    *a = load(reinterpret_cast<const float*>(p));
    *b = load(reinterpret_cast<const float*>(p) + kLanes<float>);
  } else if constexpr (TYPE == DType::kBFloat16) {
    Vec<uint32_t> x;
    std::memcpy(&x, p, sizeof(x));
    *a = (Vec<float>)(x << 16);
    *b = (Vec<float>)(x & 0xffff0000u);
  } else {
#if ATTN_VEC_BYTES == 64
    *a = (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
    *b = (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p + 1));
#elif ATTN_VEC_BYTES == 32
    *a = (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
    *b = (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1));
#endif
  }
}

// Where number c of a row stands in load_storage's order.
template <DType TYPE>
inline int64_t storage_order(int64_t c) {
  constexpr int64_t L = kLanes<float>;
  return TYPE == DType::kBFloat16 ? c / (2 * L) * (2 * L) + c % 2 * L + c % (2 * L) / 2 : c;
}

// The sums of L vectors' lanes, in order: neighbours are joined in each round.
template <int N>
ATTN_INLINE void sum_round(Vec<float> (&x)[kLanes<float>]) {
  constexpr int L = kLanes<float>, S = L / (2 * N);  // N pairs remain; lanes S apart are summed
  Mask<float> lower, upper;
  for (int e = 0; e < L; ++e) {
    lower[e] = e & S ? L + e - S : e;
    upper[e] = e & S ? L + e : e + S;
  }
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i)
    x[i] = __builtin_shuffle(x[2 * i], x[2 * i + 1], lower) +
           __builtin_shuffle(x[2 * i], x[2 * i + 1], upper);
  if constexpr (N > 1) sum_round<N / 2>(x);
}

template <DType TYPE>
class Decode {
  static constexpr int L = kLanes<float>;
  static constexpr int64_t kBytes = TYPE == DType::kFloat32 ? 4 : 2;

 public:
  Decode(const Problem& problem, const Pointers& pointers, int threads)
      : p(problem), ptr(pointers), threads(threads), terms(Terms<float>::of(problem, pointers, 1)) {
    group = p.heads_q / p.heads_k;
    rows = group * p.seqlen_q;
    const int64_t tasks = p.batch * p.heads_k, chunks = (p.seqlen_k + 511) / 512;
    // Chosen from shapes alone, so that results do not depend on the number of threads.
    splits = p.num_splits > 0 ? std::min(p.num_splits, (p.seqlen_k + kDecodeKeys - 1) / kDecodeKeys)
             : tasks >= 16    ? 1
                              : std::max<int64_t>(1, std::min((16 + tasks - 1) / tasks, chunks));
  }

  // Whether the problem has this form; what it lacks is served by Forward.
  static bool serves(const Problem& p, const Pointers& ptr) {
    return p.dtype == TYPE && p.seqlen_q <= kDecodeQueries && p.seqlen_q > 0 && p.batch > 0 &&
           p.heads_q / p.heads_k * p.seqlen_q <= kDecodeRows && p.seqlen_k >= kDecodeKeys &&
           p.head_dim % (2 * L) == 0 && p.head_dim_v % (2 * L) == 0 && !ptr.cu_seqlens_q &&
           shared(ptr.mask, p.mask, p) && shared(ptr.bias, p.bias, p) && !ptr.entropy &&
           p.dropout_p == 0 && !(TYPE == DType::kFloat16 && ATTN_VEC_BYTES < 32);
  }

  void run() {
    const int64_t units = p.batch * p.heads_k, state = rows * (p.head_dim_v + 2);
    std::vector<float> partial(units * splits * state);
    parallel_for(units * splits, threads, [&](int64_t task) {
      float* s = partial.data() + task * state;
      attend(task / splits, task % splits, false, s);
      if (!finite(s)) attend(task / splits, task % splits, true, s);
    });
    parallel_for(units, threads, [&](int64_t unit) {
      float* first = partial.data() + unit * splits * state;
      for (int64_t i = 1; i < splits; ++i) merge(first, first + i * state);
      finish(unit, first);
    });
  }

 private:
  const Problem& p;
  const Pointers& ptr;
  int threads;
  const Terms<float> terms;
  int64_t group, rows, splits;

  // One query's keys of a chunk, those that mask and bias exclude left out.
  struct Keys {
    int64_t n = 0;
    const char *K[kDecodeKeys], *V[kDecodeKeys];
    float position[kDecodeKeys], bias[kDecodeKeys];
    const char* zeros = nullptr;  // if given: a row of V for keys with P = 0
  };

  // True when there is no mask (or bias), or it is the same for all query heads of a group.
  template <class S>
  static bool shared(const void* base, const S& s, const Problem& p) {
    return !base || s.h == 0 || p.heads_q == p.heads_k;
  }

  // A unit's state: O [rows][Dv] unnormalised, largest logit [rows], sum of exp(s - max) [rows].
  float* max_of(float* state) const { return state + rows * p.head_dim_v; }
  float* sum_of(float* state) const { return max_of(state) + rows; }

  bool finite(const float* state) const {
    return all_finite<Plain<float>>(reinterpret_cast<const char*>(state),
                                    p.head_dim_v * int64_t(sizeof(float)), rows, p.head_dim_v);
  }

  // Q [rows][D] in load_storage's order.
  void load_queries(const Sequence& seq, int64_t hk, float* Q) const {
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = seq.q_offset(p.q, hk * group + r % group, r / group);
      for (int64_t c = 0; c < p.head_dim; ++c)
        Q[r * p.head_dim + storage_order<TYPE>(c)] = load_one<float>(TYPE, ptr.q, at + c);
    }
  }

  // careful: what V holds where P = 0 does not reach O (0 * inf is NaN), as at a logit of -inf;
  // keys that mask or bias exclude are not touched in any case.
  ATTN_NOINLINE void attend(int64_t unit, int64_t split, bool careful, float* state) const {
    const int64_t hk = unit % p.heads_k, d = p.head_dim;
    const Sequence seq(p, ptr, unit / p.heads_k);
    std::fill(state, max_of(state), 0.f);
    std::fill(max_of(state), sum_of(state), -std::numeric_limits<float>::infinity());
    std::fill(sum_of(state), sum_of(state) + rows, 0.f);
    Scratch scratch((rows * d + 4 * kDecodeKeys + p.head_dim_v) * int64_t(sizeof(float)));
    float* Q = scratch.take<float>(rows * d);
    float* S = scratch.take<float>(4 * kDecodeKeys);
    float* zeros = scratch.take<float>(p.head_dim_v);
    std::fill(zeros, zeros + p.head_dim_v, 0.f);
    Keys keys;
    if (careful) keys.zeros = reinterpret_cast<const char*>(zeros);
    load_queries(seq, hk, Q);
    int64_t lo, hi;
    seq.key_range(0, seq.seqlen_q, &lo, &hi);
    const int64_t chunks = (hi + kDecodeKeys - 1) / kDecodeKeys - lo / kDecodeKeys;
    const int64_t share = (chunks + splits - 1) / splits;
    const int64_t t0 = lo / kDecodeKeys + split * share;
    for (int64_t t = t0; t < std::min(t0 + share, (hi + kDecodeKeys - 1) / kDecodeKeys); ++t) {
      const int64_t n0 = std::max(t * kDecodeKeys, lo), n1 = std::min((t + 1) * kDecodeKeys, hi);
      for (int64_t i = 0; i < seq.seqlen_q; ++i) {
        int64_t first, last;
        seq.key_range(i, i + 1, &first, &last);
        collect(seq, hk, i, std::max(first, n0), std::min(last, n1), &keys);
        if (keys.n == 0) continue;
        for (int64_t r = i * group; r < (i + 1) * group;) {
          const int64_t left = (i + 1) * group - r;
          if (left >= 4 && !careful)
            rows_of<4>(seq, hk, r, keys, Q, S, state), r += 4;
          else if (left >= 2 && !careful)
            rows_of<2>(seq, hk, r, keys, Q, S, state), r += 2;
          else
            rows_of<1>(seq, hk, r, keys, Q, S, state), r += 1;
        }
      }
    }
  }

  // The keys of [first, last) that query i sees.
  void collect(const Sequence& seq, int64_t hk, int64_t i, int64_t first, int64_t last,
               Keys* keys) const {
    const int64_t h = hk * group;
    const auto* mask = static_cast<const uint8_t*>(ptr.mask);
    if (mask) mask += seq.b * p.mask.b + h * p.mask.h + i * p.mask.q;
    const int64_t bias_at = seq.b * p.bias.b + h * p.bias.h + i * p.bias.q;
    keys->n = 0;
    for (int64_t j = first; j < last; ++j) {
      if (mask && !mask[j * p.mask.k]) continue;
      if (ptr.bias) {
        const float bias = load_one<float>(p.bias_dtype, ptr.bias, bias_at + j * p.bias.k);
        if (bias == -std::numeric_limits<float>::infinity()) continue;
        keys->bias[keys->n] = bias;
      }
      keys->position[keys->n] = float(j);
      keys->K[keys->n] = static_cast<const char*>(ptr.k) + seq.k_offset(p.k, hk, j) * kBytes;
      keys->V[keys->n++] = static_cast<const char*>(ptr.v) + seq.k_offset(p.v, hk, j) * kBytes;
    }
  }

  // R rows from row r.
  template <int R>
  void rows_of(const Sequence& seq, int64_t hk, int64_t r, const Keys& keys, const float* Q,
               float* S, float* state) const {
    const int64_t d = p.head_dim, n = keys.n;
    const char *const *K = keys.K, *const *V = keys.V;
    products<R>(Q + r * d, K, V, n, S);
    float alpha[R];
    for (int i = 0; i < R; ++i)
      alpha[i] = softmax(seq, hk * group + (r + i) % group, (r + i) / group, keys,
                         S + i * kDecodeKeys, max_of(state) + r + i, sum_of(state) + r + i);
    const char* not_zero[kDecodeKeys];
    if (R == 1 && keys.zeros) {
      for (int64_t j = 0; j < n; ++j) not_zero[j] = S[j] == 0.f ? keys.zeros : V[j];
      V = not_zero;
    }
    const int64_t dv = p.head_dim_v;
    int64_t c = 0;
    if constexpr (R == 1)
      for (; c + 8 * L <= dv; c += 8 * L) add_values<R, 8>(K, V, n, c, S, alpha, state + r * dv);
    for (; c + 4 * L <= dv; c += 4 * L) add_values<R, 4>(K, V, n, c, S, alpha, state + r * dv);
    for (; c < dv; c += 2 * L) add_values<R, 2>(K, V, n, c, S, alpha, state + r * dv);
  }

  // S[i][j] = q_i . k_j: L sums at a time, L / R keys of R rows.
  template <int R>
  void products(const float* Q, const char* const* K, const char* const* V, int64_t n,
                float* S) const {
    constexpr int KEYS = L / R;
    const int64_t d = p.head_dim;
    for (int64_t j = 0; j < n; j += KEYS) {
      Vec<float> acc[L] = {};
      const char* key[KEYS];
      for (int i = 0; i < KEYS; ++i) key[i] = K[std::min<int64_t>(j + i, n - 1)];
      for (int64_t i = j; i < std::min<int64_t>(j + KEYS, n); ++i) prefetch_row(V[i], p.head_dim_v);
      for (int64_t c = 0; c < d; c += 2 * L) {
        Vec<float> q[R][2];
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i)
          q[i][0] = load(Q + i * d + c), q[i][1] = load(Q + i * d + c + L);
#pragma GCC unroll 16
        for (int k = 0; k < KEYS; ++k) {
          Vec<float> x[2];
          load_storage<TYPE>(key[k] + c * kBytes, &x[0], &x[1]);
#pragma GCC unroll 4
          for (int i = 0; i < R; ++i) {
            acc[i * KEYS + k] += q[i][0] * x[0];
            acc[i * KEYS + k] += q[i][1] * x[1];
          }
        }
      }
      sum_round<L / 2>(acc);
      for (int i = 0; i < R; ++i)
        for (int k = 0; k < KEYS; ++k) S[i * kDecodeKeys + j + k] = acc[0][i * KEYS + k];
    }
  }

  static ATTN_INLINE void prefetch_row(const char* row, int64_t dim) {
    for (int64_t at = 0; at < dim * kBytes; at += 64) __builtin_prefetch(row + at);
  }

  // One row: S products in, exp(s - max) out; the factor for what was summed before.
  float softmax(const Sequence& seq, int64_t h, int64_t i, const Keys& keys, float* S, float* max,
                float* sum) const {
    const int64_t n = keys.n;
    const float ninf = -std::numeric_limits<float>::infinity();
    const HeadTerms<float> head = HeadTerms<float>::of(ptr, seq, h, 1);
    const int64_t padded = (n + L - 1) / L * L;
    Vec<float> top = set1(ninf);
    for (int64_t j = 0; j < padded; j += L) {
      Vec<float> s = logit<DecodeWays>(
          terms.has, terms, head, load(S + j),
          [&] { return float(i + seq.seqlen_k - seq.seqlen_q) - load(keys.position + j); },
          [&] { return load(keys.bias + j); }, [](Vec<float>) {});
      s = iota<float>() + float(j) < float(n) ? s : set1(ninf);
      store(S + j, s);
      top = vmax(s, top);
    }
    float now = *max;
    for (int lane = 0; lane < L; ++lane) now = std::max(now, top[lane]);
    const float base = now == ninf ? 0.f : now;
    Vec<float> total{};
    for (int64_t j = 0; j < padded; j += L) {
      const Vec<float> e = vexp(load(S + j) - base);
      total += e;
      store(S + j, e);
    }
    const float alpha = std::exp(*max - base);
    *sum *= alpha;
    for (int lane = 0; lane < L; ++lane) *sum += total[lane];
    *max = now;
    return alpha;
  }

  // O[i][c ..] = alpha_i O[i][c ..] + sum_j P[i][j] V[j][c ..]
  template <int R, int NV>
  void add_values(const char* const* K, const char* const* V, int64_t n, int64_t c, const float* P,
                  const float* alpha, float* O) const {
    Vec<float> acc[R][NV];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[i][v] = load(O + i * p.head_dim_v + c + v * L) * alpha[i];
    for (int64_t j = 0; j < n; ++j) {
      const char* row = V[j] + c * kBytes;
      // K of the next chunk, a share each pass; beyond the end or at a page's end it does no harm.
      const char* ahead = K[j] + kDecodeKeys * p.k.s * kBytes;
      for (int64_t at = c; at < std::min(c + NV * L, p.head_dim); at += 64 / kBytes)
        __builtin_prefetch(ahead + at * kBytes);
      Vec<float> x[NV];
#pragma GCC unroll 8
      for (int v = 0; v < NV; v += 2) load_storage<TYPE>(row + v * L * kBytes, &x[v], &x[v + 1]);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const Vec<float> w = set1(P[i * kDecodeKeys + j]);
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) acc[i][v] += w * x[v];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) store(O + i * p.head_dim_v + c + v * L, acc[i][v]);
  }

  void merge(float* a, float* b) const {
    const float ninf = -std::numeric_limits<float>::infinity();
    for (int64_t r = 0; r < rows; ++r) {
      float &max_a = max_of(a)[r], &sum_a = sum_of(a)[r];
      const float max_b = max_of(b)[r], now = std::max(max_a, max_b);
      const float base = now == ninf ? 0.f : now;
      const float wa = std::exp(max_a - base), wb = std::exp(max_b - base);
      for (int64_t c = 0; c < p.head_dim_v; c += L) {
        float* at = a + r * p.head_dim_v + c;
        store(at, load(at) * wa + load(b + r * p.head_dim_v + c) * wb);
      }
      sum_a = sum_a * wa + sum_of(b)[r] * wb;
      max_a = now;
    }
  }

  void finish(int64_t unit, float* state) const {
    const float ninf = -std::numeric_limits<float>::infinity();
    const int64_t hk = unit % p.heads_k, dv = p.head_dim_v;
    const Sequence seq(p, ptr, unit / p.heads_k);
    Scratch scratch(dv * int64_t(sizeof(float)));
    float* row = scratch.take<float>(dv);
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
      for (int64_t c = 0; c < dv; ++c) row[c] = empty ? 0.f : O[storage_order<TYPE>(c)] * inverse;
      restore_row<float>(TYPE, row, dv,
                         static_cast<char*>(ptr.o) + seq.q_offset(p.o, h, i) * kBytes);
      const int64_t at = seq.lse_offset(h, i);
      if (ptr.lse) static_cast<float*>(ptr.lse)[at] = lse;
      if (ptr.max_logit) static_cast<float*>(ptr.max_logit)[at] = nan ? sum : top;
    }
  }
};

template <DType TYPE>
inline bool decode(const Problem& p, const Pointers& ptr, int threads) {
  if (!Decode<TYPE>::serves(p, ptr)) return false;
  Decode<TYPE>(p, ptr, threads).run();
  return true;
}

}  // namespace attn::cpu::ATTN_ISA
