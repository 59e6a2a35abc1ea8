"""Additive attention: each backend against the reference in float64 under the tolerance rule, on
every ISA; torch integration; memory; bad input.
"""

import high_water
import pytest
import torch
from additive_checks import check
from closeness import FLOAT32, assert_close
from torch.library import opcheck

import attn_ext
from attn_ext.testing import random_call

# name -> random_call's options: what each would catch
CASES = {
    "one of everything": {"seqlen_q": 1, "head_dim": 1},
    "odd sizes: every tail": {"seqlen_q": 77, "seqlen_k": 131, "head_dim": 7, "head_dim_v": 5},
    "several query tiles": {"seqlen_q": 260, "seqlen_k": 130, "head_dim": 33, "batch": 1},
    "one query, many keys": {"seqlen_q": 1, "seqlen_k": 700, "head_dim": 24},
    "grouped heads": {"heads_q": 4, "heads_k": 2, "seqlen_q": 40},
    "causal": {"seqlen_q": 70, "causal": True},
    "window over a long band": {"seqlen_q": 150, "seqlen_k": 190, "window": (20, 9)},
    "top-left, empty rows": {"seqlen_q": 60, "seqlen_k": 50, "window": (3, 2), "align": 0},
    "mask": {"seqlen_q": 40, "seqlen_k": 90, "mask": "bhqk"},
    "mask broadcast over queries": {"seqlen_q": 40, "mask": "bk"},
    "lengths": {"seqlen_q": 30, "seqlen_k": 80, "cache_seqlens": [80, 0, 33]},
    "lengths, causal": {"seqlen_q": 5, "seqlen_k": 80, "cache_seqlens": [80, 3], "causal": True},
    "lengths of nothing": {"seqlen_q": 40, "seqlen_k": 17, "cache_seqlens": [0], "dropout_p": 0.1},
    "no keys": {"seqlen_q": 5, "seqlen_k": 0},
    "no queries": {"seqlen_q": 0, "seqlen_k": 5},
    "varlen with an empty sequence": {"seqlens_q": [5, 0, 33], "seqlens_k": [40, 7, 70]},
    "varlen, causal and mask": {"seqlens_q": [9, 30], "causal": True, "mask": "bhqk"},
    "bias": {"seqlen_q": 40, "seqlen_k": 90, "bias": "bhqk", "mask": "k"},
    "bias broadcast over batch and heads": {"seqlen_q": 40, "heads_q": 4, "bias": "qk"},
    "bias broadcast over keys": {"seqlen_q": 40, "seqlen_k": 150, "bias": "hq"},
    "dropout": {"seqlen_q": 33, "seqlen_k": 70, "dropout_p": 0.3},
    "dropout, everything dropped": {"seqlen_q": 9, "dropout_p": 1.0},
    "varlen, bias and dropout": {"seqlens_q": [9, 30], "bias": "hqk", "dropout_p": 0.2},
    "padded storage": {"seqlen_q": 33, "layout": "padded", "mask": "qk"},
    "swapped storage": {"seqlen_q": 33, "layout": "bshd"},
}
SHORT = ("odd sizes: every tail", "grouped heads", "varlen with an empty sequence", "lengths",
         "bias")  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_cases(name, isa):
    """Wrong tails, windows, lengths, gradients; memory that is not written."""
    check(CASES[name], torch.float32)


@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(name, dtype, isa):
    """Conversions of halves, the double kernel."""
    check(CASES[name], dtype)


@pytest.mark.parametrize("spread", [5.0, 60.0])
def test_large_arguments(spread, isa):
    """Overflow of exp(2q) exp(2k): both ways to tanh in one call."""
    check(CASES["odd sizes: every tail"], torch.float32, spread=spread)


