// The kernels for bfloat16 on AVX-512 with vdpbf16ps, two products and two sums a lane, and those
// on the tile unit of Intel AMX (`forward_tiles`, `backward_tiles`): what is no product is the same
// AVX-512 code.  Instructions of the unit are assembler of simd/amx_unit.h, so that the target is
// that of vdpbf16ps.
#define ATTN_ISA avx512_bf16
#define ATTN_BF16_DOT
#define ATTN_VEC_BYTES 64
#define ATTN_NV 4
#define ATTN_MR 6
#include "cpu/isa/amx.h"
#include "cpu/isa/region.h"
#if defined(ATTN_HAS_AMX)
#define ATTN_AMX
#endif

#if defined(__x86_64__)
#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_BF16_FEATURES)
#include "cpu/isa/kernels.h"
#pragma GCC pop_options
#endif
