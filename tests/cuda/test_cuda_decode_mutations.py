"""Planted bugs in the forward of few queries on sm_80 (csrc/cuda/sm80/forward.cuh and
key_stream.cuh): each must make the calls wrong that its first line names, or be noticed by the
emulator there.

tests/mutants/cuda/sm80_decode holds them.  The kernels of bf16 and 64 and 256 columns are compiled
from a copy of the sources and run in place of those of attn_ext._emulated.  A bug that was caught
in these very sources is known (tests/helpers/seen.py): only a sample of them is compiled.
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

SIZES = {"batch": 1, "heads_q": 4, "heads_k": 2, "seqlen_q": 2, "seqlen_k": 330, "head_dim": 64,
         "num_splits": 1, "dtype": torch.bfloat16}  # fmt: skip
PAGES = {"cache_seqlens": [330], "page_size": 48}
# name -> (mode of the emulator, options of the call)
CALLS = {
    "pages": ("plain", {**PAGES, "stats": True}),
    "splits": ("plain", {**PAGES, "num_splits": 3}),
    "narrow": ("plain", {**PAGES, "head_dim": 40, "head_dim_v": 64}),
    "wide": ("plain", {**PAGES, "head_dim": 256}),  # two warps
    "causal": ("plain", {"causal": True, "seqlen_q": 8}),
    "dense": ("plain", {"heads_q": 2, "seqlen_q": 16}),
    "mask": ("plain", {"mask": "bhqk", **PAGES}),
    "far": ("plain", {"bias": "hqk"}),
    "dropout": ("plain", {"dropout_p": 0.3}),
    "hidden": ("plain", {"mask": "qk"}),
    "infinite": ("plain", {"bias": "hqk"}),
    "poison": ("poison", PAGES),
    "race": ("race", PAGES),
    "masked": ("race", {"mask": "qk", "stats": True}),
}


def made(name, options):
    """The call of a name."""
    call = random_call(3, **SIZES | options)
    if name == "far":  # each head's largest logit by far in the keys of another warp
        for head in range(4):
            call.bias[..., head, :, 192 + 16 * head] = 150.0
    if name == "hidden":  # NaN that no query sees, in the keys of the third warp
        call.v[:, :, 100] = torch.nan
        call.mask[..., 100] = False
    if name == "infinite":  # sums of which nothing is left by a key of the same warp, or another's
        call.v[:, :, 3] = torch.inf
        call.bias[..., :2, :, 261] = call.bias[..., 2:, :, 299] = 1000.0
    return call


def wrong() -> tuple[str, ...]:
    """The calls that are wrong."""
    calls = {name: (mode, made(name, options)) for name, (mode, options) in CALLS.items()}
    return planted_cuda.wrong_calls(calls, grads=False)


KERNELS = [  # 2048: kPaged; 1048576: kAny, which asks for features at run time
    f"attn::cuda::sm80::forward_decode<attn::ptx::bf16, {head_dim}, {bits}>"
    for head_dim, bits in ((64, 0), (64, 2048), (64, 1048576), (256, 2048))
]


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernels with a bug."""
    return planted_cuda.wrong_with(
        folder, "cuda/sm80/forward.cuh", KERNELS, wrong, patch, params="Params"
    )


PLANTED = Planted("cuda/sm80_decode", ROOT / "csrc/cuda/sm80/forward.cuh", __file__, wrong_with)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(22)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that passes whatever the kernels do; and without a bug, one that complains."""
    PLANTED.check(name, tmp_path)
