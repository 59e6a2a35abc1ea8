"""Which Triton kernels are compiled at this commit, and the digest of what decides the rest."""

import functools
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import seen
from repository import ROOT

from attn_ext.triton_kernels import configs

TABLE = "triton"


def families(architecture: str) -> str:
    """The line of the table for the kernels of test_triton_family_compile.py."""
    return f"{architecture}, families"


def second(architecture: str) -> str:
    """The line of the table for the kernels of test_triton_second_compile.py."""
    return f"{architecture}, second derivatives"


SECOND = ("sm_80", "sm_90")  # what those are compiled for
# One at each commit, whatever was seen
NAMES = [*configs.SHARED_LIMIT, *map(families, configs.SHARED_LIMIT), *map(second, SECOND)]
DUE = seen.sample(NAMES, 1)


def digest(test_file: str, *facts) -> str:
    """Of all that decides what Triton makes of the kernels; facts: what it is held against."""
    helpers = ROOT / "tests/helpers"
    tools = [helpers / "triton_offline.py", helpers / "ptx/sums.py", ROOT / "bench/machine_code.py"]
    files = [*ROOT.glob("triton_kernels/**/*.py"), *tools]
    return seen.digest([*files, Path(test_file).resolve()], metadata.version("triton"), *facts)


def executed(test_file: str, *facts) -> str:
    """Of all that decides what Triton's kernels give on the emulated machine."""
    csrc, mine = ROOT / "csrc/emulation", ROOT / "tests/helpers/ptx"
    files = [
        *seen.included(csrc / "ptx/operations.h"),
        *csrc.glob("*.cpp"),
        *csrc.glob("ptx/*.cpp"),
        *mine.glob("*.py"),
        *ROOT.glob("triton_kernels/**/*.py"),
    ]
    return seen.digest([*files, Path(test_file).resolve()], metadata.version("triton"), *facts)


INTERPRETED = "triton_interpreted"  # the table of planted bugs in Triton's interpreter
IMPORT = re.compile(r"^\s*(?:from|import) (\w+)", re.M)


def with_helpers(test_file: Path) -> set[Path]:
    """A test file and the files of tests/helpers that it imports, and these."""
    found, work = set(), [test_file]
    while work:
        file = work.pop()
        if file not in found:
            found.add(file)
            names = {f"{name}.py" for name in IMPORT.findall(file.read_text())}
            work += [path for path in (ROOT / "tests/helpers").iterdir() if path.name in names]
    return found


@functools.cache
def interpreted(test_file: Path) -> str:
    """Of all that decides what Triton's interpreter makes of a test file's calls."""
    files = {*ROOT.glob("triton_kernels/**/*.py"), *with_helpers(test_file)}
    for folder in ("core", "backends", "ops", "functional", "inspect"):
        files |= {*ROOT.glob(f"attn_ext/{folder}/**/*.py")}
    files |= {ROOT / "attn_ext/testing.py", ROOT / "attn_ext/__init__.py"}
    files |= {ROOT / "tests/conftest.py", ROOT / "tests/triton/interpreter/conftest.py"}
    patches = [path.read_text() for path in sorted(ROOT.glob("tests/mutants/triton*/**/*.patch"))]
    return seen.digest(files, *map(metadata.version, ("triton", "numpy", "torch")), patches)


def compiled(script: str, architecture: str, folder: Path) -> dict:
    """The table that `script` prints of what it compiled for an architecture: in a process of its
    own, since Triton remembers its target, with caches in `folder`."""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder),
        "ATTN_EXT_CACHE_DIR": str(folder),
        "PYTHONPATH": str(Path(__file__).parent),
    }
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", script, architecture],
        capture_output=True, text=True, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
