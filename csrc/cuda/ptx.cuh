// The only place of csrc/cuda that knows PTX, CUDA's built-in variables and shared-memory pointers.
// Every wrapper is one instruction under nvcc; under g++ with -DATTN_EMULATED the same names come
// from ../emulation/ptx_host.h, so that one kernel text runs on a GPU and on a laptop.
//
// Rules for kernels (tests/cuda/test_emulator.py greps for them): no asm, no __shared__, no
// threadIdx-like names, no pointer into shared memory.  Shared memory is a 32-bit byte address:
// smem_base() + offset.  Global memory is plain pointers.
//
//   kernel        template <...> ATTN_KERNEL(THREADS, MIN_BLOCKS)
//                 void kernel(ATTN_GRID_CONSTANT const Params p)
//   launch        launches.h, which knows kernels by their names
//   who am I      thread_id() block_id().x|y|z grid_size().x|y|z lane_id() warp_id() block_size()
//   rendezvous    sync_threads() sync_warp() named_barrier_sync<ID>(n) named_barrier_arrive<ID>(n)
//   shuffles      shfl_xor(v, mask) shfl(v, lane) ballot(flag)         v: float, int, uint32_t
//   copies        cp_async_16(smem, gmem, valid) cp_async_4(...) cp_async_commit()
//   cp_async_wait<N>()
//                 valid = false writes zeros and reads nothing
//   shared        lds_8/16/32/64/128(addr) lds_f32(addr)  sts_*(addr, value)  atomic_add_shared_f32
//   matrices      ldmatrix_x2/x4(r, addr) ..._trans, mma_m16n8k16<T>(acc, a, b0, b1) T = bf16|fp16,
//                 mma_m16n8k8_tf32(acc, a, b0, b1): acc += A B in fp32
//   numbers       pack<T>(lo, hi) pack_relu<T>(lo, hi) unpack_lo/hi<T>(word)
//                 from_float<T> to_float to_tf32
//                 exp2_approx log2_approx rcp_approx tanh_accurate add_high halves_of
//   global        ldg_64/128 stg_64/128 atomic_add_global(float*|int*, v) thread_fence()
//                 load_acquire(int*) store_release(int*, v): words by which blocks wait for blocks
//                 opaque(address or word) ldg_const_32/64/128
//
// All 32 lanes of a warp must reach a *_sync instruction (shuffles, ballot, sync_warp, ldmatrix,
// mma) together.  Fragment layouts: docs/design/cuda.md.
#pragma once
#include <cstdint>

#include "ptx_types.h"

// What a debug build checks (ATTN_EXT_CUDA_DEBUG=1; ATTN_CUDA_DEBUG is how often a barrier is asked
// before it counts as stuck): where `ok` is false the kernel prints `what`, two numbers, its block
// and its thread, and traps.  Elsewhere a check is no code.
#ifdef ATTN_CUDA_DEBUG
#define ATTN_CHECK(ok, what, a, b) \
  if (!(ok)) ::attn::ptx::stop(what, (long long)(a), (long long)(b))
#else
#define ATTN_CHECK(ok, what, a, b)
#endif

#ifdef ATTN_EMULATED
#include "../emulation/ptx_host.h"
#else
#define ATTN_DEVICE __device__ __forceinline__
#define ATTN_KERNEL(...) __global__ __launch_bounds__(__VA_ARGS__)
#define ATTN_GRID_CONSTANT __grid_constant__

namespace attn::ptx {

// ---- who am I --------------------------------------------------------------------------------
ATTN_DEVICE int thread_id() { return int(threadIdx.x); }
ATTN_DEVICE int block_size() { return int(blockDim.x); }
ATTN_DEVICE int lane_id() { return int(threadIdx.x) & 31; }
ATTN_DEVICE constexpr bool repairs() { return true; }  // the emulator can see NaN without repair
ATTN_DEVICE int warp_id() { return int(threadIdx.x) >> 5; }
ATTN_DEVICE Grid block_id() { return {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)}; }
ATTN_DEVICE Grid grid_size() { return {int(gridDim.x), int(gridDim.y), int(gridDim.z)}; }

