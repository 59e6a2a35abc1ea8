"""Planted bugs in the C++ kernels of second derivatives, tests/mutants/cpu/second: each must make
the results wrong that its first line names, of short rows (one block of keys) or long ones.

The kernels are compiled alone, on the plainest vectors, and run in place of those of attn_ext._C.
A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import functools

import planted_cpu
import pytest
import torch
from repository import ROOT
from second_calls import FEATURES, combination
from second_checks import by_passes, by_reference, seeds_of

from attn_ext.backends import cpu_second
from attn_ext.core.schema import Rows, Tangents
from attn_ext.ops import execute
from attn_ext.testing import allowed_error, needs_of, to_float64

SOURCE = ROOT / "csrc/tests/second_passes.cpp"
SIZES = {"short": {}, "long": {"seqlen_q": 20, "seqlen_k": 310, "batch": 1}}
CHOSEN = tuple(name != "window" for name in FEATURES)  # which would leave no long rows


@functools.cache
def truths(size: str) -> tuple:
    """A call with every feature, and how far each result may be from the truth."""
    call = combination(CHOSEN, torch.float32, **SIZES[size])
    seeds = seeds_of(call)
    exact, naive = by_reference(to_float64(call), seeds.double()), by_reference(call, seeds)
    return call, seeds, exact, naive


def of_rows(call, seeds) -> dict:
    """O' and L' as the kernel of T2 finds them, of short rows alone."""
    out, lse = execute.forward(call._replace(grad=False))[:2]
    given = Rows(dout=seeds.dout, dlse=seeds.dlse, out=out, lse=lse)
    tangents, needs = Tangents(**seeds.tangents), needs_of(call)
    found = cpu_second.double_backward(call, tangents, given, needs, True)
    return {} if found is None else {"tangent out": found[0], "tangent lse": found[1]}


def wrong() -> tuple[str, ...]:
    """The kinds of results that are wrong, with the size of the call: short_tangent."""
    found = []
    for size in SIZES:
        call, seeds, exact, naive = truths(size)
        got = [(name.split()[0], name, x) for name, x in by_passes(call, seeds, cpu_second).items()]
        got += [("rows", name, x) for name, x in of_rows(call, seeds).items()]
        for kind, name, x in got:
            allowed = allowed_error(exact[name].detach(), naive[name].detach(), "out", x.dtype)
            if not (x.double() - exact[name]).abs().max() <= allowed:
                found.append(f"{size}_{kind}")
    return tuple(sorted(set(found)))


KERNELS = planted_cpu.wrong_with(
    SOURCE, wrong, tangent="planted_tangent", backward_tangent="planted_backward_tangent"
)
PLANTED = planted_cpu.Planted("cpu/second", SOURCE, __file__, KERNELS)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(8)


def test_the_built_kernels():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == ()


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a lost term passes."""
    PLANTED.check(name, tmp_path)
