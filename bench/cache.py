"""A decode step of one layer on a CPU: the ways to keep keys and values.

    OMP_NUM_THREADS=1 python bench/cache.py

Four sequences of 2,048 positions, 32 query heads, 8 key heads, head dimension 128, float32.  Each
step adds a position to each and attends to all; medians of steps in turns.  Then a step that
verifies eight drafts of each sequence, a chain and a tree of them; what a call costs besides its
arithmetic; what a cache of int8 takes, and how far its results are from those of float32 for normal
random numbers.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.nn.functional as F

import attn_ext

BATCH, HEADS, KV_HEADS, DIM, LENGTH, STEPS = 4, 32, 8, 128, 2048, 15
DRAFTS = 8


def concatenated():
    """torch.cat and SDPA, as a dynamic cache does."""
    k, v = torch.randn(2, BATCH, KV_HEADS, LENGTH, DIM)
    state = [k, v]

    def step(q, k, v):
        state[:] = (torch.cat([old, new], dim=2) for old, new in zip(state, (k, v), strict=True))
        return F.scaled_dot_product_attention(q, *state, enable_gqa=True)

    return step


def cached(page_size: int | None, dtype=torch.float32):
    """A KVCache."""
    cache = attn_ext.KVCache(
        BATCH, KV_HEADS, DIM, max_length=2 * LENGTH, page_size=page_size, dtype=dtype
    )
    cache.append(*torch.randn(2, BATCH, KV_HEADS, LENGTH, DIM))

    def step(q, k, v):
        return cache.append(k, v).attend(q)

    return step


def of_drafts() -> None:
    """Verification of eight drafts of each sequence: append, attend, and take the drafts back."""
    cache = attn_ext.KVCache(BATCH, KV_HEADS, DIM, max_length=2 * LENGTH)
    cache.append(*torch.randn(2, BATCH, KV_HEADS, LENGTH, DIM))
    parents = [(i - 1) // 2 for i in range(DRAFTS)]  # two guesses after each, from the first on
    tree = torch.eye(DRAFTS, dtype=torch.bool)
    for i in range(1, DRAFTS):
        tree[i] |= tree[parents[i]]
    capacity = 2 * LENGTH
    spanning = torch.ones(1, 1, DRAFTS, capacity, dtype=torch.bool)
    spanning[..., LENGTH : LENGTH + DRAFTS] = tree
    spanning[..., LENGTH + DRAFTS :] = False
    ways = {
        "a chain": {}, "a tree, tree_mask": {"tree_mask": tree},
        "a tree, a mask over all positions": {"mask": spanning, "causal": False},
    }  # fmt: skip
    seconds = {name: [] for name in ways}
    q = torch.randn(BATCH, HEADS, DRAFTS, DIM)
    k, v = torch.randn(2, BATCH, KV_HEADS, DRAFTS, DIM)
    for turn in range(STEPS + 2):
        for name, options in ways.items():
            start = time.perf_counter()
            cache.append(k, v).attend(q, **options)
            cache.truncate([LENGTH] * BATCH)
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        print(f"{DRAFTS} drafts, {name}: {statistics.median(found) * 1e3:.2f} ms a step")


def of_small_calls() -> None:
    """Microseconds a call of one query, four heads and few keys, of which the arithmetic takes one
    or two."""
    cache = attn_ext.KVCache(1, 4, 64, max_length=1 << 16)
    q, k, v = torch.randn(3, 1, 4, 1, 64)
    rows, length = torch.randn(2, 1, 4, 64, 64), torch.tensor([40], dtype=torch.int32)

    def restart():
        cache.truncate([0]).append(*torch.randn(2, 1, 4, 16, 64))

    ways = {
        "append and attend": lambda: cache.append(k, v).attend(q),
        "attend": lambda: cache.attend(q),
        "attention_decode": lambda: attn_ext.attention_decode(q, *rows, length),
        "attention": lambda: attn_ext.attention(q, *rows),
    }
    found = {name: [] for name in ways}
    for _ in range(31):
        for name, call in ways.items():
            restart()
            start = time.perf_counter()
            for _ in range(100):
                call()
            found[name].append((time.perf_counter() - start) * 1e4)
    for name, times in found.items():
        print(f"small calls, {name}: {statistics.median(times):.1f} us")


def of_int8() -> None:
    """Bytes and errors of the same keys and values as int8, and as bfloat16."""
    torch.manual_seed(0)
    q = torch.randn(BATCH, HEADS, 1, DIM)
    k, v = torch.randn(2, BATCH, KV_HEADS, LENGTH, DIM)
    sizes = dict(batch=BATCH, heads=KV_HEADS, head_dim=DIM, max_length=LENGTH)
    exact = attn_ext.KVCache(**sizes).append(k, v)
    int8 = attn_ext.KVCache(**sizes, dtype=torch.int8).append(k, v)
    halves = attn_ext.KVCache(**sizes).append(k.bfloat16().float(), v.bfloat16().float())
    want = exact.attend(q)
    for name, cache in (("int8", int8), ("bfloat16", halves)):
        out = cache.attend(q)
        error = (out - want).norm() / want.norm()
        largest = (out - want).abs().max() / want.abs().max()
        print(f"{name}: error {error:.2%} of the norm of the results, at most {largest:.2%} of max")
    print(f"int8 takes {int8.nbytes / 2**20:.2f} MiB, float32 {exact.nbytes / 2**20:.2f} MiB")


def main() -> None:
    """A line for each way."""
    ways = {
        "torch.cat and SDPA": concatenated(), "KVCache, pages of 64": cached(64),
        "KVCache, pages of 16": cached(16), "KVCache, contiguous": cached(None),
        "KVCache of int8, pages of 64": cached(64, torch.int8),
    }  # fmt: skip
    seconds = {name: [] for name in ways}
    for turn in range(STEPS + 2):
        q = torch.randn(BATCH, HEADS, 1, DIM)
        k, v = torch.randn(2, BATCH, KV_HEADS, 1, DIM)
        for name, step in ways.items():
            start = time.perf_counter()
            step(q, k, v)
            if turn > 1:
                seconds[name].append(time.perf_counter() - start)
    for name, found in seconds.items():
        print(f"{name}: {statistics.median(found) * 1e3:.2f} ms a step")
    shared = attn_ext.KVCache(8, KV_HEADS, DIM, max_length=2 * LENGTH)
    k = torch.randn(1, KV_HEADS, LENGTH, DIM)
    shared.append(k, k, rows=[0]).fork(0, range(1, 8))
    used = len(shared.k_pages) - shared.free_pages
    size = 2 * shared.k_pages[0].nbytes / 2**20
    print(
        f"8 beams of one prompt: {used * size:.0f} MiB; without sharing {8 * used * size:.0f} MiB"
    )
    of_drafts()
    of_small_calls()
    of_int8()


if __name__ == "__main__":
    main()