// Address of the block's dynamic shared memory, a multiple of 1024.
ATTN_DEVICE uint32_t smem_base() {
  extern __shared__ __align__(1024) uint8_t attn_dynamic_smem[];
  return uint32_t(__cvta_generic_to_shared(attn_dynamic_smem));
}

// ---- rendezvous ------------------------------------------------------------------------------
ATTN_DEVICE void sync_threads() { asm volatile("bar.sync 0;" ::: "memory"); }
ATTN_DEVICE void sync_warp() { asm volatile("bar.warp.sync 0xffffffff;" ::: "memory"); }
// ID 1..15 (0 is sync_threads); threads: a multiple of 32, all that sync or arrive.
template <int ID>
ATTN_DEVICE void named_barrier_sync(int threads) {
  asm volatile("bar.sync %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}
template <int ID>
ATTN_DEVICE void named_barrier_arrive(int threads) {
  asm volatile("bar.arrive %0, %1;" ::"n"(ID), "r"(threads) : "memory");
}
// The same where the ID is known at run time only.
ATTN_DEVICE void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
ATTN_DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

ATTN_DEVICE uint32_t shfl_xor(uint32_t value, int mask) {
  uint32_t out;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(out)
               : "r"(value), "r"(mask));
  return out;
}
ATTN_DEVICE int shfl_xor(int value, int mask) { return int(shfl_xor(uint32_t(value), mask)); }
ATTN_DEVICE float shfl_xor(float value, int mask) {
  return __uint_as_float(shfl_xor(__float_as_uint(value), mask));
}
// The value of lane `lane`, 0..31, which may differ between the lanes that ask.
ATTN_DEVICE uint32_t shfl(uint32_t value, int lane) {
  uint32_t out;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(out)
               : "r"(value), "r"(lane));
  return out;
}
ATTN_DEVICE int shfl(int value, int lane) { return int(shfl(uint32_t(value), lane)); }
ATTN_DEVICE float shfl(float value, int lane) {
  return __uint_as_float(shfl(__float_as_uint(value), lane));
}
// Bit i = the flag of lane i.
ATTN_DEVICE uint32_t ballot(bool flag) { return __ballot_sync(0xffffffffu, flag); }

// ---- asynchronous copies, global -> shared ----------------------------------------------------
// 16 bytes, both sides 16-byte aligned, through L2 only.
ATTN_DEVICE void cp_async_16(uint32_t smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(smem), "l"(gmem),
               "r"(valid ? 16 : 0)
               : "memory");
}
// 4 bytes, both sides 4-byte aligned.
ATTN_DEVICE void cp_async_4(uint32_t smem, const void* gmem, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(smem), "l"(gmem),
               "r"(valid ? 4 : 0)
               : "memory");
}
ATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's latest groups are in flight; other threads see the data after a
// barrier that follows.
template <int N>
ATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- shared memory ----------------------------------------------------------------------------
ATTN_DEVICE uint32_t lds_32(uint32_t addr) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
  return v;
}
ATTN_DEVICE uint16_t lds_16(uint32_t addr) {
  uint16_t v;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(addr) : "memory");
  return v;
}
ATTN_DEVICE uint8_t lds_8(uint32_t addr) {
  uint32_t v;
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(v) : "r"(addr) : "memory");
  return uint8_t(v);
}
ATTN_DEVICE float lds_f32(uint32_t addr) { return __uint_as_float(lds_32(addr)); }
ATTN_DEVICE U32x2 lds_64(uint32_t addr) {
  U32x2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(addr) : "memory");
  return v;
}
ATTN_DEVICE U32x4 lds_128(uint32_t addr) {
  U32x4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(addr)
               : "memory");
  return v;
}
ATTN_DEVICE void sts_8(uint32_t addr, uint8_t v) {
  asm volatile("st.shared.u8 [%0], %1;" ::"r"(addr), "r"(uint32_t(v)) : "memory");
}
ATTN_DEVICE void sts_16(uint32_t addr, uint16_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(addr), "h"(v) : "memory");
}
ATTN_DEVICE void sts_32(uint32_t addr, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(addr), "r"(v) : "memory");
}
ATTN_DEVICE void sts_f32(uint32_t addr, float v) { sts_32(addr, __float_as_uint(v)); }
ATTN_DEVICE void sts_64(uint32_t addr, U32x2 v) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(addr), "r"(v.x), "r"(v.y) : "memory");
}
ATTN_DEVICE void sts_128(uint32_t addr, U32x4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
ATTN_DEVICE void atomic_add_shared_f32(uint32_t addr, float v) {
  asm volatile("red.shared.add.f32 [%0], %1;" ::"r"(addr), "f"(v) : "memory");
}

// ---- matrices ---------------------------------------------------------------------------------
// Four 8x8 tiles of 16-bit elements.  Lane l gives the address of row l % 8 of tile l / 8 (16
// bytes, aligned) and receives in r[t] elements (l / 4, 2 * (l % 4) + {0, 1}) of tile t; _trans:
// of the tile's transpose.  x2 takes the addresses of lanes 0..15.
ATTN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}
ATTN_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(addr)
               : "memory");
}
ATTN_DEVICE void ldmatrix_x2(uint32_t (&r)[2], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(addr)
               : "memory");
}
ATTN_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(addr)
               : "memory");
}

