"""The operators of xformers.ops.fmha as callers name, ask and call them: against
`memory_efficient_attention`, which test_xformers_compat.py holds to a formula.
"""

import importlib.util
import re
import sys

import pytest
import torch

from attn_ext.integrations import xformers as xf

pytestmark = pytest.mark.skipif(
    "xformers" in sys.modules or importlib.util.find_spec("xformers") is not None,
    reason="the real xformers is installed and must win",
)


@pytest.fixture
def ops():
    """xformers.ops, which is attn_ext's."""
    assert xf.install()
    yield importlib.import_module("xformers.ops")
    xf.uninstall()


def inputs():
    return [
        torch.randn(2, rows, 3, 8, dtype=torch.float64, requires_grad=True) for rows in (6, 9, 9)
    ]


def test_names_lead_to_operators(ops):
    """A pair that cannot be unpacked, or whose passes are those of another module."""
    flash = importlib.import_module("xformers.ops.fmha.flash")
    assert ops.MemoryEfficientAttentionFlashAttentionOp == (flash.FwOp, flash.BwOp)
    mixed = ops.MemoryEfficientAttentionCutlassFwdFlashBwOp
    assert mixed == (ops.fmha.cutlass.FwOp, flash.BwOp)
    assert [op.NAME for op in mixed] == ["cutlassF@attn_ext", "fa2B@attn_ext"]
    assert ops.fmha.common.Inputs is ops.fmha.Inputs
    assert importlib.import_module("xformers.version").__version__ == xf.VERSION
    for op in mixed:
        assert issubclass(op, ops.AttentionOpBase)


def test_lists_of_operators_and_their_choice(ops):
    """Names that callers import to try every operator, or the one that xformers would take."""
    fmha, dispatch = ops.fmha, importlib.import_module("xformers.ops.fmha.dispatch")
    q, k, v = inputs()
    good, bad = fmha.Inputs(q, k, v), fmha.Inputs(q, k[0], v)
    mask = fmha.attn_bias.LowerTriangularMask
    for op in (*fmha.ALL_FW_OPS, *fmha.ALL_BW_OPS):
        assert op.supports(good) and mask in op.SUPPORTED_ATTN_BIAS_TYPES
        assert op.shape_not_supported_reasons(6, 9, 8, 24) == []
        assert "at least 1" in op.shape_not_supported_reasons(6, 9, 0, 8)[0]
    assert dispatch._dispatch_fw(good, False) in fmha.ALL_FW_OPS
    assert dispatch._dispatch_bw(good, None) in fmha.ALL_BW_OPS
    with pytest.raises(NotImplementedError, match="key must have 3, 4 or 5 dimensions"):
        dispatch._dispatch_fw(bad, True)
    before = fmha._get_use_fa3()
    fmha._set_use_fa3(not before)
    assert dispatch._get_use_fa3() is not before
    fmha._set_use_fa3(before)


def test_indexing(ops):
    """What DINOv2 imports beside fmha, by the formulas that xformers documents."""
    sources = [torch.randn(4, 3, requires_grad=True), torch.randn(5, 2, requires_grad=True)]
    picked = [torch.tensor([2, 0]), torch.tensor([4], dtype=torch.int32)]
    rows = ops.index_select_cat(sources, picked)
    wanted = torch.cat([sources[0][2], sources[0][0], sources[1][4]])
    assert rows.equal(wanted)
    rows.sum().backward()
    assert sources[0].grad.sum(1).tolist() == [3, 0, 3, 0]
    x, more, scaling = torch.randn(4, 3, 2), torch.randn(2, 3, 2), torch.randn(2)
    leaves = [t.clone().requires_grad_() for t in (more, scaling)]
    target, at = x.clone(), torch.tensor([3, 1])
    out = ops.scaled_index_add(target, at, leaves[0], leaves[1], alpha=0.5)
    assert out is target  # in place
    torch.testing.assert_close(out[at], x[at] + 0.5 * scaling * more)
    assert out[0].equal(x[0]) and out[2].equal(x[2])
    out.sum().backward()
    torch.testing.assert_close(leaves[0].grad, (0.5 * scaling).expand(2, 3, 2))
    torch.testing.assert_close(leaves[1].grad, 0.5 * more.sum((0, 1)))
    plain = ops.scaled_index_add(x.clone(), at, more)
    torch.testing.assert_close(plain[at], x[at] + more)


