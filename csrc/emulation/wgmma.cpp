// wgmma of the emulated device: where operands lie by their descriptors, and the product.
#include <algorithm>
#include <cstring>
#include <limits>

#include "machine.h"
#include "numbers.h"

namespace attn::emulation {

OperandLayout::OperandLayout(uint64_t d)
    : start(uint32_t(d & 0x3fff) << 4),
      leading(uint32_t(d >> 16 & 0x3fff) << 4),
      stride(uint32_t(d >> 32 & 0x3fff) << 4) {
  constexpr uint32_t SPANS[4] = {0, 128, 64, 32};
  swizzle = SPANS[d >> 62];
}

// The chunk number within a span is XORed with the number of the 128-byte line, so that equal
// chunks of neighbouring rows meet different banks.
uint32_t OperandLayout::swizzled(uint32_t address) const {
  if (!swizzle) return address;
  return address ^ ((address >> 7 & (swizzle / 16 - 1)) << 4);
}

uint32_t OperandLayout::k_major(int outer, int inner) const {
  const uint32_t line = swizzle ? swizzle : 16;
  const uint32_t along = swizzle ? 16u : leading;
  return swizzled(start + uint32_t(outer / 8) * stride + uint32_t(outer % 8) * line +
                  uint32_t(inner) * along);
}

uint32_t OperandLayout::mn_major(int outer, int inner) const {
  if (!swizzle)
    return start + uint32_t(outer / 8) * leading + uint32_t(outer % 8) * 16 +
           uint32_t(inner) * stride;
  const int chunks = int(swizzle / 16);
  return swizzled(start + uint32_t(outer / 8) * stride + uint32_t(outer % 8) * swizzle +
                  uint32_t(inner / chunks) * leading + uint32_t(inner % chunks) * 16);
}

namespace {

typedef float Row8 __attribute__((vector_size(32)));
constexpr int MOST_TILES = 32;

// Of tf32 the tensor cores take the upper 19 bits.
float tf32_value(uint32_t word) { return as_float(word & 0xffffe000u); }

void decode(const uint8_t* chunk, const WgmmaCall& call, float* out, int step) {
  if (call.is_tf32) {
    uint32_t words[4];
    std::memcpy(words, chunk, 16);
    for (int i = 0; i < 4; ++i) out[i * step] = tf32_value(words[i]);
    return;
  }
  const bool is_bf16 = call.is_bf16;
  uint16_t words[8];
  std::memcpy(words, chunk, 16);
  for (int i = 0; i < 8; ++i)
    out[i * step] = is_bf16 ? as_float(uint32_t(words[i]) << 16) : fp16_value(words[i]);
}

// Calls use(address, row of the operand, first column) for each 16-byte chunk of B [16, 8 * tiles],
// or of a warp's 16 rows of A; for MN-major the chunk lies along the row, else across.
template <class Use>
void each_chunk_of_b(const WgmmaCall& call, const Use& use) {
  const OperandLayout layout(call.b);
  if (call.trans_b) {
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < call.tiles; ++n) use(layout.mn_major(k, n), k, 8 * n);
  } else {
    for (int n = 0; n < 8 * call.tiles; ++n)
      for (int k = 0; k < 2; ++k) use(layout.k_major(n, k), call.chunk() * k, n);
  }
}
template <class Use>
void each_chunk_of_a(const WgmmaCall& call, int warp, const Use& use) {
  const OperandLayout layout(call.a_smem);
  if (call.trans_a) {
    for (int k = 0; k < 16; ++k)
      for (int m = 0; m < 2; ++m) use(layout.mn_major(k, 2 * (warp % 4) + m), 8 * m, k);
  } else {
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < 2; ++k) use(layout.k_major(16 * (warp % 4) + m, k), m, call.chunk() * k);
  }
}

}  // namespace

const uint8_t* Machine::operand(uint32_t address, Where where) {
  return smem_.data() + offset_of("wgmma: the descriptor's address", address, 16, 16, where);
}

