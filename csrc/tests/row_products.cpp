// Rows whose keys lie in one tile, O and dQ of which leave their product as rows (row_product.h),
// rows of dK and dV at a block's last panel, and the bands and bases of such tiles, on the plainest
// vectors against the formula in double: a program of its own in which tests plant bugs
// (tests/cpu/test_row_product_mutations.py).  Prints each case that is wrong.
#include <cmath>
#include <cstdio>
#include <vector>

#define ATTN_ISA baseline
#define ATTN_VEC_BYTES 16
#define ATTN_NV 2
#define ATTN_MR 4
#include "cpu/isa/region.h"
#include "cpu/kernels/backward.h"
#include "cpu/kernels/forward.h"
#include "one_thread.h"
#include "plain_numbers.h"

namespace {

using namespace attn;

constexpr int64_t kHeads = 16, kDim = 16;  // enough tasks for keys not to be split

struct Case {
  const char* name;
  int64_t queries, keys;
  int64_t left, right;     // of the band, or -1
  bool mask, poison;       // poison: a row of V is NaN, the third last
  bool rising = false;     // logits of the second tile are far above those of the first
  bool top_left = false;   // the diagonal begins at the first key: no query sees the last ones
  bool bad_query = false;  // the third row of Q and dO is NaN; not all keys of its block see it
};

constexpr Case kCases[] = {
    {"full", 21, 37, -1, -1, false, false},
    {"causal", 70, 70, -1, 0, false, false},
    {"window", 50, 61, 5, 3, false, false},
    {"mask", 33, 40, -1, -1, true, false},
    {"two_tiles", 9, 250, -1, -1, false, false},
    {"some_whole", 230, 230, -1, 0, false, false},
    {"poison", 37, 37, -1, 0, false, true},
    {"rising", 40, 220, -1, -1, false, false, true},
    {"two_panels", 100, 60, -1, -1, false, false},
    {"window_panels", 140, 140, 5, 3, false, false},
    {"top_left", 40, 70, -1, 0, false, false, false, true},
    {"bad_query", 30, 30, -1, 0, false, false, false, false, true},
};

struct Call {
  Case c;
  Problem p;
  std::vector<float> q, k, v, o, lse, dout, dq, dk, dv;
  std::vector<uint8_t> mask;

  explicit Call(const Case& one) : c(one) {
    fill(&q, kHeads * c.queries * kDim, 1), fill(&k, kHeads * c.keys * kDim, 5000);
    fill(&v, kHeads * c.keys * kDim, 9000), fill(&dout, kHeads * c.queries * kDim, 300);
    o.assign(q.size(), NAN), dq.assign(q.size(), NAN), lse.assign(kHeads * c.queries, NAN);
    dk.assign(k.size(), NAN), dv.assign(k.size(), NAN);
    for (int64_t h = 0; c.poison && h < kHeads; ++h)
      for (int64_t d = 0; d < kDim; ++d) v[((h + 1) * c.keys - 3) * kDim + d] = NAN;
    for (int64_t i = 0; c.rising && i < int64_t(k.size()); ++i)
      if (i / kDim % c.keys >= cpu::kForwardKeys) k[i] *= 5;
    for (int64_t h = 0; c.bad_query && h < kHeads; ++h)
      for (int64_t d = 0; d < kDim; ++d)
        q[(h * c.queries + 2) * kDim + d] = dout[(h * c.queries + 2) * kDim + d] = NAN;
    p.batch = 1, p.heads_q = p.heads_k = kHeads, p.head_dim = p.head_dim_v = kDim;
    p.seqlen_q = c.queries, p.seqlen_k = c.keys, p.scale = 0.5;
    p.q = p.o = p.dout = p.dq = Strides{kHeads * c.queries * kDim, c.queries * kDim, kDim};
    p.k = p.v = p.dk = p.dv = Strides{kHeads * c.keys * kDim, c.keys * kDim, kDim};
    p.lse_stride_b = kHeads * c.queries, p.lse_stride_h = c.queries;
    p.mask = {0, 0, c.keys, 1};
    p.bottom_right = !c.top_left;
    if (c.left >= 0) p.window_left = c.left;
    if (c.right >= 0) p.window_right = c.right;
    for (int64_t i = 0; i < c.queries; ++i)
      for (int64_t j = 0; j < c.keys; ++j) mask.push_back((i * 5 + j * j) % 3 != 0);
  }

