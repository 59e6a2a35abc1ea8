"""Planted bugs in the frame of the Hopper forward (csrc/cuda/sm90/schedule.cuh): each must make the
calls wrong that its first line names, or be noticed by the emulator there.

tests/mutants/cuda/sm90_tiles holds them.  The plain kernel of bf16 and 64 columns is compiled from
a copy of the sources and runs in place of that of attn_ext._emulated.  A bug that was caught in
these very sources is known (tests/helpers/seen.py): only a sample of them is compiled.
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

SIZES = {"batch": 1, "heads_q": 2, "heads_k": 1, "head_dim": 64, "dtype": torch.bfloat16}
TILES = {"seqlen_q": 300, "seqlen_k": 400}
# name -> (mode of the emulator, multiprocessors, options of the call)
CALLS = {
    "tiles": ("plain", 2, {**TILES, "causal": True}),
    "one": ("plain", 1, {"seqlen_q": 200, "seqlen_k": 140}),  # CTA for all tiles
    "sections": ("plain", 2, {"seqlen_q": 130, "seqlen_k": 300, "heads_q": 4, "heads_k": 2}),
    "empty": ("plain", 1, {"seqlen_q": 300, "seqlen_k": 100, "causal": True}),
    "packed": ("plain", 2, {"seqlens_q": [70, 0, 130, 64], "seqlens_k": [90, 3, 200, 64]}),
    "mended": ("poison", 1, {"seqlen_q": 200, "seqlen_k": 140}),
    "poison": ("poison", 1, TILES),
    "race": ("race", 1, TILES),
    # one turn a tile: no ring of K and V holds the producer back
    "short": ("race", 1, {"seqlen_q": 300, "seqlen_k": 128}),
}


def made(name, options):
    """The call of a name."""
    call = random_call(3, **SIZES | options)
    if name == "mended":  # rows whose first result is NaN
        call.k[:, :, 5], call.v[:, :, 5] = -torch.inf, torch.inf  # 0 * inf
        call.q.abs_()
    return call


def wrong() -> tuple[str, ...]:
    """The calls that are wrong."""
    return planted_cuda.wrong_on_hopper(
        {name: (mode, count, made(name, options)) for name, (mode, count, options) in CALLS.items()}
    )


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernel with a bug."""
    return planted_cuda.wrong_with(
        folder, "cuda/sm90/forward.cuh", ["attn::cuda::sm90::forward<attn::ptx::bf16, 64, 64>"],
        wrong,
        patch, params="sm90::ForwardParams",
    )  # fmt: skip


PLANTED = Planted("cuda/sm90_tiles", ROOT / "csrc/cuda/sm90/forward.cuh", __file__, wrong_with)


def test_every_patch_applies():
    """A frame that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(15)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check of the frame that passes whatever it does; and without a bug, one that complains."""
    PLANTED.check(name, tmp_path)
