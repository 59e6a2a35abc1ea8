"""Bugs that test_emulator_mutations.py plants, those in the Hopper backward apart."""

from dataclasses import dataclass

GEMM, FORWARD, BACKWARD, HOPPER = 0, 1, 2, 3  # PART of mutant.cpp
PTX90, FWD90, PARTS90 = "cuda/ptx_sm90.cuh", "cuda/sm90/forward.cuh", "cuda/sm90/parts.cuh"
DQ90, DKDV90 = "cuda/sm90/backward_dq.cuh", "cuda/sm90/backward_dkdv.cuh"
TRAITS, HOST90 = "cuda/traits.cuh", "cuda/sm90/kernels.h"
EXAMPLE, MMA, SMEM = "emulation/tests/example.cuh", "cuda/mma.cuh", "cuda/smem.cuh"
SOFTMAX, MASK, PARTS, BWD_PARTS, FWD, BWD = (
    "cuda/softmax.cuh",
    "cuda/mask.cuh",
    "cuda/forward_parts.cuh",
    "cuda/backward_parts.cuh",
    "cuda/sm80/forward.cuh",
    "cuda/sm80/backward.cuh",
)


@dataclass(frozen=True)
class Mutant:
    """old -> new in one file; `caught` are the modes that must not say ok, `silent` those that do.

    silent is asserted too: it documents what a mode is blind to, and why several exist.
    """

    part: int
    file: str
    old: str
    new: str
    caught: tuple[str, ...]
    silent: tuple[str, ...] = ()


