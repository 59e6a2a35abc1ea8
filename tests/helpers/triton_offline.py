"""Compiles the Triton kernels for GPUs that are not there and shows what they take.

    python tests/helpers/triton_offline.py sm_90          # the selection that CI compiles, as JSON
    python tests/helpers/triton_offline.py sm_90 --all --only "dkdv 128"
    python tests/helpers/triton_offline.py --write        # all tables of tests/triton/resources/
    python tests/helpers/triton_offline.py --write --only " 64 bf16 "

A stub in place of Triton's driver says which GPU is meant; the launch code runs as it is, on CPU
tensors, with `warmup` (compile) in place of the launch.  A row is the tile and what it takes:
[[queries, keys, warps, stages, loads], registers, bytes spilled per thread, bytes of shared memory,
instructions of matrix products and of TMA, hot loop].  The last is, on NVIDIA GPUs, [instructions a
product, instructions, accesses to spilled registers] of the loop with the most products
(bench/machine_code.py), or [] where there is none.
"""

import argparse
import contextlib
import hashlib
import importlib.util
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import tokenize
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from ptx import sums
from triton.backends.compiler import GPUTarget

from attn_ext.testing import needs_of, random_call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import fwd
from attn_ext.triton_kernels.launch import attention, backward, replay

TABLES = Path(__file__).parents[1] / "triton" / "resources"
KERNELS = Path(__file__).parents[2] / "triton_kernels" / "kernels"
TEXTS = ("functions", "primitives", "logits", "present", "softmax", "dropout", "scores", "fwd",
         "delta", "dkdv", "dq", "fused", "dbias", "decode")  # fmt: skip
BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma", "cp.async.bulk.tensor",
                "setmaxnreg")  # fmt: skip
OLDEST = "3.6"  # the oldest Triton that is served; it has tables of its own
OLDEST_FOR = ("sm_90",)  # for these
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("forward", "dkdv", "dq", "fused")
# case -> the kernels whose rows it gives; a feature's case compiles PASSES, and one that is "wide"
# has a bias of float32
ROWS = {
    "causal": (*PASSES, "delta", "dq_from_sums"), "paged": ("decode", "combine"), "all": PASSES,
    "plain": PASSES, "deterministic": ("dbias",), "cache all": ("decode",),
}  # fmt: skip
FEATURES = {
    "varlen": {"seqlens_q": [128]}, "window": {"window": (30, 5)},
    "sink": {"sink": True, "stats": True}, "bias": {"bias": "hqk"}, "mask": {"mask": "bk"},
    "softcap": {"softcap": 5.0}, "alibi": {"alibi": True}, "dropout": {"dropout_p": 0.2},
    "terms": {"mask": "bqk", "bias": "hqk", "softcap": 5.0, "alibi": True},
}  # fmt: skip
ALL_FEATURES = {
    "window": (30, -1), "mask": "bk", "bias": "hqk", "softcap": 5.0, "alibi": True, "sink": True,
    "dropout_p": 0.2, "stats": True, "heads_q": 4, "heads_k": 2,
}  # fmt: skip
# Features whose tiles must leave room for a bias of float32 beside a mask of each query
WIDE = {"bias": FEATURES["bias"], "terms": FEATURES["terms"], "all": ALL_FEATURES | {"mask": "bqk"}}
PLAIN_FEATURES = {  # all that the rows of plain calls serve
    "window": (30, 5), "sink": True, "stats": True, "heads_q": 4, "heads_k": 2, "seqlens_q": [128],
}  # fmt: skip
# What CI compiles afresh: each kind of kernel for sm_90, for the others three whose products and
# loads differ.  That the other rows are those of today's kernels, `digest` says.
CI = re.compile(
    "(forward|dkdv|dq|fused) (64|128) bf16 causal|(decode|combine|delta) 128 bf16 (paged|causal)"
    "|(forward|dkdv) 64 (bf16 all|fp32 causal)|dbias 64 bf16 deterministic"
    "|(forward|repair) 128 bf16 specialized"
)
CI_OF_OTHERS = re.compile("(forward|dkdv) 128 bf16 causal|decode 128 bf16 paged")
# direction of the configuration -> its kernel, and the cases that take its plain and its rich rows
DIRECTIONS = {
    "fwd": ("forward", "causal", "all"), "dkdv": ("dkdv", "causal", "all"),
    "dq": ("dq", "causal", "all"), "fused": ("fused", "causal", "all"),
    "dbias": ("dbias", None, "deterministic"), "decode": ("decode", "paged", "cache all"),
}  # fmt: skip


