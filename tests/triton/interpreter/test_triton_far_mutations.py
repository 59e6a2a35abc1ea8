"""Planted bugs in what the Triton backward does with rows whose LSE is far from 0, in the folder
tests/mutants/triton/far: each must make the gradients wrong of the calls that its first line names.
"""

import patches
import planted_triton
import pytest
import torch
from repository import ROOT

from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels.launch import backward as launch

MUTANTS = {
    p.name.split("/")[1]: p
    for p in map(patches.read, sorted(ROOT.glob("tests/mutants/triton/far/*.patch")))
}


def far_call(bias="qk", **options):
    """A call with rows of a far bias beside ordinary ones; all are far where they share a bias."""
    call = random_call(7, bias=bias, batch=1, **options)
    call.bias[:, :, slice(None) if bias == "k" else slice(2, 5)] = -1e4
    return call


def wrong() -> set[str]:
    """The calls whose gradients are wrong."""
    options = {"seqlen_q": 20, "heads_q": 2, "heads_k": 1}
    calls = {
        "plain": far_call(**options),
        "sink": far_call(sink=True, **options),
        "dropout": far_call(dropout_p=0.5, **options),
        "stored": far_call(bias="hqk", **options),
        "shared": far_call(bias="k", **options)._replace(deterministic=True),
        "mixed": far_call(**options)._replace(deterministic=True),
    }
    calls["sink"].sink[:] = -1e4
    calls["excluded"] = far_call(mask="bk", **options)
    calls["excluded"].mask[..., 5] = False
    calls["excluded"].k[:, :, 5] = torch.nan
    found = set()
    for name, call in calls.items():
        try:
            check_call(call, "triton")
        except AssertionError:
            found.add(name)
    return found


def test_the_kernels_as_they_are():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == set()
    assert len(MUTANTS) >= 6


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, monkeypatch, tmp_path):
    """A check that a lost term passes."""
    ((_, text),) = patches.apply(MUTANTS[name], ROOT).items()
    module = planted_triton.loaded(text, tmp_path)
    kernels = [n for n in vars(module) if n.endswith("_kernel") and hasattr(launch, n)]
    assert kernels
    for kernel in kernels:
        monkeypatch.setattr(launch, kernel, getattr(module, kernel))
    assert wrong() == set(MUTANTS[name].caught)
