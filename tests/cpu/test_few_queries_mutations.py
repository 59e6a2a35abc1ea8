"""Planted bugs in the CPU kernels for few queries, tests/mutants/cpu/few: in the four streams of
keys of the decode kernel, and in the panels that heads of a group share.  Each must make the cases
of csrc/tests/few_queries.cpp wrong that its first line names.

A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import subprocess

import patches
import planted_cpu
import pytest
import seen
from repository import ROOT

MUTANTS = planted_cpu.bugs("cpu/few")
SOURCE = ROOT / "csrc/tests/few_queries.cpp"
TABLE, CLEAN = "planted_bugs_cpu_few", "no bug"
DUE = seen.sample([*MUTANTS, CLEAN], 1)


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """The cases that are wrong, of the kernels with a bug."""
    program = planted_cpu.compiled(folder, SOURCE, patch=patch)
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60)
    return tuple(sorted(done.stdout.split()))


def digest(patch=None) -> str:
    """Of all that decides what is wrong."""
    return planted_cpu.digest(SOURCE, __file__, patch)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    for patch in MUTANTS.values():
        assert patches.apply(patch, ROOT), patch.name
    assert len(MUTANTS) >= 8
    assert not seen.strangers(TABLE, [*MUTANTS, CLEAN])


@pytest.mark.parametrize("name", [CLEAN, *MUTANTS])
def test_planted_bug_is_caught(name, tmp_path):
    """Cases that a lost or doubled key passes, or which are wrong without a bug."""
    patch = MUTANTS.get(name)
    if seen.known(TABLE, name, digest(patch), DUE):
        return
    assert wrong_with(tmp_path, patch) == tuple(sorted(patch.caught if patch else ()))
    seen.passed(TABLE, name, digest(patch))
