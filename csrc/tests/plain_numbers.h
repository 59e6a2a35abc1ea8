// Numbers for the programs that compare kernels with a formula: alike on every machine, without
// order, and not far from 1.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace attn {

inline double number(int64_t i) {
  return std::sin(double(i * 37 % 1009) + 0.3 * double(i % 7)) * 1.5;
}

inline void fill(std::vector<float>* x, int64_t n, int64_t seed) {
  for (int64_t i = 0; i < n; ++i) x->push_back(float(number(i + seed)));
}

}  // namespace attn
