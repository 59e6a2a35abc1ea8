"""Tile sizes by architecture, direction, width of the head and element size; each row says why.

A row is (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages, loads).  Calls with features that
take registers (mask, bias, ALiBi, softcap, dropout) are "rich" and have rows of their own, those
with one of them others than those with several.
`python tests/helpers/triton_offline.py --write` compiles each row for each architecture and commits
what it takes; tests/triton/test_triton_compile.py compares.  `tune` measures tiles on a GPU and
stores the best ones; those win over this table.  Keys of stored tiles: "fwd/128/2" is direction,
width, bytes of an element.  Most of this long file is the table, which is read as a whole.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from attn_ext.core.machine import cache_folder


class Tile(NamedTuple):
    """Queries, keys, warps and pipeline stages of one program; loads: 0 by pointers, 1 by tensor
    descriptors (TMA) where the tensors allow it, 2 so and with specialized warps."""

    block_m: int
    block_n: int
    warps: int
    stages: int
    loads: int = 0

    fused = True  # multiply-adds round once


class Unfused(Tile):
    """The tile of a kernel whose products are rounded before anything is added to them."""

    fused = False


# Shared memory that one program may use, in bytes
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}

INTERPRETED = Tile(32, 32, 4, 1)  # under the interpreter
PAIR = Tile(0, 0, 0, 0)  # of "fused": dK and dV by one kernel and dQ by another are faster
ROUNDING = Tile(32, 32, 4, 1)  # of the kernel that rounds sums of dQ; keys: in the careful way


def far_tile(width: int, element_size: int) -> Tile:
    """The one tile of the kernels of far rows, which are rare, on every GPU: small enough for the
    registers and the shared memory of each."""
    small = width * element_size > 256
    return Unfused(16 if small else 32, 16 if small else 32, 4, 1)


WIDTHS = (32, 64, 128, 256)  # of a head inside the kernels: the next power of two, at least 32
# In the place of 256 where values have at most 128 columns, as those of heads of 192 often have:
# their tiles and sums are half as wide
NARROW_VALUES = 192
DIRECTIONS = ("fwd", "dkdv", "dq", "fused", "dbias", "decode")

# Kind of GPU -> (direction, width) -> tile for 16-bit elements.  "large" is sm_80; the others say
# what differs from it, an architecture what differs from its kind; "amd" has rows of its own.
# Narrower heads take the rows of 64 where they have none.  The rows of 64 and 128 columns on sm_80
# and sm_90 have the largest share of the tensor cores' peak by the model of bench/machine_code.py:
# `bench/triton_code.py --search`.  tests/triton/test_triton_compile.py names those that spill in
# their loop.
_PLAIN = {
    "large": {
        # 32 rows a warp: each ldmatrix of K or V feeds 4 products, where 16 rows make it 2
        ("fwd", 64): Tile(128, 64, 4, 2),
        ("fwd", 128): Tile(128, 32, 4, 2),  # 64 keys spill 100 registers in the loop
        ("fwd", 256): Tile(32, 32, 8, 2),  # O alone is half the registers
        ("dkdv", 64): Tile(32, 128, 4, 2),
        ("dkdv", 128): Tile(32, 128, 8, 2),  # with 4 warps 128 keys do not fit the registers
        ("dkdv", 256): Tile(16, 16, 8, 1),  # 32 keys spill
        ("dq", 64): Tile(128, 64, 4, 3),
        ("dq", 128): Tile(128, 32, 4, 2),  # 64 keys spill
        # dK, dV and sums of dQ at once, by the model 16 to 33 % faster than two kernels
        ("fused", 64): Tile(32, 128, 4, 2),
        ("fused", 128): Tile(32, 128, 8, 2),
        ("dq", 256): Tile(32, 32, 8, 1),
        ("dbias", 64): Tile(64, 32, 8, 1),  # a check, not a hot path: one stage
        ("dbias", 128): Tile(32, 32, 8, 1),
        ("dbias", 256): Tile(16, 32, 8, 1),
        ("decode", 64): Tile(16, 64, 4, 2),  # a group's rows fill 16 rows; memory rules
        ("decode", 128): Tile(16, 64, 4, 2),
        ("decode", 256): Tile(16, 32, 8, 1),  # 4 warps spill
    },
    "sm_80": {  # more than 99 KiB of shared memory
        # all as plain Triton's best: .45, .51 and .47 of the peak
        ("fwd", 192): Tile(64, 64, 4, 2),  # .53; the row of 256 columns .38
        ("fwd", 256): Tile(64, 32, 4, 2),
        ("dkdv", 256): Tile(64, 64, 8, 2),
        ("dq", 256): Tile(64, 32, 4, 2),
    },
    "hopper": {
        ("fused", 64): PAIR,  # but for sm_90: nothing was looked at
        ("fused", 128): PAIR,
        ("dkdv", 256): Tile(32, 16, 8, 1),  # 32 keys spill, by 8 bytes
        ("decode", 256): Tile(16, 32, 4, 2),
    },
    "sm_90": {  # wgmma wants 64 rows, each 4 warps; 128 of both sides halve what is read for one
        ("fwd", 64): Tile(128, 128, 8, 2),
        ("fwd", 128): Tile(128, 128, 8, 2),
        # wgmma: 4.0 slots a product for 6.9 of mma.sync with 32 queries; so below
        ("fwd", 256): Tile(128, 64, 8, 2),
        ("dkdv", 64): Tile(64, 128, 8, 2),
        ("dkdv", 128): Tile(64, 128, 8, 2),
        ("dkdv", 256): Tile(64, 64, 8, 1),  # 103 spilled; .57 of the peak even so
        ("dq", 64): Tile(128, 128, 8, 2),
        ("dq", 128): Tile(128, 64, 8, 2),  # 128 keys spill
        ("dq", 192): Tile(128, 64, 8, 2),  # .67, 16 spilled; the row of 256 columns .56, none
        ("dq", 256): Tile(128, 32, 8, 2),  # 64 of each spill
        ("fused", 64): Tile(64, 128, 8, 2),
        ("fused", 128): Tile(64, 128, 8, 2),
    },
    # tcgen05 wants 128 rows; the wider the tile, the fewer instructions a product.  Each takes 256
    # or all of the 512 columns of tensor memory, and one block fits a multiprocessor
    "sm_100": {
        ("fwd", 64): Tile(128, 128, 8, 2),
        ("fwd", 128): Tile(128, 128, 8, 2),
        ("fwd", 256): Tile(128, 64, 8, 2),  # .61 of the peak; 32x32 .09, without tcgen05
        ("dkdv", 32): Tile(32, 32, 8, 1),  # by registers
        ("dkdv", 64): Tile(64, 128, 8, 2),  # .38 of the peak; 32x64 .20
        ("dkdv", 128): Tile(64, 128, 8, 2),  # .59; 32x128 .50
        ("dq", 64): Tile(128, 128, 8, 2),  # .48; 64x64 .31
        ("dq", 128): Tile(128, 128, 8, 2),  # .70; 128x64 .64
        # .46; 64 queries .75 and dQ's 64 keys .85, but in one stage, with no load on its way
        ("dkdv", 256): Tile(32, 64, 8, 2),
        ("dq", 256): Tile(128, 32, 8, 2),  # .66; 32 queries .10, without tcgen05
    },
    # 99 KiB of shared memory on sm_89 and sm_120, which the rows of 64 and 128 columns above fit;
    # of those of 128 one block at a time, dK and dV and dQ at 82 KiB.  Where these spill, the tiles
    # that do not have a smaller share of the peak: docs/design/triton.md
    "small": {
        ("dq", 64): Tile(128, 32, 4, 2),  # 64 keys spill; two blocks at a time, by the model -3 %
        ("dkdv", 256): Tile(32, 32, 8, 2),  # .66 of the peak on sm_89, by one stage .64
        ("dq", 256): Tile(64, 16, 4, 2),  # .70; 32x32 in one stage .62
        ("decode", 64): Tile(16, 32, 4, 2),  # 64 keys spill, by 8 bytes
        ("decode", 256): Tile(16, 32, 4, 2),
    },
    "sm_120": {
        ("dbias", 64): Tile(32, 32, 8, 1),  # 64 queries spill
        ("dbias", 128): Tile(16, 32, 8, 1),  # 32 queries spill
    },
    "amd": {
        ("fwd", 64): Tile(128, 64, 4, 1),  # a wave has 64 lanes: half the warps; stages cost LDS
        ("fwd", 128): Tile(128, 32, 4, 1),
        ("fwd", 256): Tile(32, 32, 4, 1),
        # at width 64 by bench/amdgcn.py: 32 keys .53 of the peak, 64 .50
        ("dkdv", 64): Tile(32, 32, 4, 1),
        ("dkdv", 128): Tile(32, 32, 4, 1),
        ("dkdv", 256): Tile(16, 32, 4, 1),
        ("dq", 64): Tile(128, 32, 4, 1),  # .66, where 64 queries have .57
        ("dq", 128): Tile(64, 32, 4, 1),
        ("dq", 256): Tile(32, 32, 4, 1),
        ("dbias", 64): Tile(64, 32, 4, 1),
        ("dbias", 128): Tile(32, 32, 4, 1),
        ("dbias", 256): Tile(16, 32, 4, 1),
        ("decode", 64): Tile(16, 64, 4, 1),
        ("decode", 128): Tile(16, 64, 4, 1),
        ("decode", 256): Tile(16, 32, 4, 1),
    },
}

# The same for rich calls, whose masks, words and biases need registers.  8 warps everywhere: with 4
# the backward spills.  What is not here is the plain row, in one stage.
_RICH = {
    "large": {
        ("dkdv", 32): Tile(16, 32, 8, 1),
        ("dq", 32): Tile(32, 32, 8, 1),
        ("fwd", 64): Tile(64, 64, 8, 1),
        ("fwd", 128): Tile(64, 32, 8, 1),
        ("fwd", 256): Tile(32, 32, 8, 1),
        ("dkdv", 64): Tile(32, 32, 8, 1),
        ("dkdv", 128): Tile(16, 32, 8, 1),
        ("dkdv", 256): Tile(16, 16, 8, 1),
        ("dq", 64): Tile(32, 64, 8, 1),
        ("dq", 128): Tile(32, 64, 8, 1),
        ("dq", 256): Tile(16, 32, 8, 1),
        ("decode", 64): Tile(16, 64, 4, 1),
        ("decode", 128): Tile(16, 64, 8, 1),  # 4 warps spill with Triton 3.6, here and at 256
        ("decode", 256): Tile(16, 32, 8, 1),
    },
    "sm_80": {
        ("fwd", 64): Tile(64, 32, 8, 1),  # 64 keys spill with Triton 3.6
    },
    "hopper": {
        ("dkdv", 128): Tile(32, 16, 8, 1),  # 32 keys spill, by 8 bytes
    },
    "sm_90": {
        ("fwd", 256): Tile(32, 16, 8, 1),
        ("dq", 256): Tile(16, 16, 8, 1),
    },
    "small": {
        ("fwd", 64): Tile(64, 32, 8, 1),  # 64 keys spill with a mask alone
        ("fwd", 256): Tile(32, 16, 8, 1),  # 32 keys spill
        ("dkdv", 128): Tile(32, 16, 8, 1),  # 32 keys spill
    },
    "amd": {
        ("dkdv", 64): Tile(16, 64, 4, 1),
        ("dkdv", 128): Tile(16, 32, 4, 1),
        ("dq", 64): Tile(32, 32, 4, 1),
        ("dq", 128): Tile(32, 32, 4, 1),
        ("dq", 256): Tile(16, 32, 4, 1),
    },
}

RICH_FEATURES = ("mask", "bias", "alibi", "softcap", "dropout")


def several(features: Iterable[str]) -> str:
    """Those of RICH_FEATURES that a call has, as the tables name them: "" none, its name one;
    "terms" several, and "all" such that dropout is among them."""
    names = list(features)
    if len(names) > 1:
        return "all" if "dropout" in names else "terms"
    return "".join(names)


# Rich calls of 16-bit elements: feature -> tile; "terms" of those with several but dropout, "all"
# of those with dropout and others.  These two must fit with a mask and a bias of float32.  The
# first kind of a GPU that has rows here wins; others are as in the table above.  They are near the
# tiles of plain calls, and most spill in their loop: that and the options together cost less than
# fewer rows a warp do.
_FOUR = ("alibi", "softcap", "mask", "bias")
_EACH = (*RICH_FEATURES, "terms", "all")
_FEATURES = {
    "sm_80": {
        ("fwd", 64): dict.fromkeys(_EACH, Tile(128, 64, 4, 2)),
        ("fwd", 128): dict.fromkeys(_EACH, Tile(128, 32, 4, 2)),
        ("dkdv", 64): dict.fromkeys(_EACH, Tile(32, 128, 4, 2)) | {"dropout": Tile(32, 128, 4, 3)},
        ("dkdv", 128): dict.fromkeys(_EACH, Tile(32, 128, 8, 2)),
        ("dq", 64): dict.fromkeys(_EACH, Tile(128, 32, 4, 2)),
        ("dq", 128): dict.fromkeys(_EACH, Tile(128, 32, 4, 2)),
        ("fused", 64): dict.fromkeys(_EACH, Tile(32, 128, 4, 2)),
        ("fused", 128): dict.fromkeys(_EACH, Tile(32, 128, 8, 2)),
        ("fwd", 256): dict.fromkeys(_EACH, Tile(64, 32, 4, 2)),
        ("dkdv", 256): dict.fromkeys(_EACH, Tile(64, 64, 8, 2)),
        ("dq", 256): dict.fromkeys(_EACH, Tile(64, 32, 4, 2)),
    },
    # The same as far as it fits 99 KiB: .75 to .89 of the peak on sm_89 with one feature in the
    # backward, where tiles that spill nothing have .45 to .59, and .74 to .87 for .51 to .75 in the
    # forward
    "small": {
        ("fwd", 64): dict.fromkeys(_EACH, Tile(128, 64, 4, 2)),
        ("fwd", 128): dict.fromkeys(_EACH, Tile(128, 32, 4, 2)),
        ("dkdv", 64): dict.fromkeys(_EACH, Tile(32, 128, 4, 2)),
        ("dkdv", 128): dict.fromkeys(RICH_FEATURES, Tile(32, 128, 8, 2))
        | dict.fromkeys(("terms", "all"), Tile(32, 128, 8, 1)),
        ("dq", 64): dict.fromkeys(_EACH, Tile(128, 32, 4, 2)),
        ("dq", 128): dict.fromkeys(RICH_FEATURES, Tile(128, 32, 4, 2))
        | dict.fromkeys(("bias", "terms", "all"), Tile(128, 32, 4, 1)),
        ("fused", 64): dict.fromkeys(_EACH, Tile(32, 128, 4, 2)),
        ("fused", 128): dict.fromkeys(_EACH, Tile(32, 128, 8, 1))
        | dict.fromkeys(("alibi", "softcap", "dropout"), Tile(32, 128, 8, 2)),
        ("fwd", 256): dict.fromkeys(_EACH, Tile(64, 16, 4, 2)),
        ("dkdv", 256): dict.fromkeys(_EACH, Tile(32, 32, 8, 2)),
        ("dq", 256): dict.fromkeys(_EACH, Tile(64, 16, 4, 2)),
    },
    "sm_90": {
        ("fwd", 64): dict.fromkeys(_EACH, Tile(128, 64, 8, 2))
        | dict.fromkeys(("dropout", "all"), Tile(128, 128, 8, 2)),
        ("fwd", 128): dict.fromkeys(_EACH, Tile(128, 64, 8, 2)) | {"dropout": Tile(128, 128, 8, 2)},
        # with dropout 4 warps, of which a thread has all keys of an evaluation: .40 of the peak for
        # .34, though 16 numbers are spilled
        ("dkdv", 64): dict.fromkeys(_EACH, Tile(64, 128, 8, 2)) | {"dropout": Tile(32, 128, 4, 3)},
        ("dkdv", 128): dict.fromkeys(_EACH, Tile(64, 128, 8, 2)),
        # With several features the loop of 128 keys spills too much.  With a bias whose gradient
        # atomics add up, 15 of its accesses are to spilled numbers, 17 with nothing else than the
        # bias, where it has share .45 of the peak by the model, and that of 64 keys .41.
        ("dq", 64): dict.fromkeys(RICH_FEATURES, Tile(128, 128, 8, 2))
        | dict.fromkeys(("terms", "all"), Tile(128, 64, 8, 2)),
        ("dq", 128): dict.fromkeys(_EACH, Tile(128, 64, 8, 2)),
        ("fused", 64): dict.fromkeys(_EACH, Tile(64, 128, 8, 2)),
        ("fused", 128): dict.fromkeys(_EACH, Tile(64, 128, 8, 2)),
        # with a soft cap .63 of the peak, where tiles that spill nothing have .19; dK and dV .55
        # for .15.  No room for several features beside 64 keys
        ("fwd", 256): dict.fromkeys(RICH_FEATURES, Tile(128, 64, 8, 2))
        | dict.fromkeys(("terms", "all"), Tile(128, 32, 8, 2)),
        ("dkdv", 256): dict.fromkeys(_EACH, Tile(64, 64, 8, 1)),
        ("dq", 256): dict.fromkeys(RICH_FEATURES, Tile(128, 32, 8, 2))
        | dict.fromkeys(("terms", "all"), Tile(128, 32, 8, 1)),
    },
    # Tiles of tcgen05, as those of plain calls: with a mask .41 of the peak in dK and dV at 128
    # columns, by mma.sync .07, dQ .56 for .09, the forward .42 for .24
    "sm_100": {
        ("fwd", 64): dict.fromkeys(_EACH, Tile(128, 128, 8, 2)),
        ("fwd", 128): dict.fromkeys(_EACH, Tile(128, 64, 8, 2)) | {"dropout": Tile(128, 128, 8, 2)},
        ("dkdv", 64): dict.fromkeys(_EACH, Tile(64, 128, 8, 2)),
        ("dkdv", 128): dict.fromkeys(_EACH, Tile(64, 128, 8, 2)),
        ("dq", 64): dict.fromkeys(_EACH, Tile(128, 64, 8, 2)),
        ("dq", 128): dict.fromkeys(_EACH, Tile(128, 64, 8, 2)),  # 128 leave a mask no room
        ("fwd", 256): dict.fromkeys(_EACH, Tile(128, 64, 8, 2)),
        ("dkdv", 256): dict.fromkeys(_EACH, Tile(32, 64, 8, 2)),
        ("dq", 256): dict.fromkeys(_EACH, Tile(128, 32, 8, 1))
        | dict.fromkeys(("mask", "alibi", "softcap", "dropout"), Tile(128, 32, 8, 2)),
    },
}

# The same by tensor descriptors; with dropout the order of keys is not that of a descriptor
_FEATURES_DESCRIBED = {
    "sm_90": {
        ("fwd", 64): dict.fromkeys((*_FOUR, "terms"), Tile(128, 128, 8, 2, 1)),
        # with a mask and a bias of float32 128 keys do not fit
        ("fwd", 128): dict.fromkeys(_FOUR, Tile(128, 128, 8, 2, 1))
        | {"terms": Tile(128, 64, 8, 2, 1)},
    },
    "sm_100": {
        ("fwd", 64): dict.fromkeys((*_FOUR, "terms"), Tile(128, 128, 8, 2, 1)),
        ("fwd", 128): dict.fromkeys((*_FOUR, "terms"), Tile(128, 128, 8, 2, 1)),
    },
}

# Forward by tensor descriptors: fewer registers than by pointers, so larger tiles.  Without
# descriptors for what TMA cannot load from (`descriptors.describable`).
_DESCRIBED = {
    "sm_90": {
        ("fwd", 64): Tile(128, 128, 8, 2, 1),  # 4 warps spill with causal
        ("fwd", 128): Tile(128, 128, 8, 2, 1),
    },
    "sm_100": {
        ("fwd", 64): Tile(128, 128, 8, 2, 1),  # .34 of the peak; 64 keys .29
        ("fwd", 128): Tile(128, 128, 8, 2, 1),  # .57; 64 keys .48
    },
}

# Triton 3.6 fails to compile tiles of 64 queries and more for tcgen05; 32 take mma.sync.  So plain
# calls of 16 bits keep the tiles of before the search with it.
_TRITON_3_6 = {
    "sm_100": {
        ("fwd", 64): Tile(32, 64, 8, 2),
        ("fwd", 128): Tile(32, 64, 8, 3),
        ("fwd", 256): Tile(32, 32, 8, 2),
        ("dkdv", 32): Tile(32, 32, 8, 1),
        ("dkdv", 64): Tile(32, 64, 8, 2),
        ("dkdv", 128): Tile(64, 32, 8, 1),
        ("dkdv", 256): Tile(32, 16, 8, 1),
        ("dq", 64): Tile(32, 64, 8, 2),
        ("dq", 128): Tile(32, 64, 8, 2),
        ("dq", 256): Tile(32, 32, 8, 1),
    },
}

# Rows for 4-byte elements of plain and rich calls alike, on NVIDIA GPUs; elsewhere the 16-bit row
# halved.  Each product of float32 is three of TF32, whose factors are held twice.
_FLOAT = {
    "large": {
        ("fwd", 64): Tile(32, 32, 8, 1),
        ("fwd", 128): Tile(16, 32, 8, 1),  # from here on read in parts (primitives.STREAM)
        ("fwd", 256): Tile(16, 16, 8, 1),
        ("dkdv", 64): Tile(16, 16, 8, 1),
        ("dkdv", 128): Tile(16, 16, 8, 1),
        ("dkdv", 256): Tile(16, 16, 8, 1),
        ("dq", 64): Tile(16, 32, 8, 1),
        ("dq", 128): Tile(16, 32, 8, 1),
        ("dq", 256): Tile(16, 32, 8, 1),
        ("dbias", 64): Tile(32, 16, 8, 1),
        ("dbias", 128): Tile(16, 16, 8, 1),
        ("dbias", 256): Tile(16, 16, 8, 1),
        ("decode", 64): Tile(16, 32, 8, 1),  # 4 warps spill
        ("decode", 128): Tile(16, 32, 8, 1),
        ("decode", 256): Tile(16, 16, 8, 1),
    },
    "sm_80": {
        ("decode", 128): Tile(16, 16, 8, 1),  # 32 keys spill with Triton 3.6
    },
    "small": {
        ("dq", 128): Tile(16, 16, 8, 1),  # 32 keys spill on sm_89
    },
}

# The same of plain calls alone, by the loop's counts
_FLOAT_PLAIN = {
    "sm_80": {
        # all as plain Triton's; in several stages whole rows are in shared memory
        # (attention.Plan.flags_by)
        ("fwd", 64): Tile(128, 16, 4, 2),  # .63 of the peak; 64 queries .55, 32 .42
        ("fwd", 128): Tile(32, 32, 4, 2),  # .54; read in parts .32
        ("dkdv", 64): Tile(16, 64, 8, 2),  # .52; 16 keys .39
        ("dkdv", 128): Tile(32, 32, 8, 2),  # .52; read in parts .41
        ("dq", 64): Tile(128, 16, 8, 2),  # .54; 16 queries .40
        ("dq", 128): Tile(32, 32, 8, 2),  # .51; read in parts .32
    },
    "sm_90": {  # 128 rows a wgmma of TF32, as plain Triton's best
        ("fwd", 64): Tile(128, 64, 8, 2),
        ("fwd", 128): Tile(128, 32, 8, 2),
        ("dkdv", 64): Tile(32, 128, 8, 2),
        ("dkdv", 128): Tile(32, 64, 8, 2),  # 209 spilled, .45 of the peak; read in parts .22
        ("dq", 64): Tile(128, 32, 8, 2),
        ("dq", 128): Tile(32, 32, 8, 2),
    },
}

# Forward with specialized warps (`loads` = 2), which `tune` measures besides the rows above.
# Triton takes a loop apart for 4 warps, and adds 8; with 3.9 128 queries fail to compile.
SPECIALIZED = {
    "sm_90": {
        ("fwd", 64): Tile(64, 128, 4, 2, 2),
        ("fwd", 128): Tile(64, 128, 4, 2, 2),
    },
}

# (architecture, direction, width, bytes of an element) of plain rows that a search by
# `bench/triton_code.py --search` ranked
RANKED = frozenset(
    [
        *itertools.product(
            ("sm_80", "sm_89", "sm_90", "sm_120"), ("fwd", "dkdv", "dq", "fused"), (64, 128), (2,)
        ),
        *itertools.product(("sm_80", "sm_90", "sm_100"), ("fwd", "dkdv", "dq"), (256,), (2,)),
        *itertools.product(("sm_80", "sm_90"), ("fwd", "dkdv", "dq"), (64, 128), (4,)),
    ]
)


def columns(
    architecture: str, direction: str, widths: tuple[int, int], element_size: int, rich: str = ""
) -> int:  # fmt: skip
    """The width by which the tables know a call.  widths: of the tiles of Q and K, and of V."""
    narrow = widths[0] == 256 and widths[1] <= 128 and element_size == 2 and not rich
    if narrow and (direction, NARROW_VALUES) in _PLAIN.get(_kinds(architecture)[0], {}):
        return NARROW_VALUES
    return max(widths)


def key(direction: str, width: int, element_size: int, rich: str = "") -> str:
    """The name under which `tune` stores a tile."""
    return f"{direction}/{width}/{element_size}" + (f"/{rich}" if rich else "")


def tile(architecture: str, direction: str, width: int, element_size: int, rich: str = "") -> Tile:
    """The tile for heads of `width` columns: a tuned one, else the table's; for an unknown
    architecture that of small shared memory, which fits everywhere.  rich: the feature of a rich
    call, one of `RICH_FEATURES`, or what `several` says of more."""
    if architecture == "interpreter":
        return PAIR if direction == "fused" and width > 128 else INTERPRETED
    tuned = _tuned().get(key(direction, width, element_size, rich))
    return tuned or shipped(architecture, direction, width, element_size, rich)


def shipped(
    architecture: str, direction: str, width: int, element_size: int, rich: str = "",
    descriptors: bool = True,
) -> Tile:  # fmt: skip
    """The table's tile; without `descriptors` that of the kernels which load by pointers."""
    if _lacks_tcgen05(architecture):
        plain = element_size == 2 and not rich
        known = _row(_TRITON_3_6, _kinds(architecture), direction, width) if plain else None
        found = known or _shipped(architecture, direction, width, element_size, rich, False)
        tall = direction in ("fwd", "dq")
        return found._replace(block_m=min(32, found.block_m)) if tall else found
    return _shipped(architecture, direction, width, element_size, rich, descriptors)


