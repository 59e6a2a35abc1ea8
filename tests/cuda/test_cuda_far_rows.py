"""Gradients of rows whose logits are far from 0, where LSE = max + ln(sum) has lost the sum, by the
CUDA kernels on the emulated device.
"""

import pytest
import torch
from far_calls import (
    BIASES,
    SHAPES,
    SMALLEST,
    bound_in,
    check_excluded,
    check_far_sink,
    each_value,
    far_call,
)

from attn_ext.backends import registry, sums
from attn_ext.testing import check_call, random_call


@pytest.fixture(autouse=True)
def emulated():
    """The device, in the mode that notices most."""
    if "emulated" not in registry.ORDER:
        pytest.skip("attn_ext._emulated is not built (ATTN_EXT_EMULATED=1)")
    registry.get("emulated").set_mode("all", 1)


@each_value
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_far_bias(shape, value, dtype):
    """exp(S - LSE) without the sum: dQ 70 times too large where a row has 70 keys."""
    check_call(far_call(value, dtype=dtype, **SHAPES[shape]), "emulated")


@pytest.mark.parametrize("value", [-1e9, -5e8, -3e7])
def test_rows_of_a_far_bias_in_float16(value):
    """A base that is rounded by 64, and weights of 2^64, which float16 has not: NaN in place of a
    mean."""
    call = far_call(value, bias="hqk", seqlen_q=70, seqlen_k=130, head_dim=64)
    half = {name: getattr(call, name).half() for name in ("q", "k", "v")}
    check_call(call._replace(**half), "emulated", grads=False)


@pytest.mark.parametrize("bias", BIASES)
def test_dbias_of_far_rows(bias):
    """Rows of dbias that no kernel writes, or a sum that leaves their share out."""
    call = far_call(-1e4, bias=bias, heads_q=2, seqlen_q=34, seqlen_k=40)
    check_call(call, "emulated")


@pytest.mark.parametrize("sink", [1e4, -1e4, -1e9])
def test_a_far_sink(sink):
    """The sink's gradient by exp(sink - LSE), and rows whose base is the sink, not a key."""
    check_far_sink(sink, "emulated")


@pytest.mark.parametrize("deterministic", [False, True])  # the fused kernel, and the two
@pytest.mark.parametrize("head_dim", [16, 32])  # a scale of 1/4, and one that rounds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_ten_billion(dtype, head_dim, deterministic):
    """Digits of a fused scale * S - base that the base has lost, in the kernels of plain calls."""
    options = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 34, "seqlen_k": 40}
    call = random_call(7, dtype=dtype, head_dim=head_dim, deterministic=deterministic, **options)
    call.q.mul_(1e5), call.k.mul_(1e5)
    check_call(call, "emulated")


def test_logits_of_ten_billion_on_hopper(hopper):
    """The same for the kernels of sm_90, which read LSE by other ways."""
    for deterministic in (False, True):
        call = hopper.call(7, seqlen_q=70, head_dim=64, deterministic=deterministic)
        call.q.mul_(1e5), call.k.mul_(1e5)
        hopper.check(call, grads=True)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("far", [False, True])
def test_an_excluded_pair_counts_for_nothing(value, far):
    """0 * NaN of a key that the mask excludes, or of a value that dropout drops."""
    check_excluded(SMALLEST if far else 0.0, value, "emulated")


def test_the_bound_is_that_of_the_cpu():
    """Kernels, or those who merge their parts, that differ on which rows are far."""
    assert bound_in("cuda/far.h") == bound_in("cpu/kernels/options.h") == sums.FAR
