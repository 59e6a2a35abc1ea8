"""Intel AMX on any machine with AVX512_BF16: csrc/tests/amx_unit.cpp, compiled and installed.

Where the processor has AMX itself, its own unit runs and nothing is checked but results.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path

from attn_ext import _C

ROOT = Path(__file__).resolve().parents[2]
ISA = "avx512_amx"
CXX = os.environ.get("CXX", "c++")


def missing() -> str:
    """Why the kernels for AMX cannot be tested here, "" if they can."""
    if ISA in _C.supported_isas():
        return ""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "AMX needs x86-64 and Linux"
    if "avx512_bf16" not in _C.supported_isas():
        return "the kernels for AMX need AVX512_BF16 besides, which this machine lacks"
    if shutil.which(CXX) is None:
        return f"the emulator of AMX needs a C++ compiler, and there is no {CXX}"
    return ""


def compile_cpp(source: str, output: Path, *flags: str) -> Path:
    """`source`, relative to the root, compiled with the flags of the build under test."""
    extra = os.environ.get("ATTN_EXT_CXXFLAGS", "").split()  # sanitizers
    command = [CXX, "-std=c++17", "-O3", "-Wall", "-Wextra", "-Wno-psabi", "-pthread", "-fPIC"]
    command += [f"-I{ROOT / 'csrc'}", *extra, *flags, str(ROOT / source), "-o", str(output)]
    subprocess.run(command, check=True)
    return output


class Unit:
    """The emulator's library; `installed` it serves the instructions of this process."""

    def __init__(self, folder: Path):
        self.library = ctypes.CDLL(
            str(compile_cpp("csrc/tests/amx_unit.cpp", folder / "amx_unit.so", "-shared"))
        )
        self.library.amx_error.restype = ctypes.c_char_p
        self.library.amx_configured.restype = ctypes.c_int64
        self.library.amx_products.restype = ctypes.c_int64

    def __enter__(self):
        assert self.library.amx_install() == 0
        _C.emulate_amx(True)
        self.error()
        return self

    def __exit__(self, *_):
        _C.set_isa("")
        _C.emulate_amx(False)
        assert self.library.amx_remove() == 0

    def error(self) -> str:
        """The first misuse of the unit since the last call, "" for none."""
        return self.library.amx_error().decode()

    def configured(self) -> int:
        """Threads that hold tiles."""
        return self.library.amx_configured()

    def products(self) -> int:
        """tdpbf16ps so far."""
        return self.library.amx_products()
