// What the text of an ISA is compiled for.  Each isa/*.cpp defines, before it includes anything,
//   ATTN_ISA        the namespace of its kernels
//   ATTN_VEC_BYTES  the width of a register
//   ATTN_NV         vectors of queries in a block of products (simd/gemm.h)
//   ATTN_MR         rows of that block: ATTN_MR * ATTN_NV accumulators + ATTN_NV operands +
//                   1 broadcast must fit the registers
//   ATTN_BF16_DOT   where vdpbf16ps multiplies bfloat16;  ATTN_AMX  where the tile unit does, too
// A header of kernels that is read alone, as an editor or a test does, is that of the baseline.
//
// All that the kernels need from outside is included here, before a target region opens: no library
// function may be compiled for an ISA that the machine may lack.  So no header of kernels includes
// anything but headers of csrc/cpu.
#pragma once
#ifndef ATTN_ISA
#define ATTN_ISA baseline
#define ATTN_VEC_BYTES 16
#define ATTN_NV 2
#define ATTN_MR 4
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

#if defined(__x86_64__) && ATTN_VEC_BYTES > 16  // the baseline has no intrinsics
// g++ 12 warns of the operand that its own header leaves undefined on purpose.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/isa/features.h"
#include "cpu/kernels/options.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/amx_unit.h"
#include "cpu/simd/convert.h"
#include "cpu/tile/sequence.h"
#include "cpu/tiles.h"
#include "params.h"
#include "philox.h"
