// The kernels for few queries on the plainest vectors, decode.h and the panels that heads of a
// group share in forward.h, against softmax(Q K^T) V in double: a program of its own in which tests
// plant bugs (tests/cpu/test_few_queries_mutations.py).  Prints each case that is wrong.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/kernels/decode.h"
#include "cpu/kernels/forward.h"
#include "one_thread.h"
#include "plain_numbers.h"

namespace {

using namespace attn;

constexpr int64_t kBatch = 2, kHeadsK = 2, kDim = 16;

struct Case {
  const char* name;
  int64_t group, queries, keys, page;   // page: 0, or keys of a page
  bool causal, tree, sink, rows_first;  // rows_first: all of Q, K, V and O are [.., S, H, D]
  int64_t window = -1;
};

// Decode takes up to 31 rows; more share panels.
constexpr Case kCases[] = {
    {"streams", 2, 1, 331, 0, false, false, false, false},
    {"streams_causal", 2, 9, 200, 0, true, false, false, false},
    {"streams_pages", 3, 2, 150, 5, true, false, false, true},
    {"streams_tree", 2, 7, 130, 0, false, true, false, false},
    {"streams_window", 2, 1, 1100, 0, true, false, false, false, 1000},
    {"streams_heads", 2, 3, 1100, 0, true, false, false, true},
    {"panels", 4, 20, 90, 0, false, false, false, false},
    {"panels_causal", 4, 17, 250, 0, true, false, false, true},
    {"panels_tree", 3, 33, 210, 0, false, true, false, false},
    {"panels_sink", 5, 20, 70, 7, false, false, true, true},
};

struct Call {
  Case c;
  Problem p;
  std::vector<float> q, k, v, o, lse, sink;
  std::vector<uint8_t> mask;
  std::vector<int32_t> table;

  explicit Call(const Case& one) : c(one) {
    const int64_t heads = c.group * kHeadsK, pages = c.page ? (c.keys + c.page - 1) / c.page : 0;
    const int64_t rows = c.page ? pages * c.page : c.keys;
    fill(&q, kBatch * heads * c.queries * kDim, 1);
    fill(&k, kBatch * kHeadsK * rows * kDim, 5000);
    fill(&v, kBatch * kHeadsK * rows * kDim, 9000);
    fill(&sink, heads, 77);
    o.assign(q.size(), NAN), lse.assign(kBatch * heads * c.queries, NAN);
    p.batch = kBatch, p.heads_q = heads, p.heads_k = kHeadsK, p.head_dim = p.head_dim_v = kDim;
    p.seqlen_q = c.queries, p.seqlen_k = c.keys, p.scale = 0.5;
    p.q = c.rows_first ? Strides{heads * c.queries * kDim, kDim, heads * kDim}
                       : Strides{heads * c.queries * kDim, c.queries * kDim, kDim};
    p.o = p.q;
    const int64_t together = c.page ? c.page : c.keys;
    p.k = p.v = c.rows_first ? Strides{kHeadsK * together * kDim, kDim, kHeadsK * kDim}
                             : Strides{kHeadsK * together * kDim, together * kDim, kDim};
    p.lse_stride_b = heads * c.queries, p.lse_stride_h = c.queries;
    p.page_size = c.page, p.block_table_stride = pages;
    if (c.causal) p.window_right = 0;
    p.window_left = c.window;
    for (int64_t i = 0; i < kBatch * pages; ++i)  // in no order
      table.push_back(int32_t((i * 7 + 3) % (kBatch * pages)));
    p.mask = {0, 0, c.keys, 1};
    for (int64_t i = 0; i < c.queries; ++i)  // all keys but the last, of which each has its own
      for (int64_t j = 0; j < c.keys; ++j)
        mask.push_back(j < c.keys - c.queries || (i + j) % 3 == 0 || j % 50 == 1);
  }

  void run() {
    Pointers ptr;
    ptr.q = q.data(), ptr.k = k.data(), ptr.v = v.data(), ptr.o = o.data(), ptr.lse = lse.data();
    if (c.tree) ptr.mask = mask.data();
    if (c.sink) ptr.sink = sink.data();
    if (c.page) ptr.block_table = table.data();
    const cpu::Options options;
    if (!cpu::baseline::decode<DType::kFloat32>(p, ptr, options, 1))
      cpu::baseline::Forward<cpu::baseline::Plain<float>>(p, ptr, options, 1).run();
  }

  int64_t key_at(int64_t b, int64_t hk, int64_t j) const {
    const int64_t page = c.page ? table[b * p.block_table_stride + j / c.page] : b;
    return page * p.k.b + hk * p.k.h + (c.page ? j % c.page : j) * p.k.s;
  }

  // Whether one row of O and its LSE are what they should be.
  bool right(int64_t b, int64_t h, int64_t i) const {
    const int64_t hk = h / c.group, at = b * p.q.b + h * p.q.h + i * p.q.s;
    std::vector<double> out(kDim, 0.);
    double sum = c.sink ? std::exp(double(sink[h])) : 0;
    for (int64_t j = 0; j < c.keys; ++j) {
      const int64_t past = i + c.keys - c.queries;
      if ((c.causal && j > past) || (c.window >= 0 && j < past - c.window)) continue;
      if (c.tree && !mask[i * c.keys + j]) continue;
      const int64_t key = key_at(b, hk, j);
      double s = 0;
      for (int64_t d = 0; d < kDim; ++d) s += double(q[at + d]) * k[key + d];
      const double w = std::exp(s * p.scale);
      sum += w;
      for (int64_t d = 0; d < kDim; ++d) out[d] += w * v[key + d];
    }
    bool good = std::fabs(lse[(b * p.heads_q + h) * c.queries + i] - std::log(sum)) < 1e-4;
    for (int64_t d = 0; d < kDim; ++d) good &= std::fabs(o[at + d] - out[d] / sum) < 1e-4;
    return good;
  }
};

}  // namespace

int main() {
  for (const Case& one : kCases) {
    Call call(one);
    call.run();
    bool good = true;
    for (int64_t b = 0; b < kBatch; ++b)
      for (int64_t h = 0; h < call.p.heads_q; ++h)
        for (int64_t i = 0; i < one.queries; ++i) good &= call.right(b, h, i);
    if (!good) std::printf("%s\n", one.name);
  }
}
