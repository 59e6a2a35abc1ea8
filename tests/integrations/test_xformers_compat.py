"""attn_ext.integrations.xformers means what xformers documents: softmax(scale q k^T + bias) v in
its layouts, against a naive formula in float64 whose masks are written out pair by pair.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import itertools
import sys

import naive as formula
import pytest
import torch
from closeness import FLOAT32, is_close

from attn_ext.integrations import xformers as xf

M, N = 6, 9  # queries, keys


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def visible(rows, cols, rule):
    """bool [rows, cols] by a rule on (i, j), i counted from the top, or on distances to the end."""
    return torch.tensor(
        [[bool(rule(i, j, rows, cols)) for j in range(cols)] for i in range(rows)],
        dtype=torch.bool,
    ).reshape(rows, cols)


def from_end(i, j, rows, cols):
    """How much further from the last key j is than query i from the last query."""
    return (cols - 1 - j) - (rows - 1 - i)


RULES = {  # of a block: what xformers' documentation says in words
    "all": lambda i, j, m, n: True,
    "top_left": lambda i, j, m, n: j <= i,
    "bottom_right": lambda i, j, m, n: from_end(i, j, m, n) >= 0,
    "top_left_3": lambda i, j, m, n: i - 3 < j <= i,
    "bottom_right_3": lambda i, j, m, n: 0 <= from_end(i, j, m, n) < 3,
    "local_2_1": lambda i, j, m, n: -1 <= from_end(i, j, m, n) <= 2,
}


def naive(q, k, v, bias=None, seen=None, scale=None):
    """(out, lse) of [B, M, H, K] tensors; rows without keys give 0."""
    s = formula.scores(q, k, scale)
    s = s if bias is None else s + bias
    return formula.attend(s, v, None if seen is None else ~seen)


def agree(out, expected, inputs):
    """Values and gradients."""
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    ours = torch.autograd.grad((out * weight).sum(), inputs)
    theirs = torch.autograd.grad((expected * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def inputs(*lead, rows=M, cols=N, batch=2):
    return (
        normal(batch, rows, *lead, 8).requires_grad_(),
        normal(batch, cols, *lead, 8).requires_grad_(),
        normal(batch, cols, *lead, 5).requires_grad_(),
    )


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)], ids=["BMK", "BMHK", "BMGHK"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_layouts_and_additive_tensor(lead, with_bias):
    """Heads and positions taken for one another; a lost bias gradient."""
    q, k, v = inputs(*lead)
    bias = normal(2, *lead, M, N).requires_grad_() if with_bias else None
    out = xf.memory_efficient_attention(q, k, v, bias, scale=0.4)
    heads = [x.flatten(2, 3) if len(lead) == 2 else x for x in (q, k, v)]
    heads = [x.unsqueeze(2) if not lead else x for x in heads]
    flat = None if bias is None else bias.reshape(2, -1, M, N)
    expected, lse = naive(*heads, flat, scale=0.4)
    leaves = (q, k, v) if bias is None else (q, k, v, bias)
    agree(out, expected.reshape(*q.shape[:-1], 5), leaves)
    _, got = xf.memory_efficient_attention_forward_requires_grad(q, k, v, bias, scale=0.4)
    torch.testing.assert_close(got.reshape(lse.shape), lse)
    assert got.shape == (2, *(lead or (1,)), M)


@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 1, 1), (2, 2, 1, M, N), (2, 1, 3, 1, N), (1, 1, 1, M, 1)]
)
def test_a_bias_that_broadcasts_over_groups_or_heads(shape):
    """The heads of one group taken for the heads of all, or refused."""
    q, k, v = inputs(2, 3)
    bias = normal(*shape).requires_grad_()
    out = xf.memory_efficient_attention(q, k, v, bias)
    flat = bias.expand(2, 2, 3, M, N).flatten(1, 2)
    expected, _ = naive(*(x.flatten(2, 3) for x in (q, k, v)), flat)
    agree(out, expected.reshape(out.shape), (q, k, v, bias))


def test_expanded_heads_share_their_keys():
    """The gradient of keys that are expanded over the heads of a group."""
    q = normal(2, M, 2, 3, 8).requires_grad_()
    k, v = normal(2, N, 2, 1, 8).requires_grad_(), normal(2, N, 2, 1, 8).requires_grad_()
    wide = [x.expand(2, N, 2, 3, 8) for x in (k, v)]
    out = xf.memory_efficient_attention(q, *wide)
    expected, _ = naive(q.flatten(2, 3), *(x.flatten(2, 3) for x in wide))
    agree(out, expected.reshape(q.shape), (q, k, v))


DENSE = {
    "lower": (lambda: xf.LowerTriangularMask(), "top_left"),
    "lower_bottom_right": (lambda: xf.LowerTriangularFromBottomRightMask(), "bottom_right"),
    "lower_local": (
        lambda: xf.LowerTriangularFromBottomRightMask().make_local_attention(3),
        "bottom_right_3",
    ),
    "local": (lambda: xf.LocalAttentionFromBottomRightMask(2, 1), "local_2_1"),
}


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("sizes", [(M, N), (N, M), (M, M)], ids=str)
def test_dense_biases(name, sizes):
    """A causal alignment or a window size off by one."""
    make, rule = DENSE[name]
    q, k, v = inputs(2, rows=sizes[0], cols=sizes[1])
    seen = visible(*sizes, RULES[rule])
    agree(xf.memory_efficient_attention(q, k, v, make()), naive(q, k, v, seen=seen)[0], (q, k, v))
    dense = make().materialize((2, 2, *sizes), torch.float64)
    assert torch.equal(dense.exp().bool(), seen.expand(2, 2, *sizes))


def test_causal_with_tensor():
    """The tensor or its gradient lost beside the mask."""
    q, k, v = inputs(2)
    bias = normal(2, 2, M, N).requires_grad_()
    seen = visible(M, N, RULES["top_left"])
    expected, _ = naive(q, k, v, bias, seen)
    agree(
        xf.memory_efficient_attention(q, k, v, xf.LowerTriangularMaskWithTensorBias(bias)),
        expected, (q, k, v, bias),
    )  # fmt: skip
    added = xf.LowerTriangularMask().add_bias(bias)
    torch.testing.assert_close(xf.memory_efficient_attention(q, k, v, added), expected)


LQ, LK = [3, 0, 5, 1], [4, 2, 5, 3]
PAD = 6
STARTS = [1, 5, 9, 15, 19]


def spans(lengths):
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return list(itertools.pairwise(ends))


def padded_spans():
    return [(b * PAD, b * PAD + n) for b, n in enumerate(LK)]


def packed(lengths):
    return xf.BlockDiagonalMask.from_seqlens(lengths, LK)


BLOCKS = {
    "plain": (lambda: packed(LQ), spans(LK), "all"),
    "causal": (lambda: packed(LQ).make_causal(), spans(LK), "top_left"),
    "causal_bottom_right": (
        lambda: packed(LQ).make_causal_from_bottomright(), spans(LK), "bottom_right",
    ),
    "local": (lambda: packed(LQ).make_local_attention(3), spans(LK), "top_left_3"),
    "local_bottom_right": (
        lambda: packed(LQ).make_local_attention_from_bottomright(3), spans(LK), "bottom_right_3",
    ),
    "padded": (
        lambda: xf.BlockDiagonalPaddedKeysMask.from_seqlens(LQ, PAD, LK), padded_spans(), "all",
    ),
    "padded_causal": (
        lambda: xf.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(LQ, PAD, LK),
        padded_spans(), "bottom_right",
    ),
    "padded_causal_local": (
        lambda: xf.BlockDiagonalCausalLocalAttentionPaddedKeysMask.from_seqlens_local(
            LQ, PAD, LK, 3
        ),
        padded_spans(), "bottom_right_3",
    ),
    "padded_local": (
        lambda: xf.BlockDiagonalLocalAttentionPaddedKeysMask.from_seqlens_local(LQ, PAD, LK, 2, 1),
        padded_spans(), "local_2_1",
    ),
    "gappy": (
        lambda: xf.BlockDiagonalGappyKeysMask.from_seqlens(LQ, STARTS, LK),
        [(s, s + n) for s, n in zip(STARTS, LK, strict=False)], "all",
    ),
    "gappy_causal": (
        lambda: xf.BlockDiagonalCausalWithOffsetGappyKeysMask.from_seqlens(LQ, STARTS, LK),
        [(s, s + n) for s, n in zip(STARTS, LK, strict=False)], "bottom_right",
    ),
}  # fmt: skip


def check_packed(q, k, v, attn_bias, seen, used):
    """Output, gradients and LSE where `seen` [queries, keys] says who sees what; keys that are not
    `used` hold NaN.  The batch dimension of q, k, v is 1, their heads may be in groups."""
    heads = [x.flatten(2, 3) if q.dim() == 5 else x for x in (q, k, v)]
    expected, lse = naive(*heads, seen=seen)
    holes = used.view(1, -1, *(1,) * (q.dim() - 2))
    poisoned = [torch.where(holes, x, torch.nan) for x in (k, v)]
    out = xf.memory_efficient_attention(q, *poisoned, attn_bias)
    agree(out, expected.reshape(out.shape), (q, k, v))
    got = xf.memory_efficient_attention_forward_requires_grad(q, k, v, attn_bias)[1]
    torch.testing.assert_close(got.reshape(lse.shape), lse)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("lead", [(2,), (2, 2)], ids=["BMHK", "BMGHK"])
def test_block_diagonal_biases(name, lead):
    """Keys of a neighbour or of the room between blocks (NaN here); positions across blocks."""
    make, key_spans, rule = BLOCKS[name]
    attn_bias = make()
    total = attn_bias.k_seqinfo.seqstart_py[-1]
    q, k, v = inputs(*lead, rows=sum(LQ), cols=total, batch=1)
    used = torch.zeros(total, dtype=torch.bool)
    seen = torch.zeros(sum(LQ), total, dtype=torch.bool)
    for (q0, q1), (k0, k1) in zip(spans(LQ), key_spans, strict=True):
        used[k0:k1] = True
        seen[q0:q1, k0:k1] = visible(q1 - q0, k1 - k0, RULES[rule])
    check_packed(q, k, v, attn_bias, seen, used)
    dense = attn_bias.materialize((1, 2, sum(LQ), total))
    assert torch.equal(dense.exp().bool(), seen.expand(1, 2, sum(LQ), total))


PAGE = 2
TABLES = torch.tensor([[5, 9, 0], [1, 7, 3], [8, 2, 11], [4, 6, 10]], dtype=torch.int32)
FIRST = [1, 3, 0, 2]  # of the keys that the gappy ones use, in each block's own pages


def in_pages(kind):
    if "Gappy" in kind.__name__:
        return kind.from_seqlens(LQ, FIRST, LK, TABLES, PAGE)
    return kind.from_seqlens(LQ, LK, TABLES, PAGE)


PAGED = {
    "padded": (xf.PagedBlockDiagonalPaddedKeysMask, "all"),
    "padded_causal": (xf.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask, "bottom_right"),
    "gappy": (xf.PagedBlockDiagonalGappyKeysMask, "all"),
    "gappy_causal": (xf.PagedBlockDiagonalCausalWithOffsetGappyKeysMask, "bottom_right"),
}


@pytest.mark.parametrize("name", PAGED)
@pytest.mark.parametrize("lead", [(2,), (2, 2)], ids=["BMHK", "BMGHK"])
def test_paged_biases(name, lead):
    """A key taken from a neighbouring page, from the wrong end of a gap, or from a free place (NaN
    here); a gradient that does not find its way back into the page."""
    kind, rule = PAGED[name]
    attn_bias = in_pages(kind)
    total = TABLES.numel() * PAGE
    q, k, v = inputs(*lead, rows=sum(LQ), cols=total, batch=1)
    seen = torch.zeros(sum(LQ), total, dtype=torch.bool)
    for b, (q0, q1) in enumerate(spans(LQ)):
        first = FIRST[b] if "gappy" in name else 0
        for n in range(LK[b]):
            page, slot = divmod(first + n, PAGE)
            seen[q0:q1, int(TABLES[b, page]) * PAGE + slot] = visible(q1 - q0, LK[b], RULES[rule])[
                :, n
            ]
    used = torch.tensor([any(s <= c < e for s, e in slots(name)) for c in range(total)])
    check_packed(q, k, v, attn_bias, seen, used)
    dense = attn_bias.to("cpu").materialize((1, 2, sum(LQ), total))
    assert torch.equal(dense.exp().bool(), seen.expand(1, 2, sum(LQ), total))


def slots(name):
    """(first, end) of the rows of key and value that are in use, one key each."""
    for b, table in enumerate(TABLES.tolist()):
        first = FIRST[b] if "gappy" in name else 0
        for n in range(first, first + LK[b]):
            row = table[n // PAGE] * PAGE + n % PAGE
            yield row, row + 1


def test_make_paged():
    """A bias moved into pages that then sees other keys."""
    padded = xf.BlockDiagonalPaddedKeysMask.from_seqlens(LQ, PAD, LK)
    kind = xf.PagedBlockDiagonalPaddedKeysMask
    shape = (1, 1, sum(LQ), TABLES.numel() * PAGE)
    moved = padded.make_paged(block_tables=TABLES, page_size=PAGE, paged_type=kind)
    assert torch.equal(moved.materialize(shape), in_pages(kind).materialize(shape))
    starts = [b * PAD + first for b, first in enumerate(FIRST)] + [4 * PAD]
    gappy = xf.BlockDiagonalGappyKeysMask.from_seqlens(LQ, starts, LK)
    kind = xf.PagedBlockDiagonalGappyKeysMask
    moved = gappy.make_paged(TABLES, PAGE, notional_padding=PAD, paged_type=kind)
    assert torch.equal(moved.materialize(shape), in_pages(kind).materialize(shape))
    local = padded.make_local_attention(2, 1)
    kind = xf.BlockDiagonalLocalAttentionPaddedKeysMask
    expected = kind.from_seqlens_local(LQ, PAD, LK, 2, 1)
    shape = (sum(LQ), 4 * PAD)
    assert torch.equal(local.materialize(shape), expected.materialize(shape))
    with pytest.raises(ValueError, match="notional_padding must be a multiple of page_size 2"):
        gappy.make_paged(TABLES, PAGE, 5, xf.PagedBlockDiagonalGappyKeysMask)
    with pytest.raises(ValueError, match="block_tables must have pages for the keys of block 2"):
        xf.PagedBlockDiagonalPaddedKeysMask.from_seqlens(LQ, LK, TABLES[:, :2], PAGE)
    q, k, v = inputs(2, rows=sum(LQ), cols=22, batch=1)
    with pytest.raises(ValueError, match="block_tables must hold pages within key's 22 rows"):
        xf.memory_efficient_attention(q, k, v, in_pages(PAGED["padded"][0]))


def test_tensor_lists():
    """Packing, splitting, and batches of several sequences."""
    tensors = [normal(1, 3, 2, 8), normal(2, 4, 2, 8), normal(1, 0, 2, 8)]
    bias, whole = xf.BlockDiagonalMask.from_tensor_list(tensors)
    assert whole.shape == (1, 11, 2, 8)
    parts = bias.split(xf.memory_efficient_attention(whole, whole, whole, bias))
    for part, x in zip(parts, tensors, strict=True):
        torch.testing.assert_close(part, naive(x, x, x)[0])
    keys = [normal(1, 5, 2, 8), normal(2, 2, 2, 8), normal(1, 1, 2, 8)]
    bias, q, k, v = xf.BlockDiagonalMask.from_tensor_lists_qkv(tensors, keys, keys)
    assert torch.equal(k, v)
    parts = bias.split_queries(xf.memory_efficient_attention(q, k, v, bias))
    for part, x, y in zip(parts, tensors, keys, strict=True):
        torch.testing.assert_close(part, naive(x, y, y)[0])
    assert [x.shape for x in bias.split_kv(k)] == [x.shape for x in keys]


def test_partial_results_merge():
    """Weights of parts by a logarithm of another base, or heads mixed up."""
    for lead in ((3,), (2, 3)):
        q, k, v = inputs(*lead)
        parts = [xf.memory_efficient_attention_partial(q, k[:, s], v[:, s]) for s in
                 (slice(0, 4), slice(4, 5), slice(5, None))]  # fmt: skip
        out, lse = xf.merge_attentions(*zip(*parts, strict=True))
        whole, full = xf.memory_efficient_attention_partial(q, k, v)
        torch.testing.assert_close(lse, full)
        agree(out, whole, (q, k, v))
    blind = xf.LowerTriangularFromBottomRightMask()  # rows that see no key of one part, or of both
    q, k, v = inputs(2, rows=9, cols=4)
    for second in (None, blind):
        parts = [xf.memory_efficient_attention_partial(q, k, v, b) for b in (blind, second)]
        out, _ = xf.merge_attentions(*zip(*parts, strict=True))
        grads = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(x.isfinite().all() for x in (out, *grads))
    half = xf.merge_attentions(*zip(*parts, strict=True), output_dtype=torch.float16)[0]
    assert half.dtype == torch.float16
    with pytest.raises(ValueError, match="attn_split must hold"):
        xf.merge_attentions([normal(2, 3, 4)], [normal(2, 3)])


def test_backward_function_dtype_and_dropout():
    """The entry points that training code calls by hand."""
    q, k, v = inputs(2)
    grad = normal(2, M, 2, 5)
    mask = xf.LowerTriangularMask()
    out, lse = xf.memory_efficient_attention_forward_requires_grad(q, k, v, mask)
    assert not out.requires_grad
    grads = xf.memory_efficient_attention_backward(grad, out, lse, q, k, v, mask)
    expected = naive(q, k, v, seen=visible(M, N, RULES["top_left"]))[0]
    for a, b in zip(grads, torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(a, b)
    half = [x.detach().half() for x in (q, k, v)]
    assert xf.memory_efficient_attention(*half, output_dtype=torch.float32).dtype == torch.float32
    assert xf.memory_efficient_attention_partial(*half)[0].dtype == torch.float32
    assert xf.memory_efficient_attention_forward(*half).dtype == torch.float16
    dropped = xf.memory_efficient_attention(q, k, torch.ones_like(v), p=0.5)
    assert dropped.std() > 0.1 and not is_close(dropped, torch.ones_like(dropped), FLOAT32)
    with pytest.raises(NotImplementedError, match="p must be 0"):
        xf.memory_efficient_attention_forward_requires_grad(q, k, v, p=0.1)


def test_objects_of_the_real_package_are_understood():
    """Biases that somebody else's class of the same name describes."""

    class LowerTriangularFromBottomRightMask:
        pass

    class Mine(LowerTriangularFromBottomRightMask):
        pass

    class LowerTriangularMaskWithTensorBias:
        """Its tensor is called _bias, before 0.0.32 _subtensor."""

    q, k, v = inputs(2)
    seen = visible(M, N, RULES["bottom_right"])
    out = xf.memory_efficient_attention(q, k, v, Mine())
    torch.testing.assert_close(out, naive(q, k, v, seen=seen)[0])
    for name in ("_bias", "_subtensor"):
        theirs = LowerTriangularMaskWithTensorBias()
        setattr(theirs, name, normal(2, 2, M, N))
        expected = naive(q, k, v, getattr(theirs, name), visible(M, N, RULES["top_left"]))[0]
        torch.testing.assert_close(xf.memory_efficient_attention(q, k, v, theirs), expected)


