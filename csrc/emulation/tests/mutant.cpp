// The problems on which planted bugs are tried: runs the bf16 kernels that mutant_kernels.cpp holds
// on a few of them, in the modes of the emulator that are named (all of them without a name), and
// prints one line a mode: "<mode>: ok", "<mode>: wrong ..." against float64, or "<mode>: raised
// ...". tests/cuda/test_emulator_mutations.py links it with kernels of which each has one planted
// bug.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "../machine.h"
#include "mutant.h"

namespace {

using attn::emulation::machine;
using namespace attn::ptx;
using attn::planted::PART, attn::planted::HEAD_DIM;
constexpr int HQ = 2;
const bool HOPPER = PART >= 3 && PART <= 6;

std::vector<bf16> random_tensor(int64_t n, uint32_t seed) {
  std::vector<bf16> x(n);
  for (bf16& v : x) {
    seed = seed * 1664525u + 1013904223u;
    v = from_float<bf16>(float(int32_t(seed)) * 0x1p-30f);  // [-2, 2)
  }
  return x;
}

// NaN, once met, stays: std::max would lose it.
double worse(double a, double b) { return std::isnan(a) || a > b ? a : b; }

// The largest difference, NaN where either side alone is NaN, infinite where infinities differ.
double distance(const float* got, const double* want, int64_t n) {
  double worst = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (double(got[i]) == want[i]) continue;
    worst = worse(worst, std::fabs(double(got[i]) - want[i]));
  }
  return worst;
}
double distance(const std::vector<bf16>& got, const std::vector<double>& want) {
  std::vector<float> x;
  for (const bf16 v : got) x.push_back(to_float(v));
  return distance(x.data(), want.data(), int64_t(x.size()));
}

// The error of the example; above 0.05 is wrong.  bf16 products of 96 numbers, summed in fp32:
// exact to 1e-4.
double run_example() {
  const int M = 100, N = 50, K = 96;
  const auto A = random_tensor(M * K, 1), B = random_tensor(N * K, 2);
  std::vector<float> C(M * N, NAN);
  std::vector<double> want(M * N);
  for (int i = 0; i < M * N; ++i)
    for (int k = 0; k < K; ++k)
      want[i] += double(to_float(A[i / N * K + k])) * to_float(B[i % N * K + k]);
  attn::planted::run_example(A.data(), B.data(), C.data(), M, N, K);
  return distance(C.data(), want.data(), M * N);
}

using attn::cuda::Params;

// Lengths of a sequence; bad: all that it holds is NaN, and what becomes of it is not looked at.
struct Length {
  int sq, sk;
  bool bad = false;
};
struct Case {  // dense where there is one sequence, else varlen
  std::vector<Length> lengths;
  bool causal;
  bool grows = false;  // logits: see growing()
};
// Keys whose length grows with every 128 of them, by 2, 8 and 32: of the largest logits of tiles
// one after the other, some hardly exceed those before, some by far.
std::vector<bf16> growing(std::vector<bf16> K) {
  for (size_t i = 0; i < K.size(); ++i) {
    const int tile = int(i / HEAD_DIM / 128);
    K[i] = from_float<bf16>(std::ldexp(to_float(K[i]), tile * tile));
  }
  return K;
}
// Queries of which the first 8 of every 16, the rows g of a warp, have next to no logits.
std::vector<bf16> half_asleep(std::vector<bf16> Q) {
  for (size_t i = 0; i < Q.size(); ++i)
    if (i / HEAD_DIM % 16 < 8) Q[i] = from_float<bf16>(std::ldexp(to_float(Q[i]), -9));
  return Q;
}
// Ragged and causal with several tiles of keys; more queries than keys, so that the first tile
// sees nothing; whole tiles only.
const Case SM80[] = {{{{70, 201}}, true}, {{{140, 70}}, true}, {{{64, 192}}, false}};
// The plain forward: these, and many whole tiles of which the logits grow, so that O is rescaled;
// several sequences, NaN behind and between them
const Case SM80_PLAIN[] = {{{{70, 201}}, true},
                           {{{140, 70}}, true},
                           {{{64, 192}}, false},
                           {{{128, 512}}, false, true},
                           {{{70, 130}, {0, 3}, {33, 40, true}, {129, 65}, {2, 0}}, true}};
// The backward in one kernel: whole tiles and edges of both kinds, heads of a group, empty rows
const Case SM80_FUSED[] = {
    {{{70, 201}}, true},
    {{{140, 70}}, true},
    {{{192, 128}}, false},
    {{{192, 128}}, true},
    {{{64, 100}, {2, 0}, {0, 3}, {33, 40, true}, {20, 1}, {90, 30, true}, {5, 2}}, true}};
