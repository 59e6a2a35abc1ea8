"""The hot loops of the Triton kernels beside those of plain Triton: `machine_code.py --triton`.

Triton compiles for GPUs that are absent; nvdisasm, of Triton's wheel, prints the machine code, and
machine_code.py counts.  "ours" is what a call launches, by the tile that the table gives; "plain"
the kernel of plain_triton.py, by the tile of `PLAIN_TILES`, the best of those that `search` tried.

    python bench/triton_code.py sm_90                           one architecture's rows, as JSON
    python bench/triton_code.py sm_90 --search dkdv 128         tiles of ours, the best last
    python bench/triton_code.py sm_90 --search dkdv 128 --plain     tiles of plain Triton
    python bench/triton_code.py sm_90 --tile dkdv 128 64,128,8,2,0  one of ours; --dump: its loop
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "bench" / "results" / "triton_code.json"
ARCHITECTURES = {  # -> what machine_code.py knows of it
    "sm_80": "sm80", "sm_89": "sm89", "sm_90": "sm90", "sm_120": "sm120",
}  # fmt: skip
TABLED = ("sm_80", "sm_90")  # of which the table has rows
HEAD_DIMS = (64, 128)
PASSES = {
    "forward": "fwd",
    "dkdv": "dkdv",
    "dq": "dq",
    "fused": "fused",
}  # -> direction of the configuration
CASES = {"full": {}, "causal": {"causal": True}}
# Of the forward one option each; ALiBi as models have it, with causal
OPTIONS = {
    "varlen": {"seqlens_q": [1024]},
    "softcap": {"softcap": 30.0}, "alibi": {"alibi": True, "causal": True},
    "key mask": {"mask": "bk"}, "mask": {"mask": "bqk"}, "bias": {"bias": "hqk"},
    "dropout": {"dropout_p": 0.1},
}  # fmt: skip
SEQLEN = 1024  # a multiple of every tile

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


def load(path: str):
    """A file of this repository as a module of its name."""
    name = Path(path).stem
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


machine_code = load("bench/machine_code.py")


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


def row(compiled, architecture: str, tile) -> dict:
    """The row of a compiled kernel: its tile, and what machine_code.py counts and bounds."""
    path, registers = hot_loop(compiled, architecture)
    block = {
        "threads": compiled.metadata.num_warps * 32,
        "shared_memory": compiled.metadata.shared,
    }
    # of specialized warps those of the tile multiply, and not the ones that Triton adds
    kernel = machine_code.Kernel(ARCHITECTURES[architecture], "", tile[2] * 32)
    found = machine_code.report(kernel, path, registers, block)
    return {"tile": list(tile), "shared_memory": compiled.metadata.shared} | found


def prepare(architecture: str) -> None:
    """Let Triton compile for an absent GPU of this architecture, in this process for good."""
    import triton

    from attn_ext.triton_kernels.launch import attention, replay

    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    offline = load("tests/helpers/triton_offline.py")
    triton.runtime.driver.set_active(offline.StubDriver(architecture))
    attention.architecture = lambda x: architecture
    attention.multiprocessors = lambda x: 132
    replay.usable = lambda x: False  # nothing is launched


def ours(name: str, head_dim: int, case: str, tile=None):
    """(compiled kernel, tile) of a pass as a call launches it; `tile`: another than the table's."""
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
    wanted = sizes | {"head_dim": head_dim, "dtype": torch.bfloat16}
    call = random_call(**wanted | (CASES | OPTIONS)[case])
    width, rich, needs = attention.width(head_dim), attention.Plan(call).rich(), needs_of(call)
    with contextlib.ExitStack() as asked:
        if tile is not None:
            key = configs.key(PASSES[name], width, 2, rich)
            asked.enter_context(configs.using(key, configs.Tile(*tile)))
        if name == "fused":
            needs = needs._replace(bias=False)  # which it leaves to the others
        else:
            key = configs.key("fused", width, 2, rich)
            asked.enter_context(configs.using(key, configs.PAIR))
        out, lse, *_ = attention.forward(call)
        if name != "forward":
            backward.backward(call, out, out, lse, None, needs)
    return found[name]


def measure(architecture: str, only: Sequence[str] = ()) -> dict:
    """{"sm_90 forward 128": {"ours full": row, "ours causal": row, "plain": row}, ...}; `only`:
    the names wanted, and of these nothing of plain Triton."""
    prepare(architecture)
    plain = load("bench/plain_triton.py")
    rows = {}
    for name, head_dim in itertools.product(PASSES, HEAD_DIMS):
        each, label = {}, f"{architecture} {name} {head_dim}"
        if only and label not in only:
            continue
        for case in (*CASES, *(OPTIONS if name == "forward" else ())):
            compiled, tile = ours(name, head_dim, case)
            each[f"ours {case}"] = row(compiled, architecture, tile)
        if not only:
            tile = PLAIN_TILES[architecture, name, head_dim]
            compiled = plain.compiled(name, architecture, head_dim, tile)
            each["plain"] = row(compiled, architecture, tile)
        rows[label] = each
    return rows


