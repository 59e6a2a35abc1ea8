"""Planted bugs in what the kernel for few queries does on wide registers alone,
tests/mutants/cpu/groups: in eight rows of Q that are multiplied side by side, in two streams of
keys, and in the step from the rows of a chunk to those of the next.  Each must make the cases of
csrc/tests/decode_groups.cpp wrong that its first line names.

A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import platform

import planted_cpu
import pytest
from repository import ROOT

SOURCE = ROOT / "csrc/tests/decode_groups.cpp"
PLANTED = planted_cpu.Planted("cpu/groups", SOURCE, __file__, planted_cpu.wrong_in_program(SOURCE))
pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="its intrinsics stand in for AVX-512 by AVX2"
)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(9)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """Cases that a row of another head or a lost key passes, or which are wrong without a bug."""
    PLANTED.check(name, tmp_path)
