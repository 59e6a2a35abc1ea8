"""Planted bugs in the C++ kernels of attn_ext.inspect, tests/mutants/cpu/inspect: each must make
wrong, in the top keys of the mean over heads, what its first line names.

The kernels are compiled alone, on the plainest vectors, and run in place of those of attn_ext._C.
A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import planted_cpu
import pytest
import torch
from inspect_checks import check_mean, matrix
from repository import ROOT

from attn_ext.inspect import kernels, logits
from attn_ext.testing import random_call

SOURCE = ROOT / "csrc/tests/inspect_maps.cpp"
# more keys than a tile has, keys that some heads see, and some that none sees
SIZES = dict(batch=1, heads_q=4, heads_k=2, seqlen_q=40, seqlen_k=300, causal=True, mask="bhqk")


def without_v(call):
    """As `record` hands calls to the kernels."""
    return call._replace(v=call.k[..., :1].contiguous())


def wrong() -> tuple[str, ...]:
    """What of a call's results is wrong."""
    found = set()
    call = random_call(3, **SIZES)
    call.mask[..., 3] = False
    p, (lse, *_) = matrix(call)
    call = without_v(call)
    found.update(check_mean(call, p, lse.float(), "cpu", torch.float32, named=True))
    call = without_v(random_call(seqlen_q=3, seqlen_k=70, batch=1))
    call.q.zero_()
    keys = kernels.mean_top_k(call, 9, logits.forward(call)[1], "cpu").keys
    found.update(["ties"] if not torch.equal(keys, torch.arange(9).expand(1, 3, 9)) else [])
    call.q[:, :, 1] = torch.nan
    weights = kernels.mean_top_k(call, 9, logits.forward(call)[1], "cpu").weights
    found.update(["nan"] if not torch.equal(weights.isnan().all(-1)[0], IS_NAN) else [])
    return tuple(sorted(found))


IS_NAN = torch.tensor([False, True, False])


KERNELS = planted_cpu.wrong_with(SOURCE, wrong, inspect="planted_inspect")
PLANTED = planted_cpu.Planted("cpu/inspect", SOURCE, __file__, KERNELS)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(8)


def test_the_built_kernels():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == ()


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a lost head, a key of another tile, or a count of all keys passes."""
    PLANTED.check(name, tmp_path)
