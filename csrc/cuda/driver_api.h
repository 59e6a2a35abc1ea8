// The functions of libcuda that driver.cpp calls, with their types, so that no header of CUDA is
// needed to compile it.  tests/cuda/test_driver.py compares the numbers with NVIDIA's cuda.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ptx_types.h"

namespace attn::cuda::driver {

using Result = int;             // CUresult
using Handle = struct Opaque*;  // CUcontext, CUmodule, CUfunction, CUstream
using DeviceId = int;           // CUdevice

enum : int {
  SUCCESS = 0,
  ERROR_NO_DEVICE = 100,
  ERROR_STREAM_CAPTURE_IMPLICIT = 906,
  ATTRIBUTE_MULTIPROCESSOR_COUNT = 16,
  ATTRIBUTE_L2_CACHE_SIZE = 38,
  ATTRIBUTE_CAPABILITY_MAJOR = 75,
  ATTRIBUTE_CAPABILITY_MINOR = 76,
  ATTRIBUTE_SHARED_MEMORY_OPTIN = 97,
  FUNCTION_DYNAMIC_SHARED_MEMORY = 8,
  CAPTURE_MODE_RELAXED = 2,
  TENSOR_FLOAT16 = 6,
  TENSOR_BFLOAT16 = 9,
  TENSOR_SWIZZLE_128B = 3,
  TENSOR_PROMOTION_256B = 3,
};

// X(field, symbol, arguments).  What CUDA 11 does not have yet is in ATTN_DRIVER_LATER, and null
// where it is missing.
#define ATTN_DRIVER(X)                                                                          \
  X(init, "cuInit", (unsigned flags))                                                           \
  X(driver_version, "cuDriverGetVersion", (int* version))                                       \
  X(error_name, "cuGetErrorName", (Result error, const char** text))                            \
  X(error_string, "cuGetErrorString", (Result error, const char** text))                        \
  X(device_count, "cuDeviceGetCount", (int* count))                                             \
  X(device_get, "cuDeviceGet", (DeviceId * device, int index))                                  \
  X(device_attribute, "cuDeviceGetAttribute", (int* value, int attribute, DeviceId device))     \
  X(retain_context, "cuDevicePrimaryCtxRetain", (Handle * context, DeviceId device))            \
  X(current_context, "cuCtxGetCurrent", (Handle * context))                                     \
  X(push_context, "cuCtxPushCurrent_v2", (Handle context))                                      \
  X(pop_context, "cuCtxPopCurrent_v2", (Handle * context))                                      \
  X(is_capturing, "cuStreamIsCapturing", (Handle stream, int* status))                          \
  X(exchange_capture_mode, "cuThreadExchangeStreamCaptureMode", (int* mode))                    \
  X(load_module, "cuModuleLoadData", (Handle * module, const void* image))                      \
  X(get_function, "cuModuleGetFunction", (Handle * function, Handle module, const char* name))  \
  X(set_attribute, "cuFuncSetAttribute", (Handle function, int attribute, int value))           \
  X(set_words, "cuMemsetD32Async", (uintptr_t to, unsigned value, size_t count, Handle stream)) \
  X(launch_kernel, "cuLaunchKernel",                                                            \
    (Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,      \
     unsigned block_y, unsigned block_z, unsigned smem_bytes, Handle stream, void** params,     \
     void** extra))
#define ATTN_DRIVER_LATER(X)                                                             \
  X(encode_tensor, "cuTensorMapEncodeTiled",                                             \
    (ptx::TensorMap * map, int type, uint32_t rank, void* base, const uint64_t* size,    \
     const uint64_t* stride, const uint32_t* box, const uint32_t* steps, int interleave, \
     int swizzle, int promotion, int fill))

struct Api {
#define ATTN_FIELD(field, symbol, arguments) Result(*field) arguments = nullptr;
  ATTN_DRIVER(ATTN_FIELD)
  ATTN_DRIVER_LATER(ATTN_FIELD)
#undef ATTN_FIELD
};

}  // namespace attn::cuda::driver
