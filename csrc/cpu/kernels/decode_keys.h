// What the kernel for few queries (decode.h) reads at a time: keys of four streams.
#pragma once
#include "cpu/tile/score.h"
#include "cpu/tiles.h"

namespace attn::cpu::ATTN_ISA {

// logit.h for decode, which has always divided by softcap: its results keep their bits.
struct DecodeWays : VectorWays<float> {
  static ATTN_INLINE Vec<float> over_cap(Vec<float> x, const Terms<float>& t) { return x / t.cap; }
};

// Part t of the keys [from, end) of a task: kDecodeEach of each stream, which starts `apart` keys
// after the one before it.
struct DecodeChunk {
  int64_t from, end, apart, t;
  int64_t begin_of(int64_t stream) const { return from + stream * apart + t * kDecodeEach; }
  int64_t end_of(int64_t stream) const {
    return std::min(std::min(begin_of(stream) + kDecodeEach, from + (stream + 1) * apart), end);
  }
};

// A query's keys of a chunk, those that mask and bias exclude left out.
struct DecodeKeys {
  int64_t n = 0;
  const char *K[kDecodeKeys], *V[kDecodeKeys];
  int64_t j[kDecodeKeys];
  float position[kDecodeKeys], bias[kDecodeKeys];  // position: j
  float k_factor[kDecodeKeys], v_factor[kDecodeKeys];
  const char* zeros = nullptr;  // if given: a row of V for keys with P = 0
  int64_t ahead;                // bytes from a row of K to the one that is wanted after this chunk
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
