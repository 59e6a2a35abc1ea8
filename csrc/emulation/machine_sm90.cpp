// mbarriers, the copy engine and the rest of sm_90 on the emulated device (wgmma: wgmma.cpp).
#include <algorithm>
#include <cstring>
#include <limits>

#include "machine.h"

namespace attn::emulation {

// ---- mbarriers --------------------------------------------------------------------------------
void Machine::mbarrier_init(uint32_t address, int count, Where where) {
  access(Access::WRITE, address, 8, where);
  if (count < 1 || count >= 1 << 20)
    fail(where, "mbarrier_init: the count must be in 1 .. 2^20 - 1, got " + std::to_string(count));
  if (clocks() >= MAX_CLOCKS)
    fail(where, "mbarrier_init: more mbarriers than the emulator can tell");
  mbarriers_.push_back({address, count, count, 0, 0, 0, 0, false, current_, 1, {}, {}, where});
}

Mbarrier& Machine::mbarrier_at(uint32_t address, Where where) {
  fibers_[current_].last = where;
  for (Mbarrier& bar : mbarriers_) {
    if (bar.address != address) continue;
    if (mode.race) {
      const Actor who = {current_ / 32, current_ % 32, where};
      race(shadow_.read(who, warps_[who.warp].clock, address - SMEM_BASE, 8));
    }
    return bar;
  }
  fail(where, "no mbarrier was initialised at shared address " + hex(address));
}

// An mbarrier is opaque: its bytes belong to nobody else.
void Machine::check_mbarriers(uint32_t address, int bytes, Where where) const {
  for (const Mbarrier& bar : mbarriers_)
    if (address < bar.address + 8 && bar.address < address + uint32_t(bytes))
      fail(where, "access to the bytes of the mbarrier that " + bar.where.text() + " initialised");
}

void Machine::settle(int index) {
  Mbarrier& bar = mbarriers_[index];
  if (bar.pending || bar.bytes) return;
  bar.completed.join(bar.arriving, clocks());
  bar.completed.at[warp_count_ + index] = bar.clock++;
  bar.pending = bar.expected;
  ++bar.phase;
  for (int t = 0; t < threads; ++t) {
    if (fibers_[t].mbarrier != index) continue;
    fibers_[t].mbarrier = -1;
    warps_[t / 32].ready |= 1u << (t % 32);
  }
}

void Machine::mbarrier_arrive(uint32_t address, int expect_bytes, Where where) {
  Mbarrier& bar = mbarrier_at(address, where);
  Warp& warp = warps_[current_ / 32];
  if (!bar.pending) fail(where, "mbarrier: more arrivals than its count in one phase");
  bar.bytes += expect_bytes;
  bar.arriving.join(warp.clock, clocks());
  ++warp.clock.at[current_ / 32];
  --bar.pending;
  settle(int(&bar - mbarriers_.data()));
}

void Machine::mbarrier_wait(uint32_t address, uint32_t parity, Where where) {
  const int index = int(&mbarrier_at(address, where) - mbarriers_.data());
  if (parity > 1) fail(where, "mbarrier_wait: parity must be 0 or 1");
  while ((mbarriers_[index].phase & 1) == parity) {
    fibers_[current_].mbarrier = index;
    sleep();
  }
  Mbarrier& bar = mbarriers_[index];
  bar.seen = std::max(bar.seen, bar.phase);
  warps_[current_ / 32].clock.join(bar.completed, clocks());
}

bool Machine::would_wait(uint32_t address, uint32_t parity, Where where) {
  return (mbarrier_at(address, where).phase & 1) == parity;
}

// Its bytes are ordinary ones again.
void Machine::mbarrier_inval(uint32_t address, Where where) {
  Mbarrier& bar = mbarrier_at(address, where);
  bar.address = 0;  // no address of shared memory; its clock remains with it
}

void Machine::fence_mbarrier_init(Where where) {
  fibers_[current_].last = where;
  for (Mbarrier& bar : mbarriers_)
    if (bar.thread == current_) bar.fenced = true;
}

void Machine::fence_proxy_async(Where where) {
  fibers_[current_].last = where;
  if (mode.race) shadow_.fence(current_, warps_[current_ / 32].clock);
}

// ---- copy engine ------------------------------------------------------------------------------
// The 16-byte chunks of a row are swizzled by bits 7.. of their address.
uint32_t Machine::box_offset(const TmaBox& box, int row, int chunk) const {
  const uint32_t address = box.address + uint32_t(row * box.row_bytes()) + uint32_t(chunk) * 16;
  const int chunks = box.tensor.swizzle / 16;
  return (chunks ? address ^ ((address >> 7 & uint32_t(chunks - 1)) << 4) : address) - box.address;
}

TmaBox Machine::box_at(const char* what, uint32_t address, const ptx::TensorMap& map,
                       std::array<int, 4> corner, Where where) const {
  TmaBox box = {};
  std::memcpy(static_cast<void*>(&box.tensor), &map, sizeof(box.tensor));
  if (const char* why = tensor_problem(box.tensor); *why)
    fail(where, std::string(what) + ": no tensor map: " + why);
  box.address = address;
  std::copy(corner.begin(), corner.end(), box.corner);
  return box;
}

template <class Move>
void Machine::each_element(const TmaBox& box, uint8_t* shared, const Move& move) {
  const ptx::TensorSpec& t = box.tensor;
  const int size = t.element_bytes;
  int row = 0;
  for (int c = 0; c < t.box[3]; ++c)
    for (int b = 0; b < t.box[2]; ++b)
      for (int a = 0; a < t.box[1]; ++a, ++row) {
        const int64_t at[3] = {int64_t(box.corner[1]) + a * t.row_step, int64_t(box.corner[2]) + b,
                               int64_t(box.corner[3]) + c};
        bool inside = true;
        auto* global = static_cast<uint8_t*>(const_cast<void*>(t.base));
        for (int i = 0; i < 3; ++i) {
          inside = inside && at[i] >= 0 && at[i] < t.size[i + 1];
          global += at[i] * t.stride[i];
        }
        for (int chunk = 0; chunk < box.row_bytes() / 16; ++chunk) {
          uint8_t* at_chunk = shared + box_offset(box, row, chunk);
          for (int i = 0; i < 16 / size; ++i) {
            const int64_t column = int64_t(box.corner[0]) + chunk * (16 / size) + i;
            const bool exists = inside && column >= 0 && column < t.size[0];
            move(at_chunk + size * i, exists ? global + size * column : nullptr, size_t(size));
          }
        }
      }
}

void Machine::tma_load(uint32_t address, const ptx::TensorMap& map, uint32_t bar_address,
                       std::array<int, 4> corner, Where where) {
  Mbarrier& bar = mbarrier_at(bar_address, where);
  if (mode.init_fences && !bar.fenced)
    fail(where, "tma_load: no fence_mbarrier_init after the mbarrier's initialisation");
  TmaLoad load = {box_at("tma_load", address, map, corner, where), 0, 0, {}};
  const int bytes = load.rows() * load.row_bytes();
  const uint32_t offset = offset_of("tma_load: shared address", address, bytes, 128, where);
  load.mbarrier = int(&bar - mbarriers_.data());
  load.thread = current_, load.where = where;
  bar.load_phase = bar.phase + 1;
  check_mbarriers(address, bytes, where);
  if (mode.race) {
    const Actor who = {current_ / 32, ENGINE, where}, issuer = {who.warp, current_ % 32, where};
    const WarpClock& clock = warps_[who.warp].clock;
    const std::string unfenced = shadow_.unfenced_below(issuer, clock, offset, bytes);
    race(shadow_.issue(who, clock, offset, bytes));
    race(unfenced);
  }
  if (mode.poison) std::memset(smem_.data() + offset, 0xff, size_t(bytes));
  loads_.push_back(load);
  if (!mode.poison && !mode.random) tma_land(0);
}

void Machine::tma_land(size_t index) {
  const TmaLoad load = loads_[index];
  loads_.erase(loads_.begin() + std::ptrdiff_t(index));
  each_element(load, smem_.data() + (load.address - SMEM_BASE),
               [](uint8_t* to, const uint8_t* global, size_t size) {
                 global ? std::memcpy(to, global, size) : std::memset(to, 0, size);
               });
  const int bytes = load.rows() * load.row_bytes();
  Mbarrier& bar = mbarriers_[load.mbarrier];
  if (mode.race) {
    // Whoever sees the phase end sees the bytes; nobody else.
    WarpClock clock = {};
    clock.at[warp_count_ + load.mbarrier] = bar.clock;
    const Actor who = {warp_count_ + load.mbarrier, ENGINE, load.where};
    shadow_.landed(who, clock, load.address - SMEM_BASE, bytes);
  }
  bar.bytes -= bytes;
  settle(load.mbarrier);
}

bool Machine::tma_land_some() {
  if (loads_.empty()) return false;
  tma_land(mode.random ? size_t(random() % loads_.size()) : 0);
  return true;
}

// ---- from shared to global memory --------------------------------------------------------------
void Machine::issue_write(BulkWrite op) {
  const uint32_t offset = op.address - SMEM_BASE;
  check_mbarriers(op.address, op.bytes, op.where);
  if (mode.race) {
    // The engine reads until the wait: nobody may overwrite it before.
    const Actor who = {current_ / 32, current_ % 32, op.where};
    const WarpClock& clock = warps_[who.warp].clock;
    race(shadow_.read(who, clock, offset, op.bytes, false));
    race(shadow_.unfenced(who, clock, offset, op.bytes));
    shadow_.hold(who.warp, offset, op.bytes, std::numeric_limits<uint32_t>::max());
  }
  const auto now = [&] { return !mode.poison && !(mode.random && (random() & 1)); };
  if (now()) read_write(op);
  if (op.read && now()) land_write(op);
  fibers_[current_].writes.issue(op);
  maybe_park();
}

void Machine::tma_store(const ptx::TensorMap& map, uint32_t address, std::array<int, 4> corner,
                        Where where) {
  fibers_[current_].last = where;
  const TmaBox box = box_at("tma_store", address, map, corner, where);
  const int bytes = box.rows() * box.row_bytes();
  offset_of("tma_store: shared address", address, bytes, 128, where);
  issue_write({nullptr, box, address, bytes, where});
}

void Machine::bulk_add(float* gmem, uint32_t address, int bytes, Where where) {
  fibers_[current_].last = where;
  if (bytes % 16 || bytes <= 0 || reinterpret_cast<uintptr_t>(gmem) % 16)
    fail(where, "bulk_add: the global address " + hex(reinterpret_cast<uintptr_t>(gmem)) +
                    " and the size, " + std::to_string(bytes) + ", must be multiples of 16");
  offset_of("bulk_add: shared address", address, bytes, 16, where);
  Thread& self = fibers_[current_];
  const uint64_t name = thread_name();
  ++self.issued;
  if (mode.ordered) {
    const auto [last, first] = added_.try_emplace(gmem, Added{name, self.issued, where});
    const auto [thread, number, there] = last->second;
    if (!first && thread != name && self.known_to_engine[thread] < number)
      fail(where,
           "adds to global memory that thread " + std::to_string(thread % MAX_THREADS) +
               " of block " + std::to_string(thread / MAX_THREADS) + " adds to at " + there.text() +
               ", and nothing orders the two: no " +
               (self.known[thread] < number ? "bulk_wait, store_release and load_acquire"
                                            : "fence_proxy_async_global behind load_acquire"));
    last->second = {name, self.issued, where};
  }
  issue_write({gmem, {}, address, bytes, where});
}

uint64_t Machine::thread_name() const {
  const int64_t number = block.x + int64_t(grid.x) * (block.y + int64_t(grid.y) * block.z);
  return uint64_t(number) * MAX_THREADS + uint64_t(current_);
}

void Machine::read_write(BulkWrite& op) {
  if (op.read) return;
  op.read = true;
  const uint8_t* from = smem_.data() + (op.address - SMEM_BASE);
  op.values.assign(from, from + op.bytes);
}
void Machine::land_write(BulkWrite& op) {
  read_write(op);
  if (op.landed) return;
  op.landed = true;
  if (!op.gmem)
    return each_element(op.box, op.values.data(), [](uint8_t* from, uint8_t* global, size_t size) {
      if (global) std::memcpy(global, from, size);
    });
  for (int i = 0; i < op.bytes / 4; ++i) {
    float value;
    std::memcpy(&value, op.values.data() + 4 * i, 4);
    op.gmem[i] += value;
  }
}

void Machine::bulk_commit(Where where) {
  fibers_[current_].last = where;
  fibers_[current_].writes.commit();
}

void Machine::bulk_wait_read(int keep, Where where) {
  fibers_[current_].last = where;
  const int w = current_ / 32;
  fibers_[current_].writes.wait(size_t(keep), [&](BulkWrite& op) {
    read_write(op);
    if (!op.landed) fibers_[current_].landing.push_back(op);
    if (mode.race) shadow_.hold(w, op.address - SMEM_BASE, op.bytes, warps_[w].clock.at[w]);
  });
}

void Machine::bulk_wait(int keep, Where where) {
  if (keep)
    fail(where, "bulk_wait: all groups are known together only, got " + std::to_string(keep));
  bulk_wait_read(0, where);
  Thread& self = fibers_[current_];
  for (BulkWrite& op : self.landing) land_write(op);
  self.landing.clear();
  if (self.writes.pending().empty()) self.complete = self.issued;
}

// ---- words between blocks ---------------------------------------------------------------------
int Machine::load_acquire(const int* p, Where where) {
  fibers_[current_].last = where;
  maybe_park();
  Thread& self = fibers_[current_];
  const bool same = self.watched == p && self.found == *p;
  self.watched = p, self.found = *p, self.asked = same ? self.asked + 1 : 1;
  if (self.asked > 2) {  // it waits for another value
    self.asleep = true;
    sleep();
    self.found = *p, self.asked = 1;
  }
  if (const auto found = released_.find(p); mode.ordered && found != released_.end())
    for (const auto& [thread, number] : found->second)
      self.known[thread] = std::max(self.known[thread], number);
  return *p;
}

bool Machine::wake() {
  bool any = false;
  for (int t = 0; t < threads; ++t) {
    Thread& thread = fibers_[t];
    if (!thread.asleep || *thread.watched == thread.found) continue;
    thread.asleep = false, any = true;
    warps_[t / 32].ready |= 1u << (t % 32);
  }
  return any;
}

void Machine::store_release(int* p, int value, Where where) {
  Thread& self = fibers_[current_];
  self.last = where;
  *p = value;
  ++stores_;
  if (mode.ordered) {
    released_[p] = self.known;
    released_[p][thread_name()] = self.complete;
  }
  maybe_park();
}

void Machine::fence_proxy_async_global(Where where) {
  Thread& self = fibers_[current_];
  self.last = where;
  if (mode.ordered) self.known_to_engine = self.known;
}

// ---- the rest ---------------------------------------------------------------------------------
bool Machine::barrier_or(int id, int count, bool flag, Where where) {
  if (flag) barriers_[id].flag = true;
  barrier(id, count, true, where);
  return barriers_[id].result;
}

void Machine::set_registers(int registers, bool more, Where where) {
  const int before = wgmma_[current_ / 32].registers;
  // Of __launch_bounds__(threads, 1), as our kernels have it; others may be launched with fewer.
  const int now = before ? before : 65536 / threads / 8 * 8;
  const bool known = before || mode.init_fences;
  if (more ? known && registers < now : registers > now)
    fail(where, std::string("setmaxnreg.") + (more ? "inc" : "dec") + " to " +
                    std::to_string(registers) + " registers of a warp that has " +
                    std::to_string(now));
  collective(Kind::SETMAXNREG, &registers, where, [](void* const* args) {
    machine.wgmma_[machine.current_ / 32].registers = *static_cast<const int*>(args[0]);
  });
}

void Machine::check_end_of_block() {
  for (const TmaLoad& load : loads_)
    throw Error(load.where.text() +
                ": the block ends while what the copy engine loads here is under "
                "way");
  for (const Mbarrier& bar : mbarriers_) {
    if (bar.bytes)
      throw Error(bar.where.text() + ": the block ends with " + std::to_string(bar.bytes) +
                  " bytes announced and not loaded (or loaded and not announced) on this mbarrier");
    if (bar.load_phase > bar.seen)
      throw Error(bar.where.text() +
                  ": the block ends, and no thread has waited for the last load "
                  "on this mbarrier");
  }
  int most = 65536 / threads / 8 * 8 * threads, used = 0;  // of __launch_bounds__(threads, 1)
  bool all = warp_count_ > 0;
  for (int w = 0; w < warp_count_; ++w) {
    if (!wgmma_[w].ops.pending().empty())
      throw Error(wgmma_[w].ops.pending().front().where.text() +
                  ": a warp returns while its wgmma is in flight: no wgmma_wait<0>");
    if (wgmma_[w].issued != wgmma_log_[w / 4].size())
      throw Error(wgmma_log_[w / 4].back().where.text() +
                  ": not every warp of the warpgroup issued this wgmma");
    if (wgmma_[w].registers != wgmma_[w / 4 * 4].registers)
      throw Error("setmaxnreg differs between the warps of a warpgroup");
    all = all && wgmma_[w].registers;
    used += 32 * wgmma_[w].registers;
  }
  if (all && used > most)
    throw Error("setmaxnreg: the warps ask for " + std::to_string(used) +
                " registers, the block has " + std::to_string(most));
}

}  // namespace attn::emulation
