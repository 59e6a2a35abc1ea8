"""The smallest complete attention program: encode, score, weight, decode.

    python examples/pipeline.py

Data: scikit-learn's handwritten digits, 8 x 8.  An image is read as its eight rows; four learned
questions look at the rows, and what they see says which digit it is.  Baseline: the nearest mean
image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps
from sklearn.datasets import load_digits
from torch import nn

import attn_ext
from attn_ext import inspect

ROWS, DIGITS, WIDTH, QUESTIONS = 8, 10, 32, 4


class Pipeline(nn.Module):
    """Four steps; attn_ext.attention does `score` and `weight` and the weighted sum in one pass."""

    def __init__(self):
        super().__init__()
        self.row = nn.Sequential(nn.Linear(ROWS, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.place = nn.Parameter(torch.randn(ROWS, WIDTH) * 0.1)
        self.questions = nn.Parameter(torch.randn(1, QUESTIONS, 1, WIDTH))
        self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(QUESTIONS * WIDTH, DIGITS)

    def encode(self, images):
        """images [B, 8, 8] -> q [B, QUESTIONS, 1, W], k and v [B, 1, ROWS, W]"""
        x = F.gelu(self.row(images) + self.place)[:, None]
        return self.questions.expand(len(images), -1, -1, -1), self.key(x), self.value(x)

    def score(self, q, k):
        """Scaled dot products, as the kernel computes them."""
        return q @ k.transpose(-1, -2) / WIDTH**0.5

    def weight(self, scores, v):
        """Softmax over the rows, and the weighted sum of the values."""
        return scores.softmax(-1) @ v

    def decode(self, context):
        """[B, QUESTIONS, 1, W] -> logits of the digit [B, DIGITS]"""
        return self.out(context.flatten(1))

    def forward(self, images):
        return self.decode(attn_ext.attention(*self.encode(images)))


def main() -> None:
    chosen = options(__doc__, "pipeline")
    found = load_digits()
    images, labels = torch.tensor(found.images).float() / 16, torch.tensor(found.target)
    order = torch.randperm(len(images))
    train, test = order[:1300], order[1300:]

    model = Pipeline()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _, say in steps(300 if chosen.short else 1500):
        some = train[torch.randint(len(train), (128,))]
        loss = F.cross_entropy(model(images[some]), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        say(f"loss {loss.item():.3f}")

    with torch.no_grad():
        q, k, v = model.encode(images[test])
        logits = model(images[test])
        apart = model.decode(model.weight(model.score(q, k), v))
        assert torch.allclose(logits, apart, atol=1e-4)  # the kernel does these very steps
        accuracy = (logits.argmax(-1) == labels[test]).float().mean().item()
        weights = inspect.weights(q[:8], k[:8])[:, :, 0]  # [8, QUESTIONS, ROWS]
    means = torch.stack([images[train][labels[train] == d].mean(0) for d in range(DIGITS)])
    nearest = torch.cdist(images[test].flatten(1), means.flatten(1)).argmin(1)
    baseline = (nearest == labels[test]).float().mean().item()

    figure, axes = plt.subplots(2, 8, figsize=(9, 2.6))
    for i in range(8):
        axes[0, i].imshow(images[test[i]], cmap="gray")
        axes[0, i].set_title(f"{labels[test[i]]} -> {logits[i].argmax()}", fontsize=8)
        axes[1, i].imshow(weights[i].T, cmap="magma", vmin=0, aspect="auto")
        for axis in axes[:, i]:
            axis.set_xticks([]), axis.set_yticks([])
    axes[1, 0].set_ylabel("row", fontsize=8)
    figure.suptitle("rows that each of the four questions looks at (columns below)", fontsize=9)
    save(figure, chosen.out / "pipeline.png")
    learned("accuracy", accuracy, baseline, 0.92 if chosen.short else 0.94)


if __name__ == "__main__":
    main()
