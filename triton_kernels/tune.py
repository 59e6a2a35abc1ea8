"""Measures tiles on this machine's GPU and stores the fastest, which `configs.tile` then prefers.

    python -m attn_ext.triton_kernels.tune --head-dims 64 128 --seqlen 4096

The cache file (`configs.cache_file()`) is keyed by the device's name and the versions of Triton and
attn_ext, so a new driver stack or a changed kernel is measured afresh.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Sequence

import torch

from attn_ext.core.schema import Needs
from attn_ext.triton_kernels import configs

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def neighbours(tile: configs.Tile) -> list[configs.Tile]:
    """The tiles one step away: a side halved or doubled, the other warps, a stage more or less,
    loads by pointers."""
    steps = [
        {"block_m": tile.block_m // 2}, {"block_m": tile.block_m * 2},
        {"block_n": tile.block_n // 2}, {"block_n": tile.block_n * 2},
        {"warps": 12 - tile.warps}, {"stages": tile.stages - 1}, {"stages": tile.stages + 1},
        {"loads": 0},
    ]  # fmt: skip
    found = [tile._replace(**step) for step in steps]
    return [x for x in found if x != tile and min(x.block_m, x.block_n) >= 16 and x.stages]


def candidates(direction: str, width: int, architecture: str, size: int) -> list[configs.Tile]:
    """The tiles worth measuring for a direction, a width of the head and bytes of an element.
    Where the table's tile is the best of a search by machine code, those near it."""
    if direction == "fused":  # and the two kernels in its place
        return [configs.PAIR, *_fused_candidates(width, architecture, size)]
    specialized = configs.SPECIALIZED.get(architecture, {}).get((direction, width))
    if (architecture, direction, width, size) in configs.RANKED:
        found = neighbours(configs.shipped(architecture, direction, width, size))
        return [specialized, *found] if specialized and size == 2 else found
    if direction == "decode":
        space = itertools.product((16,), (32, 64, 128), (4, 8), (2, 3))
    elif direction == "dbias":
        space = itertools.product((32, 64), (32, 64), (4, 8), (1,))
    else:
        space = itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (1, 2, 3))
    most = 64 * 1024 // max(width, 64) * 16  # elements of S: above, nothing fits the registers
    return [configs.Tile(*row) for row in space if row[0] * row[1] <= most]


def _fused_candidates(width: int, architecture: str, size: int) -> list[configs.Tile]:
    """Tiles of the kernel of dK, dV and sums of dQ, which serves 16-bit elements up to 128 columns:
    near the table's, or where that has none those of few queries."""
    if size != 2 or width > 128:
        return []
    first = configs.shipped(architecture, "fused", width, size)
    if first != configs.PAIR:
        return [tile for tile in neighbours(first) if 32 <= tile.block_m <= 64]
    space = itertools.product((32, 64), (32, 64, 128), (4, 8), (1, 2))
    return [configs.Tile(*row) for row in space]


def measure(function: Callable[[], object], repeats: int) -> float:
    """Median seconds of one call on the current device, after a warm-up call."""
    function()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def workload(direction: str, head_dim: int, seqlen: int, dtype, device) -> Callable[[], object]:
    """A call that is ruled by the kernel of `direction`: causal, 16 heads; decode: 8 rows."""
    from attn_ext.testing import random_call
    from attn_ext.triton_kernels.launch import attention, backward

    if direction == "decode":
        call = random_call(
            batch=8, heads_q=32, heads_k=8, seqlen_q=1, seqlen_k=seqlen, head_dim=head_dim,
            dtype=dtype, device=device, cache_seqlens=[seqlen] * 8,
        )  # fmt: skip
        return lambda: attention.forward(call)
    bias = "k" if direction == "dbias" else False
    call = random_call(
        batch=1, heads_q=16, seqlen_q=seqlen, head_dim=head_dim, dtype=dtype, device=device,
        causal=True, bias=bias, deterministic=bool(bias),
    )  # fmt: skip
    if direction == "fwd":
        return lambda: attention.forward(call)
    out, lse, *_ = attention.forward(call)
    dkdv, own_bias = direction == "dkdv", direction == "dbias"
    at_once = direction == "fused"
    needs = Needs(direction == "dq" or at_once, dkdv or at_once, dkdv or at_once, own_bias)
    return lambda: backward.backward(call, out, out, lse, None, needs)


def tune(
    directions: Sequence[str], head_dims: Sequence[int], seqlen: int, dtype: torch.dtype,
    device: torch.device, repeats: int = 10, report: Callable[[str], None] = print,
) -> dict[str, configs.Tile]:  # fmt: skip
    """The fastest tile of each (direction, width), stored in the cache file and in force at once.

    A tile that does not compile or does not fit the device's memory is passed over."""
    from attn_ext.triton_kernels.launch import attention

    best: dict[str, configs.Tile] = {}
    architecture = attention.architecture(torch.empty(0, dtype=torch.float32, device=device))
    size = torch.finfo(dtype).bits // 8
    for direction, head_dim in itertools.product(directions, head_dims):
        width = attention.width(head_dim)
        call = workload(direction, head_dim, seqlen, dtype, device)
        key = configs.key(direction, width, size)
        results = []
        first = configs.tile(architecture, direction, width, size)
        for tile in [first, *candidates(direction, width, architecture, size)]:
            with configs.using(key, tile):
                try:
                    results.append((measure(call, repeats), tile))
                except Exception as error:  # out of shared memory, or a failed compilation
                    if isinstance(error, torch.cuda.OutOfMemoryError):
                        raise
                    continue
        seconds, tile = min(results)
        best[key] = tile
        before = results[0][0]
        report(f"{key}: {tuple(tile)} {seconds * 1e6:.1f} us (before {before * 1e6:.1f} us)")
    configs.store(torch.cuda.get_device_name(device), best)
    return best


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; 0, or 2 with a message where there is no GPU to measure on."""
    parser = argparse.ArgumentParser(prog="attn-ext tune", description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument(
        "--directions", nargs="+", choices=configs.DIRECTIONS, default=list(configs.DIRECTIONS)
    )
    parser.add_argument("--seqlen", type=int, default=4096, help="keys, and queries but in decode")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("attn-ext tune needs a GPU that torch sees; torch.cuda.is_available() is False")
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    tune(args.directions, args.head_dims, args.seqlen, DTYPES[args.dtype], device, args.repeats)
    print(f"stored in {configs.cache_file()}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
