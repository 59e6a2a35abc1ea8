"""Planted bugs in the Hopper forward where values are narrower than keys: each must make the calls
wrong that its first line names, or be noticed by the emulator there.

tests/mutants/cuda/sm90_values holds them.  The plain kernel of bf16 for keys of 192 columns and
values of 128 is compiled from a copy of the sources and runs in place of that of
attn_ext._emulated.  A bug that was caught in these very sources is known (tests/helpers/seen.py):
only a sample of them is compiled.
"""

import pytest
import torch
from planted_cpu import Planted
from repository import ROOT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

import planted_cuda

from attn_ext.testing import random_call

SIZES = {"batch": 1, "heads_q": 2, "heads_k": 1, "head_dim": 192, "head_dim_v": 128,
         "dtype": torch.bfloat16}  # fmt: skip


CALLS = {  # name -> (mode of the emulator, sizes)
    "ends": ("plain", {"seqlen_q": 130, "seqlen_k": 300}),
    "causal": ("plain", {"seqlen_q": 130, "seqlen_k": 130, "causal": True}),
    "bad": ("plain", {"seqlen_q": 130, "seqlen_k": 130, "causal": True}),
    "race": ("race", {"seqlen_q": 130, "seqlen_k": 600}),
}


def made(name, options):
    """The call of a name."""
    call = random_call(3, **SIZES, **options)
    if name == "bad":
        call.v[:, :, 129, 100] = torch.nan
    return call


def wrong() -> tuple[str, ...]:
    """The calls that are wrong."""
    return planted_cuda.wrong_on_hopper(
        {name: (mode, 1, made(name, options)) for name, (mode, options) in CALLS.items()}
    )


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernel with a bug."""
    return planted_cuda.wrong_with(
        folder, "cuda/sm90/forward.cuh", ["attn::cuda::sm90::forward<attn::ptx::bf16, 192, 128>"],
        wrong, patch, params="sm90::ForwardParams",
    )  # fmt: skip


PLANTED = Planted("cuda/sm90_values", ROOT / "csrc/cuda/sm90/forward.cuh", __file__, wrong_with)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(4)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that passes whatever becomes of V; and without a bug, one that complains."""
    PLANTED.check(name, tmp_path)
