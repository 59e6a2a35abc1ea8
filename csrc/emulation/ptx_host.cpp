// Warp collectives of ptx_host.h: each `execute` below runs once for 32 lanes.
// acc, a, b: fragment layouts as written in ../cuda/ptx.cuh.
#include "../cuda/ptx_sm90.cuh"

namespace attn::ptx {
namespace {

using emulation::as_float;
using emulation::as_uint;
using emulation::Where;

// Eight floats, computed as vectors; without these the compiler spills the tile of mma.
typedef float Row8 __attribute__((vector_size(32)));

struct Shuffle {
  uint32_t value;
  int lane;
  uint32_t out;
};

uint32_t shuffle(uint32_t value, int source, Where at) {
  Shuffle mine = {value, source & 31, 0};
  machine.collective(Kind::SHUFFLE, &mine, at, [](void* const* args) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* s = static_cast<Shuffle*>(args[lane]);
      s->out = static_cast<Shuffle*>(args[s->lane])->value;
    }
  });
  return mine.out;
}

struct Matrix {
  uint32_t address;
  uint32_t* out;
  int tiles;
  bool trans;
  Where at;
};

void execute_ldmatrix(void* const* args) {
  const auto* first = static_cast<const Matrix*>(args[0]);
  for (int tile = 0; tile < first->tiles; ++tile) {
    uint16_t rows[8][8];
    uint32_t addresses[8];
    for (int row = 0; row < 8; ++row) {
      const auto* m = static_cast<const Matrix*>(args[tile * 8 + row]);
      addresses[row] = m->address;
      std::memcpy(rows[row], machine.matrix_row(m->address, m->at), 16);
    }
    machine.count_phase(addresses, 8, 16, first->at);
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, col = 2 * (lane % 4);
      const uint16_t lo = first->trans ? rows[col][row] : rows[row][col];
      const uint16_t hi = first->trans ? rows[col + 1][row] : rows[row][col + 1];
      static_cast<Matrix*>(args[lane])->out[tile] = lo | uint32_t(hi) << 16;
    }
  }
}

void ldmatrix(uint32_t* r, uint32_t addr, int tiles, bool trans, Where at) {
  Matrix mine = {addr, r, tiles, trans, at};
  machine.collective(trans ? Kind::LDMATRIX_TRANS : Kind::LDMATRIX, &mine, at, execute_ldmatrix);
}

struct MatrixStore {
  uint32_t address;
  const uint32_t* r;
  Where at;
};

template <bool TRANS>
void execute_stmatrix(void* const* args) {
  const Where at = static_cast<const MatrixStore*>(args[0])->at;
  for (int tile = 0; tile < 4; ++tile) {
    uint16_t rows[8][8];
    uint32_t addresses[8];
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t word = static_cast<const MatrixStore*>(args[lane])->r[tile];
      for (int half = 0; half < 2; ++half) {
        const int i = lane / 4, j = 2 * (lane % 4) + half;
        (TRANS ? rows[j][i] : rows[i][j]) = uint16_t(word >> 16 * half);
      }
    }
    for (int row = 0; row < 8; ++row) {
      addresses[row] = static_cast<const MatrixStore*>(args[tile * 8 + row])->address;
      machine.store_matrix_row(tile * 8 + row, addresses[row], rows[row], false, at);
    }
    machine.count_phase(addresses, 8, 16, at);
  }
}

struct Mma {
  float* acc;
  const uint32_t* a;
  uint32_t b[2];
};

float value(bf16, uint16_t bits) { return as_float(uint32_t(bits) << 16); }
float value(fp16, uint16_t bits) { return emulation::fp16_value(bits); }

// acc += A B with A [16][K] and B [K] rows of 8.  Each sum is taken in fp32 over k in order;
// hardware sums in another order and truncates: compare within a tolerance.
template <int K>
void multiply(void* const* args, const float (&A)[16][K], const Row8 (&B)[K]) {
  for (int row = 0; row < 16; ++row) {
    Row8 sum;
    const int half = row / 8, g = row % 8;
    for (int q = 0; q < 4; ++q) {
      const auto* m = static_cast<const Mma*>(args[g * 4 + q]);
      sum[2 * q] = m->acc[2 * half];
      sum[2 * q + 1] = m->acc[2 * half + 1];
    }
    for (int k = 0; k < K; ++k) sum += A[row][k] * B[k];
    for (int q = 0; q < 4; ++q) {
      auto* m = static_cast<Mma*>(args[g * 4 + q]);
      m->acc[2 * half] = sum[2 * q];
      m->acc[2 * half + 1] = sum[2 * q + 1];
    }
  }
}

