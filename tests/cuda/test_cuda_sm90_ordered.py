"""Deterministic gradients of the Hopper backward of one kernel: its blocks add up dQ in one order
(csrc/cuda/sm90/backward_fused.cuh, kOrdered), whatever the order in which they run.
"""

import pytest
import torch
from closeness import BFLOAT16, assert_close

from attn_ext.backends import registry
from attn_ext.core.schema import Needs
from attn_ext.testing import check_call, random_call

BF16, FP16 = torch.bfloat16, torch.float16
ALL = Needs(True, True, True)

# What each would catch; two blocks of 128 keys or more, else there is no order.
CASES = {
    "columns of dQ by warpgroup": {"head_dim": 128, "seqlen_q": 130, "seqlen_k": 400},
    "tiles of dQ by warpgroup": {"head_dim": 64, "seqlen_q": 130, "seqlen_k": 400},
    "half a slab": {"head_dim": 96, "seqlen_q": 70, "seqlen_k": 300, "dtype": FP16},
    "causal: a block without the first tiles": {"causal": True, "seqlen_q": 300, "seqlen_k": 300},
    "causal: blocks that no query sees": {"causal": True, "seqlen_q": 100, "seqlen_k": 400,
                                          "align": 0},
    "window: tiles of few blocks": {"window": (90, 20), "seqlen_q": 500, "seqlen_k": 500},
    "window of one block": {"window": (3, 0), "seqlen_q": 300, "seqlen_k": 300},
    "heads and batches": {"heads_q": 4, "heads_k": 2, "batch": 2, "seqlen_q": 70,
                          "seqlen_k": 260},
    "mask": {"mask": "bhqk", "seqlen_q": 130, "seqlen_k": 260},
    "bias and ALiBi": {"bias": "hqk", "alibi": "b", "seqlen_q": 130, "seqlen_k": 260},
    "dropout and soft cap": {"dropout_p": 0.3, "softcap": 2.0, "seqlen_q": 130, "seqlen_k": 260,
                             "head_dim": 128},
}  # fmt: skip
SIZES = {"heads_q": 2, "heads_k": 1, "head_dim": 64}


def gradients(hopper, call, needs=ALL):
    out, lse = registry.get("reference").forward(call)[:2]
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return hopper.module.backward(call, dout, out.to(call.q.dtype), lse.float(), None, needs)[:3]


@pytest.mark.parametrize("name", CASES)
def test_deterministic(hopper, name):
    """A block that adds before its turn, or whose addition is not there when it says so; a wait
    that nobody ends; queries from the last to the first, and one left out."""
    call = hopper.call(deterministic=True, **(SIZES | CASES[name]))
    assert hopper.backward_kernel(call) == "sm90"
    if hopper.name == "emulated":
        hopper.module._kernels().module.set_ordered(True)
    check_call(call, hopper.module, grads=True)


def test_packed_sequences(hopper):
    """The words of another sequence; blocks of keys that a shorter sequence does not have."""
    call = hopper.call(heads_q=2, heads_k=1, head_dim=64, seqlens_q=[5, 131, 0, 70],
                       seqlens_k=[7, 133, 3, 260], causal=True, deterministic=True)  # fmt: skip
    check_call(call, hopper.module, grads=True)


@pytest.mark.parametrize("name", list(CASES)[:4])
def test_the_same_bits_in_any_order_of_blocks(hopper, name):
    """Additions in the order in which blocks happen to run."""
    call = hopper.call(deterministic=True, **(SIZES | CASES[name]))
    want = gradients(hopper, call)
    for seed in range(4):
        if hopper.name == "emulated":
            hopper.module.set_mode("random" if seed % 2 else "random+poison", seed)
        for got, first in zip(gradients(hopper, call), want, strict=True):
            assert torch.equal(got, first)


def test_without_an_order_the_bits_vary():
    """A test of the same bits that would pass whatever the kernel did."""
    emulated = pytest.importorskip("attn_ext._emulated")
    assert emulated is not None
    module = registry.get("emulated")
    kernels = module._kernels()
    before = kernels.sm90, dict(kernels._devices)
    kernels.sm90, kernels._devices = True, {0: (1, True)}
    try:
        call = random_call(1, dtype=BF16, batch=1, seqlen_q=130, seqlen_k=600, **SIZES)
        out, lse = registry.get("reference").forward(call)[:2]
        found = set()
        for seed in range(40):  # most orders round to the same 16 bits
            module.set_mode("random", seed)
            dq = module.backward(call, out, out, lse, None, ALL)[0]
            found.add(dq.view(torch.int16).numpy().tobytes())
            if len(found) > 1:
                break
        assert len(found) > 1
        module.set_mode("plain", 0)
        kernels.module.set_ordered(True)
        with pytest.raises(RuntimeError, match="nothing orders the two"):
            module.backward(call, out, out, lse, None, ALL)
    finally:
        kernels.sm90, kernels._devices = before


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "needs", [Needs(True, False, False), Needs(False, True, True), Needs(False, False, True)]
)
def test_some_gradients_of_calls_with_features(hopper, needs, deterministic):
    """A store where nothing is wanted; a gradient that is not written."""
    call = hopper.call(mask="bhqk", seqlen_q=130, seqlen_k=260, deterministic=deterministic,
                       **SIZES)  # fmt: skip
    want = gradients(hopper, call)
    for got, all_of_them, wanted in zip(gradients(hopper, call, needs), want, needs, strict=False):
        assert (got is None) == (not wanted)
        if wanted:
            assert_close(got, all_of_them, BFLOAT16)
