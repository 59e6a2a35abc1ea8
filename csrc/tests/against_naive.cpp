// Forward, backward, decode and the parts of a row against softmax(scale Q K^T + bias) V in double,
// without Python: for machines that Python cannot run on (tests/cpu/aarch64.sh runs it under qemu).
// Features come in fixed mixes, every output buffer is NaN before the call.  Prints "ok", or each
// mix that is wrong and exits with 1.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/isa/dispatch.h"
#include "params.h"
#include "philox.h"

using attn::DType;
using attn::Pointers;
using attn::Problem;

namespace {

#if defined(__aarch64__)
using Half = __fp16;  // g++ 12 has no _Float16 there
#else
using Half = _Float16;
#endif

struct Mix {
  const char* name;
  int64_t batch, heads_q, heads_k, seqlen_q, seqlen_k, dim, dim_v;
  int64_t left = -1, right = -1;
  bool bottom_right = true, mask = false, bias = false, alibi = false, sink = false;
  double softcap = 0, dropout = 0;
  int64_t page_size = 0;  // decode, lengths of sequences differ
};

constexpr Mix kMixes[] = {
    {"plain", 2, 2, 2, 37, 53, 64, 64},
    {"causal", 1, 4, 2, 70, 70, 32, 32, -1, 0},
    {"top left, odd sizes", 2, 3, 1, 19, 33, 7, 13, -1, 0, false},
    {"window, soft cap", 1, 2, 1, 90, 140, 24, 24, 17, 5, true, false, false, false, false, 3.},
    {"mask, bias, sink", 2, 2, 2, 33, 65, 16, 40, -1, -1, true, true, true, false, true},
    {"causal, alibi, dropout", 1, 4, 4, 66, 130, 48, 48, -1, 0, true, false, false, true, false, 0.,
     0.3},
    {"wide heads", 1, 1, 1, 5, 200, 200, 257},
    {"long", 1, 1, 1, 300, 700, 16, 16, -1, 0},
    {"decode, pages", 3, 8, 2, 1, 150, 64, 64, -1, 0, true, false, false, false, false, 0., 0., 16},
    {"decode, all", 2, 4, 4, 3, 61, 33, 20, 40, 0, true, true, true, true, true, 5., 0., 7},
};

// One tensor: the values, rounded to `type`, and their bytes.
struct Buffer {
  DType type;
  std::vector<double> values;
  std::vector<char> bytes;

  static int64_t size_of(DType t) {
    return t == DType::kFloat64 ? 8 : t == DType::kFloat32 ? 4 : 2;
  }

  Buffer(DType t, int64_t n) : type(t), values(n), bytes(n * size_of(t)) {}

