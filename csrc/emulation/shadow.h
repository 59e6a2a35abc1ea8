// The race detector of shared memory: happens-before by one vector clock a warp, and for each 4
// bytes of shared memory who wrote it last and when each warp read it last.  Its verdict does not
// depend on the order in which the emulator happened to run the warps, so one run is enough.
//
// Order between warps comes from barriers.  Within a warp, lanes are ordered only by sync_warp (or
// a barrier): a shuffle or an mma makes lanes meet, but orders no memory.
#pragma once
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

namespace attn::emulation {

constexpr int MAX_WARPS = 32, MAX_CLOCKS = 64;  // after the warps: one clock an mbarrier

// A source position: that of the wrapper's call.
struct Where {
  const char* file = "?";
  int line = 0;
  bool operator==(const Where& o) const { return file == o.file && line == o.line; }
  bool operator!=(const Where& o) const { return !(*this == o); }
  uint64_t packed() const { return (reinterpret_cast<uint64_t>(file) << 16) | uint16_t(line); }
  static Where unpack(uint64_t v) {
    return {reinterpret_cast<const char*>(v >> 16), int(v & 0xffff)};
  }
  std::string text() const;  // "csrc/cuda/forward.cuh:120"
};

// REPEAT: stores what is there already.
enum class Access : uint8_t { READ, WRITE, ATOMIC, REPEAT };

struct WarpClock {
  uint32_t at[MAX_CLOCKS] = {};  // at[v]: how far into warp v's past this warp has synchronised
  uint32_t warp_syncs = 0;       // counts sync_warp and barriers of this warp
  void join(const WarpClock& other, int clocks);
};

// One access of one lane.  lane == ALL_LANES: made for the whole warp (ldmatrix).
struct Actor {
  int warp, lane;
  Where where;
};
constexpr int ALL_LANES = -1, ENGINE = -2;  // ENGINE: the copy engine, for a load of that warp

class Shadow {
 public:
  // unit: bytes of a cell, of which each access is whole ones or a part of one.
  void reset(int bytes, int warps, int unit);

  // Each returns an empty string or the report of a race.  offset: bytes from the base.
  // generic: by an instruction that needs no proxy fence, not by wgmma or the copy engine.
  std::string read(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes,
                   bool generic = true);
  // Two stores of the same bytes to the same place need no order (PTX 8.7.2: races of operations
  // that overlap completely leave one of their values); what follows needs one with both.
  std::string write(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes,
                    Access access);
  // An asynchronous write has been issued: the bytes belong to it until landed().
  std::string issue(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes);
  void landed(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes);
  // A fence_proxy_async.  wgmma and the copy engine come after what threads stored and read only if
  // one stands on the way from there: of the thread that did so, before the barrier that orders the
  // two, or of those that issue the asynchronous operation, after that barrier.
  void fence(int thread, const WarpClock& clock);
  // Of what `who` is about to read so: what was stored without a fence on the way.
  std::string unfenced(const Actor& who, const WarpClock& clock, uint32_t offset, int bytes) const;
  // Of what a load by this thread is about to overwrite: what was stored or read without one.  Of
  // several threads that read a place the last one counts.
  std::string unfenced_below(const Actor& who, const WarpClock& clock, uint32_t offset,
                             int bytes) const;
  // The warp's read of these bytes is as late as `clock`.
  void hold(int warp, uint32_t offset, int bytes, uint32_t clock);

 private:
  // An access by one lane.
  struct Past {
    uint32_t clock = 0;  // 0: there was none
    uint32_t warp_syncs = 0;
    uint32_t fences = 0;  // of this thread until then
    int8_t warp = 0, lane = 0;
    uint64_t where = 0;
  };
  struct Cell : Past {  // the last write
    bool in_flight = false, atomic = false, partial = false;
    uint32_t offset = 0, bytes = 0;  // of the whole write
    bool repeated = false;           // repeats_ has earlier writes of the same bytes
  };
  // Those of one thread: of each the clock of its warp, and what of each warp was before the last.
  struct Fences {
    struct Fence {
      uint32_t clock, warp_syncs;
    };
    std::vector<Fence> all;
    std::vector<uint32_t> before;
  };
  struct Read {
    uint32_t clock = 0;
    uint64_t where = 0;
  };
  std::string conflict_with_write(const Cell& cell, const Actor& who, const WarpClock& clock,
                                  const char* verb, bool partial) const;
  std::string conflict_with_repeats(size_t word, const Actor& who, const WarpClock& clock,
                                    const char* verb, bool partial) const;
  uint32_t fences(int warp, int lane) const;
  bool fenced(const Past& past, const Actor& who, const WarpClock& clock) const;
  bool fenced_by(int thread, const Past& past) const;
  std::string conflict_with_reads(size_t word, const Actor& who, const WarpClock& clock) const;

  int warps_ = 0;
  uint32_t unit_ = 4;
  std::vector<Cell> cells_;
  std::vector<Read> reads_;          // [words][warps]
  std::vector<Past> generic_reads_;  // [words]: the last one
  std::vector<Fences> fences_;       // [threads]
  std::unordered_map<size_t, std::vector<Cell>> repeats_;
};

}  // namespace attn::emulation
