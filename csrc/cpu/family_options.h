// What the kernels beyond softmax over dot products take in addition to Problem and Pointers.
#pragma once
#include <cstdint>

namespace attn::cpu {

struct FamilyOptions {
  bool sigmoid = false;     // P = sigmoid(s + sigmoid_bias) instead of softmax; no LSE
  bool length_bias = true;  // sigmoid_bias is -ln(seqlen_k) of each sequence
  double sigmoid_bias = 0;
  // Additive attention where not null: s_ij = sum_d w[h][d] tanh(q_id + k_jd).  [Hq, D], contiguous
  const void* w = nullptr;
  void* dw = nullptr;  // [Hq, D], contiguous
};

}  // namespace attn::cpu
