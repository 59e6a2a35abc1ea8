"""Planted bugs in the CPU kernels for few queries, tests/mutants/cpu/few: in the four streams of
keys of the decode kernel, and in the panels that heads of a group share.  Each must make the cases
of csrc/tests/few_queries.cpp wrong that its first line names.

A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import planted_cpu
import pytest
from repository import ROOT

SOURCE = ROOT / "csrc/tests/few_queries.cpp"
PLANTED = planted_cpu.Planted("cpu/few", SOURCE, __file__, planted_cpu.wrong_in_program(SOURCE))


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(8)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """Cases that a lost or doubled key passes, or which are wrong without a bug."""
    PLANTED.check(name, tmp_path)
