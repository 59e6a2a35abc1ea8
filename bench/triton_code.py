"""The hot loops of the Triton kernels beside those of plain Triton: `machine_code.py --triton`.

Triton compiles for GPUs that are absent; nvdisasm, of Triton's wheel, prints the machine code, and
machine_code.py counts.  "ours" is what a call launches, by the tile that the table gives; "plain"
the kernel of plain_triton.py, by the tile of `PLAIN_TILES`, the best of those that `search` tried.

    python bench/triton_code.py sm_90                           one architecture's rows, as JSON
    python bench/triton_code.py sm_90 --rows "sm_90 dq 64" --kinds "ours bias" --write  some of them
    python bench/triton_code.py sm_90 --search dkdv 128         tiles of ours, the best last
    python bench/triton_code.py sm_90 --search dkdv 128 --plain     tiles of plain Triton
    python bench/triton_code.py sm_90 --tile dkdv 128 64,128,8,2,0  one of ours; --dump: its loop
    python bench/triton_code.py sm_90 --tile dkdv 96 table          that of the table
    python bench/triton_code.py sm_90 --search dq 64 --type fp32    of another type than bf16
    python bench/triton_code.py sm_90 --tile dq 192/128 table       values of 128 columns
    python bench/triton_code.py sm_90 --others --write      full calls of other widths and types
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import amdgcn
import machine_code
import plain_triton

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = {  # -> what machine_code.py knows of it
    "sm_80": "sm80", "sm_89": "sm89", "sm_90": "sm90", "sm_100": "sm100", "sm_120": "sm120",
    "gfx942": "",  # bench/amdgcn.py knows it
}  # fmt: skip
HEAD_DIMS = (64, 128)
PASSES = {
    "forward": "fwd",
    "dkdv": "dkdv",
    "dq": "dq",
    "fused": "fused",
}  # -> direction of the configuration
CASES = {"full": {}, "causal": {"causal": True}}
# One option each; ALiBi as models have it, with causal
OPTIONS = {
    "varlen": {"seqlens_q": [1024]},
    "softcap": {"softcap": 30.0}, "alibi": {"alibi": True, "causal": True},
    "key mask": {"mask": "bk"}, "mask": {"mask": "bqk"}, "bias": {"bias": "hqk"},
    "dropout": {"dropout_p": 0.1},
}  # fmt: skip
# Of a pass of the backward; a bias wants no gradient, but for that which dQ's kernel writes
BACKWARD = ("softcap", "alibi", "mask", "bias", "dropout")
BIAS_GRADIENT = {"bias gradient": {"bias": "hqk"}}
SEVERAL = {
    "mask and bias": {"mask": "bqk", "bias": "hqk"},
    "mask and dropout": {"mask": "bqk", "dropout_p": 0.1},
    "all": {"mask": "bqk", "bias": "hqk", "softcap": 30.0, "alibi": True, "dropout_p": 0.1},
}  # fmt: skip
SEQLEN = 1024  # a multiple of every tile
TENSOR_MEMORY = 512  # columns of a multiprocessor of sm_100

# (architecture, pass, head_dim) -> (BLOCK_M, BLOCK_N, warps, stages): the largest share of those
# whose loop spills nothing
PLAIN_TILES = {
    ("sm_80", "forward", 64): (128, 64, 4, 2),
    ("sm_80", "forward", 128): (128, 32, 4, 2),
    ("sm_80", "dkdv", 64): (32, 128, 4, 2),
    ("sm_80", "dkdv", 128): (32, 128, 8, 2),
    ("sm_80", "dq", 64): (128, 64, 4, 3),
    ("sm_80", "dq", 128): (128, 64, 8, 3),
    ("sm_80", "fused", 64): (32, 128, 4, 2),
    ("sm_80", "fused", 128): (32, 128, 8, 2),
    ("sm_90", "forward", 64): (128, 128, 4, 3),
    ("sm_90", "forward", 128): (128, 128, 8, 2),
    ("sm_90", "dkdv", 64): (64, 128, 8, 2),
    ("sm_90", "dkdv", 128): (64, 128, 8, 2),
    ("sm_90", "dq", 64): (128, 128, 8, 2),
    ("sm_90", "dq", 128): (128, 64, 8, 2),
    ("sm_90", "fused", 64): (64, 128, 8, 2),
    ("sm_90", "fused", 128): (64, 128, 8, 2),
}


def hot_loop(compiled, architecture: str):
    """(path of the hot loop, registers a thread) of a kernel that Triton has compiled."""
    tool = machine_code.load_resources().find_cuda_tool("nvdisasm")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, file.name], capture_output=True, text=True, check=True).stdout
    ((_, section, registers),) = machine_code.sections(text)
    family = machine_code.ARCHITECTURES[ARCHITECTURES[architecture]]
    return machine_code.hot_path(machine_code.Code.of(section), family)[0], registers


def listing(compiled, architecture: str) -> list[str]:
    """The instructions of the hot loop."""
    if "amdgcn" in compiled.asm:
        return amdgcn.hot_loop(compiled.asm["amdgcn"])
    path = hot_loop(compiled, architecture)[0]
    return [f"{each.address:6}{each.predicate:7}{each.opcode} {each.operands}" for each in path]


# Products of a tile [BLOCK_M, BLOCK_N] in a step of the hot loop: over or into the columns of Q
# and K, and of V
PRODUCTS = {"forward": (1, 1), "dkdv": (2, 2), "dq": (2, 1), "fused": (3, 2)}


def widths_of(head_dim: int | str) -> tuple[int, int]:
    """Of the tiles of Q and K, and of V: the next powers of two."""
    dim, dim_v = plain_triton.dims(head_dim)
    return 1 << (dim - 1).bit_length(), 1 << (dim_v - 1).bit_length()


def tensor_cycles(name: str, head_dim: int | str, architecture: str, tile) -> float:
    """Of one scheduler's tensor core in a step of the hot loop, a warp of those that multiply; what
    a tcgen05.mma does stands in no opcode."""
    columns = sum(n * width for n, width in zip(PRODUCTS[name], widths_of(head_dim), strict=True))
    work = tile[0] * tile[1] * columns / tile[2]  # multiply-adds a warp
    return work / machine_code.ARCHITECTURES[ARCHITECTURES[architecture]].multiply_adds


def row(compiled, architecture: str, tile, name: str, head_dim: int | str) -> dict:
    """The row of a compiled kernel: its tile, and what machine_code.py, or for an AMD GPU
    amdgcn.py, counts and bounds."""
    if "amdgcn" in compiled.asm:
        found = amdgcn.report(compiled.asm["amdgcn"])
        return {"tile": list(tile), "shared_memory": compiled.metadata.shared} | found
    path, registers = hot_loop(compiled, architecture)
    block = {
        "threads": compiled.metadata.num_warps * 32,
        "shared_memory": compiled.metadata.shared,
    }
    # of specialized warps those of the tile multiply, and not the ones that Triton adds
    kernel = machine_code.Kernel(ARCHITECTURES[architecture], "", tile[2] * 32)
    of_tile = any(each.opcode.startswith("UTC") for each in path)
    tensor = tensor_cycles(name, head_dim, architecture, tile) if of_tile else 0.0
    found = machine_code.report(kernel, path, registers, block, tensor)
    if columns := getattr(compiled.metadata, "tmem_size", 0):
        found |= {"tensor_memory": columns, "ctas": min(found["ctas"], TENSOR_MEMORY // columns)}
    return {"tile": list(tile), "shared_memory": compiled.metadata.shared} | found


def prepare(architecture: str) -> None:
    """Let Triton compile for an absent GPU of this architecture, in this process for good."""
    import triton

    from attn_ext.triton_kernels.launch import attention, replay

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    sys.path.append(str(ROOT / "tests" / "helpers"))
    import triton_offline

    triton.runtime.driver.set_active(triton_offline.StubDriver(architecture))
    attention.architecture = lambda x: architecture
    attention.multiprocessors = lambda x: 132
    replay.usable = lambda x: False  # nothing is launched


TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def ours(name: str, head_dim: int | str, case: str, tile=None, dtype: str = "bf16"):
    """(compiled kernel, tile) of a pass as a call launches it; head_dim: as `plain_triton.dims`
    takes it; `tile`: another than the table's."""
    import contextlib

    import torch

    from attn_ext.testing import needs_of, random_call
    from attn_ext.triton_kernels import configs
    from attn_ext.triton_kernels.launch import attention, backward

    found = {}

    def run(kernel, programs, tile, *args):
        if kernel.fn.__name__ == f"{name}_kernel" and name not in found:
            compiled = kernel.warmup(*args, grid=(programs,), **attention.options(tile))
            found[name] = (compiled, tile)

    attention.run = run
    sizes = {"batch": 1, "heads_q": 1, "seqlen_q": SEQLEN, "seqlen_k": SEQLEN}
    dim, dim_v = plain_triton.dims(head_dim)
    wanted = sizes | {"head_dim": dim, "head_dim_v": dim_v, "dtype": getattr(torch, TYPES[dtype])}
    call = random_call(**wanted | (CASES | OPTIONS | BIAS_GRADIENT | SEVERAL)[case])
    plan, needs = attention.Plan(call), needs_of(call)._replace(bias=case in BIAS_GRADIENT)
    rows = {direction: plan.row(direction) for direction in (PASSES[name], "fused")}
    with contextlib.ExitStack() as asked:
        if tile is not None:
            key = configs.key(*rows[PASSES[name]][1:])
            asked.enter_context(configs.using(key, configs.Tile(*tile)))
        if name != "fused":
            key = configs.key(*rows["fused"][1:])
            asked.enter_context(configs.using(key, configs.PAIR))
        out, lse, *_ = attention.forward(call)
        if name != "forward":
            backward.backward(call, out, out, lse, None, needs)
    return found[name]


