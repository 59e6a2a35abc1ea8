// The wrappers of sm_90's own instructions, beside ptx.cuh and by its rules: one instruction each
// under nvcc (for sm_90a only), host functions of ../emulation/ptx_host_sm90.h under g++.
//
//   mbarriers     mbarrier_init(bar, count) fence_mbarrier_init()  one thread, then sync_threads()
//                 mbarrier_arrive(bar) mbarrier_arrive_expect_tx(bar, bytes)
//                 mbarrier_wait(bar, parity)    until the phase of that parity is complete
//   copy engine   tma_load_4d(smem, map, bar, c0, c1, c2, c3): a box to shared memory, its rows of
//                 128 bytes swizzled; the bytes are counted on bar.  tma_prefetch(map)
//                 tma_store_4d(map, smem, c0, c1, c2, c3): the reverse; what lies outside of the
//                 tensor is not written
//                 bulk_add(gmem, smem, bytes): floats of shared memory are added to global ones;
//                 bulk_commit() bulk_wait_read<N>(): until this thread's groups but N are read,
//                 bulk_wait<N>(): until they are added, which this thread then sees
//   matrices      wgmma_ss<T, TRANS_B>(acc, a, b, accumulate), wgmma_rs(acc, a_regs, b, ...)
//                 acc[TILES][4]: 64 x 8 * TILES of a warpgroup, warp w rows 16 w .. 16 w + 15, each
//                 lane as in mma (mma.cuh).  a, b: wgmma_descriptor(...) or registers as mma's A
//                 wgmma_fence() wgmma_commit() wgmma_wait<N>() wgmma_hold(acc) wgmma_held(word)
//                 stmatrix_x4(addr, r) stmatrix_x4_trans(addr, r): the reverse of ldmatrix_x4...
//   the rest      fence_proxy_async() of shared memory, fence_proxy_async_global()
//                 setmaxnreg_inc/dec<N>() elect_one()
//                 named_barrier_or<ID>(threads, flag)
//
// bar and smem are shared addresses, an mbarrier 8 bytes at a multiple of 8.
#pragma once
#include "ptx.cuh"

namespace attn::ptx {

// An operand in shared memory whose rows are 128 bytes (64 halves), swizzled as TMA leaves them, in
// slabs of 64 columns.  K-major (rows are M or N, columns the contraction): only `address` moves
// along the contraction, by 32 bytes a step of 16, and from slab to slab.  MN-major (rows are the
// contraction): slab_bytes is the distance to the next 64 columns, a step of 16 rows 2048 bytes.
ATTN_DEVICE uint64_t wgmma_descriptor(uint32_t address, uint32_t slab_bytes = 16) {
  constexpr uint64_t SWIZZLE_128 = uint64_t(1) << 62, EIGHT_ROWS = uint64_t(1024 >> 4) << 32;
  return SWIZZLE_128 | EIGHT_ROWS | uint64_t((slab_bytes & 0x3ffff) >> 4) << 16 |
         ((address & 0x3ffff) >> 4);
}
// The same operand `bytes` further on, by one addition to the address in the low word.  Shared
// memory ends before the 14 bits of the address do, so that nothing is carried out of them.
ATTN_DEVICE uint64_t wgmma_moved(uint64_t descriptor, uint32_t bytes) {
  const uint64_t high = descriptor >> 32 << 32;
  return high | uint64_t(uint32_t(descriptor) + (bytes >> 4));
}
// A value that is the same in all lanes, as one that the compiler knows to be so: what is computed
// from it stays in uniform registers, where wgmma wants its descriptors.  By whole warps.
ATTN_DEVICE uint32_t warp_uniform(uint32_t value) { return shfl(value, 0); }
// A descriptor from which wgmma_moved() makes those of a whole tile: by a word that wgmma_word()
// made of an address, and the tile's distance from there.  Tiles of one buffer share the word.
ATTN_DEVICE uint32_t wgmma_word(uint32_t address) { return warp_uniform((address & 0x3ffff) >> 4); }
ATTN_DEVICE uint64_t wgmma_operand(uint32_t word, uint32_t bytes, uint32_t slab_bytes = 16) {
  return wgmma_descriptor(0, slab_bytes) | uint64_t(word + (bytes >> 4));
}

}  // namespace attn::ptx

#ifdef ATTN_EMULATED
#include "../emulation/ptx_host_sm90.h"
#else

