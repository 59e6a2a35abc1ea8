"""Whole training steps with torch's attention and with attn_ext's, and what `attn_ext.profile`
predicts of the gain:

    OMP_NUM_THREADS=1 python bench/training.py dropout without bf16 compiled

Two layers, width 128, 4 heads, batch 1, length 512, causal; the two take turns.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
import time

import torch
import torch.nn.functional as F

import attn_ext
from attn_ext.measure import report

WAYS = ("dropout", "without", "bf16", "compiled")
WIDTH, HEADS, LENGTH, TURNS = 128, 4, 512, 10


class Block(torch.nn.Module):
    """A layer of a decoder."""

    def __init__(self, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(WIDTH) for _ in range(2)])
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.GELU(), torch.nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x):
        """[B, S, width] -> the same."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


def trainer(way: str):
    """A function that makes a training step."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    blocks = [Block(0.1 if way == "dropout" else 0.0) for _ in range(2)]
    model, x = torch.nn.Sequential(*blocks).to(dtype), torch.randn(1, LENGTH, WIDTH, dtype=dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    net = torch.compile(model) if way == "compiled" else model

    def step():
        net(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    """A line for each way that is named."""
    for way in sys.argv[1:] or WAYS:
        if way not in WAYS:
            raise SystemExit(f"a way must be one of {', '.join(WAYS)}, got {way!r}")
        candidates = (
            (trainer(way), contextlib.nullcontext()),
            (trainer(way), attn_ext.replace_sdpa()),
        )
        seconds = ([], [])
        for turn in range(TURNS + 2):
            for (step, scope), found in zip(candidates, seconds, strict=True):
                with scope:
                    start = time.perf_counter()
                    step()
                    if turn > 1:  # the first two compile and warm up
                        found.append(time.perf_counter() - start)
        theirs, ours = map(statistics.median, seconds)
        with attn_ext.profile(quiet=True) as recorded:
            for _ in range(8):
                candidates[0][0]()
        print(
            f"{way}: {theirs * 1e3:.1f} ms a step with torch, {ours * 1e3:.1f} with attn_ext, "
            f"{theirs / ours:.2f}x; predicted {report.speedup(recorded.result):.2f}x", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