def test_nan_stays_where_it_is_visible(isa):
    """0 * NaN of an excluded key, or a NaN query, spoiling other rows."""
    q, k, v = (torch.randn(1, 1, 40, 8) for _ in range(3))
    k[0, 0, 3] = torch.nan
    v[0, 0, 3] = torch.inf
    q[0, 0, 7] = torch.nan
    mask = torch.ones(40, dtype=torch.bool)
    mask[3] = False
    leaves = [x.requires_grad_() for x in (q, k, v, torch.randn(8))]
    out = attn_ext.additive_attention(*leaves, mask=mask)
    dq, dk, dv, _ = torch.autograd.grad(out[0, 0, 8:].sum(), leaves)
    assert torch.isnan(out[0, 0, 7]).all()
    others = torch.arange(40) != 7
    assert torch.isfinite(out[0, 0, others]).all()
    assert torch.isfinite(dq[0, 0, others]).all()
    assert (dk[0, 0, 3] == 0).all() and (dv[0, 0, 3] == 0).all()


def naive(q, k, v, w, b):
    """The formula as it stands."""
    s = (torch.tanh(q.unsqueeze(3) + k.unsqueeze(2) + b) * w).sum(-1)
    return s.softmax(-1) @ v


def test_gradients_reach_w_and_b():
    """b left out of the gradient; w of one head given to all."""
    q, k, v = (torch.randn(2, 3, 9, 5, dtype=torch.float64) for _ in range(3))
    w, b = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, w, b)]
    ours = attn_ext.additive_attention(q, k, v, w, b=b)
    theirs = naive(q, k, v, w[:, None, None], b[:, None, None])
    seed = torch.randn_like(ours)
    for got, want in zip(
        *(torch.autograd.grad(o, leaves, seed) for o in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_gradcheck():
    """A gradient that is not the derivative of the forward pass, through LSE too."""
    q, k, v = (torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def run(*leaves):
        return attn_ext.additive_attention(*leaves, causal=True, return_lse=True)

    assert torch.autograd.gradcheck(run, (q, k, v, w))


def test_opcheck():
    """Schema, fakes and autograd registration that disagree."""
    call = random_call(seqlen_q=9, mask="bk", bias="hqk", dtype=torch.float32)
    call.q.requires_grad_(), call.bias.requires_grad_()
    call = call._replace(w=torch.randn(2, 16, requires_grad=True), scale=1.0, grad=True)
    opcheck(torch.ops.attn_ext.forward.default, tuple(call))


def test_compile():
    """A graph break, or strides that the fake did not promise."""
    torch.compiler.reset()
    q = torch.randn(2, 12, 3, 8).transpose(1, 2).requires_grad_()
    k, v, w = torch.randn(2, 3, 12, 8), torch.randn(2, 3, 12, 8), torch.randn(8)

    def loss(q):
        return attn_ext.additive_attention(q, k, v, w, causal=True).square().sum()

    (eager,) = torch.autograd.grad(loss(q), q)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(q), q)
    torch.testing.assert_close(got, eager)


def test_reference_backend_has_gradients_inside_the_operator():
    """Silent zeros: the dispatcher switches autograd off inside an operator."""
    q, k, v = (torch.randn(1, 1, 6, 4, requires_grad=True) for _ in range(3))
    out = attn_ext.additive_attention(q, k, v, torch.randn(4), backend="reference")
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), (q, k, v)))
    args = attn_ext.functional.dense.dense_call(q, k, v, backend="reference")
    out = torch.ops.attn_ext.forward(*args)[0]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(out.square().sum(), (q, k, v)))


def test_double_backward_refuses():
    """A silent wrong second derivative."""
    q = torch.randn(1, 1, 6, 4, requires_grad=True)
    out = attn_ext.additive_attention(q, q, q, torch.randn(4))
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


