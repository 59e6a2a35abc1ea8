"""Gradients of rows whose logits are far from 0, where LSE = max + ln(sum) has lost the sum, by the
Triton kernels, interpreted.

Tiles are 32 x 32 under the interpreter.
"""

import pytest
import torch
from far_calls import (
    BIASES,
    SHAPES,
    SINKS,
    SMALLEST,
    bound_in,
    check_excluded,
    check_far_sink,
    check_sink,
    each_value,
    far_call,
)
from nonfinite_cases import ROWS_OF_NAN, check_dropped_of_nan, check_overflow

from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels.kernels import primitives


@each_value
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_far_bias(shape, value, dtype):
    """exp(S - LSE) without the sum: dQ 70 times too large where a row has 70 keys."""
    check_call(far_call(value, dtype=dtype, **SHAPES[shape]), "triton")


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_dbias_of_far_rows(bias, deterministic):
    """Rows of dbias written by the wrong kernel, or twice; a share that the fixed order forgets."""
    call = far_call(-1e9, bias=bias, heads_q=2, seqlen_q=34, seqlen_k=40)
    check_call(call._replace(deterministic=deterministic), "triton")


@pytest.mark.parametrize("sink", [1e4, -1e4, -1e9])
def test_a_far_sink(sink):
    """The sink's gradient by exp(sink - LSE), and rows whose base is the sink, not a key."""
    check_far_sink(sink, "triton")


@pytest.mark.parametrize("sink", SINKS)
def test_a_sink_at_an_end_of_float32(sink):
    """A sink that times log2(e) is infinite: no share beside a bias as low, NaN of inf - inf."""
    check_sink(sink, "triton")


@pytest.mark.parametrize("head_dim", [16, 32])  # a scale of 1/4, and one that rounds
@pytest.mark.parametrize("seqlen", [1, 34])
def test_logits_of_ten_billion(seqlen, head_dim):
    """Digits of a fused scale * S - base that the base has lost."""
    for dtype in (torch.float32, torch.bfloat16):
        options = {"batch": 1, "heads_q": 1, "seqlen_q": seqlen, "seqlen_k": 34}
        call = random_call(7, dtype=dtype, head_dim=head_dim, **options)
        call.q.mul_(1e5), call.k.mul_(1e5)
        check_call(call, "triton")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_an_excluded_pair_of_a_far_row_counts_for_nothing(value):
    """0 * NaN of a key that the mask excludes, or of a value that dropout drops."""
    check_excluded(SMALLEST, value, "triton")


@pytest.mark.parametrize("name", ROWS_OF_NAN)
def test_what_dropout_drops_of_a_row_of_nan(name):
    """NaN * 0 in dV at pairs that dropout drops; an O of 0 in rows of NaN without a kept pair."""
    check_dropped_of_nan(name, torch.float32, "triton")


def test_logits_that_overflow():
    """Rows of NaN with an LSE of inf and gradients of 0; a pair of logit -inf in a row of NaN."""
    check_overflow("triton")
    check_overflow("triton", causal=True)


def test_the_bound_is_that_of_the_cpu():
    """Two kernels that differ on which rows are far."""
    assert primitives.FAR_LSE.value == bound_in("cpu/kernels/options.h")
