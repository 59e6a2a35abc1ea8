// Shared memory of the emulated device: checks, asynchronous copies, bank conflicts.
#include <algorithm>
#include <cstring>

#include "machine.h"

namespace attn::emulation {

void Machine::race(const std::string& report) const {
  if (!report.empty()) fail(fibers_[current_].last, report);
}

std::string hex(uint64_t v) {
  char text[32];
  snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(v));
  return text;
}

uint32_t Machine::offset_of(const char* what, uint32_t address, int bytes, int multiple,
                            Where where) const {
  if (address % uint32_t(multiple) != 0 || address < SMEM_BASE ||
      uint64_t(address) + uint64_t(bytes) > uint64_t(SMEM_BASE) + smem_bytes)
    fail(where, std::string(what) + " " + hex(address) + " must be a multiple of " +
                    std::to_string(multiple) + ", with all " + std::to_string(bytes) +
                    " bytes within the " + std::to_string(smem_bytes) +
                    " bytes of shared memory from " + hex(SMEM_BASE));
  return address - SMEM_BASE;
}

uint8_t* Machine::access(Access access, uint32_t address, int bytes, Where where) {
  fibers_[current_].last = where;
  if (address % uint32_t(bytes) != 0) {
    fail(where,
         "shared address " + hex(address) + " is not a multiple of " + std::to_string(bytes));
  }
  if (address < SMEM_BASE || uint64_t(address) + bytes > uint64_t(SMEM_BASE) + smem_bytes) {
    fail(where, "shared address " + hex(address) + " (" + std::to_string(bytes) +
                    " bytes) is outside of the block's " + std::to_string(smem_bytes) +
                    " bytes from " + hex(SMEM_BASE));
  }
  if (!mbarriers_.empty()) check_mbarriers(address, bytes, where);
  const uint32_t offset = address - SMEM_BASE;
  if (mode.race) {
    const Actor who = {current_ / 32, current_ % 32, where};
    const WarpClock& clock = warps_[who.warp].clock;
    race(access == Access::READ ? shadow_.read(who, clock, offset, bytes)
                                : shadow_.write(who, clock, offset, bytes, access));
  }
  if (mode.banks && access != Access::ATOMIC) log_access(address, bytes, where);
  return smem_.data() + offset;
}

void Machine::store(uint32_t address, const void* from, int bytes, Where where) {
  const uint32_t end = address - SMEM_BASE + uint32_t(bytes);
  const bool inside = address >= SMEM_BASE && end <= uint32_t(smem_bytes);
  const bool same = inside && !std::memcmp(smem_.data() + (address - SMEM_BASE), from, bytes);
  std::memcpy(access(same ? Access::REPEAT : Access::WRITE, address, bytes, where), from,
              size_t(bytes));
}

const uint8_t* Machine::matrix_row(uint32_t address, Where where) {
  const uint32_t offset = offset_of("ldmatrix: row address", address, 16, 16, where);
  if (mode.race) {
    const Actor who = {current_ / 32, ALL_LANES, where};
    race(shadow_.read(who, warps_[who.warp].clock, offset, 16));
  }
  return smem_.data() + offset;
}

void Machine::store_matrix_row(int lane, uint32_t address, const uint16_t (&row)[8], bool repeats,
                               Where where) {
  const uint32_t offset = offset_of("stmatrix: row address", address, 16, 16, where);
  if (!mbarriers_.empty()) check_mbarriers(address, 16, where);
  if (mode.race) {
    const Actor who = {current_ / 32, lane, where};
    const bool same = repeats && !std::memcmp(smem_.data() + offset, row, 16);
    race(shadow_.write(who, warps_[who.warp].clock, offset, 16,
                       same ? Access::REPEAT : Access::WRITE));
  }
  std::memcpy(smem_.data() + offset, row, 16);
}

// ---- asynchronous copies ----------------------------------------------------------------------
void Machine::copy_issue(uint32_t address, const void* source, int bytes, bool valid, Where where) {
  fibers_[current_].last = where;
  const uint32_t offset = offset_of("cp_async: shared address", address, bytes, bytes, where);
  if (reinterpret_cast<uintptr_t>(source) % bytes != 0) {
    fail(where, "cp_async: global address " + hex(reinterpret_cast<uintptr_t>(source)) +
                    " is not a multiple of " + std::to_string(bytes));
  }
  if (mode.banks) log_access(address, bytes, where);
  Copy copy = {address, bytes, false, where, {}};
  if (valid) std::memcpy(copy.data, source, size_t(bytes));
  if (mode.race) {
    const Actor who = {current_ / 32, current_ % 32, where};
    race(shadow_.issue(who, warps_[who.warp].clock, offset, bytes));
  }
  if (mode.poison) {
    std::memset(smem_.data() + offset, 0xff, size_t(bytes));
  } else if (!mode.random || (random() & 1)) {
    land(copy);
  }
  fibers_[current_].copies.issue(copy);
}

void Machine::land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  std::memcpy(smem_.data() + (copy.address - SMEM_BASE), copy.data, size_t(copy.bytes));
}

void Machine::copy_commit(Where where) {
  fibers_[current_].last = where;
  fibers_[current_].copies.commit();
}

void Machine::copy_wait(int keep, Where where) {
  fibers_[current_].last = where;
  fibers_[current_].copies.wait(size_t(keep), [&](Copy& copy) {
    land(copy);
    if (!mode.race) return;
    const Actor who = {current_ / 32, current_ % 32, copy.where};
    shadow_.landed(who, warps_[who.warp].clock, copy.address - SMEM_BASE, copy.bytes);
  });
}

// ---- bank conflicts ---------------------------------------------------------------------------
// 32 banks of 4 bytes.  One phase serves 128 bytes (8 lanes of 16, 16 of 8, 32 of 4 or less); it
// takes as many wavefronts as the largest number of different words that one bank must give.
void Machine::count_phase(const uint32_t* addresses, int lanes, int bytes, Where where) {
  std::array<std::array<uint32_t, 32>, 32> words;
  std::array<int, 32> used{};
  for (int lane = 0; lane < lanes; ++lane) {
    for (uint32_t word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
      auto& bank = words[word % 32];
      int& n = used[word % 32];
      if (std::find(bank.begin(), bank.begin() + n, word) == bank.begin() + n) bank[n++] = word;
    }
  }
  BankCount& count = banks[where.packed()];
  ++count.requests;
  ++count.ideal;
  count.wavefronts += std::max(1, *std::max_element(used.begin(), used.end()));
}

void Machine::log_access(uint32_t address, int bytes, Where where) {
  SiteLog& log = access_log_[{current_ / 32, where.packed()}];
  log.bytes = bytes;
  log.lanes[current_ % 32].push_back(address);
}

void Machine::flush_access_log() {
  for (const auto& [key, log] : access_log_) {
    const int lanes_a_phase = std::min(32, 128 / std::max(4, log.bytes));
    size_t longest = 0;
    for (const auto& lane : log.lanes) longest = std::max(longest, lane.size());
    for (size_t i = 0; i < longest; ++i) {
      for (int first = 0; first < 32; first += lanes_a_phase) {
        uint32_t addresses[32];
        int lanes = 0;
        for (int lane = first; lane < first + lanes_a_phase; ++lane) {
          if (i < log.lanes[lane].size()) addresses[lanes++] = log.lanes[lane][i];
        }
        if (lanes) count_phase(addresses, lanes, log.bytes, Where::unpack(key.second));
      }
    }
  }
  access_log_.clear();
}

}  // namespace attn::emulation
