// Kernels with one planted fault each (emulation only): what the emulator must report.  64 threads.
// `correct` holds the same steps done right, and must stay silent in every mode.
#pragma once
#include "../../cuda/ptx.cuh"

namespace attn::faults {
using namespace ptx;

enum Fault : int {
  CORRECT,
  OUT_OF_BOUNDS,
  MISALIGNED,
  DIVERGENT,
  BARRIER_SKIPPED,
  LANES_RETURNED,
  NO_WAIT,
  NO_WAIT_OTHER_LANE,
  NO_BARRIER_RAW,
  NO_BARRIER_WAR,
  NO_SYNC_WARP,
  NEVER_WRITTEN,
  COPY_INTO_LIVE,
  UNCOMMITTED,
  STACK,
  WILD_POINTER,
  DIVISION,
  BARRIER_COUNT,
  WARP_RETURNED,
  NAMED_BARRIER,
  IN_FLIGHT_AT_END,
};

struct Params {
  int fault;
  const float* gmem;  // [64 * 4]
  float* out;         // [64]
};

// noinline and volatile: the frames must exist for the stack to overflow.
inline __attribute__((noinline)) float deep(int n) {
  volatile float frame[256];
  frame[n % 256] = float(n);
  return n == 0 ? frame[0] : deep(n - 1) + frame[n % 256];
}

inline void exchange(const Params& p, int t, uint32_t base) {
  const int f = p.fault;
  sts_f32(base + 4 * t, p.gmem[t]);
  if (f != NO_BARRIER_RAW) sync_threads();
  float v = lds_f32(base + 4 * (63 - t));
  if (f != NO_BARRIER_WAR) sync_threads();
  sts_f32(base + 4 * t, v);
  if (f != NO_SYNC_WARP) sync_warp();
  v = lds_f32(base + 4 * (t ^ 1));
  if (f == NEVER_WRITTEN) v += lds_f32(base + 4 * (64 + t));
  sync_threads();
  p.out[t] = v;
}

inline void copies(const Params& p, int t, uint32_t base) {
  const int f = p.fault;
  const uint32_t slot = base + 16 * t;
  cp_async_16(slot, p.gmem + 4 * t);
  if (f != UNCOMMITTED) cp_async_commit();
  if (f != NO_WAIT && f != NO_WAIT_OTHER_LANE) cp_async_wait<0>();
  if (f != NO_WAIT) sync_threads();
  float v = lds_f32(f == NO_WAIT ? slot : base + 16 * (63 - t));
  if (f != COPY_INTO_LIVE) sync_threads();
  cp_async_16(slot, p.gmem + 4 * t);
  cp_async_commit();
  cp_async_wait<0>();
  sync_threads();
  p.out[t] += v + lds_f32(base + 16 * (63 - t));
}

ATTN_KERNEL(64)
void faults(const Params p) {
  const int t = thread_id(), f = p.fault;
  const uint32_t base = smem_base();
  exchange(p, t, base);
  sync_threads();
  copies(p, t, base);
  sync_threads();
  if (f == OUT_OF_BOUNDS) lds_32(base + 4096);
  if (f == MISALIGNED) lds_64(base + 4);
  if (f == DIVERGENT) {
    if (t & 1) {
      sync_warp();
    } else {
      shfl_xor(t, 1);
    }
  }
  if (f == BARRIER_SKIPPED && warp_id() == 0) named_barrier_sync<1>(64);
  if (f == LANES_RETURNED && t % 32 == 7) return;
  if (f == LANES_RETURNED) sync_warp();
  if (f == STACK) p.out[t] = deep(1000);
  if (f == WILD_POINTER)
    p.out[t - (int64_t(1) << 42)] = 1;  // ahead: behind, it might be no address
  if (f == DIVISION) p.out[t] = float(7 / (thread_id() - t));
  if (f == BARRIER_COUNT) named_barrier_sync<1>(warp_id() == 0 ? 64 : 32);
  if (f == WARP_RETURNED && warp_id() == 1) return;
  if (f == WARP_RETURNED) sync_threads();
  if (f == IN_FLIGHT_AT_END) cp_async_16(base + 16 * t, p.gmem + 4 * t);
  if (f == NAMED_BARRIER) {
    if (warp_id() == 0) {
      sts_f32(base + 4 * t, p.gmem[t]);
      named_barrier_arrive<2>(64);
    } else {
      named_barrier_sync<2>(64);
      p.out[t] = lds_f32(base + 4 * (t - 32));
    }
  }
}

}  // namespace attn::faults
