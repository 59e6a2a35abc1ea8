// The kernels for bfloat16 on the tile unit of Intel AMX; what is no product is AVX-512.
#define ATTN_ISA avx512_amx
#define ATTN_AMX
#define ATTN_BF16_DOT
#define ATTN_VEC_BYTES 64
#define ATTN_NV 4
#define ATTN_MR 6
#include "cpu/isa/region.h"
#include "cpu/isa/amx.h"

#if defined(ATTN_HAS_AMX)
#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_AMX_FEATURES)
#include "cpu/isa/kernels.h"
#pragma GCC pop_options
#endif