def test_what_they_support(ops):
    """An operator that refuses what attn_ext takes, or takes what the call then refuses; an error
    of Python's, or one that speaks of another argument."""
    q, k, v = inputs()
    fmha, (forward, _) = ops.fmha, ops.MemoryEfficientAttentionFlashAttentionOp
    assert forward.supports(fmha.Inputs(query=q, key=k, value=v, attn_bias=None))
    bad = fmha.Inputs(query=q, key=k[0], value=v)
    assert not forward.supports(bad)
    assert "key must have 3, 4 or 5 dimensions" in forward.not_supported_reasons(bad)[0]
    for name, value, text in (
        ("query", None, "query must be a torch.Tensor, got NoneType"),
        ("query", q.long(), r"query must be floating, got torch\.int64"),
        ("p", 2.0, "p must be between 0 and 1, got 2.0"),
    ):
        bad = fmha.Inputs(**(dict(query=q, key=k, value=v) | {name: value}))
        (reason,) = forward.not_supported_reasons(bad)
        assert re.match(text, reason), reason
        with pytest.raises((TypeError, ValueError), match=text):
            forward.apply(bad, False)
    with pytest.raises(NotImplementedError, match="the operators are in"):
        fmha.AttentionFwOpBase.apply(bad, False)


def test_only_a_forward_draws(ops):
    """Dropout masks that depend on whether an operator was asked, or has run its backward."""
    fmha, (forward, backward) = ops.fmha, ops.MemoryEfficientAttentionFlashAttentionOp
    case = fmha.Inputs(*inputs(), p=0.3)
    before = torch.get_rng_state()
    assert forward.supports(case) and backward.supports(case)
    assert torch.equal(torch.get_rng_state(), before)
    out, context = forward.apply(case, True)
    after = torch.get_rng_state()
    backward.apply(context, case, out)
    assert not torch.equal(after, before) and torch.equal(torch.get_rng_state(), after)


def test_what_repeats_bit_by_bit(ops):
    """A promise that the backward of some GPUs does not keep."""
    forward, backward = ops.MemoryEfficientAttentionFlashAttentionOp
    assert forward.IS_DETERMINISTIC and not backward.IS_DETERMINISTIC


def test_passes(ops):
    """A graph in the forward; gradients of another mask, of no bias, or of another layout."""
    q, k, v = inputs()
    fmha, (forward, backward) = ops.fmha, ops.MemoryEfficientAttentionCutlassOp
    bias = torch.randn(2, 3, 6, 9, dtype=torch.float64, requires_grad=True)
    causal = fmha.attn_bias.LowerTriangularFromBottomRightMask()
    blocks = fmha.attn_bias.BlockDiagonalMask.from_seqlens([2, 4], [3, 6])
    packed = [x[:1] for x in (q, k, v)]
    for case in (
        fmha.Inputs(q, k, v, bias),
        fmha.Inputs(q, k, v, p=0.4),
        fmha.Inputs(q, k, v, causal, scale=0.3),
        fmha.Inputs(*packed, blocks),
    ):
        leaves = [case.query, case.key, case.value]
        torch.manual_seed(1)
        want = xf.memory_efficient_attention(*leaves, case.attn_bias, case.p, case.scale)
        torch.manual_seed(1)
        out, context = forward.apply(case, needs_gradient=True)
        assert torch.equal(out, want) and not out.requires_grad
        assert context.get_padded_lse(32).shape == (len(out), 3, 32)
        assert forward.apply(case, needs_gradient=False)[1] is None
        grad = torch.randn_like(out)
        found = backward.apply(context, case, grad)
        leaves += [bias] if case.attn_bias is bias else []
        theirs = torch.autograd.grad(want, leaves, grad)
        for mine, other in zip((found.dq, found.dk, found.dv, found.db), theirs, strict=False):
            torch.testing.assert_close(mine, other)
        assert (found.db is None) == (case.attn_bias is not bias)
    with pytest.raises(ValueError, match="grad must have the shape"):
        backward.apply(context, case, grad[:, 1:])
    with pytest.raises(ValueError, match="ctx must have the rng_state"):
        backward.apply(context, fmha.Inputs(q, k, v, p=0.4), grad)