namespace attn::ptx {

// ---- mbarriers --------------------------------------------------------------------------------
ATTN_DEVICE void mbarrier_init(uint32_t bar, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}
// By the thread that initialised, so that the copy engine sees the barriers.
ATTN_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
ATTN_DEVICE void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}
ATTN_DEVICE void mbarrier_arrive_expect_tx(uint32_t bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes)
               : "memory");
}
ATTN_DEVICE bool mbarrier_try_wait(uint32_t bar, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(bar), "r"(parity)
      : "memory");
  return done != 0;
}
ATTN_DEVICE void mbarrier_wait(uint32_t bar, uint32_t parity) {
  for (int asked = 0; !mbarrier_try_wait(bar, parity); ++asked)
    ATTN_CHECK(asked < ATTN_CUDA_DEBUG, "an mbarrier at this address never ends the phase", bar,
               parity);
}

// ---- copy engine ------------------------------------------------------------------------------
ATTN_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
ATTN_DEVICE void tma_load_4d(uint32_t smem, const TensorMap& map, uint32_t bar, int c0, int c1,
                             int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(smem),
      "l"(&map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// Part of this thread's bulk group; shared memory is read until bulk_wait_read().
ATTN_DEVICE void tma_store_4d(const TensorMap& map, uint32_t smem, int c0, int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::
          "l"(&map),
      "r"(smem), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
// Both addresses and the size are multiples of 16 bytes.  In what order additions to one place are
// made is not said.
ATTN_DEVICE void bulk_add(float* gmem, uint32_t smem, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(gmem),
      "r"(smem), "r"(bytes)
      : "memory");
}
ATTN_DEVICE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
ATTN_DEVICE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}
template <int N>
ATTN_DEVICE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
ATTN_DEVICE void fence_proxy_async_global() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
ATTN_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- warpgroups -------------------------------------------------------------------------------
template <int REGISTERS>
ATTN_DEVICE void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
ATTN_DEVICE void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
// True in one lane of the warp.
ATTN_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile(
      "{\n.reg .pred chosen;\n"
      "elect.sync _|chosen, 0xffffffff;\n"
      "selp.u32 %0, 1, 0, chosen;\n}"
      : "=r"(chosen));
  return chosen != 0;
}
// named_barrier_sync that tells every thread whether `flag` was true in some thread.
template <int ID>
ATTN_DEVICE bool named_barrier_or(int threads, bool flag) {
  uint32_t any;
  asm volatile(
      "{\n.reg .pred mine, any;\n"
      "setp.ne.u32 mine, %3, 0;\n"
      "barrier.cta.red.or.pred any, %1, %2, mine;\n"
      "selp.u32 %0, 1, 0, any;\n}"
      : "=r"(any)
      : "n"(ID), "r"(threads), "r"(uint32_t(flag))
      : "memory");
  return any != 0;
}

// ---- matrices ---------------------------------------------------------------------------------
// Lane l gives the address of row l % 8 of tile l / 8 (16 bytes, aligned) and holds in r[t]
// elements (l / 4, 2 * (l % 4) + {0, 1}) of tile t, or of its transpose.
ATTN_DEVICE void stmatrix_x4(uint32_t addr, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
ATTN_DEVICE void stmatrix_x4_trans(uint32_t addr, const uint32_t (&r)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
}
// Before the first wgmma, and whenever its registers were touched since the last wait.
ATTN_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
ATTN_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
ATTN_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// No instruction: the compiler may not move uses of acc across it.  After a wait, and before a
// fence.
template <int TILES>
ATTN_DEVICE void wgmma_hold(float (&acc)[TILES][4]) {
#pragma unroll
  for (int n = 0; n < TILES; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[n][i])::"memory");
}
// The same word, as one that the compiler does not know: what is computed from it is computed here,
// and not kept in registers over a loop.
ATTN_DEVICE uint32_t wgmma_held(uint32_t word) {
  asm volatile("" : "+r"(word));
  return word;
}
template <int STEPS>  // of A operands
ATTN_DEVICE void wgmma_hold(uint32_t (&a)[STEPS][4]) {
#pragma unroll
  for (int n = 0; n < STEPS; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[n][i])::"memory");
}

// Operand lists: 4 tiles are 16 accumulators.
#define ATTN_A4(t)                                                                         \
  "+f"(acc[t][0]), "+f"(acc[t][1]), "+f"(acc[t][2]), "+f"(acc[t][3]), "+f"(acc[t + 1][0]), \
      "+f"(acc[t + 1][1]), "+f"(acc[t + 1][2]), "+f"(acc[t + 1][3]), "+f"(acc[t + 2][0]),  \
      "+f"(acc[t + 2][1]), "+f"(acc[t + 2][2]), "+f"(acc[t + 2][3]), "+f"(acc[t + 3][0]),  \
      "+f"(acc[t + 3][1]), "+f"(acc[t + 3][2]), "+f"(acc[t + 3][3])
