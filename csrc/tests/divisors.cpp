// Divisor of ../cuda/tiles.h against division, at every quotient's ends: prints a divisor for which
// they differ.  Run by tests/cuda/test_cuda_decode.py.
#include <cstdio>
#include <initializer_list>

#include "../cuda/tiles.h"

namespace {

using attn::cuda::Divisor;
constexpr int kLargest = 2147483647;

bool wrong(int by) {
  const Divisor divisor = Divisor::of(by);
  const auto differs = [&](int64_t x) {
    return x >= 0 && x <= kLargest && divisor.quotient(int(x)) != int(x) / by;
  };
  // every quotient where they are few; else those of the first and the last numbers
  const int64_t last = kLargest / by;
  for (int64_t q = 0; q <= last; ++q) {
    if (q == 300 && last > 1000) q = last - 300;
    for (int64_t x : {q * by - 1, q * by, q * by + 1})
      if (differs(x)) return true;
  }
  return differs(kLargest);
}

}  // namespace

int main() {
  for (int by = 1; by <= 5000; ++by)
    if (wrong(by)) std::printf("%d\n", by);
  for (int power = 12; power <= 30; ++power)
    for (int more = -2; more <= 2; ++more) {
      const int by = int((int64_t(1) << power) + more);
      if (by <= (1 << 30) && wrong(by)) std::printf("%d\n", by);
    }
  return Divisor::of(0).by;
}