def kinds_of(name: str) -> tuple[str, ...]:
    """The rows of a pass: ours by case, plain Triton's by its best tile and by our full calls'."""
    options = OPTIONS if name == "forward" else BACKWARD
    cases = (*CASES, *options, *(BIAS_GRADIENT if name == "dq" else ()))
    return (*(f"ours {case}" for case in cases), "plain", "plain, our tile")


def measure(
    architecture: str, only: Sequence[str] = (), kinds: Sequence[str] = (), put=None
) -> dict:  # fmt: skip
    """{"sm_90 forward 128": {"ours full": row, "ours causal": row, "plain": row}, ...}; `only`:
    the names wanted; `kinds`: of `kinds_of`, those wanted; put: takes each as soon as it is there.
    """
    prepare(architecture)
    rows = {}
    for name, head_dim in itertools.product(PASSES, HEAD_DIMS):
        each, label = {}, f"{architecture} {name} {head_dim}"
        if only and label not in only:
            continue
        for kind in kinds_of(name):
            if kinds and kind not in kinds:
                continue
            if kind.startswith("ours"):
                compiled, tile = ours(name, head_dim, kind.removeprefix("ours "))
            else:
                tile = PLAIN_TILES[architecture, name, head_dim]
                if kind != "plain":
                    tile = table_tile(architecture, name, head_dim, "bf16")
                compiled = plain_triton.compiled(name, architecture, head_dim, tile)
            each[kind] = row(compiled, architecture, tile, name, head_dim)
            if put is not None:
                put({label: {kind: each[kind]}})
        rows[label] = each
    return rows


