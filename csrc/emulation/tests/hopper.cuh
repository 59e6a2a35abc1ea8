// One warpgroup, one wrapper of ptx_sm90.cuh: tiles of A and B come by the copy engine, and what
// the threads get is written out raw.  On the emulator and on a GPU the words must be the same.
//
// A [64, 64], B [128, 64] (K-major) or [64, 128] (MN-major), of small integers: sums are exact in
// any order.  Element i of a tensor is (7919 i + seed) % 9 - 4.
#pragma once
#ifndef __CUDACC_RTC__
#include <vector>
#endif

#include "../../cuda/ptx_sm90.cuh"
#include "../../philox.h"
#include "device_launch.cuh"

namespace attn::hopper {
using namespace ptx;

enum Op : int {
  BOX,            // 64 rows of 128 bytes of shared memory after a load that crosses every edge
  SS_K,           // acc + A B^T, both from shared memory
  SS_MN,          // acc + A B
  RS_MN,          // acc + A B, A from registers
  VOTES,          // elect_one, named_barrier_or
  STORED,         // SS_K of a B that the threads have stored again themselves
  N32,            // A B^T of the first 32 rows of B
  N64,            // of the first 64
  N96,            // of the first 96, A from registers
  N192,           // of all rows and the first 64 once more
  N256,           // of all rows, twice
  TURNED,         // stmatrix_x4_trans of 16-bit numbers that say where they come from
  STRAIGHT,       // the same of stmatrix_x4
  BOX_STORED,     // A stored to a tensor of 56 columns and 2 heads of 50 rows, from (16, 10, 1) on
  ADDED,          // bulk_add of 512 floats, and of the first 256 once more
  READERS_FENCE,  // STORED, with the fence after the barrier
  LOADED_AGAIN,   // A as it is after the threads have read and stored it and a load has come again
  PASSED,         // words that change hands by an mbarrier at which every thread arrives
  IN_TURN,        // three blocks that add by bulk_add one after the other, and what each finds
  REGISTERS,      // setmaxnreg: 24 of a warpgroup, 240 of two
  // Faults from here on.
  UNFENCED,           // STORED without fence_proxy_async
  ADD_UNFENCED,       // ADDED without it
  ADD_REUSED,         // the floats overwritten while they are read
  ADD_FENCED_LATE,    // ADDED, with the fences of all but one warp after the barrier
  COPY_FENCED_EARLY,  // ADDED of what cp_async brings, with the fence before the wait for it
  READ_UNFENCED,      // LOADED_AGAIN without the fence, of what was read
  STORE_UNFENCED,     // the same of what was stored
  // Faults that only an emulator that asks for the order of additions (set_ordered) can see.
  TURN_UNFENCED,    // IN_TURN without fence_proxy_async_global
  TURN_UNWAITED,    // without load_acquire: by tickets alone
  TURN_UNRELEASED,  // its word stored before the addition is there
  // No faults: what they answer is for the device to choose, or for who waits to know.
  BOX_LANDS,  // BOX_STORED, A overwritten once it is read; what of it is there then, and after a
              // wait
  BOX_LEFT,   // BOX_STORED, and the thread returns without a wait
};

constexpr int THREADS = 128, TILES = 16, OUT = THREADS * 128;
constexpr int A_BYTES = 64 * 128, B_BYTES = 128 * 128, SMEM = A_BYTES + 2 * B_BYTES + 16;
constexpr int BLOCKS = 3;  // of those that add in turn

struct Params {
  int op;
  TensorMap a, b, stored;
  const uint32_t* a_registers;  // [THREADS, 4 steps, 4]
  uint32_t* out;                // [OUT]
  int* words;                   // [2], 0: the next ticket, the next turn
};

ATTN_HOST_DEVICE constexpr bool adds_in_turn(int op) {
  return op == IN_TURN || (op >= TURN_UNFENCED && op < BOX_LANDS);
}

// Each thread stores its part of B again.
ATTN_DEVICE void store_again(int op, uint32_t B) {
  for (int i = thread_id(); i < B_BYTES / 4; i += THREADS) sts_32(B + 4 * i, lds_32(B + 4 * i));
  if (op == STORED) fence_proxy_async();
  sync_threads();  // all of B is stored
  if (op == READERS_FENCE) fence_proxy_async();
}

// Each thread reads and stores its part of A, and A is loaded again.
ATTN_DEVICE void load_again(const Params& p, uint32_t A, uint32_t bar) {
  uint32_t sum = 0;
  for (int i = thread_id(); i < A_BYTES / 4; i += THREADS) {
    if (p.op != STORE_UNFENCED) sum += lds_32(A + 4 * i);
    if (p.op != READ_UNFENCED) sts_32(A + 4 * i, uint32_t(i));
  }
  if (p.op == LOADED_AGAIN) fence_proxy_async();
  sync_threads();  // A was read and stored
  if (thread_id() == 0) {
    mbarrier_arrive_expect_tx(bar, A_BYTES);
    tma_load_4d(A, p.a, bar, 0, 0, 0, 0);
  }
  mbarrier_wait(bar, 1);
  for (int i = thread_id(); i < A_BYTES / 4; i += THREADS) p.out[i] = lds_32(A + 4 * i);
  if (sum == 1) p.out[A_BYTES / 4] = sum;  // what was read is used
}

// A stored to global memory.  Of BOX_LANDS two words behind it: the first of the box as it is once
// A has been read, and once the box has been waited for.
ATTN_DEVICE void store_box(const Params& p, uint32_t A) {
  if (thread_id() != 0) return;
  tma_store_4d(p.stored, A, 16, 10, 1, 0);
  bulk_commit();
  if (p.op == BOX_LEFT) return;
  bulk_wait_read<0>();
  if (p.op != BOX_LANDS) return;
  for (int i = 0; i < A_BYTES / 4; ++i) sts_32(A + 4 * i, 7);
  const uint32_t* first = p.out + (60 * 64 + 16) / 2;
  p.out[OUT - 4] = ldg_64(first).x;
  bulk_wait<0>();
  p.out[OUT - 3] = ldg_64(first).x;
}

ATTN_DEVICE void turned(int op, uint32_t A, uint32_t* out) {
  uint32_t r[4];
  for (int t = 0; t < 4; ++t) {
    const uint32_t first = thread_id() * 8 + 2 * t;
    r[t] = first | (first + 1) << 16;
  }
  if (op == TURNED)
    stmatrix_x4_trans(A + 16 * thread_id(), r);
  else
    stmatrix_x4(A + 16 * thread_id(), r);
  sync_threads();  // every warp has stored
  for (int i = 0; i < 4; ++i)
    out[4 * thread_id() + i] = lds_32(A + 16 * (THREADS - 1 - thread_id()) + 4 * i);
}

ATTN_DEVICE void added(const Params& p, uint32_t A) {
  const int op = p.op;
  auto* out = reinterpret_cast<float*>(p.out);
  // ADD_FENCED_LATE: the warp that goes last after the barrier on the emulator, so that by then the
  // others have their late fences.
  const bool late = op == ADD_FENCED_LATE, early = thread_id() / 32 == 1;
  const bool issues = thread_id() == (late ? 32 : 0);
  const auto store = [&](float first) {
    for (int i = 0; i < 4; ++i)
      sts_f32(A + 16 * thread_id() + 4 * i, first + float(4 * thread_id() + i));
  };
  if (op == COPY_FENCED_EARLY) {
    cp_async_16(A + 16 * thread_id(), p.a_registers + 4 * thread_id(), true);
    cp_async_commit();
    fence_proxy_async();
    cp_async_wait<0>();
  } else {
    store(1.0f);
  }
  if (op == ADDED || op == ADD_REUSED || (late && early)) fence_proxy_async();
  sync_threads();  // every thread has stored
  if (late && !early) fence_proxy_async();
  if (issues) {
    bulk_add(out, A, 2048);
    bulk_commit();
    bulk_add(out, A, 1024);
    bulk_commit();
    if (op != ADD_REUSED) bulk_wait_read<0>();
  }
  sync_threads();  // the floats have been read
  store(7.0f);
  if (op == ADD_REUSED && issues) bulk_wait_read<0>();
}

// Every thread stores a word, arrives, and reads another's behind the barrier.
ATTN_DEVICE void passed(uint32_t A, uint32_t bar, uint32_t* out) {
  sts_32(A + 4 * thread_id(), uint32_t(5 * thread_id() + 1));
  mbarrier_arrive(bar);
  mbarrier_wait(bar, 0);
  out[thread_id()] = lds_32(A + 4 * (THREADS - 1 - thread_id()));
}

// What is added in each turn: 1 is lost in another order than that of the turns.
ATTN_DEVICE float term_of_turn(int turn) { return turn == 0 ? 1e8f : turn == 1 ? -1e8f : 1.0f; }

// Blocks take a ticket, wait for their turn, add 512 floats and pass the turn on.  out: the sums;
// behind 1024 words, for each turn, the word that ended the wait and the last 2 sums of then.
ATTN_DEVICE void in_turn(const Params& p, uint32_t A) {
  const int op = p.op;
  const uint32_t ticket = A + A_BYTES;
  if (thread_id() == 0) sts_32(ticket, uint32_t(atomic_add_global(p.words, 1)));
  sync_threads();  // the ticket is there
  const int turn = int(lds_32(ticket));
  for (int i = 0; i < 4; ++i) sts_f32(A + 16 * thread_id() + 4 * i, term_of_turn(turn));
  fence_proxy_async();
  sync_threads();  // every thread has stored
  if (thread_id() != 0) return;
  int found = op == TURN_UNWAITED ? turn : -1;
  for (int asked = 0; found != turn && asked < 1 << 20; ++asked) found = load_acquire(p.words + 1);
  if (op != TURN_UNFENCED) fence_proxy_async_global();  // the engine adds behind what was found
  bulk_add(reinterpret_cast<float*>(p.out), A, 2048);
  bulk_commit();
  if (op == TURN_UNRELEASED) {
    bulk_wait_read<0>();
  } else {
    bulk_wait<0>();
  }
  const U32x2 sums = ldg_64(p.out + 510);
  uint32_t* mine = p.out + 1024 + 4 * turn;
  mine[0] = uint32_t(found), mine[1] = sums.x, mine[2] = sums.y;
  store_release(p.words + 1, turn + 1);
}

// [64, 8 * COLUMNS]
template <class T, int COLUMNS>
ATTN_DEVICE void product_of(const Params& p, uint32_t A, uint32_t B) {
  float acc[COLUMNS][4] = {};
  uint32_t registers[4][4];
  for (int i = 0; i < 16; ++i) registers[i / 4][i % 4] = p.a_registers[16 * thread_id() + i];
  wgmma_hold(acc);
  wgmma_hold(registers);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t b = wgmma_descriptor(B + 32 * step);
    if constexpr (COLUMNS == 12)
      wgmma_rs<T, false>(acc, registers[step], b, true);
    else
      wgmma_ss<T, false>(acc, wgmma_descriptor(A + 32 * step), b, true);
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(acc);
  wgmma_hold(registers);
  for (int n = 0; n < COLUMNS; ++n)
    for (int i = 0; i < 4; ++i) p.out[(thread_id() * COLUMNS + n) * 4 + i] = as_uint(acc[n][i]);
}
template <class T>
ATTN_DEVICE void products_of_widths(const Params& p, uint32_t A, uint32_t B) {
  if (p.op == N32) product_of<T, 4>(p, A, B);
  if (p.op == N64) product_of<T, 8>(p, A, B);
  if (p.op == N96) product_of<T, 12>(p, A, B);
  if (p.op == N192) product_of<T, 24>(p, A, B);
  if (p.op == N256) product_of<T, 32>(p, A, B);
}

template <class T>
ATTN_DEVICE void products(const Params& p, uint32_t A, uint32_t B) {
  float acc[TILES][4];
  for (int n = 0; n < TILES; ++n)
    for (int i = 0; i < 4; ++i) acc[n][i] = float(n + i);
  wgmma_hold(acc);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint64_t a = wgmma_descriptor(A + 32 * step);
    const uint64_t across = wgmma_descriptor(B + 2048 * step, 64 * 128);
    if (p.op == SS_K || p.op == STORED || p.op == READERS_FENCE || p.op == UNFENCED)
      wgmma_ss<T, false>(acc, a, wgmma_descriptor(B + 32 * step), true);
    if (p.op == SS_MN) wgmma_ss<T, true>(acc, a, across, true);
    if (p.op == RS_MN) {
      const uint32_t* from = p.a_registers + 16 * thread_id() + 4 * step;
      const uint32_t registers[4] = {from[0], from[1], from[2], from[3]};
      wgmma_rs<T, true>(acc, registers, across, true);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_hold(acc);
  for (int n = 0; n < TILES; ++n)
    for (int i = 0; i < 4; ++i) p.out[(thread_id() * TILES + n) * 4 + i] = as_uint(acc[n][i]);
}

template <class T>
ATTN_KERNEL(128, 1)
void wrappers(ATTN_GRID_CONSTANT const Params p) {
  const uint32_t A = smem_base(), B = A + A_BYTES, bar = B + 2 * B_BYTES;
  const bool twice = p.op == N192 || p.op == N256;
  if (thread_id() == 0) {
    mbarrier_init(bar, 1);
    mbarrier_init(bar + 8, THREADS);
    fence_mbarrier_init();
    tma_prefetch(p.a);
  }
  sync_threads();  // the mbarrier is there
  if (thread_id() == 0) {
    mbarrier_arrive_expect_tx(bar,
                              p.op == BOX ? A_BYTES : A_BYTES + (twice ? 2 * B_BYTES : B_BYTES));
    if (p.op == BOX) {
      tma_load_4d(A, p.a, bar, 40, 30, 2, 1);
    } else {
      tma_load_4d(A, p.a, bar, 0, 0, 0, 0);
      tma_load_4d(B, p.b, bar, 0, 0, 0, 0);
      if (twice) tma_load_4d(B + B_BYTES, p.b, bar, 0, 0, 0, 0);
      if (p.op == SS_MN || p.op == RS_MN) tma_load_4d(B + 64 * 128, p.b, bar, 64, 0, 0, 0);
    }
  }
  mbarrier_wait(bar, 0);
  if (p.op == BOX) {
    for (int i = thread_id(); i < A_BYTES / 4; i += THREADS) p.out[i] = lds_32(A + 4 * i);
  } else if (p.op == VOTES) {
    uint32_t* out = p.out + 4 * thread_id();
    out[0] = elect_one();
    out[1] = named_barrier_or<3>(128, thread_id() == 77);
    out[2] = named_barrier_or<3>(128, false);
  } else if (p.op == TURNED || p.op == STRAIGHT) {
    sync_threads();  // every thread has waited for the loads
    turned(p.op, A, p.out);
  } else if (p.op == BOX_STORED || p.op == BOX_LANDS || p.op == BOX_LEFT) {
    store_box(p, A);
  } else if (p.op == LOADED_AGAIN || p.op == READ_UNFENCED || p.op == STORE_UNFENCED) {
    sync_threads();  // every thread has waited for the loads
    load_again(p, A, bar);
  } else if (p.op == PASSED) {
    sync_threads();  // every thread has waited for the loads
    passed(A, bar + 8, p.out);
  } else if (adds_in_turn(p.op)) {
    sync_threads();  // every thread has waited for the loads
    in_turn(p, A);
  } else if (p.op == ADDED || p.op > UNFENCED) {
    sync_threads();  // every thread has waited for the loads
    added(p, A);
  } else if (p.op >= N32 && p.op <= N256) {
    products_of_widths<T>(p, A, B);
  } else {
    if (p.op == STORED || p.op == READERS_FENCE || p.op == UNFENCED) store_again(p.op, B);
    products<T>(p, A, B);
  }
}

// Registers change hands as between the producer and the consumers of a kernel.
template <class T>
ATTN_KERNEL(384, 1)
void registers(ATTN_GRID_CONSTANT const Params p) {
  if (thread_id() < 128) {
    setmaxnreg_dec<24>();
  } else {
    setmaxnreg_inc<240>();
  }
  p.out[thread_id()] = uint32_t(thread_id() + 1);
}

#ifndef __CUDACC_RTC__
// ---- host: alloc(bytes), copy_in(to, from, bytes) and copy_out are those of the device
inline std::vector<uint16_t> tensor(bool is_bf16, int64_t n, int seed) {
  std::vector<uint16_t> x(n);
  // -4 .. 4 in each format
  static const uint16_t BF16[] = {0xc080, 0xc040, 0xc000, 0xbf80, 0,
                                  0x3f80, 0x4000, 0x4040, 0x4080};
  static const uint16_t FP16[] = {0xc400, 0xc200, 0xc000, 0xbc00, 0,
                                  0x3c00, 0x4000, 0x4200, 0x4400};
  for (int64_t i = 0; i < n; ++i) x[i] = (is_bf16 ? BF16 : FP16)[(7919 * i + seed) % 9];
  return x;
}

struct Memory {
  void* (*alloc)(size_t);
  void (*copy_in)(void*, const void*, size_t);
  void (*copy_out)(void*, const void*, size_t);
};

inline TensorSpec spec(void* base, bool is_bf16, int64_t columns, int64_t rows, int64_t heads,
                       int64_t batch, int box_rows) {
  return {base,
          is_bf16,
          {columns, rows, heads, batch},
          {2 * columns, 2 * columns * rows, 2 * columns * rows * heads},
          {64, box_rows, 1, 1}};
}

inline std::vector<uint32_t> run(const Memory& memory, int op, bool is_bf16) {
  const bool box = op == BOX;
  const auto a = tensor(is_bf16, box ? 72 * 50 * 5 * 3 : 64 * 64, 1);
  const auto b = tensor(is_bf16, 128 * 64, 2);
  // A in registers: row 16 w + g (+ 8), columns 16 step + 2 t (+ 8) and the one after
  std::vector<uint32_t> in_registers(THREADS * 16), out(OUT), words(2);
  for (int t = 0; t < THREADS && !box; ++t)
    for (int i = 0; i < 16; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + 8 * (i & 1);
      const int column = i / 4 * 16 + 2 * (t % 4) + 8 * (i / 2 % 2);
      in_registers[t * 16 + i] = a[row * 64 + column] | uint32_t(a[row * 64 + column + 1]) << 16;
    }
  void* device[5];
  const std::pair<const void*, size_t> from[5] = {{a.data(), 2 * a.size()},
                                                  {b.data(), 2 * b.size()},
                                                  {in_registers.data(), 4 * in_registers.size()},
                                                  {out.data(), 4 * out.size()},
                                                  {words.data(), 4 * words.size()}};
  for (int i = 0; i < 5; ++i) {
    device[i] = memory.alloc(from[i].second);
    memory.copy_in(device[i], from[i].first, from[i].second);
  }
  const TensorSpec a_spec =
      box ? spec(device[0], is_bf16, 72, 50, 5, 3, 64) : spec(device[0], is_bf16, 64, 64, 1, 1, 64);
  const bool across = op == SS_MN || op == RS_MN;
  const TensorSpec b_spec = across ? spec(device[1], is_bf16, 128, 64, 1, 1, 64)
                                   : spec(device[1], is_bf16, 64, 128, 1, 1, 128);
  TensorSpec stored = spec(device[3], is_bf16, 56, 50, 2, 1, 64);
  for (int i = 0; i < 3; ++i) stored.stride[i] = i ? 50 * 128 * (i == 1 ? 1 : 2) : 128;
  Params p{op,
           make_tensor_map(a_spec),
           make_tensor_map(b_spec),
           make_tensor_map(stored),
           static_cast<const uint32_t*>(device[2]),
           static_cast<uint32_t*>(device[3]),
           static_cast<int*>(device[4])};
  if (op == REGISTERS)
    launch(is_bf16 ? registers<bf16> : registers<fp16>, {1, 1, 1}, 384, 0, nullptr, p);
  else
    launch(is_bf16 ? wrappers<bf16> : wrappers<fp16>, {adds_in_turn(op) ? BLOCKS : 1, 1, 1},
           THREADS, SMEM, nullptr, p);
  memory.copy_out(out.data(), device[3], 4 * out.size());
  return out;
}
#endif  // __CUDACC_RTC__

}  // namespace attn::hopper
