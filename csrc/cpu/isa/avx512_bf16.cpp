// The kernels for bfloat16 on AVX-512 with vdpbf16ps: two products and two sums a lane.
#define ATTN_ISA avx512_bf16
#define ATTN_BF16_DOT
#define ATTN_VEC_BYTES 64
#define ATTN_NV 4
#define ATTN_MR 6
#include "cpu/isa/region.h"

#if defined(__x86_64__)
#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_BF16_FEATURES)
#include "cpu/isa/kernels.h"
#pragma GCC pop_options
#endif
