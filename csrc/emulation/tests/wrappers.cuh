// One warp, one wrapper: lane l reads in[l][...], calls the wrapper, writes out[l][...].  The tests
// compare with numpy; on a GPU the same kernel gives the golden bits.
// Shared memory starts as the image `smem`, written by the lanes and followed by a barrier.
#pragma once
#include "../../cuda/ptx.cuh"

namespace attn::wrappers {
using namespace ptx;

enum Op : int {
  MMA_BF16,
  MMA_FP16,
  MMA_TF32,
  LDMATRIX_X4,
  LDMATRIX_X4_TRANS,
  LDMATRIX_X2,
  LDMATRIX_X2_TRANS,
  SHFL_XOR,
  SHFL,
  BALLOT,
  PACK_BF16,
  PACK_FP16,
  PACK_RELU_BF16,
  PACK_RELU_FP16,
  UNPACK_BF16,
  UNPACK_FP16,
  TO_TF32,
  EXP2,
  LOG2,
  RCP,
  TANH,
  INTEGERS,
  LDS,
  STS,
  CP_ASYNC_16,
  CP_ASYNC_4,
  ATOMICS,
  IDS,
  GLOBAL,
  BARRIERS,
};

constexpr int WORDS = 16, SMEM_WORDS = 512;  // words a lane has in `in` and `out`; shared words

struct Params {
  int op;
  const uint32_t* in;    // [32, WORDS]
  const uint32_t* smem;  // [SMEM_WORDS]
  uint32_t* out;         // [32, WORDS]
};

template <class T>
ATTN_DEVICE void run_mma(const uint32_t* in, uint32_t* out) {
  float acc[4] = {as_float(in[6]), as_float(in[7]), as_float(in[8]), as_float(in[9])};
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  if constexpr (sizeof(T) == 2) {
    mma_m16n8k16<T>(acc, a, in[4], in[5]);
  } else {
    mma_m16n8k8_tf32(acc, a, in[4], in[5]);
  }
  for (int i = 0; i < 4; ++i) out[i] = as_uint(acc[i]);
}

ATTN_DEVICE void run_matrix(int op, uint32_t addr, uint32_t* out) {
  uint32_t r[4] = {}, half[2] = {};
  if (op == LDMATRIX_X4) ldmatrix_x4(r, addr);
  if (op == LDMATRIX_X4_TRANS) ldmatrix_x4_trans(r, addr);
  if (op == LDMATRIX_X2) ldmatrix_x2(half, addr);
  if (op == LDMATRIX_X2_TRANS) ldmatrix_x2_trans(half, addr);
  const bool two = op == LDMATRIX_X2 || op == LDMATRIX_X2_TRANS;
  for (int i = 0; i < 4; ++i) out[i] = two ? half[i & 1] : r[i];
}

ATTN_DEVICE void run_numbers(int op, const uint32_t* in, uint32_t* out) {
  const float x = as_float(in[0]), y = as_float(in[1]);
  if (op == PACK_BF16) out[0] = pack<bf16>(x, y), out[1] = from_float<bf16>(x).bits;
  if (op == PACK_FP16) out[0] = pack<fp16>(x, y), out[1] = from_float<fp16>(x).bits;
  if (op == PACK_RELU_BF16) out[0] = pack_relu<bf16>(x, y);
  if (op == PACK_RELU_FP16) out[0] = pack_relu<fp16>(x, y);
  if (op == UNPACK_BF16) {
    out[0] = as_uint(unpack_lo<bf16>(in[0])), out[1] = as_uint(unpack_hi<bf16>(in[0]));
  }
  if (op == UNPACK_FP16) {
    out[0] = as_uint(unpack_lo<fp16>(in[0])), out[1] = as_uint(unpack_hi<fp16>(in[0]));
  }
  if (op == TO_TF32) out[0] = to_tf32(x);
  if (op == EXP2) out[0] = as_uint(exp2_approx(x));
  if (op == LOG2) out[0] = as_uint(log2_approx(x));
  if (op == RCP) out[0] = as_uint(rcp_approx(x));
  if (op == TANH) out[0] = as_uint(tanh_accurate(x));
}

ATTN_DEVICE void run_memory(int op, uint32_t base, const uint32_t* in, uint32_t* out) {
  const int lane = lane_id();
  const uint32_t mine = base + lane * 64;
  if (op == LDS) {
    const U32x4 q = lds_128(mine);
    const U32x2 d = lds_64(mine + 16);
    out[0] = q.x, out[1] = q.y, out[2] = q.z, out[3] = q.w, out[4] = d.x, out[5] = d.y;
    out[6] = lds_32(mine + 24), out[7] = as_uint(lds_f32(mine + 28));
    out[8] = lds_16(mine + 34), out[9] = lds_8(mine + 39);
  }
  if (op == STS) {
    sts_128(mine, U32x4{in[0], in[1], in[2], in[3]});
    sts_64(mine + 16, U32x2{in[4], in[5]});
    sts_32(mine + 24, in[6]);
    sts_f32(mine + 28, as_float(in[7]));
    sts_16(mine + 34, uint16_t(in[8]));
    sts_8(mine + 39, uint8_t(in[9]));
  }
  // valid is in[12]; each lane copies its own 16 words of `in`.
  if (op == CP_ASYNC_16) {
    for (int i = 0; i < 3; ++i) cp_async_16(mine + 16 * i, in + 4 * i, in[12] != 0);
  }
  if (op == CP_ASYNC_4) {
    for (int i = 0; i < 12; ++i) cp_async_4(mine + 4 * i, in + i, in[12] != 0);
  }
  if (op == STS || op == CP_ASYNC_16 || op == CP_ASYNC_4) {
    cp_async_commit();
    cp_async_wait<0>();
    sync_warp();  // lane l reads what lane 31 - l wrote
    for (int i = 0; i < 12; ++i) out[i] = lds_32(base + (31 - lane) * 64 + 4 * i);
  }
  if (op == ATOMICS) {
    atomic_add_shared_f32(base, as_float(in[0]));
    sync_warp();  // all lanes have added
    out[0] = lds_32(base);
  }
}

// The high word of a sum, halves of two words, and words by their address.
ATTN_DEVICE void run_integers(const uint32_t* in, uint32_t* out) {
  out[0] = add_high(in[0], in[1], in[2]);
  out[1] = halves_of(in[0], in[1]);
  const uint32_t* words = opaque(in + 4);
  const U32x2 two = ldg_const_64(words);
  const U32x4 four = ldg_const_128(words + 4);
  out[2] = ldg_const_32(words + 3);
  out[3] = two.x, out[4] = two.y;
  out[5] = four.x, out[6] = four.y, out[7] = four.z, out[8] = four.w;
}

// Global memory: words of the lane turned round, sums of the warp in lane 0's last two words.
ATTN_DEVICE void run_global(const uint32_t* in, uint32_t* out, uint32_t* sums) {
  const U32x2 a = ldg_64(in);
  const U32x4 b = ldg_128(in + 4);
  stg_64(out, {a.y, a.x});
  stg_128(out + 4, {b.w, b.z, b.y, b.x});
  atomic_add_global(reinterpret_cast<int*>(sums), int(in[8] & 0xff));
  thread_fence();
  atomic_add_global(reinterpret_cast<float*>(sums + 1), float(in[8] & 0xff));
}

ATTN_KERNEL(32)
void wrappers(ATTN_GRID_CONSTANT const Params p) {
  const int lane = lane_id();
  const uint32_t base = smem_base();
  const uint32_t* in = p.in + lane * WORDS;
  uint32_t* out = p.out + lane * WORDS;
  for (int i = lane; i < SMEM_WORDS; i += 32) sts_32(base + 4 * i, p.smem[i]);
  sync_threads();  // the image is complete
  switch (p.op) {
    case MMA_BF16:
      run_mma<bf16>(in, out);
      break;
    case MMA_FP16:
      run_mma<fp16>(in, out);
      break;
    case MMA_TF32:
      run_mma<float>(in, out);
      break;
    case INTEGERS:
      run_integers(in, out);
      break;
    case LDMATRIX_X4:
    case LDMATRIX_X4_TRANS:
    case LDMATRIX_X2:
    case LDMATRIX_X2_TRANS:
      run_matrix(p.op, base + in[0], out);
      break;
    case SHFL_XOR:
      out[0] = shfl_xor(in[0], 5);
      out[1] = as_uint(shfl_xor(as_float(in[1]), 16));
      out[2] = uint32_t(shfl_xor(int(in[2]), 1));
      break;
    case SHFL:
      out[0] = shfl(in[0], int(in[1]));
      out[1] = as_uint(shfl(as_float(in[0]), 0));
      out[2] = uint32_t(shfl(int(in[0]), 31 - lane));
      break;
    case BALLOT:
      out[0] = ballot(in[0] != 0);
      break;
    case LDS:
    case STS:
    case CP_ASYNC_16:
    case CP_ASYNC_4:
    case ATOMICS:
      run_memory(p.op, base, in, out);
      break;
    case IDS:
      out[0] = thread_id(), out[1] = block_size(), out[2] = warp_id(), out[3] = block_id().x;
      out[4] = grid_size().y;
      break;
    case GLOBAL:
      run_global(in, out, p.out + WORDS - 2);
      break;
    case BARRIERS:
      sts_32(base + 4 * lane, in[0]);
      named_barrier_sync<3>(32);  // every lane has written
      out[0] = lds_32(base + 4 * (31 - lane));
      named_barrier_arrive<4>(32);  // nobody waits
      // the same of IDs that the compiler does not know: 5 and 6
      sts_32(base + 4 * lane, in[0] + 1);
      named_barrier_sync(4 + block_size() / 32, 32);  // every lane has written
      out[1] = lds_32(base + 4 * (31 - lane));
      named_barrier_arrive(5 + block_size() / 32, 32);  // nobody waits
      break;
    default:
      run_numbers(p.op, in, out);
  }
}

}  // namespace attn::wrappers
