"""Additive attention against naive torch, and its memory at a length that naive torch cannot hold.

    python bench/additive.py

Median of interleaved runs, forward and backward; memory is the growth of the process's peak.
"""

from __future__ import annotations

import statistics
import time

import torch

import attn_ext
from attn_ext.measure.timing import CpuClock


def inputs(length: int, dim: int):
    """q, k, v [1, 1, S, D], w [D]"""
    q, k, v = (torch.randn(1, 1, length, dim, requires_grad=True) for _ in range(3))
    return q, k, v, torch.randn(dim, requires_grad=True)


def naive(q, k, v, w):
    """softmax(w . tanh(q_i + k_j)) v with the [S, S, D] tensor"""
    return (torch.tanh(q.unsqueeze(3) + k.unsqueeze(2)) @ w).softmax(-1) @ v


def main() -> None:
    """Print milliseconds, the ratio and MiB."""
    torch.manual_seed(0)
    # first: afterwards the peak is the naive way's
    attn_ext.additive_attention(*inputs(64, 128)).sum().backward()
    x = inputs(8192, 128)
    start = time.perf_counter()
    grown = CpuClock().peak_mib(lambda: attn_ext.additive_attention(*x).sum().backward())
    print(f"S=8192 D=128, forward and backward: {time.perf_counter() - start:.2f} s, ", end="")
    print(f"{grown:.0f} MiB more (naive: one of its tensors has 32768 MiB)")
    x = inputs(512, 128)
    seconds = {(f, way): [] for f in (naive, attn_ext.additive_attention) for way in ("fwd", "bwd")}
    for round_ in range(12):
        for function in (naive, attn_ext.additive_attention):
            start = time.perf_counter()
            out = function(*x)
            middle = time.perf_counter()
            torch.autograd.grad(out, x, torch.ones_like(out))
            end = time.perf_counter()
            if round_ >= 2:
                seconds[function, "fwd"].append(middle - start)
                seconds[function, "bwd"].append(end - middle)
    for way in ("fwd", "bwd"):
        theirs, ours = (
            statistics.median(seconds[f, way]) for f in (naive, attn_ext.additive_attention)
        )
        print(f"{way} S=512 D=128, {torch.get_num_threads()} threads: naive {theirs * 1e3:.1f} ms,")
        print(f"    attn_ext {ours * 1e3:.1f} ms, {theirs / ours:.1f} x")


if __name__ == "__main__":
    main()
