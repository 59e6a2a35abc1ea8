#include "in_flight.h"

#include <memory>
#include <vector>

namespace attn::compiled {
namespace {

using emulation::MAX_THREADS;
using emulation::MAX_WARPS;

std::vector<Slot> slots;
// Of each thread, in the launch that is under way.
struct Issued {
  int64_t launch = -1;
  uint32_t count = 0;
};
Issued issued[emulation::MOST_RESIDENT][MAX_THREADS];

// Whether registers hold tags: elsewhere a product is done when it is issued.
bool tagged() { return machine.mode.random || machine.mode.poison; }

}  // namespace

Slot& slot_at(int warp, uint32_t slot) {
  if (slots.empty()) slots.resize(size_t(emulation::MOST_RESIDENT) * MAX_WARPS * SLOTS);
  return slots[size_t(machine.slot() * MAX_WARPS + warp) * SLOTS + slot % SLOTS];
}

uint32_t next_slot() {
  Issued& mine = issued[machine.slot()][machine.thread()];
  if (mine.launch != machine.launches) mine = {machine.launches, 0};
  return mine.count++ % SLOTS;
}

void fail_in_flight(uint32_t tag, Where at) {
  const Where product = slot_at(machine.thread() / 32, slot_of(tag)).where;
  machine.fail(at, "reads an accumulator of the wgmma at " + product.text() +
                       " before a wait that retires it");
}

uint32_t landed(uint32_t v) {
  if (!is_tag(v)) return v;
  Slot& slot = slot_at(machine.thread() / 32, slot_of(v));
  if (machine.wgmma_in_flight(slot.sums[0])) return v;
  return as<uint32_t>(slot.sums[machine.thread() % 32][place_of(v)]);
}

void product(uint32_t* d, int count, const uint32_t* a, uint64_t a_smem, uint64_t b,
             bool accumulate, bool trans_a, bool trans_b, bool is_bf16, bool is_tf32, Where at) {
  const int warp = machine.thread() / 32, lane = machine.thread() % 32;
  const bool goes_on = accumulate && is_tag(d[0]);
  const uint32_t number = goes_on ? slot_of(d[0]) : next_slot();
  Slot& slot = slot_at(warp, number);
  if (!goes_on && machine.wgmma_in_flight(slot.sums[0]))
    machine.fail(at, "wgmma: more products in flight than the executor can tell");
  for (int i = 0; i < count && accumulate; ++i) {
    if (goes_on ? d[i] != tag_of(number, uint32_t(i)) : is_tag(d[i]))
      machine.fail(at,
                   "wgmma adds to accumulators of another product in flight, or in another order");
    if (!goes_on) slot.sums[lane][i] = as<float>(d[i]);
  }
  if (!accumulate) std::fill_n(slot.sums[lane], count, 0.0f);
  slot.where = at;
  machine.wgmma(
      {slot.sums[lane], a, a_smem, b, count / 4, accumulate, trans_b, is_bf16, is_tf32, trans_a},
      at);
  for (int i = 0; i < count; ++i)
    d[i] = tagged() ? tag_of(number, uint32_t(i)) : as<uint32_t>(slot.sums[lane][i]);
}

}  // namespace attn::compiled
