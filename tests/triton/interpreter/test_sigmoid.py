"""normalizer="sigmoid" by the Triton kernels, interpreted, against the float64 reference.

Tiles are 32 x 32 under the interpreter: lengths around 32 and 64 are the edges.
"""

import pytest
import torch
import triton
from closeness import FLOAT32, assert_close

import attn_ext
from attn_ext.core.problem import Problem
from attn_ext.testing import check_call, random_call


def sigmoid_call(seed=5, shift=None, **options):
    """random_call with sigmoid weights; `sigmoid_bias` is `shift`."""
    call = random_call(seed, **options)
    return call._replace(normalizer="sigmoid", sigmoid_bias=shift)


# name -> random_call's options: what each would catch
CASES = {
    "one of everything": {"seqlen_q": 1, "head_dim": 1},
    "last tiles hold one row": {"seqlen_q": 33, "seqlen_k": 65, "head_dim": 24, "head_dim_v": 40},
    "padded rows past the last query": {"seqlen_q": 3, "seqlen_k": 40, "layout": "padded"},
    "grouped heads, causal": {"heads_q": 4, "heads_k": 2, "seqlen_q": 70, "causal": True},
    "window with tiles that are not cut": {"seqlen_q": 97, "seqlen_k": 130, "window": (70, 5)},
    "empty rows": {"seqlen_q": 60, "seqlen_k": 50, "window": (3, 2), "align": 0},
    "many keys, few queries: no split": {"seqlen_q": 2, "seqlen_k": 600, "batch": 1},
    "mask and bias": {"seqlen_q": 40, "seqlen_k": 70, "mask": "bhqk", "bias": "bhqk"},
    "shared dbias": {"heads_q": 4, "heads_k": 2, "seqlen_q": 40, "bias": "qk"},
    "deterministic dbias": {"seqlen_q": 40, "seqlen_k": 70, "bias": "hq", "deterministic": True},
    "softcap": {"seqlen_q": 33, "softcap": 1.5, "mask": "k"},
    "alibi": {"seqlen_q": 33, "seqlen_k": 40, "alibi": "b"},
    "dropout": {"seqlen_q": 33, "seqlen_k": 70, "dropout_p": 0.3},
    "no keys": {"seqlen_q": 5, "seqlen_k": 0},
    "no queries": {"seqlen_q": 0, "seqlen_k": 5},
    "varlen": {"seqlens_q": [5, 0, 33], "seqlens_k": [40, 7, 70], "bias": "bhqk"},
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    """The shift of another length, softmax's sums, P of rows and keys that do not exist."""
    check_call(sigmoid_call(**{"batch": 1, **CASES[name]}), "triton", dlse=False)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("shift", [0.0, -1.5])
def test_the_shift_is_the_callers(softcap, shift):
    """A sigmoid_bias that is dropped (0 is not None), or multiplied by a scale."""
    call = sigmoid_call(shift=shift, softcap=softcap, seqlen_q=20, seqlen_k=40, scale=0.7)
    check_call(call, "triton", dlse=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["last tiles hold one row", "mask and bias", "varlen"])
def test_half_precision(name, dtype):
    """A weight that is rounded before it is used in a product with another dtype."""
    check_call(sigmoid_call(dtype=dtype, **{"batch": 1, **CASES[name]}), "triton", dlse=False)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_bad_values_behind_a_mask(value):
    """0 * NaN of an excluded key, in O or a gradient."""
    call = sigmoid_call(7, batch=1, seqlen_q=34, mask="bk", bias="hk", dropout_p=0.2)
    call.mask[..., 4] = False
    call.bias[..., 9] = -torch.inf
    for tensor in (call.k, call.v):
        tensor[:, :, 4] = tensor[:, :, 9] = value
    check_call(call, "triton", dlse=False)


@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_nan_reaches_who_sees_it(where):
    """A NaN that the sigmoid, or a skipped tile, hides."""
    call = sigmoid_call(7, seqlen_q=40, causal=True, batch=1)
    getattr(call, where)[:, :, 19] = torch.nan
    check_call(call, "triton", dlse=False)


def test_the_public_function_takes_it():
    """A backend that is not offered, or whose gradients do not flow."""
    q, k, v = torch.randn(3, 1, 2, 33, 16, requires_grad=True)
    out = attn_ext.attention(q, k, v, causal=True, normalizer="sigmoid", backend="triton")
    want = attn_ext.attention(q, k, v, causal=True, normalizer="sigmoid", backend="reference")
    seed = torch.randn_like(out)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), seed) for o in (out, want)), strict=True):
        assert_close(a, b, FLOAT32)


def test_a_cache_is_refused():
    """A decode kernel that joins parts of sigmoid weights by an LSE that they do not have."""
    problem = Problem.of(sigmoid_call(cache_seqlens=[3, 4]))
    (why,) = attn_ext.backends.registry.get("triton").unsupported(problem)
    assert "no decode kernel" in why
    assert triton.knobs.runtime.interpret