  void run() {
    Pointers ptr;
    ptr.q = q.data(), ptr.k = k.data(), ptr.v = v.data(), ptr.o = o.data(), ptr.lse = lse.data();
    ptr.dout = dout.data(), ptr.dq = dq.data(), ptr.dk = dk.data(), ptr.dv = dv.data();
    if (c.mask) ptr.mask = mask.data();
    const cpu::Options options;
    cpu::baseline::Forward<cpu::baseline::Plain<float>>(p, ptr, options, 1).run();
    if (!c.poison) cpu::baseline::Backward<cpu::baseline::Plain<float>>(p, ptr, options, 1).run();
  }

  bool sees(int64_t i, int64_t j) const {
    const int64_t past = i + (p.bottom_right ? c.keys - c.queries : 0);
    return (c.left < 0 || j >= past - c.left) && (c.right < 0 || j <= past + c.right) &&
           (!c.mask || mask[i * c.keys + j]);
  }

  static double dot(const float* a, const float* b) {
    double sum = 0;
    for (int64_t d = 0; d < kDim; ++d) sum += double(a[d]) * b[d];
    return sum;
  }
  static bool near(double a, double b) {
    return (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) < 1e-4;
  }

  // Whether a row of O, its LSE and its dQ are what they should be.
  bool right(int64_t h, int64_t i) const {
    const int64_t at = (h * c.queries + i) * kDim, keys = h * c.keys * kDim;
    std::vector<double> out(kDim, 0.), grad(kDim, 0.), w(c.keys, 0.);
    double sum = 0, delta = 0;
    for (int64_t j = 0; j < c.keys; ++j)
      if (sees(i, j)) sum += w[j] = std::exp(dot(&q[at], &k[keys + j * kDim]) * p.scale);
    const double inverse = sum != 0 ? 1 / sum : 0;
    for (int64_t j = 0; j < c.keys; ++j)
      for (int64_t d = 0; d < kDim && sees(i, j); ++d)
        out[d] += w[j] * inverse * v[keys + j * kDim + d];
    for (int64_t d = 0; d < kDim; ++d) delta += out[d] * dout[at + d];
    for (int64_t j = 0; j < c.keys; ++j) {
      const double ds = w[j] * inverse * (dot(&dout[at], &v[keys + j * kDim]) - delta) * p.scale;
      for (int64_t d = 0; d < kDim && sees(i, j); ++d) grad[d] += ds * k[keys + j * kDim + d];
    }
    bool good = near(lse[h * c.queries + i], std::log(sum)) || sum == 0;
    for (int64_t d = 0; d < kDim; ++d)
      good &= near(o[at + d], out[d]) && (c.poison || near(dq[at + d], grad[d]));
    return good;
  }

  // Whether the rows of dK and dV of a head are.
  bool right_keys(int64_t h) const {
    const int64_t keys = h * c.keys * kDim;
    std::vector<double> gk(c.keys * kDim, 0.), gv(c.keys * kDim, 0.);
    for (int64_t i = 0; i < c.queries; ++i) {
      const int64_t at = (h * c.queries + i) * kDim;
      std::vector<double> w(c.keys, 0.), dw(c.keys, 0.);
      double sum = 0, delta = 0;
      for (int64_t j = 0; j < c.keys; ++j)
        if (sees(i, j)) {
          sum += w[j] = std::exp(dot(&q[at], &k[keys + j * kDim]) * p.scale);
          delta += w[j] * (dw[j] = dot(&dout[at], &v[keys + j * kDim]));
        }
      for (int64_t j = 0; j < c.keys; ++j)
        for (int64_t d = 0; d < kDim && sees(i, j); ++d) {
          gv[j * kDim + d] += w[j] / sum * dout[at + d];
          gk[j * kDim + d] += w[j] / sum * (dw[j] - delta / sum) * p.scale * q[at + d];
        }
    }
    bool good = true;
    for (int64_t i = 0; i < c.keys * kDim; ++i)
      good &= near(dk[keys + i], gk[i]) && near(dv[keys + i], gv[i]);
    return good;
  }
};

}  // namespace

int main() {
  for (const Case& one : kCases) {
    Call call(one);
    call.run();
    bool good = true;
    for (int64_t h = 0; h < kHeads; ++h) {
      for (int64_t i = 0; i < one.queries; ++i) good &= call.right(h, i);
      good &= one.poison || call.right_keys(h);
    }
    if (!good) std::printf("%s\n", one.name);
  }
}
