// The host side of ../cuda/ptx_sm90.cuh: the same names on the emulated device.  Included by it
// only.
#pragma once
#include <cstring>
#include <stdexcept>

#include "machine.h"

ATTN_EXPORTED_BEGIN
namespace attn::ptx {

inline void mbarrier_init(uint32_t bar, int count, ATTN_AT) {
  machine.mbarrier_init(bar, count, at);
}
inline void fence_mbarrier_init(ATTN_AT) { machine.fence_mbarrier_init(at); }
inline void mbarrier_arrive(uint32_t bar, ATTN_AT) { machine.mbarrier_arrive(bar, 0, at); }
inline void mbarrier_arrive_expect_tx(uint32_t bar, int bytes, ATTN_AT) {
  machine.mbarrier_arrive(bar, bytes, at);
}
inline void mbarrier_wait(uint32_t bar, uint32_t parity, ATTN_AT) {
  machine.mbarrier_wait(bar, parity, at);
}
inline void tma_prefetch(const TensorMap&) {}
inline void tma_load_4d(uint32_t smem, const TensorMap& map, uint32_t bar, int c0, int c1, int c2,
                        int c3, ATTN_AT) {
  machine.tma_load(smem, map, bar, {c0, c1, c2, c3}, at);
}
inline void tma_store_4d(const TensorMap& map, uint32_t smem, int c0, int c1, int c2, int c3,
                         ATTN_AT) {
  machine.tma_store(map, smem, {c0, c1, c2, c3}, at);
}
inline void bulk_add(float* gmem, uint32_t smem, int bytes, ATTN_AT) {
  machine.bulk_add(gmem, smem, bytes, at);
}
inline void bulk_commit(ATTN_AT) { machine.bulk_commit(at); }
template <int N>
void bulk_wait_read(ATTN_AT) {
  machine.bulk_wait_read(N, at);
}
template <int N>
void bulk_wait(ATTN_AT) {
  machine.bulk_wait(N, at);
}
inline void fence_proxy_async_global(ATTN_AT) { machine.fence_proxy_async_global(at); }
inline void fence_proxy_async(ATTN_AT) { machine.fence_proxy_async(at); }

// Registers are counted against what the launch gave each thread.
template <int REGISTERS>
void setmaxnreg_inc(ATTN_AT) {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  machine.set_registers(REGISTERS, true, at);
}
template <int REGISTERS>
void setmaxnreg_dec(ATTN_AT) {
  static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256);
  machine.set_registers(REGISTERS, false, at);
}
bool elect_one(ATTN_AT);
template <int ID>
bool named_barrier_or(int threads, bool flag, ATTN_AT) {
  static_assert(ID > 0 && ID < emulation::BARRIERS, "named barriers are 1..15");
  return machine.barrier_or(ID, threads, flag, at);
}

void stmatrix_x4(uint32_t addr, const uint32_t (&r)[4], ATTN_AT);
void stmatrix_x4_trans(uint32_t addr, const uint32_t (&r)[4], ATTN_AT);
inline void wgmma_fence(ATTN_AT) { machine.wgmma_fence(at); }
inline void wgmma_commit(ATTN_AT) { machine.wgmma_commit(at); }
template <int N>
void wgmma_wait(ATTN_AT) {
  machine.wgmma_wait(N, at);
}
template <int TILES>
void wgmma_hold(float (&)[TILES][4]) {}
template <int STEPS>
void wgmma_hold(uint32_t (&)[STEPS][4]) {}
inline uint32_t wgmma_held(uint32_t word) { return word; }

template <class T, bool TRANS_B, int TILES>
void wgmma_ss(float (&acc)[TILES][4], uint64_t a, uint64_t b, bool accumulate, ATTN_AT) {
  static_assert(TILES == 4 || TILES == 8 || TILES == 12 || TILES == 16 || TILES == 24 ||
                TILES == 32);
  machine.wgmma({acc[0], nullptr, a, b, TILES, accumulate, TRANS_B, std::is_same_v<T, bf16>}, at);
}
template <class T, bool TRANS_B, int TILES>
void wgmma_rs(float (&acc)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool accumulate,
              ATTN_AT) {
  static_assert(TILES == 4 || TILES == 8 || TILES == 12 || TILES == 16 || TILES == 24 ||
                TILES == 32);
  machine.wgmma({acc[0], a, 0, b, TILES, accumulate, TRANS_B, std::is_same_v<T, bf16>}, at);
}

inline TensorMap make_tensor_map(const TensorSpec& t) {
  if (const char* why = tensor_problem(t); *why) throw std::invalid_argument(why);
  static_assert(sizeof(TensorSpec) <= sizeof(TensorMap));
  TensorMap map = {};
  std::memcpy(&map, &t, sizeof(t));
  return map;
}

}  // namespace attn::ptx
ATTN_EXPORTED_END
