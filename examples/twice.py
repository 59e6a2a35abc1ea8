"""What the examples of second derivatives share: attention by attn_ext and by torch's math, a block
of a transformer over either, and a run of both in turn.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from common import console, table
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import attn_ext


def math(q, k, v, bias=None):
    """torch's attention that can be differentiated twice and forward."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, bias)


def ours(q, k, v, bias=None):
    """The same by attn_ext."""
    return attn_ext.attention(q, k, v, bias=bias)


WAYS = {"attn_ext": ours, "math": math}


class Block(nn.Module):
    """x + attention, x + MLP; x [B, N, width]"""

    def __init__(self, width: int, heads: int, attend):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width)
        )

    def forward(self, x, bias=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attend(q, k, v, bias).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def _first_use() -> None:
    """What torch loads when it is first asked to train or to differentiate twice, seconds that are
    no part of what one of both ways takes."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    for attend in WAYS.values():
        x = torch.randn(1, 1, 2, 2)
        torch.func.jvp(lambda x, attend=attend: attend(x, x, x), (x,), (x,))
        out = attend(*[model(x)] * 3)
        (first,) = torch.autograd.grad(out.sum(), model.weight, create_graph=True)
        first.square().sum().backward()
    optimizer.step()


def run_both(train) -> dict:
    """train(attend), a held-out figure and a list of losses, by both ways from the same seed, with
    a table of figures and seconds of the processor."""
    _first_use()
    found, rows = {}, []
    for name, attend in WAYS.items():
        torch.manual_seed(1)
        start = time.process_time()
        found[name] = train(attend)
        rows.append([name, f"{found[name][0]:.4g}", f"{time.process_time() - start:.2f}"])
    table("the same training by both", ["attention", "held out", "processor seconds"], rows)
    first = [losses[:5] for _, losses in found.values()]
    apart = max(abs(a - b) / abs(b) for a, b in zip(*first, strict=True))
    console.print(f"the first losses differ by {apart:.1e}")
    assert apart < 0.01, f"losses must agree within 1 %, got {apart:.1e}"
    return found
