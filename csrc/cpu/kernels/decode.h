// Few queries against many keys (decode): bound by reading K and V, so each row of them is read
// once for all query heads of its group and with the head dimension in lanes, as it lies.
// One task = one K/V head, or all heads of a sequence where their rows of a key lie together, or a
// share of the keys when tasks are few (split-KV, combined in fixed order).  It reads its keys as
// four or two streams, each row after row and far from the others: a processor fetches ahead for
// several such streams at a time, and less for one of them alone, or for rows abreast that share a
// page of memory.  Rows of Q are ordered by query, then by head of the group: queries that see the
// same keys of a chunk are worked on together, and rows of K and V that a query does not see are
// not touched.
#pragma once
#include "cpu/kernels/decode_groups.h"
#include "cpu/kernels/decode_keys.h"
#include "cpu/kernels/options.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/storage.h"
#include "cpu/simd/transpose.h"
#include "cpu/tile/rows.h"
#include "cpu/tile/score.h"

namespace attn::cpu::ATTN_ISA {

// TYPE: of Q and O; KEPT: of K and V, TYPE itself or kInt8, whose factors are in `Kept`.
template <DType TYPE, DType KEPT = TYPE>
class Decode : DecodeRows {
  static constexpr int L = kLanes<float>;
  static constexpr int64_t kBytes = storage_bytes(TYPE), kKeptBytes = storage_bytes(KEPT);
  static constexpr bool kFactors = KEPT == kInt8;
  // Whether q.k is of pairs of bfloat16, as Q and K are stored: half of the instructions.
#ifdef ATTN_BF16_DOT
  static constexpr bool kPairs = TYPE == DType::kBFloat16 && KEPT == TYPE;
#else
  static constexpr bool kPairs = false;
#endif
  static constexpr int64_t kQueryBytes = kPairs ? 2 : 4;  // of a number of Q
  using Eight = DecodeEight<KEPT, kPairs>;
  static constexpr int kMost = L == 16 ? Eight::kRows : 4;  // rows of Q that are worked on together

 public:
  Decode(const Problem& problem, const Pointers& pointers, const Kept& kept, int threads)
      : DecodeRows(problem, pointers, kKeptBytes, kFactors ? &kept : nullptr),
        threads(threads),
        eight(problem.head_dim, problem.head_dim_v) {
    const int64_t bytes = std::max(p.head_dim, p.head_dim_v) * kKeptBytes;
    const bool dense = p.k.s == p.head_dim && p.v.s == p.head_dim_v && !ptr.block_table;
    const int64_t most_rows = kKeptBytes == 4 ? kMost - 1 : kKeptBytes == 2 ? 1 : 0;
    const bool two = L == 16 && dense && bytes <= kDecodeTwoStreams && rows <= most_rows;
    if (two) streams = 2;
    wide = !two || bytes <= kDecodeFourRows;
    prefetched = p.k.s != p.head_dim || (L == 16 && (two || rows > 1 || kKeptBytes == 2));
    together = p.k.s == p.heads_k * p.k.h && p.v.s == p.heads_k * p.v.h ? p.heads_k : 1;
    steady = together == 1 && !ptr.block_table && !ptr.mask && !ptr.bias && !kFactors;
    const int64_t tasks = p.batch * p.heads_k / together, chunks = (p.seqlen_k + 511) / 512;
    // Chosen from shapes alone, so that results do not depend on the number of threads.
    splits = p.num_splits > 0 ? std::min(p.num_splits, (p.seqlen_k + kDecodeKeys - 1) / kDecodeKeys)
             : tasks >= 16    ? 1
                              : std::max<int64_t>(1, std::min((16 + tasks - 1) / tasks, chunks));
  }

  // Whether the problem has this form; what it lacks is served by Forward.
  ATTN_NOINLINE static bool serves(const Problem& p, const Pointers& ptr) {
    return p.dtype == TYPE && few(p, ptr) && p.batch > 0 && p.seqlen_k >= kDecodeKeys &&
           p.head_dim % (2 * L) == 0 && p.head_dim_v % (2 * L) == 0 && !ptr.cu_seqlens_q &&
           shared(ptr.mask, p.mask, p) && shared(ptr.bias, p.bias, p) && !ptr.entropy &&
           p.dropout_p == 0;
  }

