"""attention(..., normalizer="sigmoid"): the kernels against the reference on every feature and ISA;
refusals; torch integration.
"""

import pytest
import torch
from torch.library import opcheck

import attn_ext
from attn_ext.backends import registry
from attn_ext.testing import check_call, random_call

# name -> random_call's options: what each would catch
CASES = {
    "one of everything": {"seqlen_q": 1, "head_dim": 1},
    "odd sizes: every tail": {"seqlen_q": 77, "seqlen_k": 131, "head_dim": 7, "head_dim_v": 5},
    "several query tiles": {"seqlen_q": 260, "seqlen_k": 130, "head_dim": 33, "batch": 1},
    "grouped heads, causal": {"heads_q": 4, "heads_k": 2, "seqlen_q": 70, "causal": True},
    "window": {"seqlen_q": 150, "seqlen_k": 190, "window": (20, 9)},
    "empty rows": {"seqlen_q": 60, "seqlen_k": 50, "window": (3, 2), "align": 0},
    "mask and bias": {"seqlen_q": 40, "seqlen_k": 90, "mask": "bhqk", "bias": "bhqk"},
    "bias broadcast over keys and batch": {"seqlen_q": 40, "seqlen_k": 150, "bias": "hq"},
    "bias broadcast over heads": {"heads_q": 4, "heads_k": 2, "seqlen_q": 80, "bias": "qk"},
    "softcap": {"seqlen_q": 33, "softcap": 1.5, "mask": "k"},
    "alibi": {"seqlen_q": 33, "seqlen_k": 40, "alibi": "b"},
    "dropout": {"seqlen_q": 33, "seqlen_k": 70, "dropout_p": 0.3},
    "no keys": {"seqlen_q": 5, "seqlen_k": 0},
    "no queries": {"seqlen_q": 0, "seqlen_k": 5},
    "varlen": {"seqlens_q": [5, 0, 33], "seqlens_k": [40, 7, 70], "bias": "bhqk"},
    "padded storage": {"seqlen_q": 33, "layout": "padded", "mask": "qk"},
}
SHORT = ("odd sizes: every tail", "mask and bias", "varlen")


def call_of(name, dtype=torch.float32, bias=None):
    """The case's call with sigmoid weights."""
    call = random_call(5, dtype=dtype, **CASES[name])
    return call._replace(normalizer="sigmoid", sigmoid_bias=bias)


@pytest.mark.parametrize("name", CASES)
def test_cases(name, isa):
    """Wrong tails, features, reductions of dbias; memory that is not written."""
    check_call(call_of(name), "cpu", dlse=False)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype, isa):
    """Conversions of halves, the double kernel."""
    check_call(call_of(name, dtype), "cpu", dlse=False)


@pytest.mark.parametrize("bias", [0.0, -200.0, 150.0])
def test_bias(bias, isa):
    """exp(-x) that overflows to NaN where the weight is 0 or 1; a bias that is ignored."""
    check_call(call_of("odd sizes: every tail", bias=bias), "cpu", dlse=False)


def test_formula():
    """The reference itself: weights sigmoid(s - ln Sk), not normalised."""
    q, k, v = (torch.randn(2, 2, 6, 8, dtype=torch.float64) for _ in range(3))
    s = q @ k.transpose(-1, -2) / 8**0.5 - torch.tensor(6.0).double().log()
    visible = torch.ones(6, 6, dtype=torch.bool).tril()
    want = (torch.sigmoid(s) * visible) @ v
    got = attn_ext.attention(q, k, v, causal=True, normalizer="sigmoid")
    torch.testing.assert_close(got, want)
    with_bias = attn_ext.attention(q, k, v, normalizer="sigmoid", sigmoid_bias=0.5)
    s = q @ k.transpose(-1, -2) / 8**0.5 + 0.5
    torch.testing.assert_close(with_bias, torch.sigmoid(s) @ v)


def test_varlen_equals_each_sequence():
    """-ln of the packed total instead of the sequence's own length."""
    q, k, v = (torch.randn(30, 2, 8) for _ in range(3))
    cu = torch.tensor([0, 11, 30], dtype=torch.int32)
    got = attn_ext.attention_varlen(q, k, v, cu, cu, normalizer="sigmoid")
    for rows in (slice(0, 11), slice(11, 30)):
        parts = (x[rows].transpose(0, 1)[None] for x in (q, k, v))
        want = attn_ext.attention(*parts, normalizer="sigmoid")
        torch.testing.assert_close(got[rows], want[0].transpose(0, 1))


def test_opcheck_and_compile():
    """A schema without the new fields, a graph break."""
    q, k, v = (torch.randn(1, 2, 9, 8, requires_grad=True) for _ in range(3))
    args = attn_ext.functional.dense.dense_call(q, k, v, causal=True, normalizer="sigmoid")
    opcheck(torch.ops.attn_ext.forward.default, tuple(args))
    torch.compiler.reset()

    def loss(q):
        return attn_ext.attention(q, k, v, normalizer="sigmoid", sigmoid_bias=-1.0).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (want,) = torch.autograd.grad(loss(q), q)
    (got,) = torch.autograd.grad(compiled(q), q)
    torch.testing.assert_close(got, want)


def test_backends_refuse_what_they_do_not_name():
    """A softmax kernel that serves a sigmoid call and is silently wrong."""
    problem = attn_ext.explain(*(torch.randn(1, 1, 4, 8),) * 3, normalizer="sigmoid").problem
    assert problem.normalizer == "sigmoid"

    class SoftmaxOnly:
        available = staticmethod(lambda: "")
        unsupported = staticmethod(lambda problem: [])

    get = registry.get
    try:
        registry.get = lambda name: SoftmaxOnly
        (why,) = registry.reasons("any", problem)
    finally:
        registry.get = get
    assert why == "normalizer must be 'softmax', got 'sigmoid'"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"normalizer": "relu"}, ValueError, "normalizer must be 'softmax' or 'sigmoid'"),
        ({"normalizer": 3}, TypeError, "normalizer must be a str, got int 3"),
        ({"sigmoid_bias": 1.0}, ValueError, "sigmoid_bias must be None unless"),
        ({"normalizer": "sigmoid", "sigmoid_bias": float("nan")}, ValueError, "finite, got nan"),
        ({"normalizer": "sigmoid", "return_lse": True}, ValueError, "return_lse must be False"),
        ({"normalizer": "sigmoid", "return_stats": True}, ValueError, "return_stats must be"),
        ({"normalizer": "sigmoid", "sink": torch.zeros(1)}, ValueError, "sink must be None"),
    ],
)
def test_bad_input(options, error, message):
    """An option that sigmoid has no meaning for, taken in silence."""
    x = torch.randn(1, 1, 4, 8)
    with pytest.raises(error, match=message):
        attn_ext.attention(x, x, x, **options)
