// What a call has beside Q, K, V, their lengths and a band, as bits: kernels are compiled for those
// of a call, so that what it lacks is no instruction.  Flags only, never shapes, so that a model
// meets few of them.  Plain C++: the host's compiler reads it as well as NVRTC.
//
// A kernel that is compiled for kAny asks at run time (Params::features).  It is what compilers
// ahead of time make, and what serves where a kernel for the call's own bits is not there.
#pragma once
#include <cstdint>

#include "../params.h"

namespace attn::cuda {

enum Feature : int {
  kMask = 1 << 0,
  kMaskVectors = 1 << 1,  // 4 keys of a row of the mask are one aligned word
  kBias = 1 << 2,
  kBiasVectors = 1 << 3,  // 4 keys of a row of the bias are one aligned load
  kBiasFloat = 1 << 4,    // float32 beside Q, K and V in 16 bits
  kAlibi = 1 << 5,
  kSoftcap = 1 << 6,
  kSink = 1 << 7,
  kDropout = 1 << 8,
  kStats = 1 << 9,   // largest logit and entropy of each row
  kScale = 1 << 10,  // a scale that is not above 0, so that no mask may come before it
  kPaged = 1 << 11,  // keys and values lie in pages
  kCast = 1 << 12,   // a bias in the other one of bfloat16 and float16
  kFrame = 1 << 13,  // its sequences are parts of longer ones, whose positions count (Frame)
  kPart = 1 << 14,   // O, dQ, dK and dV in float32, of inputs in 16 bits: to be added to others
  // Of a backward in one kernel on Hopper: dQ is added up in one order (sm90/backward_fused.cuh).
  kOrdered = 1 << 15,
  // Of a backward in one kernel: it adds dS to the gradient of the bias (bias_gradient_of).
  kBiasGradient = 1 << 16,
  kAny = 1 << 20,
};

// For people: what `attn-ext compile` lists.
struct FeatureName {
  Feature bit;
  const char* name;
};
constexpr FeatureName kFeatureNames[] = {
    {kMask, "mask"},
    {kMaskVectors, "mask_vectors"},
    {kBias, "bias"},
    {kBiasVectors, "bias_vectors"},
    {kBiasFloat, "bias_f32"},
    {kAlibi, "alibi"},
    {kSoftcap, "softcap"},
    {kSink, "sink"},
    {kDropout, "dropout"},
    {kStats, "stats"},
    {kScale, "scale"},
    {kPaged, "paged"},
    {kCast, "bias_cast"},
    {kFrame, "frame"},
    {kPart, "part"},
    {kOrdered, "ordered"},
    {kBiasGradient, "bias_gradient"},
    {kAny, "any"},
};

// Whether 4 keys from a multiple of 4 on can be read at once, `bytes` each.
inline bool rows_come_in_fours(const void* base, const ScoreStrides& s, int bytes) {
  const bool aligned = reinterpret_cast<uintptr_t>(base) % uintptr_t(4 * bytes) == 0;
  return aligned && s.k == 1 && s.b % 4 == 0 && s.h % 4 == 0 && s.q % 4 == 0;
}

// Those of a call.
inline int features_of(const Problem& p, const Pointers& ptr) {
  int bits = 0;
  if (ptr.mask) bits |= kMask;
  if (ptr.mask && rows_come_in_fours(ptr.mask, p.mask, 1)) bits |= kMaskVectors;
  if (ptr.bias) {
    const bool wide = p.bias_dtype == DType::kFloat32;
    bits |= kBias;
    if (rows_come_in_fours(ptr.bias, p.bias, wide ? 4 : 2)) bits |= kBiasVectors;
    if (p.bias_dtype != p.dtype) bits |= wide ? kBiasFloat : kCast;
  }
  if (ptr.alibi_slopes) bits |= kAlibi;
  if (p.softcap > 0) bits |= kSoftcap;
  if (ptr.sink) bits |= kSink;
  if (p.dropout_p > 0) bits |= kDropout;
  if (ptr.entropy) bits |= kStats;
  if (!(float(p.scale * 1.4426950408889634) > 0.0f)) bits |= kScale;
  if (ptr.block_table) bits |= kPaged;
  if (ptr.frame) bits |= kFrame;
  if (p.part && p.dtype != DType::kFloat32) bits |= kPart;
  return bits;
}

// kBiasGradient where a backward in one kernel adds up the gradient of the bias as it computes dS:
// one addition a pair, where the queries and keys of a tile do not share an element, and of a
// deterministic call where no heads or batches do.  dS lies there behind the slope of a soft cap.
inline int bias_gradient_of(const Problem& p, const Pointers& ptr) {
  const ScoreStrides& s = p.dbias;
  if (!ptr.dbias || p.softcap > 0 || s.q == 0 || s.k != 1) return 0;
  const bool shared = (s.b == 0 && p.batch > 1) || (s.h == 0 && p.heads_q > 1);
  return shared && p.deterministic ? 0 : kBiasGradient;
}

}  // namespace attn::cuda
