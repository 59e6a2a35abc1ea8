"""Planted bugs in the C++ kernels of second derivatives, tests/mutants/cpu/second: each must make
the results wrong that its first line names, of short rows (one block of keys) or long ones.

The kernels are compiled alone, on the plainest vectors, and run in place of those of attn_ext._C.
A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import functools

import patches
import planted_cpu
import pytest
import seen
import torch
from repository import ROOT
from second_calls import FEATURES, combination
from second_checks import by_passes, by_reference, seeds_of

from attn_ext import _C
from attn_ext.backends import cpu_second
from attn_ext.testing import allowed_error, to_float64

MUTANTS = planted_cpu.bugs("cpu/second")
SOURCE = ROOT / "csrc/tests/second_passes.cpp"
TABLE, CLEAN = "planted_bugs_cpu_second", "no bug"
DUE = seen.sample([*MUTANTS, CLEAN], 1)
SIZES = {"short": {}, "long": {"seqlen_q": 20, "seqlen_k": 210, "batch": 1}}
CHOSEN = tuple(name != "window" for name in FEATURES)  # which would leave no long rows


@functools.cache
def truths(size: str) -> tuple:
    """A call with every feature, and how far each result may be from the truth."""
    call = combination(CHOSEN, torch.float32, **SIZES[size])
    seeds = seeds_of(call)
    exact, naive = by_reference(to_float64(call), seeds.double()), by_reference(call, seeds)
    return call, seeds, exact, naive


def wrong() -> tuple[str, ...]:
    """The kinds of results that are wrong, with the size of the call: short_tangent."""
    found = []
    for size in SIZES:
        call, seeds, exact, naive = truths(size)
        got = by_passes(call, seeds, cpu_second)
        for name, x in exact.items():
            error = (got[name].double() - x).abs().max()
            if not error <= allowed_error(x.detach(), naive[name].detach(), "out", torch.float32):
                found.append(f"{size}_{name.split()[0]}")
    return tuple(sorted(set(found)))


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernels with a bug."""
    names = ("planted_tangent", "planted_backward_tangent")
    try:
        _C.plant(*planted_cpu.addresses(folder, SOURCE, names, patch))
        return wrong()
    finally:
        _C.plant()


def digest(patch=None) -> str:
    """Of all that decides what is wrong."""
    return planted_cpu.digest(SOURCE, __file__, patch)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    for patch in MUTANTS.values():
        assert patches.apply(patch, ROOT), patch.name
    assert len(MUTANTS) >= 8
    assert not seen.strangers(TABLE, [*MUTANTS, CLEAN])


def test_the_kernels_as_they_are(tmp_path):
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == ()
    if not seen.known(TABLE, CLEAN, digest(), DUE):
        assert wrong_with(tmp_path) == ()
        seen.passed(TABLE, CLEAN, digest())


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a lost term passes."""
    patch = MUTANTS[name]
    if seen.known(TABLE, name, digest(patch), DUE):
        return
    assert wrong_with(tmp_path, patch) == tuple(sorted(patch.caught))
    seen.passed(TABLE, name, digest(patch))