def with_features(architecture: str, descriptors: bool = True) -> dict[tuple[str, int, str], Tile]:
    """(direction, width, feature) -> tile of the rich calls for which there is a row; feature: as
    `several` names it."""
    found = {}
    if _lacks_tcgen05(architecture):
        return found
    for table in (_FEATURES, _FEATURES_DESCRIBED) if descriptors else (_FEATURES,):
        kind = next((kind for kind in _kinds(architecture) if kind in table), None)
        for (direction, width), rows in table.get(kind, {}).items():
            found |= {(direction, width, feature): tile for feature, tile in rows.items()}
    return found


def _shipped(architecture, direction, width, element_size, rich, descriptors) -> Tile:
    """The row of the tables."""
    if descriptors and element_size == 2 and not rich:
        described = _row(_DESCRIBED, _kinds(architecture), direction, width)
        if described:
            return described
    kinds = _kinds(architecture)
    if element_size == 2 and rich:
        rows = with_features(architecture, descriptors)
        found = rows.get((direction, max(width, 64), rich))
        if found:
            return found
    if direction == "fused":
        return PAIR if rich or element_size == 4 else _row(_PLAIN, kinds, direction, width) or PAIR
    plain = _row(_PLAIN, kinds, direction, width)
    found = _row(_RICH, kinds, direction, width) or plain._replace(stages=1) if rich else plain
    if element_size == 4:
        alone = None if rich else _row(_FLOAT_PLAIN, _kinds(architecture), direction, width)
        if alone:
            return alone
        block_m = max(16, found.block_m // 2) if direction != "decode" else found.block_m
        half = Tile(block_m, max(16, found.block_n // 2), found.warps, 1)
        return _row(_FLOAT, kinds, direction, width) or half
    return found


def _lacks_tcgen05(architecture: str) -> bool:
    """Whether the installed Triton fails to compile the tiles of this architecture."""
    return "sm_100" in _kinds(architecture) and _triton() < (3, 7)


@functools.cache
def _triton() -> tuple[int, ...]:
    """Triton's version, (major, minor)."""
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2]))


