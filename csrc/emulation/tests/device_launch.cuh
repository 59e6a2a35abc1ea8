// launch() and make_tensor_map() for programs of tests that nvcc compiles; on the emulator
// ptx_host.h has them.  The product launches by csrc/cuda/driver.cpp.
#pragma once
#include "../../cuda/ptx_types.h"

#ifdef ATTN_EMULATED
#include "../../cuda/ptx_sm90.cuh"
#elif !defined(__CUDACC_RTC__)
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstring>
#include <stdexcept>
#include <string>

namespace attn::ptx {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

// Runs the kernel on `stream` (a cudaStream_t).  Errors of the launch are std::runtime_error; those
// of the kernel itself appear at the next synchronisation, as always in CUDA.
template <class Params>
void launch(void (*kernel)(Params), Grid grid, int threads, int smem_bytes, void* stream,
            Params params) {
  const auto function = reinterpret_cast<const void*>(kernel);
  if (smem_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes),
          "shared memory of the attention kernel");
  }
  void* args[] = {&params};
  check(cudaLaunchKernel(function, dim3(grid.x, grid.y, grid.z), dim3(threads), args, smem_bytes,
                         static_cast<cudaStream_t>(stream)),
        "launch of the attention kernel");
}

// Throws std::invalid_argument by the rule that is broken, std::runtime_error by the driver.
inline TensorMap make_tensor_map(const TensorSpec& t) {
  if (const char* why = tensor_problem(t); *why) throw std::invalid_argument(why);
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
#else  // the same, but the driver must be as new as the toolkit
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &status),
          "cuTensorMapEncodeTiled");
#endif
    if (status != cudaDriverEntryPointSuccess || !found)
      throw std::runtime_error("the driver has no cuTensorMapEncodeTiled: CUDA 12.0 is needed");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  static_assert(sizeof(CUtensorMap) == sizeof(TensorMap));
  cuuint64_t size[4], stride[3];
  cuuint32_t box[4], steps[4] = {1, cuuint32_t(t.row_step), 1, 1};
  for (int i = 0; i < 4; ++i)
    size[i] = cuuint64_t(t.size[i]), box[i] = cuuint32_t(t.box[i]) * steps[i];
  for (int i = 0; i < 3; ++i) stride[i] = cuuint64_t(t.stride[i]);
  alignas(128) CUtensorMap map;
  const CUresult error =
      encode(&map, t.is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
             4, const_cast<void*>(t.base), size, stride, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (error != CUDA_SUCCESS)
    throw std::runtime_error("cuTensorMapEncodeTiled: CUDA driver error " +
                             std::to_string(int(error)));
  TensorMap out;
  memcpy(&out, &map, sizeof(out));
  return out;
}

}  // namespace attn::ptx
#endif
