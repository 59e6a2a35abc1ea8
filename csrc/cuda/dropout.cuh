// Dropout by position: csrc/philox.h on the device.  The same bits as the CPU kernel, whatever the
// tile.
#pragma once
#include "traits.cuh"

namespace attn::cuda {

struct Dropout {
  PhiloxKey key;
  uint64_t threshold;
  uint32_t b;

  ATTN_DEVICE static Dropout of(const Params& p, int b) {
    Dropout d{{0, 0}, p.keep_threshold, uint32_t(b)};
    if (p.ptr.rng_state) d.key = philox_key(p.ptr.rng_state[0], p.ptr.rng_state[1]);
    return d;
  }
  // A word is kept that is at least this.  2^32, which keeps none, comes with a keep_scale of 0.
  ATTN_DEVICE uint32_t least_word() const {
    return threshold > 0xffffffffu ? 0xffffffffu : uint32_t(threshold);
  }
  // Keys 4 * (j / 4) .. + 3 of query i of head h.
  ATTN_DEVICE void words(int h, int i, int j, uint32_t (&out)[4]) const {
    const uint32_t counter[4] = {uint32_t(j) >> 2, uint32_t(i), uint32_t(h), b};
    philox4x32(key, counter, out);
  }
  ATTN_DEVICE bool keep(int h, int i, int j) const {
    uint32_t w[4];
    words(h, i, j, w);
    // not w[j & 3]: an index that is only known at run time would put w into local memory
    const uint32_t low = j & 1 ? w[1] : w[0], high = j & 1 ? w[3] : w[2];
    return (j & 2 ? high : low) >= threshold;
  }
  // Keys j and j + 1, j even: of one block.
  ATTN_DEVICE void keep_pair(int h, int i, int j, bool& first, bool& second) const {
    uint32_t w[4];
    words(h, i, j, w);
    first = (j & 2 ? w[2] : w[0]) >= threshold;
    second = (j & 2 ? w[3] : w[1]) >= threshold;
  }
};

}  // namespace attn::cuda