ALL_MODES = ("plain", "random", "poison", "race", "all")
BARRIER = (
    "    sync_threads();  // tile t is complete, and every warp is done with the buffer of t - 1"
)
MUTANTS = {
    # ---- the example kernel: separate barriers for arrival and reuse
    "barrier before the tile is read": Mutant(
        GEMM,
        EXAMPLE,
        "    sync_threads();  // the copies of all threads for this step have landed\n",
        "",
        ("poison", "race", "all"),
    ),
    "barrier before the buffer is reused": Mutant(
        GEMM,
        EXAMPLE,
        "sync_threads();  // all warps have read this stage before the next copy overwrites it",
        "",
        ("race", "all"),
    ),
    "waits for one group too few": Mutant(
        GEMM, EXAMPLE, "cp_async_wait<1>", "cp_async_wait<2>", ALL_MODES
    ),
    "copy not committed": Mutant(
        GEMM,
        EXAMPLE,
        "copy_stage(0);\n  cp_async_commit();",
        "copy_stage(0);",
        ("poison", "race", "all"),
        ("plain",),
    ),
    "prefetch into the live buffer": Mutant(
        GEMM,
        EXAMPLE,
        "copy_stage(step + 1);",
        "copy_stage(step + 2);",
        ("plain", "random", "poison", "all"),
    ),
    "swizzle of A, on one side": Mutant(
        GEMM,
        EXAMPLE,
        "(lane & 15), k * 2 + (lane >> 4)",
        "(lane & 15), k * 2 + (lane & 1)",
        ALL_MODES,
    ),
    "rows not swizzled": Mutant(
        GEMM, EXAMPLE, "(chunk ^ ((row >> 1) & 3))", "chunk", ("banks",), ALL_MODES
    ),
    # ---- forward
    "forward: barrier before K": Mutant(FORWARD, FWD, BARRIER, "", ("poison", "race", "all")),
    "forward: wait before K and V": Mutant(
        FORWARD,
        FWD,
        "    cp_async_wait<0>();\n" + BARRIER,
        BARRIER,
        ("poison", "race", "all"),
        ("plain",),
    ),
    "forward: Q of a tile without keys is still being copied at the end": Mutant(
        FORWARD, FWD, "no group yet.\n  cp_async_commit();", "no group yet.", ALL_MODES
    ),
    "forward: prefetch overwrites the V that slow warps read": Mutant(
        FORWARD,
        FWD,
        BARRIER + "\n    if (Tile::STAGES > 1 && t + 1 < t1) copy_keys(t + 1);",
        "    if (Tile::STAGES > 1 && t + 1 < t1) copy_keys(t + 1);\n" + BARRIER,
        ("race", "all"),
    ),
    "forward: one stage for two tiles": Mutant(
        FORWARD,
        FWD,
        "auto copy_keys = [&](int t) {\n"
        "    const uint32_t stage = uint32_t(t % Tile::STAGES) * N * BYTES;",
        "auto copy_keys = [&](int t) {\n    const uint32_t stage = 0;",
        ("plain", "random", "poison", "race", "all"),
    ),
    "forward: vote read before every warp has written it": Mutant(
        FORWARD,
        SMEM,
        "  sync_threads();  // every warp's vote is there\n",
        "",
        ("race", "all"),
        ("plain",),
    ),
    "forward: column of the mask's fragment": Mutant(
        FORWARD,
        PARTS,
        "const int j = n0 + 8 * n + 2 * (lane_id() & 3) + (c & 1);",
        "const int j = n0 + 8 * n + (lane_id() & 3) + 4 * (c & 1);",
        ALL_MODES,
    ),
    "forward: row of the mask's fragment": Mutant(
        FORWARD, PARTS, "const Query& q = query[c >> 1];", "const Query& q = query[0];", ALL_MODES
    ),
    "forward: B fragments swapped": Mutant(
        FORWARD,
        MMA,
        "Mma<T>::run(C[n], a, b[0], b[1]);",
        "Mma<T>::run(C[n], a, b[1], b[0]);",
        ALL_MODES,
    ),
    "forward: A and B halves of K out of step": Mutant(
        FORWARD, MMA, "2 * step, (lane >> 3) & 1)", "2 * step, lane >> 4)", ALL_MODES
    ),
    "forward: V without transposition": Mutant(
        FORWARD, MMA, "ldmatrix_x4_trans(b,", "ldmatrix_x4(b,", ALL_MODES
    ),
    "forward: P packed with its rows exchanged": Mutant(
        FORWARD,
        MMA,
        "return {{pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3])",
        "return {{pack<T>(c[0][2], c[0][3]), pack<T>(c[0][0], c[0][1])",
        ALL_MODES,
    ),
    "forward: swizzle differs between copy and read": Mutant(
        FORWARD,
        SMEM,
        "cp_async_16(tile_address<T, HEAD_DIM>(tile, row, chunk),",
        "cp_async_16(tile_address<T, HEAD_DIM>(tile, row, chunk ^ (row >> 3 & 1)),",
        ALL_MODES,
    ),
    "forward: no swizzle at all": Mutant(
        FORWARD,
        SMEM,
        "Row<T, HEAD_DIM>::BYTES % 128 == 0 ? row & 7 : (row >> 1) & 3",
        "0 * row",
        ("banks",),
        ALL_MODES,
    ),
    "forward: O not rescaled to the new maximum": Mutant(
        FORWARD,
        SOFTMAX,
        "acc[n][2 * r] *= alpha, acc[n][2 * r + 1] *= alpha;",
        "(void)acc;",
        ALL_MODES,
    ),
    "forward: maximum of half a row": Mutant(
        FORWARD, SOFTMAX, "return fmaxf(x, shfl_xor(x, 2));", "return x;", ALL_MODES
    ),
    "forward: -inf minus -inf in an empty row": Mutant(
        FORWARD, SOFTMAX, "top == -kInf ? 0.0f : top * scale;", "top * scale;", ALL_MODES
    ),
    "forward: shuffle only in warps that store": Mutant(
        FORWARD,
        SOFTMAX,
        "  const float sum = quad_sum(state.sum[r]);",
        "  if ((lane_id() & 3) != 0) return {0, 0, 0, 0};\n"
        "  const float sum = quad_sum(state.sum[r]);",
        ALL_MODES,
    ),
    "forward: causal band ends a key early": Mutant(
        FORWARD, MASK, "j <= i + diagonal + right)", "j < i + diagonal + right)", ALL_MODES
    ),
    "forward: tile taken for unmasked at the diagonal": Mutant(
        FORWARD,
        MASK,
        "j1 - 1 <= i0 + diagonal + right",
        "j1 - 1 <= i1 + diagonal + right",
        ALL_MODES,
    ),
    "forward: shared memory one tile short": Mutant(
        FORWARD,
        FWD,
        "const uint32_t V_smem = K_smem + Tile::STAGES * N * BYTES;",
        "const uint32_t V_smem = K_smem + 2 * Tile::STAGES * N * BYTES;",
        ALL_MODES,
    ),
    # ---- forward of sm_90
    "sm90: K read before it has landed": Mutant(
        HOPPER,
        FWD90,
        "    K.wait(turn);\n    scores(S, turn);",
        "    scores(S, turn);",
        ("poison", "race", "all"),
    ),
    "sm90: next K read before it has landed": Mutant(
        HOPPER,
        FWD90,
        "      if (turn + 1 < end) K.wait(turn + 1);\n      wgmma_wait<0>();",
        "      wgmma_wait<0>();",
        ("race", "all"),
    ),
    "sm90: V read before it has landed": Mutant(
        HOPPER,
        FWD90,
        "      V.wait(turn - 1);\n      turns.wait();",
        "      turns.wait();",
        ("race", "all"),
    ),
    "sm90: K freed while wgmma reads it": Mutant(
        HOPPER,
        FWD90,
        "      wgmma_wait<1>();  // S is there\n      wgmma_hold(S);\n      K.release(turn);",
        "      K.release(turn);\n      wgmma_wait<1>();  // S is there\n      wgmma_hold(S);",
        ("race", "all"),
        ("plain",),
    ),
    "sm90: K of an edge freed while wgmma reads it": Mutant(
        HOPPER,
        FWD90,
        "    wgmma_wait<0>();\n    wgmma_hold(S);\n    K.release(turn);",
        "    K.release(turn);\n    wgmma_wait<0>();\n    wgmma_hold(S);",
        ("race", "all"),
        ("plain",),
    ),
    "sm90: V freed while wgmma reads it": Mutant(
        HOPPER,
        FWD90,
        "      wgmma_wait<0>();  // O is there\n      wgmma_hold(O);\n      V.release(turn - 1);",
        "      V.release(turn - 1);\n      wgmma_wait<0>();  // O is there\n      wgmma_hold(O);",
        ("race", "all"),
        ("plain",),
    ),
    "sm90: S read before the wait": Mutant(
        HOPPER,
        FWD90,
        "wgmma_wait<1>();  // S is there",
        "wgmma_wait<2>();  // S is there",
        ("random", "poison", "all"),
        ("plain",),
    ),
    "sm90: O rescaled while wgmma adds to it": Mutant(
        HOPPER,
        FWD90,
        "      wgmma_wait<0>();  // O is there\n",
        "",
        ("random", "poison", "race", "all"),
        ("plain",),
    ),
    "sm90: O not rescaled where the base moved": Mutant(
        HOPPER, FWD90, "if (moved) lazy.rescale(O);", "", ALL_MODES
    ),
    "sm90: the sum not rescaled where the base moved": Mutant(
        HOPPER,
        FWD90,
        "state.max[r] = max, state.sum[r] *= alpha[r];",
        "state.max[r] = max;",
        ALL_MODES,
    ),
    "sm90: only one row's growth moves the base": Mutant(
        HOPPER, FWD90, "(top[0] > limit[0]) | (top[1] > limit[1])", "top[0] > limit[0]", ALL_MODES
    ),
    "sm90: the limit is not that of the new base": Mutant(
        HOPPER,
        FWD90,
        "limit[r] = max + GROWTH / scale;",
        "limit[r] = max + 100 * GROWTH / scale;",
        ALL_MODES,
    ),
    "sm90: nobody has the first turn": Mutant(
        HOPPER, FWD90, "if (both && group == 1) named_barrier_arrive<FIRST>(256);", "", ALL_MODES
    ),
    "sm90: a warpgroup passes the turn to itself": Mutant(
        HOPPER,
        FWD90,
        "named_barrier_arrive(FIRST + 1 - group, 256)",
        "named_barrier_arrive(FIRST + group, 256)",
        ALL_MODES,
    ),
    "sm90: a warpgroup waits for one that rests": Mutant(
        HOPPER,
        FWD90,
        "const bool both = task.row0 + 64 < task.rows;",
        "const bool both = true;",
        ALL_MODES,
    ),
    "sm90: O of an edge read before the wait": Mutant(
        HOPPER,
        FWD90,
        "    output(turn);\n    wgmma_wait<0>();",
        "    output(turn);",
        ALL_MODES,
    ),
    "sm90: the order of turns leaves a tile out": Mutant(
        HOPPER, FWD90, "t : t + whole_end - whole_first;", "t : t;", ALL_MODES
    ),
    "sm90: a tile at the edge taken for whole": Mutant(
        HOPPER,
        FWD90,
        "min_int(s.end, whole_hi / block_n)",
        "min_int(s.end, ceil_div(whole_hi, block_n))",
        ALL_MODES,
    ),
    "sm90: bytes not announced": Mutant(
        HOPPER,
        PARTS90,
        "mbarrier_arrive_expect_tx(full_bar(i), int(bytes));",
        "mbarrier_arrive(full_bar(i));",
        ALL_MODES,
    ),
    "sm90: half of the bytes announced": Mutant(
        HOPPER, PARTS90, "full_bar(i), int(bytes));", "full_bar(i), int(bytes) / 2);", ALL_MODES
    ),
    "sm90: parity of the first round for ever": Mutant(
        HOPPER,
        PARTS90,
        "mbarrier_wait(full_bar(i), parity(i));",
        "mbarrier_wait(full_bar(i), 0);",
        ("poison", "race", "all"),
    ),
    "sm90: parity of the empty mbarrier": Mutant(
        HOPPER,
        PARTS90,
        "mbarrier_wait(empty_bar(i), parity(i) ^ 1);",
        "mbarrier_wait(empty_bar(i), parity(i));",
        ALL_MODES,
    ),
    "sm90: loads into buffers that are still read": Mutant(
        HOPPER,
        PARTS90,
        "    mbarrier_wait(empty_bar(i), parity(i) ^ 1);  // every consumer has read the tile "
        "before\n",
        "",
        ("race", "all"),
    ),
    "sm90: one warpgroup frees what both read": Mutant(
        HOPPER,
        PARTS90,
        "mbarrier_init(empty_bar(s), CONSUMER_WARPS);",
        "mbarrier_init(empty_bar(s), CONSUMER_WARPS / 2);",
        ("race", "all"),
    ),
    "sm90: no wgmma_fence before P V": Mutant(
        HOPPER, FWD90, "    wgmma_fence();\n    output(turn);", "    output(turn);", ALL_MODES
    ),
    "sm90: copy engine does not know the mbarriers": Mutant(
        HOPPER, PARTS90, "    fence_mbarrier_init();\n", "", ALL_MODES
    ),
    "sm90: mbarriers used before they are there": Mutant(
        HOPPER, PARTS90, "  sync_threads();  // the mbarriers are there\n", "", ("race", "all")
    ),
    "sm90: more registers than the block has": Mutant(
        HOPPER, PARTS90, "setmaxnreg_inc<CONSUMER_REGISTERS>", "setmaxnreg_inc<248>", ALL_MODES
    ),
    "sm90: stride between groups of 8 rows": Mutant(
        HOPPER, PTX90, "uint64_t(1024 >> 4) << 32", "uint64_t(512 >> 4) << 32", ALL_MODES
    ),
    "sm90: swizzle of the descriptor": Mutant(
        HOPPER,
        PTX90,
        "SWIZZLE_128 = uint64_t(1) << 62",
        "SWIZZLE_128 = uint64_t(2) << 62",
        ALL_MODES,
    ),
    "sm90: distance of V's slabs": Mutant(
        HOPPER, PARTS90, "(V, STEPS * 16 * 128)", "(V, STEPS * 8 * 128)", ALL_MODES
    ),
    "sm90: a step of 16 columns of K": Mutant(
        HOPPER, PARTS90, "column = step % 4 * 32;", "column = step % 4 * 16;", ALL_MODES
    ),
    "sm90: a step of 16 rows of V": Mutant(
        HOPPER, PARTS90, "wgmma_moved(v, step * 2048)", "wgmma_moved(v, step * 1024)", ALL_MODES
    ),
    "sm90: V taken for K-major": Mutant(
        HOPPER, PARTS90, "wgmma_rs<T, true>", "wgmma_rs<T, false>", ALL_MODES
    ),
    "sm90: both warpgroups take the first rows": Mutant(
        HOPPER, FWD90, "smem.Q + group * 64 * 128", "smem.Q", ALL_MODES
    ),
    "sm90: P packed with its tiles exchanged": Mutant(
        HOPPER, PARTS90, "P[n / 2][n % 2 * 2] =", "P[n / 2][2 - n % 2 * 2] =", ALL_MODES
    ),
    # ---- backward
    "backward: barrier before the tile": Mutant(
        BACKWARD,
        BWD,
        "sync_threads();  // tile u is complete, and every warp is done with the buffer of u - 1",
        "",
        ("poison", "race", "all"),
    ),
    "backward: wait before the tile": Mutant(
        BACKWARD,
        BWD,
        "    cp_async_wait<0>();\n    sync_threads();  // tile u",
        "    sync_threads();  // tile u",
        ("poison", "race", "all"),
        ("plain",),
    ),
    "backward: delta of the neighbour": Mutant(
        BACKWARD, BWD_PARTS, "p.delta[at]);", "p.delta[at - (i & 1)]);", ALL_MODES
    ),
    "backward: rows of the transposed fragment": Mutant(
        BACKWARD,
        BWD,
        "check, P[n][2 * r + c],\n",
        "check, P[n][2 * r + 1 - c],\n",
        ALL_MODES,
    ),
    "backward: group of one K/V head not summed": Mutant(
        BACKWARD, BWD, "last = per_head * p.group;", "last = per_head;", ALL_MODES
    ),
    # ---- several sequences, one behind the other
    "sm90: varlen: keys masked by the longest length": Mutant(
        HOPPER, PARTS, "j < score.seq.seqlen_k", "j < score.p.p.seqlen_k", ALL_MODES
    ),
    "sm90: varlen: tiles taken for whole by the longest length": Mutant(
        HOPPER,
        FWD90,
        "task.row0, task.end, task.seq.seqlen_k",
        "task.row0, task.end, x.p.p.seqlen_k",
        ALL_MODES,
    ),
    "sm90: varlen: O and LSE stored over the next sequence": Mutant(
        HOPPER, PARTS90, "t.rows = t.seq.seqlen_q;", "t.rows = int(p.p.seqlen_q);", ALL_MODES
    ),
    "sm90: varlen: LSE of every sequence in the first one's place": Mutant(
        HOPPER, TRAITS, "h * p.p.lse_stride_h + q_start + i", "h * p.p.lse_stride_h + i", ALL_MODES
    ),
    "sm90: varlen: keys of the first sequence for all": Mutant(
        HOPPER, FWD90, "at.k + turns.tile(turn) * N", "turns.tile(turn) * N", ALL_MODES
    ),
    "sm90: varlen: a batch that the tensor map does not have": Mutant(
        HOPPER, PARTS90, "b(p.ptr.cu_seqlens_q ? 0 : seq.b)", "b(seq.b)", ALL_MODES
    ),
    "sm90: varlen: the tensor map ends with the longest sequence": Mutant(
        HOPPER,
        HOST90,
        "return ptr.cu_seqlens_k ? p.rows_k : p.seqlen_k;",
        "return p.seqlen_k;",
        ALL_MODES,
    ),
    "sm90: varlen: only consumers leave tiles beyond the end": Mutant(
        HOPPER,
        FWD90,
        "if (task.row0 >= task.rows) return;",
        "if (task.row0 >= task.rows && warp_id() >= 4) return;",
        ALL_MODES,
    ),
}
