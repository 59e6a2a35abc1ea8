// What this machine can reach at most, measured: the yardstick of bench/ and `attn-ext bench`.
#pragma once
#include <string>

namespace attn::cpu {

// name: "fma"   float32 multiply-adds from registers, GFLOP/s (2 a multiply-add)
//       "bf16"  dot products of bfloat16 pairs into float32, GFLOP/s; 0 where there are none
//       "exp"   exp2 by a polynomial of degree 5, from and to L1, 10^9 a second
//       "read"  reading from DRAM, GB/s
// isa: as in dispatch.h, "" = the one in use.  All of `threads` threads run for `seconds`, and the
// best of five windows counts.  Throws std::invalid_argument for a wrong argument.
double ceiling(const std::string& name, const std::string& isa, int threads, double seconds);

}  // namespace attn::cpu
