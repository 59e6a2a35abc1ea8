"""Holds a wheel to what it promises: one file for every torch of its Python.

    python tests/package/check_wheel.py dist/attn_ext-0.1.0-cp311-cp311-linux_x86_64.whl

Its extensions may need the C and C++ run-time libraries and nothing of torch, it has all modules
and no tests, and attention works from it in a process that sees the wheel and torch alone.
"""

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

RUN_TIME = {"libc", "libm", "libgcc_s", "libstdc++", "libpthread", "libdl", "librt", "libSystem",
            "libc++", "ld-linux-x86-64", "ld-linux-aarch64"}  # fmt: skip
CODE = """
import torch, attn_ext
assert {where!r} in attn_ext.__file__, attn_ext.__file__
q = torch.randn(1, 2, 5, 8, requires_grad=True)
out = attn_ext.attention(q, q, q, causal=True, backend="cpu")
want = torch.nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
torch.testing.assert_close(out, want)
out.sum().backward()
print("attn_ext", attn_ext.__version__, "from the wheel, with torch", torch.__version__)
"""


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def needed_libraries(extension: Path) -> set[str]:
    """The shared libraries that an extension names, without versions: {"libc", "libm"}."""
    if sys.platform == "darwin":
        lines = _output("otool", "-L", str(extension)).splitlines()[1:]
        paths = {line.split()[0] for line in lines} - {str(extension)}
    else:
        paths = re.findall(r"NEEDED.*\[(.*)\]", _output("readelf", "-d", str(extension)))
    return {Path(path).name.split(".so")[0].split(".")[0] for path in paths}


def symbols_of_torch(extension: Path) -> list[str]:
    """Undefined symbols that only libtorch or libtorch_python could give."""
    options = ["-u"] if sys.platform == "darwin" else ["-D", "--undefined-only"]
    lines = _output("nm", *options, str(extension)).splitlines()
    return [line for line in lines if re.search(r"_ZN?K?(2at|3c10|5torch)|\bTHP", line)]


def newest_glibc(extension: Path) -> tuple[int, int]:
    """The glibc that an extension asks for: what names the manylinux tag that it could carry."""
    found = re.findall(r"GLIBC_(\d+)\.(\d+)", _output("readelf", "-V", str(extension)))
    return max((int(major), int(minor)) for major, minor in found)


def check_extension(extension: Path) -> None:
    """AssertionError where an extension depends on torch or on a library that is not everywhere."""
    foreign = needed_libraries(extension) - RUN_TIME
    assert not foreign, f"{extension.name} needs {sorted(foreign)}"
    symbols = symbols_of_torch(extension)
    assert not symbols, f"{extension.name} takes from torch: {symbols[:3]}"


def check_contents(names: list[str]) -> None:
    """AssertionError where a wheel lacks a module or has what only the tests need."""
    for module in ("__init__.py", "py.typed", "cli/main.py", "triton_kernels/__init__.py"):
        assert f"attn_ext/{module}" in names, f"the wheel lacks attn_ext/{module}"
    for source in ("params.h", "cuda/ptx.cuh", "cuda/sm80/forward.cuh", "cuda/sm90/forward.cuh"):
        assert f"attn_ext/csrc/{source}" in names, f"NVRTC would miss attn_ext/csrc/{source}"
    compiled = {"csrc", "csrc/cuda", "csrc/cuda/sm80", "csrc/cuda/sm90"}  # by NVRTC
    sources = {str(Path(name).parent)[9:] for name in names if name.startswith("attn_ext/csrc/")}
    assert sources == compiled, f"the wheel has sources that nothing reads: {sources - compiled}"
    assert not any(name.endswith((".cpp", ".cu")) for name in names), "C++ is for sdists"
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"attn_ext"}, f"the wheel installs {sorted(tops)}"
    assert not any("_emulated" in name for name in names), "the emulator is for tests only"


def main(wheel: Path) -> None:
    """Check one wheel; prints what it needs."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
            check_contents(archive.namelist())
        extensions = sorted(Path(folder).glob("attn_ext/_*.so"))
        assert any(e.name.startswith("_C.") for e in extensions), "the wheel has no attn_ext._C"
        for extension in extensions:
            check_extension(extension)
            print(extension.name, "needs", *sorted(needed_libraries(extension)))
            if sys.platform == "linux":
                print("  and glibc {}.{} or newer".format(*newest_glibc(extension)))
        site = Path(torch.__file__).parent.parent
        env = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{site}"}
        code = CODE.format(where=folder)
        subprocess.run([sys.executable, "-S", "-c", code], check=True, env=env, cwd=folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
