"""Planted bugs in the formulas of second derivatives, tests/mutants/second: each must make the
results wrong that its first line names."""

import sys
import types

import patches
import pytest
import torch
from closeness import SECOND, is_close
from repository import ROOT
from second_checks import by_passes, by_reference, seeds_of

from attn_ext.backends import blocked
from attn_ext.testing import random_call

MUTANTS = {
    p.name.split("/")[1]: p
    for p in map(patches.read, sorted(ROOT.glob("tests/mutants/second/*.patch")))
}
CALL = random_call(
    3, heads_q=2, heads_k=1, seqlen_q=5, seqlen_k=6, head_dim=4, dtype=torch.float64, softcap=1.5,
    sink=True, bias="hqk", dropout_p=0.2,
)  # fmt: skip


def wrong(module) -> set[str]:
    """The kinds of results that are wrong: second, moved (the tangents of the gradients), tangent;
    and whether a gradient is."""
    seeds = seeds_of(CALL)
    want, got = by_reference(CALL, seeds), by_passes(CALL, seeds, module)
    return {name.split()[0] for name, x in want.items() if not is_close(got[name], x, SECOND)}


def test_the_formulas_as_they_are():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong(blocked) == set()


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, monkeypatch):
    """A check that a lost term passes."""
    ((file, text),) = patches.apply(MUTANTS[name], ROOT).items()
    module = types.ModuleType("planted")
    monkeypatch.setitem(sys.modules, "planted", module)  # where dataclasses look for it
    exec(compile(text, file, "exec", dont_inherit=True), vars(module))
    assert wrong(module) == set(MUTANTS[name].caught)