  int64_t size() const { return int64_t(values.size()); }
  void put(int64_t i, double x) {
    char* at = &bytes[i * size_of(type)];
    const float f = float(x);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    const uint16_t high = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest even
    const Half half = Half(f);
    if (type == DType::kFloat64) std::memcpy(at, &x, 8);
    if (type == DType::kFloat32) std::memcpy(at, &f, 4);
    if (type == DType::kBFloat16) std::memcpy(at, &high, 2);
    if (type == DType::kFloat16) std::memcpy(at, &half, 2);
    values[i] = get(i);
  }
  double get(int64_t i) const {
    const char* at = &bytes[i * size_of(type)];
    double d = 0;
    float f = 0;
    uint16_t high = 0;
    Half half = 0;
    if (type == DType::kFloat64) return std::memcpy(&d, at, 8), d;
    if (type == DType::kFloat32) return std::memcpy(&f, at, 4), f;
    if (type == DType::kFloat16) return std::memcpy(&half, at, 2), double(half);
    std::memcpy(&high, at, 2);
    const uint32_t bits = uint32_t(high) << 16;
    return std::memcpy(&f, &bits, 4), f;
  }
  void poison() {
    for (size_t i = 0; i < values.size(); ++i) put(int64_t(i), std::nan(""));
  }
};

double uniform() {
  static uint32_t state = 1;
  return double((state = state * 1664525u + 1013904223u) >> 8) / (1 << 24) * 2 - 1;
}

Buffer random(DType type, int64_t n, double scale = 1) {
  Buffer x(type, n);
  for (int64_t i = 0; i < n; ++i) x.put(i, uniform() * scale);
  return x;
}

// The tensors of a mix, contiguous [B, H, S, D]; a cache is [pages, H, page_size, D].
struct Data {
  Buffer q, k, v, dout, bias, sink, alibi;
  std::vector<uint8_t> mask;
  std::vector<int32_t> lengths, table;
  int64_t pages = 0;
};

int64_t row_of(const Mix& m, const Data& d, int64_t b, int64_t h, int64_t j) {
  if (!m.page_size) return (b * m.heads_k + h) * m.seqlen_k + j;
  const int64_t page = d.table[b * d.pages + j / m.page_size];
  return (page * m.heads_k + h) * m.page_size + j % m.page_size;
}

Data make(const Mix& m, DType type) {
  const DType wide = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const int64_t pages = m.page_size ? (m.seqlen_k + m.page_size - 1) / m.page_size : 0;
  const int64_t rows = m.page_size ? pages * m.page_size : m.seqlen_k;
  const int64_t rows_k = m.batch * m.heads_k * rows;
  const int64_t rows_q = m.batch * m.heads_q * m.seqlen_q, pairs = rows_q * m.seqlen_k;
  Data d{random(type, rows_q * m.dim),
         random(type, rows_k * m.dim),
         random(type, rows_k * m.dim_v),
         random(type, rows_q * m.dim_v),
         random(wide, m.bias ? pairs : 0),
         random(wide, m.sink ? m.heads_q : 0),
         random(DType::kFloat32, m.alibi ? m.heads_q : 0, 0.3),
         {},
         {},
         {}};
  for (int64_t i = 0; m.mask && i < pairs; ++i) d.mask.push_back(uniform() < 0.6);
  for (int64_t b = 0; b < m.batch; ++b)
    d.lengths.push_back(int32_t(m.page_size ? m.seqlen_k - 11 * b : m.seqlen_k));
  d.pages = pages;
  for (int64_t i = 0; i < m.batch * pages; ++i)  // from the last page to the first
    d.table.push_back(int32_t(m.batch * pages - 1 - i));
  return d;
}

struct Outputs {
  std::vector<double> o, lse, delta, dq, dk, dv, dbias, dsink;
};

bool sees(const Mix& m, const Data& d, int64_t pair, int64_t i, int64_t j, int64_t length) {
  const int64_t at = i + (m.bottom_right ? length - m.seqlen_q : 0);
  return j < length && (m.left < 0 || j >= at - m.left) && (m.right < 0 || j <= at + m.right) &&
         (!m.mask || d.mask[pair]);
}

// The formula, one row at a time: P and dropout's factor of each key, then O and the gradients.
Outputs naive(const Mix& m, const Data& d, const int64_t rng[2]) {
  Outputs out;
  const int64_t rows_q = m.batch * m.heads_q * m.seqlen_q;
  out.o.resize(rows_q * m.dim_v), out.lse.resize(rows_q), out.delta.resize(rows_q);
  out.dq.resize(rows_q * m.dim);
  out.dk.resize(d.k.values.size()), out.dv.resize(d.v.values.size());
  out.dbias.resize(d.bias.values.size()), out.dsink.resize(d.sink.values.size());
  const double scale = 1 / std::sqrt(double(m.dim));
  const attn::PhiloxKey key = attn::philox_key(rng[0], rng[1]);
  for (int64_t row = 0; row < rows_q; ++row) {
    const int64_t i = row % m.seqlen_q, h = row / m.seqlen_q % m.heads_q;
    const int64_t b = row / m.seqlen_q / m.heads_q, hk = h / (m.heads_q / m.heads_k);
    const int64_t n = d.lengths[b];
    const double *q = &d.q.values[row * m.dim], *dout = &d.dout.values[row * m.dim_v];
    std::vector<double> s(n, -std::numeric_limits<double>::infinity()), capped(n), keep(n, 1.);
    double sum = m.sink ? std::exp(d.sink.values[h]) : 0;
    bool empty = true;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t pair = row * m.seqlen_k + j;
      const double* k = &d.k.values[row_of(m, d, b, hk, j) * m.dim];
      double x = 0;
      for (int64_t e = 0; e < m.dim; ++e) x += q[e] * k[e];
      capped[j] = x *= scale;
      if (m.softcap > 0) capped[j] = x = m.softcap * std::tanh(x / m.softcap);
      if (m.bias) x += d.bias.values[pair];
      if (m.alibi) x -= d.alibi.values[h] * std::abs(double(i + n - m.seqlen_q - j));
      if (!sees(m, d, pair, i, j, n)) continue;
      empty = false, s[j] = x, sum += std::exp(x);
      const uint32_t counter[4] = {uint32_t(j >> 2), uint32_t(i), uint32_t(h), uint32_t(b)};
      uint32_t word[4];
      attn::philox4x32(key, counter, word);
      if (m.dropout > 0)
        keep[j] = word[j & 3] >= attn::dropout_threshold(m.dropout) ? 1 / (1 - m.dropout) : 0;
    }
    const double lse = empty ? -std::numeric_limits<double>::infinity() : std::log(sum);
    out.lse[row] = lse;
    if (empty) continue;
    double delta = 0;
    std::vector<double> p(n), dp(n);
    for (int64_t j = 0; j < n; ++j) {
      p[j] = std::exp(s[j] - lse);
      const int64_t at = row_of(m, d, b, hk, j) * m.dim_v;
      for (int64_t e = 0; e < m.dim_v; ++e) {
        out.o[row * m.dim_v + e] += p[j] * keep[j] * d.v.values[at + e];
        out.dv[at + e] += p[j] * keep[j] * dout[e];
        dp[j] += keep[j] * dout[e] * d.v.values[at + e];
      }
      delta += p[j] * dp[j];
    }
    out.delta[row] = delta;
    if (m.sink) out.dsink[h] -= std::exp(d.sink.values[h] - lse) * delta;
    for (int64_t j = 0; j < n; ++j) {
      double ds = p[j] * (dp[j] - delta);
      if (m.bias) out.dbias[row * m.seqlen_k + j] += ds;
      if (m.softcap > 0) ds *= 1 - capped[j] * capped[j] / (m.softcap * m.softcap);
      const int64_t at = row_of(m, d, b, hk, j) * m.dim;
      for (int64_t e = 0; e < m.dim; ++e) {
        out.dq[row * m.dim + e] += scale * ds * d.k.values[at + e];
        out.dk[at + e] += scale * ds * q[e];
      }
    }
  }
  return out;
}

