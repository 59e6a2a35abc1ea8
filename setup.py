"""Builds the extensions of attn_ext with ninja: sources in parallel, only what changed.  No torch.

attn_ext._C         csrc/cpu: always
attn_ext._cuda      csrc/cuda by nvcc: where nvcc and a GPU are found, or ATTN_EXT_CUDA=1
attn_ext._emulated  csrc/cuda as C++ on csrc/emulation, for tests only: ATTN_EXT_EMULATED=1

Environment: CXX (default c++), ATTN_EXT_CXXFLAGS (appended: sanitizers, -O0), NVCC (default nvcc),
ATTN_EXT_CUDA (0: never, 1: always), ATTN_EXT_CUDA_ARCHS (default 80,90a).
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
FLAGS = "-std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Wextra -Wno-psabi -ffp-contract=fast"
# The kernels say themselves what is inlined and unrolled, so that -O3 only makes copies: these
# flags of it matter; the kernels' loops are the same instructions, built in half of the time.
KERNEL_FLAGS = "-O2 -ftree-vectorize -fvect-cost-model=dynamic -fpeel-loops"
BINDING_FLAGS = "-O1"  # csrc/*.cpp: pybind11's templates; the calls are as fast as at -O3
# -O2: the emulator's own loops are vector types.  GPU code reads 16 bytes through typed pointers.
EMULATED_FLAGS = (
    "-O2 -std=c++17 -fPIC -pthread -fvisibility=hidden -Wall -Wextra -Wno-psabi "
    "-Wno-unknown-pragmas -fno-strict-aliasing -DATTN_EMULATED -DATTN_HAS_SM90"
)
# -lineinfo: profilers and compute-sanitizer name source lines; it changes no instruction.
NVCC_FLAGS = (
    "-O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden,-Wall -Xfatbin=-compress-all"
)
# Hopper's own instructions are in no other architecture, and not in plain sm_90.
SM90_GENCODE = "-gencode arch=compute_90a,code=sm_90a"
CUDA_ARCHS = os.environ.get("ATTN_EXT_CUDA_ARCHS", "80,90a").replace(" ", "")
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
    return relative(
        [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))]
    )


def cuda_sources() -> list[str]:
    """The files of attn_ext._cuda that are not generated."""
    cuda = ROOT / "csrc" / "cuda"
    return relative(sorted([*cuda.rglob("*.cpp"), *cuda.rglob("*.cu")]))


def emulated_sources() -> list[str]:
    """The files of attn_ext._emulated: the emulator, and csrc/cuda compiled as C++."""
    emulation = ROOT / "csrc" / "emulation"
    files = [*emulation.glob("*.cpp"), *emulation.glob("ptx/*.cpp")]
    return relative(sorted(files)) + cuda_sources()


def instantiation(arch: str, element: str, head_dim: int) -> str:
    """The file that instantiates the kernels of one (dtype, head_dim) pair of csrc/cuda/<arch>."""
    arguments = "const Params&, void*" if arch == "sm90" else "Params, bool, void*"
    runs = "".join(
        f"template void {run}<{element}, {head_dim}>({arguments});\n"
        for run in ("run_forward", "run_backward")
    )
    name = f"namespace attn::cuda::{arch}"
    return f'#include "cuda/{arch}/kernels.cuh"\n\n{name} {{\n{runs}}}  // {name}\n'


def instantiations(folder: Path, sm90: bool) -> list[str]:
    """Writes the kernels' instantiations, a file a (dtype, head_dim) pair; their paths.  sm90: also
    those for sm_90a."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [("sm80", e, d) for e in ELEMENTS for d in head_dims("sm80")]
    if sm90:
        files += [("sm90", e, d) for e in ("bf16", "fp16") for d in head_dims("sm90")]
    paths = []
    for arch, name, head_dim in files:
        path = folder / (
            f"sm90_{name}_{head_dim}.cu" if arch == "sm90" else f"{name}_{head_dim}.cu"
        )
        text = instantiation(arch, ELEMENTS[name], head_dim)
        if not path.exists() or path.read_text() != text:  # ninja goes by the file's time
            path.write_text(text)
        paths.append(str(path))
    return paths


def nvcc() -> str | None:
    """The CUDA compiler, or None."""
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


def wants_cuda() -> bool:
    """ATTN_EXT_CUDA decides; where it is not set, the kernels are built for a GPU of this machine.

    Compiling them takes minutes, which who has no GPU should not pay.
    """
    asked = os.environ.get("ATTN_EXT_CUDA", "")
    if asked in ("", "auto"):
        return nvcc() is not None and any(Path("/dev").glob("nvidia[0-9]*"))
    if asked == "0":
        return False
    if asked != "1":
        raise SystemExit(f"ATTN_EXT_CUDA must be 0, 1 or auto, got {asked!r}")
    if nvcc() is None:
        raise SystemExit("ATTN_EXT_CUDA=1 needs nvcc on PATH, in NVCC or in /usr/local/cuda/bin")
    return True


