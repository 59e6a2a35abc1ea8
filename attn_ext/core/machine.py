"""The machine that this process runs on, as far as several parts of the package ask."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """The CPU's name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cache_folder() -> Path:
    """Where what was measured here is kept: ATTN_EXT_CACHE, else ~/.cache/attn_ext."""
    return Path(os.environ.get("ATTN_EXT_CACHE") or Path.home() / ".cache" / "attn_ext")
