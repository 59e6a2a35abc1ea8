// The sizes of the tiles of every CPU kernel, with the reason of each; no other file has one.  What
// depends on the instruction set, the vectors and rows of a block of products whose sums are in
// registers, each isa/*.cpp says itself (ATTN_NV, ATTN_MR of isa/region.h).
#pragma once
#include <cstdint>

namespace attn::cpu {

// Queries of one head go through the kernels in panels: 64 lanes are four registers of 64 bytes,
// the columns of one block of gemm.h with AVX-512.  Bands of causal and window attention are cut by
// grain, the lanes of one such register.
constexpr int64_t kPanel = 64, kGrain = 16, kGrains = kPanel / kGrain;

// Forward: a tile of scores is kForwardKeys x kPanel, 48 KiB of float, which leaves most of L2 to K
// and V.  A multiple of 4, the keys that share a word of dropout.
constexpr int64_t kForwardKeys = 192;
// Most panels that share the packing of K and V.  Fewer where there would be too few tasks.
constexpr int64_t kPanels = 4;

// Backward: keys of a task, the largest of these that gives at least kBackwardTasks tasks.  Large
// blocks read and add to dQ less often, as long as their rows of K, V, dK and dV stay in L2, for
// which 384 are too many beyond a head dimension of kNarrowHead.  Multiples of 32, the keys of a
// word of MaskBits.
constexpr int64_t kBackwardKeys[] = {384, 256, 192}, kNarrowHead = 64, kBackwardTasks = 32;

// Second derivatives: keys of a task.  Its rows of K, V, K', V', dK', dV' and four tiles of scores
// stay in L2.  Calls of up to kSecondWhole keys have one task a head: it holds all keys of its rows
// and needs neither O' and L', which are a pass of their own, nor sums that tasks share.  Multiples
// of 32.
constexpr int64_t kSecondKeys = 128, kSecondWhole = 256;

// Decode: keys of a chunk, whose weights stay in L1 while V is read, in equal parts from streams
// that a processor fetches ahead for (kernels/decode.h).
constexpr int64_t kDecodeKeys = 64, kDecodeStreams = 4;
// With registers of 64 bytes, rows of up to so many bytes that lie one after the other are read as
// two streams, four rows abreast where they are short, else two: 1.1 to 1.3 times as fast (EPYC,
// Zen 5).
constexpr int64_t kDecodeTwoStreams = 512, kDecodeFourRows = 256;
// At most so many queries * heads of a group: their state stays in L2.
constexpr int64_t kDecodeRows = 256;
// At most so many queries: from there on the products of panels are faster, though up to 15 of 16
// lanes are padding; where they multiply pairs of bfloat16, from fewer on.  Queries that cannot be
// worked on together, since each has a bias of its own, are served up to the last number.
constexpr int64_t kDecodeQueries = 16, kDecodePairQueries = 8, kDecodeSingleQueries = 4;
// At most so many queries * heads of a group where heads may share panels, which are faster then
// (kernels/forward.h): where K and V have at most kDecodeCached bytes, which a third-level cache
// may hold, and where they have more, since this kernel reads memory faster.  Wide: vectors of 64
// bytes; pairs: of bfloat16, multiplied as such.  Measured on EPYC, Zen 3 and Zen 5.
struct BeforePanels {
  int64_t cached, more;
};
constexpr BeforePanels kBeforePanels{31, 31}, kBeforeWidePanels{15, 27}, kBeforePairPanels{11, 23};
constexpr int64_t kDecodeCached = 16 << 20;

}  // namespace attn::cpu
