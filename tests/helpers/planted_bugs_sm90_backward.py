"""Bugs that test_emulator_mutations.py plants in the Hopper backward kernels."""

from planted_bugs import ALL_MODES, Mutant

DQ, DKDV, FUSED, PARTS, LAUNCH = (
    f"cuda/sm90/{name}.cuh"
    for name in ("backward_dq", "backward_dkdv", "backward_fused", "backward_parts", "kernels")
)
# PART of mutant.cpp: dQ by itself, D = 128; the same, D = 192; all in one kernel, D = 128
HOPPER_BACKWARD, HOPPER_SPLIT, HOPPER_FUSED = 4, 5, 6

ROWS = {  # as the fields of Mutant
    "Q read before it has landed": (
        HOPPER_BACKWARD, DKDV,
        "    smem.Q.wait(turn);\n    wgmma_fence();\n", "    wgmma_fence();\n",
        ("poison", "race", "all"),
    ),
    "dO read before it has landed": (
        HOPPER_BACKWARD, DKDV,
        "    smem.dO.wait(turn);\n    wgmma_fence();  //", "    wgmma_fence();  //",
        ("race", "all"),
    ),
    "Q freed while wgmma reads it": (
        HOPPER_BACKWARD, DKDV,
        "    wgmma_wait<0>();  // dK is there\n    wgmma_hold(dK);\n    wgmma_hold(dS);\n"
        "    smem.Q.release(turn);",
        "    smem.Q.release(turn);\n    wgmma_wait<0>();  // dK is there\n    wgmma_hold(dK);\n",
        ("race", "all"), ("plain",),
    ),
    "S read before the wait": (
        HOPPER_BACKWARD, DKDV,
        "wgmma_wait<1>();  // S is there", "wgmma_wait<2>();  // S is there",
        ("poison", "all"),
    ),
    "dP read before the wait": (
        HOPPER_BACKWARD, DKDV,
        "wgmma_wait<1>();  // dP is there", "wgmma_wait<2>();  // dP is there",
        ("poison", "all"),
    ),
    "dK stored before the wait": (
        HOPPER_BACKWARD, DKDV,
        "wgmma_wait<0>();  // dK is there", "wgmma_wait<1>();  // dK is there",
        ("all",),
    ),
    "LSE read before it is there": (
        HOPPER_BACKWARD, DKDV, "    Q.init(2);", "    Q.init(1);", ALL_MODES,
    ),
    "LSE overwritten while it is read": (
        HOPPER_BACKWARD, DKDV, "    smem.Q.wait_empty(turn);\n", "", ("race", "all"),
    ),
    "LSE announced before every lane has stored": (
        HOPPER_BACKWARD, DKDV, "    sync_warp();  // every lane has stored\n", "", ("race", "all"),
    ),
    "delta taken from LSE": (
        HOPPER_BACKWARD, DKDV, "lse(turn) + 4 * Tile::BLOCK_M", "lse(turn)", ALL_MODES,
    ),
    "K, V not waited for": (
        HOPPER_BACKWARD, DKDV, "  if (task.tiles) mbarrier_wait(smem.keys_full, 0);\n", "",
        ("poison", "race", "all"),
    ),
    "bytes of V not announced": (
        HOPPER_BACKWARD, DKDV,
        "expect_tx(smem.keys_full, 2 * Tile::KEY_BYTES);",
        "expect_tx(smem.keys_full, Tile::KEY_BYTES);", ALL_MODES,
    ),
    "both warpgroups take V of the first keys": (
        HOPPER_BACKWARD, DKDV, "smem.V + group * 64 * 128", "smem.V", ALL_MODES,
    ),
    "rows of the mask": (
        HOPPER_BACKWARD, DKDV,
        "Columns::of_key(score, key + 8, m0)", "Columns::of_key(score, key, m0)",
        ALL_MODES,
    ),
    "keys beyond the last query's band": (
        HOPPER_BACKWARD, PARTS, "(8 * n + c < hi)", "(8 * n + c <= hi)", ALL_MODES,
    ),
    "an edge taken for whole": (
        HOPPER_BACKWARD, PARTS,
        "!score.band.full(i0, i1, j0, j1)", "!score.band.full(i1 - 1, i1, j0, j1)",
        ALL_MODES,
    ),
    "one head of the group for all": (
        HOPPER_BACKWARD, DKDV,
        "task.head_k * x.p.group + h;", "task.head_k * x.p.group;", ALL_MODES,
    ),
    "stride between slabs of K": (
        HOPPER_BACKWARD, DKDV,
        "issue_rows<T, HEAD_DIM, Tile::BLOCK_N>(S,", "issue_rows<T, HEAD_DIM, M>(S,",
        ALL_MODES,
    ),
    "dQ: K freed while wgmma reads it": (
        HOPPER_BACKWARD, DQ,
        "      issue_sum<T>(dQ, A, K.tile(turn));\n      wgmma_wait<0>();\n",
        "      issue_sum<T>(dQ, A, K.tile(turn));\n", ALL_MODES,
    ),
    "dQ: no fence between dS and its product": (
        HOPPER_BACKWARD, DQ, "      wgmma_fence();\n      issue_sum", "      issue_sum", ALL_MODES,
    ),
    "split: P read before it is there": (
        HOPPER_SPLIT, DKDV,
        "    named_barrier_sync<WEIGHTS_FULL>(256);  // P of this turn is there\n",
        "    named_barrier_arrive<WEIGHTS_FULL>(256);\n", ("race", "all"),
    ),
    "split: P overwritten while it is read": (
        HOPPER_SPLIT, DKDV,
        "    if (turn) named_barrier_sync<WEIGHTS_EMPTY>(256);",
        "    if (turn) named_barrier_arrive<WEIGHTS_EMPTY>(256);", ("race", "all"),
    ),
    "fused: dS stored without a fence": (
        HOPPER_FUSED, FUSED, "    fence_proxy_async();  // wgmma reads it\n", "", ("race", "all"),
        ("plain",),
    ),
    "fused: dQ stored without a fence": (
        HOPPER_FUSED, FUSED, "    fence_proxy_async();  // the copy engine reads it\n", "",
        ("race", "all"), ("plain",),
    ),
    "fused: a fence of one thread for all": (
        HOPPER_FUSED, FUSED, "    fence_proxy_async();  // the copy engine reads it\n",
        "    if (issues()) fence_proxy_async();\n", ("race", "all"), ("plain",),
    ),
    "fused: dS of the other warpgroup not waited for": (
        HOPPER_FUSED, FUSED, "    named_barrier_sync<BOTH>(256);\n", "", ("race", "all"),
    ),
    "fused: dQ overwritten while the engine reads it": (
        HOPPER_FUSED, FUSED, "    if (issues()) bulk_wait_read<0>();\n", "", ("race", "all"),
    ),
    "fused: dQ added before all of it is there": (
        HOPPER_FUSED, FUSED,
        "    group == 0 ? named_barrier_sync<1>(128) : named_barrier_sync<2>(128);  // all of dQ",
        "    // all of dQ", ("race", "all"),
    ),
    "fused: NaN in keys of the other warpgroup": (
        HOPPER_FUSED, FUSED, "(lds_32(mine.bad_keys()) &&", "(false &&", ALL_MODES,
    ),
    "fused: read before the look at the keys is done": (
        HOPPER_FUSED, FUSED,
        "group == 0 ? named_barrier_sync<1>(128) : named_barrier_sync<2>(128);  // it is",
        "// it is", ("race", "all"),
    ),
    "fused: one buffer for dS": (
        HOPPER_FUSED, FUSED, "uint32_t(turn % 2) * 2 * Tile", "uint32_t(turn % 1) * 2 * Tile",
        ("race", "all"),
    ),
    "fused: tiles of stmatrix exchanged": (
        HOPPER_FUSED, FUSED, "(lane >> 3 & 1)", "(lane >> 4 & 1)", ALL_MODES,
    ),
    "fused: dS not swizzled": (
        HOPPER_FUSED, FUSED, "((chunk ^ (lane & 7)) << 4)", "(chunk << 4)", ALL_MODES,
    ),
    "fused: dS of the second warpgroup": (
        HOPPER_FUSED, FUSED, "step / 4 * Tile::SCORE_BYTES + step % 4", "step % 4", ALL_MODES,
    ),
    "fused: columns of dQ": (
        HOPPER_FUSED, FUSED, "smem.K + column_slab() * SLAB, SLAB)",
        "smem.K, SLAB)", ALL_MODES,
    ),
    "fused: K taken for K-major": (
        HOPPER_FUSED, FUSED, "wgmma_ss<T, true>(", "wgmma_ss<T, false>(", ALL_MODES,
    ),
    "fused: dQ read before the wait": (
        HOPPER_FUSED, FUSED, "wgmma_wait<0>();  // dQ is there", "wgmma_wait<1>();",
        ("random", "poison", "all"), ("plain",),
    ),
    "fused: half of dQ added": (
        HOPPER_FUSED, FUSED, "staging(), Tile::SUM_BYTES);", "staging(), Tile::SUM_BYTES / 2);",
        ALL_MODES,
    ),
    "fused: dQ of another head": (
        HOPPER_FUSED, FUSED, "heads_q + head) * p.m_tiles;", "heads_q) * p.m_tiles;", ALL_MODES,
    ),
    "fused: sums not cleared": (
        HOPPER_FUSED, LAUNCH, "sm80::grid_of(p.heads_q * sum_tiles(p, ptr)), 128", "{1, 1, 1}, 128",
        ALL_MODES,
    ),
    "fused: shared memory given back while it is read": (
        HOPPER_FUSED, FUSED, "  if (mine.issues()) bulk_wait_read<0>();", "", ALL_MODES,
    ),
    "fused: Q freed while dK is under way": (
        HOPPER_FUSED, FUSED, "      wgmma_wait<1>();  // dV and dK are there\n", "",
        ("race", "all"), ("plain",),
    ),
    "varlen: dK, dV stored over the next sequence": (
        HOPPER_BACKWARD, DKDV, "if (j >= task.seq.seqlen_k) continue;",
        "if (j >= p.p.seqlen_k) continue;", ALL_MODES,
    ),
    "varlen: queries of the next sequence count": (
        HOPPER_BACKWARD, PARTS, "query_range(j, j + 1, score.seq.seqlen_q",
        "query_range(j, j + 1, int(score.p.p.seqlen_q)", ALL_MODES,
    ),
    "varlen: keys of the next sequence count": (
        HOPPER_BACKWARD, PARTS, "key_range(i, i + 1, score.seq.seqlen_k",
        "key_range(i, i + 1, int(score.p.p.seqlen_k)", ALL_MODES,
    ),
    "varlen: a tile behind the end taken for whole": (
        HOPPER_BACKWARD, PARTS, "i1 > score.seq.seqlen_q || j1 > score.seq.seqlen_k",
        "i1 > score.p.p.seqlen_q || j1 > score.p.p.seqlen_k", ALL_MODES,
    ),
    "varlen: dO of the first sequence for all": (
        HOPPER_BACKWARD, DKDV, "x.dO, at.q + m0", "x.dO, m0", ALL_MODES,
    ),
    "varlen: dQ in the first sequence's place": (
        HOPPER_BACKWARD, DQ, "(seq.q_start + row + 8 * r)", "(row + 8 * r)", ALL_MODES,
    ),
    "varlen: only consumers leave tiles beyond the end": (
        HOPPER_BACKWARD, DKDV, "if (task.n0 >= task.seq.seqlen_k) return;",
        "if (task.n0 >= task.seq.seqlen_k && warp_id() >= 4) return;", ALL_MODES,
    ),
    "varlen: sequences share sums of dQ": (
        HOPPER_FUSED, FUSED, "seq.q_start / 64 + seq.b;", "seq.q_start / 64;", ALL_MODES,
    ),
    "varlen: dQ stored over the next sequence": (
        HOPPER_FUSED, FUSED, "if (i >= seq.seqlen_q) continue;",
        "if (i >= p.p.seqlen_q) continue;", ALL_MODES,
    ),
}  # fmt: skip
MUTANTS = {f"sm90 backward: {name}": Mutant(*row) for name, row in ROWS.items()}
