"""Planted bugs in the deterministic backward of plain calls on sm_80
(csrc/cuda/sm80/backward_plain.cuh): each must make the calls wrong that its first line names, or be
noticed by the emulator there.

tests/mutants/cuda/sm80_pair holds them.  The kernels of bf16 and 64 columns are compiled from a
copy of the sources and run in place of those of attn_ext._emulated.  A bug that was caught in these
very sources is known (tests/helpers/seen.py): only a sample of them is compiled.
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
TILES = {"seqlen_q": 150, "seqlen_k": 200}
# name -> (mode of the emulator, options of the call)
CALLS = {
    "tiles": ("plain", TILES),
    "causal": ("plain", {"seqlen_q": 200, "seqlen_k": 230, "causal": True}),
    "window": ("plain", {"seqlen_q": 200, "seqlen_k": 200, "window": (190, -1), "align": 0}),
    "packed": ("plain", {"seqlens_q": [70, 0, 130, 64], "seqlens_k": [90, 3, 200, 64]}),
    "odd": ("plain", {"seqlen_q": 40, "seqlen_k": 70, "head_dim": 63}),  # no copies of 16 bytes
    "poison": ("poison", TILES),
    "race": ("race", TILES),
    "edges": ("race", {"seqlen_q": 70, "seqlen_k": 70, "causal": True}),
}


# A query and the one of 128 keys that it does not see, though every other query of its tile does:
# with a logit so large that the pair would show.
HIDDEN = {"causal": (96, 127), "window": (191, 0)}


def made(name, options):
    """The call of a name."""
    call = random_call(3, deterministic=True, **SIZES | options)
    if name in HIDDEN:
        i, j = HIDDEN[name]
        call.k[:, 0, j] = call.q[:, 0, i]
    return call


def wrong() -> tuple[str, ...]:
    """The calls that are wrong."""
    calls = {name: (mode, made(name, options)) for name, (mode, options) in CALLS.items()}
    return planted_cuda.wrong_calls(calls)


KERNELS = [
    f"attn::cuda::sm80::backward_{name}_plain<attn::ptx::bf16, 64>" for name in ("dq", "dkdv")
]


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernels with a bug."""
    return planted_cuda.wrong_with(
        folder, "cuda/sm80/backward_plain.cuh", KERNELS, wrong, patch, params="Params"
    )


PLANTED = Planted(
    "cuda/sm80_pair", ROOT / "csrc/cuda/sm80/backward_plain.cuh", __file__, wrong_with
)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(20)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that passes whatever the kernels do; and without a bug, one that complains."""
    PLANTED.check(name, tmp_path)
