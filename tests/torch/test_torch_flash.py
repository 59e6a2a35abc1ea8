"""torch.nn.attention.activate_flash_attention_impl("attn_ext"): torch's flash operators on ours.

torch's own attention, in float64 where it has it, is the truth.  The operators that torch calls on
GPUs are called here with CPU tensors, where torch has no kernel for them: their Python is the same
for both; F.scaled_dot_product_attention reaching them on a GPU is tried on GPUs only.
"""

import pytest
import torch
import torch.nn.functional as F
from closeness import LSE, assert_close
from torch.utils.checkpoint import checkpoint

import attn_ext
from attn_ext.integrations import torch_flash

pytestmark = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"),
    reason="this torch has no registry of flash attention implementations (2.13 has)",
)


@pytest.fixture
def calls(monkeypatch):
    """attn_ext active as torch's flash attention; the calls that its kernels got."""
    seen = []

    def noted(name, own):
        def function(*args):
            seen.append(name)
            return own(*args)

        return function

    for name in ("_forward", "_backward"):
        monkeypatch.setattr(torch_flash, name, noted(name, getattr(torch_flash, name)))
    torch.nn.attention.activate_flash_attention_impl("attn_ext")
    yield seen
    torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)


def outcome(function, *shapes, dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(3)
    leaves = [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]
    out = function(*leaves, **options)
    return [out, *torch.autograd.grad(out.square().sum(), leaves)]


def test_offered_and_not_active():
    """An import that changes what torch computes, or that torch does not see."""
    assert "attn_ext" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_gradients_are_those_of_a_whole_call(calls):
    """The way of ring attention's parts in the backward of whole calls, which has more error and
    costs small calls several times as long: other bits than those of `attn_ext.attention`."""
    shapes, dtype = ((1, 2, 16, 32),) * 3, torch.float32
    found = outcome(F.scaled_dot_product_attention, *shapes, dtype=dtype)
    assert calls == ["_forward", "_backward"]
    for got, want in zip(found, outcome(attn_ext.attention, *shapes, dtype=dtype), strict=True):
        assert torch.equal(got, want)


def test_active_and_restored(calls):
    """A switch that stays on, or warns of what it was asked for."""
    assert torch.nn.attention.current_flash_attention_impl() == "attn_ext"
    outcome(F.scaled_dot_product_attention, *((1, 2, 5, 8),) * 3)
    assert calls == ["_forward", "_backward"]
    torch.nn.attention.restore_flash_attention_impl()
    outcome(F.scaled_dot_product_attention, *((1, 2, 5, 8),) * 3)
    assert len(calls) == 2
    torch.nn.attention.activate_flash_attention_impl("attn_ext")
    outcome(F.scaled_dot_product_attention, *((1, 2, 5, 8),) * 3)
    assert len(calls) == 4


CASES = {
    "plain": (((2, 4, 9, 16),) * 3, {}),
    "causal": (((2, 4, 9, 16),) * 3, dict(is_causal=True, scale=0.3)),
    "causal_not_square": (((2, 4, 5, 16), (2, 4, 9, 16), (2, 4, 9, 16)), dict(is_causal=True)),
    "mask": (((2, 4, 5, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
             dict(attn_mask=torch.arange(45).reshape(5, 9) % 7 > 1)),
    "bias": (((2, 4, 5, 16), (2, 4, 9, 16), (2, 4, 9, 16)),
             dict(attn_mask=torch.linspace(-1, 1, 45, dtype=torch.float64).reshape(1, 1, 5, 9))),
    "gqa": (((2, 4, 9, 16), (2, 2, 9, 16), (2, 2, 9, 16)), dict(enable_gqa=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scaled_dot_product_attention(calls, name):
    """Another alignment, mask or scale than torch's; strides that a compiled graph does not
    expect."""
    shapes, options = CASES[name]
    ours = outcome(F.scaled_dot_product_attention, *shapes, **options)
    assert calls == ["_forward", "_backward"]
    torch.nn.attention.restore_flash_attention_impl()
    theirs = outcome(F.scaled_dot_product_attention, *shapes, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def packed(lengths, heads):
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return offsets, (sum(lengths), heads, 8)


def by_sequence(offsets_q, offsets_k, causal, left=None):
    """The same attention of each sequence by torch's math."""

    def function(q, k, v):
        parts = []
        for i in range(len(offsets_q) - 1):
            a, b = (slice(int(o[i]), int(o[i + 1])) for o in (offsets_q, offsets_k))
            rows, cols = b.stop - b.start, a.stop - a.start
            mask = torch.ones(cols, rows, dtype=torch.bool)
            if causal:
                mask = mask.tril(rows - cols)
            if left is not None:
                mask = mask.triu(rows - cols - left)
            q1, k1, v1 = q[a].transpose(0, 1), k[b].transpose(0, 1), v[b].transpose(0, 1)
            k1, v1 = (x.repeat_interleave(len(q1) // len(x), 0) for x in (k1, v1))
            parts.append(F.scaled_dot_product_attention(q1, k1, v1, mask).transpose(0, 1))
        return torch.cat(parts)

    return function


@pytest.mark.parametrize(
    "window", [(-1, -1), (-1, 0), (2, 0)], ids=["full", "causal", "sliding_window"]
)
def test_varlen_attn(calls, window):
    """torch's varlen_attn, which has no CPU kernel of its own: forward, LSE, backward, GQA."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    cu_q, shape_q = packed((3, 4, 2), 4)
    cu_k, shape_k = packed((5, 4, 6), 2)

    def ours(q, k, v):
        out, lse = varlen_attn(
            q, k, v, cu_q, cu_k, 4, 6, window_size=window, enable_gqa=True,
            return_aux=AuxRequest(lse=True),
        )  # fmt: skip
        assert lse.shape == (4, 9)
        return out

    got = outcome(ours, shape_q, shape_k, shape_k)
    assert calls == ["_forward", "_backward"]
    left = None if window[0] < 0 else window[0]
    want = outcome(by_sequence(cu_q, cu_k, window[1] == 0, left), shape_q, shape_k, shape_k)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_varlen_attn_of_a_cache(calls):
    """seqused_k and block_table: keys past the used length, or of another page."""
    from torch.nn.attention.varlen import varlen_attn, varlen_attn_out

    cu_q, shape_q = packed((1, 2), 2)
    cu_k, shape_k = packed((6, 5), 2)
    used = torch.tensor([4, 5], dtype=torch.int32)
    q, k, v = torch.randn(shape_q), torch.randn(shape_k), torch.randn(shape_k)
    rows = torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 10])
    cu_used = torch.tensor([0, 4, 9], dtype=torch.int32)
    want = by_sequence(cu_q, cu_used, True)(q, k[rows], v[rows])
    options = dict(window_size=(-1, 0), seqused_k=used)
    torch.testing.assert_close(varlen_attn(q, k, v, cu_q, cu_k, 2, 6, **options), want)
    table = torch.tensor([[3, 0, 4], [1, 5, 2]], dtype=torch.int32)
    pages = [torch.full((6, 2, 2, 8), torch.nan) for _ in range(2)]
    for cache, x in zip(pages, (k, v), strict=True):
        for b, (first, count) in enumerate(((0, 4), (6, 5))):
            for i in range(count):
                cache[table[b, i // 2], i % 2] = x[first + i]
    out = varlen_attn(q, *pages, cu_q, None, 2, 6, block_table=table, **options)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(
        varlen_attn_out(torch.empty_like(q), q, k, v, cu_q, cu_k, 2, 6, **options), want
    )


@pytest.mark.parametrize("op", ["sdpa", "flash"])
@pytest.mark.parametrize("causal", [False, True])
def test_the_operators_of_gpus(calls, op, causal):
    """_scaled_dot_product_flash_attention and _flash_attention_forward with their backwards:
    layouts, causal bottom-right, and the dropout mask of the forward in the backward."""
    aten = torch.ops.aten
    q, dout = (torch.randn(2, 3, 5, 8, dtype=torch.float64) for _ in range(2))
    k = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    v = torch.eye(8, dtype=torch.float64).expand(2, 3, 8, 8).contiguous()  # out is P itself
    for p in (0.0, 0.5):
        if op == "sdpa":
            out, lse, *_, seed, offset, _ = aten._scaled_dot_product_flash_attention(
                q, k, v, p, causal, False
            )
            dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
                dout, q, k, v, out, lse, None, None, 5, 8, p, causal, seed, offset
            )
        else:
            qt, kt, vt, dt = (x.transpose(1, 2).contiguous() for x in (q, k, v, dout))
            out, lse, seed, offset, _ = aten._flash_attention_forward(
                qt, kt, vt, None, None, 5, 8, p, causal, False
            )
            dq, dk, dv = aten._flash_attention_backward(
                dt, qt, kt, vt, out, lse, None, None, 5, 8, p, causal, seed, offset
            )
            out, dq, dk, dv = (x.transpose(1, 2) for x in (out, dq, dk, dv))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        mask = torch.ones(5, 8, dtype=torch.bool).tril(3 if causal else 8)
        logits = (leaves[0] @ leaves[1].mT / 8**0.5).masked_fill(~mask, -torch.inf)
        weights = torch.softmax(logits, -1)
        kept = (out > 0).to(weights) / (1 - p) if p else mask.to(weights)
        expected = (weights * kept) @ leaves[2]
        torch.testing.assert_close(out, expected)
        assert_close(lse.double(), logits.logsumexp(-1), LSE)
        for a, b in zip((dq, dk, dv), torch.autograd.grad(expected, leaves, dout), strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(NotImplementedError, match="return_debug_mask"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, True)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_encoder(calls, training):
    """A model that knows nothing of attn_ext."""
    layer = torch.nn.TransformerEncoderLayer(
        16, 2, 32, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, 7, 16, dtype=torch.float64, requires_grad=True)
    got = model(x)
    assert calls == ["_forward"] * 2
    torch.nn.attention.restore_flash_attention_impl()
    torch.testing.assert_close(got, model(x))


@pytest.mark.parametrize("wrap", ["checkpoint", "compile", "both"])
def test_checkpoint_and_compile(calls, wrap):
    """Recomputed and compiled calls: torch's kernels in the graph of a program that runs ours."""
    torch._dynamo.reset()

    def f(q, k, v):
        part = F.scaled_dot_product_attention
        if wrap == "compile":
            return part(q * 2, k, v)
        return checkpoint(part, q * 2, k, v, use_reentrant=False)

    function = f if wrap == "checkpoint" else torch.compile(f, backend="aot_eager", fullgraph=True)
    got = outcome(function, *((1, 2, 5, 8),) * 3)
    assert calls.count("_forward") == (1 if wrap == "compile" else 2) and "_backward" in calls
    torch.nn.attention.restore_flash_attention_impl()
    for a, b in zip(got, outcome(f, *((1, 2, 5, 8),) * 3), strict=True):
        torch.testing.assert_close(a, b)


def test_replace_sdpa_is_in_front(calls):
    """Both at once: one kernel, once."""
    with attn_ext.replace_sdpa(strict=True):
        outcome(F.scaled_dot_product_attention, *((1, 2, 5, 8),) * 3)
    assert calls == []


def encoder():
    """Two layers of torch that know nothing of attn_ext."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_record_sees_the_calls(calls, how):
    """Calls of torch's operators that are missed, have no names, or other numbers than those of
    replace_sdpa."""
    model, x = encoder(), torch.randn(2, 7, 16)
    with attn_ext.inspect.record(model) as want, attn_ext.replace_sdpa():
        model(x)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    with attn_ext.inspect.record(model) as seen:
        run(x)
    assert calls == ["_forward"] * 2 and len(seen.calls) == 2
    if how == "eager":
        assert [c.name for c in seen.calls] == [c.name for c in want.calls]
    for found, other in zip(seen.calls, want.calls, strict=True):
        torch.testing.assert_close(found.top_weights, other.top_weights)
        torch.testing.assert_close(found.entropy, other.entropy)


def test_record_of_what_autograd_has_passed(calls):
    """Q and K that are not the graph's; heads that are off in the output and on in the gradient;
    statistics for a loss that have no graph."""
    model, x = encoder(), torch.randn(2, 7, 16)
    with attn_ext.inspect.record(model, keep="qk") as seen:
        out = model(x)
    grads = torch.autograd.grad(out.square().sum(), [c.q for c in seen.calls])
    assert all(g.abs().sum() > 0 for g in grads)
    with torch.no_grad(), attn_ext.inspect.record(model, ablate={1: [0]}):
        found = model(x)
    with attn_ext.replace_sdpa(), attn_ext.inspect.record(model, ablate={1: [0]}):
        torch.testing.assert_close(found, model(x))
    for options in ({"ablate": {1: [0]}}, {"differentiable": True}):
        with (
            pytest.raises(NotImplementedError, match=r"use attn_ext.replace_sdpa\(\) in its"),
            attn_ext.inspect.record(model, **options),
        ):
            model(x)
