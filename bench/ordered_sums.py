"""How long CTAs of Hopper's backward wait for their turn to add to dQ: a model, nothing is timed.

    python bench/ordered_sums.py

A multiprocessor runs one CTA at a time and takes the next block of 128 keys when it is done.  A
tile of 64 queries takes one turn: five products.  With an order a CTA adds a tile of dQ at the end
of its turn, once the block of keys before has added to it and, 0.6 of a turn later, at its next
meeting, said so; until then the CTA stands still.  Two kernels take 0.8 turns a tile (dK and dV,
four products) and 0.6 (dQ, three), and wait for nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

MULTIPROCESSORS, SAID_AFTER = 132, 0.6


class Shape(NamedTuple):
    """heads: of all batches; window: keys to the left, None: all."""

    heads: int
    seqlen: int
    causal: bool
    window: int | None = None

    def tiles(self, block: int, last_first: bool) -> Iterator[int]:
        """The tiles of queries of a block of keys, as it meets them."""
        last = self.seqlen // 64
        if self.window is not None:
            last = min(last, 2 * block + 2 + self.window // 64)
        found = range(2 * block if self.causal else 0, last)
        return reversed(found) if last_first else iter(found)


def one_kernel(shape: Shape, ordered: bool, last_first: bool) -> float:
    """Turns until the last CTA is done."""
    free = [0.0] * MULTIPROCESSORS
    said: dict[tuple[int, int], float] = {}
    for head in range(shape.heads):
        for block in range(shape.seqlen // 128):
            now = heapq.heappop(free)
            for tile in shape.tiles(block, last_first):
                now += 1
                if ordered:
                    now = max(now, said.get((head, tile), 0.0))
                    said[head, tile] = now + SAID_AFTER
            heapq.heappush(free, now)
    return max(free)


def two_kernels(shape: Shape) -> float:
    """The same of backward_dkdv and backward_dq, one after the other."""
    blocks = range(shape.seqlen // 128)
    keys = [len(list(shape.tiles(block, False))) for block in blocks]
    seen = [sum(tile // 2 == rows for block in blocks for tile in shape.tiles(block, False))
            for rows in blocks]  # fmt: skip
    total = 0.0
    for work, turns in ((keys, 0.8), (sorted(seen, reverse=True), 0.6)):
        free = [0.0] * MULTIPROCESSORS
        for each in work * shape.heads:
            heapq.heappush(free, heapq.heappop(free) + turns * each)
        total += max(free)
    return total


SHAPES = {
    "16 heads, 16k": Shape(16, 16384, False), "16 heads, 16k, causal": Shape(16, 16384, True),
    "64 heads, 4k": Shape(64, 4096, False), "64 heads, 4k, causal": Shape(64, 4096, True),
    "128 heads, 2k": Shape(128, 2048, False), "128 heads, 2k, causal": Shape(128, 2048, True),
    "8 heads, 4k": Shape(8, 4096, False), "8 heads, 4k, causal": Shape(8, 4096, True),
    "1 head, 16k": Shape(1, 16384, False), "1 head, 16k, causal": Shape(1, 16384, True),
    "16 heads, 16k, window of 1k": Shape(16, 16384, True, 1024),
}  # fmt: skip


def main() -> None:
    print(
        "| shape | no order | ordered, last tile first | ordered, first tile first | two kernels |"
    )
    print("|---" * 5 + "|")
    for name, shape in SHAPES.items():
        turns = (one_kernel(shape, False, True), one_kernel(shape, True, True),
                 one_kernel(shape, True, False), two_kernels(shape))  # fmt: skip
        print(f"| {name} | " + " | ".join(f"{each:.0f}" for each in turns) + " |")


if __name__ == "__main__":
    main()
