"""The smallest complete attention program: encode, score, weight, decode.

    python examples/pipeline.py

A sequence holds pairs such as "f3 a7 k1 ... ?a"; the answer is the digit beside the asked letter.
Only attention can find it: the pairs are in random order.  Held out: sequences never seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps
from torch import nn

import attn_ext
from attn_ext import inspect

LETTERS, DIGITS, PAIRS, WIDTH = 26, 10, 12, 32


def batch(size: int, generator: torch.Generator):
    """letters [size, PAIRS] (all different), digits [size, PAIRS], asked [size], answer [size]"""
    order = torch.rand(size, LETTERS, generator=generator).argsort(1)
    letters = order[:, :PAIRS]
    digits = torch.randint(DIGITS, (size, PAIRS), generator=generator)
    place = torch.randint(PAIRS, (size, 1), generator=generator)
    return letters, digits, letters.gather(1, place)[:, 0], digits.gather(1, place)[:, 0]


class Pipeline(nn.Module):
    """Four steps; attn_ext.attention does `score` and `weight` and the weighted sum in one pass."""

    def __init__(self):
        super().__init__()
        self.letter, self.digit = nn.Embedding(LETTERS, WIDTH), nn.Embedding(DIGITS, WIDTH)
        self.query, self.key = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, DIGITS)

    def encode(self, letters, digits, asked):
        """q [B, 1, 1, W], k and v [B, 1, PAIRS, W]"""
        q = self.query(self.letter(asked))[:, None, None]
        k = self.key(self.letter(letters))[:, None]
        return q, k, self.digit(digits)[:, None]

    def score(self, q, k):
        """Scaled dot products, as the kernel computes them."""
        return q @ k.transpose(-1, -2) / WIDTH**0.5

    def weight(self, scores, v):
        """Softmax over the pairs, and the weighted sum of the values."""
        return scores.softmax(-1) @ v

    def decode(self, context):
        """Logits of the digit: [B, DIGITS]"""
        return self.out(context[:, 0, 0])

    def forward(self, letters, digits, asked):
        q, k, v = self.encode(letters, digits, asked)
        return self.decode(attn_ext.attention(q, k, v))


def main() -> None:
    chosen = options(__doc__, "pipeline")
    model, data = Pipeline(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _, say in steps(300 if chosen.short else 1000):
        *inputs, answer = batch(128, data)
        loss = F.cross_entropy(model(*inputs), answer)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say(f"loss {loss.item():.3f}")

    *inputs, answer = batch(2000, torch.Generator().manual_seed(2))
    with torch.no_grad():
        q, k, v = model.encode(*inputs)
        steps_apart = model.decode(model.weight(model.score(q, k), v))
        logits = model(*inputs)
        assert torch.allclose(logits, steps_apart, atol=1e-4)  # the kernel does these very steps
        accuracy = (logits.argmax(-1) == answer).float().mean().item()
        weights = inspect.weights(q[:8], k[:8])[:, 0, 0]
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.imshow(weights, cmap="magma", vmin=0)
    for i in range(8):
        for j in range(PAIRS):
            text = f"{chr(97 + inputs[0][i, j])}{inputs[1][i, j]}"
            axis.text(j, i, text, ha="center", va="center", color="tab:cyan", fontsize=7)
    axis.set_yticks(range(8), [f"?{chr(97 + c)}" for c in inputs[2][:8]])
    axis.set_xticks([])
    axis.set_title("which pair each question looks at")
    save(figure, chosen.out / "pipeline.png")
    learned("accuracy", accuracy, 1 / DIGITS, 0.99)


if __name__ == "__main__":
    main()
