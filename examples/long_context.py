"""A causal language model over 8192 characters at once, under a memory limit that the N x N way
does not fit.

    python examples/long_context.py

Data: the help texts that Python ships (pydoc), the last tenth held out.  Two layers with ALiBi.
The process may grow by 1 GiB: one step of the same model with naive attention must fail, and all
training steps with attn_ext must not.  Baseline: character pairs (bigrams) counted in the training
text.
"""

from __future__ import annotations

import math
import re
import resource
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from common import learned, options, plt, save, steps
from torch import nn

import attn_ext

LENGTH, WIDTH, HEADS, LAYERS, LIMIT = 8192, 64, 2, 2, 1 << 30


def load():
    """int64 characters to train on and held out, and how many kinds there are"""
    text = "\n".join(topics[name] for name in sorted(topics))
    kinds = {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([kinds[c] for c in text])
    cut = len(ids) - len(ids) // 10
    return ids[:cut], ids[cut:], len(kinds)


class Model(nn.Module):
    """Character and the one before it -> layers -> logits [1, N, kinds]"""

    def __init__(self, kinds: int):
        super().__init__()
        self.embed, self.before = nn.Embedding(kinds, WIDTH), nn.Embedding(kinds, WIDTH)
        self.qkv = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
            for _ in range(LAYERS)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.head = nn.Linear(WIDTH, kinds)
        self.register_buffer("slopes", torch.tensor([0.5, 0.01]))

    def forward(self, ids, attend):
        x = self.embed(ids) + self.before(F.pad(ids, (1, 0))[:, :-1])
        for i in range(LAYERS):
            q, k, v = self.qkv[i](self.norms[2 * i](x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
            o = attend(*(t.transpose(1, 2) for t in (q, k, v)), self.slopes)
            x = x + self.out[i](o.transpose(1, 2).flatten(2))
            x = x + self.mlp[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def exact(q, k, v, slopes):
    return attn_ext.attention(q, k, v, causal=True, alibi_slopes=slopes)


def naive(q, k, v, slopes):
    """The formula with its N x N matrices"""
    i = torch.arange(q.shape[2])
    distance = (i[:, None] - i).abs()
    s = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 - slopes[:, None, None] * distance
    return s.masked_fill(i > i[:, None], -torch.inf).softmax(-1) @ v


def loss_of(model, ids, attend):
    logits = model(ids[None, :-1], attend)
    return F.cross_entropy(logits[0], ids[1:])


def bigram_bits(train, held, kinds: int) -> float:
    counts = torch.ones(kinds, kinds) * 0.1
    counts.index_put_((train[:-1], train[1:]), torch.ones(len(train) - 1), accumulate=True)
    p = counts / counts.sum(1, keepdim=True)
    return -p[held[:-1], held[1:]].log2().mean().item()


def main() -> None:
    chosen = options(__doc__, "long_context")
    train, held, kinds = load()
    model, losses = Model(kinds), []
    loss_of(model, train[:257], exact).backward()  # libraries have loaded what they need
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + LIMIT, resource.RLIM_INFINITY))
    try:
        loss_of(model, train[: LENGTH + 1], naive).backward()
        raise SystemExit("naive attention was expected not to fit the memory limit")
    except (RuntimeError, MemoryError) as error:
        print(f"naive attention at {LENGTH}: {str(error).splitlines()[0][:90]}")

    total = 12 if chosen.short else 150
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=total)
    for _, say in steps(total):
        start = int(torch.randint(len(train) - LENGTH - 1, (1,)))
        loss = loss_of(model, train[start : start + LENGTH + 1], exact)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item() / math.log(2))
        say(f"{losses[-1]:.2f} bits a character")

    with torch.no_grad():
        parts = [held[n : n + LENGTH + 1] for n in range(0, len(held) - LENGTH, LENGTH)]
        bits = sum(loss_of(model, p, exact).item() for p in parts) / len(parts) / math.log(2)
    base = bigram_bits(train, held, kinds)
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.plot(losses, label="training")
    axis.axhline(base, color="gray", linestyle=":", label="bigrams, held out")
    axis.axhline(bits, color="tab:green", linestyle="--", label="held out, at the end")
    axis.set(xlabel=f"step of {LENGTH} characters", ylabel="bits a character")
    axis.legend()
    save(figure, chosen.out / "long_context.png")
    uniform = math.log2(kinds)
    baseline, goal = (uniform, 0.75 * uniform) if chosen.short else (base, 0.9 * base)
    learned("bits a character", bits, baseline, goal, higher=False)


if __name__ == "__main__":
    main()
