// Memory of the device that the golden programs run on: a GPU's by nvcc, the host's on the
// emulator.
#pragma once
#include <cstdlib>
#include <cstring>

#include "device_launch.cuh"

#ifdef ATTN_EMULATED
static void* device_alloc(size_t bytes) { return aligned_alloc(128, (bytes + 127) / 128 * 128); }
static void to_device(void* to, const void* from, size_t n) { memcpy(to, from, n); }
static void to_host(void* to, const void* from, size_t n) { memcpy(to, from, n); }
#else
static void* device_alloc(size_t bytes) {
  void* p = nullptr;
  attn::ptx::check(cudaMalloc(&p, bytes), "cudaMalloc");
  return p;
}
static void to_device(void* to, const void* from, size_t n) {
  attn::ptx::check(cudaMemcpy(to, from, n, cudaMemcpyHostToDevice), "copy to the device");
}
static void to_host(void* to, const void* from, size_t n) {
  attn::ptx::check(cudaMemcpy(to, from, n, cudaMemcpyDeviceToHost), "copy from the device");
}
#endif
