// Dropout by position: csrc/philox.h on the device.  The same bits as the CPU kernel, whatever the
// tile.
#pragma once
#include "traits.cuh"

namespace attn::cuda {

struct Dropout {
  PhiloxKey key;
  uint64_t threshold;
  Frame frame;  // heads, queries and keys are counted from it

  ATTN_DEVICE static Dropout of(const Params& p, const Sequence& seq) {
    Dropout d{{0, 0}, p.keep_threshold, seq.frame};
    if (p.ptr.rng_state) d.key = philox_key(p.ptr.rng_state[0], p.ptr.rng_state[1]);
    return d;
  }
  // A word is kept that is at least this.  2^32, which keeps none, comes with a keep_scale of 0.
  ATTN_DEVICE uint32_t least_word() const {
    return threshold > 0xffffffffu ? 0xffffffffu : uint32_t(threshold);
  }
  // Keys j .. j + 3 of query i of head h, j a multiple of 4: words of one block, or of two where
  // the first key's position in the whole is none.
  ATTN_DEVICE void words(int h, int i, int j, uint32_t (&out)[4]) const {
    block(h, i, frame.k_first + j, out);
    const int shift = frame.k_first & 3;
    if (!shift) return;
    uint32_t next[4];
    block(h, i, frame.k_first + j + 4, next);
    // out and next moved by 2 and by 1: not out[e + shift], which would put it into local memory
    if (shift & 2) out[0] = out[2], out[1] = out[3], out[2] = next[0], out[3] = next[1];
    if (shift & 1) {
      const uint32_t last = shift & 2 ? next[2] : next[0];
      out[0] = out[1], out[1] = out[2], out[2] = out[3], out[3] = last;
    }
  }
  ATTN_DEVICE bool keep(int h, int i, int j) const {
    uint32_t w[4];
    const int at = frame.k_first + j;
    block(h, i, at, w);
    // not w[at & 3], as above
    const uint32_t low = at & 1 ? w[1] : w[0], high = at & 1 ? w[3] : w[2];
    return (at & 2 ? high : low) >= threshold;
  }
  // Keys j and j + 1, j even: of one block, but where the first key's position is odd.
  ATTN_DEVICE void keep_pair(int h, int i, int j, bool& first, bool& second) const {
    if (frame.k_first & 1) {
      first = keep(h, i, j), second = keep(h, i, j + 1);
      return;
    }
    uint32_t w[4];
    const int at = frame.k_first + j;
    block(h, i, at, w);
    first = (at & 2 ? w[2] : w[0]) >= threshold;
    second = (at & 2 ? w[3] : w[1]) >= threshold;
  }

 private:
  // The four keys among which position `at` of the whole is, of query i of head h.
  ATTN_DEVICE void block(int h, int i, int at, uint32_t (&out)[4]) const {
    const uint32_t counter[4] = {uint32_t(at >> 2), uint32_t(frame.q_first + i),
                                 uint32_t(frame.first_h + h), uint32_t(frame.first_b)};
    philox4x32(key, counter, out);
  }
};

// Words compared without predicates, by what a sum of 64 bits carries.
struct Threshold {
  uint32_t low, high;  // 2^32 less the threshold, beside ones in the high word

  ATTN_DEVICE static Threshold of(const Dropout& dropout) {
    const uint64_t rest = 0x100000000u - dropout.least_word();
    // shuffled, so that the compiler does not know them and the sum stays one instruction
    return {shfl(uint32_t(rest), 0), shfl(uint32_t(rest >> 32) - 1, 0)};
  }
  // Ones where a word is dropped, else 0.
  ATTN_DEVICE uint32_t dropped(uint32_t word) const { return add_high(word, low, high); }
};

}  // namespace attn::cuda
