#include "operations.h"

namespace attn::compiled {

void mma_bf16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where at) {
  ptx::mma_m16n8k16<ptx::bf16>(acc, a, b[0], b[1], at);
}
void mma_fp16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Where at) {
  ptx::mma_m16n8k16<ptx::fp16>(acc, a, b[0], b[1], at);
}

namespace {
struct Store {
  uint32_t address;
  const uint32_t* r;
  int tiles;
  bool trans;
  Where at;
};
}  // namespace

void stmatrix(uint32_t address, const uint32_t* r, int tiles, bool trans, Where at) {
  Store mine = {address, r, tiles, trans, at};
  machine.collective(Kind::STMATRIX, &mine, at, [](void* const* args) {
    const auto store = [&](int lane) { return static_cast<const Store*>(args[lane]); };
    const bool trans = store(0)->trans;
    for (int tile = 0; tile < store(0)->tiles; ++tile) {
      for (int row = 0; row < 8; ++row) {
        uint16_t words[8];
        for (int column = 0; column < 8; ++column) {
          const int i = trans ? column : row, j = trans ? row : column;
          const uint32_t pair = store(4 * i + j / 2)->r[tile];
          words[column] = uint16_t(j % 2 ? pair >> 16 : pair);
        }
        const int lane = 8 * tile + row;
        machine.store_matrix_row(lane, store(lane)->address, words, true, store(0)->at);
      }
    }
  });
}

}  // namespace attn::compiled
