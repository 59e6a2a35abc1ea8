"""Compiles the Triton kernels for GPUs that are not there and shows what they take.

    python tests/triton_offline.py sm_90            # the selection that CI compiles, as JSON
    python tests/triton_offline.py sm_90 --all --only "dkdv 128"
    python tests/triton_offline.py --write          # everything, into tests/triton_resources.json
    python tests/triton_offline.py --write --only " 64 bf16 "

A stub in place of Triton's driver says which GPU is meant; the launch code runs as it is, on CPU
tensors, with `warmup` (compile) in place of the launch.  A row is [registers, bytes spilled per
thread, shared memory in bytes, instructions of matrix products and of TMA].
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from attn_ext.triton_kernels import configs, launch, replay
from triton.backends.compiler import GPUTarget

from attn_ext.testing import random_call

TABLE = Path(__file__).with_name("triton_resources.json")
BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma", "cp.async.bulk.tensor",
                "setmaxnreg")  # fmt: skip
KERNELS = ("forward", "delta", "dkdv", "dq", "dbias", "decode", "combine")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Cases whose kernel is that of another case, or all but
TWICE = {
    "delta": ("all", "deterministic", *("bias", "mask", "softcap", "alibi", "dropout")),
    "combine": ("cache all",), "forward": ("deterministic",), "dkdv": ("deterministic",),
    "dq": ("deterministic",),
}  # fmt: skip
ONE_FEATURE = {
    "bias": {"bias": "hqk"}, "mask": {"mask": "bk"}, "softcap": {"softcap": 5.0},
    "alibi": {"alibi": True}, "dropout": {"dropout_p": 0.2},
}  # fmt: skip
ALL_FEATURES = {
    "window": (30, -1), "mask": "bk", "bias": "hqk", "softcap": 5.0, "alibi": True, "sink": True,
    "dropout_p": 0.2, "stats": True, "heads_q": 4, "heads_k": 2,
}  # fmt: skip


class StubDriver:
    """Says which GPU kernels are compiled for; takes launches, and gives each to `launched`."""

    def __init__(self, architecture: str, launched=None):
        hip = architecture.startswith("gfx")
        name = architecture if hip else int(architecture.removeprefix("sm_"))
        self.target = GPUTarget("hip" if hip else "cuda", name, 64 if hip else 32)
        self.launched = launched
        self.utils = self

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
        return 0


def resources(compiled) -> list:
    """[registers, bytes spilled, shared memory, instructions]"""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spilled = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])
            for name in ("vgpr_count", "vgpr_spill_count")
        )
        spilled *= 4
    else:
        text = compiled.asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [BINARIES / "cuobjdump", "-res-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers, spilled = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    found = [name for name in INSTRUCTIONS if name in text]
    return [registers, spilled, compiled.metadata.shared, " ".join(found)]


def cases():
    """(label, options of random_call, whether CI compiles it) of what is compiled: each row of the
    configuration, and for rows of rich calls the call with all features."""
    shape = {"seqlen_q": 128, "seqlen_k": 128}
    cache = {"seqlen_q": 1, "seqlen_k": 4096, "heads_q": 8, "heads_k": 2, "cache_seqlens": [4096]}
    for width, (name, dtype) in itertools.product(configs.WIDTHS, DTYPES.items()):
        base = {"head_dim": width, "dtype": dtype}
        label = f"{width} {name}"
        usual = name == "bf16" and width in (64, 128)
        yield f"{label} causal", base | shape | {"causal": True}, usual
        yield f"{label} paged", base | cache | {"page_size": 16}, usual
        rich = base | shape | ALL_FEATURES
        if width < 64 or name == "fp16" or (name == "fp32" and width > 64):
            continue  # the tiles of width 64, of bfloat16
        yield f"{label} all", rich | {"causal": True}, usual and width == 64
        if name == "fp32":
            continue
        yield f"{label} deterministic", rich | {"deterministic": True}, False
        yield f"{label} cache all", base | ALL_FEATURES | cache, False
        yield f"{label} varlen", base | {"seqlens_q": [128], "causal": True}, usual and width == 64
        if width == 64:
            for feature, option in ONE_FEATURE.items():
                yield f"{label} {feature}", base | shape | option | {"causal": True}, False


def compile_all(architecture: str, everything: bool, only: str = "") -> dict[str, list]:
    """Kernel and case -> resources, for each kernel that the calls launch."""
    table = {}
    triton.runtime.driver.set_active(StubDriver(architecture))
    launch.architecture = lambda x: architecture
    launch.multiprocessors = lambda x: 132
    replay.usable = lambda x: False  # nothing is launched

    for label, options, usual in cases():
        case = label.split(" ", 2)[2]

        def run(kernel, programs, tile, *args, label=label, case=case):
            short = kernel.fn.__name__.removesuffix("_kernel")
            name = f"{short} {label}"
            if not re.search(only, name) or case in TWICE.get(short, ()):
                return
            compiled = kernel.warmup(*args, grid=(programs,), **launch.options(tile))
            table[name] = resources(compiled)
            if os.environ.get("SHOW"):
                print(name, tuple(tile), table[name], file=sys.stderr, flush=True)
            tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
            assert tensor_memory <= 512, f"{name}: {tensor_memory} columns of tensor memory"

        if not (usual or everything) or not any(re.search(only, f"{k} {label}") for k in KERNELS):
            continue
        launch.run = run
        call = random_call(**options)
        out, lse, *_ = launch.forward(call)
        if call.seqlens_k is None:
            needs = (True, True, True, call.bias is not None, call.sink is not None)
            launch.backward(call, out, out, lse, lse, needs)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", nargs="?", choices=configs.SHARED_LIMIT)
    parser.add_argument("--all", action="store_true", help="not only what CI compiles")
    parser.add_argument("--only", default="", help="kernels and cases that match this expression")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.architecture:
        print(json.dumps(compile_all(args.architecture, args.all, args.only)))
        return

    def in_a_process(architecture):  # Triton remembers its target
        command = [sys.executable, __file__, architecture, "--all", "--only", args.only]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout)

    with ThreadPoolExecutor(2) as pool:
        write(
            dict(
                zip(configs.SHARED_LIMIT, pool.map(in_a_process, configs.SHARED_LIMIT), strict=True)
            )
        )


def write(found: dict[str, dict]) -> None:
    """Put rows into the table; rows of the same version of Triton that are not found stay."""
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        table = {}
    table = {"triton": triton.__version__} | {
        architecture: table.get(architecture, {}) | rows for architecture, rows in found.items()
    }
    text = json.dumps(table, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\"[^\"]*\")\s+\]", r"[\1, \2, \3, \4]", text)
    TABLE.write_text(text + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    main()