def test_threads_do_not_change_the_result():
    """An order of sums that depends on the number of threads."""
    q, k, v = (torch.randn(1, 2, 300, 16, requires_grad=True) for _ in range(3))
    w, found = torch.randn(16, requires_grad=True), []
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out = attn_ext.additive_attention(q, k, v, w)
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v, w))))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_vmap():
    """A mapped dimension that is folded where it must not be: per-example w, dropout, lengths."""
    q, k, v = (torch.randn(3, 2, 2, 9, 8) for _ in range(3))
    w, bias = torch.randn(3, 8), torch.randn(3, 1, 2, 9, 9)
    mask = torch.rand(9, 9) < 0.7

    def run(q, k, v, w, bias):
        return attn_ext.additive_attention(q, k, v, w, bias=bias, mask=mask)

    for dims, shared in (((0, 0, 0, 0, 0), w), ((0, 0, 0, None, 0), w[0]), ((0, None, 0, 0, 0), w)):
        keys = k if dims[1] is not None else k[0]
        got = torch.func.vmap(run, in_dims=dims)(q, keys, v, shared, bias)
        for n in range(3):
            one = (shared[n] if dims[3] is not None else shared), bias[n]
            want = run(q[n], k[n] if dims[1] is not None else k[0], v[n], *one)
            torch.testing.assert_close(got[n], want)

    def loss(w, bias, q):
        return run(q, k[0], v[0], w, bias).square().sum()

    got = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(w, bias, q)
    for n in range(3):
        leaves = [x[n].clone().requires_grad_() for x in (w, bias, q)]
        want = torch.autograd.grad(loss(*leaves), leaves)
        for a, b in zip(got, want, strict=True):
            assert_close(a[n], b, FLOAT32)


def test_dropout_is_that_of_attention_and_changes_with_the_seed():
    """Another mask than `attention` draws from the same seed; a mask that is always the same."""
    q, v, w = torch.zeros(1, 2, 40, 8), torch.eye(40).expand(1, 2, 40, 40), torch.zeros(8)

    def kept(function, *args):
        torch.manual_seed(3)
        return [function(q, q, v, *args, dropout_p=0.4) > 0 for _ in range(2)]

    ours, theirs = kept(attn_ext.additive_attention, w), kept(attn_ext.attention)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(*ours)


MEMORY = """
import torch, attn_ext
torch.set_num_threads(1)
q, k, v = (torch.randn(1, 1, 4096, 32, requires_grad=True) for _ in range(3))
w = torch.randn(32, requires_grad=True)
attn_ext.additive_attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], w).sum().backward()
before = high_water()
attn_ext.additive_attention(q, k, v, w).sum().backward()
"""


def test_memory():
    """Anything of size S x S (64 MiB here) or S x S x D (2048 MiB)."""
    assert high_water.grown_mib(MEMORY) < 30


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w": torch.zeros(5)}, ValueError, r"w must have shape \(4,\) or \(2, 4\), got \(5,\)"),
        ({"w": torch.zeros(4, dtype=torch.int64)}, TypeError, "w must be floating, got"),
        ({"w": None}, TypeError, "w must be a torch.Tensor, got NoneType None"),
        ({"b": torch.zeros(3, 4)}, ValueError, "b must have shape"),
        ({"lengths": torch.tensor([3, 99], dtype=torch.int32)}, ValueError, "got 99 at 1"),
        ({"lengths": torch.tensor([3])}, TypeError, "lengths must be int32"),
        ({"bias": torch.zeros(3, 6)}, ValueError, "bias must be broadcastable"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be"),
        ({"backend": "cuda"}, NotImplementedError, "additive attention has no cuda kernel"),
        ({"causal": "yes"}, ValueError, "causal must be one of"),
        ({"backend": "gpu"}, ValueError, "backend must be 'auto' or one of"),
        ({"k": torch.zeros(2, 2, 6, 3)}, ValueError, "k must have q's head_dim 4, got 3"),
    ],
)
def test_bad_input(change, error, message):
    """A crash, or an error that does not name argument, rule and value."""
    given = {name: torch.zeros(2, 2, 6, 4) for name in "qkv"} | {"w": torch.zeros(4)} | change
    q, k, v, w = (given.pop(name) for name in ("q", "k", "v", "w"))
    with pytest.raises(error, match=message):
        attn_ext.additive_attention(q, k, v, w, **given)