// Hopper: several sequences, NaN behind and between them.
// Forward: tiles of 128: each ring goes round twice, and one warpgroup rests
const Case HOPPER_FORWARD[] = {
    {{{70, 500}}, true},
    {{{200, 70}}, true},
    {{{128, 512}}, false, true},
    {{{70, 130}, {0, 3}, {33, 40, true}, {129, 1}, {2, 0}, {20, 270}}, false}};
// Backward: whole tiles and edges of both kinds, heads of a group, empty rows
const Case HOPPER_BACKWARD[] = {
    {{{70, 200}}, true},
    {{{40, 20}}, true},
    {{{64, 100}, {2, 0}, {0, 3}, {33, 40, true}, {20, 1}, {90, 30, true}, {5, 2}}, false}};

// Everything in float64, one K/V head, [H, S, HEAD_DIM] tensors.
struct Reference {
  std::vector<double> o, lse, delta, dq, dk, dv;
  Reference(const Length& c, bool causal, double scale, const std::vector<bf16>& q,
            const std::vector<bf16>& k, const std::vector<bf16>& v, const std::vector<bf16>& dout)
      : o(q.size()), lse(HQ * c.sq), delta(HQ * c.sq), dq(q.size()), dk(k.size()), dv(k.size()) {
    const auto dot = [](const bf16* a, const bf16* b) {
      double sum = 0;
      for (int d = 0; d < HEAD_DIM; ++d) sum += double(to_float(a[d])) * to_float(b[d]);
      return sum;
    };
    std::vector<double> P(c.sk);
    for (int row = 0; row < HQ * c.sq; ++row) {
      const int i = row % c.sq;
      const int end = causal ? std::min(c.sk, std::max(0, i + c.sk - c.sq + 1)) : c.sk;
      double top = -INFINITY, sum = 0;
      for (int j = 0; j < end; ++j) {
        P[j] = scale * dot(&q[row * HEAD_DIM], &k[j * HEAD_DIM]);
        top = std::max(top, P[j]);
      }
      for (int j = 0; j < end; ++j) sum += P[j] = std::exp(P[j] - top);
      lse[row] = end ? top + std::log(sum) : -INFINITY;
      for (int j = 0; j < end; ++j) P[j] /= sum;
      for (int d = 0; d < HEAD_DIM; ++d) {
        for (int j = 0; j < end; ++j) o[row * HEAD_DIM + d] += P[j] * to_float(v[j * HEAD_DIM + d]);
        delta[row] += o[row * HEAD_DIM + d] * to_float(dout[row * HEAD_DIM + d]);
      }
      for (int j = 0; j < end; ++j) {
        const double dS = P[j] * (dot(&dout[row * HEAD_DIM], &v[j * HEAD_DIM]) - delta[row]);
        for (int d = 0; d < HEAD_DIM; ++d) {
          dv[j * HEAD_DIM + d] += P[j] * to_float(dout[row * HEAD_DIM + d]);
          dk[j * HEAD_DIM + d] += scale * dS * to_float(q[row * HEAD_DIM + d]);
          dq[row * HEAD_DIM + d] += scale * dS * to_float(k[j * HEAD_DIM + d]);
        }
      }
    }
  }
};

constexpr bf16 NO_NUMBER = {0xffff};

// [heads, rows, HEAD_DIM]
struct Tensor {
  int heads, rows;
  std::vector<bf16> data;
  Tensor(int h, int r) : heads(h), rows(r), data(size_t(h) * r * HEAD_DIM, NO_NUMBER) {}

  // Rows start.. of each head from x, or the other way round.
  void put(const std::vector<bf16>& x, int start) {
    const size_t n = x.size() / heads;
    for (int h = 0; h < heads; ++h)
      std::copy_n(x.data() + h * n, n, data.data() + (size_t(h) * rows + start) * HEAD_DIM);
  }
  std::vector<bf16> get(int start, int length) const {
    std::vector<bf16> x;
    for (int h = 0; h < heads; ++h) {
      const auto from = data.begin() + (int64_t(h) * rows + start) * HEAD_DIM;
      x.insert(x.end(), from, from + int64_t(length) * HEAD_DIM);
    }
    return x;
  }
  attn::Strides strides() const { return {0, int64_t(rows) * HEAD_DIM, HEAD_DIM}; }
};