def measure_all(only: Sequence[str] = ()) -> dict:
    """`measure` of each architecture, in processes of their own: Triton remembers its target."""
    rows = {}
    for architecture in TABLED:
        wanted = [name for name in only if name.startswith(architecture)]
        if only and not wanted:
            continue
        command = [sys.executable, __file__, architecture, "--rows", *wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{architecture}: {done.stderr[-3000:]}")
        rows |= json.loads(done.stdout)
    return rows


def space(name: str, head_dim: int, described: bool):
    """Tiles that are worth compiling: those whose sums and scores leave a thread some registers."""
    # of a loop's step, of a program
    walked, own = (32, 64) if name == "fused" else (32, 64, 128), (64, 128)
    by_keys = name in ("dkdv", "fused")
    for step, rows, warps, stages in itertools.product(walked, own, (4, 8), (2, 3)):
        sums = rows * head_dim * (2 if by_keys else 1)
        scores = step * rows * (1 if name == "forward" else 2)
        if (sums + scores) // (32 * warps) > 192:
            continue
        m, n = (step, rows) if by_keys else (rows, step)
        yield m, n, warps, stages
        if described:
            yield m, n, warps, stages, 1


def search(architecture: str, name: str, head_dim: int, kind: str, case: str, only: str) -> None:
    """Print tiles, the best by the model last, of those that fit and spill nothing in the loop."""
    from attn_ext.triton_kernels import configs

    prepare(architecture)
    results = []
    described = kind == "ours" and name == "forward" and architecture == "sm_90"
    for tile in space(name, head_dim, described):
        if only and not only_matches(only, tile):
            continue
        try:
            if kind == "plain":
                compiled = load("bench/plain_triton.py").compiled(
                    name, architecture, head_dim, tile
                )
            else:
                compiled, tile = ours(name, head_dim, case, (*tile, 0)[:5])
            found = row(compiled, architecture, tile)
        except Exception as error:  # what Triton cannot compile is no candidate
            print(tile, type(error).__name__, str(error)[:80], flush=True)
            continue
        fits = found["shared_memory"] <= configs.SHARED_LIMIT[architecture]
        results.append((fits, found["share_2_norm"], found))
        print(line(found), "" if fits else "too much shared memory", flush=True)
    print("ranked")
    for _, _, found in sorted(results, key=lambda x: x[:2])[-12:]:
        print(line(found))


def only_matches(only: str, tile) -> bool:
    """Whether "64,128,8" or such begins the tile; "*" stands for any number."""
    wanted = only.split(",")
    return all(a in ("*", str(b)) for a, b in zip(wanted, tile, strict=False))


def line(found: dict) -> str:
    """A row in one line."""
    counts, eights = found["counts"], found["tensor_cycles"] / 8
    return (
        f"{tuple(found['tile'])} share {found['share_2_norm']} slots {found['slots_a_product']} "
        f"ldmatrix {counts.get('ldmatrix', 0) / eights:.2f} spill {counts.get('spill', 0)} "
        f"registers {found['registers']} ctas {found['ctas']} smem {found['shared_memory']} "
        f"bound {found['bound']} {found['share']}"
    )


def differences(table: dict, rows: dict, slack: float = 0.05) -> list[str]:
    """What a fresh compile has more of than the table says, by more than `slack`."""
    lines = []
    for name, each in rows.items():
        fresh = {kind: found for kind, found in each.items() if kind.startswith("ours")}
        lines += [
            f"{name}, {text}"
            for text in machine_code.differences(
                {"kernels": table["rows"].get(name, {})}, fresh, slack
            )
        ]
    return lines


def markdown(rows: dict) -> str:
    """The table that docs/design/triton.md shows."""
    names = ("hot loop", "whose", "tile", "registers", "shared memory", "slots a product",
             "ldmatrix a product", "spills", "bound", "share")  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for name, each in rows.items():
        for kind, found in each.items():
            counts = found["counts"]
            m, n, warps, stages, *loads = found["tile"]
            tile = f"{m}x{n}, {warps} warps, {stages} stages" + (", TMA" if any(loads) else "")
            ldmatrix = round(counts.get("ldmatrix", 0) / found["tensor_cycles"] * 8, 2)
            cells = [
                name, kind, tile, found["registers"], found["shared_memory"],
                found["slots_a_product"], ldmatrix, counts.get("spill", 0), found["bound"],
                found["share_2_norm"],
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def report(write: bool) -> int:
    """What `machine_code.py --triton` does."""
    import triton

    rows = measure_all()
    print(markdown(rows))
    if write:
        content = {"triton": triton.__version__, "rows": rows}
        TABLE.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    lines = differences(json.loads(TABLE.read_text()), rows)
    print("\n".join(lines) or "as in the table")
    return bool(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", choices=ARCHITECTURES)
    parser.add_argument("--search", nargs=2, metavar=("PASS", "HEAD_DIM"))
    parser.add_argument("--tile", nargs=3, metavar=("PASS", "HEAD_DIM", "TILE"))
    parser.add_argument("--rows", nargs="*", default=(), help="of which rows alone")
    parser.add_argument("--case", choices=[*CASES, *OPTIONS], default="full")
    parser.add_argument("--only", default="", help='tiles that begin like this: "64,*,8"')
    parser.add_argument("--plain", action="store_true", help="plain Triton in place of ours")
    parser.add_argument("--dump", action="store_true", help="print the loop")
    args = parser.parse_args()
    if args.search:
        name, head_dim = args.search
        kind = "plain" if args.plain else "ours"
        search(args.architecture, name, int(head_dim), kind, args.case, args.only)
    elif args.tile:
        prepare(args.architecture)
        name, head_dim, tile = (
            args.tile[0],
            int(args.tile[1]),
            tuple(map(int, args.tile[2].split(","))),
        )
        if args.plain:
            compiled = load("bench/plain_triton.py").compiled(
                name, args.architecture, head_dim, tile
            )
        else:
            compiled, tile = ours(name, head_dim, args.case, tile)
        print(line(row(compiled, args.architecture, tile)))
        for each in hot_loop(compiled, args.architecture)[0] if args.dump else ():
            print(f"{each.address:6}{each.predicate:7}{each.opcode} {each.operands}")
    else:
        print(json.dumps(measure(args.architecture, args.rows)))


if __name__ == "__main__":
    main()
