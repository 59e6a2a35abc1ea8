// Accumulators of wgmma in compiled PTX.  From its issue to a wait that retires it the registers of
// a wgmma hold nothing that may be read; but compiled code moves them, from the registers of one
// wgmma to those of the next, which ptxas makes one register again.  So in the modes random and
// poison each register gets a tag, a NaN that names the product and the place within it.  A
// move takes the tag along, the next wgmma finds by it which sums it adds to, and after a wait
// landed() puts the sum in its place.  Whatever else reads a tag is an error.
#pragma once
#include "numbers.h"

ATTN_EXPORTED_BEGIN
namespace attn::compiled {

constexpr int SLOTS = 64, MOST_SUMS = 128;  // products in flight of a warp; accumulators of a lane
constexpr uint32_t TAG = 0xff800000u;       // and a number above 0 in the low 22 bits

inline bool is_tag(uint32_t v) { return v > TAG && v < TAG + (1u << 22); }
inline uint32_t tag_of(uint32_t slot, uint32_t place) { return TAG + 1 + slot * MOST_SUMS + place; }
inline uint32_t slot_of(uint32_t tag) { return (tag - TAG - 1) / MOST_SUMS; }
inline uint32_t place_of(uint32_t tag) { return (tag - TAG - 1) % MOST_SUMS; }

// Sums of one product; each of the threads has its own.
struct Slot {
  float sums[32][MOST_SUMS];
  Where where;
};
Slot& slot_at(int warp, uint32_t slot);
// Of this thread: the products that it has issued without going on with one in flight.
uint32_t next_slot();

[[noreturn]] void fail_in_flight(uint32_t tag, Where at);
// A register that something other than a move or a wgmma reads.
inline uint32_t settled(uint32_t v, PTX_AT) {
  if (is_tag(v)) fail_in_flight(v, at);
  return v;
}
// A register after a wait: the sum, unless the product is in flight still.
uint32_t landed(uint32_t v);

// d (+)= A B; a: 4 registers, or null and the descriptor.
void product(uint32_t* d, int count, const uint32_t* a, uint64_t a_smem, uint64_t b,
             bool accumulate, bool trans_a, bool trans_b, bool is_bf16, bool is_tf32, PTX_AT);

}  // namespace attn::compiled
ATTN_EXPORTED_END
