"""Builds the extensions of attn_ext with ninja: sources in parallel, only what changed.  No torch.

attn_ext._C         csrc/cpu, and the launches of csrc/cuda by NVIDIA's driver, if there is one: its
                    kernels are compiled at first use (attn_ext/backends/jit)
attn_ext._emulated  csrc/cuda as C++ on csrc/emulation, for tests only: ATTN_EXT_EMULATED=1

Environment: CXX (default c++), ATTN_EXT_CXXFLAGS (appended: sanitizers, -O0).
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
FLAGS = "-std=c++17 -fPIC -pthread -fvisibility=hidden -Wno-psabi -ffp-contract=fast"
WARNINGS = "-Wall -Wextra"  # for who develops; those that look at the flow of values take time
# The kernels say themselves what is inlined and unrolled, so that -O3 only makes copies: these
# flags of it matter; the kernels' loops are the same instructions, built in half of the time.
KERNEL_FLAGS = "-O2 -ftree-vectorize -fvect-cost-model=dynamic -fpeel-loops"
BINDING_FLAGS = "-O1"  # all other C++: pybind11's templates; the calls are as fast as at -O3
# g++ alone: it looks for unused memory only once a file takes 512 MiB.  The same code, sooner.
MEMORY_FLAGS = "--param ggc-min-expand=200 --param ggc-min-heapsize=524288"
# -O2: the emulator's own loops are vector types.  GPU code reads 16 bytes through typed pointers.
EMULATED_FLAGS = (
    "-O2 -std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-Wno-unknown-pragmas -fno-strict-aliasing -DATTN_EMULATED"
)
# The kernels of one element type and head_dim are one file, generated beside the objects.
ELEMENTS = {"bf16": "attn::ptx::bf16", "fp16": "attn::ptx::fp16", "fp32": "float"}


def head_dims(arch: str) -> list[int]:
    """The head dimensions that kernels of sm80 or sm90 are compiled for."""
    text = (ROOT / "csrc" / "cuda" / "head_dims.h").read_text()
    found = re.search(rf"#define ATTN_{arch.upper()}_HEAD_DIMS\(X\)(.*)", text)
    return [int(d) for d in re.findall(r"X\((\d+)\)", found[1])]


def relative(files) -> list[str]:
    return [str(f.relative_to(ROOT)) for f in files]


def sources() -> list[str]:
    """The C++ files of attn_ext._C, relative to the root."""
    csrc = ROOT / "csrc"
    own = relative([*sorted(csrc.glob("*.cpp")), *sorted((csrc / "cpu").rglob("*.cpp"))])
    return own + cuda_sources()


def cuda_sources() -> list[str]:
    """The C++ files that launch the kernels of csrc/cuda."""
    return relative(sorted((ROOT / "csrc" / "cuda").glob("*.cpp")))


def emulated_sources() -> list[str]:
    """The files of attn_ext._emulated: the emulator in the driver's place."""
    emulation = ROOT / "csrc" / "emulation"
    files = [*emulation.glob("*.cpp"), *emulation.glob("ptx/*.cpp")]
    return relative(sorted(files)) + [s for s in cuda_sources() if "/driver" not in s]


def instantiation(arch: str, element: str, head_dim: int) -> str:
    """The file that enlists the kernels of one (dtype, head_dim) pair of csrc/cuda/<arch>."""
    lists = [
        ("each_forward", f"{element}, {head_dim}"),
        ("each_backward", f"{element}, {head_dim}"),
    ]
    if arch == "sm80" and head_dim == head_dims(arch)[0]:
        lists.append(("each_other", element))
    calls = ", ".join(
        f"attn::cuda::{arch}::{name}<{arguments}>(attn::emulation::Enlist())"
        for name, arguments in lists
    )
    return (
        f'#include "cuda/{arch}/kernels.cuh"\n#include "emulation/kernels.h"\n\n'
        f"[[maybe_unused]] static const bool enlisted = ({calls}, true);\n"
    )


