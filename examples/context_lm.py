"""A causal language model whose documents lie on several processes: FSDP2 and context parallelism.

    torchrun --nproc-per-node 4 examples/context_lm.py     # 2, 3 or 4; without torchrun: 2

Data: the help texts that Python ships (pydoc), each a document, packed until a row is full; every
tenth is held out.  Two layers, grouped heads, rotary positions.  With four processes two rows are
computed at once, each by two processes, and all four share the parameters.  One process then makes
the same steps alone: no loss may differ by more than 1e-4.  Baseline: how often characters occur.
"""

from __future__ import annotations

import math
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import console, learned, options, plt, save, started, steps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import attn_ext
from attn_ext.distributed import Layout, context_attention, mean_loss

LENGTH, WIDTH, HEADS, KV_HEADS, LAYERS, DIM, SAME = 1024, 64, 4, 2, 2, 16, 1e-4
NAMES = ("data", "context")


def load():
    """documents of int64 characters to train on and held out, and how many kinds there are"""
    texts = [topics[name] for name in sorted(topics)]
    kinds = {c: i for i, c in enumerate(sorted(set("".join(texts))))}
    ids = [torch.tensor([kinds[c] for c in text]) for text in texts]
    return [x for i, x in enumerate(ids) if i % 10], ids[::10], len(kinds)


def pack(documents, generator):
    """[1, LENGTH] of documents one after the other, and where each begins"""
    row, starts = [], [0]
    while starts[-1] < LENGTH:
        document = documents[int(torch.randint(len(documents), (1,), generator=generator))]
        row.append(document[: LENGTH - starts[-1]])
        starts.append(starts[-1] + len(row[-1]))
    return torch.cat(row)[None], torch.tensor(starts, dtype=torch.int32)


def rotate(x, positions):
    """Rotary positions of x [B, H, S, D]"""
    half = x.shape[-1] // 2
    angle = positions[:, None] / 10000 ** (torch.arange(half) / half)
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class Block(nn.Module):
    """Attention and MLP, each with its norm"""

    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, bias=False)
        self.out = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x, positions, attend):
        heads = self.qkv(self.norms[0](x)).unflatten(-1, (-1, DIM)).transpose(1, 2)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], 1)
        o = attend(rotate(q, positions), rotate(k, positions), v)
        x = x + self.out(o.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class Model(nn.Module):
    """Characters [B, S] at these positions -> logits [B, S, kinds]"""

    def __init__(self, kinds: int):
        super().__init__()
        self.embed, self.head = nn.Embedding(kinds, WIDTH), nn.Linear(WIDTH, kinds)
        self.blocks, self.norm = nn.ModuleList(Block() for _ in range(LAYERS)), nn.RMSNorm(WIDTH)

    def forward(self, ids, positions, attend):
        x = self.embed(ids)
        for i, block in enumerate(self.blocks):
            x = block(x, positions, attend if callable(attend) else attend[i])
        return self.head(self.norm(x)).clone()  # FSDP2 asks for no view


def shard_loss(model, ids, starts, rank, parts, group):
    """(sum of this rank's losses, tokens that have one) of its shard of a packed row"""
    layout = Layout.packed(starts, parts)
    labels = layout.shift_labels(ids, rank)  # in the whole row, then cut

    def attend(q, k, v):
        if parts == 1:
            rows = (x[0].transpose(0, 1) for x in (q, k, v))
            return attn_ext.attention_varlen(*rows, starts, starts, causal=True).transpose(0, 1)[
                None
            ]
        return context_attention(q, k, v, layout=layout, mesh=group, causal=True)

    logits = model(layout.shard(ids, 1, rank), layout.position_ids(rank), attend)
    total = F.cross_entropy(logits[0], labels[0], reduction="sum", ignore_index=-100)
    return total, (labels != -100).sum()


def train(model, rows, loss_of):
    """The loss of each step"""
    optimizer, losses = torch.optim.AdamW(model.parameters(), 3e-3), []
    for (_, say), row in zip(steps(len(rows)), rows, strict=True):
        loss = loss_of(row)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        say(f"loss {losses[-1]:.3f}")
    return losses


def together(model, rows, parts):
    """Steps on all ranks: a group of `parts` ranks for each of the rows of a step"""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // parts, parts), mesh_dim_names=NAMES)
    row, rank = mesh.get_coordinate()
    group, everyone = mesh.get_group("context"), init_device_mesh("cpu", (mesh.size(),))
    for block in (*model.blocks, model):
        fully_shard(block, mesh=everyone)  # each parameter is cut over all ranks

    def loss_of(step):
        ids, starts = step[row]
        return mean_loss(*shard_loss(model, ids, starts, rank, parts, group), everyone.get_group())

    return train(model, rows, loss_of)


def alone(model, rows):
    """The same steps in one process"""

    def loss_of(step):
        sums, tokens = zip(*(shard_loss(model, *row, 0, 1, None) for row in step), strict=True)
        return sum(sums) / sum(tokens)

    return train(model, rows, loss_of)


def main(chosen) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    train_on, held, kinds = load()
    parts = 2 if world == 4 else world
    generator = torch.Generator().manual_seed(0)
    total = 8 if chosen.short else 50
    rows = [[pack(train_on, generator) for _ in range(world // parts)] for _ in range(total)]
    model, single = Model(kinds), Model(kinds)
    single.load_state_dict(model.state_dict())
    losses = together(model, rows, parts)
    if rank == 0:
        compare(chosen, losses, alone(single, rows), single, train_on, held, kinds)
    dist.barrier()


def compare(chosen, losses, one, model, train_on, held, kinds) -> None:
    """Both curves, and what the model knows of documents that it has not seen"""
    apart = max(abs(a - b) for a, b in zip(losses, one, strict=True))
    console.print(f"{dist.get_world_size()} processes against one: losses differ by {apart:.1e}")
    assert apart <= SAME, f"losses must differ by at most {SAME}, got {apart}"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sums = [shard_loss(model, *pack(held, generator), 0, 1, None) for _ in range(4)]
    bits = float(sum(s for s, _ in sums) / sum(n for _, n in sums)) / math.log(2)
    counts = torch.bincount(torch.cat(train_on), minlength=kinds) + 0.1
    base = -(counts / counts.sum()).log2()[torch.cat(held)].mean().item()
    figure, axis = plt.subplots(figsize=(6, 3.2))
    axis.plot([x / math.log(2) for x in one], linewidth=5, color="lightgray", label="one process")
    axis.plot([x / math.log(2) for x in losses], label=f"{dist.get_world_size()} processes")
    axis.axhline(base, color="gray", linestyle=":", label="how often characters occur, held out")
    axis.set(xlabel="step", ylabel="bits a character", title=f"largest difference {apart:.1e}")
    axis.legend()
    save(figure, chosen.out / "context_lm.png")
    torch.save(model.state_dict(), chosen.out / "context_lm.pt")
    goal = 1.1 * base if chosen.short else 0.9 * base
    learned("bits a character", bits, max(base, goal), goal, higher=False)


if __name__ == "__main__":
    started(main, options(__doc__, "context_lm"))