def space(name: str, head_dim: int | str, described: bool, dtype: str):
    """Tiles that are worth compiling: those whose sums and scores leave a thread some registers."""
    # of a loop's step, of a program
    walked, own = (32, 64) if name == "fused" else (32, 64, 128), (64, 128)
    every_stage = (2, 3)
    if dtype == "fp32":  # of which twice the bytes are held, and each factor as two
        walked, own, every_stage = (16, 32, 64), (32, 64, 128), (1, 2)
    by_keys = name in ("dkdv", "fused")
    width, width_v = widths_of(head_dim)
    columns = width + width_v if by_keys else width_v if name == "forward" else width
    for step, rows, warps, stages in itertools.product(walked, own, (4, 8), every_stage):
        sums = rows * columns
        scores = step * rows * (1 if name == "forward" else 2)
        if (sums + scores) // (32 * warps) > 192:
            continue
        m, n = (step, rows) if by_keys else (rows, step)
        yield m, n, warps, stages
        if described:
            yield m, n, warps, stages, 1


def search(
    architecture: str, name: str, head_dim: str, kind: str, case: str, only: str, dtype: str
) -> None:  # fmt: skip
    """Print tiles, the best by the model last, of those that fit and spill nothing in the loop."""
    from attn_ext.triton_kernels import configs

    prepare(architecture)
    results = []
    described = kind == "ours" and name == "forward" and architecture in ("sm_90", "sm_100")
    for tile in space(name, head_dim, described and dtype != "fp32", dtype):
        if only and not only_matches(only, tile):
            continue
        try:
            if kind == "plain":
                compiled = plain_triton.compiled(name, architecture, head_dim, tile, dtype)
            else:
                compiled, tile = ours(name, head_dim, case, (*tile, 0)[:5], dtype)
            found = row(compiled, architecture, tile, name, head_dim)
        except Exception as error:  # what Triton cannot compile is no candidate
            print(tile, type(error).__name__, str(error)[:80], flush=True)
            continue
        fits = found["shared_memory"] <= configs.SHARED_LIMIT[architecture]
        fits = fits and found.get("tensor_memory", 0) <= TENSOR_MEMORY
        results.append((fits, found["share_2_norm"], found))
        print(line(found), "" if fits else "too much memory", flush=True)
    print("ranked")
    for _, _, found in sorted(results, key=lambda x: x[:2])[-12:]:
        print(line(found))


