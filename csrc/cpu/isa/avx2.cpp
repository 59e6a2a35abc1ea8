// The kernels for AVX2 + FMA: 16 registers hold 6 x 2 accumulators, 2 operands, 1 broadcast.
#define ATTN_ISA avx2
#define ATTN_VEC_BYTES 32
#define ATTN_NV 2
#define ATTN_MR 6
#include "cpu/isa/region.h"

#if defined(__x86_64__)
#pragma GCC push_options
ATTN_TARGET(ATTN_AVX2_FEATURES)
#include "cpu/isa/kernels.h"
#pragma GCC pop_options
#endif
