"""Calls with rows whose logits are far from 0, where LSE = max + ln(sum) has lost the sum, for the
backends whose tiles are some 32 x 32 in tests.
"""

import re

import pytest
import torch
from repository import ROOT

from attn_ext.testing import check_call, random_call

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
BIASES = ["bhqk", "qk", "bk", "hq", "h"]
VALUES = [
    (SMALLEST, torch.float32),
    (-SMALLEST, torch.float32),
    (-1e9, torch.bfloat16),
    (-1e4, torch.float16),
]
SINKS = [SMALLEST, -torch.inf, -SMALLEST]
each_value = pytest.mark.parametrize(("value", "dtype"), VALUES)


def far_call(value, bias="qk", **options):
    """A call three of whose rows have a far bias, beside ordinary rows."""
    call = random_call(7, bias=bias, **{"batch": 1, "heads_q": 1, **options})
    rows = slice(None) if call.bias.shape[2] == 1 else slice(2, 5)
    call.bias[:, :, rows] = value
    return call


def check_far_sink(sink: float, backend: str) -> None:
    """Rows whose base is the sink, not a key."""
    call = random_call(7, bias="qk", batch=1, seqlen_q=34, sink=True)
    call.sink[:] = sink
    call.bias[:, :, 2:5] = sink
    check_call(call, backend)


def check_sink(sink: float, backend: str) -> None:
    """A sink at an end of float32, beside ordinary rows and, if it is low, rows as low as it; of
    queries that one kernel serves, and of few that another does."""
    for sizes in ({"seqlen_q": 34, "seqlen_k": 40}, {"seqlen_q": 1, "seqlen_k": 200}):
        call = random_call(7, bias="qk", batch=1, head_dim=32, sink=True, **sizes)
        call.sink[0] = sink
        check_call(call, backend)
        if sink < 0:
            call.bias[:, :, :3] = SMALLEST
            check_call(call, backend)


def check_excluded(bias: float, value: float, backend: str) -> None:
    """A key that the mask excludes, and a value that dropout drops, of NaN or inf."""
    masked = far_call(bias, seqlen_q=20, mask="bk")
    masked.mask[..., 5] = False
    masked.k[:, :, 5] = masked.v[:, :, 5] = value
    dropped = far_call(bias, seqlen_q=20, dropout_p=0.5)
    dropped.v[:, :, 5] = value
    for call in (masked, dropped):
        check_call(call, backend)


def bound_in(header: str) -> float:
    """kFarLse of a header of csrc."""
    (bound,) = re.findall(r"kFarLse = (\d+)", (ROOT / "csrc" / header).read_text())
    return float(bound)
