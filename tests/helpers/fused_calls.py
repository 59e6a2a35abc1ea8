"""Calls whose backward the Triton kernel of five products serves, kernels/fused.py."""

from unittest import mock

import torch

from attn_ext.backends import triton
from attn_ext.core.schema import TOP_LEFT, Needs
from attn_ext.testing import random_call
from attn_ext.triton_kernels.launch import attention, backward

PAIR = ["delta_kernel", "dkdv_kernel", "dq_kernel"]
FUSED = ["delta_kernel", "fused_kernel", "dq_from_sums_kernel"]
ONLY_BIAS = Needs(False, False, False, True)


def launched(call, needs, run=backward.backward) -> list[str]:
    """The kernels of a backward, those of far rows aside, without running them."""
    names = []
    with mock.patch.object(attention, "run", lambda kernel, *_: names.append(kernel.__name__)):
        out, lse = torch.zeros_like(call.q), torch.zeros(call.q.shape[:3])
        run(call, out, out, lse, None, needs)
    return [name for name in names if not name.startswith("far_")]


class AllAtOnce:
    """The Triton backend with the gradient of the bias apart, so that the others come of one
    kernel; memory: what each buffer from torch is filled with, if not with NaN, which a kernel
    computes again."""

    __name__ = "the fused kernel"

    def __init__(self, memory=None, run=backward.backward):
        self.memory, self.run = memory, run
        self.available, self.unsupported = triton.available, triton.unsupported
        self.forward = triton.forward

    def backward(self, call, dout, out, lse, dlse, needs):
        empty = torch.empty

        def dirty(*args, **kwargs):
            x = empty(*args, **kwargs)
            return x.fill_(self.memory) if x.is_floating_point() else x

        with mock.patch.object(torch, "empty", dirty if self.memory else empty):
            found = self.run(call, dout, out, lse, dlse, needs._replace(bias=False))
        if needs.bias:
            found = found._replace(bias=self.run(call, dout, out, lse, dlse, ONLY_BIAS).bias)
        return found


LONG = {"seqlen_q": 70, "seqlen_k": 101}  # three tiles each way, the last of them cut
CASES = {
    "plain": {}, "causal": {"causal": True}, "batch": {"batch": 2, "heads_q": 2, "heads_k": 2},
    "window": {"window": (30, 5)}, "group": {"heads_q": 4, "heads_k": 2, "causal": True},
    "mask": {"mask": "bqk"}, "bias": {"bias": "hqk"}, "alibi": {"alibi": True, "causal": True},
    "softcap": {"softcap": 5.0}, "dropout": {"dropout_p": 0.3}, "sink": {"sink": True},
    "wide values": {"head_dim": 24, "head_dim_v": 72}, "128 columns": {"head_dim": 128},
    "packed": {"seqlens_q": [30, 0, 75, 1], "seqlens_k": [30, 40, 90, 7], "causal": True},
    "one query": {"seqlen_q": 1}, "keys past the last query": {"seqlen_q": 3, "causal": "top_left"},
    "all": {"mask": "bk", "bias": "hqk", "softcap": 5.0, "alibi": True, "sink": True,
            "dropout_p": 0.2, "window": (60, -1), "heads_q": 4, "heads_k": 2},
}  # fmt: skip


def case(name: str, dtype=torch.bfloat16):
    """The call of that name."""
    options = dict(CASES[name])
    if options.get("causal") == "top_left":
        options |= {"causal": True, "align": TOP_LEFT}
    length = {} if "seqlens_q" in options else LONG
    sizes = {"batch": 1, "heads_q": 1, "heads_k": 1, "dtype": dtype, "head_dim": 40}
    return random_call(5, **sizes | length | options)
