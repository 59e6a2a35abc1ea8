// What each ISA asks of the processor, said once: ATTN_TARGET compiles a region for a list of
// features, and dispatch.cpp runs it only where cpu_has() finds all of them.  A list names what its
// members imply as well (g++ uses popcnt where it may use avx).
#pragma once
#include <string>

#define ATTN_AVX2_FEATURES "sse3,ssse3,sse4.1,sse4.2,popcnt,avx,avx2,fma,f16c"
#define ATTN_AVX512_FEATURES ATTN_AVX2_FEATURES ",avx512f,avx512bw,avx512dq,avx512vl"
#define ATTN_AVX512_BF16_FEATURES ATTN_AVX512_FEATURES ",avx512bf16"
#define ATTN_AVX512_AMX_FEATURES ATTN_AVX512_BF16_FEATURES ",amx-tile,amx-bf16"

// Between `#pragma GCC push_options` and `pop_options`: code for these features.
#define ATTN_PRAGMA(text) _Pragma(#text)
#define ATTN_TARGET(features) ATTN_PRAGMA(GCC target(features))

namespace attn::cpu {

// True when the processor has each of the features, separated by commas, and the operating system
// saves their registers.  Throws std::invalid_argument for a name that is not in its table.
bool cpu_has(const std::string& features);

}  // namespace attn::cpu
