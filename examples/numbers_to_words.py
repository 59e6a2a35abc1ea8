"""Sequence to sequence with cross-attention: numbers into Spanish words, and the alignment.

    python examples/numbers_to_words.py

2024 -> "dos mil veinticuatro".  Data: num2words, numbers below 100,000, a random share held out.
An encoder over the digits, a decoder that writes a word at a time and attends to the digits.
Baseline: the words of the nearest number that was trained on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps
from num2words import num2words
from torch import nn

import attn_ext
from attn_ext import inspect
from attn_ext.nn import MultiheadAttention

WIDTH, HEADS, DIGITS, LONGEST = 96, 4, 5, 12
PAD, START, END = 0, 1, 2


class Layer(nn.Module):
    """Self-attention (causal in the decoder), cross-attention where there is a memory, MLP"""

    def __init__(self, decoder: bool):
        super().__init__()
        self.decoder = decoder
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.cross = MultiheadAttention(WIDTH, HEADS, batch_first=True) if decoder else None
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )

    def forward(self, x, memory=None):
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = attn_ext.attention(q, k, v, causal=self.decoder)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        if self.cross is not None:
            x = x + self.cross(self.norms[1](x), memory, memory, need_weights=False)[0]
        return x + self.mlp(self.norms[2](x))


class Translator(nn.Module):
    """digits [B, 5] and the words so far [B, T] -> logits of the next word [B, T, vocabulary]"""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.digit, self.word = nn.Embedding(10, WIDTH), nn.Embedding(vocabulary, WIDTH)
        self.place = nn.Parameter(torch.randn(DIGITS, WIDTH) * 0.1)
        self.position = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.1)
        self.encoder, self.decoder = Layer(False), nn.ModuleList([Layer(True), Layer(True)])
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary)

    def forward(self, digits, words):
        memory = self.encoder(self.digit(digits) + self.place)
        x = self.word(words) + self.position[: words.shape[1]]
        for layer in self.decoder:
            x = layer(x, memory)
        return self.out(self.norm(x))

    @torch.no_grad()
    def write(self, digits):
        """Greedy words [B, LONGEST], PAD after END"""
        words = torch.full((len(digits), 1), START)
        for _ in range(LONGEST - 1):
            following = self(digits, words)[:, -1].argmax(-1)
            ended = ((words == END) | (words == PAD)).any(1)
            words = torch.cat([words, torch.where(ended, PAD, following)[:, None]], 1)
        return words


def load(count: int):
    """digits [N, 5], words [N, LONGEST], the vocabulary; small numbers are all there"""
    large = torch.randperm(99_000)[: count - 1000] + 1000
    numbers = torch.cat([torch.arange(1000), large])[torch.randperm(count)]
    texts = [num2words(n, lang="es").split() for n in numbers.tolist()]
    vocabulary = ["", "<s>", "</s>", *sorted({w for t in texts for w in t})]
    index = {w: i for i, w in enumerate(vocabulary)}
    words = torch.zeros(count, LONGEST, dtype=torch.int64)
    for row, text in zip(words, texts, strict=True):
        ids = [START, *(index[w] for w in text), END]
        row[: len(ids)] = torch.tensor(ids)
    digits = numbers[:, None] // 10 ** torch.arange(DIGITS - 1, -1, -1) % 10
    return digits, words, vocabulary


def main() -> None:
    chosen = options(__doc__, "numbers_to_words")
    digits, words, vocabulary = load(6000)
    cut = 5000
    model = Translator(len(vocabulary))
    total = 110 if chosen.short else 700
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=total)
    for _, say in steps(total):
        rows = torch.randint(cut, (128,))
        logits = model(digits[rows], words[rows, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), words[rows, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        say(f"loss {loss.item():.3f}")

    held, truth = digits[cut:], words[cut:]
    model.eval()
    exact = (model.write(held) == truth).all(1).float().mean().item()
    value = (digits * 10 ** torch.arange(DIGITS - 1, -1, -1)).sum(1)
    nearest = (value[cut:, None] - value[None, :cut]).abs().argmin(1)
    base = (words[nearest] == truth).all(1).float().mean().item()

    with inspect.record(model, ("top_k",), top_k=DIGITS) as seen, torch.no_grad():
        model(held[:1], truth[:1, :-1])
    cross = [c for c in seen.calls if c.name.endswith("cross")][-1]
    weights = torch.zeros(HEADS, LONGEST - 1, DIGITS)
    weights.scatter_(2, cross.top_keys[0], cross.top_weights[0])
    length = int((truth[0] > END).sum()) + 1  # row t is where word t + 1 is written
    figure, axis = plt.subplots(figsize=(4, 4))
    axis.imshow(weights.mean(0)[:length], cmap="magma", vmin=0)
    axis.set_xticks(range(DIGITS), [str(d) for d in held[0].tolist()])
    axis.set_yticks(range(length), [vocabulary[w] for w in truth[0, 1 : length + 1]])
    save(figure, chosen.out / "numbers_to_words.png")
    learned("exact match", exact, base, 0.2 if chosen.short else 0.95)


if __name__ == "__main__":
    main()