def table_tile(architecture: str, name: str, head_dim: int | str, dtype: str) -> tuple:
    """That of our full calls, for plain Triton, which loads by pointers."""
    return chosen(architecture, name, head_dim, dtype)[:4]


def chosen(architecture: str, name: str, head_dim: int | str, dtype: str):
    """The table's tile of our full calls."""
    from attn_ext.triton_kernels import configs

    size = 4 if dtype == "fp32" else 2
    width = configs.columns(architecture, PASSES[name], widths_of(head_dim), size)
    return configs.shipped(architecture, PASSES[name], width, size)


def only_matches(only: str, tile) -> bool:
    """Whether "64,128,8" or such begins the tile; "*" stands for any number."""
    wanted = only.split(",")
    return all(a in ("*", str(b)) for a, b in zip(wanted, tile, strict=False))


def line(found: dict) -> str:
    """A row in one line."""
    counts, eights = found["counts"], found["tensor_cycles"] / 8
    columns = found.get("tensor_memory")
    tensor_memory = f"tmem {columns} " if columns else ""
    return (
        f"{tuple(found['tile'])} share {found['share_2_norm']} slots {found['slots_a_product']} "
        f"ldmatrix {counts.get('ldmatrix', 0) / eights:.2f} spill {counts.get('spill', 0)} "
        f"registers {found['registers']} ctas {found.get('ctas')} smem {found['shared_memory']} "
        f"{tensor_memory}"
        f"bound {found['bound']} {found['share']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--search", nargs=2, metavar=("PASS", "HEAD_DIM"))
    parser.add_argument("--tile", nargs=3, metavar=("PASS", "HEAD_DIM", "TILE"))
    parser.add_argument(
        "--others", nargs="?", const="", help="of triton_tables.OTHER_TILES, those so named"
    )
    parser.add_argument("--write", action="store_true", help="each into its table")
    parser.add_argument("--rows", nargs="*", default=(), help="of which rows alone")
    parser.add_argument("--kinds", nargs="*", default=(), help="of these: ours full, plain, ...")
    parser.add_argument(
        "--case", choices=[*CASES, *OPTIONS, *BIAS_GRADIENT, *SEVERAL], default="full"
    )
    parser.add_argument("--type", choices=TYPES, default="bf16")
    parser.add_argument("--only", default="", help='tiles that begin like this: "64,*,8"')
    parser.add_argument("--plain", action="store_true", help="plain Triton in place of ours")
    parser.add_argument("--dump", action="store_true", help="print the loop")
    args = parser.parse_args()
    import triton_tables  # which takes this file as a module

    if args.search:
        name, head_dim = args.search
        kind = "plain" if args.plain else "ours"
        search(args.architecture, name, head_dim, kind, args.case, args.only, args.type)
    elif args.tile:
        prepare(args.architecture)
        name, head_dim = args.tile[:2]
        if args.tile[2] != "table":
            tile = tuple(map(int, args.tile[2].split(",")))
        elif args.plain:
            tile = table_tile(args.architecture, name, head_dim, args.type)
        else:
            tile = None
        if args.plain:
            compiled = plain_triton.compiled(name, args.architecture, head_dim, tile, args.type)
        else:
            compiled, tile = ours(name, head_dim, args.case, tile, args.type)
        print(line(row(compiled, args.architecture, tile, name, head_dim)))
        if args.dump:
            print("\n".join(listing(compiled, args.architecture)))
    elif args.others is not None:
        found = triton_tables.measure_others(args.architecture, args.others, args.write)
        print(json.dumps(found))
    else:
        put = triton_tables.put if args.write else None
        print(json.dumps(measure(args.architecture, args.rows, args.kinds, put)))


if __name__ == "__main__":
    main()
