"""NVIDIA's driver without a GPU: attn_ext._C.cuda on libcuda.cpp of this folder, which runs
compiled PTX on the emulated machine.  Tensors are those of the CPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import re
import threading
from pathlib import Path

import emulator_build
import seen
from ptx import build

from attn_ext import _emulated
from attn_ext._C import cuda as _cuda
from attn_ext.backends import cuda, native_gpu
from attn_ext.backends.jit import first_use
from attn_ext.backends.jit.nvrtc import Binary

SOURCE = Path(__file__).parent / "libcuda.cpp"
FLAGS = ["-O1", "-std=c++17", "-fPIC", "-shared", "-fvisibility=hidden", "-fno-strict-aliasing",
         "-DATTN_EMULATED", "-DATTN_COMPILED_PTX"]  # fmt: skip


class Resolved(ctypes.Structure):
    """As in libcuda.cpp."""

    _fields_ = (
        ("symbol", ctypes.c_char * 512),
        ("body", ctypes.c_void_p),
        ("params_bytes", ctypes.c_int),
        ("most_threads", ctypes.c_int),
    )


RESOLVER = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(Resolved))


@functools.cache
def library() -> Path:
    """libcuda.cpp, compiled; kept by a digest of what it is made of."""
    files = [SOURCE, *seen.included(build.SOURCES / "emulation/machine.h")]
    files.append(build.SOURCES / "cuda/driver_api.h")
    text = b"".join(path.read_bytes() for path in sorted(files))
    name = hashlib.sha256(text + Path(_emulated.__file__).read_bytes()).hexdigest()
    path = build.FOLDER / f"libcuda-{name[:16]}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = path.with_suffix(f".{threading.get_native_id()}")
        emulator_build.compiler(
            *FLAGS, f"-I{build.SOURCES}", SOURCE, _emulated.__file__, "-o", made
        )
        made.rename(path)
    return path


def elf_bytes(address: int) -> bytes:
    """The ELF file at an address, whose length its header says: the table of sections is last."""
    head = ctypes.string_at(address, 64)
    if head[:4] != b"\x7fELF":
        return b""
    table, size, count = (
        int.from_bytes(head[at : at + n], "little") for at, n in ((40, 8), (58, 2), (60, 2))
    )
    programs, program_size, programs_count = (
        int.from_bytes(head[at : at + n], "little") for at, n in ((32, 8), (54, 2), (56, 2))
    )
    return ctypes.string_at(
        address, max(table + size * count, programs + program_size * programs_count)
    )


def elf_of(text: str) -> bytes:
    """An ELF file of nothing but a header and a text."""
    body = text.encode()
    tables = (64 + len(body)).to_bytes(8, "little")  # of programs, without entries: at the end
    return b"\x7fELF" + bytes(28) + tables + bytes(24) + body


class Fake:
    """The driver with devices of these compute capabilities, and what was compiled.  runs: False
    where nothing is compiled or computed, and launches are held to the driver's rules alone, but
    for a kernel's own limit of threads.  shipped: compiled by what attn_ext itself uses."""

    def __init__(
        self, capabilities=(80,), init: int = 0, version: int = 13000, runs=True, shipped=False
    ):
        self.runs, self.shipped, self.version = runs, shipped, version
        self.compiled: list[tuple[str, int]] = []
        self._binaries: dict[bytes, Binary] = {}
        self._resolver = RESOLVER(self._resolve)  # kept: libcuda.cpp holds its address
        self.lib = ctypes.CDLL(str(library()))
        self.lib.fake_stream.restype = ctypes.c_void_p
        for name in ("fake_capture", "fake_captured"):
            getattr(self.lib, name).argtypes = [ctypes.c_void_p, ctypes.c_int][
                : 1 + (name[-1] == "e")
            ]
        numbers = (ctypes.c_int * len(capabilities))(*capabilities)
        self.lib.fake_reset(len(capabilities), numbers, self._resolver, init, version)
        _cuda.open_driver(str(library()))
        _cuda.set_compile(cuda.image if shipped else self._compile)

    def _compile(self, expression: str, capability: int) -> tuple[str, bytes]:
        arch = first_use.OWN.get(capability, str(capability))
        self.compiled.append((expression, capability))
        if not self.runs:
            return expression, elf_of(expression)
        found = build.compiled(build.sources.kernel(expression, arch))
        self._binaries[hashlib.sha256(found.cubin).digest()] = found
        return found.name, found.cubin

    def _resolve(self, image: int, out) -> int:
        cubin = elf_bytes(image)
        if not self.runs:
            out[0].symbol, out[0].most_threads = cubin[64:], 1024
            return len(cubin) > 64
        found = self._binaries.get(hashlib.sha256(cubin).digest())
        if self.shipped:
            known = first_use.default(self.version // 1000).known()
            found = next((each for each in known if each.cubin == cubin), None)
        if found is None:
            return 0
        text = found.ptx.decode()
        (kernel,) = build.ptx.kernels(text)
        out[0].symbol = found.name.encode()
        out[0].body = build.address(text, found.name, found.name)
        out[0].params_bytes = kernel.parameter_bytes
        out[0].most_threads = int(re.search(r"\.maxntid (\d+)", text)[1])
        return 1

    def calls(self, name: str) -> int:
        """How often a function of the driver was called."""
        return self.lib.fake_calls(name.encode())


class Kernels(native_gpu.Kernels):
    """The backend's kernels on one device and stream of the fake driver."""

    def __init__(self, device: int = 0, stream: int = 0):
        super().__init__(_cuda, "cpu")
        self.device, self.stream = device, stream

    def _target(self, device):
        _, _, multiprocessors, hopper = super()._target(device)
        return self.device, self.stream, multiprocessors, hopper

    available = staticmethod(lambda: "")
    unsupported = staticmethod(native_gpu.unsupported)


@contextlib.contextmanager
def driver(*capabilities, **options):
    """A Fake for a while; afterwards this machine's own driver, if there is one."""
    try:
        yield Fake(capabilities or (80,), **options)
    finally:
        _cuda.open_driver("libcuda.so.1")
        _cuda.set_compile(cuda.image)
