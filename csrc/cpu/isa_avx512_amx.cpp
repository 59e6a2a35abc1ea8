// The kernels for bfloat16 on the tile unit of Intel AMX; what is no product is AVX-512.
#include "cpu/amx.h"
#include "cpu/prelude.h"

#ifdef ATTN_HAS_AMX
namespace attn::cpu::avx512_bf16 {
void forward(const Problem& p, const Pointers& ptr, int threads);
}

#pragma GCC push_options
ATTN_TARGET(ATTN_AVX512_AMX_FEATURES)
#define ATTN_ISA avx512_amx
#define ATTN_AMX
#define ATTN_BF16_DOT
#define ATTN_VEC_BYTES 64
#define ATTN_NV 4
#define ATTN_MR 6
#include "cpu/isa.h"
#pragma GCC pop_options
#endif
