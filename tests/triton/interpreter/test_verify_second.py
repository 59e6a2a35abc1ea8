"""What `attn-ext verify` says of Triton's second derivatives, here in the interpreter."""

import types

import pytest

from attn_ext.cli import matrix
from attn_ext.cli.conform import run_check
from attn_ext.cli.matrix import Check
from attn_ext.cli.second import Second
from attn_ext.core.schema import BOTTOM_RIGHT

ALL = {"mask": True, "bias": "hk", "softcap": 5.0, "sink": True, "dropout_p": 0.2, "heads_k": 1,
       "seqlen_q": 9, "seqlen_k": 11, "head_dim": 8, "batch": 1, "causal": True,
       "align": BOTTOM_RIGHT}  # fmt: skip
RESULTS = {"tangent out", "tangent lse", *(f"moved {x}" for x in ("q", "k", "v", "bias", "sink"))}


def outcome(check, dtype="fp32", subject=None):
    (found,) = run_check(check, dtype, [subject or Second("cpu")])
    return found


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_that_are_right_pass(dtype):
    """A result that is not compared, or compared with something else."""
    found = outcome(Check("all", "second", ALL), dtype)
    assert found.state == "pass", found.reason
    assert {m.name for m in found.measures} == RESULTS


def test_kernels_that_are_wrong_fail():
    """A result that may be anything."""
    subject, check = Second("cpu"), Check("all", "second", ALL)
    right, found = subject._passes, {}

    def passes(call, seeds):
        found.update(found or right(call, seeds))  # the kernels run once
        return {**found, wrong: found[wrong] * 1.01}

    subject._passes = passes
    for wrong in sorted(RESULTS):
        seen = outcome(check, subject=subject)
        assert seen.state == "fail" and seen.reason.startswith(f"{wrong}: "), wrong
        assert ";" not in seen.reason


def test_what_the_kernels_leave_counts_for_nothing():
    """A check that passes although no kernel ran."""
    checks = {check.name: check for check in matrix.selected(False, None)}
    nan = checks["masked keys hold NaN and inf"]
    assert outcome(nan).state == "n/a"
    assert outcome(checks["the cache beyond its length is NaN"]).state == "n/a"
    for kind in ("repeat", "stream", "large"):
        assert outcome(Check("all", "second", ALL, kind=kind)).state == "n/a"
    long = Check("long", "second", {**ALL, "seqlen_q": 600, "seqlen_k": 600, "mask": False})
    assert outcome(long).state == "n/a"


def test_it_is_put_to_the_test_beside_triton(monkeypatch):
    """A family that no run of `attn-ext verify` looks at, and that therefore never serves."""
    from attn_ext.cli import subjects

    real = subjects.registry.get
    works = types.SimpleNamespace(available=lambda: "")
    monkeypatch.setattr(subjects.registry, "get", lambda n: works if n == "triton" else real(n))
    for devices, expected in ((["cuda", "cpu"], 1), (["cpu"], 0)):
        found = [s for s in subjects.ours(None, devices) if isinstance(s, Second)]
        assert len(found) == expected and all(s.device == "cuda" for s in found)