attn::Strides strides(int64_t heads, int64_t rows, int64_t dim) {
  return {heads * rows * dim, rows * dim, dim};
}

Problem describe(const Mix& m, const Data& d, DType type) {
  Problem p;
  p.dtype = type, p.bias_dtype = type == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  p.batch = m.batch, p.heads_q = m.heads_q, p.heads_k = m.heads_k;
  p.seqlen_q = m.seqlen_q, p.seqlen_k = m.seqlen_k, p.head_dim = m.dim, p.head_dim_v = m.dim_v;
  const int64_t rows = m.page_size ? m.page_size : m.seqlen_k;
  p.q = p.dq = strides(m.heads_q, m.seqlen_q, m.dim);
  p.o = p.dout = strides(m.heads_q, m.seqlen_q, m.dim_v);
  p.k = p.dk = strides(m.heads_k, rows, m.dim), p.v = p.dv = strides(m.heads_k, rows, m.dim_v);
  const int64_t n = m.seqlen_q * m.seqlen_k;
  p.mask = p.bias = p.dbias = {m.heads_q * n, n, m.seqlen_k, 1};
  p.lse_stride_b = m.heads_q * m.seqlen_q, p.lse_stride_h = m.seqlen_q;
  p.block_table_stride = d.pages, p.page_size = m.page_size;
  p.scale = 1 / std::sqrt(double(m.dim)), p.softcap = m.softcap, p.dropout_p = m.dropout;
  p.window_left = m.left, p.window_right = m.right, p.bottom_right = m.bottom_right;
  return p;
}

// Largest error over the tensor, in units of the largest true value.
double error(const Buffer& got, const std::vector<double>& truth) {
  double top = 1e-30, worst = 0;
  for (double x : truth)
    if (std::isfinite(x)) top = std::fmax(top, std::fabs(x));
  for (size_t i = 0; i < truth.size(); ++i) {
    const double x = got.get(int64_t(i));
    if (x == truth[i]) continue;  // -inf too
    const double e = std::fabs(x - truth[i]) / top;
    worst = e <= worst ? worst : e;  // NaN is kept
    if (!(e < std::numeric_limits<double>::infinity())) return std::nan("");
  }
  return worst;
}

