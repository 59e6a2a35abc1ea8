// One emulated CUDA device: runs the blocks of a launch one after the other, the threads of a block
// as fibers of one OS thread.
//
// A block may wait for what another stores (load_acquire).  It can rely on blocks only that have
// begun before it: where none of these can run, the launch ends with an Error.  In random mode two
// to four blocks are under way at a time and change places where they add to global memory, store a
// box there, or store and load so; elsewhere one is.
//
// A warp collective (mma, ldmatrix, shuffle, barrier) is a rendezvous: each lane leaves a pointer
// to its arguments, the last lane to arrive computes for all 32 and goes on, the others become
// ready. Kind and source line must agree over the lanes; else, and when nothing can run any more,
// the launch ends with an Error that names the lines.
//
// Modes (Mode): plain = fixed order, copies land at once; random = warps run by random priorities,
// blocks in random order, copies land at random; poison = shared memory starts as NaN and a copy's
// target is NaN from issue to wait; race = the detector of shadow.h; banks = counts bank conflicts
// of every shared access (ldmatrix is always counted).
#pragma once
#include <csetjmp>
#include <cstdio>
#include <csignal>
#include <array>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../cuda/ptx_types.h"
#include "async_queue.h"
#include "exported.h"
#include "fiber.h"
#include "shadow.h"
#include "warpgroup.h"

ATTN_EXPORTED_BEGIN
namespace attn::emulation {

constexpr int MAX_THREADS = 32 * MAX_WARPS, BARRIERS = 16, MOST_RESIDENT = 4;
constexpr uint32_t SMEM_BASE = 0x400, FULL_WARP = 0xffffffffu;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Mode {
  bool random = false, poison = false, race = false, banks = false;
  // Whether blocks that add to one place must do so in an order that release and acquire make.
  bool ordered = false;
  bool repairs = true;  // false: what a missing wait made NaN stays so (../cuda/repair.cuh)
  // Whether loads need a fence after the mbarrier's initialisation, not only a barrier: our own
  // rule, as CUTLASS has it.  Triton leaves the fence out (docs/design/emulation.md).
  bool init_fences = true;
  int shadow_unit = 4;  // bytes that the race detector tells apart; ours store none narrower
  uint64_t seed = 0;
  int smem_limit = 163 * 1024;  // bytes a block may have: sm_80; 227 KiB on sm_90, 99 on sm_120
  int grid_limit = 65535;       // blocks along y and z; less, so that a test needs not so many
};

enum class Kind : uint8_t {
  NONE,
  SYNC_WARP,
  SYNC_THREADS,
  BARRIER_SYNC,
  BARRIER_ARRIVE,
  SHUFFLE,
  BALLOT,
  LDMATRIX,
  LDMATRIX_TRANS,
  STMATRIX,
  STMATRIX_TRANS,
  MMA,
  MMA_TF32,
  ELECT,
  SETMAXNREG,
  WGMMA,
  WGMMA_FENCE,
  WGMMA_COMMIT,
  WGMMA_WAIT,
};
const char* name(Kind kind);
std::string hex(uint64_t v);  // "0x..."

// 16 or 4 bytes on their way to shared memory; the source is read at issue.
struct Copy {
  uint32_t address;
  int bytes;
  bool landed;
  Where where;
  uint8_t data[16];
};

struct Thread {
  Context context;
  AsyncQueue<Copy> copies;
  AsyncQueue<BulkWrite> writes;
  std::vector<BulkWrite> landing;  // writes that have been read and not waited for
  Where last;                      // the last wrapper that this thread called
  int mbarrier = -1;               // the one that it waits at
  // The place that it loads again and again, what it finds there, how often it has, and whether it
  // sleeps until that changes.
  const int* watched = nullptr;
  int found = 0, asked = 0;
  bool asleep = false;
  // Additions issued, those that are complete, and what is known of those of other threads: by the
  // thread, and by the copy engine since the thread's last fence_proxy_async_global.
  uint32_t issued = 0, complete = 0;
  std::map<uint64_t, uint32_t> known = {}, known_to_engine = {};
};

struct Warp {
  uint32_t arrived, ready, exited;
  Kind kind;
  int barrier;  // the named barrier that all lanes wait at, or -1
  Where where;
  void* args[32];
  WarpClock clock;
  uint64_t priority;
};

struct Barrier {
  int arrived = 0, expected = 0;
  bool flag = false, result = false;  // of named_barrier_or: this round's, the last one's
  WarpClock clock;
};

// Accesses to shared memory from one source line: wavefronts == ideal means no bank conflict.
struct BankCount {
  int64_t requests = 0, wavefronts = 0, ideal = 0;
};

using ptx::Grid;

// Accesses of lds and sts from one line: the i-th access of each lane forms request i.
struct SiteLog {
  int bytes = 0;
  std::array<std::vector<uint32_t>, 32> lanes;
};

// All that one block has.
struct BlockState {
  Grid block;
  int slot_ = 0, current_ = 0, alive_ = 0;
  uint64_t seen_ = 0;  // stores of all blocks when it parked; NEVER: it may go on at any time
  std::vector<Thread> fibers_;
  std::array<Warp, MAX_WARPS> warps_;
  std::array<Barrier, BARRIERS> barriers_;
  std::vector<Mbarrier> mbarriers_;
  std::vector<TmaLoad> loads_;
  std::array<WarpgroupWarp, MAX_WARPS> wgmma_;
  std::array<std::vector<WgmmaSignature>, MAX_WARPS / 4> wgmma_log_;  // what a warpgroup issued
  std::vector<uint8_t> smem_;
  Shadow shadow_;
  std::map<std::pair<int, uint64_t>, SiteLog> access_log_;  // by (warp, line)
  static constexpr uint64_t NEVER = ~uint64_t(0);
};

class Machine : BlockState {
 public:
  using BlockState::block;
  Mode mode;
  Grid grid;
  int threads = 0, smem_bytes = 0;
  int64_t launches = 0, wgmmas = 0;     // wgmmas: of warps
  std::map<uint64_t, BankCount> banks;  // by Where::packed()

