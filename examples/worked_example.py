"""Attention by hand, a step at a time, against every backend of this machine.

    python examples/worked_example.py

Queries and keys of ones: all scores are equal, so each of five values has the weight 0.2 and the
output is their mean.  Then the formula softmax(q k^T / sqrt(d)) v on small random numbers.
"""

from __future__ import annotations

import math

import torch
from common import options, plt, save, steps, table

import attn_ext
from attn_ext import inspect


def by_hand(q, k, v):
    """softmax(q k^T / sqrt(d)) v for q [S, D], k [S, D], v [S, Dv], in plain loops."""
    length, dim = len(q), len(q[0])
    scores = [[sum(a * b for a, b in zip(qi, kj, strict=True)) for kj in k] for qi in q]
    scaled = [[s / math.sqrt(dim) for s in row] for row in scores]
    exponentials = [[math.exp(s - max(row)) for s in row] for row in scaled]
    weights = [[e / sum(row) for e in row] for row in exponentials]
    out = [
        [sum(weights[i][j] * v[j][d] for j in range(length)) for d in range(len(v[0]))]
        for i in range(length)
    ]
    return {"scores": scores, "scaled": scaled, "weights": weights, "out": out}


def compare(name: str, q, k, v, hand: dict) -> list[list[str]]:
    """One row a backend: the largest difference of weights and output from the hand calculation."""
    want = torch.tensor(hand["out"])
    rows = []
    for backend, missing in attn_ext.backends().items():
        if missing:
            rows.append([f"{name}: {backend}", "not on this machine", ""])
            continue
        if backend in ("cuda", "triton") and not torch.cuda.is_available():
            continue
        device = "cuda" if backend in ("cuda", "triton") else "cpu"
        call = [x[None, None].to(device) for x in (q, k, v)]
        out = attn_ext.attention(*call, backend=backend)[0, 0].cpu()
        difference = (out - want).abs().max().item()
        assert difference < 1e-5, f"{backend} differs by {difference}"
        rows.append([f"{name}: {backend}", f"{difference:.1e}", "agrees"])
    weights = inspect.weights(q[None, None], k[None, None])[0, 0]
    difference = (weights - torch.tensor(hand["weights"])).abs().max().item()
    assert difference < 1e-5
    rows.append([f"{name}: inspect.weights", f"{difference:.1e}", "agrees"])
    return rows


def draw(hand: dict, path) -> None:
    """The four steps of the formula as pictures."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 3))
    for axis, (name, values) in zip(axes, hand.items(), strict=True):
        axis.imshow(values, cmap="magma")
        for i, row in enumerate(values):
            for j, x in enumerate(row):
                axis.text(j, i, f"{x:.2f}", ha="center", va="center", color="tab:cyan", fontsize=7)
        axis.set_title(name)
        axis.set_xticks([])
        axis.set_yticks([])
    save(figure, path)


def main() -> None:
    chosen = options(__doc__, "worked_example")
    ones = torch.ones(5, 4)
    values = torch.arange(5.0)[:, None].expand(5, 4).contiguous()
    random = torch.randn(5, 4), torch.randn(5, 4), torch.randn(5, 4)
    rows, problems = [], {"ones": (ones, ones, values), "random": random}
    for _, (name, (q, k, v)) in zip(steps(2, "comparing"), problems.items(), strict=True):
        hand = by_hand(q.tolist(), k.tolist(), v.tolist())
        rows += compare(name, q, k, v, hand)
        if name == "ones":
            assert all(abs(w - 0.2) < 1e-12 for row in hand["weights"] for w in row)
            assert all(abs(x - 2.0) < 1e-12 for row in hand["out"] for x in row)
    table("against the hand calculation", ["what", "largest difference", ""], rows)
    draw(hand, chosen.out / "worked_example.png")
    print("Q = K = ones: every weight is 0.2")


if __name__ == "__main__":
    main()
