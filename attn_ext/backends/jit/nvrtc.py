"""NVRTC, NVIDIA's run-time compiler, through ctypes: where it is, and one kernel at a time.

The library comes with torch's CUDA wheels (nvidia-cuda-nvrtc, nvidia-cuda-nvrtc-cu12), with those
packages alone, or with a toolkit.  It needs no GPU.
"""

from __future__ import annotations

import array
import ctypes
import functools
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# The newest first.  Of each: the folder within the package `nvidia`, the name of the library.
WHEELS = (("cu13/lib", "libnvrtc.so.13"), ("cuda_nvrtc/lib", "libnvrtc.so.12"))
TOOLKITS = ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")
NOP = 0x918  # the opcode in the low 12 bits of an instruction
NO_CACHE = (12, 9)  # from this version on there is a cache of NVRTC's own, which asks the driver


class CompileError(RuntimeError):
    """A kernel does not compile, or the library cannot be used."""


class Binary(NamedTuple):
    """A compiled kernel: `name` is its symbol, `cubin` machine code, `ptx` what that was made of,
    `log` what the assembler says of its resources."""

    name: str
    ptx: bytes
    cubin: bytes
    log: str

    @property
    def instructions(self) -> int:
        """Of the machine code, without the NOPs that pad its end."""
        return instructions(self.cubin)

    @property
    def serialized(self) -> str:
        """What ptxas says where it makes the products of wgmma wait for one another, else ""."""
        return "; ".join(line.strip() for line in self.log.splitlines() if SERIALIZED.search(line))

    @property
    def resources(self) -> Resources:
        """Read from the log."""
        found = RESOURCES.search(self.log)
        if found is None:
            raise CompileError(f"the assembler does not say what {self.name} takes:\n{self.log}")
        stores, loads, registers = (int(each) for each in found.groups())
        return Resources(registers, stores + loads)


class Resources(NamedTuple):
    """Of a thread: registers, and bytes of spill stores and loads in the code."""

    registers: int
    spilled_bytes: int


SERIALIZED = re.compile(r"\bC75\d\d\b")  # the numbers of these warnings
RESOURCES = re.compile(
    r"(\d+) bytes spill stores, (\d+) bytes spill loads\s.*?Used (\d+) registers", re.S
)


def instructions(cubin: bytes) -> int:
    """Counted in the ELF file's sections of code: 16 bytes each, from sm_70 on."""
    sections, size, count = (
        int.from_bytes(cubin[at : at + n], "little") for at, n in ((40, 8), (58, 2), (60, 2))
    )
    total = 0
    for index in range(count):
        header = cubin[sections + index * size :][:size]
        executable = int.from_bytes(header[8:16], "little") & 4  # SHF_EXECINSTR
        if executable:
            begin, length = (int.from_bytes(header[at : at + 8], "little") for at in (24, 32))
            words = array.array("H", cubin[begin : begin + length])[::8]  # the first of each
            if sys.byteorder == "big":
                words.byteswap()
            total += sum(word & 0xFFF != NOP for word in words)
    return total


def candidates() -> Iterator[Path]:
    """Where NVRTC may be: ATTN_EXT_NVRTC, the wheels, CUDA_HOME and the usual place of toolkits."""
    named = os.environ.get("ATTN_EXT_NVRTC")
    if named:
        yield Path(named)
        return
    package = importlib.util.find_spec("nvidia")
    roots = package.submodule_search_locations if package else None
    for folder, library in WHEELS:
        for root in roots or ():
            yield Path(root) / folder / library
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        for folder in TOOLKITS:
            for _, library in WHEELS:
                yield Path(home) / folder / library


@functools.cache
def find(driver: int | None = None) -> Nvrtc | None:
    """The first library that is there and loads; None where there is none.  driver: the newest
    major version of CUDA whose machine code is wanted; one that is newer is the second choice."""
    newer = None
    for path in candidates():
        if path.is_file():
            try:
                found = Nvrtc(path)
            except (OSError, CompileError):  # not for this machine, or broken
                continue
            if driver is None or found.version[0] <= driver:
                return found
            newer = newer or found
    return newer


class Nvrtc:
    """One loaded library.  Calls release the interpreter's lock and may come from any thread."""

    def __init__(self, path: Path):
        self.path = path
        for builtins in sorted(path.parent.glob("libnvrtc-builtins.so.*")):
            # By its name alone, which is how NVRTC asks for it, it would not be found there.
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(str(path))
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)

    def _call(self, function: str, *arguments) -> None:
        code = getattr(self._library, f"nvrtc{function}")(*arguments)
        if code:
            text = self._library.nvrtcGetErrorString(code).decode()
            raise CompileError(f"nvrtc{function} of {self.path.name}: {text}")

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, buffer)
        return buffer.raw

    def architectures(self) -> tuple[int, ...]:
        """Of which it makes machine code: 80 for sm_80."""
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", found)
        return tuple(found)

    def compile(
        self, text: str, expression: str, options: Sequence[str], headers: Mapping[str, str]
    ) -> Binary:
        """The kernel that `expression` names in C++ ("attn::cuda::sm80::combine<float>").
        headers: texts of what is included by these names, beside the folders of the options."""
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
        texts = (ctypes.c_char_p * len(headers))(*(each.encode() for each in headers.values()))
        self._call(
            "CreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu",
            len(headers), texts, names,
        )  # fmt: skip
        try:
            return self._compile(program, expression, options)
        finally:
            self._call("DestroyProgram", ctypes.byref(program))

    def _compile(self, program: ctypes.c_void_p, expression: str, options: Sequence[str]) -> Binary:
        self._call("AddNameExpression", program, expression.encode())
        options = [*options, "--ptxas-options=-v"]
        if self.version >= NO_CACHE:
            options.append("--no-cache")
        given = (ctypes.c_char_p * len(options))(*(each.encode() for each in options))
        try:
            self._call("CompileProgram", program, len(options), given)
        except CompileError as error:
            log = self._log(program)
            raise CompileError(
                f"{expression} does not compile ({error}); please report this as a fault of "
                f"attn_ext, with what NVRTC {self.version[0]}.{self.version[1]} says:\n{log}"
            ) from None
        name = ctypes.c_char_p()
        self._call("GetLoweredName", program, expression.encode(), ctypes.byref(name))
        assert name.value is not None
        ptx = self._bytes(program, "PTX").rstrip(b"\0")
        cubin = self._bytes(program, "CUBIN")
        return Binary(name.value.decode(), ptx, cubin, self._log(program))

    def _log(self, program: ctypes.c_void_p) -> str:
        return self._bytes(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
