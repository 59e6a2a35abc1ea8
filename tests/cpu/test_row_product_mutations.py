"""Planted bugs in rows that leave products as rows of storage, tests/mutants/cpu/rows: in the
products that give O and dQ by rows, and dK and dV at a block's last panel, in the choice of such
rows and panels, in the edge of a band, and in the bases of a first tile.  Each must make the cases
of csrc/tests/row_products.cpp wrong that its first line names.

A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import planted_cpu
import pytest
from repository import ROOT

SOURCE = ROOT / "csrc/tests/row_products.cpp"
PLANTED = planted_cpu.Planted("cpu/rows", SOURCE, __file__, planted_cpu.wrong_in_program(SOURCE))


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(18)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """Cases that a lost key or a doubled row passes, or which are wrong without a bug."""
    PLANTED.check(name, tmp_path)
