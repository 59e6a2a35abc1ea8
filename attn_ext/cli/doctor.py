"""attn-ext doctor: versions, CPU, GPUs, compilers, backends and peers of this machine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

import attn_ext
from attn_ext.backends import tuned
from attn_ext.backends.jit import first_use
from attn_ext.backends.jit.cache import Cache
from attn_ext.backends.jit.nvrtc import find
from attn_ext.core.machine import cpu_model
from attn_ext.measure.peers import available_bytes

PACKAGES = (
    "torch", "triton", "numpy", "flash-attn", "xformers", "onnxruntime", "onnx", "openvino",
    "transformers", "diffusers", "timm", "matplotlib", "rich", "typer",
)  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails"""
    if shutil.which(command[0]) is None:
        return None
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None


def _first(text: str | None) -> str | None:
    return text.splitlines()[0] if text else None


def caches() -> dict[str, str]:
    """Level and kind -> size of the first core's caches"""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = (
                (index / name).read_text().strip() for name in ("level", "type", "size")
            )
        except OSError:
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{suffix}"] = size
    return found


def cpu() -> dict:
    """Model, cores, memory, caches and instruction sets"""
    found = {
        "model": cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_available_gib": round(available_bytes("cpu") / 2**30, 1),
        "caches": caches(),
        "isa": None,
        "isas": [],
        "bf16_dot": None,
    }
    try:
        from attn_ext import _C
    except ImportError:
        return found
    found["isas"] = _C.supported_isas()
    try:
        found["isa"] = _C.isa()
        found["bf16_dot"] = _C.ceilings("bf16", "", 1, 0.001) > 0
    except ValueError as error:  # ATTN_EXT_ISA asks for one that the machine lacks
        found["isa"] = str(error)
    return found


def gpus() -> list[dict]:
    """Name, architecture and memory of each CUDA device"""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": p.name,
                "arch": f"sm_{p.major}{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
                "processors": p.multi_processor_count,
            }
        )
    return found


def compilers() -> dict:
    """First line of each compiler's and the driver's version; None where there is none"""
    nvcc = _output("nvcc", "--version")
    release = re.search(r"release [\d.]+, V[\d.]+", nvcc or "")
    return {
        "c++": _first(_output(os.environ.get("CXX", "c++"), "--version")),
        "nvcc": release[0] if release else _first(nvcc),
        "driver": _first(
            _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        ),
    }


def advice(name: str, why: str) -> str:
    """What to do about a backend that does not work"""
    if not why:
        return ""
    if name in ("cuda", "triton") and not torch.cuda.is_available():
        return "nothing to do on a machine without a GPU: the cpu backend serves it"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "pip install triton"
    if name == "cuda":
        return "see docs/guide/install.md: NVRTC comes with torch's CUDA wheels"
    if name == "cpu":
        return "pip install -e . in the source tree builds attn_ext._C"
    return ""


def tables() -> dict[str, str]:
    """What `attn-ext tune` measured on each device, and how long ago"""
    devices = [("cpu", 0), *(("cuda", i) for i in range(torch.cuda.device_count()))]
    return {f"{kind}:{i}" if kind == "cuda" else kind: tuned.state(kind, i) for kind, i in devices}


def compiled() -> str:
    """Where NVRTC is, and what it has compiled and is kept"""
    nvrtc, folder = find(), first_use.folder()
    version = "not found" if nvrtc is None else "{}.{}".format(*nvrtc.version)
    if folder is None:
        return f"NVRTC {version}; no folder to keep kernels in"
    count, size = Cache(folder).size()
    return f"NVRTC {version}; {count} kernels kept, {size / 2**20:.1f} MiB in {folder}"


def gather() -> dict:
    """All that the command prints"""
    states = attn_ext.backends()
    return {
        "attn_ext": attn_ext.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "gpus": gpus(),
        "compilers": compilers(),
        "packages": {name: _version(name) for name in PACKAGES},
        "torch_cuda": torch.version.cuda,
        "environment": {k: v for k, v in os.environ.items() if k.startswith("ATTN_EXT_")},
        "tuned": tables(),
        "cuda_kernels": compiled(),
        "backends": [
            {"name": n, "works": not why, "reason": why, "advice": advice(n, why)}
            for n, why in states.items()
        ],
    }


def run(as_json: bool) -> int:
    """Print; 0 when a backend other than the reference works"""
    found = gather()
    works = any(b["works"] and b["name"] != "reference" for b in found["backends"])
    if as_json:
        print(json.dumps(found, indent=1))
        return 0 if works else 1
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    c = found["cpu"]
    console.print(f"[bold]attn_ext {found['attn_ext']}[/], Python {found['python']}, "
                  f"{found['platform']}")  # fmt: skip
    console.print(f"CPU      {c['model']}, {c['cores']} cores, {c['threads']} threads, "
                  f"{c['memory_available_gib']} GiB free")  # fmt: skip
    dot = ", bfloat16 dot products" if c["bf16_dot"] else ""
    console.print(f"         instruction set {c['isa']} of {', '.join(c['isas']) or 'none'}{dot}")
    console.print(f"         caches {', '.join(f'{k} {v}' for k, v in c['caches'].items())}")
    for gpu in found["gpus"]:
        console.print(f"GPU      {gpu['name']}, {gpu['arch']}, {gpu['memory_gib']} GiB, "
                      f"{gpu['processors']} processors")  # fmt: skip
    if not found["gpus"]:
        console.print("GPU      none that torch sees")
    for name, version in found["compilers"].items():
        console.print(f"{name:<8} {version or 'not found'}")
    have = [f"{n} {v}" for n, v in found["packages"].items() if v]
    lack = [n for n, v in found["packages"].items() if not v]
    console.print(f"packages {', '.join(have)}", soft_wrap=True)
    console.print(f"         not installed: {', '.join(lack) or 'none'}", soft_wrap=True)
    for name, value in found["environment"].items():
        console.print(f"{name}={value}")
    for name, state in found["tuned"].items():
        console.print(f"tuned    {name}: {state}", soft_wrap=True)
    console.print(f"CUDA     {found['cuda_kernels']}", soft_wrap=True)
    table = Table("backend", "works", "why not", "what to do", title="Backends, as auto tries them")
    for b in found["backends"]:
        table.add_row(b["name"], "yes" if b["works"] else "no", b["reason"], b["advice"])
    console.print(table)
    return 0 if works else 1
