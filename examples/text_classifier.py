"""Train a small text classifier with attention on real movie-review sentences, then judge a
sentence of yours.

    python examples/text_classifier.py --text "a gorgeous, witty film"

The same training runs with attn_ext, with torch's own attention, and in float64; the losses of the
two float32 runs are held to the tolerance rule of attn_ext.testing.  Writes loss_curves.png and
attention_map.png.
"""

from __future__ import annotations

import argparse
import gzip
import re
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

import attn_ext
from attn_ext.testing import assert_close_to_reference

DATA = Path(__file__).parent / "data" / "movie_reviews.tsv.gz"
PAD, UNKNOWN, FIRST_WORD = 0, 1, 2
WIDTH, HEADS, BATCH, MAX_WORDS = 64, 4, 64, 48


def words(text: str) -> list[str]:
    """Lower-case words and the punctuation that carries mood."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?|[!?]", text.lower())[:MAX_WORDS]


def load() -> list[tuple[list[str], int]]:
    """(words, 1 if rated positive) of each snippet that has words and an opinion."""
    with gzip.open(DATA, "rt", encoding="utf-8") as file:
        rows = [line.rstrip("\n").split("\t", 1) for line in file]
    return [(words(text), int(float(r) > 0)) for r, text in rows if words(text) and float(r) != 0]


def encode(vocabulary: dict[str, int], sentences: list[list[str]]) -> torch.Tensor:
    """int64 [batch, longest], padded with PAD"""
    ids = [[vocabulary.get(w, UNKNOWN) for w in s] for s in sentences]
    length = max(map(len, ids))
    return torch.tensor([s + [PAD] * (length - len(s)) for s in ids])


class Classifier(nn.Module):
    """Embedding, one block of self-attention, mean over the words, one logit."""

    def __init__(self, vocabulary_size: int, attend):
        super().__init__()
        self.attend = attend
        self.embed = nn.Embedding(vocabulary_size, WIDTH, padding_idx=PAD)
        self.position = nn.Parameter(torch.randn(MAX_WORDS, WIDTH) * 0.1)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.judge = nn.Linear(WIDTH, 1)

    def heads(self, ids: torch.Tensor):
        """q, k, v [batch, heads, words, width / heads] and x [batch, words, width]"""
        x = self.embed(ids) + self.position[: ids.shape[1]]
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS))
        return *qkv.permute(2, 0, 3, 1, 4), x

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The logit of "positive" for each sentence: [batch]"""
        q, k, v, x = self.heads(ids)
        visible = ids != PAD
        o = self.attend(q, k, v, visible[:, None, None, :])
        x = x + self.project(o.transpose(1, 2).flatten(2))
        weight = visible.to(x.dtype)[..., None]
        return self.judge((x * weight).sum(1) / weight.sum(1)).squeeze(-1)


def with_attn_ext(q, k, v, mask):
    return attn_ext.attention(q, k, v, mask=mask)


def with_torch(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Training:
    """One training run, a step at a time, so that runs can take turns and be timed side by side."""

    def __init__(self, attend, dtype, vocabulary):
        torch.manual_seed(0)  # every run starts from the same weights
        self.dtype, self.losses, self.seconds = dtype, [], []
        self.model = Classifier(len(vocabulary) + FIRST_WORD, attend).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, weight_decay=0.05)

    def step(self, ids: torch.Tensor, labels: torch.Tensor) -> None:
        start = time.perf_counter()
        loss = F.binary_cross_entropy_with_logits(self.model(ids), labels.to(self.dtype))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - start)

    def speed(self) -> float:
        """Steps a second, from the median step"""
        return 1 / statistics.median(self.seconds)