void Machine::issue_wgmma(void* const* calls, Where where) {
  const int w = current_ / 32;
  const auto& first = *static_cast<const WgmmaCall*>(calls[0]);
  WarpgroupWarp& warp = wgmma_[w];
  if (w / 4 * 4 + 4 > warp_count_)
    fail(where, "wgmma: a warpgroup is 4 warps, from a multiple of 4");
  if (!warp.fenced)
    fail(where,
         "wgmma without wgmma_fence since the block began or since the last wait that retired "
         "a wgmma: its registers may still be in use");
  for (int lane = 1; lane < 32; ++lane) {
    const auto& other = *static_cast<const WgmmaCall*>(calls[lane]);
    if (other.b != first.b || other.a_smem != first.a_smem || other.accumulate != first.accumulate)
      fail(where, "wgmma: descriptors or accumulate differ between the lanes of a warp");
  }
  std::vector<WgmmaSignature>& log = wgmma_log_[w / 4];
  const WgmmaSignature mine = {first.a_smem, first.b, where};
  if (warp.issued == log.size()) log.push_back(mine);
  if (!(log[warp.issued] == mine))
    fail(where, "wgmma: the warps of a warpgroup issue different products; another one issued " +
                    log[warp.issued].where.text());
  ++warp.issued;
  ++wgmmas;

  WgmmaOp op = {first, where, {}, {}, false, {}};
  for (int lane = 0; lane < 32; ++lane) {
    const auto* call = static_cast<const WgmmaCall*>(calls[lane]);
    op.acc[lane] = call->acc;
    if (first.a) std::memcpy(op.a[lane], call->a, sizeof(op.a[lane]));
  }
  if (mode.race) {
    // Operands are read until the wait: nobody may overwrite them before.
    const Actor who = {w, ALL_LANES, where};
    const auto check = [&](uint32_t address, int, int) {
      operand(address, where);
      const uint32_t offset = address - SMEM_BASE;
      race(shadow_.read(who, warps_[w].clock, offset, 16, false));
      race(shadow_.unfenced(who, warps_[w].clock, offset, 16));
      shadow_.hold(w, offset, 16, std::numeric_limits<uint32_t>::max());
      op.reads.push_back({offset, 16});
    };
    each_chunk_of_b(first, check);
    if (!first.a) each_chunk_of_a(first, w, check);
  }
  bool waits = false;
  for (const WgmmaOp& other : warp.ops.pending()) waits |= !other.done;
  if (mode.poison) {
    const size_t floats = size_t(first.tiles) * 4;
    Hidden& hidden = warp.hidden[op.acc[0]];
    if (hidden.values.empty()) {
      std::copy_n(op.acc, 32, hidden.acc);
      for (float* acc : op.acc) hidden.values.insert(hidden.values.end(), acc, acc + floats);
    }
    for (float* acc : op.acc) std::fill(acc, acc + floats, std::numeric_limits<float>::quiet_NaN());
  } else if (!waits && !(mode.random && (random() & 1))) {
    finish_wgmma(warp, op);
  }
  warp.ops.issue(op);
}

