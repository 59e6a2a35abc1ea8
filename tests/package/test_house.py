"""The two tiers of tests, and what all test files have in common."""

import re

import pytest
import tiers
from repository import ROOT


@pytest.mark.parametrize("place", tiers.THOROUGH)
def test_what_make_check_leaves_out_exists(place):
    """A test that was renamed and is in `make check` again, unseen."""
    path, _, name = place.partition("::")
    path = ROOT / "tests" / path
    assert path.exists(), path
    assert not name or re.search(rf"^def {name}\(", path.read_text(), re.M), name


def test_the_table_is_read_by_room_file_and_test():
    """A whole room left out by the name of one test, or nothing at all."""
    assert tiers.reason("tests/triton/interpreter/test_decode.py::test_x[a/b::c]")
    assert tiers.reason("tests/cuda/test_nvcc.py::test_hopper_kernels_use_hoppers_instructions[a]")
    assert tiers.reason("torch/test_dtensor.py") and not tiers.reason("torch/test_fast.py")
    assert not tiers.reason("tests/cuda/test_nvcc.py") and not tiers.reason("tests/cuda")