template <class T>
void execute_mma(void* const* args) {
  float A[16][16];
  Row8 B[16];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* m = static_cast<const Mma*>(args[lane]);
    const int g = lane / 4, c = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1), col = c + 8 * (i >> 1);
      A[row][col] = value(T{}, uint16_t(m->a[i]));
      A[row][col + 1] = value(T{}, uint16_t(m->a[i] >> 16));
    }
    for (int i = 0; i < 2; ++i) {
      B[c + 8 * i][g] = value(T{}, uint16_t(m->b[i]));
      B[c + 8 * i + 1][g] = value(T{}, uint16_t(m->b[i] >> 16));
    }
  }
  multiply(args, A, B);
}

void execute_mma_tf32(void* const* args) {
  float A[16][8];
  Row8 B[8];
  const auto truncate = [](uint32_t v) { return as_float(v & 0xffffe000u); };
  for (int lane = 0; lane < 32; ++lane) {
    const auto* m = static_cast<const Mma*>(args[lane]);
    const int g = lane / 4, c = lane % 4;
    for (int i = 0; i < 4; ++i) A[g + 8 * (i & 1)][c + 4 * (i >> 1)] = truncate(m->a[i]);
    for (int i = 0; i < 2; ++i) B[c + 4 * i][g] = truncate(m->b[i]);
  }
  multiply(args, A, B);
}

}  // namespace

uint32_t shfl_xor(uint32_t value, int mask, Where at) {
  return shuffle(value, lane_id() ^ mask, at);
}
uint32_t shfl(uint32_t value, int lane, Where at) { return shuffle(value, lane, at); }

uint32_t ballot(bool flag, Where at) {
  uint32_t mine = flag;
  machine.collective(Kind::BALLOT, &mine, at, [](void* const* args) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= *static_cast<uint32_t*>(args[lane]) << lane;
    for (int lane = 0; lane < 32; ++lane) *static_cast<uint32_t*>(args[lane]) = bits;
  });
  return mine;
}

// Any lane may be the one; random mode takes any.
bool elect_one(Where at) {
  uint32_t mine = 0;
  machine.collective(Kind::ELECT, &mine, at, [](void* const* args) {
    *static_cast<uint32_t*>(args[machine.mode.random ? machine.random() & 31 : 0]) = 1;
  });
  return mine != 0;
}

void named_barrier(int id, int threads, bool wait, Where at) {
  if (id < 1 || id >= emulation::BARRIERS)
    machine.fail(at, "named barriers are 1..15, got " + std::to_string(id));
  machine.barrier(id, threads, wait, at);
}
void named_barrier_sync(int id, int threads, Where at) { named_barrier(id, threads, true, at); }
void named_barrier_arrive(int id, int threads, Where at) { named_barrier(id, threads, false, at); }

void ldmatrix_x4(uint32_t (&r)[4], uint32_t addr, Where at) { ldmatrix(r, addr, 4, false, at); }
void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t addr, Where at) {
  ldmatrix(r, addr, 4, true, at);
}
void ldmatrix_x2(uint32_t (&r)[2], uint32_t addr, Where at) { ldmatrix(r, addr, 2, false, at); }
void ldmatrix_x2_trans(uint32_t (&r)[2], uint32_t addr, Where at) {
  ldmatrix(r, addr, 2, true, at);
}

void stmatrix_x4(uint32_t addr, const uint32_t (&r)[4], Where at) {
  MatrixStore mine = {addr, r, at};
  machine.collective(Kind::STMATRIX, &mine, at, execute_stmatrix<false>);
}
void stmatrix_x4_trans(uint32_t addr, const uint32_t (&r)[4], Where at) {
  MatrixStore mine = {addr, r, at};
  machine.collective(Kind::STMATRIX_TRANS, &mine, at, execute_stmatrix<true>);
}

template <>
void mma_m16n8k16<bf16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        Where at) {
  Mma mine = {acc, a, {b0, b1}};
  machine.collective(Kind::MMA, &mine, at, execute_mma<bf16>);
}
template <>
void mma_m16n8k16<fp16>(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                        Where at) {
  Mma mine = {acc, a, {b0, b1}};
  machine.collective(Kind::MMA, &mine, at, execute_mma<fp16>);
}
void mma_m16n8k8_tf32(float (&acc)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, Where at) {
  Mma mine = {acc, a, {b0, b1}};
  machine.collective(Kind::MMA_TF32, &mine, at, execute_mma_tf32);
}

}  // namespace attn::ptx
