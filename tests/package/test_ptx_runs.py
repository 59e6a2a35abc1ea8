"""Which tests on compiled PTX count as passed, and are left out of the next run
(tests/helpers/ptx_runs.py)."""

import os
import re
import subprocess
import sys

import ptx_runs
import pytest
import seen
from repository import ROOT

CONFTEST = """
import os
from pathlib import Path
import ptx_runs, seen
seen.TABLES = Path(__file__).parent / "tables"
seen.ROOT = Path(__file__).parent  # of the lock
def pytest_configure(config):
    digest = lambda file, selected: os.environ["DIGEST"] + str(selected)
    ptx_runs.register(config, digest)
"""
CASES = """
import os, pytest
@pytest.mark.parametrize("x", range(4))
def test_good(x): pass
@pytest.mark.parametrize("x", range(4))
def test_bad(x): assert x != 2 or "BAD" not in os.environ
@pytest.mark.skip
def test_skipped(): pass
@pytest.fixture
def ends_badly():
    yield
    assert "BAD" not in os.environ
def test_end(ends_badly): pass
"""


@pytest.fixture
def run(tmp_path):
    """run(*arguments, digest=, what=, bad=, VARIABLE=) -> functions of which a case ran."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_x.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*arguments, digest="1", what="write", bad=False, **more):
        environment = {**os.environ, "DIGEST": digest, "ATTN_EXT_SEEN": what}
        environment |= {"ATTN_EXT_EMULATED_RUNS": "ptx", "BAD": "yes"}
        environment |= {"PYTHONPATH": str(ROOT / "tests/helpers")}
        environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # they take longer than the tests
        for name in ("ATTN_EXT_TEST_AUTO", *ptx_runs.OTHERWISE, *([] if bad else ["BAD"])):
            environment.pop(name, None)
        environment |= more
        command = [sys.executable, "-m", "pytest", "-v", *arguments]
        options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run(command, **options)
        assert done.returncode in (0, 1, 5), done.stdout + done.stderr
        ran = [line for line in done.stdout.splitlines() if re.search("PASSED|FAILED", line)]
        return set(re.findall(r"test_x.py::(test_\w+)", "\n".join(ran)))

    return run


def test_what_passed_is_left_out(run, tmp_path):
    """A function one of whose cases failed or whose end did, or of which nothing ran, that counts
    as passed; one that has passed and runs again, or does not for other kernels."""
    every = {"test_good", "test_bad", "test_end"}
    assert run("test_x.py", bad=True) == every
    lines = (tmp_path / "tables/on_ptx.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in lines] == ["ptx test_x.py::test_good"]
    assert run("test_x.py", what="") == {"test_bad", "test_end"}  # nothing is written
    assert run("test_x.py") == {"test_bad", "test_end"}
    assert run("test_x.py") == set()
    assert run("test_x.py", what="nothing") == every
    assert run("test_x.py", digest="2") == every


def test_random_calls_are_others_each_time(run):
    """`make explore-ptx` that runs nothing, since the fixed calls have passed."""
    assert "test_good" in run("test_x.py")
    assert "test_good" in run("test_x.py", ATTN_EXT_HYPOTHESIS="explore")
    assert "test_good" not in run("test_x.py")


def test_what_workers_see_is_one_run(run):
    """Cases of a function on two workers, of which neither has all."""
    workers = ("-p", "xdist", "-n", "2", "--dist", "loadgroup", "test_x.py")
    assert run(*workers, bad=True) == {"test_good", "test_bad", "test_end"}
    assert run(*workers) == {"test_bad", "test_end"}


def test_a_part_of_a_function_is_not_the_function(run):
    """A case that was asked for alone, by -k or since it failed, and counts for all."""
    assert run("test_x.py::test_good[1]") == {"test_good"}
    assert run("-k", "test_good and 1", "test_x.py") == {"test_good"}
    assert run("test_x.py", bad=True, what="") == {"test_good", "test_bad", "test_end"}
    assert run("--lf", "test_x.py") == {"test_bad", "test_end"}
    assert run("test_x.py") == {"test_good", "test_bad", "test_end"}


def test_the_digest_is_of_the_kernels(monkeypatch):
    """A kernel, a test or an executor of PTX that changes, and for which old lines count."""
    pytest.importorskip("attn_ext._emulated", reason="built by the test install only")
    from ptx import build

    if build.nvrtc() is None:
        pytest.skip("nvidia-cuda-nvrtc is not installed")
    read = []
    monkeypatch.setattr(seen, "digest", lambda files, *facts: read.append((set(files), facts)))
    file = ROOT / "tests/cuda/test_cuda_sm90.py"
    for runs in ("ptx", "triton-ptx"):
        monkeypatch.setattr(ptx_runs, "RUNS", runs)
        ptx_runs.digest.__wrapped__(file, "emulated")
    (cuda, facts), (helpers, _), (triton, _) = read
    names = {path.relative_to(ROOT).as_posix() for path in cuda}
    assert names >= {
        "csrc/cuda/sm90/forward.cuh", "csrc/cuda/sm80/combine.cuh", "csrc/philox.h",
        "csrc/emulation/machine.cpp", "csrc/emulation/ptx/operations.h",
        "tests/helpers/ptx/emit.py", "tests/cuda/test_cuda_sm90.py",
        "attn_ext/backends/jit/sources.py",
    }  # fmt: skip
    assert facts == (build.nvrtc().version, "emulated")
    assert ROOT / "triton_kernels/kernels/fwd.py" in triton
    assert file in helpers
