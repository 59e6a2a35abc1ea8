// Plain structs that every native kernel takes.  No torch, no CUDA API: pointers, shapes, strides,
// flags. Strides are in elements and int64; the last dimension (head_dim, or keys for mask and
// bias) is described below. Dense:  element (b, h, s, d) of Q at  data + b*stride_b + h*stride_h +
// s*stride_s + d. Varlen: stride_b = 0 and position s of sequence b is row cu_seqlens[b] + s. Paged
// K/V: position s of sequence b is row s % page_size of page block_table[b][s / page_size];
// stride_b is the page stride.
#pragma once
#include <cstdint>

namespace attn {

enum class DType : int32_t { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

struct Strides {
  int64_t b = 0, h = 0, s = 0;
};

// Broadcast dimensions have stride 0.  The key dimension may have any stride (0: broadcast over
// keys).
struct ScoreStrides {
  int64_t b = 0, h = 0, q = 0, k = 0;
};

constexpr int64_t kUnbounded = -1;  // a window side without limit

struct Problem {
  DType dtype = DType::kFloat32;       // of Q, K, V, O and their gradients
  DType bias_dtype = DType::kFloat32;  // of bias and dBias
  int64_t batch = 0, heads_q = 0, heads_k = 0;
  int64_t seqlen_q = 0, seqlen_k = 0;  // dense lengths; the largest ones for varlen and decode
  int64_t rows_q = 0, rows_k = 0;      // varlen on CUDA: total_q and total_k; paged: rows_k pages
  int64_t head_dim = 0, head_dim_v = 0;
  Strides q, k, v, o;              // o also describes dense dO after the Python side made it alike
  Strides dout, dq, dk, dv;        // backward only
  ScoreStrides mask, bias, dbias;  // dbias: stride 0 where bias was broadcast (the kernel reduces)
  int64_t lse_stride_b = 0,
          lse_stride_h =
              0;  // LSE and row statistics [B, Hq, Sq] or [Hq, total_q]; stride of s is 1
  int64_t block_table_stride = 0, page_size = 0;
  double scale = 1.0, softcap = 0.0, dropout_p = 0.0;
  // Query i sees key j when  i + offset - window_left <= j <= i + offset + window_right,
  // offset = seqlen_k(b) - seqlen_q(b) when bottom_right, else 0.  causal is window_right = 0.
  int64_t window_left = kUnbounded, window_right = kUnbounded;
  int32_t bottom_right = 1;
  bool deterministic = false;  // backward: the same bits from run to run
  bool part = false;  // on CUDA: O, dQ, dK and dV in float32; in a backward LSE is that of whole
                      // rows, dlse is their delta, and no LSE is far from 0
  int64_t num_splits = 0;  // decode: parts of the keys that are worked on at a time; 0: not said
};

// Where a sequence of a call stands in a longer one, of which it has some queries and some keys.
// Diagonal, window, ALiBi, sigmoid's bias and dropout's counter are those of the longer one; mask
// and bias are of the call's own queries and keys.
struct Frame {
  int32_t first_b, first_h;  // what dropout counts this sequence and the call's first head as
  int32_t q_first, k_first;  // positions of the first query and of the first key
  int32_t whole_q, whole_k;  // lengths of the longer sequence
};

// The numbers of a call that core/schema.py marks KERNEL: Python hands them over by name.
struct Scalar {
  const char* name;
  double Problem::* real;
  int64_t Problem::* whole;  // the other one is null
  constexpr Scalar(const char* n, double Problem::* x) : name(n), real(x), whole(nullptr) {}
  constexpr Scalar(const char* n, int64_t Problem::* x) : name(n), real(nullptr), whole(x) {}
};
constexpr Scalar kScalars[] = {
    {"scale", &Problem::scale},
    {"softcap", &Problem::softcap},
    {"dropout_p", &Problem::dropout_p},
    {"window_left", &Problem::window_left},
    {"window_right", &Problem::window_right},
    {"num_splits", &Problem::num_splits},
};

// Null where absent.  LSE, statistics and sink gradients are float, or double when dtype is
// kFloat64.
struct Pointers {
  const void *q = nullptr, *k = nullptr, *v = nullptr;
  const void* mask = nullptr;          // uint8/bool, 1 = attend
  const void* bias = nullptr;          // bias_dtype
  const void* alibi_slopes = nullptr;  // float [B or 1, Hq], stride alibi_stride_b
  const void* sink = nullptr;          // float [Hq]
  const int64_t* rng_state = nullptr;  // {seed, offset}; needed when dropout_p > 0
  const int32_t *cu_seqlens_q = nullptr, *cu_seqlens_k = nullptr;  // [B + 1]
  const int32_t* seqlens_k = nullptr;    // [B] used lengths of K/V (decode), else null
  const int32_t* block_table = nullptr;  // [B, max_pages]
  int64_t alibi_stride_b = 0;
  void *o = nullptr, *lse = nullptr;  // outputs of forward (lse may be null), inputs of backward
  void *max_logit = nullptr, *entropy = nullptr;
  const void *dout = nullptr, *dlse = nullptr;  // dlse: as LSE, null = zero
  void *dq = nullptr, *dk = nullptr, *dv = nullptr, *dbias = nullptr, *dsink = nullptr;
  const Frame* frame = nullptr;  // [B]; null: the call's sequences are whole
};

}  // namespace attn
