#include "machine.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <numeric>

namespace attn::emulation {

Machine machine;
Body (*replacement)(const void*) = nullptr;

namespace {

pthread_t launching_thread;
volatile sig_atomic_t launching = 0;

std::string triple(Grid g) {
  return "(" + std::to_string(g.x) + ", " + std::to_string(g.y) + ", " + std::to_string(g.z) + ")";
}

// While a launch runs, a wild global pointer, a stack overflow or a division by zero in a kernel
// ends the launch, not the process.
class FaultGuard {
 public:
  explicit FaultGuard(void (*handler)(int, siginfo_t*, void*)) : stack_(64 * 1024) {
    stack_t alternate = {};
    alternate.ss_sp = stack_.data();
    alternate.ss_size = stack_.size();
    sigaltstack(&alternate, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = handler;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &action, &old_[i]);
    launching_thread = pthread_self();
    launching = 1;
  }
  ~FaultGuard() {
    launching = 0;
    restore();
    sigaltstack(&old_stack_, nullptr);
  }
  static void restore() {
    for (int i = 0; i < 3; ++i) sigaction(SIGNALS[i], &old_[i], nullptr);
  }

 private:
  static constexpr int SIGNALS[3] = {SIGSEGV, SIGBUS, SIGFPE};
  static inline struct sigaction old_[3];
  std::vector<uint8_t> stack_;
  stack_t old_stack_;
};

}  // namespace

const char* name(Kind kind) {
  switch (kind) {
    case Kind::NONE:
      return "nothing";
    case Kind::SYNC_WARP:
      return "sync_warp";
    case Kind::SYNC_THREADS:
      return "sync_threads";
    case Kind::BARRIER_SYNC:
      return "named_barrier_sync";
    case Kind::BARRIER_ARRIVE:
      return "named_barrier_arrive";
    case Kind::SHUFFLE:
      return "shuffle";
    case Kind::BALLOT:
      return "ballot";
    case Kind::LDMATRIX:
      return "ldmatrix";
    case Kind::LDMATRIX_TRANS:
      return "ldmatrix_trans";
    case Kind::STMATRIX:
      return "stmatrix";
    case Kind::STMATRIX_TRANS:
      return "stmatrix_trans";
    case Kind::MMA:
      return "mma";
    case Kind::MMA_TF32:
      return "mma_tf32";
    case Kind::ELECT:
      return "elect_one";
    case Kind::SETMAXNREG:
      return "setmaxnreg";
    case Kind::WGMMA:
      return "wgmma";
    case Kind::WGMMA_FENCE:
      return "wgmma_fence";
    case Kind::WGMMA_COMMIT:
      return "wgmma_commit";
    case Kind::WGMMA_WAIT:
      return "wgmma_wait";
  }
  return "?";
}

uint64_t Machine::random() {
  uint64_t z = (rng_ += 0x9E3779B97F4A7C15ull);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}

void Machine::fail(Where where, const std::string& what) const {
  throw Error(where.text() + ": " + what + " [thread " + std::to_string(current_) + " (warp " +
              std::to_string(current_ / 32) + " lane " + std::to_string(current_ % 32) +
              ") of block " + triple(block) + "]");
}

// ---- launch -----------------------------------------------------------------------------------
void Machine::check_launch(Grid g, int t, int bytes) const {
  if (g.x < 1 || g.y < 1 || g.z < 1 || g.y > mode.grid_limit || g.z > mode.grid_limit) {
    throw Error("launch: each side of the grid must be at least 1, y and z at most " +
                std::to_string(mode.grid_limit) + ", got " + triple(g));
  }
  if (t < 32 || t > MAX_THREADS || t % 32 != 0) {
    throw Error("launch: threads a block must be a multiple of 32, at most 1024, got " +
                std::to_string(t));
  }
  if (bytes < 0 || bytes > mode.smem_limit) {
    throw Error("launch: shared memory must be at most " + std::to_string(mode.smem_limit) +
                " bytes a block, got " + std::to_string(bytes));
  }
}

void Machine::launch(Grid g, int t, int bytes, void (*body)(void*), void* argument) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_launch(g, t, bytes);
  grid = g, threads = t, smem_bytes = bytes;
  body_ = body, argument_ = argument;
  warp_count_ = t / 32;
  ++launches;
  rng_ = mode.seed * 0xD1342543DE82EF95ull + 1;
  const int64_t blocks = int64_t(g.x) * g.y * g.z;
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (mode.random) {
    for (int64_t i = blocks - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
  }
  error_ = nullptr;
  stores_ = 0;
  added_.clear(), released_.clear(), parked_.clear();
  const size_t most = mode.random ? 2 + random() % (MOST_RESIDENT - 1) : 1;
  stacks_.reserve(t * int(most));
  {
    const FaultGuard guard(on_fault);
    int64_t next = 0;
    while (!error_ && (next < blocks || !parked_.empty())) {
      std::vector<size_t> able;  // of those that are parked
      for (size_t i = 0; i < parked_.size(); ++i)
        if (parked_[i]->seen_ != stores_) able.push_back(i);
      const bool begins = next < blocks && parked_.size() < most;
      const size_t choices = able.size() + size_t(begins);
      if (!choices) {
        error_ = std::make_exception_ptr(Error(waiting_blocks()));
        break;
      }
      const size_t choice = mode.random ? size_t(random() % choices) : 0;
      if (choice < able.size()) {
        std::swap(static_cast<BlockState&>(*this), *parked_[able[choice]]);
        parked_.erase(parked_.begin() + int64_t(able[choice]));
      } else {
        const int64_t i = order[size_t(next++)];
        uint32_t taken = 0;
        for (const auto& other : parked_) taken |= 1u << other->slot_;
        begin_block({int(i % g.x), int(i / g.x % g.y), int(i / g.x / g.y)}, __builtin_ctz(~taken));
      }
      go_on();
      if (parking_ == Parking::NO) continue;
      seen_ = std::exchange(parking_, Parking::NO) == Parking::WILLING ? NEVER : stores_;
      parked_.push_back(std::make_unique<BlockState>());
      std::swap(static_cast<BlockState&>(*this), *parked_.back());
    }
  }
  access_log_.clear(), parked_.clear();
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Machine::begin_block(Grid id, int slot) {
  block = id, slot_ = slot;
  if (int(fibers_.size()) < threads) fibers_.resize(size_t(threads));
  smem_.assign(size_t(smem_bytes) + 16, mode.poison ? 0xff : 0);
  if (mode.race) shadow_.reset(smem_bytes, warp_count_, mode.shadow_unit);
  for (Barrier& b : barriers_) b = Barrier{};
  mbarriers_.clear(), loads_.clear();
  for (int w = 0; w < warp_count_; ++w) wgmma_[w] = WarpgroupWarp{}, wgmma_log_[w / 4].clear();
  for (int w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    warp.arrived = warp.exited = 0;
    warp.ready = FULL_WARP;
    warp.barrier = -1;
    warp.clock = WarpClock{};
    warp.clock.at[w] = 1;
    warp.priority = random();
  }
  for (int t = 0; t < threads; ++t) {
    fibers_[t] = Thread{};
    stacks_.prepare(fibers_[t].context, slot * threads + t, fiber_entry);
  }
  alive_ = threads;
  current_ = mode.random ? pick_warp() * 32 : 0;
  resume(current_);
}

void Machine::go_on() {
  // The handler of a fault jumps back here, off the fiber's stack.
  if (sigsetjmp(fault_jump_, 1) == 0) {
    switch_context(main_, fibers_[current_].context);
  } else {
    error_ = std::make_exception_ptr(Error(fault_text_));
  }
  if (parking_ == Parking::NO) end_block();
}

void Machine::end_block() {
  if (!error_) {
    try {
      for (int t = 0; t < threads; ++t)
        for (BulkWrite& op : fibers_[t].landing) land_write(op);
      check_end_of_block();
    } catch (...) {
      error_ = std::current_exception();
    }
  }
  if (mode.banks && !error_) flush_access_log();
}

void Machine::on_fault(int signal, siginfo_t* info, void*) {
  if (!launching || !pthread_equal(pthread_self(), launching_thread)) {
    FaultGuard::restore();  // not ours: the instruction runs again and meets the old handler
    return;
  }
  Machine& m = machine;
  const std::string who = " [thread " + std::to_string(m.current_) + " of block " +
                          triple(m.block) + ", last wrapper called at " +
                          m.fibers_[m.current_].last.text() + "]";
  char address[32];
  snprintf(address, sizeof(address), "%p", info->si_addr);
  if (signal == SIGFPE) {
    m.fault_text_ = "integer division by zero or overflow in a kernel" + who;
  } else if (m.stacks_.guard_hit(info->si_addr) >= 0) {
    m.fault_text_ = "a kernel thread needs more than 256 KiB of stack" + who;
  } else {
    m.fault_text_ = std::string("global memory access at ") + address + " is not mapped" + who;
  }
  siglongjmp(m.fault_jump_, 1);
}

// ---- fibers -----------------------------------------------------------------------------------
void Machine::fiber_entry() { machine.fiber_body(); }

void Machine::fiber_body() {
  try {
    body_(argument_);
    on_exit();
  } catch (...) {
    error_ = std::current_exception();
  }
  const int next = error_ || alive_ == 0 ? -1 : next_thread();
  if (next < 0) {
    if (!error_ && alive_ > 0) error_ = std::make_exception_ptr(Error(deadlock_report()));
    switch_context(fibers_[current_].context, main_);
  }
  const int self = current_;
  resume(next);
  switch_context(fibers_[self].context, fibers_[next].context);
}

// Barriers wait for the threads that have not returned.
void Machine::on_exit() {
  Thread& self = fibers_[current_];
  if (!self.copies.pending().empty()) {
    fail(self.copies.pending().front().where,
         "a thread returns while what it copies here is in "
         "flight: no cp_async_commit and cp_async_wait<0>");
  }
  if (!self.writes.pending().empty())
    fail(self.writes.pending().front().where,
         "a thread returns while what it adds or stores here is still being read: no bulk_commit "
         "and bulk_wait_read<0>");
  Warp& warp = warps_[current_ / 32];
  warp.exited |= 1u << (current_ % 32);
  --alive_;
  if (warp.exited == FULL_WARP && alive_ > 0 && barriers_[0].arrived == alive_) release(0);
}

// Marks the thread as running.
void Machine::resume(int thread) {
  current_ = thread;
  warps_[thread / 32].ready &= ~(1u << (thread % 32));
}

int Machine::pick_warp() const {
  int best = -1;
  const int here = current_ / 32;
  for (int i = 0; i < warp_count_; ++i) {
    const int w = (here + i) % warp_count_;
    if (!warps_[w].ready) continue;
    if (!mode.random) return w;
    if (best < 0 || warps_[w].priority > warps_[best].priority) best = w;
  }
  return best;
}

// The next thread to run, or -1.  When none can, what the copy engine loads lands.
int Machine::pick() {
  int w = current_ / 32;
  if (mode.random && !loads_.empty() && (random() & 3) == 0) tma_land_some();
  if (!warps_[w].ready) w = pick_warp();
  while (w < 0 && (tma_land_some() || wake())) w = pick_warp();
  if (w < 0) return -1;
  const uint32_t ready = warps_[w].ready;
  if (!mode.random) return w * 32 + __builtin_ctz(ready);
  const int start = int(random() & 31);
  const uint32_t rotated = (ready >> start) | (ready << ((32 - start) & 31));
  return w * 32 + ((start + __builtin_ctz(rotated)) & 31);
}

void Machine::sleep() {
  const int self = current_, next = next_thread();
  if (next < 0) throw Error(deadlock_report());
  resume(next);
  // A load that landed meanwhile may be what this thread waited for.
  if (next != self) switch_context(fibers_[self].context, fibers_[next].context);
}

int Machine::next_thread() {
  int next = pick();
  while (next < 0 && std::any_of(
                         fibers_.begin(), fibers_.begin() + threads,
                         [](const Thread& thread) { return thread.asleep; })) {
    park(false);
    next = pick();
  }
  return next;
}

void Machine::park(bool willing) {
  parking_ = willing ? Parking::WILLING : Parking::WAITS;
  switch_context(fibers_[current_].context, main_);
}
void Machine::maybe_park() {
  if (mode.random && (random() & 1)) park(true);
}

// In random mode another warp may go first after a collective.
void Machine::maybe_preempt() {
  if (!mode.random) return;
  const uint64_t draw = random();
  if (draw & 3) return;
  if ((draw & 28) == 0) {
    for (int w = 0; w < warp_count_; ++w) warps_[w].priority = random();
  }
  const int self = current_;
  warps_[self / 32].ready |= 1u << (self % 32);
  const int w = pick_warp();
  const int next = w == self / 32 ? self : w * 32 + __builtin_ctz(warps_[w].ready);
  resume(next);
  if (next != self) switch_context(fibers_[self].context, fibers_[next].context);
}

// ---- rendezvous -------------------------------------------------------------------------------
bool Machine::arrive(Kind kind, void* argument, Where where) {
  const int lane = current_ % 32;
  Warp& warp = warps_[current_ / 32];
  fibers_[current_].last = where;
  if (!warp.arrived) {
    warp.kind = kind;
    warp.where = where;
  } else if (warp.kind != kind || warp.where != where) {
    fail(where, std::string("divergent warp: this lane calls ") + name(kind) +
                    ", but others of its warp wait in " + name(warp.kind) + " at " +
                    warp.where.text());
  }
  warp.args[lane] = argument;
  warp.arrived |= 1u << lane;
  if (warp.arrived != FULL_WARP) return false;
  warp.arrived = 0;
  return true;
}

void Machine::collective(Kind kind, void* argument, Where where,
                         void (*execute)(void* const* arguments)) {
  if (!arrive(kind, argument, where)) return sleep();
  Warp& warp = warps_[current_ / 32];
  execute(warp.args);
  warp.ready |= FULL_WARP & ~(1u << (current_ % 32));
  maybe_preempt();
}

void Machine::sync_warp(Where where) {
  if (!arrive(Kind::SYNC_WARP, nullptr, where)) return sleep();
  Warp& warp = warps_[current_ / 32];
  ++warp.clock.warp_syncs;
  warp.ready |= FULL_WARP & ~(1u << (current_ % 32));
  maybe_preempt();
}

void Machine::barrier(int id, int count, bool wait, Where where) {
  const Kind kind = id == 0 ? Kind::SYNC_THREADS : wait ? Kind::BARRIER_SYNC : Kind::BARRIER_ARRIVE;
  if (!arrive(kind, nullptr, where)) return sleep();
  const int w = current_ / 32;
  Warp& warp = warps_[w];
  Barrier& b = barriers_[id];
  if (id != 0) {
    if (count < 32 || count % 32 != 0 || count > threads) {
      fail(where, "a named barrier takes a multiple of 32 threads of the block, got " +
                      std::to_string(count));
    }
    if (b.arrived && b.expected != count) {
      fail(where, "named barrier " + std::to_string(id) + ": " + std::to_string(count) +
                      " threads here, " + std::to_string(b.expected) + " where others arrived");
    }
  }
  b.expected = id == 0 ? alive_ : count;
  b.arrived += 32;
  b.clock.join(warp.clock, clocks());
  ++warp.clock.warp_syncs;
  if (wait) {
    warp.barrier = id;
  } else {
    ++warp.clock.at[w];
    warp.ready |= FULL_WARP;
  }
  if (b.arrived >= b.expected) release(id);
  // This lane is among the ready ones when its warp may go on.
  if (warp.ready & (1u << (current_ % 32))) {
    resume(current_);
    return maybe_preempt();
  }
  sleep();
}

void Machine::release(int id) {
  Barrier& b = barriers_[id];
  for (int w = 0; w < warp_count_; ++w) {
    Warp& warp = warps_[w];
    if (warp.barrier != id) continue;
    warp.barrier = -1;
    warp.ready = FULL_WARP & ~warp.exited;
    warp.clock.join(b.clock, clocks());
    ++warp.clock.at[w];
  }
  const bool result = b.flag;
  b = Barrier{};
  b.result = result;
}

std::string Machine::waiting_blocks() const {
  std::string text = "deadlock: blocks wait for what none of those that have begun will store";
  for (const auto& other : parked_)
    for (int t = 0; t < threads; ++t) {
      const Thread& thread = other->fibers_[t];
      if (thread.asleep)
        text += "\n  thread " + std::to_string(t) + " of block " + triple(other->block) +
                " waits at " + thread.last.text() + ", where it finds " +
                std::to_string(thread.found);
    }
  return text;
}

std::string Machine::deadlock_report() const {
  std::string text = "deadlock in block " + triple(block) + ": no thread can run";
  for (int w = 0; w < warp_count_; ++w) {
    const Warp& warp = warps_[w];
    text += "\n  warp " + std::to_string(w) + ": ";
    const int exited = __builtin_popcount(warp.exited);
    int waiting = -1;  // a lane at an mbarrier
    for (int lane = 0; lane < 32; ++lane)
      if (fibers_[w * 32 + lane].mbarrier >= 0) waiting = w * 32 + lane;
    if (waiting >= 0) {
      const Mbarrier& bar = mbarriers_[fibers_[waiting].mbarrier];
      text += "waits at " + fibers_[waiting].last.text() + " for the mbarrier of " +
              bar.where.text() + " at address " + std::to_string(bar.address) + " (" +
              std::to_string(bar.phase) + " phases are over; " + std::to_string(bar.pending) +
              " arrivals and " + std::to_string(bar.bytes) + " bytes are missing)";
    } else if (warp.barrier >= 0) {
      const Barrier& b = barriers_[warp.barrier];
      text += "waits at " + warp.where.text() + " (barrier " + std::to_string(warp.barrier) + ": " +
              std::to_string(b.arrived) + " of " + std::to_string(b.expected) +
              " threads have arrived)";
    } else if (warp.arrived) {
      text += std::to_string(__builtin_popcount(warp.arrived)) + " lanes wait in " +
              name(warp.kind) + " at " + warp.where.text() + ", " + std::to_string(exited) +
              " have returned";
    } else {
      text += exited == 32 ? "has returned" : "runs";
    }
  }
  return text;
}

}  // namespace attn::emulation