@pytest.mark.skipif(
    "xformers" in sys.modules or importlib.util.find_spec("xformers") is not None,
    reason="the real xformers is installed and must win",
)
def test_install():
    """A stand-in that find_spec does not see, or that stays behind."""
    assert xf.install() and xf.install()
    try:
        assert importlib.metadata.version("xformers") == xf.VERSION
        ops = importlib.import_module("xformers.ops")
        assert ops.memory_efficient_attention is xf.memory_efficient_attention
        assert ops.LowerTriangularMask is xf.LowerTriangularMask
        assert ops.fmha.BlockDiagonalMask is xf.BlockDiagonalMask
        inner = importlib.import_module("xformers.ops.fmha.attn_bias")
        assert inner.BlockDiagonalCausalMask is xf.BlockDiagonalCausalMask
        assert isinstance(in_pages(xf.PagedBlockDiagonalPaddedKeysMask), inner.VARLEN_BIASES)
        assert ops.unbind(torch.arange(4).view(2, 2), 1)[1].tolist() == [1, 3]
    finally:
        xf.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("xformers.ops")


def test_bad_input():
    """An error that does not name the argument, or none."""
    q, k, v = inputs(2)
    mask = torch.ones(2, 2, M, N, dtype=torch.bool)
    bias = xf.BlockDiagonalMask.from_seqlens([3, 3], [4, 5])
    cases = (
        (lambda: xf.memory_efficient_attention(q[0, 0], k, v), ValueError, "query must have 3"),
        (lambda: xf.memory_efficient_attention(q, k[..., 0], v), ValueError, "key must have"),
        (lambda: xf.memory_efficient_attention(q, k, v, mask), TypeError, "attn_bias must be"),
        (lambda: xf.memory_efficient_attention(q, k, v, "causal"), TypeError, "attn_bias must be"),
        (lambda: xf.memory_efficient_attention(q, k, v, mask[0].double()), ValueError,
         "attn_bias must have 4 dimensions"),
        (lambda: xf.memory_efficient_attention(q, k, v, bias), ValueError, "query must have shape"),
        (lambda: xf.memory_efficient_attention(q, k, v, p=2.0), ValueError, "p must be between"),
        (lambda: xf.BlockDiagonalMask.from_seqlens([1, 2], [1]), ValueError, "kv_seqlen must"),
        (lambda: xf.BlockDiagonalMask.from_seqlens([1, -2]), ValueError, "q_seqlen must hold"),
        (lambda: packed([9, 1, 1, 1]).make_causal_from_bottomright(), ValueError, "block 0"),
        (lambda: packed(LQ).make_local_attention(0), ValueError, "window_size must"),
        (lambda: xf.LocalAttentionFromBottomRightMask(-1, 0), ValueError, "window_left must"),
        (lambda: xf.BlockDiagonalPaddedKeysMask.from_seqlens([1], 2, [3]), ValueError,
         "kv_padding must"),
        (lambda: bias.split(normal(1, 9, 2, 8)), ValueError, "split needs equal"),
        (lambda: bias.split_kv(normal(1, 8, 2, 8)), ValueError, "x must have shape"),
    )  # fmt: skip
    for call, kind, match in cases:
        with pytest.raises(kind, match=match):
            call()


