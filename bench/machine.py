"""What every result file says first: device, versions, command."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

import attn_ext
from attn_ext import _C

RESULTS = Path(__file__).parent / "results"


def describe() -> dict:
    """CPU model, threads, versions and the command that runs"""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = names[0].split(":", 1)[1].strip() if names else model
    return {
        "cpu": model,
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "attn_ext": attn_ext.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "command": "python " + " ".join([f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }
