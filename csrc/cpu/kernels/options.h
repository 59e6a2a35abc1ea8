// What a call asks for beyond Problem and Pointers.
#pragma once
#include <cstdint>

namespace attn::cpu {

// Other weights than softmax, other scores than dot products.
struct Options {
  bool sigmoid = false;     // P = sigmoid(s + sigmoid_bias) instead of softmax; no LSE
  bool length_bias = true;  // sigmoid_bias is -ln(seqlen_k) of each sequence
  double sigmoid_bias = 0;
  // Additive attention where not null: s_ij = sum_d w[h][d] tanh(q_id + k_jd).  [Hq, D], contiguous
  const void* w = nullptr;
  void* dw = nullptr;  // [Hq, D], contiguous

  bool plain() const { return !sigmoid && !w; }
};

// Beyond this |LSE| half of float32's last bit is 1.5e-5 of a weight exp(S - LSE).
constexpr double kFarLse = 256;

// A map of the weights, which attn_ext.inspect asks of inspect.h.
struct Map {
  enum What { kRowStats, kTopK, kColumnMass, kPooledMap };
  What what = kRowStats;
  int64_t n = 0;               // kTopK: keys a query
  int64_t rows = 0, cols = 0;  // kPooledMap: its size, at most Sq x Sk
  void* out = nullptr;         // kRowStats: the largest logit, [B, Hq, Sq]; kTopK: weights,
                               // [B, Hq, Sq, n]; kColumnMass [B, Hq, Sk]; kPooledMap, 0 before
  void* entropy = nullptr;     // kRowStats: [B, Hq, Sq]
  int64_t* keys = nullptr;     // kTopK: [B, Hq, Sq, n], -1 where there is none
};

}  // namespace attn::cpu
