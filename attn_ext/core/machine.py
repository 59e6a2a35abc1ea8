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
    """Where what was measured here is kept: the folder of ATTN_EXT_CACHE_DIR, else attn_ext in that
    of XDG_CACHE_HOME or in ~/.cache."""
    if own := os.environ.get("ATTN_EXT_CACHE_DIR"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attn_ext"
