// Between mutant.cpp, which is compiled once, and mutant_kernels.cpp, which is compiled for each
// planted bug: what the second holds of the kernels, and how they are run.
#pragma once
#include "../../cuda/traits.cuh"

namespace attn::planted {

// 0: the example; 1 and 2: forward and backward of sm_80; of sm_90, 3: forward, 4: backward with dQ
// by itself, 5: the same with heads of 192, 6: all of backward in one kernel; 7: the forward of
// sm_80 for plain calls; 8: all of their backward in one kernel.
extern const int PART, HEAD_DIM;

// C = A B^T.  A [m, k], B [n, k], C [m, n]
void run_example(const ptx::bf16* A, const ptx::bf16* B, float* C, int m, int n, int k);

// What the kernels of this part compute of p.  Backward: LSE and delta are filled.
void run_kernels(cuda::Params p);

}  // namespace attn::planted
