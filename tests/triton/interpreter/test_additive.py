"""Additive attention by the Triton kernels, interpreted, against the float64 reference.

Tiles are 32 x 32 under the interpreter: lengths around 32 and 64 are the edges.
"""

import pytest
import torch
from additive_checks import check, check_call
from closeness import FLOAT32, assert_close
from nonfinite_cases import (
    ADDITIVE_OPTIONS,
    ADDITIVE_WEIGHTS,
    check_additive_weight,
    check_emptied_additive_rows,
)

import attn_ext
from attn_ext.core.problem import Problem
from attn_ext.testing import random_call

# name -> random_call's options: what each would catch
CASES = {
    "one of everything": {"seqlen_q": 1, "head_dim": 1},
    "last tiles hold one row": {"seqlen_q": 33, "seqlen_k": 65, "head_dim": 7, "head_dim_v": 5},
    "Dv wider than D": {"seqlen_q": 20, "seqlen_k": 40, "head_dim": 16, "head_dim_v": 50},
    "grouped heads": {"batch": 2, "heads_q": 4, "heads_k": 2, "seqlen_q": 40},
    "causal": {"seqlen_q": 70, "causal": True},
    "window over a band": {"seqlen_q": 70, "seqlen_k": 130, "heads_q": 1, "window": (20, 9)},
    "top-left, empty rows": {"seqlen_q": 60, "seqlen_k": 50, "window": (3, 2), "align": 0},
    "mask": {"seqlen_q": 40, "seqlen_k": 70, "mask": "bhqk"},
    "mask with empty rows": {"seqlen_q": 40, "seqlen_k": 3, "mask": "qk"},
    "bias": {"seqlen_q": 40, "seqlen_k": 50, "bias": "bhqk"},
    "shared dbias": {"seqlen_q": 40, "heads_q": 4, "heads_k": 2, "bias": "qk"},
    "bias of one query": {"seqlen_q": 40, "bias": "bk"},
    "dropout": {"seqlen_q": 33, "seqlen_k": 70, "dropout_p": 0.3},
    "lengths": {"seqlen_q": 30, "seqlen_k": 80, "cache_seqlens": [80, 0, 33]},
    "no keys": {"seqlen_q": 5, "seqlen_k": 0},
    "no queries": {"seqlen_q": 0, "seqlen_k": 5},
    "varlen with an empty sequence": {"seqlens_q": [5, 0, 33], "seqlens_k": [40, 7, 34]},
    "varlen, causal, bias": {"seqlens_q": [9, 34], "causal": True, "bias": "hqk", "mask": "bqk"},
    "padded storage": {"seqlen_q": 33, "layout": "padded", "mask": "qk", "head_dim": 5},
    "swapped storage": {"seqlen_q": 33, "layout": "bshd"},
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    """Wrong tails, columns of another head, gradients; memory that is not written."""
    check({"batch": 1, "head_dim": 3, **CASES[name]}, torch.float32, "triton")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["last tiles hold one row", "bias", "lengths"])
def test_half_precision(name, dtype):
    """tanh of a sum that was rounded to half precision, or sums kept in it."""
    check({"batch": 1, "head_dim": 4, **CASES[name]}, dtype, "triton")


@pytest.mark.parametrize("spread", [5.0, 100.0])
def test_large_arguments(spread):
    """exp(2 (q + k)) that overflows: inf / inf, or a gradient of 0 * inf."""
    check(CASES["last tiles hold one row"], torch.float32, "triton", spread=spread)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_behind_a_mask(value):
    """0 * NaN of an excluded key in O, dQ, dw or dbias."""
    call = random_call(7, seqlen_q=40, mask="bk", bias="hk", dropout_p=0.2, head_dim=3)
    call.mask[..., 4] = False
    call.bias[..., 9] = -torch.inf
    for tensor in (call.k, call.v):
        tensor[:, :, 4] = tensor[:, :, 9] = value
    check_call(call, "triton")


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_reaches_who_sees_it(where):
    """A NaN that is lost in a maximum, or that reaches rows which do not see it."""
    call = random_call(7, seqlen_q=40, causal=True, batch=1, head_dim=3)
    getattr(call, where)[:, :, 19] = torch.nan
    check_call(call, "triton")


@pytest.mark.parametrize("weight", ADDITIVE_WEIGHTS, ids=str)
@pytest.mark.parametrize("options", ADDITIVE_OPTIONS, ids=str)
def test_weights_that_are_not_small(weight, options):
    """0 * inf in dQ and dK of a pair whose logit is -inf; 4 w that overflows before what it
    multiplies makes it small."""
    check_additive_weight("triton", weight, seqlen_q=35, head_dim=4, **options)


@pytest.mark.parametrize("seqlen", [5, 33])
def test_rows_that_an_infinite_weight_empties(seqlen):
    """The padding of a tile of queries or keys: NaN in gradients of rows that are empty."""
    check_emptied_additive_rows("triton", seqlen, head_dim=4)


def test_the_public_function_and_its_gradients():
    """Dispatch that refuses, or a gradient of b, bias or LSE that does not flow."""
    q, k, v = torch.randn(3, 1, 2, 33, 8, requires_grad=True)
    w, b = torch.randn(2, 8, requires_grad=True)
    bias = torch.randn(33, 33, requires_grad=True)
    leaves, found = (q, k, v, w, b, bias), []
    for backend in ("triton", "reference"):
        out, lse = attn_ext.additive_attention(
            q, k, v, w, b=b, bias=bias, causal=True, return_lse=True, backend=backend
        )
        loss = out.square().sum() + lse.sum()
        found.append((out, *torch.autograd.grad(loss, leaves)))
    for a, c in zip(*found, strict=True):
        assert_close(a, c, FLOAT32)


def test_auto_never_interprets():
    """A call that gets a thousand times slower because a variable is set."""
    from attn_ext.backends import registry

    call = random_call(additive=True)
    assert registry.select("auto", Problem.of(call)) == "cpu"
    reasons = registry.reasons("triton", Problem.of(random_call(additive=True, head_dim=257)))
    assert any("at most 256" in why for why in reasons), reasons
