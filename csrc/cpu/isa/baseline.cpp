// The kernels on 128-bit vectors, which every x86-64 and aarch64 has: SSE2 or NEON, nothing else
// assumed.
#define ATTN_ISA baseline
#define ATTN_VEC_BYTES 16
#define ATTN_NV 2
#define ATTN_MR 4
#include "cpu/isa/region.h"
#include "cpu/isa/kernels.h"