def configuration(architecture: str):
    """(direction, dtype, tile, name of the row) of each place of the configuration, the plain
    before the rich and the narrow before the wide."""
    widths = (*configs.WIDTHS[:-1], configs.NARROW_VALUES, configs.WIDTHS[-1])
    for direction, dtype, rich, width in itertools.product(
        DIRECTIONS, ("bf16", "fp32"), ("", "all"), widths
    ):
        narrow = (architecture, direction, (256, 128), DTYPES[dtype].itemsize, rich)
        if width == configs.NARROW_VALUES and configs.columns(*narrow) != width:
            continue
        kernel, *cases = DIRECTIONS[direction]
        case = cases[rich == "all"]
        if case:
            size = DTYPES[dtype].itemsize
            tile = configs.shipped(architecture, direction, width, size, rich)
            if tile == configs.PAIR:
                continue
            yield direction, dtype, tile, f"{kernel} {width} {dtype} {case}"


def shipped_rows(architecture: str) -> dict[str, configs.Tile]:
    """One row of a table for each tile that a kernel has for a dtype: that of the place where it
    takes most, with all features if it serves them, at the widest head."""
    last = {row[:3]: row[3] for row in configuration(architecture)}
    rows = {name: tile for (_, _, tile), name in last.items()}
    # of heads with narrow values always: a tile may serve narrower heads with more features
    narrow = f" {configs.NARROW_VALUES} "
    rows |= {name: tile for _, _, tile, name in configuration(architecture) if narrow in name}
    for (_, width), tile in configs.SPECIALIZED.get(architecture, {}).items():
        rows[f"forward {width} bf16 specialized"] = tile
    for (direction, width, feature), tile in configs.with_features(architecture).items():
        name = f"{DIRECTIONS[direction][0]} {width} bf16 {feature}"
        rows |= {name: tile} | ({f"{name} wide": tile} if feature in WIDE else {})
    return rows


def table_path(architecture: str, version: str = triton.__version__) -> Path:
    """The committed table of an architecture for this Triton."""
    oldest = version.startswith(OLDEST + ".") and architecture in OLDEST_FOR
    return TABLES / (f"{architecture}-triton-{OLDEST}.json" if oldest else f"{architecture}.json")


def load_machine_code():
    """bench/machine_code.py as a module."""
    if "machine_code" not in sys.modules:
        path = Path(__file__).parents[2] / "bench" / "machine_code.py"
        spec = importlib.util.spec_from_file_location("machine_code", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["machine_code"] = module
        spec.loader.exec_module(module)
    return sys.modules["machine_code"]


def digest() -> str:
    """What rows hold for: the kernels' text without comments, docstrings and imports."""
    found = hashlib.sha256()
    for name in TEXTS:
        text = (KERNELS / f"{name}.py").read_text()
        first = ""  # token of the line
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in (tokenize.COMMENT, tokenize.NL):
                continue
            if token.type in (tokenize.INDENT, tokenize.DEDENT):
                found.update(b"+" if token.type == tokenize.INDENT else b"-")
                continue
            first = first or token.string
            docstring = token.type == tokenize.STRING and first == token.string
            if not docstring and first not in ("import", "from"):
                found.update(token.string.encode() + b" ")
            if token.type == tokenize.NEWLINE:
                first = ""
    return found.hexdigest()[:16]


class StubDriver:
    """Says which GPU kernels are compiled for; takes launches, and gives each to `launched`."""

    def __init__(self, architecture: str, launched=None):
        hip = architecture.startswith("gfx")
        name = architecture if hip else int(architecture.removeprefix("sm_"))
        self.target = GPUTarget("hip" if hip else "cuda", name, 64 if hip else 32)
        self.launched = launched
        self.utils = self
        self.stream = 0

    def launcher_cls(self, source, metadata):
        """In place of Triton's launcher in C."""
        return self.launched

    def load_binary(self, name, kernel, shared, device):
        """module, function (the binary's bytes stand for it), registers, spills, threads"""
        return name, kernel, 0, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 227 * 1024}

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return self.stream