// acc (+)= A B of a warp's 16 rows, the operands read now.
void Machine::finish_wgmma(WarpgroupWarp& warp, WgmmaOp& op) {
  if (op.done) return;
  op.done = true;
  const WgmmaCall& call = op.call;
  const int tiles = call.tiles, first_lane = current_ / 32 * 32;
  float A[16][16];
  static Row8 B[16][MOST_TILES];
  if (call.a) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int i = 0; i < 4; ++i) {
        const uint32_t word = op.a[lane][i];
        if (call.is_tf32) {
          A[lane / 4 + 8 * (i & 1)][lane % 4 + 4 * (i >> 1)] = tf32_value(word);
          continue;
        }
        float* to = &A[lane / 4 + 8 * (i & 1)][2 * (lane % 4) + 8 * (i >> 1)];
        for (int half = 0; half < 2; ++half) {
          const auto bits = uint16_t(word >> (16 * half));
          to[half] = call.is_bf16 ? as_float(uint32_t(bits) << 16) : fp16_value(bits);
        }
      }
    }
  } else {
    each_chunk_of_a(call, first_lane / 32, [&](uint32_t address, int m, int k) {
      decode(operand(address, op.where), call, &A[m][k], call.trans_a ? 16 : 1);
    });
  }
  each_chunk_of_b(call, [&](uint32_t address, int k, int n) {
    auto* to = reinterpret_cast<float*>(&B[k][0]) + n;
    decode(operand(address, op.where), call, to, call.trans_b ? 1 : 8 * MOST_TILES);
  });
  std::vector<float>* hidden = nullptr;
  if (const auto found = warp.hidden.find(op.acc[0]); found != warp.hidden.end())
    hidden = &found->second.values;
  for (int m = 0; m < 16; ++m) {
    const int g = m % 8, half = m / 8;
    float* rows[4];  // of the quad's lanes
    for (int t = 0; t < 4; ++t)
      rows[t] =
          (hidden ? hidden->data() + size_t(4 * g + t) * tiles * 4 : op.acc[4 * g + t]) + 2 * half;
    for (int n = 0; n < tiles; ++n) {
      Row8 sum = {};
      if (call.accumulate)
        for (int t = 0; t < 4; ++t)
          sum[2 * t] = rows[t][4 * n], sum[2 * t + 1] = rows[t][4 * n + 1];
      for (int k = 0; k < 2 * call.chunk(); ++k) sum += A[m][k] * B[k][n];
      for (int t = 0; t < 4; ++t) rows[t][4 * n] = sum[2 * t], rows[t][4 * n + 1] = sum[2 * t + 1];
    }
  }
}

void Machine::wgmma(const WgmmaCall& call, Where where) {
  WgmmaCall mine = call;
  collective(Kind::WGMMA, &mine, where, [](void* const* calls) {
    machine.issue_wgmma(calls, machine.warps_[machine.current_ / 32].where);
  });
}

bool Machine::wgmma_in_flight(const float* acc) const {
  const WarpgroupWarp& warp = wgmma_[current_ / 32];
  for (const WgmmaOp& op : warp.ops.pending())
    if (op.acc[0] == acc) return true;
  return false;
}

void Machine::wgmma_fence(Where where) {
  collective(Kind::WGMMA_FENCE, nullptr, where,
             [](void* const*) { machine.wgmma_[machine.current_ / 32].fenced = true; });
}

void Machine::wgmma_commit(Where where) {
  collective(Kind::WGMMA_COMMIT, nullptr, where,
             [](void* const*) { machine.wgmma_[machine.current_ / 32].ops.commit(); });
}

void Machine::wgmma_wait(int keep, Where where) {
  collective(Kind::WGMMA_WAIT, &keep, where, [](void* const* args) {
    const int w = machine.current_ / 32;
    WarpgroupWarp& warp = machine.wgmma_[w];
    warp.ops.wait(size_t(*static_cast<int*>(args[0])), [&](WgmmaOp& op) {
      machine.finish_wgmma(warp, op);
      warp.fenced = false;
      for (const auto& [offset, bytes] : op.reads)
        machine.shadow_.hold(w, offset, bytes, machine.warps_[w].clock.at[w]);
    });
    // Accumulators that nothing in flight adds to are back in their registers.
    for (auto it = warp.hidden.begin(); it != warp.hidden.end();) {
      bool busy = false;
      for (const WgmmaOp& op : warp.ops.pending()) busy |= op.acc[0] == it->first;
      if (busy) {
        ++it;
        continue;
      }
      const size_t floats = it->second.values.size() / 32;
      for (size_t lane = 0; lane < 32; ++lane)
        std::copy_n(it->second.values.data() + lane * floats, floats, it->second.acc[lane]);
      it = warp.hidden.erase(it);
    }
  });
}

}  // namespace attn::emulation
