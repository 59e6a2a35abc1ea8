// The host side of ../cuda/ptx.cuh: the same names, computed on the emulated device of machine.h.
// Included by ptx.cuh only.  Each wrapper takes its caller's source line, for error reports.
#pragma once
#include <cmath>
#include <cstring>

#define ATTN_DEVICE inline
#define ATTN_KERNEL(...) inline
#define ATTN_GRID_CONSTANT

#include "machine.h"
#include "numbers.h"

// Evaluated where the wrapper is called.
#define ATTN_AT ::attn::emulation::Where at = {__builtin_FILE(), __builtin_LINE()}

ATTN_EXPORTED_BEGIN
namespace attn::ptx {
using emulation::Access;
using emulation::Kind;
using emulation::machine;

// ---- who am I --------------------------------------------------------------------------------
inline int thread_id() { return machine.thread(); }
inline int block_size() { return machine.threads; }
inline int lane_id() { return machine.thread() & 31; }
inline bool repairs() { return machine.mode.repairs; }
inline int warp_id() { return machine.thread() >> 5; }
inline Grid block_id() { return machine.block; }
inline Grid grid_size() { return machine.grid; }
inline uint32_t smem_base() { return emulation::SMEM_BASE; }

// ---- rendezvous ------------------------------------------------------------------------------
inline void sync_threads(ATTN_AT) { machine.barrier(0, 0, true, at); }
inline void sync_warp(ATTN_AT) { machine.sync_warp(at); }
template <int ID>
void named_barrier_sync(int threads, ATTN_AT) {
  static_assert(ID > 0 && ID < emulation::BARRIERS, "named barriers are 1..15");
  machine.barrier(ID, threads, true, at);
}
template <int ID>
void named_barrier_arrive(int threads, ATTN_AT) {
  static_assert(ID > 0 && ID < emulation::BARRIERS, "named barriers are 1..15");
  machine.barrier(ID, threads, false, at);
}
void named_barrier_sync(int id, int threads, ATTN_AT);  // fails where id is not 1..15
void named_barrier_arrive(int id, int threads, ATTN_AT);

uint32_t shfl_xor(uint32_t value, int mask, ATTN_AT);
uint32_t shfl(uint32_t value, int lane, ATTN_AT);
uint32_t ballot(bool flag, ATTN_AT);
inline float as_float(uint32_t v) { return emulation::as_float(v); }
inline uint32_t as_uint(float v) { return emulation::as_uint(v); }
inline int shfl_xor(int value, int mask, ATTN_AT) {
  return int(shfl_xor(uint32_t(value), mask, at));
}
inline float shfl_xor(float value, int mask, ATTN_AT) {
  return as_float(shfl_xor(as_uint(value), mask, at));
}
inline int shfl(int value, int lane, ATTN_AT) { return int(shfl(uint32_t(value), lane, at)); }
inline float shfl(float value, int lane, ATTN_AT) {
  return as_float(shfl(as_uint(value), lane, at));
}

// ---- asynchronous copies, global -> shared ----------------------------------------------------
inline void cp_async_16(uint32_t smem, const void* gmem, bool valid = true, ATTN_AT) {
  machine.copy_issue(smem, gmem, 16, valid, at);
}
inline void cp_async_4(uint32_t smem, const void* gmem, bool valid = true, ATTN_AT) {
  machine.copy_issue(smem, gmem, 4, valid, at);
}
inline void cp_async_commit(ATTN_AT) { machine.copy_commit(at); }
template <int N>
void cp_async_wait(ATTN_AT) {
  machine.copy_wait(N, at);
}

// ---- shared memory ----------------------------------------------------------------------------
template <class T>
T load_shared(uint32_t addr, emulation::Where at) {
  T v;
  std::memcpy(&v, machine.access(Access::READ, addr, sizeof(T), at), sizeof(T));
  return v;
}
template <class T>
void store_shared(uint32_t addr, T v, emulation::Where at) {
  std::memcpy(machine.access(Access::WRITE, addr, sizeof(T), at), &v, sizeof(T));
}
inline uint8_t lds_8(uint32_t addr, ATTN_AT) { return load_shared<uint8_t>(addr, at); }
inline uint16_t lds_16(uint32_t addr, ATTN_AT) { return load_shared<uint16_t>(addr, at); }
inline uint32_t lds_32(uint32_t addr, ATTN_AT) { return load_shared<uint32_t>(addr, at); }
inline float lds_f32(uint32_t addr, ATTN_AT) { return load_shared<float>(addr, at); }
inline U32x2 lds_64(uint32_t addr, ATTN_AT) { return load_shared<U32x2>(addr, at); }
inline U32x4 lds_128(uint32_t addr, ATTN_AT) { return load_shared<U32x4>(addr, at); }
inline void sts_8(uint32_t addr, uint8_t v, ATTN_AT) { store_shared(addr, v, at); }
inline void sts_16(uint32_t addr, uint16_t v, ATTN_AT) { store_shared(addr, v, at); }
inline void sts_32(uint32_t addr, uint32_t v, ATTN_AT) { store_shared(addr, v, at); }
inline void sts_f32(uint32_t addr, float v, ATTN_AT) { store_shared(addr, v, at); }
inline void sts_64(uint32_t addr, U32x2 v, ATTN_AT) { store_shared(addr, v, at); }
inline void sts_128(uint32_t addr, U32x4 v, ATTN_AT) { store_shared(addr, v, at); }
inline void atomic_add_shared_f32(uint32_t addr, float v, ATTN_AT) {
  uint8_t* p = machine.access(Access::ATOMIC, addr, 4, at);
  float sum;
  std::memcpy(&sum, p, 4);
  sum += v;
  std::memcpy(p, &sum, 4);
}

// ---- matrices ---------------------------------------------------------------------------------
void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr, ATTN_AT);
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr, ATTN_AT);
void ldmatrix_x2(uint32_t (&r)[2], uint32_t addr, ATTN_AT);
void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr, ATTN_AT);
template <class T>
void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ATTN_AT);
template <>
void mma_m16n8k16<bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        emulation::Where at);
template <>
void mma_m16n8k16<fp16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        emulation::Where at);
void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, ATTN_AT);