// All that a launch gets and gives: sequences one behind the other, then rows that are nobody's.
struct Run {
  static constexpr int NOBODYS = 140;  // as many as a wrong length may write to
  const Case& c;
  const double scale = 0.125;
  int total_q = 0, total_k = 0;
  std::vector<int32_t> begin_q, begin_k;
  std::vector<Reference> want;
  Tensor q, k, v, dout, out, dk, dv;  // out: O or dQ
  std::vector<float> lse, delta;

  static int rows(const Case& c, int Length::* side) {
    int n = c.lengths.size() > 1 ? NOBODYS : 0;
    for (const Length& x : c.lengths) n += x.*side;
    return n;
  }
  explicit Run(const Case& of)
      : c(of),
        q(HQ, rows(c, &Length::sq)),
        k(1, rows(c, &Length::sk)),
        v(k),
        dout(q),
        out(q),
        dk(k),
        dv(k),
        lse(size_t(HQ) * q.rows, NAN),
        delta(lse) {
    for (const Length& x : c.lengths) {
      const uint32_t seed = 5 * uint32_t(want.size());
      auto Q = random_tensor(HQ * x.sq * HEAD_DIM, seed + 1),
           K = random_tensor(x.sk * HEAD_DIM, seed + 2);
      if (c.grows) Q = half_asleep(Q), K = growing(K);
      const auto V = random_tensor(x.sk * HEAD_DIM, seed + 3);
      const auto dO = random_tensor(HQ * x.sq * HEAD_DIM, seed + 4);
      want.emplace_back(x, c.causal, scale, Q, K, V, dO);
      if (!x.bad) q.put(Q, total_q), k.put(K, total_k), v.put(V, total_k), dout.put(dO, total_q);
      begin_q.push_back(total_q), begin_k.push_back(total_k);
      total_q += x.sq, total_k += x.sk;
    }
    begin_q.push_back(total_q), begin_k.push_back(total_k);
  }
  // What backward needs of forward.
  void give_rows() {
    for (size_t s = 0; s < want.size(); ++s)
      for (int r = 0; r < HQ * c.lengths[s].sq && !c.lengths[s].bad; ++r) {
        const int at = r / c.lengths[s].sq * q.rows + begin_q[s] + r % c.lengths[s].sq;
        lse[at] = float(want[s].lse[r]), delta[at] = float(want[s].delta[r]);
      }
  }
  Params params() {
    Params p{};
    p.p.dtype = attn::DType::kBFloat16;
    p.p.batch = int64_t(want.size()), p.p.heads_q = HQ, p.p.heads_k = 1;
    for (const Length& x : c.lengths) {
      p.p.seqlen_q = std::max<int64_t>(p.p.seqlen_q, x.sq);
      p.p.seqlen_k = std::max<int64_t>(p.p.seqlen_k, x.sk);
    }
    p.p.head_dim = p.p.head_dim_v = HEAD_DIM;
    p.p.q = p.p.o = p.p.dout = p.p.dq = q.strides();
    p.p.k = p.p.v = p.p.dk = p.p.dv = k.strides();
    p.p.lse_stride_h = q.rows;
    p.p.scale = scale;
    if (want.size() > 1) {
      p.p.rows_q = q.rows, p.p.rows_k = k.rows;
      p.ptr.cu_seqlens_q = begin_q.data(), p.ptr.cu_seqlens_k = begin_k.data();
    }
    p.ptr.q = q.data.data(), p.ptr.k = k.data.data(), p.ptr.v = v.data.data();
    p.ptr.lse = lse.data();
    p.terms = attn::Terms<float>::of(p.p, p.ptr, 1.4426950408889634);
    p.natural = attn::Terms<float>::of(p.p, p.ptr, 1.0);
    p.features = attn::cuda::features_of(p.p, p.ptr);
    p.scale = p.terms.scale, p.scale_log2 = p.terms.factor;
    p.keep_scale = 1.0f;
    p.window_left = -1, p.window_right = c.causal ? 0 : -1;
    p.group = HQ, p.pack = p.splits = 1;
    p.q_vec = p.k_vec = p.v_vec = p.dout_vec = true;
    return p;
  }
  // The largest error of `got`; infinite where rows that are nobody's were written to.
  double error(const Tensor& got, const std::vector<double> Reference::* field,
               const std::vector<int32_t>& begin) const {
    double worst = 0;
    for (size_t s = 0; s < want.size(); ++s)
      if (!c.lengths[s].bad)
        worst = worse(worst, distance(got.get(begin[s], begin[s + 1] - begin[s]), want[s].*field));
    for (const bf16 x : got.get(begin.back(), got.rows - begin.back()))
      if (x.bits != NO_NUMBER.bits) return INFINITY;
    return worst;
  }
  double lse_error() const {
    double worst = 0;
    for (size_t s = 0; s < want.size(); ++s)
      for (int h = 0; h < HQ && !c.lengths[s].bad; ++h)
        worst = worse(worst,
                      distance(lse.data() + size_t(h) * q.rows + begin_q[s],
                               want[s].lse.data() + size_t(h) * c.lengths[s].sq, c.lengths[s].sq));
    for (int h = 0; h < HQ; ++h)
      for (int i = total_q; i < q.rows; ++i)
        if (!std::isnan(lse[size_t(h) * q.rows + i])) return INFINITY;
    return worst;
  }
};