def _row(tables: dict, kinds: tuple, direction: str, width: int) -> Tile | None:
    """The first row for the width, else the first for 64 columns, which narrower heads fit."""
    for columns in dict.fromkeys((width, max(width, 64))):
        for kind in kinds:
            found = tables.get(kind, {}).get((direction, columns))
            if found:
                return found
    return None


def _kinds(architecture: str) -> tuple[str, ...]:
    """The tables that serve an architecture, the first that has a row wins."""
    if architecture.startswith("gfx"):
        return (architecture, "amd")
    if architecture.startswith("sm_10"):
        return ("sm_100", "hopper", "large")
    if architecture.startswith("sm_12"):
        return ("sm_120", "small", "large")
    own = {"sm_80": (), "sm_90": ("hopper",)}.get(architecture, ("small",))
    return (architecture, *own, "large")


_override: dict[str, Tile] = {}
_generation = 0


def generation() -> int:
    """Another number after each change of what `tile` gives."""
    return _generation


def _changed() -> None:
    global _generation
    _generation += 1
    _tuned.cache_clear()


@contextlib.contextmanager
def using(name: str, chosen: Tile):
    """Within it `tile` gives `chosen` for the key `name`."""
    _override[name] = chosen
    _changed()
    try:
        yield
    finally:
        _override.pop(name)
        _changed()


