"""The two tiers of tests, and what all test files have in common."""

import ast
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
    assert tiers.reason(
        "tests/cuda/test_machine_code.py::test_hopper_kernels_use_hoppers_instructions[a]"
    )
    assert tiers.reason("torch/test_dtensor.py") and not tiers.reason("torch/test_fast.py")
    assert not tiers.reason("tests/cuda/test_machine_code.py") and not tiers.reason("tests/cuda")


@pytest.mark.xdist_group("one worker")
def test_groups_share_a_worker(request):
    """A pytest in which pytest-xdist finds no groups: each worker computes what one shares."""
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith("@one worker")


def own_tolerances(text: str) -> list[str]:
    """Where a text has a figure of its own for how near is near enough."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg in ("atol", "rtol"):
            found.append(f"line {node.value.lineno}: {node.arg}=")
        if isinstance(node, ast.Attribute) and node.attr in ("allclose", "isclose"):
            found.append(f"line {node.lineno}: {node.attr}")
        if isinstance(node, ast.Dict):
            names = {key.value for key in node.keys if isinstance(key, ast.Constant)}
            found += [f"line {node.lineno}: {name}" for name in names & {"atol", "rtol"}]
        if isinstance(node, ast.Compare) and "abs(" in ast.unparse(node.left):
            ends = [x.value for x in node.comparators if isinstance(x, ast.Constant)]
            small = [x for x in ends if isinstance(x, float) and 0 < x < 1e-2]
            found += [f"line {node.lineno}: < {x}" for x in small]
    return found


TEST_FILES = [p for p in ROOT.glob("tests/**/*.py") if p.parent.name != "helpers"]


def test_no_test_has_a_tolerance_of_its_own():
    """A bound that was widened in one place until it passed: all stand in helpers/closeness.py."""
    found = {str(p.relative_to(ROOT)): own_tolerances(p.read_text()) for p in TEST_FILES}
    assert len(found) > 80 and not {name: lines for name, lines in found.items() if lines}


@pytest.mark.parametrize(
    "bad",
    [
        "torch.testing.assert_close(a, b, atol=1e-3, rtol=0)", "assert torch.allclose(a, b)",
        "tolerance = {'rtol': 1e-3}", "assert (a - b).abs().max() < 1e-4",
        "assert abs(a - b) <= 1e-6",
    ],
)  # fmt: skip
def test_the_lint_of_tolerances_sees(bad):
    """A lint that has gone blind."""
    assert own_tolerances(bad) and not own_tolerances("assert_close(a, b, FLOAT32)\nassert x < 0.3")
