"""What a call's first launch of a kernel asks for: its machine code for a GPU, compiled or from the
cache on disk.
"""

from __future__ import annotations

import collections
import functools
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from attn_ext.backends.jit import compile_kernel, key_of, sources
from attn_ext.backends.jit.cache import Cache
from attn_ext.backends.jit.nvrtc import Binary, CompileError, Nvrtc, find
from attn_ext.core.machine import cache_folder

log = logging.getLogger("attn_ext")
OWN = {90: "90a"}  # architectures whose own instructions need a name of their own
REMEDY = "pip install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12 (CUDA 12)"


class Result(NamedTuple):
    """binary: the kernel; seconds: that it took to get it; cached: nothing was compiled."""

    binary: Binary
    seconds: float
    cached: bool


def folder() -> Path | None:
    """Where kernels are kept on disk; None where there is no such place."""
    try:
        return cache_folder() / "kernels"
    except RuntimeError:  # a user without a home
        return None


def architecture(capability: int, known: Sequence[int]) -> str:
    """What to compile for: "90a" for 9.0.  capability: 10 * major + minor; known: what NVRTC makes
    machine code for.  That of the same major version and an earlier minor one runs, too."""
    able = [each for each in known if each // 10 == capability // 10 and 80 <= each <= capability]
    if not able:
        names = ", ".join(f"{each // 10}.{each % 10}" for each in known if each >= 80)
        raise CompileError(
            f"NVRTC does not compile for compute capability {capability // 10}.{capability % 10}, "
            f"only for {names}; a newer one may"
        )
    return OWN.get(max(able), str(max(able)))


def problem(driver: int, found: Nvrtc | None) -> str:
    """Why what NVRTC makes does not run with a driver for CUDA `driver`, 1000 * major + 10 * minor;
    "" where it does."""
    if found is None:
        return f"NVRTC, the compiler of CUDA kernels, was not found: {REMEDY}"
    if found.version[0] > driver // 1000:
        return (
            f"the driver is for CUDA {driver // 1000}.{driver % 1000 // 10}, and NVRTC "
            f"{found.version[0]}.{found.version[1]} makes code for a newer one: install a newer "
            f"driver, or pip install nvidia-cuda-nvrtc-cu{driver // 1000}"
        )
    return ""


class Compiler:
    """Kernels by one NVRTC; root: the C++ sources; store: the files, or None.  Threads that want
    the same kernel wait for the first of them."""

    def __init__(self, nvrtc: Nvrtc, root: Path, store: Cache | None):
        self.nvrtc, self.root, self.store = nvrtc, root, store
        self._locks: dict[tuple[str, str], threading.Lock] = collections.defaultdict(threading.Lock)
        self._known: dict[tuple[str, str], Binary] = {}

    @functools.cached_property
    def architectures(self) -> tuple[int, ...]:
        """Those that NVRTC knows."""
        return self.nvrtc.architectures()

    def get(self, expression: str, arch: str) -> Result:
        """The kernel that `expression` names for an architecture such as "90a"."""
        begin, key = time.perf_counter(), (expression, arch)
        with self._locks[key]:
            found, cached = self._known.get(key), True
            if found is None:
                found, cached = self._make(sources.kernel(expression, arch))
                self._known[key] = found
        return Result(found, time.perf_counter() - begin, cached)

    def known(self) -> list[Binary]:
        """The kernels that this process has."""
        return list(self._known.values())

    def _make(self, kernel: sources.Kernel) -> tuple[Binary, bool]:
        if self.store is None:
            return compile_kernel(self.nvrtc, kernel, self.root), False
        found = self.store.get(key_of(self.nvrtc, kernel, self.root))
        if found is not None:
            return found, True
        return compile_kernel(self.nvrtc, kernel, self.root, self.store), False


@functools.cache
def default(driver: int | None = None) -> Compiler:
    """That of this process; driver: the major version of CUDA that the driver knows.  CompileError
    where there is no NVRTC."""
    nvrtc = find(driver)
    if nvrtc is None:
        raise CompileError(problem(0, None))
    where = folder()
    return Compiler(nvrtc, sources.root(), None if where is None else Cache(where))


@functools.cache
def _tell() -> None:
    log.info(
        "attn_ext compiles its CUDA kernels when they are used for the first time and keeps them "
        "in %s; `attn-ext compile` does it ahead of time", folder()
    )  # fmt: skip


def image(expression: str, capability: int, driver: int | None = None) -> tuple[str, bytes]:
    """(symbol, machine code) of a kernel for a device."""
    compiler = default(driver)
    arch = architecture(capability, compiler.architectures)
    found = compiler.get(expression, arch)
    if not found.cached:
        _tell()
        told = f"{expression.split('<')[0]}<{sources.flags_of(expression, compiler.root)}>"
        log.info("compiled %s for sm_%s in %.1f s", told, arch, found.seconds)
    return found.binary.name, found.binary.cubin
