// What the kernel for few queries does on wide registers alone (decode.h, decode_groups.h), two
// streams of keys, eight rows of Q at a time, rows of bfloat16 multiplied as pairs, against
// softmax(Q K^T) V in double: a program of its own in which tests plant bugs
// (tests/cpu/test_decode_group_mutations.py), by intrinsics that stand in for those of AVX-512.
// Prints each case that is wrong.
#include "avx512_stand_in.h"

#define ATTN_ISA avx512_bf16
#define ATTN_BF16_DOT
#define ATTN_VEC_BYTES 64
#define ATTN_NV 4
#define ATTN_MR 6
#include "cpu/isa/region.h"
#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_BF16_FEATURES)
#include "cpu/kernels/decode.h"
#pragma GCC pop_options
#include <cmath>
#include <cstdio>
#include <vector>

#include "one_thread.h"
#include "plain_numbers.h"

namespace {

using namespace attn;
using cpu::bf16_to_float;
using cpu::float_to_bf16;

constexpr int64_t kHeadsK = 2;

struct Case {
  const char* name;
  int64_t group, queries, keys, dim;
  int64_t window = -1;  // of a causal call
  bool slopes = false;  // ALiBi
  bool poison = false;  // a row of V that no query sees is NaN
};

// Groups of more than 11 rows of a short cache share panels, but for slopes.
constexpr Case kCases[] = {
    {"one_row", 1, 1, 1500, 64},
    {"one_row_long", 1, 1, 700, 256},
    {"one_row_slopes", 1, 1, 1500, 64, -1, true},
    {"one_row_window", 1, 1, 1100, 32, 1000},
    {"eight", 8, 1, 331, 64},
    {"eight_slopes", 8, 1, 1600, 32, -1, true},
    {"eight_window", 8, 1, 600, 32, 500},
    {"eight_and_three", 11, 1, 75, 96},
    {"twice_eight", 16, 1, 130, 64, -1, true},
    {"two_queries", 8, 2, 515, 64, -1, true},
    {"poison", 8, 2, 400, 64, 300, true, true},  // the second query sees less of a chunk
};

struct Call {
  Case c;
  Problem p;
  std::vector<uint16_t> q, k, v, o;
  std::vector<float> lse, slopes;

  static void narrow(std::vector<uint16_t>* x, int64_t n, int64_t seed) {
    std::vector<float> wide;
    fill(&wide, n, seed);
    for (float one : wide) x->push_back(float_to_bf16(one));
  }

  explicit Call(const Case& one) : c(one) {
    const int64_t heads = c.group * kHeadsK;
    narrow(&q, heads * c.queries * c.dim, 1);
    narrow(&k, kHeadsK * c.keys * c.dim, 5000);
    narrow(&v, kHeadsK * c.keys * c.dim, 9000);
    o.assign(q.size(), 0x7fc0), lse.assign(heads * c.queries, NAN);
    for (int64_t h = 0; h < heads; ++h) slopes.push_back(0.01f * float(h + 1));
    p.dtype = DType::kBFloat16, p.batch = 1, p.heads_q = heads, p.heads_k = kHeadsK;
    p.head_dim = p.head_dim_v = c.dim, p.seqlen_q = c.queries, p.seqlen_k = c.keys, p.scale = 0.1;
    p.q = p.o = {0, c.queries * c.dim, c.dim};
    p.k = p.v = {0, c.keys * c.dim, c.dim};
    p.lse_stride_h = c.queries, p.window_right = 0, p.window_left = c.window;
    if (c.poison)  // the first key, which the window leaves out
      for (int64_t d = 0; d < c.dim; ++d) v[d] = 0x7fc0;
  }

  void run() {
    Pointers ptr;
    ptr.q = q.data(), ptr.k = k.data(), ptr.v = v.data(), ptr.o = o.data(), ptr.lse = lse.data();
    if (c.slopes) ptr.alibi_slopes = slopes.data();
    if (!cpu::avx512_bf16::decode<DType::kBFloat16>(p, ptr, cpu::Options{}, 1))
      std::printf("not_served\n");
  }

  // Whether one row of O and its LSE are what they should be.
  bool right(int64_t h, int64_t i) const {
    const int64_t hk = h / c.group, at = h * p.q.h + i * p.q.s, past = i + c.keys - c.queries;
    std::vector<double> out(c.dim, 0.);
    double sum = 0;
    for (int64_t j = 0; j <= past; ++j) {
      if (c.window >= 0 && j < past - c.window) continue;
      double s = 0;
      for (int64_t d = 0; d < c.dim; ++d)
        s += double(bf16_to_float(q[at + d])) * bf16_to_float(k[hk * p.k.h + j * c.dim + d]);
      const double w = std::exp(s * p.scale - (c.slopes ? slopes[h] * double(past - j) : 0));
      sum += w;
      for (int64_t d = 0; d < c.dim; ++d)
        out[d] += w * bf16_to_float(v[hk * p.k.h + j * c.dim + d]);
    }
    bool good = std::fabs(lse[h * c.queries + i] - std::log(sum)) < 1e-4;
    for (int64_t d = 0; d < c.dim; ++d)
      good &= std::fabs(bf16_to_float(o[at + d]) - out[d] / sum) < 0.01;
    return good;
  }
};

}  // namespace

int main() {
  for (const Case& one : kCases) {
    Call call(one);
    call.run();
    bool good = true;
    for (int64_t h = 0; h < call.p.heads_q; ++h)
      for (int64_t i = 0; i < one.queries; ++i) good &= call.right(h, i);
    if (!good) std::printf("%s\n", one.name);
  }
}