// acc[16 x 8] += A[16 x 16] B[16 x 8].  With g = lane / 4 and c = 2 * (lane % 4):
//   acc[0..1] = (g, c + {0, 1})   acc[2..3] = (g + 8, c + {0, 1})
//   a[0] = (g, c..)  a[1] = (g + 8, c..)  a[2] = (g, c + 8..)  a[3] = (g + 8, c + 8..)
//   b0 = (k = c.., n = g)         b1 = (k = c + 8.., n = g)
template <class T>
ATTN_DEVICE void mma_m16n8k16(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
template <>
ATTN_DEVICE void mma_m16n8k16<bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
ATTN_DEVICE void mma_m16n8k16<fp16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc[16 x 8] += A[16 x 8] B[8 x 8], operands fp32 words whose low 13 bits are ignored (round with
// to_tf32).  acc as above; with g = lane / 4 and c = lane % 4:
//   a[0] = (g, c)  a[1] = (g + 8, c)  a[2] = (g, c + 4)  a[3] = (g + 8, c + 4)
//   b0 = (k = c, n = g)  b1 = (k = c + 4, n = g)
ATTN_DEVICE void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0,
                                  uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// ---- numbers ----------------------------------------------------------------------------------
ATTN_DEVICE float as_float(uint32_t v) { return __uint_as_float(v); }
ATTN_DEVICE uint32_t as_uint(float v) { return __float_as_uint(v); }

// The high word of a + b, b of 64 bits: one multiply-add.
ATTN_DEVICE uint32_t add_high(uint32_t a, uint32_t b_low, uint32_t b_high) {
  uint32_t out;
  asm("{\n.reg .u32 low;\nmad.lo.cc.u32 low, %1, 1, %2;\nmadc.hi.u32 %0, %1, 1, %3;\n}"
      : "=r"(out)
      : "r"(a), "r"(b_low), "r"(b_high));
  return out;
}

// The low half of `low` and the high half of `high`.
ATTN_DEVICE uint32_t halves_of(uint32_t low, uint32_t high) {
  uint32_t out;
  asm("prmt.b32 %0, %1, %2, 0x7610;" : "=r"(out) : "r"(low), "r"(high));
  return out;
}

// Two floats rounded to nearest even; lo goes to the low half, the element with the lower index.
template <class T>
ATTN_DEVICE uint32_t pack(float lo, float hi);
template <>
ATTN_DEVICE uint32_t pack<bf16>(float lo, float hi) {
  uint32_t out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
}
template <>
ATTN_DEVICE uint32_t pack<fp16>(float lo, float hi) {
  uint32_t out;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
}
// The same, but 0 for what is below 0; NaN stays.
template <class T>
ATTN_DEVICE uint32_t pack_relu(float lo, float hi);
template <>
ATTN_DEVICE uint32_t pack_relu<bf16>(float lo, float hi) {
  uint32_t out;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
}
template <>
ATTN_DEVICE uint32_t pack_relu<fp16>(float lo, float hi) {
  uint32_t out;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
}
ATTN_DEVICE float to_float(bf16 v) { return as_float(uint32_t(v.bits) << 16); }
ATTN_DEVICE float to_float(fp16 v) {
  float out;
  asm("cvt.f32.f16 %0, %1;" : "=f"(out) : "h"(v.bits));
  return out;
}
ATTN_DEVICE float to_float(float v) { return v; }
ATTN_DEVICE uint32_t to_tf32(float v) {
  uint32_t out;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(out) : "f"(v));
  return out;
}
ATTN_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
ATTN_DEVICE float rcp_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// tanh.approx has 11 good bits, too few for softcap in fp32.
ATTN_DEVICE float tanh_accurate(float x) { return tanhf(x); }

// ---- global memory ----------------------------------------------------------------------------
// The same address or word, as one of which the compiler knows nothing.
template <class T>
ATTN_DEVICE const T* opaque(const T* address) {
  asm volatile("" : "+l"(address));
  return address;
}
ATTN_DEVICE uint32_t opaque(uint32_t word) {
  asm volatile("" : "+r"(word));
  return word;
}
// Of what no kernel writes while this one runs: the compiler may move them.
ATTN_DEVICE uint32_t ldg_const_32(const void* p) {
  uint32_t v;
  asm("ld.global.nc.b32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}
ATTN_DEVICE U32x2 ldg_const_64(const void* p) {
  U32x2 v;
  asm("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}
ATTN_DEVICE U32x4 ldg_const_128(const void* p) {
  U32x4 v;
  asm("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}
ATTN_DEVICE U32x2 ldg_64(const void* p) { return *static_cast<const U32x2*>(p); }
ATTN_DEVICE U32x4 ldg_128(const void* p) { return *static_cast<const U32x4*>(p); }
ATTN_DEVICE void stg_64(void* p, U32x2 v) { *static_cast<U32x2*>(p) = v; }
ATTN_DEVICE void stg_128(void* p, U32x4 v) { *static_cast<U32x4*>(p) = v; }
ATTN_DEVICE void atomic_add_global(float* p, float v) { atomicAdd(p, v); }
// The value before: a ticket.  thread_fence() goes before taking it and after.
ATTN_DEVICE int atomic_add_global(int* p, int v) { return atomicAdd(p, v); }
ATTN_DEVICE void thread_fence() { __threadfence(); }
// What a thread did before it stored is seen by who loads that value, and does something then.
ATTN_DEVICE int load_acquire(const int* p) {
  int v;
  asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
ATTN_DEVICE void store_release(int* p, int v) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

#ifdef ATTN_CUDA_DEBUG
ATTN_DEVICE void stop(const char* what, long long a, long long b) {
  printf("attn_ext: %s: %lld, %lld; block %u %u %u, thread %u\n", what, a, b, blockIdx.x,
         blockIdx.y, blockIdx.z, threadIdx.x);
  asm volatile("trap;");
}
#endif

}  // namespace attn::ptx
#endif  // ATTN_EMULATED

namespace attn::ptx {

template <class T>
ATTN_DEVICE T from_float(float v) {
  return T{uint16_t(pack<T>(v, 0.0f) & 0xffffu)};
}
template <>
ATTN_DEVICE float from_float<float>(float v) {
  return v;
}
template <class T>
ATTN_DEVICE float unpack_lo(uint32_t word) {
  return to_float(T{uint16_t(word & 0xffffu)});
}
template <class T>
ATTN_DEVICE float unpack_hi(uint32_t word) {
  return to_float(T{uint16_t(word >> 16)});
}

}  // namespace attn::ptx
