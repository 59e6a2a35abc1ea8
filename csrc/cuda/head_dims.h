// The head dimensions that CUDA kernels are compiled for; sizes between them are padded inside the
// kernels.  The only list: setup.py, which generates an instantiation for each, and bench/ read it
// from the two lines below.
#pragma once

// X(dim) for each, ascending.  sm90: those of bf16 and fp16 for sm_90a; sm80 has one of its own for
// 32.
#define ATTN_SM80_HEAD_DIMS(X) X(32) X(64) X(96) X(128) X(192) X(256)
#define ATTN_SM90_HEAD_DIMS(X) X(64) X(96) X(128) X(192) X(256)

namespace attn::cuda {

#define ATTN_ELEMENT(dim) dim,
inline constexpr int kSm80HeadDims[] = {ATTN_SM80_HEAD_DIMS(ATTN_ELEMENT)};
inline constexpr int kSm90HeadDims[] = {ATTN_SM90_HEAD_DIMS(ATTN_ELEMENT)};
#undef ATTN_ELEMENT

}  // namespace attn::cuda