def train(runs: list[Training], data, vocabulary, epochs: int, console: Console) -> None:
    """All runs through the same batches, taking turns."""
    order = torch.Generator().manual_seed(1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("training", total=epochs * (len(data) // BATCH))
        for epoch in range(epochs):
            shuffled = torch.randperm(len(data), generator=order).tolist()
            for first in range(0, len(data) // BATCH * BATCH, BATCH):
                rows = [data[i] for i in shuffled[first : first + BATCH]]
                ids = encode(vocabulary, [sentence for sentence, _ in rows])
                labels = torch.tensor([label for _, label in rows])
                for run in runs:
                    run.step(ids, labels)
                text = f"epoch {epoch + 1}  loss {runs[0].losses[-1]:.3f}"
                progress.update(bar, advance=1, description=text)


@torch.no_grad()
def accuracy(model, data, vocabulary) -> float:
    """Share of sentences whose sign is right"""
    right = 0
    for first in range(0, len(data), 256):
        rows = data[first : first + 256]
        positive = model(encode(vocabulary, [s for s, _ in rows])) > 0
        right += (positive == torch.tensor([label for _, label in rows], dtype=torch.bool)).sum()
    return float(right) / len(data)


def plot_losses(runs: dict[str, torch.Tensor], path: Path) -> None:
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1))
    for (name, losses), style in zip(runs.items(), ("-", "--", ":"), strict=True):
        smooth = losses.unfold(0, min(20, len(losses)), 1).mean(-1)
        top.plot(smooth, style, label=name)
    first, second, _ = runs.values()
    bottom.semilogy((first - second).abs().clamp_min(1e-9), lw=0.6)
    top.set(ylabel="training loss (mean of 20 steps)")
    top.legend()
    bottom.set(xlabel="step", ylabel="|difference|\nof the first two")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


@torch.no_grad()
def plot_attention(model, sentence: list[str], vocabulary, verdict: str, path: Path) -> None:
    """softmax(q k^T / sqrt(d)) of the one sentence, a panel a head"""
    q, k, _, _ = model.heads(encode(vocabulary, [sentence]))
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)[0]
    size = 1.5 + 0.28 * len(sentence)
    figure, axes = plt.subplots(1, HEADS, figsize=(HEADS * size, size + 1), squeeze=False)
    for head, axis in enumerate(axes[0]):
        axis.imshow(weights[head], cmap="magma", vmin=0)
        axis.set_xticks(range(len(sentence)), sentence, rotation=90)
        axis.set_yticks(range(len(sentence)), sentence if head == 0 else [])
        axis.set_title(f"head {head}")
    figure.suptitle(verdict)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", default="a gorgeous, witty film that never stops surprising")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--short", action="store_true", help="one epoch on 1,280 sentences")
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    options = parser.parse_args()
    if not words(options.text):
        parser.error(f"--text must hold at least one word, got {options.text!r}")
    options.out.mkdir(parents=True, exist_ok=True)

    data = load()
    held_out, data = data[::5], [row for i, row in enumerate(data) if i % 5]
    if options.short:
        data, options.epochs = data[:: len(data) // 1280][:1280], 1  # rows are sorted by mood
    counts = Counter(w for sentence, _ in data for w in sentence)
    kept = sorted(w for w, n in counts.items() if n > 1)
    vocabulary = {w: i + FIRST_WORD for i, w in enumerate(kept)}

    plans = {
        "attn_ext float32": (with_attn_ext, torch.float32),
        "torch SDPA float32": (with_torch, torch.float32),
        "torch SDPA float64": (with_torch, torch.float64),
    }
    console = Console()
    runs = {name: Training(*plan, vocabulary) for name, plan in plans.items()}
    train(list(runs.values()), data, vocabulary, options.epochs, console)
    losses = {name: torch.tensor(run.losses, dtype=run.dtype) for name, run in runs.items()}
    ours, theirs, exact = losses.values()

    table = Table(title=f"{len(data)} sentences, {len(ours)} steps of {BATCH}")
    for heading in (
        "attention",
        "final loss",
        "max error",
        "steps/s",
        "held-out accuracy",
    ):
        table.add_column(heading, justify="left" if heading == "attention" else "right")
    for name, run in runs.items():
        error = (losses[name].double() - exact).abs().max()
        share = accuracy(run.model, held_out, vocabulary)
        final = losses[name][-20:].mean()
        table.add_row(name, f"{final:.4f}", f"{error:.1e}", f"{run.speed():.1f}", f"{share:.1%}")
    console.print(table)
    positive = sum(label for _, label in held_out) / len(held_out)
    majority = max(positive, 1 - positive)
    console.print(f"majority class: {majority:.1%} of {len(held_out)} held-out sentences")
    assert_close_to_reference(ours, exact, theirs, kind="grad", name="losses", dtype=torch.float32)
    console.print("losses agree with float64 as closely as the tolerance rule asks")

    model, sentence = runs["attn_ext float32"].model, words(options.text)
    with torch.no_grad():
        probability = model(encode(vocabulary, [sentence])).sigmoid().item()
    mood = "positive" if probability > 0.5 else "negative"
    verdict = f"{mood} ({max(probability, 1 - probability):.0%})"
    console.print(f"[bold]{options.text}[/bold]  ->  {verdict}", soft_wrap=True)
    plot_losses(losses, options.out / "loss_curves.png")
    plot_attention(model, sentence, vocabulary, verdict, options.out / "attention_map.png")
    console.print(f"wrote {options.out}/loss_curves.png and {options.out}/attention_map.png")


if __name__ == "__main__":
    sys.exit(main())
