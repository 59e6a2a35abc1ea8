"""Builds attn_ext._C (csrc/) with ninja: sources in parallel, only what changed.  Needs no torch.

Environment: CXX (default c++), ATTN_EXT_CXXFLAGS (appended: sanitizers, -O0),
ATTN_EXT_EMULATED=1 (also builds attn_ext._emulated, the CUDA kernels on the CPU: for tests only).
"""

import os
import shlex
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FLAGS = (
    "-O3 -std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Wextra -Wno-psabi -ffp-contract=fast"
)
# -O2: the emulator's own loops are vector types.  GPU code reads 16 bytes through typed pointers.
EMULATED_FLAGS = (
    "-O2 -std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-Wno-unknown-pragmas -fno-strict-aliasing -DATTN_EMULATED"
)


def relative(files) -> list[str]:
    return [str(f.relative_to(ROOT)) for f in files]


def sources() -> list[str]:
    """The C++ files of attn_ext._C, relative to the root."""
    return relative(
        [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    )


def emulated_sources() -> list[str]:
    """The files of attn_ext._emulated: the emulator, and csrc/cuda compiled as C++."""
    emulation, cuda = ROOT / "csrc" / "emulation", ROOT / "csrc" / "cuda"
    files = [*emulation.glob("*.cpp"), *cuda.rglob("*.cpp"), *cuda.rglob("*.cu")]
    return relative(sorted(files))


def ninja_rules(sources: list[str], flags: str, objects: Path, target: Path) -> str:
    """The text of build.ninja for one shared library made of the sources."""
    import pybind11

    cxx = os.environ.get("CXX", "c++")
    extra = os.environ.get("ATTN_EXT_CXXFLAGS", "")
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join([flags, *(f"-I{shlex.quote(str(i))}" for i in includes), extra])
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {flags} -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
        f"rule link\n  command = {cxx} -shared -pthread {extra} $in -o $out",
    ]
    outputs = []
    for source in sources:
        output = objects / (source.replace(os.sep, "_") + ".o")
        outputs.append(str(output))
        lines.append(f"build {output}: cxx {ROOT / source}")
    lines.append(f"build {target}: link {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Hands each extension to ninja."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve() / ext.name
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(
            ninja_rules(
                ext.sources,
                EMULATED_FLAGS if ext.name == "attn_ext._emulated" else FLAGS,
                objects,
                target,
            )
        )
        import ninja

        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects)])


extensions = [Extension("attn_ext._C", sources())]
if os.environ.get("ATTN_EXT_EMULATED", "0") not in ("", "0"):
    extensions.append(Extension("attn_ext._emulated", emulated_sources()))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