// partial: the rows as parts of longer ones, whose O and gradients are not rounded to `type`.
bool check(const Mix& m, DType type, int threads, bool partial) {
  const Data d = make(m, type);
  const int64_t rng[2] = {12345, 678};
  const Outputs truth = naive(m, d, rng);
  const Problem p = describe(m, d, type);
  const DType wide = p.bias_dtype;
  const DType written = partial ? wide : type;
  Buffer o(written, int64_t(truth.o.size())), lse(wide, int64_t(truth.lse.size()));
  Buffer dq(written, int64_t(truth.dq.size())), dk(written, int64_t(truth.dk.size()));
  Buffer dv(written, int64_t(truth.dv.size())), dbias(wide, int64_t(truth.dbias.size()));
  Buffer delta(wide, int64_t(truth.delta.size()));
  for (size_t i = 0; i < truth.delta.size(); ++i) delta.put(int64_t(i), truth.delta[i]);
  Buffer dsink(wide, int64_t(truth.dsink.size()));  // both start at zero: they are summed into
  for (Buffer* x : {&o, &lse, &dq, &dk, &dv}) x->poison();
  Pointers ptr;
  ptr.q = d.q.bytes.data(), ptr.k = d.k.bytes.data(), ptr.v = d.v.bytes.data();
  if (m.mask) ptr.mask = d.mask.data();
  if (m.bias) ptr.bias = d.bias.bytes.data();
  if (m.alibi) ptr.alibi_slopes = d.alibi.bytes.data();
  if (m.sink) ptr.sink = d.sink.bytes.data();
  if (m.dropout > 0) ptr.rng_state = rng;
  if (m.page_size) ptr.seqlens_k = d.lengths.data(), ptr.block_table = d.table.data();
  ptr.o = o.bytes.data(), ptr.lse = lse.bytes.data();
  attn::cpu::Options options;
  Buffer base(wide, lse.size()), rest(wide, lse.size());  // of a part, in place of LSE, their sum
  if (partial) {
    options.partial = true, options.delta = delta.bytes.data();
    options.base = base.bytes.data(), options.rest = rest.bytes.data();
    ptr.max_logit = base.bytes.data(), ptr.lse = rest.bytes.data();
  }
  attn::cpu::forward(p, ptr, options, threads);
  for (int64_t i = 0; partial && i < lse.size(); ++i) lse.put(i, base.get(i) + rest.get(i));
  ptr.max_logit = nullptr, ptr.lse = lse.bytes.data();
  // Rounding of the result, and what is lost on the way: 2^-8 and 2^-11 are half a bfloat16's and
  // half a float16's last digit.
  const double digits = type == DType::kFloat64    ? 1e-13
                        : type == DType::kFloat32  ? 4e-6
                        : type == DType::kBFloat16 ? 1.5 / 256
                                                   : 1.5 / 2048;
  bool right = true;
  const auto hold = [&](const char* what, const Buffer& got, const std::vector<double>& want,
                        double bound) {
    const double e = error(got, want);
    if (e <= bound) return;
    right = false;
    std::printf("%s%s, dtype %d, %d threads: %s is off by %.3g of the largest, allowed is %.3g\n",
                m.name, partial ? ", a part" : "", int(type), threads, what, e, bound);
  };
  hold("O", o, truth.o, digits);
  hold("LSE", lse, truth.lse, type == DType::kBFloat16 ? 1e-4 : std::fmin(digits, 4e-6));
  if (m.page_size) return right;  // decode has no backward
  ptr.dout = d.dout.bytes.data();
  ptr.dq = dq.bytes.data(), ptr.dk = dk.bytes.data(), ptr.dv = dv.bytes.data();
  if (m.bias) ptr.dbias = dbias.bytes.data();
  if (m.sink) ptr.dsink = dsink.bytes.data();
  attn::cpu::backward(p, ptr, options, threads);
  hold("dQ", dq, truth.dq, 3 * digits);
  hold("dK", dk, truth.dk, 3 * digits);
  hold("dV", dv, truth.dv, 3 * digits);
  hold("dBias", dbias, truth.dbias, 3 * digits);
  hold("dSink", dsink, truth.dsink, 3 * digits);
  return right;
}

}  // namespace

int main() {
  int wrong = 0, count = 0;
  for (const Mix& m : kMixes)
    for (DType type : {DType::kFloat32, DType::kFloat64, DType::kBFloat16, DType::kFloat16})
      for (int threads : {1, 3}) {
        ++count, wrong += !check(m, type, threads, false);
        if (!m.sink && !m.page_size) ++count, wrong += !check(m, type, threads, true);
      }
  if (wrong) return std::printf("%d of %d are wrong\n", wrong, count), 1;
  std::printf("ok: %d mixes on %s\n", count, attn::cpu::isa().c_str());
  return 0;
}
