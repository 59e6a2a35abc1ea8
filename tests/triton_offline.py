"""Compiles the Triton kernels for a GPU that is not there and prints what they take, as JSON.

    python tests/triton_offline.py sm_90 > resources.json
    python tests/triton_offline.py --write  # all, into tests/triton_resources.json

A stub in place of Triton's driver says which GPU is meant; the launch code runs as it is, on CPU
tensors, with `warmup` (compile) in place of the launch.  A row is [registers, bytes spilled per
thread, shared memory in bytes, instructions of matrix products].
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
import triton.backends.nvidia
from attn_ext.triton_kernels import configs, launch
from triton.backends.compiler import GPUTarget

from attn_ext.testing import random_call

TABLE = Path(__file__).with_name("triton_resources.json")
BINARIES = Path(triton.backends.nvidia.__file__).parent / "bin"
PRODUCTS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")
ALL_FEATURES = {
    "window": (30, -1), "mask": "bk", "bias": "hqk", "softcap": 5.0, "alibi": True, "sink": True,
    "dropout_p": 0.2, "stats": True, "heads_q": 4, "heads_k": 2,
}  # fmt: skip


class StubDriver:
    """Says which GPU kernels are compiled for."""

    def __init__(self, architecture: str):
        hip = architecture.startswith("gfx")
        name = architecture if hip else int(architecture.removeprefix("sm_"))
        self.target = GPUTarget("hip" if hip else "cuda", name, 64 if hip else 32)

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
    found = [name for name in PRODUCTS if name in text]
    return [registers, spilled, compiled.metadata.shared, " ".join(found)]


def calls():
    """(name, call) of what is compiled."""
    for width in (64, 128):
        shape = {"seqlen_q": 128, "seqlen_k": 128, "head_dim": width, "dtype": torch.bfloat16}
        yield f"{width}", random_call(causal=True, **shape)
        cache = shape | {"seqlen_q": 1, "seqlen_k": 4096, "heads_q": 8, "heads_k": 2}
        yield f"{width}", random_call(cache_seqlens=[4096], page_size=16, **cache)
    yield "64 all features", random_call(causal=True, **shape | {"head_dim": 64}, **ALL_FEATURES)


def compile_all(architecture: str) -> dict[str, list]:
    """Kernel and width -> resources, for each kernel that the calls launch."""
    table = {}
    triton.runtime.driver.set_active(StubDriver(architecture))
    launch.architecture = lambda x: architecture
    launch.multiprocessors = lambda x: 132

    def run(label, kernel, programs, tile, *args):
        compiled = kernel.warmup(
            *args, grid=(programs,), num_warps=tile.warps, num_stages=tile.stages,
            enable_fp_fusion=True,
        )  # fmt: skip
        name = f"{kernel.fn.__name__.removesuffix('_kernel')} {label}"
        table[name] = resources(compiled)
        tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
        assert tensor_memory <= 512, f"{name}: {tensor_memory} columns of tensor memory"

    for label, call in calls():
        launch.run = functools.partial(run, label)
        out, lse, *_ = launch.forward(call)
        if call.block_table is None:
            needs = (True, True, True, call.bias is not None, call.sink is not None)
            launch.backward(call, out, out, lse, lse, needs)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("architecture", nargs="?", choices=configs.SHARED_LIMIT)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    if args.architecture:
        print(json.dumps(compile_all(args.architecture)))
        return
    table = {"triton": triton.__version__}
    for architecture in configs.SHARED_LIMIT:  # a process each: Triton remembers its target
        command = [sys.executable, __file__, architecture]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        table[architecture] = json.loads(done.stdout)
    text = json.dumps(table, indent=1)
    text = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\"[^\"]*\")\s+\]", r"[\1, \2, \3, \4]", text)
    TABLE.write_text(text + "\n")


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    main()
