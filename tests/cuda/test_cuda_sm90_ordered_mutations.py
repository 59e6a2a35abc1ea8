"""Planted bugs in the order in which Hopper's backward adds up dQ: each must make the calls wrong
that its first line names, or be noticed by the emulator there.

tests/mutants/cuda/sm90_backward_ordered holds them.  The kernels of bf16 and 64 columns are
compiled from a copy of the sources and run in place of those of attn_ext._emulated, behind O and
LSE of the reference.  A bug that was caught in these very sources is known
(tests/helpers/seen.py): only a sample of them is compiled.
"""

from unittest import mock

import pytest
import torch
from planted_cpu import Planted
from repository import ROOT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

import planted_cuda

from attn_ext import _emulated
from attn_ext.backends import registry
from attn_ext.core.schema import Needs
from attn_ext.testing import random_call, to_float64

SIZES = {"batch": 1, "heads_q": 2, "heads_k": 1, "head_dim": 64, "dtype": torch.bfloat16,
         "deterministic": True}  # fmt: skip
# name -> (modes of the emulator and their seeds, whether it asks for an order, sizes)
CALLS = {
    "order": ((("race", 0),), True, {"seqlen_q": 130, "seqlen_k": 400}),
    "window": ((("plain", 0),), True, {"seqlen_q": 300, "seqlen_k": 300, "window": (90, 20)}),
    "bits": (tuple(("random", seed) for seed in range(4)), False,
             {"seqlen_q": 200, "seqlen_k": 600}),
}  # fmt: skip
HEADER = "cuda/sm90/backward_features.cuh"
KERNELS = {  # 1048576: kAny, which asks for features at run time
    "attn::cuda::sm90::backward_features<attn::ptx::bf16, 64, 1048576>": "sm90::BackwardParams",
    "attn::cuda::sm90::clear_dq<attn::ptx::bf16, 64>": "Params",
}


def ones_of_before(*size, empty=torch.empty, **options):
    """torch.empty, its floats the bits of 1: words that a call before has left."""
    found = empty(*size, **options)
    if found.dtype == torch.float32:
        found.view(torch.int32).fill_(1)
    return found


def is_wrong(modes, ordered, sizes) -> bool:
    """Whether gradients are far from the reference's, or have other bits in another mode."""
    emulated, reference = registry.get("emulated"), registry.get("reference")
    needs, bits = Needs(True, True, True), None
    call = random_call(3, **SIZES | sizes)
    out, lse = reference.forward(call)[:2]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    exact = reference.forward_and_backward(to_float64(call), dout.double(), None, needs)[1]
    for mode, seed in modes:
        emulated.set_mode(mode, seed)
        _emulated.set_ordered(ordered)
        try:
            with mock.patch.object(torch, "empty", ones_of_before):
                found = emulated.backward(call, dout, out, lse, None, needs)[:3]
        except RuntimeError:
            return True
        errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(found, exact, strict=False)]
        if not all(error < 0.02 for error in errors):
            return True
        bits = bits or found
        if not all(map(torch.equal, bits, found)):
            return True
    return False


def wrong() -> tuple[str, ...]:
    """The calls that are wrong."""
    with planted_cuda.hopper():
        return tuple(sorted(name for name, call in CALLS.items() if is_wrong(*call)))


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernels with a bug."""
    return planted_cuda.wrong_with(folder, HEADER, list(KERNELS), wrong, patch, params=KERNELS)


PLANTED = Planted("cuda/sm90_backward_ordered", ROOT / "csrc" / HEADER, __file__, wrong_with)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(12)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check of the order that passes whatever the kernel does; without a bug, one that always
    complains."""
    PLANTED.check(name, tmp_path)
