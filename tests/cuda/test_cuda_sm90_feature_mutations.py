"""Planted bugs in the Hopper kernels with features: each must make the calls wrong that its first
line names, or be noticed by the emulator there.

tests/mutants/cuda/sm90_features holds those of the forward, sm90_backward_features those of the
backward in one kernel, sm90_backward_dq_features and sm90_backward_dkdv_features those of the
backward in two.  The kernel of bf16 and 64 columns (of the two: 192) that knows any feature is
compiled from a copy of the sources and runs in place of that of attn_ext._emulated.  A bug that was
caught in these very sources is known (tests/helpers/seen.py): only a sample of them is compiled.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from planted_cpu import Planted
from repository import ROOT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

import planted_cuda

from attn_ext.testing import random_call

SIZES = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 130, "seqlen_k": 400, "head_dim": 64,
         "dtype": torch.bfloat16}  # fmt: skip
# name -> (mode of the emulator, features)
FORWARD = {
    "mask": ("plain", {"mask": "bhqk"}),
    "bias": ("plain", {"bias": "hqk"}),
    "alibi": ("plain", {"alibi": True}),
    "dropout": ("plain", {"dropout_p": 0.3}),
    "stats": ("plain", {"stats": True, "scale": 1.0}),
    "causal": ("plain", {"softcap": 2.0, "causal": True}),
    "cap": ("plain", {"softcap": 5.0}),
    "below": ("plain", {"softcap": 5.0}),
    "far": ("plain", {"bias": "hqk"}),
    "grows": ("plain", {"mask": "qk"}),
    "few": ("plain", {"mask": "qk"}),
    # rings go round
    "poison": ("poison", {"mask": "qk", "dropout_p": 0.3, "seqlen_q": 70, "seqlen_k": 800}),
    "race": ("race", {"mask": "qk", "dropout_p": 0.3, "seqlen_q": 70, "seqlen_k": 800}),
}
BACKWARD = {
    "mask": ("plain", {"mask": "bhqk"}),
    "bias": ("plain", {"bias": "hqk"}),
    "alibi": ("plain", {"alibi": True}),
    "dropout": ("plain", {"dropout_p": 0.3}),
    "together": ("plain", {"mask": "bhqk", "dropout_p": 0.3}),
    "softcap": ("plain", {"softcap": 1.0, "scale": 1.0}),
    "cap": ("plain", {"softcap": 8.0}),
    "ends": ("all", {"bias": "hqk", "seqlen_q": 70, "seqlen_k": 132}),
    "race": ("race", {"mask": "qk", "bias": "hqk", "dropout_p": 0.3, "seqlen_k": 132}),
}


WIDE = {
    name: (mode, {"head_dim": 192, "seqlen_k": 132} | options)
    for name, (mode, options) in {
        "mask": ("plain", {"mask": "bhqk"}),
        "bias": ("plain", {"bias": "hqk"}),
        "dropout": ("plain", {"dropout_p": 0.3}),
        "softcap": ("plain", {"softcap": 1.0, "scale": 1.0}),
        "cap": ("plain", {"softcap": 8.0}),
        "causal": ("plain", {"alibi": True, "causal": True}),
        "modes": ("all", {"mask": "qk", "bias": "hqk", "dropout_p": 0.3, "seqlen_k": 260}),
    }.items()
}
WIDE_KEYS = WIDE | {"nan": ("plain", WIDE["dropout"][1])}  # a query of NaN


class Kernel(NamedTuple):
    """A folder of bugs, the kernel that they are in, and the calls that may come out wrong; file:
    of the kernel, if it is not named after it."""

    folder: str
    name: str
    sizes: str  # head dimensions that it is compiled for
    params: str
    calls: dict[str, tuple[str, dict]]
    file: str = ""

    @property
    def header(self) -> str:
        return f"cuda/sm90/{self.file or self.name}.cuh"

    def wrong(self) -> tuple[str, ...]:
        """The calls that are wrong."""
        return planted_cuda.wrong_on_hopper(
            {name: (mode, 1, made(name, options)) for name, (mode, options) in self.calls.items()},
            grads=self.calls is not FORWARD,
        )

    def wrong_with(self, folder: Path, patch=None) -> tuple[str, ...]:
        """`wrong` of the kernel with a bug; 1048576: kAny, which asks for features at run time."""
        kernel = f"attn::cuda::sm90::{self.name}<attn::ptx::bf16, {self.sizes}, 1048576>"
        return planted_cuda.wrong_with(
            folder, self.header, [kernel], self.wrong, patch, params=f"sm90::{self.params}"
        )


def made(name, options):
    """The call of a name."""
    call = random_call(3, **SIZES | options)
    # a row all of whose keys are far, one whose first are, one whose last are, one whose first are
    # just not
    if name == "far":
        call.bias[:, :, 2] = torch.finfo(torch.bfloat16).min
        call.bias[:, :, 3, :200] = -1e9
        call.bias[:, :, 4, 200:] = -1e9
        call.bias[:, :, 5, :200], call.bias[:, :, 5, 200:] = 5.5e8, 5.3e8
    if name == "few":  # the mask keeps all but single pairs
        call.mask[:] = True
        call.mask[..., :5, 127] = call.mask[..., 8:16, 130] = call.mask[..., 70, 260] = False
        call.k[..., [127, 130, 260], :] *= 4  # and they would be seen
    if name == "cap" and call.softcap == 5.0:  # some rows g + 8 of a warp have logits beyond it
        call.q[:, :, 8:16] *= 8
    if name == "below":  # a row all of whose products are far below 0
        call.k.abs_()
        call.q[:, :, 3] = -8
    if name == "nan":
        call.q[:, :, 3] = torch.nan
    if name == "grows":  # logits of which each tile has larger ones
        call.k.mul_(torch.arange(400).div(128, rounding_mode="floor").mul(3)[:, None] + 1)
    return call


KERNELS = (
    Kernel("cuda/sm90_features", "forward_features", "64, 64", "ForwardParams", FORWARD),
    Kernel("cuda/sm90_backward_features", "backward_features", "64", "BackwardParams", BACKWARD),
    Kernel("cuda/sm90_backward_dq_features", "backward_dq_features", "192", "BackwardParams", WIDE),
    Kernel(
        "cuda/sm90_backward_dkdv_features", "backward_dkdv_features", "192", "BackwardParams",
        WIDE_KEYS, "backward_features",
    ),
)  # fmt: skip
PLANTED = {
    kernel.name: Planted(kernel.folder, ROOT / "csrc" / kernel.header, __file__, kernel.wrong_with)
    for kernel in KERNELS
}


@pytest.mark.parametrize(
    ("kernel", "least"),
    [("forward_features", 10), ("backward_features", 10), ("backward_dq_features", 6),
     ("backward_dkdv_features", 8)],
)  # fmt: skip
def test_every_patch_applies(kernel, least):
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED[kernel].check_patches(least)


@pytest.mark.parametrize(
    ("kernel", "name"), [(kernel, name) for kernel in PLANTED for name in PLANTED[kernel].names]
)
def test_planted_bug_is_caught(kernel, name, tmp_path):
    """A check that a feature left out passes; and without a bug, a check that always complains."""
    PLANTED[kernel].check(name, tmp_path)
