"""Counts the hot loop of a kernel for AMD's CDNA 3 in the compiler's own assembly, and bounds it.

    python bench/triton_code.py gfx942 --search forward 128       tiles of ours, the best last

The loop is the label and the backward branch to it with the most matrix work between them.  The
bounds are a model, as in machine_code.py; nothing is timed.  Cycles are those of one of a compute
unit's four SIMDs while one wave of each runs one iteration: a matrix core does 256 multiply-adds of
16 bits a cycle (the white paper of CDNA 3: 1,307 TFLOP/s of an MI300X at 2.1 GHz), a vector
instruction of 64 lanes takes 4 cycles, one of special functions 16, and LDS moves 128 bytes a cycle
for all four.
"""

from __future__ import annotations

import math
import re
from collections import Counter

# The first pattern that an opcode begins with names its group
GROUPS = {
    "product": "v_mfma", "spill": "scratch_", "lds": "ds_(read|write|load|store)",
    "shuffle": "ds_", "global": "(global|buffer|flat)_", "move": "v_(mov|accvgpr)",
    "special": "v_(exp|log|rcp|rsq|sqrt|sin|cos)", "vector": "v_", "scalar": "s_",
}  # fmt: skip
MULTIPLY_ADDS = 256  # of 16 bits, a cycle and SIMD
LANES = 64
INSTRUCTION = re.compile(r"\s+([a-z]\w+)(.*)")
LABEL = re.compile(r"(\.LBB\d+_\d+):")
BRANCH = re.compile(r"\s+s_c?branch\w* (\.LBB\d+_\d+)")


def group_of(opcode: str) -> str:
    """The name among GROUPS, or "other"."""
    return next((name for name, pattern in GROUPS.items() if re.match(pattern, opcode)), "other")


def matrix_cycles(opcode: str) -> float:
    """Of v_mfma_f32_32x32x8_bf16 and the like; float32 has an eighth of the speed, TF32 half."""
    found = re.match(r"v_mfma_f32_(\d+)x(\d+)x(\d+)_?(\w*)", opcode)
    if not found:
        return 0.0
    m, n, k = map(int, found.groups()[:3])
    slower = {"f32": 8, "xf32": 2}.get(found[4], 1)
    return m * n * k * slower / MULTIPLY_ADDS


def lds_bytes(opcode: str) -> int:
    """What a wave's read or write of LDS moves."""
    found = re.match(r"ds_(?:read|write|load|store)(2?)(?:st64)?_(?:[a-z]+_)?b(\d+)", opcode)
    return LANES * int(found[2]) // 8 * (2 if found[1] else 1) if found else 0


def loops(text: str):
    """The instructions of each loop: from a label to the last branch back to it."""
    lines, labels, ends = [], {}, {}
    for line in text.splitlines():
        if found := LABEL.match(line):
            labels[found[1]] = len(lines)
        elif found := BRANCH.match(line):
            if found[1] in labels:
                ends[labels[found[1]]] = len(lines) + 1
            lines.append(line.strip())
        elif (found := INSTRUCTION.match(line)) and not found[1].startswith("s_nop"):
            lines.append(line.strip())
    return [lines[start:end] for start, end in ends.items()]


def hot_loop(text: str) -> list[str]:
    """The loop with the most matrix work; of the same work the shortest."""
    found = [(sum(map(matrix_cycles, loop)), -len(loop), loop) for loop in loops(text)]
    if not found or not max(found)[0]:
        raise ValueError("no loop with matrix products was found")
    return max(found)[2]


def report(text: str) -> dict:
    """Counts of the hot loop by GROUPS, the model's bound and share; `slots_a_product` is of 8
    cycles of a matrix core, as machine_code.py has it."""
    loop = hot_loop(text)
    counts = Counter(map(group_of, loop))
    matrix = sum(map(matrix_cycles, loop))
    cycles = {
        "tensor": matrix,
        "shared_memory": 4 * sum(map(lds_bytes, loop)) / 128,
        "vector": 4 * (counts["vector"] + counts["move"]) + 16 * counts["special"],
    }
    numbers = {
        name: int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
        for name in ("vgpr_count", "vgpr_spill_count")
    }
    return {
        "registers": numbers["vgpr_count"],
        "spilled": numbers["vgpr_spill_count"],
        # of 512 registers of a SIMD's lane
        "waves_a_simd": min(8, 512 // (-(-numbers["vgpr_count"] // 8) * 8)),
        "tensor_cycles": matrix,
        "slots": len(loop),
        "slots_a_product": round(8 * len(loop) / matrix, 2),
        "counts": dict(sorted(counts.items())),
        "bound": max(cycles, key=cycles.get),
        "share": round(matrix / max(cycles.values()), 3),
        "share_2_norm": round(matrix / math.hypot(*cycles.values()), 3),
    }
