// Kernels and pool under ThreadSanitizer, without Python: concurrent callers, one shared head (the
// ticket pipeline of the backward), fork.  Prints "ok" or says what differs; exit code 1 on a
// failure.
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/isa/dispatch.h"
#include "cpu/parallel.h"

using attn::Pointers;
using attn::Problem;

namespace {

constexpr int64_t kHeads = 2, kSeqlen = 700, kDim = 16;

struct Result {
  std::vector<float> o, lse, dq, dk, dv;
};

Result run(int threads) {
  const int64_t n = kHeads * kSeqlen * kDim;
  std::vector<float> q(n), k(n), v(n), dout(n);
  uint32_t state = 1;
  for (auto* x : {&q, &k, &v, &dout})
    for (float& value : *x)
      value = float((state = state * 1664525u + 1013904223u) >> 8) / (1 << 24) - 0.5f;
  Result r{std::vector<float>(n), std::vector<float>(kHeads * kSeqlen), std::vector<float>(n),
           std::vector<float>(n), std::vector<float>(n)};
  Problem p;
  p.batch = 1, p.heads_q = p.heads_k = kHeads, p.seqlen_q = p.seqlen_k = kSeqlen;
  p.head_dim = p.head_dim_v = kDim, p.scale = 0.25, p.window_right = 0;
  p.q = p.k = p.v = p.o = p.dout = p.dq = p.dk = p.dv = {n, kSeqlen * kDim, kDim};
  p.lse_stride_b = kHeads * kSeqlen, p.lse_stride_h = kSeqlen;
  Pointers ptr;
  ptr.q = q.data(), ptr.k = k.data(), ptr.v = v.data(), ptr.o = r.o.data(), ptr.lse = r.lse.data();
  attn::cpu::forward(p, ptr, threads);
  ptr.dout = dout.data(), ptr.dq = r.dq.data(), ptr.dk = r.dk.data(), ptr.dv = r.dv.data();
  attn::cpu::backward(p, ptr, threads);
  return r;
}

bool same(const Result& a, const Result& b) {
  return a.o == b.o && a.lse == b.lse && a.dq == b.dq && a.dk == b.dk && a.dv == b.dv;
}

}  // namespace

int main() {
  const Result expected = run(1);
  for (int threads : {2, 3, 5})
    if (!same(run(threads), expected)) return std::printf("%d threads differ from 1\n", threads), 1;

  std::vector<std::thread> callers;
  std::vector<int> right(4);
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&, i] {
      for (int repeat = 0; repeat < 3; ++repeat) right[i] += same(run(3), expected);
    });
  for (auto& caller : callers) caller.join();
  for (int count : right)
    if (count != 3) return std::printf("concurrent callers differ\n"), 1;

  bool thrown = false;
  try {
    attn::cpu::parallel_for(64, 3, [](int64_t task) {
      if (task == 7) throw 7;
    });
  } catch (int) {
    thrown = true;
  }
  if (!thrown) return std::printf("an exception of a task was lost\n"), 1;

  const pid_t child = fork();
  if (child == 0) _exit(same(run(3), expected) ? 0 : 1);
  int status = 0;
  if (waitpid(child, &status, 0) != child || status != 0) return std::printf("child differs\n"), 1;
  std::printf("ok\n");
  return 0;
}
