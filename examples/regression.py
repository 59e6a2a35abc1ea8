"""Regression over a sequence with attention pooling: how good is the film, from -4 to 4?

    python examples/regression.py

Data: the mean rating that twenty people gave to a sentence of a film review (examples/data).  Words
-> embeddings -> pooling by two learned queries -> a number; 1000 steps, every fifth sentence held
out.  The sentences of a batch are packed one after the other, nothing is padded.  Baseline: the
mean rating.
"""

from __future__ import annotations

import gzip
from collections import Counter

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps
from text_classifier import DATA, words
from torch import nn

from attn_ext import inspect
from attn_ext.nn import AttentionPooling

WIDTH, BATCH = 64, 128


def load() -> list[tuple[list[str], float]]:
    """(words, rating) of each sentence"""
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t", 1) for line in file]
    return [(words(text), float(rating)) for rating, text in rows if words(text)]


def pack(rows, vocabulary):
    """ids [total], cu_seqlens int32 [B + 1], ratings [B]"""
    ids = torch.tensor([vocabulary.get(w, 0) for text, _ in rows for w in text])
    lengths = torch.tensor([0, *(len(text) for text, _ in rows)])
    return ids, lengths.cumsum(0).int(), torch.tensor([rating for _, rating in rows])


class Model(nn.Module):
    """Packed words -> one rating a sentence"""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocabulary_size + 1, WIDTH)
        self.pool = AttentionPooling(WIDTH, num_heads=2, num_queries=2)
        self.drop = nn.Dropout(0.5)
        self.out = nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))

    def forward(self, ids, cu_seqlens):
        pooled = self.pool(self.drop(self.embed(ids)), cu_seqlens)
        return self.out(pooled.flatten(1)).squeeze(-1)


def main() -> None:
    chosen = options(__doc__, "regression")
    data = load()
    held, train = data[::5], [row for i, row in enumerate(data) if i % 5]
    counts = Counter(w for text, _ in train for w in text)
    vocabulary = {w: i + 1 for i, w in enumerate(sorted(w for w, n in counts.items() if n > 1))}
    model, losses = Model(len(vocabulary)), []
    total = 200 if chosen.short else 1000
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=total)
    for _, say in steps(total):
        rows = [train[i] for i in torch.randint(len(train), (BATCH,)).tolist()]
        ids, cu_seqlens, ratings = pack(rows, vocabulary)
        loss = F.mse_loss(model(ids, cu_seqlens), ratings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        say(f"squared error {loss.item():.3f}")

    model.eval()
    ids, cu_seqlens, ratings = pack(held, vocabulary)
    with torch.no_grad():
        error = F.mse_loss(model(ids, cu_seqlens), ratings).item()
    mean = sum(r for _, r in train) / len(train)
    base = (ratings - mean).square().mean().item()

    text = max(held[:200], key=lambda row: row[1] - 0.02 * len(row[0]))[0][:16]
    with inspect.record(model, ("top_k",), top_k=16) as seen, torch.no_grad():
        one = pack([(text, 0.0)], vocabulary)
        rating = model(*one[:2]).item()
    call = seen.calls[0]
    heads, queries, _ = call.top_keys[0].shape
    weights = torch.zeros(heads, queries, len(text))
    weights.scatter_(2, call.top_keys[0], call.top_weights[0])
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
    smooth = torch.tensor(losses).unfold(0, 20, 1).mean(-1)
    left.plot(smooth, label="training (mean of 20 steps)")
    left.axhline(base, color="gray", linestyle=":", label="mean rating, held out")
    left.axhline(error, color="tab:green", linestyle="--", label="held out, at the end")
    left.set(xlabel="step", ylabel="squared error", ylim=(0, None))
    left.legend()
    right.bar(range(len(text)), weights.mean((0, 1)))
    right.set_xticks(range(len(text)), text, rotation=60, ha="right")
    right.set_title(f"weights of the pooling; predicted {rating:+.1f}")
    save(figure, chosen.out / "regression.png")
    goal = 0.95 * base if chosen.short else 0.8 * base
    learned("squared error", error, base, goal, higher=False)


if __name__ == "__main__":
    main()
