"""attn_ext against torch SDPA on the CPU: medians of interleaved runs, each result checked first.

    python bench/cpu.py [--repeats 7] [--quick]

Prints a table and writes bench/results/cpu.json.  GFLOP/s counts 4 B H S^2 D a forward (half when
causal), 3.5 times that for forward + backward.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch
import torch.nn.functional as F
from machine import RESULTS, describe
from rich.console import Console
from rich.table import Table

import attn_ext

SHAPES = (
    (1, 8, 1024, 64),
    (1, 8, 4096, 64),
    (1, 8, 4096, 128),
    (2, 16, 512, 64),
    (8, 12, 128, 64),
)
DTYPES = (torch.float32, torch.bfloat16)
BUDGET = 4.0  # seconds that one pair of candidates may take


def ours(q, k, v, causal):
    return attn_ext.attention(q, k, v, causal=causal)


def theirs(q, k, v, causal):
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def interleaved(candidates, repeats: int) -> list[float]:
    """Median seconds of each candidate, taking turns"""
    times = [[] for _ in candidates]
    start = time.perf_counter()
    for turn in range(repeats + 1):
        for i, run in enumerate(candidates):
            began = time.perf_counter()
            run()
            if turn:  # the first turn warms up
                times[i].append(time.perf_counter() - began)
        if turn > 2 and time.perf_counter() - start > BUDGET:
            break
    return [statistics.median(t) for t in times]


def measure(shape, dtype, causal: bool, backward: bool, repeats: int) -> dict:
    """One row: milliseconds of both, ratio, GFLOP/s of ours"""
    batch, heads, seqlen, dim = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
    torch.testing.assert_close(ours(q, k, v, causal), theirs(q, k, v, causal), rtol=0.02, atol=0.02)
    for x in (q, k, v):
        x.requires_grad_(backward)

    def candidate(attend):
        def run():
            out = attend(q, k, v, causal)
            if backward:
                torch.autograd.grad(out, (q, k, v), dout)

        return run

    a, b = interleaved([candidate(ours), candidate(theirs)], repeats)
    flops = 4 * batch * heads * seqlen**2 * dim * (0.5 if causal else 1) * (3.5 if backward else 1)
    return {
        "shape": shape,
        "dtype": str(dtype).removeprefix("torch."),
        "causal": causal,
        "direction": "fwd+bwd" if backward else "fwd",
        "attn_ext_ms": round(a * 1e3, 3),
        "torch_ms": round(b * 1e3, 3),
        "ratio": round(b / a, 2),
        "gflops": round(flops / a / 1e9),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    options = parser.parse_args()
    table = Table(title="CPU: attn_ext against torch SDPA (ratio > 1: attn_ext is faster)")
    rows = [
        measure(shape, dtype, causal, backward, options.repeats)
        for backward in (False, True)
        for dtype in DTYPES
        for shape in (SHAPES[:1] if options.quick else SHAPES)
        for causal in (False, True)
    ]
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps({"machine": describe(), "rows": rows}, indent=1)
        (RESULTS / "cpu.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
