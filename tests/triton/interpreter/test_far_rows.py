"""Gradients of rows whose logits are far from 0, where LSE = max + ln(sum) has lost the sum, by the
Triton kernels, interpreted.

Tiles are 32 x 32 under the interpreter.
"""

import re

import pytest
import torch
from repository import ROOT

from attn_ext.testing import check_call, random_call
from attn_ext.triton_kernels.kernels import primitives

SMALLEST = torch.finfo(torch.float32).min
SHAPES = {
    "one block of keys": {"seqlen_q": 30},
    "several": {"seqlen_q": 34, "seqlen_k": 70},
    "causal, grouped heads": {"seqlen_q": 34, "causal": True, "heads_q": 2, "heads_k": 1},
    "packed": {"seqlens_q": [34, 0, 9], "seqlens_k": [40, 3, 9]},
    "window and sink": {"seqlen_q": 70, "window": (50, 10), "sink": True},
    "dropout": {"seqlen_q": 34, "dropout_p": 0.3},
    "softcap and mask": {"seqlen_q": 34, "softcap": 2.0, "mask": "bk"},
    "other head widths": {"seqlen_q": 20, "head_dim": 24, "head_dim_v": 40},
}


def far_call(value, bias="qk", **options):
    """A call three of whose rows have a far bias, beside ordinary rows."""
    call = random_call(7, bias=bias, **{"batch": 1, "heads_q": 1, **options})
    rows = slice(None) if call.bias.shape[2] == 1 else slice(2, 5)
    call.bias[:, :, rows] = value
    return call


@pytest.mark.parametrize(
    ("value", "dtype"),
    [(SMALLEST, torch.float32), (-1e9, torch.bfloat16), (-1e4, torch.float16)],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_far_bias(shape, value, dtype):
    """exp(S - LSE) without the sum: dQ 70 times too large where a row has 70 keys."""
    check_call(far_call(value, dtype=dtype, **SHAPES[shape]), "triton")


@pytest.mark.parametrize("bias", ["bhqk", "qk", "bk", "hq", "h"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_dbias_of_far_rows(bias, deterministic):
    """Rows of dbias written by the wrong kernel, or twice; a share that the fixed order forgets."""
    call = far_call(-1e9, bias=bias, heads_q=2, seqlen_q=34, seqlen_k=40)
    check_call(call._replace(deterministic=deterministic), "triton")


@pytest.mark.parametrize("sink", [1e4, -1e4, -1e9])
def test_a_far_sink(sink):
    """The sink's gradient by exp(sink - LSE), and rows whose base is the sink, not a key."""
    call = random_call(7, bias="qk", batch=1, seqlen_q=34, sink=True)
    call.sink[:] = sink
    call.bias[:, :, 2:5] = sink
    check_call(call, "triton")


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
    masked = far_call(SMALLEST, seqlen_q=20, mask="bk")
    masked.mask[..., 5] = False
    masked.k[:, :, 5] = masked.v[:, :, 5] = value
    dropped = far_call(SMALLEST, seqlen_q=20, dropout_p=0.5)
    dropped.v[:, :, 5] = value
    for call in (masked, dropped):
        check_call(call, "triton")


def test_the_bound_is_that_of_the_cpu():
    """Two kernels that differ on which rows are far."""
    text = (ROOT / "csrc/cpu/kernels/options.h").read_text()
    (bound,) = re.findall(r"kFarLse = (\d+)", text)
    assert primitives.FAR_LSE.value == float(bound)
