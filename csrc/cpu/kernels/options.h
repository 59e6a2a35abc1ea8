// What a call asks for beyond Problem and Pointers.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "params.h"

namespace attn::cpu {

// Rows of K and V that are not kept in the call's dtype, which is float32 then: a cache of int8
// with a factor a row and head, by which the row is what it stands for.
struct Kept {
  bool rows = false;                       // whether they are
  const float *k = nullptr, *v = nullptr;  // the factors, laid out as Strides say
  Strides k_at, v_at;
};

// A kernel for few queries alone reads such rows; what it lacks is the caller's to do another way.
struct NotServed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Other weights than softmax, other scores than dot products, other rows than the call's dtype.
struct Options {
  bool sigmoid = false;     // P = sigmoid(s + sigmoid_bias) instead of softmax; no LSE
  bool length_bias = true;  // sigmoid_bias is -ln of each whole sequence's keys
  double sigmoid_bias = 0;
  // Additive attention where not null: s_ij = sum_d w[h][d] tanh(q_id + k_jd).  [Hq, D], contiguous
  const void* w = nullptr;
  void* dw = nullptr;  // [Hq, D], contiguous
  // Whose kernels serve the call where no ISA is forced: an index of isa_index(); -1 the best one.
  int isa = -1;
  // A part of the keys that the rows see: O and the gradients are in the statistics' dtype. Forward
  // gives a base near the largest logit in place of that, and rest = LSE - base in place of LSE, in
  // which rest is lost far from 0.  In backward the rows' sums are of the whole: it takes LSE, base
  // + rest, and delta = rowsum(dO * O) - dLSE as they are.
  bool partial = false;
  const void *delta = nullptr, *base = nullptr, *rest = nullptr;  // as LSE
  Kept kept;

  bool plain() const { return !sigmoid && !w; }
  // The dtype of O and the gradients.
  DType written(const Problem& p) const {
    return partial && p.dtype != DType::kFloat64 ? DType::kFloat32 : p.dtype;
  }
};

// Beyond this |LSE| half of float32's last bit is 1.5e-5 of a weight exp(S - LSE).
constexpr double kFarLse = 256;

// A map of the weights, which attn_ext.inspect asks of inspect.h.
struct Map {
  enum What { kRowStats, kTopK, kColumnMass, kPooledMap, kMeanTopK };
  What what = kRowStats;
  int64_t n = 0;               // kTopK, kMeanTopK: keys a query
  int64_t rows = 0, cols = 0;  // kPooledMap: its size, at most Sq x Sk
  void* out = nullptr;         // kRowStats: the largest logit, [B, Hq, Sq]; kTopK: weights,
                               // [B, Hq, Sq, n]; kColumnMass [B, Hq, Sk]; kPooledMap, 0 before;
                               // kMeanTopK: weights, [B, Sq, n]
  void* entropy = nullptr;     // kRowStats: [B, Hq, Sq]; kMeanTopK: sums of rows, alike
  int64_t* keys = nullptr;     // kTopK: [B, Hq, Sq, n], -1 where there is none; kMeanTopK: three
                               // arrays, `MeanKeys` of inspect.h
};

}  // namespace attn::cpu
