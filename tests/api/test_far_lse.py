"""Gradients of rows whose logits are far from 0: LSE = max + ln(sum) rounds the sum away there.

A bias of the smallest float or of -1e9 over a whole row, as additive masks make them for padding,
and logits of 1e10, as of a diverging model.  The kernels take the sums of such rows from their
logits; before, P was larger by the number of keys, or infinite.
"""

import pytest
import torch
from far_calls import SINKS, check_sink

from attn_ext.testing import check_call, random_call

SMALLEST = torch.finfo(torch.float32).min
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
SHAPES = {
    "one block of keys": {"seqlen_q": 40},
    "several": {"seqlen_q": 300},
    "grouped heads": {"seqlen_q": 70, "seqlen_k": 420, "heads_q": 4, "heads_k": 2},
    "packed": {"seqlens_q": [310, 0, 30], "seqlens_k": [310, 3, 30]},
    "window and sink": {"seqlen_q": 300, "window": (150, 20), "sink": True},
    "dropout": {"seqlen_q": 300, "dropout_p": 0.3},
    "softcap and mask": {"seqlen_q": 300, "softcap": 2.0, "mask": "bk"},
}


@pytest.mark.parametrize("value", [SMALLEST, -1e9, -SMALLEST])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_far_bias(shape, value):
    """exp(S - LSE) without the sum: dQ 300 times too large where a row has 300 keys."""
    for dtype in DTYPES:
        call = random_call(7, dtype=dtype, bias="qk", batch=1, **SHAPES[shape])
        largest = torch.finfo(call.bias.dtype).max
        call.bias[:, :, 2:5] = min(value, largest)
        check_call(call, "cpu")


@pytest.mark.parametrize("sink", [1e4, -1e4, -1e9])
@pytest.mark.parametrize("seqlen", [40, 300])
def test_a_far_sink(seqlen, sink):
    """The sink's gradient by exp(sink - LSE), and rows whose base is the sink, not a key."""
    call = random_call(7, bias="qk", seqlen_q=seqlen, sink=True)
    call.sink[:] = sink
    call.bias[:, :, 2:5] = sink
    check_call(call, "cpu")


@pytest.mark.parametrize("sink", SINKS)
def test_a_sink_at_an_end_of_float32(sink, backend):
    """A sink that times log2(e) is infinite: no share beside a bias as low, NaN of inf - inf."""
    check_sink(sink, backend)


@pytest.mark.parametrize("head_dim", [16, 32])  # a scale of 1/4, and one that rounds
@pytest.mark.parametrize("seqlen", [1, 40, 300])
def test_logits_of_ten_billion(seqlen, head_dim):
    """Digits of a fused scale * S - base that the base has lost: weights of exp(500) in O."""
    for dtype in DTYPES:
        call = random_call(7, dtype=dtype, seqlen_q=seqlen, seqlen_k=300, head_dim=head_dim)
        call.q.mul_(1e5), call.k.mul_(1e5)
        check_call(call, "cpu")


def test_a_far_additive_score():
    """The same where scores are w . tanh(q + k)."""
    call = random_call(7, additive=True, seqlen_q=30, seqlen_k=300)
    call.w.mul_(1e4)
    check_call(call, "cpu")


@pytest.mark.parametrize("seqlen", [40, 300])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_dropped_value_reaches_nothing(value, seqlen):
    """0 * NaN in the gradient of a weight that dropout drops: NaN in rows that drop key 5."""
    for dtype in (*DTYPES, torch.float16):
        call = random_call(7, dtype=dtype, dropout_p=0.5, seqlen_q=seqlen)
        call.v[:, :, 5] = value
        check_call(call, "cpu")