double run_case(const Case& c) {
  static std::map<const Case*, Run> made;  // the reference is computed once for all modes
  Run run = made.try_emplace(&c, c).first->second;
  Params p = run.params();
  if (HOPPER) machine.mode.smem_limit = 227 * 1024;
  const bool forward = PART == 1 || PART == 3 || PART == 7;
  if (forward) {
    p.ptr.o = run.out.data.data();
    attn::planted::run_kernels(p);
    return worse(run.error(run.out, &Reference::o, run.begin_q), run.lse_error());
  }
  run.give_rows();
  p.ptr.dout = run.dout.data.data(), p.delta = run.delta.data();
  p.ptr.dq = run.out.data.data(), p.ptr.dk = run.dk.data.data(), p.ptr.dv = run.dv.data.data();
  attn::planted::run_kernels(p);
  // of numbers of size 1 (dQ) to 20 (dV), rounded to bf16
  return worse(run.error(run.out, &Reference::dq, run.begin_q),
               worse(run.error(run.dk, &Reference::dk, run.begin_k) / 4,
                     run.error(run.dv, &Reference::dv, run.begin_k) / 4));
}

template <size_t N>
double run_cases(const Case (&cases)[N]) {
  double worst = 0;
  for (const Case& c : cases) worst = worse(worst, run_case(c));
  return worst;
}
double run_all() {
  if (PART == 0) return run_example();
  if (PART == 7) return run_cases(SM80_PLAIN);
  if (PART == 8) return run_cases(SM80_FUSED);
  return PART >= 4   ? run_cases(HOPPER_BACKWARD)
         : PART == 3 ? run_cases(HOPPER_FORWARD)
                     : run_cases(SM80);
}

struct NamedMode {
  const char* name;
  bool random, poison, race;
};
constexpr NamedMode MODES[] = {{"plain", false, false, false},
                               {"random", true, false, false},
                               {"poison", false, true, false},
                               {"race", false, false, true},
                               {"all", true, true, true}};

// Wavefronts beyond the ideal of all shared accesses.
void report_banks() {
  machine.mode = {};
  machine.mode.banks = true;
  machine.banks.clear();
  run_all();
  int64_t ideal = 0, wavefronts = 0;
  for (const auto& [where, count] : machine.banks)
    ideal += count.ideal, wavefronts += count.wavefronts;
  if (wavefronts > ideal * 1.1) {
    printf("banks: wrong %lld wavefronts, ideal %lld\n", static_cast<long long>(wavefronts),
           static_cast<long long>(ideal));
  } else {
    printf("banks: ok\n");
  }
}

// "ok", or what is wrong in this mode.
std::string verdict(const NamedMode& m) {
  for (int seed = 0; seed < (m.random ? 4 : 1); ++seed) {
    machine.mode = {};
    machine.mode.random = m.random, machine.mode.poison = m.poison, machine.mode.race = m.race;
    machine.mode.seed = uint64_t(seed);
    machine.mode.repairs = false;  // they would hide a NaN that a planted bug lets in
    try {
      const double error = run_all();
      if (!(error < 0.05)) return "wrong by " + std::to_string(error);
    } catch (const attn::emulation::Error& e) {
      std::string raised = std::string("raised ") + e.what();
      std::replace(raised.begin(), raised.end(), '\n', ' ');
      return raised;
    }
  }
  return "ok";
}

}  // namespace

int main(int argc, char** argv) {
  const auto asked = [&](const char* name) {
    for (int i = 1; i < argc; ++i)
      if (!strcmp(argv[i], name)) return true;
    return argc == 1;
  };
  for (const NamedMode& m : MODES)
    if (asked(m.name)) printf("%s: %s\n", m.name, verdict(m).c_str());
  if (!asked("banks")) return 0;
  try {
    report_banks();
  } catch (const attn::emulation::Error&) {
    printf("banks: raised\n");
  }
}
