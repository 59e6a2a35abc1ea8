"""The CPU backend's Python half: what a pointer means before it leaves Python."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from attn_ext import _C, attention
from attn_ext.core.layout import empty_like_layout
from attn_ext.ops import fast

FEATURES = ["plain", "bias", "sink"]


def _inputs(feature: str):
    """q, k, v [1, 2, 20, 8] and the named side input, all requiring a gradient."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 2, 20, 8, requires_grad=True) for _ in range(3)]
    if feature == "bias":
        leaves.append(torch.randn(1, 2, 20, 20, requires_grad=True))
    if feature == "sink":
        leaves.append(torch.randn(2, requires_grad=True))
    return leaves, {feature: leaves[3]} if len(leaves) > 3 else {}


@pytest.mark.parametrize("feature", FEATURES)
def test_default_device_does_not_move_outputs(feature):
    """Outputs allocated on torch's default device: the kernel wrote through a null pointer."""
    leaves, side = _inputs(feature)

    def results():
        with torch.no_grad():
            plain, lse = attention(*leaves[:3], **side, return_lse=True)
        out = attention(*leaves[:3], **side)
        return [plain, lse, out, *torch.autograd.grad(out.square().sum(), leaves)]

    with torch.device("meta"):  # also what nothing remembered yet must survive
        first = results()
    for a, b in zip(first, results(), strict=True):
        assert a.device.type == "cpu"
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["q", "k", "v", "bias", "sink"])
def test_negative_views_are_resolved(name):
    """The memory of a view with the negative bit, which holds the values with the other sign."""
    leaves, side = _inputs(name if name in FEATURES else "plain")
    call = dict(zip("qkv", (x.detach() for x in leaves), strict=False))
    call |= {n: x.detach() for n, x in side.items()}
    attention(**call)  # remembered, had it the same key
    negative = {**call, name: torch._neg_view(call[name])}
    wanted = {**call, name: -call[name]}
    assert negative[name].is_neg()
    assert torch.equal(attention(**negative), attention(**wanted))


def test_negative_view_of_the_gradient_is_resolved():
    """The same for dO, which autograd hands on as it is."""
    leaves, _ = _inputs("plain")
    dout = torch.randn(1, 2, 20, 8)
    grads = [
        torch.autograd.grad(attention(*leaves), leaves, g) for g in (torch._neg_view(dout), -dout)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("isa", _C.supported_isas())
@pytest.mark.parametrize("layout", ["expanded", "heads inside", "sliced", "one head", "one query"])
def test_remembered_call_keeps_strides_apart(isa, layout):
    """A plan of the plain path used for tensors of the same shape but other strides."""
    torch.manual_seed(1)
    heads, sq = (1 if layout == "one head" else 2), (1 if layout == "one query" else 20)
    shape = (2, heads, sq, 8)
    q = {
        "expanded": lambda: torch.randn(1, 1, 1, 8).expand(shape),
        "heads inside": lambda: torch.randn(2, sq, heads, 8).transpose(1, 2),
        "sliced": lambda: torch.randn(2, heads, sq, 19)[..., 3:11],
        "one head": lambda: torch.randn(2, sq, heads, 8).transpose(1, 2),
        "one query": lambda: torch.randn(2, sq, heads, 8).transpose(1, 2),
    }[layout]()
    k, v = torch.randn(2, 2, 2, heads, 33, 8)[:, 0]
    _C.set_isa(isa)
    try:
        contiguous = attention(q.contiguous(), k, v)
        for _ in range(2):  # made, then remembered
            assert torch.equal(attention(q, k, v), contiguous)
            assert torch.equal(attention(q.contiguous(), k, v), contiguous)
    finally:
        _C.set_isa("")
    assert contiguous.shape == shape
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(contiguous, expected)


@pytest.mark.parametrize("wanted", ["v", "kv", "q", "qkv"])  # the plan of fewer first
def test_remembered_gradient_keeps_calls_apart(wanted):
    """A plan of the plain backward used for another layout of an input or of dO, another scale,
    window or dtype, another set of gradients, or where LSE has a gradient too.
    """
    torch.manual_seed(2)
    shape = (2, 3, 20, 8)
    inside = [torch.randn(2, 20, 3, 8).transpose(1, 2) for _ in range(4)]
    calls = [
        (x, dict(scale=scale, window=window, return_lse=lse))
        for x in (inside, [t.contiguous() for t in inside], [t.double() for t in inside])
        for scale, window in ((None, (None, None)), (2.0, (None, None)), (None, (3, 0)))
        for lse in (False, True)
    ]

    def gradients(tensors, dout, options, **backend):
        named = zip("qkv", tensors, strict=True)
        leaves = [t.detach().requires_grad_(name in wanted) for name, t in named]
        out = attention(*leaves, **options, **backend)
        outs = out if options["return_lse"] else (out,)
        douts = (dout, torch.ones_like(outs[1])) if options["return_lse"] else (dout,)
        return torch.autograd.grad(outs, [t for t in leaves if t.requires_grad], douts)

    for _ in range(2):  # made, then remembered
        for (*tensors, dout), options in calls:
            for g in (dout, dout.contiguous(), dout[..., :1].expand(shape)):
                expected = gradients(tensors, g, options, backend="reference")
                for x, a, b in zip(wanted, gradients(tensors, g, options), expected, strict=True):
                    torch.testing.assert_close(a, b, msg=lambda m, x=x: f"d{x}: {m}")
                    assert a.stride() == tensors["qkv".index(x)].stride()


def test_remembered_call_with_a_gradient_does_all_that_the_first_does():
    """What a call loses by running from one lookup: guards of its inputs, refusals, batched and
    checkpointed gradients, the state of no_grad.
    """
    q = torch.randn(1, 2, 5, 4, requires_grad=True)
    k, v = torch.randn(2, 1, 2, 5, 4)
    fast._known.clear()
    first, seeds = attention(q, k, v), torch.randn(3, 1, 2, 5, 4)
    want = [torch.autograd.grad(first, q, seed, retain_graph=True)[0] for seed in seeds]
    out = attention(q, k, v)
    assert torch.equal(out, first) and type(out.grad_fn) is not type(first.grad_fn)
    together = torch.autograd.grad(out, q, seeds, is_grads_batched=True, retain_graph=True)[0]
    torch.testing.assert_close(together, torch.stack(want))
    for reentrant in (False, True):
        q.grad = None
        again = torch.utils.checkpoint.checkpoint(attention, q, k, v, use_reentrant=reentrant)
        again.backward(seeds[0])
        assert torch.equal(q.grad, want[0])
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
    x = q * 1.0
    attention(x, k, v)
    spoilt = attention(x, k, v)
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        spoilt.sum().backward()


def test_strides_of_dimensions_with_one_element():
    """Strides other than those that fakes promise, which a compiled graph corrects by a copy."""
    q = torch.randn(70, 100)[:, :16].as_strided((1, 1, 70, 16), (7, 3, 100, 1))
    for _ in range(2):  # made, then remembered
        assert attention(q, q, q).stride() == empty_like_layout(q, 16).stride()
