"""Tile sizes by architecture, direction, width of the head and element size; each row says why.

A row is (BLOCK_M queries, BLOCK_N keys, warps, pipeline stages).  tests/test_triton_compile.py
compiles rows for each architecture and compares registers, spills and shared memory with the
committed table tests/triton_resources.json.  `tune` measures tiles on a GPU and stores the best
ones; those win over this table.  Keys of stored tiles: "fwd/128/2" is direction, width, bytes of
an element.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from importlib import metadata
from pathlib import Path
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

# (direction, width) -> tile for 16-bit elements where shared memory is large (sm_80, 90, 100)
_LARGE = {
    ("fwd", 64): Tile(128, 64, 8, 2),  # 64 x 64 x 4 warps needs as many registers for half the rows
    ("fwd", 128): Tile(64, 64, 8, 3),  # 128 rows spill
    ("fwd", 256): Tile(32, 32, 8, 2),  # O alone is half the registers
    ("dkdv", 64): Tile(64, 32, 4, 2),  # dK, dV, P and dS at once: 64 keys spill
    ("dkdv", 128): Tile(64, 32, 8, 1),  # a second stage spills
    ("dkdv", 256): Tile(32, 32, 8, 1),
    ("dq", 64): Tile(64, 64, 8, 2),
    ("dq", 128): Tile(64, 64, 8, 2),
    ("dq", 256): Tile(32, 32, 8, 1),
    ("dbias", 64): Tile(64, 64, 8, 1),  # a check, not a hot path: one stage
    ("dbias", 128): Tile(64, 64, 8, 1),
    ("dbias", 256): Tile(32, 32, 8, 1),
    ("decode", 64): Tile(16, 64, 4, 2),  # a group's rows fill 16 rows; memory rules
    ("decode", 128): Tile(16, 64, 4, 2),
    ("decode", 256): Tile(16, 32, 4, 2),
}

# What differs on sm_90 and sm_100: wgmma wants 64 keys as its rows
_HOPPER = {("dkdv", 64): Tile(32, 64, 8, 2)}

# What differs where shared memory is small: 99 KiB on sm_89 and sm_120, 64 KiB on AMD
_SMALL = {
    ("fwd", 128): Tile(64, 64, 8, 2),  # three stages take 112 KiB
    ("dq", 128): Tile(32, 64, 8, 2),
}
_AMD = {
    ("fwd", 64): Tile(128, 64, 4, 1),  # a wave has 64 lanes: half the warps; stages cost LDS
    ("fwd", 128): Tile(128, 32, 4, 1),
    ("fwd", 256): Tile(32, 32, 4, 1),
    ("dkdv", 64): Tile(32, 64, 4, 1),
    ("dkdv", 128): Tile(32, 32, 4, 1),
    ("dkdv", 256): Tile(16, 32, 4, 1),
    ("dq", 64): Tile(64, 32, 4, 1),
    ("dq", 128): Tile(64, 32, 4, 1),
    ("dq", 256): Tile(32, 32, 4, 1),
    ("decode", 64): Tile(16, 64, 4, 1),
    ("decode", 128): Tile(16, 64, 4, 1),
    ("decode", 256): Tile(16, 32, 4, 1),
}


def key(direction: str, width: int, element_size: int) -> str:
    """The name under which `tune` stores a tile."""
    return f"{direction}/{width}/{element_size}"


def tile(architecture: str, direction: str, width: int, element_size: int) -> Tile:
    """The tile for heads of `width` columns: a tuned one, else the table's; for an unknown
    architecture that of small shared memory, which fits everywhere."""
    if architecture == "interpreter":
        return Tile(32, 32, 4, 1)
    tuned = _tuned().get(key(direction, width, element_size))
    return tuned or shipped(architecture, direction, width, element_size)


def shipped(architecture: str, direction: str, width: int, element_size: int) -> Tile:
    """The table's tile."""
    row = (direction, max(width, 64))  # narrower heads leave registers free, and are rare
    found = _LARGE[row]
    if architecture.startswith("gfx"):
        found = _AMD.get(row, found._replace(stages=1))
    elif architecture in ("sm_90", "sm_100", "sm_103"):
        found = _HOPPER.get(row, found)
    elif architecture != "sm_80":
        found = _SMALL.get(row, found)
    if element_size == 4:  # FMA in place of tensor cores, and twice the bytes
        block_m = max(16, found.block_m // 2) if direction != "decode" else found.block_m
        found = Tile(block_m, max(16, found.block_n // 2), found.warps, 1)
    return found


def lighter(found: Tile) -> Tile:
    """For backward calls with several features, whose masks, words and biases need registers."""
    return found._replace(block_m=max(16, found.block_m // 2), stages=1)


_override: dict[str, Tile] = {}


@contextlib.contextmanager
def using(name: str, chosen: Tile):
    """Within it `tile` gives `chosen` for the key `name`."""
    _override[name] = chosen
    _tuned.cache_clear()
    try:
        yield
    finally:
        _override.pop(name)
        _tuned.cache_clear()


def cache_file() -> Path:
    """Where `tune` stores tiles: ATTN_EXT_CACHE, else ~/.cache/attn_ext, triton_tiles.json."""
    folder = os.environ.get("ATTN_EXT_CACHE") or Path.home() / ".cache" / "attn_ext"
    return Path(folder) / "triton_tiles.json"


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
    _tuned.cache_clear()


def _device_name() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


def _is_tile(value) -> bool:
    """Four positive integers, block sizes and warps powers of two: what a kernel can take."""
    whole = isinstance(value, list) and len(value) == 4 and all(type(n) is int for n in value)
    return whole and min(value) > 0 and all(n & (n - 1) == 0 for n in value[:3])


@functools.cache
def _tuned() -> dict[str, Tile]:
    """The stored tiles of this device and these versions; a damaged entry is as none."""
    found = _stored().get(identity(_device_name()), {})
    good = {name: Tile(*value) for name, value in found.items() if _is_tile(value)}
    return good | _override
