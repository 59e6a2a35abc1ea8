"""Tests that run on compiled PTX in place of the kernels (`make test-ptx`), and which have passed.

They take hours.  A function of tests all of whose cases passed is a line of tests/seen/on_ptx.txt,
with the digest of the kernels, of what compiles and runs them and of its file, and is left out
until one of these changes: a run that was stopped goes on where it was.  What attn_ext itself does
with a call is not in the digest: `make test` shows it.  Runs of other random calls than the fixed
ones, such as `make explore-ptx`, neither believe nor write lines.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from pathlib import Path

import pytest
import seen
from repository import ROOT

TABLE = "on_ptx"
RUNS = os.environ.get("ATTN_EXT_EMULATED_RUNS", "")  # ptx: CUDA's, triton-ptx: Triton's
AUTO = os.environ.get("ATTN_EXT_TEST_AUTO") == "emulated"
# More or other random calls, other modes of the emulator
OTHERWISE = ("ATTN_EXT_HYPOTHESIS", "ATTN_EXT_EXAMPLES", "ATTN_EXT_EMULATOR_MODE", "ATTN_EXT_TIER")


def function(nodeid: str) -> str:
    """The line of a case: its file and function, and how it runs."""
    place = nodeid.split("[")[0].split("@")[0]  # xdist puts @ and the name of a group at the end
    return " ".join([RUNS, *(["auto"] if AUTO else []), place])


@functools.cache
def digest(file: Path, selected: str) -> str:
    """Of all that decides what compiled PTX gives in a file's cases; selected: by pytest's -k."""
    import triton_seen  # and with it attn_ext

    mine = triton_seen.with_helpers(file)
    if RUNS == "triton-ptx":
        return triton_seen.executed(str(file), seen.digest(mine), selected)
    from ptx import build

    csrc, attn_ext = ROOT / "csrc", ROOT / "attn_ext"
    files = {*csrc.glob("emulation/*.cpp"), *csrc.glob("emulation/ptx/*.cpp")}
    for header in [*csrc.glob("cuda/**/*.cuh"), csrc / "emulation/ptx/operations.h"]:
        files |= seen.included(header)
    files |= {attn_ext / "backends/native_gpu.py", *attn_ext.glob("backends/jit/*.py")}
    files |= {*(ROOT / "tests/helpers/ptx").glob("*.py")}
    return seen.digest(files | mine, build.nvrtc().version, selected)


class Runs:
    """A plugin of pytest, here and in each worker of xdist."""

    def __init__(self, config, digest):
        self.digest = digest
        self.selected = config.option.keyword
        # A function of which a part was asked for is not done when that has passed
        options = vars(config.option)
        part = any("::" in each for each in config.args)
        part = part or any(options.get(each) for each in ("lf", "deselect", "markexpr"))
        self.writes = not hasattr(config, "workerinput") and not part
        self.root = config.rootpath
        self.due, self.ended = Counter(), Counter()
        self.passed, self.failed = set(), set()

    def _expect(self, ids):
        self.due = Counter(map(function, ids))

    def _digest(self, line: str) -> str:
        return self.digest(self.root / line.split(" ")[-1].split("::")[0], self.selected)

    def pytest_collection_modifyitems(self, config, items):
        """Leaves out what is known."""
        known = {
            line
            for line in {function(item.nodeid) for item in items}
            if seen.known(TABLE, line, self._digest(line))
        }
        passed = [item for item in items if function(item.nodeid) in known]
        config.hook.pytest_deselected(items=passed)
        items[:] = [item for item in items if function(item.nodeid) not in known]

    def pytest_collection_finish(self, session):
        self._expect(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids):
        """What pytest_collection_finish says, where workers collect."""
        self._expect(ids)

    def pytest_runtest_logreport(self, report):
        """Writes a function down when the last of its cases has ended."""
        line = function(report.nodeid)
        if report.failed:
            self.failed.add(line)
        elif report.passed and report.when == "call":
            self.passed.add(line)
        if report.when == "teardown":
            self.ended[line] += 1
            whole = self.ended[line] == self.due[line] and line in self.passed - self.failed
            if whole and self.writes:
                seen.passed(TABLE, line, self._digest(line))


def register(config, digest=digest) -> None:
    """Where this run of pytest is one on compiled PTX."""
    if RUNS and not any(os.environ.get(name) for name in OTHERWISE):
        config.pluginmanager.register(Runs(config, digest))