def printed(tool: str, *arguments: str) -> str:
    """What a tool of Triton's wheel prints."""
    command = [BINARIES / tool, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def hot_loop(text: str) -> list:
    """[instructions a product, instructions, spilled] of the hot loop in nvdisasm's text; [] where
    no loop has products."""
    machine_code = load_machine_code()
    ((_, section, _),) = machine_code.sections(text)
    family = machine_code.ARCHITECTURES["sm90" if "HGMMA" in section else "sm80"]
    try:
        path, _ = machine_code.hot_path(machine_code.Code.of(section), family)
    except ValueError:
        return []
    eights = sum(each.tensor_cycles(family) for each in path) / 8
    spilled = sum(each.group == "spill" for each in path)
    return [round(len(path) / eights, 2), len(path), spilled]


def resources(compiled) -> list:
    """[registers, bytes spilled, shared memory, instructions, hot loop]"""
    loop = []
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        spilled *= 4
    else:
        text = compiled.asm["ptx"]
        assert not (apart := sums.fused_over_lanes(text)), (compiled.name, apart)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            usage = printed("cuobjdump", "-res-usage", file.name)
            code = printed("nvdisasm", file.name)
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        loop = hot_loop(code)
        # ptxas also leaves an unused stack frame of 8 bytes here and there: no spill
        if spilled and not re.search(r"\b(STL|LDL)\b", code):
            spilled = 0
    found = [name for name in INSTRUCTIONS if name in text]
    return [registers, spilled, compiled.metadata.shared, " ".join(found), loop]


def cases():
    """(width and dtype, case, options of random_call, kernels) of what is compiled: each row of the
    configuration, with all features where it is one of rich calls, and single features."""
    shape = {"seqlen_q": 128, "seqlen_k": 128}
    cache = {"seqlen_q": 1, "seqlen_k": 4096, "heads_q": 8, "heads_k": 2, "cache_seqlens": [4096]}
    options = {
        "causal": shape | {"causal": True},
        "paged": cache | {"page_size": 16},
        "plain": shape | PLAIN_FEATURES,
        "all": shape | ALL_FEATURES | {"causal": True},
        "deterministic": shape | ALL_FEATURES | {"deterministic": True},
        "cache all": ALL_FEATURES | cache,
    }
    for width, (name, dtype) in itertools.product(configs.WIDTHS, DTYPES.items()):
        if name == "fp16" and width not in (64, 128):
            continue  # the rows are those of bf16
        base = {"head_dim": width, "dtype": dtype}
        for case, kernels in ROWS.items():
            yield f"{width} {name}", case, base | options[case], kernels
        if width in (64, 128) and name == "bf16":
            yield f"{width} {name}", "specialized", base | options["causal"], ("forward", "repair")
        if width in (64, 128, 256) and name == "bf16":
            wide = {f"{case} wide": option for case, option in WIDE.items()}
            for case, option in (FEATURES | wide).items():
                yield f"{width} {name}", case, base | options["causal"] | option, PASSES
    narrow = {"head_dim": 192, "head_dim_v": 128, "dtype": DTYPES["bf16"]}
    label = f"{configs.NARROW_VALUES} bf16"
    yield label, "causal", narrow | options["causal"], ("forward", "dkdv", "dq")


def compile_all(architecture: str, everything: bool, only: str = "") -> dict[str, list]:
    """ "kernel width dtype case" -> row, of what CI compiles, with `everything` also of one row for
    each shipped tile: the tables.  With `only`, of all cases that match it instead.
    """
    table = {}
    triton.runtime.driver.set_active(StubDriver(architecture))
    attention.architecture = lambda x: architecture
    attention.multiprocessors = lambda x: 132
    replay.usable = lambda x: False  # nothing is launched

    shipped = shipped_rows(architecture) if everything else {}

    ci = CI if architecture == "sm_90" else CI_OF_OTHERS

    def wanted(name):
        return re.search(only, name) if only else ci.fullmatch(name) or name in shipped

    for label, case, options, kernels in cases():
        if not any(wanted(f"{kernel} {label} {case}") for kernel in kernels):
            continue
        asked = contextlib.nullcontext()
        if case == "specialized":
            width = options["head_dim"]
            tile = configs.SPECIALIZED.get(architecture, {}).get(("fwd", width))
            if tile is None:
                continue
            asked = configs.using(configs.key("fwd", width, 2), tile)

        def run(kernel, programs, tile, *args, end=f"{label} {case}", kernels=kernels):
            short = kernel.fn.__name__.removesuffix("_kernel")
            if short == "forward" and args[-2] == fwd.REPAIR.value:
                short = "repair"
            name = f"{short} {end}"
            if short not in kernels or not wanted(name) or not tile.fused:
                return  # far rows have one tile on every GPU
            compiled = kernel.warmup(*args, grid=(programs,), **attention.options(tile))
            table[name] = [list(tile), *resources(compiled)]
            if os.environ.get("SHOW"):
                print(name, *table[name], file=sys.stderr, flush=True)
            tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
            assert tensor_memory <= 512, f"{name}: {tensor_memory} columns of tensor memory"

        attention.run = run
        call = random_call(**options)
        if case.endswith("wide"):
            call = call._replace(bias=call.bias.float())
        with asked:
            out, lse, *_ = attention.forward(call)
        if call.seqlens_k is None:
            needs = needs_of(call)
            at_once, backward.fused_tile = backward.fused_tile, lambda *_: None
            backward.backward(call, out, out, lse, lse, needs)
            backward.fused_tile = at_once
            fused = [name for name in kernels if name in ("fused", "dq_from_sums")]
            if any(wanted(f"{name} {label} {case}") for name in fused):
                needs = needs._replace(bias=False)  # which it leaves to the others
                backward.backward(call, out, out, lse, lse, needs)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", nargs="?", choices=configs.SHARED_LIMIT)
    parser.add_argument("--all", action="store_true", help="all rows of the committed table")
    parser.add_argument("--only", default="", help="kernels and cases that match this expression")
    parser.add_argument("--write", action="store_true", help="into the committed tables")
    args = parser.parse_args()
    if args.architecture:
        found = compile_all(args.architecture, args.all or args.write, args.only)
        if args.write:
            write(args.architecture, found)
        else:
            print(json.dumps(found))
        return

    def in_a_process(architecture):  # Triton remembers its target
        command = [sys.executable, __file__, architecture, "--write", "--only", args.only]
        subprocess.run(command, check=True)

    oldest = triton.__version__.startswith(OLDEST + ".")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(in_a_process, OLDEST_FOR if oldest else configs.SHARED_LIMIT))


def write(architecture: str, found: dict[str, list]) -> None:
    """Put rows into the architecture's table; other rows of the same kernels stay."""
    path = table_path(architecture)
    version = {"triton": triton.__version__, "kernels": digest()}
    table = json.loads(path.read_text()) if path.exists() else {}
    rows = table.get("rows", {}) if version.items() <= table.items() else {}
    order = [
        f"{kernel} {label} {case}" for label, case, _, kernels in cases() for kernel in kernels
    ]
    rows = rows | found
    lines = [f"  {json.dumps(n)}: {json.dumps(rows[n])}" for n in order if n in rows]
    head = "".join(f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in version.items())
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + head + ' "rows": {\n' + ",\n".join(lines) + "\n }\n}\n")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    main()
