// What the kernel for few queries (decode.h) does for eight rows of Q at a time, where registers
// are of 64 bytes: parts of O stay in them while the V of a chunk goes by, and with pairs of
// bfloat16 the products of a key with all rows come out side by side, so that no register is summed
// over all of its lanes.
//
//   Q, eight rows:   vector 2c      A of row 0 | B of row 1 | A of row 2 | ... | B of row 7
//                    vector 2c + 1  B of row 0 | A of row 1 | B of row 2 | ... | A of row 7
//   a key, 16 bytes: A B A B A B A B, then exchanged B A B A B A B A; A, B: two pairs of numbers
//   sums of the key: two lanes a row, which are added once, at the end
//
// A load and an exchange serve two multiplications of 32 pairs; a load for each of them is slower,
// since a core loads no more vectors in a cycle than it multiplies.
#pragma once
#include "cpu/kernels/decode_keys.h"
#include "cpu/simd/gemm.h"
#include "cpu/simd/prefetch.h"
#include "cpu/simd/storage.h"
#include "cpu/simd/transpose.h"

namespace attn::cpu::ATTN_ISA {

// Rows that are prefetched a few at a time, V of a chunk while its K is worked on and K of the
// next one while V is: all at once they would fill the queue of misses.  They go to the first-level
// cache and not the second one, which is 1.1 times as fast (EPYC, Zen 5).
struct DecodeSoon {
  const DecodeKeys* keys;
  int64_t n, rows;           // keys, 0: none; rows of Q
  int64_t k_bytes, v_bytes;  // of a row of K and of V
  int64_t values = 0, next = 0, credit = 0;
  bool packed = false;  // whether V of the chunk was copied by pack_values
  // So many pairs of a row of Q and a key were multiplied.
  ATTN_INLINE void multiplied_keys(int64_t pairs) {
    if (values < n)
      for (credit += pairs; credit >= rows && values < n; credit -= rows)
        prefetch_rows<0>(keys->V[values++], 1, 0, v_bytes);
  }
  ATTN_INLINE void multiplied_values(int64_t pairs) {
    if (next < n)
      for (credit += pairs; credit >= rows && next < n; credit -= rows, ++next)
        prefetch_rows<0>(keys->paged ? keys->after[next] : keys->K[next] + keys->ahead, 1, 0,
                         k_bytes);
  }
};

// KEPT: of K and V; PAIRS: whether they and Q are multiplied as pairs of bfloat16.
template <DType KEPT, bool PAIRS>
class DecodeEight {
  static constexpr int L = kLanes<float>;
  static constexpr int64_t kKeptBytes = storage_bytes(KEPT);

 public:
  static constexpr int kRows = 8;

  DecodeEight(int64_t head_dim, int64_t head_dim_v) : d(head_dim), dv(head_dim_v) {}

#ifdef ATTN_BF16_DOT
  // Eight rows of pairs, one after the other, in the order above.
  void interleave(const float* Q, float* out) const {
    for (int64_t c = 0; c < d / 4; ++c)
      for (int i = 0; i < kRows; ++i, out += 2)
        std::memcpy(out, Q + i * d / 2 + 2 * (c ^ (i & 1)), 8);
  }

  // S[i][j] = q_i . k_j of eight interleaved rows.
  ATTN_NOINLINE void products(const float* Q, const DecodeKeys& keys, float* S,
                              DecodeSoon& soon) const {
    for (int64_t j = 0; j < keys.n; j += 2 * L) {
      Vec<float> sums[L];  // of keys j + i and j + L + i: two lanes a row of Q
      for (int i = 0; i < L; i += L / 2) {
        const char* key[L];
        for (int k = 0; k < L; ++k)
          key[k] = keys.K[std::min(j + k / (L / 2) * L + i + k % (L / 2), keys.n - 1)];
        join_lanes(key, Q, sums + i, soon);
      }
      transpose_round<float, 1>(sums);
      for (int i = 0; i < kRows; ++i) {
        store(S + i * kDecodeKeys + j, sums[2 * i]);
        store(S + i * kDecodeKeys + j + L, sums[2 * i + 1]);
      }
    }
  }
#endif

  // O[i] += sum_k P[i][k] V[k] of all n keys of a chunk, two vectors of each row of O at a time.
  void add_values(const DecodeKeys& keys, float* values, float* S, float* O,
                  DecodeSoon& soon) const {
    if (!soon.packed) pack_values(keys, values);
    soon.packed = true;
    const int64_t share = std::max<int64_t>(1, 4 * kRows * L / dv);
#ifdef ATTN_BF16_DOT
    for (int i = 0; PAIRS && i < kRows; ++i) pair_weights(S + i * kDecodeKeys);
#endif
    for (int64_t c = 0; c < dv; c += 2 * L) hold_block(values + c, keys.n, S, O + c, share, soon);
  }