  void run() {
    const int64_t units = p.batch * p.heads_k / together, state = together * head_state();
    std::vector<float> partial(splits > 1 ? units * splits * state : 0);
    parallel_for(units * splits, threads, [&](int64_t task) {
      Scratch scratch((state + work()) * int64_t(sizeof(float)));
      float* s = splits > 1 ? partial.data() + task * state : scratch.take<float>(state);
      const size_t mark = scratch.used();
      attend(task / splits, task % splits, false, s, scratch);
      scratch.rewind(mark);
      if (!finite(s)) attend(task / splits, task % splits, true, s, scratch);
      scratch.rewind(mark);
      if (splits == 1) finish(task, s, scratch);
    });
    if (splits == 1) return;
    parallel_for(units, threads, [&](int64_t unit) {
      float* first = partial.data() + unit * splits * state;
      for (int64_t i = 1; i < splits; ++i)
        for (int64_t h = 0; h < together; ++h)
          merge(first + h * head_state(), first + i * state + h * head_state());
      Scratch scratch(work() * int64_t(sizeof(float)));
      finish(unit, first, scratch);
    });
  }

 private:
  int threads;
  Eight eight;
  bool wide;  // whether four rows are read abreast, and not two
  // Whether rows are prefetched by instructions: where they do not lie one after the other, since
  // nothing else fetches them ahead, where several rows of Q share them, and where they are of two
  // bytes a number or there are two streams: a processor with AVX-512 then reads 1.1 to 1.8 times
  // as fast (EPYC, Zen 5).
  bool prefetched;

  // Whether the queries are so few that panels would mostly hold padding.
  static bool few(const Problem& p, const Pointers& ptr) {
#ifdef ATTN_BF16_DOT
    constexpr int64_t kQueries = TYPE == DType::kBFloat16 ? kDecodePairQueries : kDecodeQueries;
#else
    constexpr int64_t kQueries = kDecodeQueries;
#endif
    const int64_t rows = p.heads_q / p.heads_k * p.seqlen_q;
    const bool together = !ptr.bias || p.bias.q == 0;
    constexpr BeforePanels kMostRows = kPairs    ? kBeforePairPanels
                                       : L == 16 ? kBeforeWidePanels
                                                 : kBeforePanels;
    const bool cached =
        p.batch * p.heads_k * p.seqlen_k * (p.head_dim + p.head_dim_v) * kKeptBytes <=
        kDecodeCached;
    if (!kFactors && rows > (cached ? kMostRows.cached : kMostRows.more) &&
        heads_share_panels(p, ptr))
      return false;
    return p.seqlen_q > 0 && p.seqlen_q <= (together ? kQueries : kDecodeSingleQueries) &&
           rows <= kDecodeRows;
  }

  // Numbers that `attend` and `finish` take.
  int64_t work() const {
    return together * rows * p.head_dim + (kMost + p.head_dim_v) * kDecodeKeys + p.head_dim_v;
  }
  // Of Q of a head in floats; of pairs it is kept twice, of eights of rows interleaved as well.
  int64_t query_size() const { return rows * p.head_dim * kQueryBytes / 4; }
  // Q [rows][D] in load_storage's order; pairs as they are.
  void load_queries(const Sequence& seq, int64_t hk, float* Q) const {
    [[maybe_unused]] float* const first = Q;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t at = seq.q_offset(p.q, hk * group + r % group, r / group);
      const char* row = static_cast<const char*>(ptr.q) + at * kBytes;
      if constexpr (kPairs) {
        std::memcpy(Q, row, size_t(p.head_dim * kBytes));
        Q += p.head_dim / 2;
        continue;
      }
      for (int64_t c = 0; c < p.head_dim; c += 2 * L, Q += 2 * L) {
        Vec<float> x[2];
        load_storage<TYPE>(row + c * kBytes, &x[0], &x[1]);
        store(Q, x[0]);
        store(Q + L, x[1]);
      }
    }
#ifdef ATTN_BF16_DOT
    if constexpr (kPairs)
      for (int64_t r = 0; r + Eight::kRows <= rows; r += Eight::kRows)
        eight.interleave(first + r * p.head_dim / 2, first + query_size() + r * p.head_dim / 2);
#endif
  }

  // careful: what V holds where P = 0 does not reach O (0 * inf is NaN), as at a logit of -inf;
  // keys that mask or bias exclude are not touched in any case.
  ATTN_NOINLINE void attend(int64_t unit, int64_t split, bool careful, float* state,
                            Scratch& scratch) const {
    const int64_t first = unit * together % p.heads_k, size = (kPairs ? 2 : 1) * query_size();
    const Sequence seq(p, ptr, unit * together / p.heads_k);
    float* Q = scratch.take<float>(together * size);
    for (int64_t h = 0; h < together; ++h) {
      begin(state + h * head_state());
      load_queries(seq, first + h, Q + h * size);
    }
    float* S = scratch.take<float>((kMost + p.head_dim_v) * kDecodeKeys);
    float* zeros = scratch.take<float>(p.head_dim_v);
    std::fill(zeros, zeros + p.head_dim_v, 0.f);
    Keys keys;
    if (careful) keys.zeros = reinterpret_cast<const char*>(zeros);
    Chunk chunk = chunk_of(seq, split);
    for (; chunk.t * each() < chunk.apart; ++chunk.t)
      for (int64_t h = 0; h < together; ++h) {
        keys.paged = prefetched && ptr.block_table && h + 1 == together;
        keys.ahead = (h + 1 < together ? p.k.h : each() * p.k.s - h * p.k.h) * kKeptBytes;
        add_chunk(seq, first + h, chunk, careful, Q + h * size, S, state + h * head_state(), &keys);
      }
  }