def instantiations(folder: Path) -> list[str]:
    """Writes the kernels' instantiations, a file a (dtype, head_dim) pair; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [("sm80", e, d) for e in ELEMENTS for d in head_dims("sm80")]
    files += [("sm90", e, d) for e in ("bf16", "fp16") for d in head_dims("sm90")]
    paths = []
    for arch, name, head_dim in files:
        path = folder / (
            f"sm90_{name}_{head_dim}.cpp" if arch == "sm90" else f"{name}_{head_dim}.cpp"
        )
        text = instantiation(arch, ELEMENTS[name], head_dim)
        if not path.exists() or path.read_text() != text:  # ninja goes by the file's time
            path.write_text(text)
        paths.append(str(path))
    return paths


def ninja_rules(name: str, sources: list[str], objects: Path, target: Path) -> str:
    """The text of build.ninja for one shared library made of the sources."""
    import pybind11

    cxx = compiler()
    extra = os.environ.get("ATTN_EXT_CXXFLAGS", "")
    emulated = name == "attn_ext._emulated"
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    includes = " ".join(f"-I{shlex.quote(str(i))}" for i in includes)
    clang = is_clang()
    common = FLAGS + (f" {WARNINGS}" if developed() else "") + ("" if clang else f" {MEMORY_FLAGS}")
    flags = f"{EMULATED_FLAGS if emulated else common} {includes}"
    # Python's own symbols come from the process that loads the module: macOS wants to be told
    linked = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    libraries = "" if sys.platform == "darwin" else "-ldl"  # dlopen, in older C libraries
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {flags} $opt {extra} -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
        f"rule link\n  command = {cxx} {linked} -pthread {extra} $in {libraries} -o $out",
    ]
    if emulated:
        sources = [*sources, *instantiations(objects / "instantiations")]
    outputs = []
    for source in sources:
        label = "instantiation_" + Path(source).name if Path(source).is_absolute() else source
        output = objects / (label.replace(os.sep, "_") + ".o")
        outputs.append(str(output))
        lines.append(f"build {output}: cxx {ROOT / source}")
        if not emulated:
            kernels = Path(source).parts[:2] == ("csrc", "cpu")
            optimized = "-O3" if clang else KERNEL_FLAGS  # clang inlines and unrolls at -O3 only
            lines.append(f"  opt = {optimized if kernels else BINDING_FLAGS}")
    lines.append(f"build {target}: link {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


def compiler() -> str:
    """The C++ compiler, perhaps with a wrapper or options before it: `ccache g++`."""
    return os.environ.get("CXX", "").strip() or "c++"


def is_clang() -> bool:
    """Whether the compiler is clang, which has no KERNEL_FLAGS and no MEMORY_FLAGS."""
    version = subprocess.run(
        [*shlex.split(compiler()), "--version"], capture_output=True, text=True
    )
    return "clang" in version.stdout


def developed() -> bool:
    """Whether this is the build of a developer, with the emulator for tests."""
    return os.environ.get("ATTN_EXT_EMULATED", "0") not in ("", "0")


def check_tools() -> None:
    """SystemExit, with what to install, where the compiler or Python's headers are missing."""
    cxx = compiler()
    if shutil.which(shlex.split(cxx)[0]) is None:
        raise SystemExit(
            f"attn_ext needs a C++17 compiler, but CXX={cxx!r} is not on PATH: install g++ "
            "(`apt install g++`, `dnf install gcc-c++`) or clang, or name one in CXX"
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise SystemExit(
            f"attn_ext needs Python's headers, but there is no {header}: "
            "`apt install python3-dev` or `dnf install python3-devel`"
        )


class NinjaBuild(build_ext):
    """Hands each extension to ninja."""

    def build_extension(self, ext):
        check_tools()
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # Not in build_temp, which is new at each `pip install`: ninja compiles again what changed.
        objects = ROOT / "build" / f"objects-{sys.implementation.cache_tag}" / ext.name
        target.parent.mkdir(parents=True, exist_ok=True)
        objects.mkdir(parents=True, exist_ok=True)
        (objects / "build.ninja").write_text(ninja_rules(ext.name, ext.sources, objects, target))
        import ninja

        subprocess.check_call([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(objects)])


extensions = [Extension("attn_ext._C", sources())]
if developed():
    extensions.append(Extension("attn_ext._emulated", emulated_sources()))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
