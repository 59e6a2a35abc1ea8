"""A small vision transformer on real handwritten digits, with a map of where it looks.

    python examples/digits_vit.py

Data: scikit-learn's load_digits, 1797 images of 8 x 8; every fifth is held out.  Baseline: logistic
regression on the pixels.  Two blocks of self-attention over 16 patches, then attention pooling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps, table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import nn

from attn_ext import inspect
from attn_ext.nn import AttentionPooling, MultiheadAttention

WIDTH, HEADS, PATCHES, BATCH = 64, 4, 16, 64


def load():
    """(images [N, 8, 8] in 0 .. 4, labels [N]) to train on, and held out"""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 4
    labels = torch.tensor(digits.target)
    held = torch.arange(len(labels)) % 5 == 0
    return (images[~held], labels[~held]), (images[held], labels[held])


class Block(nn.Module):
    """x + attention, x + MLP"""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x):
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Patches of 2 x 2 -> blocks -> pooling by a learned query -> 10 logits"""

    def __init__(self):
        super().__init__()
        self.patch = nn.Linear(4, WIDTH)
        self.position = nn.Parameter(torch.randn(PATCHES, WIDTH))
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.pool = nn.LayerNorm(WIDTH), AttentionPooling(WIDTH, HEADS)
        self.out = nn.Linear(WIDTH, 10)

    def forward(self, images):
        cut = F.unfold(images[:, None], 2, stride=2).transpose(1, 2)  # [B, 16, 4]
        return self.out(self.pool(self.norm(self.blocks(self.patch(cut) + self.position))))


@torch.no_grad()
def evaluate(model, images, labels) -> tuple[float, float]:
    """Loss and accuracy"""
    logits = model.eval()(images)
    model.train()
    right = (logits.argmax(-1) == labels).float().mean()
    return F.cross_entropy(logits, labels).item(), right.item()


def draw(model, images, path) -> None:
    """What the pooling query attends to, laid over ten held-out images"""
    with inspect.record(model, ("top_k",), top_k=PATCHES) as seen, torch.no_grad():
        model(images[:10])
    pooling = next(c for c in seen.calls if c.name == "pool")
    figure, axes = plt.subplots(2, 5, figsize=(8, 3.6))
    for i, axis in enumerate(axes.flat):
        weights = torch.zeros(HEADS, PATCHES)
        weights.scatter_(1, pooling.top_keys[i, :, 0], pooling.top_weights[i, :, 0])
        heat = weights.mean(0).view(1, 1, 4, 4)
        axis.imshow(images[i], cmap="gray_r")
        axis.imshow(F.interpolate(heat, 8)[0, 0], cmap="inferno", alpha=0.45)
        axis.axis("off")
    save(figure, path)


def main() -> None:
    chosen = options(__doc__, "digits_vit")
    train, held = load()
    epochs = 8 if chosen.short else 30
    model = Model()
    per_epoch = len(train[1]) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * per_epoch)
    rows, order = [], None
    for step, say in steps(epochs * per_epoch):
        if step % per_epoch == 0:
            order = torch.randperm(len(train[1]))
        index = order[step % per_epoch * BATCH :][:BATCH]
        loss = F.cross_entropy(
            model(train[0][index] + 0.4 * torch.randn(BATCH, 8, 8)), train[1][index]
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % per_epoch == per_epoch - 1:
            held_loss, accuracy = evaluate(model, *held)
            epoch = step // per_epoch + 1
            say(f"epoch {epoch}  held-out accuracy {accuracy:.3f}")
            if epoch % max(1, epochs // 6) == 0:
                rows.append([epoch, f"{loss:.3f}", f"{held_loss:.3f}", f"{accuracy:.2%}"])
    table("digits", ["epoch", "loss", "held-out loss", "held-out accuracy"], rows)
    baseline = LogisticRegression(max_iter=2000).fit(train[0].flatten(1), train[1])
    base = float(baseline.score(held[0].flatten(1), held[1]))
    draw(model, held[0], chosen.out / "digits_vit.png")
    learned("accuracy", accuracy, 0.10 if chosen.short else base, 0.93 if chosen.short else 0.97)


if __name__ == "__main__":
    main()
