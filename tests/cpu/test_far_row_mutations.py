"""Planted bugs in what the C++ backward does with rows whose LSE is far from 0, in the folder
tests/mutants/cpu/far: each must make the gradients wrong of the calls that its first line names.

The kernel is compiled alone, on the plainest vectors, and runs in place of those of attn_ext._C.  A
bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them is
compiled.
"""

import planted_cpu
import pytest
from repository import ROOT

from attn_ext.testing import check_call, random_call

SOURCE = ROOT / "csrc/tests/backward_pass.cpp"


def calls() -> dict:
    """Calls with far logits, all keys in one block, and with rows of a far bias, several blocks of
    keys, without a sink and with one."""
    short = random_call(7, batch=1, seqlen_q=40, head_dim=32)
    short.q.mul_(1e5), short.k.mul_(1e5)
    options = {"batch": 1, "seqlen_q": 20, "seqlen_k": 300, "bias": "qk"}
    long, sink = random_call(7, **options), random_call(7, sink=True, **options)
    long.bias[:, :, 2:5] = sink.bias[:, :, 2:5] = sink.sink[:] = -1e9
    return {"short": short, "long": long, "sink": sink}


def wrong() -> tuple[str, ...]:
    """The calls whose gradients are wrong."""
    found = []
    for name, call in calls().items():
        try:
            check_call(call, "cpu")
        except AssertionError:
            found.append(name)
    return tuple(sorted(found))


KERNELS = planted_cpu.wrong_with(SOURCE, wrong, backward="planted_backward")
PLANTED = planted_cpu.Planted("cpu/far", SOURCE, __file__, KERNELS)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(3)


def test_the_built_kernels():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == ()


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a lost sum passes."""
    PLANTED.check(name, tmp_path)