 private:
  int64_t d, dv;

#ifdef ATTN_BF16_DOT
  // L keys with eight rows: lanes 2 i and 2 i + 1 of sums[k] are row i with keys k and k + L / 2.
  ATTN_INLINE void join_lanes(const char* const* key, const float* Q, Vec<float>* sums,
                              DecodeSoon& soon) const {
    constexpr int STEP = 4;  // numbers of Q that stay in registers while L keys go by
    Vec<float> acc[L] = {};
    for (int64_t c = 0; c < d; c += 4 * STEP) {
      soon.multiplied_keys(kRows * L * 4 * STEP / d);
      Vec<uint32_t> q[STEP];
#pragma GCC unroll 4
      for (int s = 0; s < STEP; ++s)
        q[s] = load(reinterpret_cast<const uint32_t*>(Q) + (c / 4 + s) * L);
#pragma GCC unroll 16
      for (int k = 0; k < L; ++k) {
        const char* at = key[k] + c * 2;
#pragma GCC unroll 2
        for (int s = 0; s < STEP; s += 2) {
          const Vec<uint32_t> x = four_pairs(at + 8 * s);
          acc[k] = Bf16Pairs::fma(acc[k], q[s], x);
          acc[k] = Bf16Pairs::fma(acc[k], q[s + 1], exchanged(x));
        }
      }
    }
    Mask<float> lower, upper;
    for (int e = 0; e < L; ++e) {
      lower[e] = e & 1 ? L + e - 1 : e;
      upper[e] = e & 1 ? L + e : e + 1;
    }
#pragma GCC unroll 8
    for (int k = 0; k < L / 2; ++k)
      sums[k] = __builtin_shuffle(acc[k], acc[k + L / 2], lower) +
                __builtin_shuffle(acc[k], acc[k + L / 2], upper);
  }

  // Four pairs of bfloat16, over and over: A, B, A, B ... of two pairs each; and B, A ...
  static ATTN_INLINE Vec<uint32_t> four_pairs(const char* p) {
    return (Vec<uint32_t>)_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p));
  }
  static ATTN_INLINE Vec<uint32_t> exchanged(Vec<uint32_t> x) {
    Vec<uint32_t> other;
    for (int e = 0; e < L; ++e) other[e] = e ^ 2;
    return __builtin_shuffle(x, other);
  }
#endif

  ATTN_NOINLINE void hold_block(const float* V, int64_t n, const float* S, float* O, int64_t share,
                                DecodeSoon& soon) const {
    constexpr int PER = PAIRS ? 2 : 1;  // keys of a row of V
    Vec<float> acc[kRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) acc[i][0] = load(O + i * dv), acc[i][1] = load(O + i * dv + L);
    for (int64_t j = 0; j < n; j += 2) {
      soon.multiplied_values(share);
#pragma GCC unroll 2
      for (int k = 0; k < 2; k += PER, V += dv) add_value(V, S + (j + k) / PER, acc);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) store(O + i * dv, acc[i][0]), store(O + i * dv + L, acc[i][1]);
  }

  static ATTN_INLINE void add_value(const float* V, const float* P, Vec<float> (&acc)[kRows][2]) {
    const Vec<float> x[2] = {load(V), load(V + L)};
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec<float> w = set1(P[i * kDecodeKeys]);
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
#ifdef ATTN_BF16_DOT
        if constexpr (PAIRS) {
          acc[i][v] = Bf16Pairs::fma(acc[i][v], (Vec<uint32_t>)w, (Vec<uint32_t>)x[v]);
          continue;
        }
#endif
        acc[i][v] += w * x[v];
      }
    }
  }

  // V of a chunk as numbers, or pairs of rows as pairs of bfloat16, in load_storage's order: it is
  // read row after row, and not two vectors of each.  An odd last row has one beside it whose P is
  // 0.
  void pack_values(const DecodeKeys& keys, float* out) const {
    const int64_t n = keys.n;
    if constexpr (PAIRS) {
#ifdef ATTN_BF16_DOT
      for (int64_t j = 0; j < n; j += 2, out += dv)
        pair_rows_of(keys.V[j], keys.V[std::min(j + 1, n - 1)], dv, out);
#endif
    } else {
      for (int64_t j = 0; j < n; ++j, out += dv)
        for (int64_t c = 0; c < dv; c += 2 * L) {
          Vec<float> x[2];
          load_storage<KEPT>(keys.V[j] + c * kKeptBytes, &x[0], &x[1]);
          store(out + c, x[0]), store(out + c + L, x[1]);
        }
      if (n % 2) std::fill(out, out + dv, 0.f);
    }
  }

#ifdef ATTN_BF16_DOT
  // out[c] = (one[c], two[c]), the even numbers of each 2 L before the odd ones.
  static ATTN_INLINE void pair_rows_of(const char* one, const char* two, int64_t n, float* out) {
    for (int64_t c = 0; c < n; c += 2 * L) {
      Vec<uint32_t> a, b;
      std::memcpy(&a, one + c * 2, sizeof(a));
      std::memcpy(&b, two + c * 2, sizeof(b));
      store(out + c, (Vec<float>)((a & 0xffffu) | b << 16));
      store(out + c + L, (Vec<float>)(a >> 16 | (b & 0xffff0000u)));
    }
  }

  // The weights of a row of S as bfloat16, pairs of neighbouring keys from S on.
  static ATTN_INLINE void pair_weights(float* S) {
#pragma GCC unroll 2
    for (int64_t j = 0; j < kDecodeKeys; j += 2 * L) {
      auto* out = reinterpret_cast<uint16_t*>(S) + j;
      store_two_rows(out, out + L, two_rows(load(S + j), load(S + j + L)));
    }
  }
#endif
};

}  // namespace attn::cpu::ATTN_ISA
