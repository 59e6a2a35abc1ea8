"""Builds attn_ext._C (csrc/) with ninja: sources in parallel, only what changed.  Needs no torch.

Environment: CXX (default c++), ATTN_EXT_CXXFLAGS (appended: sanitizers, -O0).
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


def sources() -> list[str]:
    """The C++ files of the extension, relative to the root."""
    files = [ROOT / "csrc" / "bindings.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    return [str(f.relative_to(ROOT)) for f in files]


def ninja_rules(objects: Path, target: Path) -> str:
    """The text of build.ninja for one shared library made of all sources."""
    import pybind11

    cxx = os.environ.get("CXX", "c++")
    extra = os.environ.get("ATTN_EXT_CXXFLAGS", "")
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    flags = " ".join([FLAGS, *(f"-I{shlex.quote(str(i))}" for i in includes), extra])
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {flags} -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
        f"rule link\n  command = {cxx} -shared -pthread {extra} $in -o $out",
    ]
    outputs = []
    for source in sources():
        output = objects / (Path(source).name + ".o")
        outputs.append(str(output))
        lines.append(f"build {output}: cxx {ROOT / source}")
    lines.append(f"build {target}: link {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


class NinjaBuild(build_ext):
    """Hands the one extension to ninja."""

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        objects = Path(self.build_temp).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_rules(objects, target))
        import ninja

        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects)])


setup(
    ext_modules=[Extension("attn_ext._C", sources())],
    cmdclass={"build_ext": NinjaBuild},
)