def cache_file() -> Path:
    """Where `tune` stores tiles: ATTN_EXT_CACHE_DIR, else ~/.cache/attn_ext, triton_tiles.json."""
    return cache_folder() / "triton_tiles.json"


def identity(device_name: str) -> str:
    """What a measurement holds for: the device and the versions of Triton and attn_ext."""
    versions = []
    for package in ("triton", "attn_ext"):
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} unknown")
    return ", ".join((device_name, *versions))


def _stored() -> dict:
    """The cache file's content; empty where it is missing or is no such file."""
    try:
        content = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def store(device_name: str, tiles: dict[str, Tile]) -> None:
    """Add tiles to the cache file; other entries stay."""
    content = _stored()
    content[identity(device_name)] = content.get(identity(device_name), {}) | {
        name: list(chosen) for name, chosen in tiles.items()
    }
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    partial.replace(path)  # at once: another process never reads half a file
    _changed()


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _is_tile(name: str, value) -> bool:
    """Five integers, sizes and warps powers of two: what a kernel can take; or `PAIR`."""
    if not isinstance(value, list) or [type(n) for n in value] != [int] * 5:
        return False
    if name.startswith("fused/"):  # whose sums hold so many queries at a time
        return value == list(PAIR) or (32 <= value[0] <= 64 and _is_tile("", value))
    return min(value[:4]) > 0 and all(n & (n - 1) == 0 for n in value[:3]) and value[4] in (0, 1, 2)


@functools.cache
def _tuned() -> dict[str, Tile]:
    """The stored tiles of this device and these versions; a damaged entry is as none."""
    found = _stored().get(identity(_device_name()), {})
    good = {name: Tile(*value) for name, value in found.items() if _is_tile(name, value)}
    return good | _override