  // Runs `body` once per thread of the grid.  Throws Error, or what the body threw.
  void launch(Grid grid, int threads, int smem_bytes, void (*body)(void*), void* argument);

  int thread() const { return current_; }
  // Checks one access of the current thread; the bytes, valid until the next wrapper call.
  uint8_t* access(Access access, uint32_t address, int bytes, Where where);
  // Stores; by the rules of compiled PTX, by which threads may store the same bytes unordered.
  void store(uint32_t address, const void* from, int bytes, Where where);
  // Rendezvous of the current warp; `execute` gets the 32 arguments.
  void collective(Kind kind, void* argument, Where where, void (*execute)(void* const* arguments));
  // ldmatrix reads for the whole warp: 8 rows of 16 bytes a phase.
  const uint8_t* matrix_row(uint32_t address, Where where);
  // stmatrix writes so, each row for the lane that gave its address.
  // repeats: by those rules, by which rows of equal bytes may share an address.
  void store_matrix_row(int lane, uint32_t address, const uint16_t (&row)[8], bool repeats,
                        Where where);
  void count_phase(const uint32_t* addresses, int lanes, int bytes, Where where);
  void sync_warp(Where where);
  void barrier(int id, int threads, bool wait, Where where);

  void copy_issue(uint32_t address, const void* source, int bytes, bool valid, Where where);
  void copy_commit(Where where);
  void copy_wait(int keep, Where where);

  // Words of global memory by which blocks wait for each other.
  int load_acquire(const int* p, Where where);
  void store_release(int* p, int value, Where where);
  // Which of the blocks that are under way this is, below MOST_RESIDENT.
  int slot() const { return slot_; }

  // ---- sm_90 (machine_sm90.cpp)
  void mbarrier_init(uint32_t address, int count, Where where);
  void mbarrier_arrive(uint32_t address, int expect_bytes, Where where);
  void mbarrier_wait(uint32_t address, uint32_t parity, Where where);
  bool would_wait(uint32_t address, uint32_t parity, Where where);
  void mbarrier_inval(uint32_t address, Where where);
  void fence_mbarrier_init(Where where);
  void fence_proxy_async(Where where);
  void tma_load(uint32_t address, const ptx::TensorMap& map, uint32_t bar,
                std::array<int, 4> corner, Where where);
  void tma_store(const ptx::TensorMap& map, uint32_t address, std::array<int, 4> corner,
                 Where where);
  void bulk_add(float* gmem, uint32_t address, int bytes, Where where);
  void bulk_commit(Where where);
  void bulk_wait_read(int keep, Where where);
  void bulk_wait(int keep, Where where);
  bool barrier_or(int id, int threads, bool flag, Where where);
  void fence_proxy_async_global(Where where);
  void set_registers(int registers, bool more, Where where);  // more: setmaxnreg.inc, else .dec
  void wgmma(const WgmmaCall& call, Where where);
  void wgmma_fence(Where where);
  void wgmma_commit(Where where);
  void wgmma_wait(int keep, Where where);
  // Whether some wgmma of the current warp that no wait has retired adds to these of lane 0.
  bool wgmma_in_flight(const float* acc) const;

