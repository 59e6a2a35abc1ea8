"""Planted bugs in what the C++ kernels of second derivatives do with rows whose LSE is far from 0,
in the folder tests/mutants/cpu/far_second: each must make the results wrong of the calls that its
first line names.

The kernels are compiled alone, on the plainest vectors, and run in place of those of attn_ext._C.
A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import functools

import planted_cpu
import pytest
from far_calls import far_call
from repository import ROOT
from second_checks import by_passes, check_dtype

from attn_ext.backends import cpu_second
from attn_ext.testing import random_call

SOURCE = ROOT / "csrc/tests/second_passes.cpp"
by_kernels = functools.partial(by_passes, module=cpu_second)


def calls() -> dict:
    """Rows of a far bias, all keys in one block and in several, and beside a far sink; logits of
    1e10, of products alone."""
    sizes = {"seqlen_q": 20, "seqlen_k": 34}
    found = {
        "short": far_call(-1e9, **sizes),
        "long": far_call(-1e9, **{**sizes, "seqlen_k": 300}),
        "sink": far_call(-1e9, sink=True, **sizes),
        "long_sink": far_call(-1e9, sink=True, **{**sizes, "seqlen_k": 300}),
        "products": random_call(7, batch=1, head_dim=32, **sizes),
        "long_products": random_call(7, batch=1, head_dim=32, seqlen_q=20, seqlen_k=300),
    }
    found["sink"].sink[:] = found["long_sink"].sink[:] = -1e9
    for name in ("products", "long_products"):
        found[name].q.mul_(1e5), found[name].k.mul_(1e5)
    return found


def wrong() -> tuple[str, ...]:
    """The calls with a wrong second derivative or tangent."""
    found = []
    for name, call in calls().items():
        try:
            check_dtype(call, [by_kernels])
        except AssertionError:
            found.append(name)
    return tuple(sorted(found))


KERNELS = planted_cpu.wrong_with(
    SOURCE, wrong, tangent="planted_tangent", backward_tangent="planted_backward_tangent"
)
PLANTED = planted_cpu.Planted("cpu/far_second", SOURCE, __file__, KERNELS)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(5)


def test_the_built_kernels():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == ()


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a lost term passes."""
    PLANTED.check(name, tmp_path)
