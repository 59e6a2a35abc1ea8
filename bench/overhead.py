"""What a small call costs besides its arithmetic: attn_ext against torch's own attention.

python bench/overhead.py [shape, e.g. 1,1,4,8]

Both take turns of some calls each, the order reversed from turn to turn, on one thread; the clock
is the process' own CPU time.  `ratio` is the median over the turns of attn_ext's time over torch's.
Training is forward and backward to the leaves' gradients.  Rows are Markdown.
"""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch.nn.functional import scaled_dot_product_attention

import attn_ext

CALLS, TURNS = 100, 40


def turns(functions) -> list[list[float]]:
    """Microseconds a call of each function, a list of turns each."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(TURNS + 1):
        order = range(len(functions))
        for index in order if turn % 2 else reversed(order):
            begin = time.process_time_ns()
            for _ in range(CALLS):
                functions[index]()
            times[index].append((time.process_time_ns() - begin) / CALLS / 1e3)
    return [kept[1:] for kept in times]  # the first turn warms up


def options(what: str, seqlen: int) -> tuple[dict, dict]:
    """The keywords of attn_ext.attention and of torch."""
    mask = torch.ones(seqlen, seqlen, dtype=torch.bool).tril()
    bias = torch.randn(seqlen, seqlen, requires_grad="its gradient" in what)
    if "causal" in what:
        return dict(causal=True), dict(is_causal=True)
    if "bool" in what:
        return dict(mask=mask), dict(attn_mask=mask)
    if "float" in what:
        return dict(bias=bias), dict(attn_mask=bias)
    return {}, {}


def runner(function, training: bool, leaves, seed, keywords):
    """A function of no arguments that makes one call."""

    def train():
        function(*leaves, **keywords).backward(seed)
        for leaf in leaves:
            leaf.grad = None

    def infer():
        with torch.no_grad():
            function(*leaves, **keywords)

    return train if training else infer


def main() -> None:
    shape = [int(n) for n in sys.argv[1].split(",")] if len(sys.argv) > 1 else [1, 1, 4, 8]
    torch.set_num_threads(1)
    seed = torch.randn(shape)
    print("| shape | what | mask | torch, us | attn_ext, us | ratio |\n|---|---|---|---|---|---|")
    for training in (False, True):
        for what in ("none", "causal", "bool", "float", "float and its gradient"):
            if "gradient" in what and not training:
                continue
            leaves = [torch.randn(shape, requires_grad=training) for _ in range(3)]
            ours, theirs = options(what, shape[2])
            sdpa = attn_ext.scaled_dot_product_attention
            calls = (
                (scaled_dot_product_attention, theirs), (attn_ext.attention, ours), (sdpa, theirs),
            )  # fmt: skip
            times = turns([runner(f, training, leaves, seed, words) for f, words in calls])
            for name, own in zip(("attention", "its sdpa"), times[1:], strict=True):
                ratio = statistics.median(b / a for a, b in zip(times[0], own, strict=True))
                kind = "training" if training else "inference"
                print(
                    f"| {tuple(shape)} | {kind}, {name} | {what} "
                    f"| {statistics.median(times[0]):.0f} | {statistics.median(own):.0f} "
                    f"| {ratio:.2f} |"
                )


if __name__ == "__main__":
    main()