  // A chunk of the keys of one head.
  void add_chunk(const Sequence& seq, int64_t hk, const Chunk& chunk, bool careful, const float* Q,
                 float* S, float* state, Keys* keys) const {
    for (int64_t i = 0; i < seq.seqlen_q;) {
      collect(seq, hk, chunk, i, keys);
      int64_t next = i + 1;
      while (next < seq.seqlen_q && same_keys(seq, hk, chunk, i, next)) ++next;
      if (keys->n > 0) add_keys(seq, hk, i * group, next * group, careful, *keys, Q, S, state);
      i = next;
    }
  }

  // Rows [r, end), which see the same keys.
  void add_keys(const Sequence& seq, int64_t hk, int64_t r, int64_t end, bool careful,
                const Keys& keys, const float* Q, float* S, float* state) const {
    float* values = S + kMost * kDecodeKeys;
    DecodeSoon soon{&keys, prefetched ? keys.n : 0, end - r, p.head_dim * kKeptBytes,
                    p.head_dim_v * kKeptBytes};
    auto take = [&](auto count) {
      rows_of<count.value>(seq, hk, r, keys, Q, S, state, values, soon);
      r += count.value;
    };
    while (r < end) {
      if (end - r >= kMost && r % kMost == 0 && !careful)
        take(std::integral_constant<int, kMost>{});
      else if (end - r >= 4 && !careful)
        take(std::integral_constant<int, 4>{});
      else if (end - r >= 2 && !careful)
        take(std::integral_constant<int, 2>{});
      else
        take(std::integral_constant<int, 1>{});
    }
  }

  // R rows from row r.
  template <int R>
  ATTN_NOINLINE void rows_of(const Sequence& seq, int64_t hk, int64_t r, const Keys& keys,
                             const float* Q, float* S, float* state, float* values,
                             DecodeSoon& soon) const {
    const int64_t n = keys.n, dv = p.head_dim_v;
    const char* const* V = keys.V;
    float* O = state + r * dv;
    constexpr int AT_ONCE = std::min(R, 4);  // sums of more rows do not fit the registers
    const float* Q_of_r = Q + r * p.head_dim * kQueryBytes / 4;
#ifdef ATTN_BF16_DOT
    if constexpr (kPairs && R == Eight::kRows)
      eight.products(Q_of_r + query_size(), keys, S, soon);
    else
#endif
      for (int i = 0; i < R; i += AT_ONCE)
        products<AT_ONCE>(Q_of_r + i * p.head_dim * kQueryBytes / 4, keys, S + i * kDecodeKeys,
                          soon);
    if constexpr (kFactors) multiply_each<R, false>(keys.k_factor, n, S);
    for (int i = 0; i < R; ++i) {
      const float alpha =
          softmax(seq, hk * group + (r + i) % group, (r + i) / group, keys, S + i * kDecodeKeys,
                  max_of(state) + r + i, sum_of(state) + r + i);
      if (alpha == 1) continue;
      for (float* o = O + i * dv; o < O + (i + 1) * dv; o += L)
        store(o, weighed<float>(load(o), set1(alpha)));
    }
    const char* not_zero[kDecodeKeys];
    if (R == 1 && keys.zeros) {
      for (int64_t j = 0; j < n; ++j) not_zero[j] = S[j] == 0.f ? keys.zeros : V[j];
      V = not_zero;
    }
    if constexpr (kFactors) multiply_each<R, true>(keys.v_factor, n, S);
    if constexpr (R == Eight::kRows) return eight.add_values(keys, values, S, O, soon);
    if (L == 16 && !wide)
      add_abreast<R, 2>(V, n, S, O, soon);
    else
      add_abreast<R, 4>(V, n, S, O, soon);
  }

