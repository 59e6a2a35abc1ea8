// The kernels for AVX-512: 32 registers hold 6 x 4 accumulators, 4 operands, 1 broadcast.
#define ATTN_ISA avx512
#define ATTN_VEC_BYTES 64
#define ATTN_NV 4
#define ATTN_MR 6
#include "cpu/isa/region.h"

#if defined(__x86_64__)
#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_FEATURES)
#include "cpu/isa/kernels.h"
#pragma GCC pop_options
#endif
