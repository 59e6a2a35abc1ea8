"""The kernels of attn_ext.inspect against blocked torch code: python bench/inspect_maps.py

B1 H8 D64, two threads; medians, the two ways in turns.
"""

import argparse
import statistics
import time

import torch
from machine import describe

from attn_ext import inspect


def seconds(function) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(describe())
    q, k = torch.randn(2, 1, 8, args.length, 64)
    lse = inspect.row_stats(q, k, causal=True).lse
    maps = {
        "top_k, n = 16": lambda b: inspect.top_k(q, k, 16, lse=lse, causal=True, backend=b),
        "mean, n = 16": lambda b: inspect.top_k(
            q, k, 16, per_head=False, lse=lse, causal=True, backend=b
        ),
        "column_mass": lambda b: inspect.column_mass(q, k, lse=lse, causal=True, backend=b),
        "pooled_map 256": lambda b: inspect.pooled_map(q, k, 256, lse=lse, causal=True, backend=b),
    }
    for name, function in maps.items():
        times = {b: [] for b in ("cpu", "reference")}
        for _ in range(args.rounds):
            for backend, found in times.items():
                found.append(seconds(lambda b=backend, f=function: f(b)))
        ours, theirs = (1e3 * statistics.median(t) for t in times.values())
        print(f"{name:16} S={args.length} causal: kernel {ours:7.1f} ms, blocked torch "
              f"{theirs:7.1f} ms, {theirs / ours:.1f} x")  # fmt: skip


if __name__ == "__main__":
    main()