// ---- numbers ----------------------------------------------------------------------------------
template <class T>
uint32_t pack(float lo, float hi);
template <>
inline uint32_t pack<bf16>(float lo, float hi) {
  return emulation::bf16_bits(lo) | uint32_t(emulation::bf16_bits(hi)) << 16;
}
template <>
inline uint32_t pack<fp16>(float lo, float hi) {
  return emulation::fp16_bits(lo) | uint32_t(emulation::fp16_bits(hi)) << 16;
}
template <class T>
uint32_t pack_relu(float lo, float hi) {
  return pack<T>(lo <= 0.0f ? 0.0f : lo, hi <= 0.0f ? 0.0f : hi);
}
inline float to_float(bf16 v) { return as_float(uint32_t(v.bits) << 16); }
inline float to_float(fp16 v) { return emulation::fp16_value(v.bits); }
inline float to_float(float v) { return v; }
inline uint32_t to_tf32(float v) { return emulation::tf32_bits(v); }
// The approximate instructions flush subnormal inputs and results to zero.
inline float exp2_approx(float x) { return emulation::flush(exp2f(emulation::flush(x))); }
inline float log2_approx(float x) { return log2f(emulation::flush(x)); }
inline float rcp_approx(float x) { return emulation::flush(1.0f / emulation::flush(x)); }
inline float tanh_accurate(float x) { return tanhf(x); }
inline uint32_t add_high(uint32_t a, uint32_t b_low, uint32_t b_high) {
  return uint32_t(((uint64_t(b_high) << 32 | b_low) + a) >> 32);
}
inline uint32_t halves_of(uint32_t low, uint32_t high) {
  return (low & 0x0000ffffu) | (high & 0xffff0000u);
}

// ---- global memory ----------------------------------------------------------------------------
template <class T>
const T* opaque(const T* address) {
  return address;
}
inline uint32_t opaque(uint32_t word) { return word; }
inline uint32_t ldg_const_32(const void* p) { return *static_cast<const uint32_t*>(p); }
inline U32x2 ldg_const_64(const void* p) { return *static_cast<const U32x2*>(p); }
inline U32x4 ldg_const_128(const void* p) { return *static_cast<const U32x4*>(p); }
inline U32x2 ldg_64(const void* p) { return *static_cast<const U32x2*>(p); }
inline U32x4 ldg_128(const void* p) { return *static_cast<const U32x4*>(p); }
inline void stg_64(void* p, U32x2 v) { *static_cast<U32x2*>(p) = v; }
inline void stg_128(void* p, U32x4 v) { *static_cast<U32x4*>(p) = v; }
inline void atomic_add_global(float* p, float v) { *p += v; }
inline int atomic_add_global(int* p, int v) {
  const int before = *p;
  *p += v;
  return before;
}
inline void thread_fence() {}
inline int load_acquire(const int* p, ATTN_AT) { return machine.load_acquire(p, at); }
inline void store_release(int* p, int value, ATTN_AT) { machine.store_release(p, value, at); }

// ---- launch -----------------------------------------------------------------------------------
template <class Params>
void launch(void (*kernel)(Params), Grid grid, int threads, int smem_bytes, void*, Params params) {
  if (emulation::replacement) {
    alignas(128) Params copy = params;  // at least as the driver aligns them
    if (const auto body = emulation::replacement(reinterpret_cast<const void*>(kernel)))
      return machine.launch(grid, threads, smem_bytes, body, &copy);
  }
  struct Call {
    void (*kernel)(Params);
    const Params* params;
  } call = {kernel, &params};
  machine.launch(
      grid, threads, smem_bytes,
      [](void* p) {
        const auto* c = static_cast<const Call*>(p);
        c->kernel(*c->params);
      },
      &call);
}

}  // namespace attn::ptx
ATTN_EXPORTED_END