class Theirs:
    """Stand-ins for xformers' own objects, which are told by their names and fields."""

    class AttentionBias:
        pass

    class LowerTriangularMask(AttentionBias):
        def __init__(self, device=None):
            pass

    @dataclasses.dataclass
    class LocalAttentionFromBottomRightMask:
        window_left: int
        window_right: int


@pytest.mark.parametrize(
    "name", ["none", "lower", "blocks", "padded", "window", "their lower", "their window"]
)
def test_compiled(name):
    """A bias that breaks the graph, or is lost in it."""
    lengths = [4, 5]
    biases = {
        "none": lambda: None,
        "lower": lambda: xf.LowerTriangularMask(),
        "blocks": lambda: xf.BlockDiagonalMask.from_seqlens(lengths).make_causal(),
        "padded": lambda: xf.BlockDiagonalPaddedKeysMask.from_seqlens(lengths, 6, [3, 6]),
        "window": lambda: xf.LocalAttentionFromBottomRightMask(2, 1),
        "their lower": lambda: Theirs.LowerTriangularMask(),
        "their window": lambda: Theirs.LocalAttentionFromBottomRightMask(2, 1),
    }
    q, k, v = inputs(2, rows=9, cols=12 if name == "padded" else 9, batch=1)
    attn_bias = biases[name]()
    compiled = torch.compile(xf.memory_efficient_attention, fullgraph=True, backend="aot_eager")
    agree(
        compiled(q, k, v, attn_bias), xf.memory_efficient_attention(q, k, v, attn_bias), (q, k, v)
    )
