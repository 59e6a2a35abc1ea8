// State of what sm_90 adds to the emulated device: mbarriers, loads of the copy engine, and wgmma.
//
// An mbarrier's phase ends when every arrival and every announced byte is there; its parity is that
// of the phase.  A load is under way from issue until it lands: at once, at a random moment, or
// (poison) only when no thread can run.  A wgmma computes at issue, or at the wait that retires it:
// in poison mode always, with NaN in the accumulators in between, in random mode now and then.
#pragma once
#include <map>
#include <vector>

#include "../cuda/ptx_types.h"
#include "async_queue.h"
#include "shadow.h"

namespace attn::emulation {

struct Mbarrier {
  uint32_t address;
  int expected, pending;  // arrivals
  int64_t bytes;          // announced and not landed
  uint64_t phase;         // phases that are over
  uint64_t load_phase;    // 1 + the phase of the last load
  uint64_t seen;          // phases that some thread has seen end
  bool fenced;            // the copy engine knows of it
  int thread;             // that initialised it
  uint32_t clock;         // of the copy engine in this phase
  WarpClock arriving, completed;
  Where where;
};

// A box of a tensor, and where it lies in shared memory.
struct TmaBox {
  ptx::TensorSpec tensor;
  uint32_t address;
  int corner[4];
  int row_bytes() const { return tensor.box[0] * tensor.element_bytes; }
  int rows() const { return tensor.box[1] * tensor.box[2] * tensor.box[3]; }
};
struct TmaLoad : TmaBox {
  int mbarrier, thread;
  Where where;
};

// What lies in shared memory on its way to global memory, floats that are added there or a box that
// is stored.  Read at once, at random, or (poison) only when a wait asks for it; landed then, at
// random, or (poison) only at a wait for all of it, or when the block ends.
struct BulkWrite {
  float* gmem;  // null: box
  TmaBox box;
  uint32_t address;
  int bytes;
  Where where;
  bool read = false, landed = false;
  std::vector<uint8_t> values = {};  // read and not landed
};

// One lane's call.
struct WgmmaCall {
  float* acc;         // [tiles][4]
  const uint32_t* a;  // 4 words, or null: a_smem
  uint64_t a_smem, b;
  int tiles;
  bool accumulate, trans_b, is_bf16;
  bool is_tf32 = false;                          // m64nNk8, both operands K-major
  bool trans_a = false;                          // A in shared memory is MN-major
  int chunk() const { return is_tf32 ? 4 : 8; }  // elements in 16 bytes
};

// What the four warps of a group must agree on.
struct WgmmaSignature {
  uint64_t a, b;
  Where where;
  bool operator==(const WgmmaSignature& o) const {
    return a == o.a && b == o.b && where == o.where;
  }
};

// The part of one warp: 16 of the 64 rows.
struct WgmmaOp {
  WgmmaCall call;
  Where where;
  float* acc[32];
  uint32_t a[32][4];
  bool done;
  std::vector<std::pair<uint32_t, int>> reads;  // offset, bytes; race mode
};

// True values of accumulators whose registers hold NaN.
struct Hidden {
  float* acc[32];
  std::vector<float> values;  // lane by lane
};

struct WarpgroupWarp {
  AsyncQueue<WgmmaOp> ops;
  size_t issued = 0;
  bool fenced = false;
  int registers = 0;                // setmaxnreg, 0: not said
  std::map<float*, Hidden> hidden;  // poison mode, by lane 0's address
};

// Where the hardware finds an element of a wgmma operand, by its descriptor.
struct OperandLayout {
  uint32_t start, leading, stride, swizzle;  // bytes; swizzle: 128, 64, 32 or 0
  explicit OperandLayout(uint64_t descriptor);
  // The 16-byte chunk that holds elements 8 * inner .. of row `outer`.  K-major: outer is the row
  // of M or N, inner 0..1 along the contraction.  MN-major: outer is 0..15 along the contraction.
  uint32_t k_major(int outer, int inner) const;
  uint32_t mn_major(int outer, int inner) const;

 private:
  uint32_t swizzled(uint32_t address) const;
};

}  // namespace attn::emulation
