"""Planted bugs in the backward in one kernel, tests/mutants/triton/fused: each must make the calls
wrong that its first line names.
"""

from pathlib import Path

import nonfinite_cases
import patches
import planted_triton
import pytest
import torch
from fused_calls import FUSED, PAIR, AllAtOnce, case, launched
from repository import ROOT

from attn_ext.core.schema import Needs
from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels.launch import backward

MUTANTS = {
    p.name.split("/")[1]: p
    for p in map(patches.read, sorted(ROOT.glob("tests/mutants/triton/fused/*.patch")))
}


def wrong(run=backward.backward) -> set[str]:
    """The calls whose gradients are wrong, or come of the wrong kernel."""
    found = set()
    checks = {name: case(name) for name in ("plain", "causal", "batch", "group", "packed")}
    checks["excluded"] = random_call(7, batch=1, seqlen_q=34, mask="bk", dtype=torch.float16)
    nonfinite_cases.masked_key(checks["excluded"], torch.nan)
    for name, call in checks.items():
        try:
            check_call(call, AllAtOnce(None if name == "excluded" else 3.0, run))
        except AssertionError:
            found.add(name)
    fixed = case("plain")._replace(deterministic=True)
    if launched(fixed, Needs(True, True, True), run) != PAIR:
        found.add("deterministic")
    return found


def plant(patch, monkeypatch, folder):
    """`backward` with a bug in its kernels or in what launches them."""
    ((file, text),) = patches.apply(patch, ROOT).items()
    if file.endswith("launch/backward.py"):
        return planted_triton.loaded(text, folder).backward
    # each after those whose functions it takes
    order = ("delta", "dkdv", "dq", "fused")
    for each in planted_triton.with_others(Path(file).stem, text, order, monkeypatch, folder):
        for name in ("delta_kernel", *FUSED[1:]):
            if hasattr(each, name):
                monkeypatch.setattr(backward, name, getattr(each, name))
    return backward.backward


def test_the_kernels_as_they_are():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == set()
    assert len(MUTANTS) >= 7


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, monkeypatch, tmp_path):
    """A check that a lost term passes."""
    assert wrong(plant(MUTANTS[name], monkeypatch, tmp_path)) == set(MUTANTS[name].caught)
