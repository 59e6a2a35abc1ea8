// What compiled PTX calls on the emulated machine: memory, rendezvous of a warp, asynchronous
// copies and the instructions of sm_90.  tests/helpers/ptx_*.py writes the calls, one an
// instruction, with the line of the PTX text as the place of each (ptx_host.h: Where).
#pragma once
#include "../../cuda/ptx_sm90.cuh"
#include "in_flight.h"
#include "numbers.h"

ATTN_EXPORTED_BEGIN
namespace attn::compiled {
// Those of ptx.cuh are templates over types that nobody outside of the module sees.
void mma_bf16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PTX_AT);
void mma_fp16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PTX_AT);
// Lane l gives the address of row l % 8 of tile l / 8 and holds elements (l / 4, 2 * (l % 4) + {0,
// 1}) of each tile (trans: of its transpose).  Where there are fewer tiles, later lanes' addresses
// are not used.
// stores the first `tiles`: 1, 2 or 4.
void stmatrix(uint32_t address, const uint32_t* r, int tiles, bool trans, PTX_AT);
}  // namespace attn::compiled
ATTN_EXPORTED_END

namespace attn::compiled {

using emulation::Access;
using emulation::hex;
using emulation::Kind;

// ---- memory -----------------------------------------------------------------------------------
template <class T, int N>
struct Vector {
  T x[N];
};
// Global memory and parameters: the process's own addresses, aligned as PTX wants them.
template <class T, int N>
inline Vector<T, N> load(uint64_t address, PTX_AT) {
  if (address % sizeof(Vector<T, N>)) machine.fail(at, "misaligned address " + hex(address));
  Vector<T, N> v;
  std::memcpy(&v, reinterpret_cast<const void*>(address), sizeof(v));
  return v;
}
template <class T, int N>
inline Vector<T, N> load_parameter(uint64_t parameters, uint64_t offset, PTX_AT) {
  if (offset % sizeof(Vector<T, N>)) machine.fail(at, "misaligned parameter " + hex(offset));
  Vector<T, N> v;
  std::memcpy(&v, reinterpret_cast<const void*>(parameters + offset), sizeof(v));
  return v;
}
template <class T, int N>
inline void store(uint64_t address, const Vector<T, N>& v, PTX_AT) {
  if (address % sizeof(v)) machine.fail(at, "misaligned address " + hex(address));
  std::memcpy(reinterpret_cast<void*>(address), &v, sizeof(v));
}
template <class T, int N>
inline Vector<T, N> load_shared(uint32_t address, PTX_AT) {
  Vector<T, N> v;
  std::memcpy(&v, machine.access(Access::READ, address, sizeof(v), at), sizeof(v));
  return v;
}
template <class T, int N>
inline void store_shared(uint32_t address, const Vector<T, N>& v, PTX_AT) {
  machine.store(address, &v, sizeof(v), at);
}
// The value before; change(value) is what comes in its place.
template <class T, class Change>
inline T atomic(uint64_t address, const Change& change, PTX_AT) {
  const T before = load<T, 1>(address, at).x[0];
  store<T, 1>(address, {{T(change(before))}}, at);
  return before;
}
template <class T, class Change>
inline T atomic_shared(uint32_t address, const Change& change, PTX_AT) {
  uint8_t* p = machine.access(Access::ATOMIC, address, sizeof(T), at);
  T before;
  std::memcpy(&before, p, sizeof(T));
  const T after = change(before);
  std::memcpy(p, &after, sizeof(T));
  return before;
}

// ---- rendezvous -------------------------------------------------------------------------------
// A warp of the machine meets as a whole: any other mask is an error.
inline void whole_warp(uint32_t mask, Where at) {
  if (mask != emulation::FULL_WARP)
    machine.fail(at, "the member mask must be all lanes, got " + hex(mask));
}
inline void sync_warp(uint32_t mask, PTX_AT) {
  whole_warp(mask, at);
  machine.sync_warp(at);
}
// bar.sync id, bar.sync id, threads
inline void barrier(uint32_t id, uint32_t threads, bool wait, PTX_AT) {
  if (id >= uint32_t(emulation::BARRIERS))
    machine.fail(at, "barriers are 0..15, got " + std::to_string(id));
  if (id == 0 && threads && int(threads) != machine.threads)
    machine.fail(at, "barrier 0 of " + std::to_string(threads) + " threads: only of all is known");
  if (id != 0 && !threads) threads = uint32_t(machine.threads);
  machine.barrier(int(id), int(threads), wait, at);
}

struct Shuffled {
  uint32_t value;
  bool inside;
};
enum class Shuffle { UP, DOWN, BFLY, IDX };
// c: the last lane in bits 0..4, in bits 8..12 what divides the warp into segments.  A lane out of
// its segment gets its own value, and the predicate says so.
inline Shuffled shuffle(Shuffle kind, uint32_t value, uint32_t b, uint32_t c, uint32_t mask,
                        PTX_AT) {
  whole_warp(mask, at);
  const int lane = ptx::lane_id(), segments = int(c >> 8 & 31), clamp = int(c & 31);
  const int first = lane & segments, last = first | (clamp & ~segments), by = int(b & 31);
  int from = kind == Shuffle::UP     ? lane - by
             : kind == Shuffle::DOWN ? lane + by
             : kind == Shuffle::BFLY ? lane ^ by
                                     : first | (by & ~segments);
  // of .up, c is the first lane
  const bool inside = kind == Shuffle::UP ? from >= last : from <= last;
  if (!inside) from = lane;
  return {ptx::shfl(value, from, at), inside};
}
inline uint32_t ballot(bool flag, uint32_t mask, PTX_AT) {
  whole_warp(mask, at);
  return ptx::ballot(flag, at);
}
inline bool elect(uint32_t mask, PTX_AT) {
  whole_warp(mask, at);
  return ptx::elect_one(at);
}
// The lane that elect.sync chose.
inline uint32_t elected(bool chosen, PTX_AT) {
  return uint32_t(__builtin_ctz(ptx::ballot(chosen, at)));
}
// redux.sync: the same for all lanes.
template <class T, class Combine>
inline T reduce(T value, uint32_t mask, const Combine& combine, PTX_AT) {
  whole_warp(mask, at);
  T all = as<T>(ptx::shfl(as<uint32_t>(value), 0, at));
  for (int lane = 1; lane < 32; ++lane)
    all = combine(all, as<T>(ptx::shfl(as<uint32_t>(value), lane, at)));
  return all;
}
inline bool barrier_or(uint32_t id, uint32_t threads, bool flag, PTX_AT) {
  return machine.barrier_or(int(id), int(threads), flag, at);
}

// ---- asynchronous copies ----------------------------------------------------------------------
inline void copy_async(uint32_t to, uint64_t from, int bytes, uint32_t source_bytes, PTX_AT) {
  if (source_bytes != 0 && source_bytes != uint32_t(bytes))
    machine.fail(at, "cp.async of " + std::to_string(source_bytes) + " of " +
                         std::to_string(bytes) + " bytes: only all or none is known");
  machine.copy_issue(to, reinterpret_cast<const void*>(from), bytes, source_bytes != 0, at);
}

// ---- matrices ---------------------------------------------------------------------------------
template <bool TRANS, int TILES>
inline void load_matrix(uint32_t (&r)[TILES], uint32_t address, PTX_AT) {
  static_assert(TILES == 1 || TILES == 2 || TILES == 4);
  if constexpr (TILES == 1) {  // of two tiles at the same rows, whose addresses lanes 0 to 7 have
    uint32_t same[2];
    load_matrix<TRANS, 2>(same, ptx::shfl(address, ptx::lane_id() & 7, at), at);
    r[0] = same[0];
  }
  if constexpr (TILES == 4)
    TRANS ? ptx::ldmatrix_x4_trans(r, address, at) : ptx::ldmatrix_x4(r, address, at);
  if constexpr (TILES == 2)
    TRANS ? ptx::ldmatrix_x2_trans(r, address, at) : ptx::ldmatrix_x2(r, address, at);
}
inline void mma_tf32(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], PTX_AT) {
  ptx::mma_m16n8k8_tf32(acc, a, b[0], b[1], at);
}

// ---- sm_90 ------------------------------------------------------------------------------------
// try_wait may give up before the phase is over.  Here it waits, but in the modes random and poison
// every other call of a thread that would have to wait says false: who does not ask again is found.
inline bool try_wait(uint32_t barrier, uint32_t parity, PTX_AT) {
  const auto& mode = machine.mode;
  if ((mode.random || mode.poison) && machine.would_wait(barrier, parity, at)) {
    thread_local uint32_t asked[emulation::MAX_THREADS];
    if (asked[machine.thread()]++ % 2 == 0) return false;
  }
  machine.mbarrier_wait(barrier, parity, at);
  return true;
}
inline void tensor_load(uint32_t to, uint64_t map, uint32_t barrier, std::array<int, 4> corner,
                        PTX_AT) {
  machine.tma_load(to, *reinterpret_cast<const ptx::TensorMap*>(map), barrier, corner, at);
}
inline void tensor_store(uint64_t map, std::array<int, 4> corner, uint32_t from, PTX_AT) {
  machine.tma_store(*reinterpret_cast<const ptx::TensorMap*>(map), from, corner, at);
}

}  // namespace attn::compiled
