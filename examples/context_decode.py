"""Generation with a cache whose positions lie on several processes: the same tokens as one process.

    torchrun --nproc-per-node 4 examples/context_decode.py     # 2, 3 or 4; without torchrun: 2

The model of examples/context_lm.py, with the weights that it wrote where --weights names them.
Each process reads its part of a long prompt and keeps its own keys and values; none ever has all of
them.  New tokens, drawn by their probability, join the cache of the last one.  One process with the
whole cache generates, too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.distributed as dist
from common import console, options, plt, save, started, table
from context_lm import DIM, KV_HEADS, LAYERS, Model, load

import attn_ext
from attn_ext.distributed import Layout, context_attention, context_decode


class Cache:
    """Keys and values of one layer [1, KV_HEADS, capacity, DIM] that begin at position `first`"""

    def __init__(self, first: int, capacity: int):
        self.first, self.used = first, 0
        self.k, self.v = torch.zeros(2, 1, KV_HEADS, capacity, DIM)

    def add(self, k, v):
        """The next positions"""
        end = self.used + k.shape[2]
        self.k[:, :, self.used : end], self.v[:, :, self.used : end] = k, v
        self.used = end


def drawn(logits, noise) -> int:
    """A character by its probability: the largest logit with Gumbel's noise, the same for all"""
    return int((logits[0, -1] + noise).argmax())


def sharded(model, prompt, noise, group):
    """The tokens that all ranks of a group choose, and the bytes of this rank's caches"""
    rank, parts = dist.get_rank(group), dist.get_world_size(group)
    new, layout, last = len(noise) - 1, Layout.contiguous(len(prompt), parts), rank == parts - 1
    first = sum(layout.length(r) for r in range(rank))
    caches = [Cache(first, layout.length(rank) + new * last) for _ in range(LAYERS)]

    def reads(cache):
        def attend(q, k, v):
            cache.add(k, v)
            return context_attention(q, k, v, layout=layout, mesh=group, causal=True)

        return attend

    def writes(cache):
        def attend(q, k, v):
            if last:
                cache.add(k, v)
            return context_decode(
                q, cache.k, cache.v, k_first=cache.first, whole_lengths=length, group=group
            )

        return attend

    own = layout.shard(prompt, 0, rank)[None]
    logits = model(own, layout.position_ids(rank), [reads(c) for c in caches])[:, -1:].contiguous()
    dist.broadcast(logits, parts - 1, group=group)  # the last rank has the end of the prompt
    tokens = [drawn(logits, noise[0])]
    for position in range(len(prompt), len(prompt) + new):
        length = torch.tensor([position + 1], dtype=torch.int32)
        logits = model(
            torch.tensor([tokens[-1:]]), torch.tensor([position]), [*map(writes, caches)]
        )
        tokens.append(drawn(logits, noise[len(tokens)]))
    return tokens, sum(c.k.nbytes + c.v.nbytes for c in caches)


def alone(model, prompt, noise):
    """The tokens of one process, and the bytes of its caches"""
    new = len(noise) - 1
    caches = [Cache(0, len(prompt) + new) for _ in range(LAYERS)]

    def attends(cache):
        def attend(q, k, v):
            cache.add(k, v)
            if q.shape[2] > 1:
                return attn_ext.attention(q, k, v, causal=True)
            length = torch.tensor([cache.used], dtype=torch.int32)
            return attn_ext.attention_decode(q, cache.k, cache.v, cache_seqlens=length, causal=True)

        return attend

    attend = [*map(attends, caches)]
    logits, tokens = model(prompt[None], torch.arange(len(prompt)), attend), []
    for position in range(len(prompt), len(prompt) + new + 1):
        tokens.append(drawn(logits, noise[len(tokens)]))
        if len(tokens) <= new:
            logits = model(torch.tensor([tokens[-1:]]), torch.tensor([position]), attend)
    return tokens, sum(c.k.nbytes + c.v.nbytes for c in caches)


@torch.no_grad()
def main(chosen) -> None:
    _, held, kinds = load()
    model = Model(kinds)
    if chosen.weights:
        model.load_state_dict(torch.load(chosen.weights))
    prompt, new = (torch.cat(held)[:800], 16) if chosen.short else (torch.cat(held)[:6000], 120)
    noise = -torch.empty(new + 1, kinds).exponential_().log()
    tokens, size = sharded(model, prompt, noise, dist.group.WORLD)
    sizes = [None] * dist.get_world_size()
    dist.all_gather_object(sizes, (size, tokens))
    if dist.get_rank() == 0:
        compare(chosen, sizes, *alone(model, prompt, noise))
    dist.barrier()


def compare(chosen, found, want, whole: int) -> None:
    """Every rank's tokens are those of one process; how much each one's cache holds"""
    letters = sorted(set("".join(topics.values())))
    console.print(repr("".join(letters[t] for t in want)))
    rows = [[f"rank {r}", f"{size / 1024:.0f} KiB"] for r, (size, _) in enumerate(found)]
    table("keys and values", ["process", "cache"], [*rows, ["alone", f"{whole / 1024:.0f} KiB"]])
    for rank, (_, tokens) in enumerate(found):
        assert tokens == want, f"rank {rank} must have the tokens of one process, got {tokens}"
    console.print(f"{len(want)} tokens on {len(found)} processes: identical to one process")
    figure, axis = plt.subplots(figsize=(5, 2.4))
    axis.barh([*(r[0] for r in rows), "one process"], [*(s / 1024 for s, _ in found), whole / 1024])
    axis.set(xlabel="keys and values, KiB", title=f"{len(want)} identical tokens")
    save(figure, chosen.out / "context_decode.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, help="what examples/context_lm.py wrote")
    started(main, options(__doc__, "context_decode", parser))
