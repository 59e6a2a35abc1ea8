"""Peak extra memory of one call, forward and backward, against the size of the N x N matrix.

    python bench/memory.py [--seqlen 16384]

Each measurement is a process of its own: the growth of its peak resident set (VmHWM) over the
inputs.  Prints a table and writes bench/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from machine import RESULTS, describe
from rich.console import Console
from rich.table import Table

BATCH, HEADS, DIM = 1, 8, 64


def child(seqlen: int, backward: bool) -> None:
    """Prints the growth of the peak over inputs and libraries, in MiB."""
    import attn_ext
    from attn_ext.measure.timing import status_mib

    shape = (BATCH, HEADS, seqlen, DIM)
    small = [torch.randn(1, 1, 8, DIM, requires_grad=backward) for _ in range(3)]
    out = attn_ext.attention(*small, causal=True)  # first-call allocations are not the problem's
    if backward:
        out.sum().backward()
    q, k, v = (torch.randn(shape, requires_grad=backward) for _ in range(3))
    dout = torch.randn(shape)
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    out = attn_ext.attention(q, k, v, causal=True)
    if backward:
        out.backward(dout)
    print(status_mib("VmHWM") - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seqlen", type=int, default=16384)
    parser.add_argument("--child", choices=("forward", "backward"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.seqlen, options.child == "backward")
        return
    matrix = BATCH * HEADS * options.seqlen**2 * 4 / 2**20
    tensor = BATCH * HEADS * options.seqlen * DIM * 4 / 2**20
    rows = []
    for direction in ("forward", "backward"):
        command = [sys.executable, __file__, "--seqlen", str(options.seqlen), "--child", direction]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append(
            {
                "call": "forward" if direction == "forward" else "forward + backward",
                "peak_mib": round(peak, 1),
                "in_tensors": round(peak / tensor, 2),
                "n_x_n_mib": matrix,
                "share_of_n_x_n": f"{peak / matrix:.2%}",
            }
        )
    title = f"({BATCH}, {HEADS}, {options.seqlen}, {DIM}) float32, causal; one tensor: {tensor} MiB"
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(width=120).print(table)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({"machine": describe(), "shape": title, "rows": rows}, indent=1)
    (RESULTS / "memory.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
