"""Planted bugs in what the CUDA backward does with rows whose LSE is far from 0, in the folder
tests/mutants/cuda/far: each must make the gradients wrong of the calls that its first line names.

The kernels of float32 that know every row by itself are compiled from a copy of the sources and run
in place of those of attn_ext._emulated.  A bug that was caught in these very sources is known
(tests/helpers/seen.py): only a sample of them is compiled.
"""

from pathlib import Path

import pytest
from planted_cpu import Planted
from repository import ROOT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

import planted_cuda

from attn_ext.backends import registry
from attn_ext.testing import check_call, random_call

SOURCE = ROOT / "csrc/cuda/sm80/backward_preprocess.cuh"  # which includes the others
KERNELS = (
    "backward_delta", "backward_sink", "backward_far_queries", "backward_far_keys",
    "backward_far_bias",
)  # fmt: skip


def far_call(**options):
    """A call with rows of a far bias beside ordinary ones."""
    options = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 20, "bias": "qk", **options}
    call = random_call(7, **options)
    call.bias[:, :, 2:5] = -1e4
    return call


def wrong() -> tuple[str, ...]:
    """The calls whose gradients are wrong."""
    calls = {
        "plain": far_call(),
        "sink": far_call(sink=True),
        "dropout": far_call(dropout_p=0.5),
        "keys": far_call(seqlen_k=40, bias="hqk"),
        "excluded": far_call(mask="bk"),
        "packed": far_call(seqlens_q=[2, 0, 40], seqlens_k=[20, 3, 30]),
    }
    calls["sink"].sink[:] = -1e4
    calls["excluded"].mask[..., 5] = False
    calls["excluded"].k[:, :, 5] = float("nan")
    registry.get("emulated").set_mode("plain", 1)
    found = []
    for name, call in calls.items():
        try:
            check_call(call, "emulated")
        except AssertionError:
            found.append(name)
    return tuple(sorted(found))


def wrong_with(folder: Path, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernels with a bug."""
    kernels = [f"attn::cuda::sm80::{name}<float>" for name in KERNELS]
    header = SOURCE.relative_to(ROOT / "csrc").as_posix()
    return planted_cuda.wrong_with(folder, header, kernels, wrong, patch)


PLANTED = Planted("cuda/far", SOURCE, __file__, wrong_with)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(8)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a lost sum passes; and without a bug, a check that always complains."""
    PLANTED.check(name, tmp_path)