  [[noreturn]] void fail(Where where, const std::string& what) const;
  uint64_t random();  // splitmix64

 private:
  void check_launch(Grid grid, int threads, int smem_bytes) const;
  void begin_block(Grid id, int slot);
  void go_on();  // the current block, until it ends or parks
  void end_block();
  void park(bool willing);  // back to launch(); other blocks run until this one goes on
  void maybe_park();
  bool wake();        // threads that sleep until a word changes, where it has
  int next_thread();  // pick(), and others' turn where nobody can run
  std::string waiting_blocks() const;
  void fiber_body();
  static void fiber_entry();
  void on_exit();
  bool arrive(Kind kind, void* argument, Where where);  // true for the last lane
  void sleep();                                         // the current fiber waits to be made ready
  void maybe_preempt();
  int pick();
  int pick_warp() const;
  void resume(int thread);
  void release(int id);
  std::string deadlock_report() const;
  void race(const std::string& report) const;
  // From the base of shared memory; Error by the name `what` where the bytes do not lie within.
  uint32_t offset_of(const char* what, uint32_t address, int bytes, int multiple,
                     Where where) const;
  void land(Copy& copy);
  void log_access(uint32_t address, int bytes, Where where);
  void flush_access_log();
  static void on_fault(int signal, siginfo_t* info, void* context);

  Mbarrier& mbarrier_at(uint32_t address, Where where);
  void settle(int index);       // ends the phase of an mbarrier when nothing is missing
  void tma_land(size_t index);  // one of the loads that are under way
  bool tma_land_some();         // false: there is none
  TmaBox box_at(const char* what, uint32_t address, const ptx::TensorMap& map,
                std::array<int, 4> corner, Where where) const;
  // move(element behind `shared`, where the box lies, the same of the tensor or null: outside of
  // it, bytes)
  template <class Move>
  void each_element(const TmaBox& box, uint8_t* shared, const Move& move);
  uint32_t box_offset(const TmaBox& box, int row, int chunk) const;
  uint64_t thread_name() const;  // in the grid
  void issue_write(BulkWrite op);
  void read_write(BulkWrite& op);
  void land_write(BulkWrite& op);
  void check_end_of_block();
  void check_mbarriers(uint32_t address, int bytes, Where where) const;
  int clocks() const { return warp_count_ + int(mbarriers_.size()); }
  void issue_wgmma(void* const* calls, Where where);
  void finish_wgmma(WarpgroupWarp& warp, WgmmaOp& op);
  const uint8_t* operand(uint32_t address, Where where);

  std::mutex mutex_;
  StackPool stacks_;
  Context main_;
  int warp_count_ = 0;
  uint64_t stores_ = 0;  // by store_release, in this launch
  // Of each place that blocks add to, the last addition: by which thread, the how manieth of its.
  struct Added {
    uint64_t thread;
    uint32_t number;
    Where where;
  };
  std::map<const float*, Added> added_;
  std::map<const int*, std::map<uint64_t, uint32_t>> released_;  // what is known with each word
  std::vector<std::unique_ptr<BlockState>> parked_;
  enum class Parking { NO, WAITS, WILLING } parking_ = Parking::NO;
  uint64_t rng_ = 0;
  void (*body_)(void*) = nullptr;
  void* argument_ = nullptr;
  std::exception_ptr error_;
  sigjmp_buf fault_jump_;
  std::string fault_text_;
};

extern Machine machine;

// What runs in place of a kernel: a function of the address of its parameters.  Null: the kernel.
using Body = void (*)(void*);
// Asked at each launch while it is set (bindings.cpp).
extern Body (*replacement)(const void* kernel);

}  // namespace attn::emulation
ATTN_EXPORTED_END
