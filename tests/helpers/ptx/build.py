"""Compiled PTX as functions of this process: our kernels by NVRTC, or any PTX text.

What takes long is kept in build/ptx by a digest of all that it is made of: PTX and machine code by
attn_ext.backends.jit, libraries here.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import emulator_build
import seen
from repository import ROOT

import ptx
from attn_ext import _emulated
from attn_ext.backends import jit
from attn_ext.backends.jit import cache, sources

FOLDER = ROOT / "build" / "ptx"
SOURCES = ROOT / "csrc"
HEADER = "emulation/ptx/operations.h"
FLAGS = ["-std=c++17", "-fPIC", "-shared", "-w", "-Wno-psabi", "-ffp-contract=off",
         "-fno-strict-aliasing", "-fstack-clash-protection", "-fvisibility=hidden",
         "-DATTN_EMULATED", "-DATTN_COMPILED_PTX"]  # fmt: skip
# Whether this run of pytest has compiled PTX in place of all kernels (tests/conftest.py).
STANDING = os.environ.get("ATTN_EXT_EMULATED_RUNS") == "ptx" or None
MOST_REGISTERS = 192 << 10  # bytes that stay on a thread's stack, of 256 KiB, at -O0
ARCHITECTURES = {"sm80": "80", "sm90": "90a"}


def level(text: str) -> str:
    """How a PTX text is compiled: -O0, half of the time of -O1, where its kernels run once or twice
    and their registers fit the stack; -O1 where all calls run on compiled PTX, ours or Triton's."""
    sizes = {"pred": 1, "b16": 2, "b64": 8, "f64": 8}
    declared = re.findall(r"\.reg \.(\w+)\s+%\w+<(\d+)>", text)
    fit = sum(int(count) * sizes.get(kind, 4) for kind, count in declared) <= MOST_REGISTERS
    return "-O0" if fit and not os.environ.get("ATTN_EXT_EMULATED_RUNS") else "-O1"


@functools.cache
def flags(how: str) -> list[str]:
    """With fused multiply-add in one instruction where the machine has it.  ATTN_EXT_PTX_CXXFLAGS
    adds some."""
    info = Path("/proc/cpuinfo")
    fused = info.exists() and re.search(r"^flags\b.*\bfma\b", info.read_text(), re.M)
    more = os.environ.get("ATTN_EXT_PTX_CXXFLAGS", "").split()
    return [how, *FLAGS, *(["-mfma"] if fused else []), *more]


@functools.cache
def nvrtc() -> jit.Nvrtc | None:
    """The compiler of our kernels, None where it is not installed."""
    return jit.find()


@functools.cache
def symbols() -> dict[int, str]:
    """offset -> symbol of the functions in attn_ext._emulated."""
    command = ["nm", "--defined-only", _emulated.__file__]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    fields = [line.split() for line in lines]
    return {int(at, 16): name for at, kind, name in fields if kind in "tTwW"}


@functools.cache
def expression(symbol: str) -> str:
    """A kernel as C++ names it: attn::cuda::sm80::combine<float>."""
    name = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.sub(r"^void |\([^()]*\)\s*$", "", name.strip())


def made(path: Path, compile) -> Path:
    """A file, by compile(where) unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # a folder of its own: several processes may compile the same text at once
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            new = Path(folder) / path.name
            compile(new)
            new.rename(path)
    return path


@functools.cache
def _header_key(how: str) -> str:
    """The digest of operations.h and of how it is compiled."""
    facts = [flags(how), emulator_build.compiler_version()]
    return seen.digest(seen.included(SOURCES / HEADER), *facts)


def _header_folder(how: str) -> Path:
    """Where g++ finds operations.h compiled already: to parse it takes longer than a small
    kernel."""

    def compile(where: Path) -> None:
        source = ["-x", "c++-header", SOURCES / HEADER]
        emulator_build.compiler(*flags(how), f"-I{SOURCES}", *source, "-o", where)

    folder = FOLDER / "headers" / _header_key(how)
    made(folder / f"{HEADER}.gch", compile)
    return folder


def library(text: str, name: str) -> Path:
    """The shared library of the kernels in a PTX text; `name` is how messages call the text."""
    code = ptx.HEAD + "".join(ptx.translate(each, name) for each in ptx.kernels(text))
    how = level(text)
    key = seen.digest([], code, _header_key(how), _emulated.__file__)

    def compile(where: Path) -> None:
        unit = where.with_suffix(".cpp")
        unit.write_text(code)
        includes = [f"-I{_header_folder(how)}", f"-I{SOURCES}"]
        emulator_build.compiler(*flags(how), *includes, unit, _emulated.__file__, "-o", where)

    return made(FOLDER / "libraries" / f"{key}.so", compile)


@functools.cache
def address(text: str, symbol: str, name: str) -> int:
    """Of the function that a kernel of a PTX text has become."""
    loaded = ctypes.CDLL(str(library(text, name)))
    return ctypes.cast(getattr(loaded, symbol), ctypes.c_void_p).value


def compiled(kernel: sources.Kernel, root: Path = SOURCES) -> jit.Binary:
    """One of our kernels, of the sources in `root`."""
    compiler = nvrtc()
    assert compiler is not None, "nvidia-cuda-nvrtc is not installed"
    return jit.compile_kernel(compiler, kernel, root, cache.Cache(FOLDER / "kernels"))


class Replacement:
    """What runs in place of the kernels of attn_ext._emulated, compiled at their first launch.

    root: the sources; change(ptx text) is what a test makes of the compiler's output; others:
    kernels that are not in csrc/cuda -> their header.
    """

    def __init__(self, root: Path = SOURCES, change=None, others=None):
        self.root, self.change, self.others = root, change, others or {}
        self.used: set[str] = set()  # expressions of what was launched
        self._known: dict[int, int] = {}

    def resolve(self, offset: int) -> int:
        """The address of what runs in place of the kernel at this offset of the library; 0: it."""
        if offset not in self._known:
            self._known[offset] = self._address(symbols()[offset])
        return self._known[offset]

    def _address(self, symbol: str) -> int:
        name = expression(symbol)
        kernel = self._kernel(name)
        if kernel is None:
            return 0
        self.used.add(name)
        found = compiled(kernel, self.root)
        assert found.name == symbol, f"{name} is {found.name} to NVRTC, {symbol} to the emulator"
        text = found.ptx.decode()
        text = self.change(text) if self.change else text
        return address(text, symbol, f"{name}.ptx".replace("attn::", "").replace('"', ""))

    def _kernel(self, name: str) -> sources.Kernel | None:
        for stem, (header, architecture) in self.others.items():
            if name.startswith(stem):
                return sources.Kernel(name, architecture, header)
        match = sources.EXPRESSION.match(name)
        return match and sources.kernel(name, ARCHITECTURES[match[1]])

    @contextlib.contextmanager
    def active(self) -> Iterator[Replacement]:
        """Launches on the emulator run compiled PTX."""
        _emulated.replace_kernels(self.resolve)
        try:
            yield self
        finally:
            _emulated.replace_kernels(STANDING and Replacement().resolve)