  // O[i] += sum_k P[i][k] V[k] of all n keys, N rows of V abreast.
  template <int R, int N>
  void add_abreast(const char* const* V, int64_t n, const float* S, float* O,
                   DecodeSoon& soon) const {
    int64_t j = 0;
    for (; j + N <= n; j += N) {
      soon.multiplied_values(R * N);
      add_values<R, N>(V + j, S + j, O);
    }
    for (; j < n; ++j) add_values<R, 1>(V + j, S + j, O);
  }

  // S[i][j] = q_i . k_j: L sums at a time, L / R keys of R rows.
  template <int R>
  void products(const float* Q, const Keys& keys, float* S, DecodeSoon& soon) const {
    // A key of each stream abreast, where 16 sums and what they are made of fit the registers.
    constexpr int KEYS = L / R, ABREAST = std::min(KEYS, R == 1 || L == 16 ? 4 : 2);
    static_assert(KEYS % ABREAST == 0);
    const int64_t n = keys.n;
    for (int64_t j = 0; j < n; j += L) {
      Vec<float> sums[R];  // of KEYS keys each: lane i KEYS + k is row i and key k
      for (int part = 0; part < R && j + part * KEYS < n; ++part) {
        const int64_t at = j + part * KEYS;
        Vec<float> acc[L];
        const char* key[KEYS];
        for (int k = 0; k < KEYS; ++k) key[k] = keys.K[std::min(at + k, n - 1)];
        soon.multiplied_keys(L);
        if (L == 16 && !wide) {
#pragma GCC unroll 16
          for (int k = 0; k < KEYS; k += 2) dots<R, 2>(Q, key + k, acc + k);
        } else {
#pragma GCC unroll 16
          for (int k = 0; k < KEYS; k += ABREAST) dots<R, ABREAST>(Q, key + k, acc + k);
        }
        sum_round<L / 2>(acc);
        sums[part] = acc[0];
      }
      exchange_parts<R, 1>(sums);
      for (int i = 0; i < R; ++i) store(S + i * kDecodeKeys + j, sums[i]);
    }
  }

  // The products of R rows with N keys, lane by lane: of row i at acc[i L / R].
  template <int R, int N>
  ATTN_INLINE void dots(const float* Q, const char* const* key, Vec<float>* acc) const {
    Vec<float> sum[R][N] = {};
    for (int64_t c = 0; c < p.head_dim; c += 2 * L) {
#ifdef ATTN_BF16_DOT
      if constexpr (kPairs) {
        add_pairs<R, N>(reinterpret_cast<const uint32_t*>(Q) + c / 2, key, c, sum);
        continue;
      }
#endif
      Vec<float> x[N][2];
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) load_storage<KEPT>(key[k] + c * kKeptBytes, &x[k][0], &x[k][1]);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const Vec<float> q0 = load(Q + i * p.head_dim + c), q1 = load(Q + i * p.head_dim + c + L);
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) sum[i][k] += q0 * x[k][0], sum[i][k] += q1 * x[k][1];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) acc[i * (L / R) + k] = sum[i][k];
  }

#ifdef ATTN_BF16_DOT
  // What numbers c ... c + 2 L - 1 of the rows add to their products.
  template <int R, int N>
  ATTN_INLINE void add_pairs(const uint32_t* Q, const char* const* key, int64_t c,
                             Vec<float> (&sum)[R][N]) const {
    Vec<uint32_t> x[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) x[k] = load(reinterpret_cast<const uint32_t*>(key[k]) + c / 2);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const Vec<uint32_t> q = load(Q + i * p.head_dim / 2);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sum[i][k] = Bf16Pairs::fma(sum[i][k], q, x[k]);
    }
  }
#endif

  // O[i] += sum_k P[i][k] V[k], one key after the other.
  template <int R, int N>
  ATTN_INLINE void add_values(const char* const* V, const float* P, float* O) const {
    const int64_t dv = p.head_dim_v;
    Vec<float> w[R][N];
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) w[i][k] = set1(P[i * kDecodeKeys + k]);
    for (int64_t c = 0; c < dv; c += 2 * L) {
      Vec<float> x[N][2];
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) load_storage<KEPT>(V[k] + c * kKeptBytes, &x[k][0], &x[k][1]);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        float* o = O + i * dv + c;
        Vec<float> o0 = load(o), o1 = load(o + L);
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) o0 += w[i][k] * x[k][0], o1 += w[i][k] * x[k][1];
        store(o, o0);
        store(o + L, o1);
      }
    }
  }
};

template <DType TYPE, DType KEPT = TYPE>
inline bool decode(const Problem& p, const Pointers& ptr, const Options& o, int threads) {
  if (!Decode<TYPE, KEPT>::serves(p, ptr)) return false;
  Decode<TYPE, KEPT>(p, ptr, o.kept, threads).run();
  return true;
}

}  // namespace attn::cpu::ATTN_ISA