#define ATTN_A4T ATTN_A4(0)
#define ATTN_A8 ATTN_A4T, ATTN_A4(4)
#define ATTN_A12 ATTN_A8, ATTN_A4(8)
#define ATTN_A16 ATTN_A12, ATTN_A4(12)
#define ATTN_A24 ATTN_A16, ATTN_A4(16), ATTN_A4(20)
#define ATTN_A32 ATTN_A24, ATTN_A4(24), ATTN_A4(28)
#define ATTN_R4T "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define ATTN_R8 \
  ATTN_R4T      \
  ", %16, "     \
  "%17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define ATTN_R12                                                                  \
  ATTN_R8                                                                         \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, " \
  "%47"
#define ATTN_R16                                                                  \
  ATTN_R12                                                                        \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, " \
  "%63"
#define ATTN_R24                                                                  \
  ATTN_R16                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, " \
  "%79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, "   \
  "%94, %95"
#define ATTN_R32                                                                 \
  ATTN_R24                                                                       \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, " \
  "%109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, "     \
  "%121, %122, %123, %124, %125, %126, %127"

// One instruction a shape, type and source of A.  I0..I6 name the operands after the accumulators.
#define ATTN_WGMMA(TILES, N, TYPE, A, B, ADD, TRANS_A, TRANS_B, ...)                              \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %" ADD                                       \
               ", 0;\n"                                                                           \
               "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" ATTN_R##TILES \
               "}, " A ", %" B ", add, 1, 1, " TRANS_A "%" TRANS_B ";\n}"                         \
               : ATTN_A##TILES                                                                    \
               : __VA_ARGS__)
#define ATTN_WGMMA_SHAPE(TILES, N, TYPE, I0, I1, I2, I3, I4, I5, I6)                              \
  if constexpr (FROM_REGISTERS) {                                                                 \
    ATTN_WGMMA(TILES, N, TYPE, "{%" I0 ", %" I1 ", %" I2 ", %" I3 "}", I4, I5, "", I6, "r"(a[0]), \
               "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), "n"(int(TRANS_B))); \
  } else {                                                                                        \
    ATTN_WGMMA(TILES, N, TYPE, "%" I0, I1, I2, "0, ", I3, "l"(a_smem), "l"(b),                    \
               "r"(int(accumulate)), "n"(int(TRANS_B)));                                          \
  }
#define ATTN_WGMMA_TYPES(TILES, N, ...)             \
  if constexpr (std::is_same_v<T, bf16>) {          \
    ATTN_WGMMA_SHAPE(TILES, N, "bf16", __VA_ARGS__) \
  } else {                                          \
    ATTN_WGMMA_SHAPE(TILES, N, "f16", __VA_ARGS__)  \
  }

template <class T, bool TRANS_B, bool FROM_REGISTERS, int TILES>
ATTN_DEVICE void wgmma(float (&acc)[TILES][4], const uint32_t* a, uint64_t a_smem, uint64_t b,
                       bool accumulate) {
  static_assert(TILES == 4 || TILES == 8 || TILES == 12 || TILES == 16 || TILES == 24 ||
                TILES == 32);
  if constexpr (TILES == 4) {
    ATTN_WGMMA_TYPES(4T, 32, "16", "17", "18", "19", "20", "21", "22")
  }
  if constexpr (TILES == 8) {
    ATTN_WGMMA_TYPES(8, 64, "32", "33", "34", "35", "36", "37", "38")
  }
  if constexpr (TILES == 12) {
    ATTN_WGMMA_TYPES(12, 96, "48", "49", "50", "51", "52", "53", "54")
  }
  if constexpr (TILES == 16) {
    ATTN_WGMMA_TYPES(16, 128, "64", "65", "66", "67", "68", "69", "70")
  }
  if constexpr (TILES == 24) {
    ATTN_WGMMA_TYPES(24, 192, "96", "97", "98", "99", "100", "101", "102")
  }
  if constexpr (TILES == 32) {
    ATTN_WGMMA_TYPES(32, 256, "128", "129", "130", "131", "132", "133", "134")
  }
}
#undef ATTN_WGMMA_TYPES
#undef ATTN_WGMMA_SHAPE
#undef ATTN_WGMMA

// acc[64 x 8 * TILES] (+)= A[64 x 16] B[16 x 8 * TILES], asynchronous; A K-major.
template <class T, bool TRANS_B, int TILES>
ATTN_DEVICE void wgmma_ss(float (&acc)[TILES][4], uint64_t a, uint64_t b, bool accumulate) {
  wgmma<T, TRANS_B, false>(acc, nullptr, a, b, accumulate);
}
template <class T, bool TRANS_B, int TILES>
ATTN_DEVICE void wgmma_rs(float (&acc)[TILES][4], const uint32_t (&a)[4], uint64_t b,
                          bool accumulate) {
  wgmma<T, TRANS_B, true>(acc, a, 0, b, accumulate);
}

}  // namespace attn::ptx
#endif  // ATTN_EMULATED
