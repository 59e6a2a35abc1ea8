"""Three ways to attend to a text, side by side: scaled dot product, additive, hierarchical.

    python examples/text_attention.py

Data: film review sentences (examples/data), every fifth held out; the same words, width and steps
for each.  Packed, nothing is padded.  The hierarchy: words -> clauses -> sentence.  Memory: what
a text of 8192 words adds to the process in one forward and backward pass.  Baseline: the majority.
"""

from __future__ import annotations

import ctypes
import gzip
import re
import statistics
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps, table
from text_classifier import DATA, words
from torch import nn

from attn_ext.measure.timing import status_mib
from attn_ext.nn import AttentionPooling, HierarchicalAttention

WIDTH, BATCH = 64, 64


def load() -> list[tuple[list[list[str]], int]]:
    """(clauses of words, 1 if rated positive) of each sentence with an opinion"""
    rows = []
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        for line in file:
            rating, text = line.rstrip("\n").split("\t", 1)
            clauses = [c for c in map(words, re.split(r"[.,;:()-]+", text)) if c]
            if clauses and float(rating) != 0:
                rows.append((clauses, int(float(rating) > 0)))
    return rows


def cumulative(lengths: list[int]) -> torch.Tensor:
    """int32 [n + 1]"""
    return torch.tensor([0, *lengths]).cumsum(0).int()


def pack(rows, vocabulary):
    """ids [words], where sentences begin, where clauses begin, clauses a sentence, labels"""
    ids = torch.tensor([vocabulary.get(w, 0) for clauses, _ in rows for c in clauses for w in c])
    sentences = cumulative([sum(map(len, clauses)) for clauses, _ in rows])
    words_of = cumulative([len(c) for clauses, _ in rows for c in clauses])
    clauses_of = cumulative([len(clauses) for clauses, _ in rows])
    return ids, sentences, words_of, clauses_of, torch.tensor([float(y) for _, y in rows])


class Classifier(nn.Module):
    """Embedding, one kind of attention, one logit"""

    def __init__(self, vocabulary_size: int, kind: str):
        super().__init__()
        self.kind = kind
        self.embed, self.drop = nn.Embedding(vocabulary_size + 1, WIDTH), nn.Dropout(0.4)
        if kind == "hierarchical":
            self.attend = HierarchicalAttention(WIDTH, 4)
        else:
            score = "dot" if kind == "scaled dot product" else "additive"
            self.attend = AttentionPooling(WIDTH, 4, score=score)
        self.judge = nn.Linear(WIDTH, 1)

    def forward(self, ids, sentences, words_of, clauses_of):
        x = self.drop(self.embed(ids))
        if self.kind == "hierarchical":
            pooled = self.attend(x, words_of, clauses_of)
        else:
            pooled = self.attend(x, sentences)
        return self.judge(pooled).squeeze(-1)


def extra_mib(model) -> float:
    """What a pass over one text of 8192 words adds to the peak of the process's memory."""

    ids = torch.randint(1, 1000, (8192,))
    spans = cumulative([8192]), cumulative([16] * 512), cumulative([512])
    model(ids[:64], cumulative([64]), cumulative([16] * 4), cumulative([4])).sum().backward()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory would be taken again unseen
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again from here
    before = status_mib("VmRSS")
    model(ids, *spans).sum().backward()
    return max(0.0, status_mib("VmHWM") - before)


def main() -> None:
    chosen = options(__doc__, "text_attention")
    data = load()
    held, train = data[::5], [row for i, row in enumerate(data) if i % 5]
    counts = Counter(w for clauses, _ in train for c in clauses for w in c)
    vocabulary = {w: i + 1 for i, w in enumerate(sorted(w for w, n in counts.items() if n > 1))}
    kinds = ("scaled dot product", "additive", "hierarchical")
    models, seconds, total = {}, {kind: [] for kind in kinds}, 50 if chosen.short else 500
    for kind in kinds:
        torch.manual_seed(0)
        model = Classifier(len(vocabulary), kind)
        models[kind] = model, torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    for _, say in steps(total):
        rows = [train[i] for i in torch.randint(len(train), (BATCH,)).tolist()]
        *inputs, labels = pack(rows, vocabulary)
        for kind, (model, optimizer) in models.items():
            start = time.perf_counter()
            loss = F.binary_cross_entropy_with_logits(model(*inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds[kind].append(time.perf_counter() - start)
        say(f"loss {loss.item():.3f}")

    *inputs, labels = pack(held, vocabulary)
    rows, found = [], {}
    for kind, (model, _) in models.items():
        model.eval()
        with torch.no_grad():
            found[kind] = ((model(*inputs) > 0) == (labels > 0)).float().mean().item()
        step = statistics.median(seconds[kind]) * 1000
        rows.append([kind, f"{found[kind]:.1%}", f"{step:.1f} ms", f"{extra_mib(model):.0f} MiB"])
    table("film reviews", ["attention", "held-out accuracy", "a step", "8192 words"], rows)
    majority = max(labels.mean().item(), 1 - labels.mean().item())
    figure, axis = plt.subplots(figsize=(5, 2.4))
    axis.barh(list(found), list(found.values()), color="tab:orange")
    axis.axvline(majority, color="gray", linestyle=":")
    axis.set(xlabel="held-out accuracy (dotted: majority)", xlim=(0.4, 0.9))
    save(figure, chosen.out / "text_attention.png")
    goal = majority + (0.02 if chosen.short else 0.15)
    learned("accuracy of the worst", min(found.values()), majority, goal)


if __name__ == "__main__":
    main()