def gencode() -> str:
    """nvcc's architecture flags.  The oldest plain one goes in as PTX too, for GPUs to come."""
    archs = [a for a in CUDA_ARCHS.split(",") if a]
    plain = [a for a in archs if a.isdigit()]
    if not archs or any(not a.rstrip("af").isdigit() or int(a.rstrip("af")) < 80 for a in archs):
        raise SystemExit(
            f"ATTN_EXT_CUDA_ARCHS must be like 80,90a and from 80 on, got {CUDA_ARCHS!r}"
        )
    flags = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    if plain:
        oldest = min(plain, key=int)
        flags.append(f"-gencode arch=compute_{oldest},code=compute_{oldest}")
    return " ".join(flags)


def ninja_rules(name: str, sources: list[str], objects: Path, target: Path) -> str:
    """The text of build.ninja for one shared library made of the sources."""
    import pybind11

    cxx = compiler()
    extra = os.environ.get("ATTN_EXT_CXXFLAGS", "")
    cuda, emulated = name == "attn_ext._cuda", name == "attn_ext._emulated"
    sm90 = emulated or "90a" in CUDA_ARCHS.split(",")
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
    includes = " ".join(f"-I{shlex.quote(str(i))}" for i in includes)
    flags = f"{EMULATED_FLAGS if emulated else FLAGS} {includes}"
    # Python's own symbols come from the process that loads the module: macOS wants to be told
    linked = "-shared -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"
    lines = [
        f"rule cxx\n  command = {cxx} -MMD -MF $out.d {flags} $opt {extra} -x c++ -c $in -o $out",
        "  depfile = $out.d\n  deps = gcc\n  description = c++ $in",
        f"rule link\n  command = {cxx} {linked} -pthread {extra} $in -o $out",
    ]
    if cuda:
        device = f"{NVCC_FLAGS} {includes} -DATTN_EXT_CUDA_ARCHS='\"{CUDA_ARCHS}\"'"
        device += " -DATTN_HAS_SM90" if sm90 else ""
        for rule, flags in (("nvcc", gencode()), ("nvcc_sm90", SM90_GENCODE)):
            lines += [
                f"rule {rule}\n  command = {nvcc()} -MD -MF $out.d {device} {flags} -Xptxas -v"
                " -c $in -o $out > $out.log 2>&1 || (cat $out.log; exit 1)",
                "  depfile = $out.d\n  deps = gcc\n  description = nvcc $in",
            ]
        lines += [
            # cudart static: the module imports on a machine without a driver or a toolkit
            f"rule nvlink\n  command = {nvcc()} -shared -cudart static {gencode()} $in -o $out",
        ]
    if cuda or emulated:
        sources = [*sources, *instantiations(objects / "instantiations", sm90)]
    outputs = []
    for source in sources:
        label = "instantiation_" + Path(source).name if Path(source).is_absolute() else source
        output = objects / (label.replace(os.sep, "_") + ".o")
        outputs.append(str(output))
        rule = "nvcc" if cuda and source.endswith(".cu") else "cxx"
        if rule == "nvcc" and Path(source).name.startswith("sm90_"):
            rule = "nvcc_sm90"
        lines.append(f"build {output}: {rule} {ROOT / source}")
        if name == "attn_ext._C":
            binding = Path(source).parent.name == "csrc"
            lines.append(f"  opt = {BINDING_FLAGS if binding else kernel_flags()}")
    lines.append(f"build {target}: {'nvlink' if cuda else 'link'} {' '.join(outputs)}")
    return "\n".join(lines) + "\n"


def compiler() -> str:
    """The C++ compiler, perhaps with a wrapper or options before it: `ccache g++`."""
    return os.environ.get("CXX", "").strip() or "c++"


def kernel_flags() -> str:
    """KERNEL_FLAGS for g++; clang, which has no such flags, inlines and unrolls at -O3."""
    version = subprocess.run(
        [*shlex.split(compiler()), "--version"], capture_output=True, text=True
    )
    return "-O3" if "clang" in version.stdout else KERNEL_FLAGS


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
if wants_cuda():
    extensions.append(Extension("attn_ext._cuda", cuda_sources()))
if os.environ.get("ATTN_EXT_EMULATED", "0") not in ("", "0"):
    extensions.append(Extension("attn_ext._emulated", emulated_sources()))
setup(
    ext_modules=extensions,
    cmdclass={"build_ext": NinjaBuild},
)
