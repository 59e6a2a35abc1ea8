"""Images and words attend to each other: which word names this handwritten digit?

    python examples/cross_modal.py

Data: scikit-learn's load_digits (every fifth held out) and the words zero to nine in English,
German, French and Spanish (num2words), in letters.  A pair is scored after image patches and
letters have attended to each other; retrieval ranks the ten words of a language.  Baseline: chance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps, table
from digits_vit import load
from num2words import num2words
from torch import nn

from attn_ext import inspect
from attn_ext.nn import AttentionPooling, CrossModalAttention

IMAGE, TEXT, LETTERS, BATCH = 48, 32, 8, 16
LANGUAGES = ("en", "de", "fr", "es")


def spelled() -> tuple[torch.Tensor, list[list[str]]]:
    """ids [language, 10, LETTERS], 0 past the end, and the words"""
    names = [[num2words(n, lang=lang) for n in range(10)] for lang in LANGUAGES]
    alphabet = sorted({c for row in names for word in row for c in word})
    ids = torch.zeros(len(LANGUAGES), 10, LETTERS, dtype=torch.int64)
    for i, row in enumerate(names):
        for n, word in enumerate(row):
            ids[i, n, : len(word)] = torch.tensor([alphabet.index(c) + 1 for c in word])
    return ids, names


class Matcher(nn.Module):
    """(images [N, 8, 8], words [N, LETTERS]) -> how well they fit [N]"""

    def __init__(self):
        super().__init__()
        self.patch, self.letter = nn.Linear(4, IMAGE), nn.Embedding(40, TEXT)
        self.place = nn.Parameter(torch.randn(16, IMAGE) * 0.5)
        self.position = nn.Parameter(torch.randn(LETTERS, TEXT) * 0.5)
        self.first = CrossModalAttention(IMAGE, TEXT, 64, 4)
        self.mlp_a = nn.Sequential(nn.LayerNorm(IMAGE), nn.Linear(IMAGE, 96), nn.GELU())
        self.mlp_b = nn.Sequential(nn.LayerNorm(TEXT), nn.Linear(TEXT, 96), nn.GELU())
        self.back_a, self.back_b = nn.Linear(96, IMAGE), nn.Linear(96, TEXT)
        self.second = CrossModalAttention(IMAGE, TEXT, 64, 4)
        self.pool_a, self.pool_b = AttentionPooling(IMAGE), AttentionPooling(TEXT)
        self.out = nn.Sequential(nn.Linear(IMAGE + TEXT, 96), nn.GELU(), nn.Linear(96, 1))

    def forward(self, images, letters):
        a = self.patch(F.unfold(images[:, None], 2, stride=2).transpose(1, 2)) + self.place
        b, spoken = self.letter(letters) + self.position, letters != 0
        a, b = self.first(a, b, mask_b=spoken)
        a, b = a + self.back_a(self.mlp_a(a)), b + self.back_b(self.mlp_b(b))
        a, b = self.second(a, b, mask_b=spoken)
        pooled = torch.cat([self.pool_a(a), self.pool_b(b, mask=spoken)], -1)
        return self.out(pooled).squeeze(-1)


def scores(model, images, words):
    """[N, 10]: each image with the ten words [10, LETTERS] of a language"""
    count = len(images)
    pairs = images.repeat_interleave(10, 0), words.repeat(count, 1)
    return model(*pairs).view(count, 10)


def main() -> None:
    chosen = options(__doc__, "cross_modal")
    (images, labels), (held, truth) = load()
    words, names = spelled()
    model, total = Matcher(), 130 if chosen.short else 1500
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    for step, say in steps(total):
        rows = torch.randint(len(labels), (BATCH,))
        noisy = images[rows] + 0.3 * torch.randn(BATCH, 8, 8)
        loss = F.cross_entropy(scores(model, noisy, words[step % len(LANGUAGES)]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        say(f"loss {loss.item():.3f}")

    model.eval()
    with torch.no_grad():
        right = [(scores(model, held, w).argmax(1) == truth).float().mean().item() for w in words]
    rows = [[lang, f"{share:.1%}"] for lang, share in zip(LANGUAGES, right, strict=True)]
    table("retrieval: the word of an unseen image", ["language", "held-out accuracy"], rows)

    shown = [int((truth == n).nonzero()[0]) for n in (0, 3, 7, 8)]
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    for axis, i in zip(axes, shown, strict=True):
        with inspect.record(model, ("top_k",), top_k=16) as seen, torch.no_grad():
            model(held[i : i + 1], words[0, truth[i]][None])
        call = next(c for c in seen.calls if c.name == "second" and c.shape[4] == 16)
        letters = len(names[0][truth[i]])
        weights = torch.zeros(call.shape[1], LETTERS, 16)
        weights.scatter_(2, call.top_keys[0], call.top_weights[0])
        heat = weights[:, :letters].mean((0, 1)).view(1, 1, 4, 4)
        axis.imshow(held[i], cmap="gray_r")
        axis.imshow(F.interpolate(heat, 8)[0, 0], cmap="inferno", alpha=0.45)
        axis.set_title(f"{names[0][truth[i]]} looks at")
        axis.axis("off")
    save(figure, chosen.out / "cross_modal.png")
    learned("retrieval accuracy", sum(right) / 4, 0.1, 0.4 if chosen.short else 0.93)


if __name__ == "__main__":
    main()
