#include "shadow.h"

#include <algorithm>
#include <cstring>

namespace attn::emulation {

std::string Where::text() const {
  const char* tail = std::strstr(file, "csrc/");
  return std::string(tail ? tail : file) + ":" + std::to_string(line);
}

void WarpClock::join(const WarpClock& other, int clocks) {
  for (int v = 0; v < clocks; ++v) at[v] = std::max(at[v], other.at[v]);
}

void Shadow::reset(int bytes, int warps, int unit) {
  warps_ = warps, unit_ = uint32_t(unit);
  const size_t words = size_t(bytes + unit - 1) / unit_;
  cells_.assign(words, Cell{});
  reads_.assign(words * warps, Read{});
  generic_reads_.assign(words, Past{});
  fences_.assign(size_t(warps) * 32, {});
  repeats_.clear();
}

void Shadow::fence(int thread, const WarpClock& clock) {
  Fences& mine = fences_[size_t(thread)];
  mine.all.push_back({clock.at[thread / 32], clock.warp_syncs});
  mine.before.assign(clock.at, clock.at + warps_);
}

uint32_t Shadow::fences(int warp, int lane) const {
  return lane < 0 ? 0 : uint32_t(fences_[size_t(warp) * 32 + lane].all.size());
}

namespace {
std::string lane_text(int warp, int lane) {
  if (lane == ENGINE) return "the copy engine";
  return "warp " + std::to_string(warp) + (lane < 0 ? "" : " lane " + std::to_string(lane));
}
std::string report(const Actor& who, const char* verb, const std::string& other) {
  return "race in shared memory: " + who.where.text() + " (" + lane_text(who.warp, who.lane) +
         ") " + verb + " what " + other;
}
}  // namespace

std::string Shadow::conflict_with_write(const Cell& cell, const Actor& who, const WarpClock& clock,
                                        const char* verb, bool partial) const {
  if (cell.in_flight) {
    return report(who, verb,
                  Where::unpack(cell.where).text() + " (" + lane_text(cell.warp, cell.lane) +
                      ") is still copying: no wait between them");
  }
  if (cell.clock == 0) return "";
  if (cell.warp != who.warp) {
    if (cell.clock <= clock.at[cell.warp]) return "";
    return report(who, verb,
                  Where::unpack(cell.where).text() + " (" + lane_text(cell.warp, cell.lane) +
                      ") wrote: no barrier between them");
  }
  const bool same_lane = who.lane != ALL_LANES && who.lane == cell.lane;
  // Bytes of one word written by several lanes: the shadow is too coarse to tell them apart.
  const bool unknown = partial && cell.partial;
  if (same_lane || unknown || cell.warp_syncs < clock.warp_syncs) return "";
  return report(who, verb,
                Where::unpack(cell.where).text() + " (" + lane_text(cell.warp, cell.lane) +
                    ") wrote: no sync_warp between them");
}

std::string Shadow::conflict_with_repeats(size_t word, const Actor& who, const WarpClock& clock,
                                          const char* verb, bool partial) const {
  for (const Cell& cell : repeats_.at(word)) {
    std::string bad = conflict_with_write(cell, who, clock, verb, partial);
    if (!bad.empty()) return bad;
  }
  return "";
}

// By the thread of the access, its next fence before the barrier that orders it and `who`; or by
// `who`.
bool Shadow::fenced(const Past& past, const Actor& who, const WarpClock& clock) const {
  const auto& own = fences_[size_t(past.warp) * 32 + past.lane].all;
  if (past.fences < own.size()) {
    const Fences::Fence& next = own[past.fences];
    if (past.warp != who.warp) {
      if (next.clock <= clock.at[past.warp]) return true;
    } else if (past.lane == who.lane || next.warp_syncs < clock.warp_syncs) {
      return true;
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    if ((who.lane == ALL_LANES || who.lane == lane) && !fenced_by(who.warp * 32 + lane, past))
      return false;
  return true;
}

// By the last fence of this thread, before which a barrier has put the access.
bool Shadow::fenced_by(int thread, const Past& past) const {
  const Fences& mine = fences_[size_t(thread)];
  if (mine.all.empty()) return false;
  if (past.warp == thread / 32) return past.warp_syncs < mine.all.back().warp_syncs;
  return past.clock <= mine.before[size_t(past.warp)];
}

std::string Shadow::conflict_with_reads(size_t word, const Actor& who,
                                        const WarpClock& clock) const {
  const Read* reads = &reads_[word * warps_];
  for (int v = 0; v < warps_; ++v) {
    if (v == who.warp || reads[v].clock <= clock.at[v]) continue;
    return report(who, "overwrites",
                  Where::unpack(reads[v].where).text() + " (" + lane_text(v, ALL_LANES) +
                      ") reads: no barrier between them");
  }
  return "";
}

std::string Shadow::read(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes,
                         bool generic) {
  const uint64_t where = who.where.packed();
  const bool partial = bytes < int(unit_);
  for (size_t word = offset / unit_; word <= (offset + bytes - 1) / unit_; ++word) {
    const Cell& cell = cells_[word];
    if (cell.clock == 0 && !cell.in_flight) {
      return report(who, "reads", "nothing has written since the block began");
    }
    std::string bad = conflict_with_write(cell, who, clock, "reads", partial);
    if (bad.empty() && cell.repeated)
      bad = conflict_with_repeats(word, who, clock, "reads", partial);
    if (!bad.empty()) return bad;
    Read& read = reads_[word * warps_ + who.warp];
    read.clock = clock.at[who.warp];
    read.where = where;
    if (!generic) continue;
    const int8_t lane = int8_t(std::max(who.lane, 0));  // ldmatrix: the first for all
    generic_reads_[word] = {clock.at[who.warp],
                            clock.warp_syncs,
                            fences(who.warp, lane),
                            int8_t(who.warp),
                            lane,
                            where};
  }
  return "";
}

std::string Shadow::write(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes,
                          Access access) {
  const bool atomic = access == Access::ATOMIC, partial = bytes < int(unit_);
  for (size_t word = offset / unit_; word <= (offset + bytes - 1) / unit_; ++word) {
    Cell& cell = cells_[word];
    bool repeated = false;
    if (!(atomic && cell.atomic && !cell.in_flight)) {
      std::string bad = conflict_with_write(cell, who, clock, "overwrites", partial);
      if (bad.empty() && cell.repeated)
        bad = conflict_with_repeats(word, who, clock, "overwrites", partial);
      repeated = !bad.empty() && access == Access::REPEAT && !cell.in_flight && !cell.atomic &&
                 cell.offset == offset && cell.bytes == uint32_t(bytes);
      if (repeated) {
        repeats_[word].push_back(cell);
        bad.clear();
      } else if (cell.repeated) {
        repeats_.erase(word);
      }
      if (bad.empty()) bad = conflict_with_reads(word, who, clock);
      if (!bad.empty()) return bad;
    }
    cell = Cell{{clock.at[who.warp], clock.warp_syncs, fences(who.warp, who.lane), int8_t(who.warp),
                 int8_t(who.lane), who.where.packed()},
                false,
                atomic,
                partial,
                offset,
                uint32_t(bytes),
                repeated};
  }
  return "";
}

std::string Shadow::issue(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes) {
  std::string bad = write(who, clock, offset, bytes, Access::WRITE);
  if (!bad.empty()) return bad;
  for (size_t word = offset / unit_; word <= (offset + bytes - 1) / unit_; ++word) {
    cells_[word].in_flight = true;
  }
  return "";
}

void Shadow::landed(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes) {
  for (size_t word = offset / unit_; word <= (offset + bytes - 1) / unit_; ++word) {
    Cell& cell = cells_[word];
    cell.in_flight = false;
    cell.warp = int8_t(who.warp);
    cell.clock = clock.at[who.warp];
    cell.warp_syncs = clock.warp_syncs;
    cell.fences = fences(who.warp, who.lane);  // one before the wait fences nothing
  }
}

std::string Shadow::unfenced(const Actor& who, const WarpClock& clock, uint32_t offset,
                             int bytes) const {
  for (size_t word = offset / unit_; word <= (offset + bytes - 1) / unit_; ++word) {
    const Cell& cell = cells_[word];
    if (cell.lane < 0 || fenced(cell, who, clock)) continue;
    return report(who, "reads",
                  Where::unpack(cell.where).text() + " (" + lane_text(cell.warp, cell.lane) +
                      ") stored: no fence_proxy_async on the way from there");
  }
  return "";
}

std::string Shadow::unfenced_below(const Actor& who, const WarpClock& clock, uint32_t offset,
                                   int bytes) const {
  for (size_t word = offset / unit_; word <= (offset + bytes - 1) / unit_; ++word) {
    const Past* const both[] = {&cells_[word], &generic_reads_[word]};
    for (const Past* past : both) {
      if (past->clock == 0 || past->lane < 0 || fenced(*past, who, clock)) continue;
      return report(who, "overwrites by the copy engine",
                    Where::unpack(past->where).text() + " (" + lane_text(past->warp, past->lane) +
                        (past == both[0] ? ") stored" : ") read") +
                        ": no fence_proxy_async on the way from there");
    }
  }
  return "";
}

void Shadow::hold(int warp, uint32_t offset, int bytes, uint32_t clock) {
  for (size_t word = offset / unit_; word <= (offset + bytes - 1) / unit_; ++word)
    reads_[word * warps_ + warp].clock = clock;
}

}  // namespace attn::emulation
