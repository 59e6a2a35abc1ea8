"""attn_ext.integrations.flash_attn means what flash-attn 2 documents: against a naive formula in
flash-attn's own layout [B, S, H, D] and conventions, in float64.
"""

import importlib
import importlib.metadata
import importlib.util
import inspect
import sys

import naive as formula
import pytest
import torch
from closeness import BFLOAT16, FLOAT32, ONE_SUM, assert_close, is_close

from attn_ext.functional import varlen
from attn_ext.integrations import flash_attn as fa
from attn_ext.integrations.flash_attn import kernels, passes, rotary
from attn_ext.integrations.flash_attn.bert_padding import unpad_input
from attn_ext.integrations.flash_attn.modules import FlashCrossAttention, FlashSelfAttention


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def naive(
    q, k, v, causal=False, window=(-1, -1), scale=None, softcap=0.0, slopes=None, first=0, keep=None
):  # fmt: skip
    """(out, lse) of q [B, Sq, H, D], k, v [B, Sk, Hk, D]; keys before `first` are not there."""
    rows, cols, heads = q.shape[1], k.shape[1], q.shape[2]
    k, v = (x.repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    s = formula.scores(q, k, scale)
    if softcap > 0:
        s = torch.tanh(s / softcap) * softcap
    i = torch.arange(rows)[:, None] + cols - rows
    j = torch.arange(cols)[None]
    if slopes is not None:
        slopes = slopes.double().reshape(-1, heads, 1, 1)
        s = s - slopes * (i - j).abs()
    right = 0 if causal else window[1]
    hidden = j < first
    if window[0] >= 0:
        hidden = hidden | (j < i - window[0])
    if right >= 0:
        hidden = hidden | (j > i + right)
    out, lse = formula.attend(s, v, hidden, keep)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf)


CASES = {
    "plain": {},
    "causal": dict(causal=True),
    "causal_fewer_keys": dict(causal=True, sizes=(9, 5)),
    "causal_more_keys": dict(causal=True, sizes=(4, 11)),
    "window": dict(window=(3, 2), sizes=(9, 14)),
    "left_window_only": dict(window=(3, -1)),
    "causal_window": dict(causal=True, window=(2, 5), sizes=(6, 9)),
    "scale_and_softcap": dict(scale=0.7, softcap=1.5),
    "alibi": dict(alibi="h", causal=True, sizes=(5, 8)),
    "alibi_per_batch": dict(alibi="bh"),
    "mqa": dict(heads=(6, 1)),
    "gqa": dict(heads=(6, 2), causal=True, sizes=(3, 9)),
    "no_keys": dict(sizes=(3, 0)),
}


def case(name):
    """(q, k, v, flash-attn's arguments, the naive formula's) of a case."""
    given = dict(CASES[name])
    rows, cols = given.pop("sizes", (9, 9))
    heads, heads_k = given.pop("heads", (4, 4))
    alibi = given.pop("alibi", None)
    slopes = None
    if alibi:
        slopes = torch.rand((2, heads) if alibi == "bh" else (heads,), dtype=torch.float32)
    q, k, v = normal(2, rows, heads, 8), normal(2, cols, heads_k, 8), normal(2, cols, heads_k, 8)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    window = given.get("window", (-1, -1))
    flash = dict(
        causal=given.get("causal", False), window_size=window, softmax_scale=given.get("scale"),
        softcap=given.get("softcap", 0.0), alibi_slopes=slopes,
    )  # fmt: skip
    return *tensors, flash, {**given, "slopes": slopes}


def agree(ours, inputs, formula):
    """Compare a result and its gradients with the formula's."""
    out = formula[0]
    weight = torch.randn_like(out)
    torch.testing.assert_close(ours, out)
    ours = torch.autograd.grad((ours * weight).sum(), inputs)
    theirs = torch.autograd.grad((out * weight).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", CASES)
def test_dense(name):
    """A wrong alignment, window convention, sign or gradient; the LSE of rows without keys."""
    q, k, v, flash, formula = case(name)
    expected = naive(q, k, v, **formula)
    out, lse, weights = fa.flash_attn_func(q, k, v, **flash, return_attn_probs=True)
    agree(out, (q, k, v), expected)
    torch.testing.assert_close(lse, expected[1])
    assert weights.numel() == 0
    assert torch.equal(fa.flash_attn_func(q, k, v, **flash), out)


def test_window_as_a_tensor():
    """flash-attn takes any pair; its own tests pass a tensor."""
    q, k, v = normal(1, 9, 2, 8), normal(1, 9, 2, 8), normal(1, 9, 2, 8)
    out = fa.flash_attn_func(q, k, v, window_size=torch.tensor([2, 1]))
    torch.testing.assert_close(out, naive(q, k, v, window=(2, 1))[0])


def test_packed_forms_are_the_same_function():
    """q, k and v taken from the wrong place of a packed tensor, or their gradients."""
    qkv = normal(2, 7, 3, 4, 8).requires_grad_()
    q, k, v = qkv.unbind(2)
    expected = naive(q, k, v, causal=True)
    agree(fa.flash_attn_qkvpacked_func(qkv, causal=True), (qkv,), expected)
    kv = normal(2, 7, 2, 2, 8).requires_grad_()
    q = normal(2, 5, 4, 8).requires_grad_()
    expected = naive(q, *kv.unbind(2), window=(2, 0))
    agree(fa.flash_attn_kvpacked_func(q, kv, window_size=(2, 0)), (q, kv), expected)


LENGTHS_Q, LENGTHS_K = [5, 0, 3, 7], [6, 4, 0, 7]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def per_sequence(q, k, v, lengths_q, lengths_k, slopes=None, **options):
    """(out [total_q, H, D], lse [H, total_q]) sequence by sequence."""
    outs, lses = [], []
    for b, parts in enumerate(
        zip(q.split(lengths_q), k.split(lengths_k), v.split(lengths_k), strict=True)
    ):
        own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        out, lse = naive(*(x[None] for x in parts), slopes=own, **options)
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


@pytest.mark.parametrize("name", [n for n in CASES if "heads" not in CASES[n]])
def test_varlen(name):
    """Positions counted across sequences, or keys of a neighbour."""
    *_, flash, formula = case(name)
    formula.pop("sizes", None)
    if flash["alibi_slopes"] is not None and flash["alibi_slopes"].dim() == 2:
        formula["slopes"] = flash["alibi_slopes"] = torch.rand(4, 4)
    q, k, v = (
        normal(sum(n), h, 8).requires_grad_()
        for n, h in ((LENGTHS_Q, 4), (LENGTHS_K, 2), (LENGTHS_K, 2))
    )
    expected = per_sequence(q, k, v, LENGTHS_Q, LENGTHS_K, **formula)
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    args = (cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K))
    out, lse, _ = fa.flash_attn_varlen_func(q, k, v, *args, **flash, return_attn_probs=True)
    agree(out, (q, k, v), expected)
    torch.testing.assert_close(lse, expected[1])
    kv = torch.stack((k, v), dim=1)
    packed = fa.flash_attn_varlen_kvpacked_func(q, kv, *args, **flash)
    assert torch.equal(packed, out)


def test_varlen_qkvpacked():
    """A wrong axis of the packed tensor."""
    qkv = normal(sum(LENGTHS_Q), 3, 4, 8).requires_grad_()
    expected = per_sequence(*qkv.unbind(1), LENGTHS_Q, LENGTHS_Q, causal=True)
    out = fa.flash_attn_varlen_qkvpacked_func(qkv, cumulative(LENGTHS_Q), 7, causal=True)
    agree(out, (qkv,), expected)


def test_varlen_with_pages():
    """Pages in random order; page numbers past the used length are never followed."""
    page_size, lengths = 4, [6, 4, 0, 7]
    pages_k, pages_v = normal(8, page_size, 2, 8), normal(8, page_size, 2, 8)
    table = torch.tensor([[7, 2], [0, -5], [99, 99], [4, 1]], dtype=torch.int32)
    q = normal(sum(LENGTHS_Q), 4, 8)

    def packed(pages):
        rows = [
            pages[table[b, : -(-n // page_size)].long()].flatten(0, 1)[:n]
            for b, n in enumerate(lengths)
        ]
        return torch.cat(rows)

    expected, _ = per_sequence(q, packed(pages_k), packed(pages_v), LENGTHS_Q, lengths, causal=True)
    args = (cumulative(LENGTHS_Q), cumulative(lengths), 7, 7)
    out = fa.flash_attn_varlen_func(q, pages_k, pages_v, *args, causal=True, block_table=table)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "varlen"])
def test_dropout_pattern_is_the_one_that_was_used(packed):
    """S_dmask from another mask than the one that dropped, or of another scale."""
    q, k, v = normal(1, 9, 4, 8), normal(1, 13, 2, 8), normal(1, 13, 2, 8)
    slopes = torch.rand(4)
    options = dict(causal=True, softcap=2.0, alibi_slopes=slopes, return_attn_probs=True)
    if packed:
        args = (cumulative([9]), cumulative([13]), 9, 13)
        out, lse, s = fa.flash_attn_varlen_func(q[0], k[0], v[0], *args, 0.4, **options)
        out, lse = out[None], lse[None]
    else:
        out, lse, s = fa.flash_attn_func(q, k, v, 0.4, **options)
    assert s.shape == (1, 4, 128, 128)
    s = s[:, :, :9, :13]
    full, lse_expected = naive(q, k, v, causal=True, softcap=2.0, slopes=slopes)
    torch.testing.assert_close(lse, lse_expected)
    p = s.abs() / s.abs().sum(-1, keepdim=True)
    whole = torch.einsum("bhij,bjhd->bihd", p, v.repeat_interleave(2, 2))
    assert_close(whole, full, ONE_SUM)
    kept = torch.where(s > 0, p, 0.0) / 0.6
    expected = torch.einsum("bhij,bjhd->bihd", kept, v.repeat_interleave(2, 2))
    assert_close(out, expected, ONE_SUM)
    assert 0.2 < (s < 0).sum() / (s != 0).sum() < 0.6


def spun(x, cos, sin, positions, interleaved):
    """x [S, H, D] rotated by complex multiplication; cos, sin [S_ro, half]."""
    half = cos.shape[1]
    turned, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        z = torch.complex(turned[..., 0::2], turned[..., 1::2])
    else:
        z = torch.complex(turned[..., :half], turned[..., half:])
    z = z * torch.complex(cos[positions], sin[positions])[:, None]
    if interleaved:
        turned = torch.stack((z.real, z.imag), -1).flatten(-2)
    else:
        turned = torch.cat((z.real, z.imag), -1)
    return torch.cat((turned, rest), -1)


def angles(length, half):
    theta = torch.rand(length, half, dtype=torch.float64) * 6
    return theta.cos(), theta.sin()


KV_CASES = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(4, 1)),
    "causal_window_softcap": dict(causal=True, window=(5, 0), softcap=1.5),
    "append": dict(new=3, causal=True),
    "append_many_queries_fewer_keys": dict(new=1, causal=True, rows=5),
    "rotary_interleaved": dict(new=3, causal=True, rotary=True),
    "rotary_halves": dict(new=3, causal=True, rotary=False),
    "rotary_not_causal": dict(new=2, rotary=True),
    "rotary_windowed": dict(new=3, rotary=False, window=(6, -1)),
    "leftpad": dict(new=2, causal=True, leftpad=True),
    "leftpad_rotary": dict(new=3, causal=True, leftpad=True, rotary=True),
    "batch_idx": dict(new=2, causal=True, index=True),
    "batch_idx_read_only": dict(index=True),
    "paged": dict(new=3, causal=True, page=4),
    "paged_read_only": dict(page=4, alibi=True),
    "alibi": dict(new=2, causal=True, alibi=True),
}


@pytest.mark.parametrize("name", KV_CASES)
@pytest.mark.parametrize("lengths", ["int", "tensor"])
def test_kvcache(name, lengths):
    """Rows appended at the wrong place, a rotation by the wrong position, a neighbour's cache."""
    given = KV_CASES[name]
    new, rows = given.get("new", 0), given.get("rows", 3)
    batch, heads, heads_k, dim, capacity = 3, 4, 2, 16, 16
    used = [9, 9, 9] if lengths == "int" else [9, 4, 11]
    cache_rows = 5 if given.get("index") else batch
    caches = [normal(cache_rows, capacity, heads_k, dim) for _ in range(2)]
    index = torch.tensor([4, 0, 2], dtype=torch.int32) if given.get("index") else None
    q = normal(batch, rows, heads, dim)
    fresh = [normal(batch, new, heads_k, dim) for _ in range(2)] if new else [None, None]
    cos, sin = angles(capacity + 4, 6) if "rotary" in given else (None, None)
    leftpad = torch.tensor([2, 0, 5], dtype=torch.int32) if given.get("leftpad") else None
    slopes = torch.rand(heads) if given.get("alibi") else None
    causal, window = given.get("causal", False), given.get("window", (-1, -1))
    softcap = given.get("softcap", 0.0)

    expected, lse, whole = [], [], [c.clone() for c in caches]
    for b, n in enumerate(used):
        row = b if index is None else int(index[b])
        query = q[b]
        if cos is not None:
            moving = causal or window != (-1, -1)
            at = torch.arange(rows) * int(moving) + n
            query = spun(query, cos, sin, at, given["rotary"])
        for cache, part, turn in zip(whole, fresh, (True, False), strict=True):
            if new:
                part = part[b]
                if turn and cos is not None:
                    part = spun(part, cos, sin, torch.arange(new) + n, given["rotary"])
                cache[row, n : n + new] = part
        keys, values = (cache[row, : n + new][None] for cache in whole)
        o, stat = naive(
            query[None], keys, values, causal, window, None, softcap, slopes,
            first=0 if leftpad is None else int(leftpad[b]),
        )  # fmt: skip
        expected.append(o)
        lse.append(stat)

    stored, table = [c.clone() for c in caches], None
    if "page" in given:
        size = given["page"]
        count = capacity // size
        order = torch.randperm(batch * count + 2)[: batch * count].view(batch, count)
        table = order.to(torch.int32)
        pages = []
        for cache in stored:
            page = torch.full((batch * count + 2, size, heads_k, dim), torch.nan).double()
            page[order] = cache.view(batch, count, size, heads_k, dim)
            pages.append(page)
        stored = pages
    seqlens = 9 if lengths == "int" else torch.tensor(used, dtype=torch.int32)
    before = None if lengths == "int" else seqlens.clone()
    out, out_lse = fa.flash_attn_with_kvcache(
        q, *stored, *fresh, rotary_cos=cos, rotary_sin=sin, cache_seqlens=seqlens,
        cache_batch_idx=index, cache_leftpad=leftpad, block_table=table, causal=causal,
        window_size=window, softcap=softcap, rotary_interleaved=given.get("rotary", True),
        alibi_slopes=slopes, num_splits=2, return_softmax_lse=True,
    )  # fmt: skip
    torch.testing.assert_close(out, torch.cat(expected))
    torch.testing.assert_close(out_lse, torch.cat(lse))
    if table is not None:
        stored = [page[order].flatten(1, 2) for page in stored]
    for cache, want in zip(stored, whole, strict=True):
        torch.testing.assert_close(cache, want)
    assert before is None or torch.equal(before, seqlens)


def test_kvcache_without_lengths_and_without_gradients():
    """A whole cache by default; a graph kept through a call that has no backward."""
    q, k, v = normal(2, 1, 4, 8).requires_grad_(), normal(2, 6, 4, 8), normal(2, 6, 4, 8)
    out = fa.flash_attn_with_kvcache(q, k, v)
    torch.testing.assert_close(out, naive(q, k, v)[0])
    assert not out.requires_grad
    index = torch.tensor([1, 1], dtype=torch.int32)
    out = fa.flash_attn_with_kvcache(q, k, v, cache_batch_idx=index)
    torch.testing.assert_close(out, naive(q, k[[1, 1]], v[[1, 1]])[0])


def test_half_precision_and_noncontiguous_inputs():
    """A dtype or a layout that only the padded CUDA path would take."""
    qkv = normal(2, 7, 4, 3 * 24, dtype=torch.bfloat16)
    q, k, v = qkv.chunk(3, dim=-1)
    out = fa.flash_attn_func(q, k, v, causal=True)
    expected = naive(*(x.double() for x in (q, k, v)), causal=True)[0]
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    assert_close(out.double(), expected, BFLOAT16)


def test_modules():
    """An option of the module lost on the way, in one of its two forms."""
    slopes = torch.rand(4)
    options = dict(causal=True, softmax_scale=0.3, window_size=(3, -1), alibi_slopes=slopes)
    both = normal(2, 6, 3, 4, 8)
    expected = naive(*both.unbind(2), causal=True, window=(3, -1), scale=0.3, slopes=slopes)[0]
    module = FlashSelfAttention(**options, attention_dropout=0.5).half().eval()
    module.alibi_slopes = slopes  # rounded by half(), which float64 shows
    torch.testing.assert_close(module(both), expected)
    cu = cumulative([6, 6])
    torch.testing.assert_close(module(both.flatten(0, 1), cu_seqlens=cu, max_seqlen=6),
                               expected.flatten(0, 1))  # fmt: skip
    assert not is_close(module.train()(both), expected, FLOAT32)
    q, kv = normal(2, 3, 4, 8), normal(2, 6, 2, 2, 8)
    expected = naive(q, *kv.unbind(2), causal=True, window=(3, -1), scale=0.3, slopes=slopes)[0]
    module = FlashCrossAttention(**options)
    torch.testing.assert_close(module(q, kv), expected)
    packed = module(q.flatten(0, 1), kv.flatten(0, 1), None, cumulative([3, 3]), 3, cu, 6)
    torch.testing.assert_close(packed, expected.flatten(0, 1))
    expected = naive(q, *kv.unbind(2), window=(3, -1), scale=0.3, slopes=slopes)[0]
    torch.testing.assert_close(module(q, kv, causal=False), expected)


SIGNATURES = {
    "flash_attn_func": "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes "
    "deterministic return_attn_probs",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p "
    "softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs "
    "block_table",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens "
    "cache_batch_idx cache_leftpad block_table softmax_scale causal window_size softcap "
    "rotary_interleaved alibi_slopes num_splits return_softmax_lse",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    """Positional arguments in another order than flash-attn's."""
    assert list(inspect.signature(getattr(fa, name)).parameters) == SIGNATURES[name].split()


@pytest.mark.skipif(
    "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn") is not None,
    reason="the real flash_attn is installed and must win",
)
def test_install():
    """A stand-in that find_spec or importlib.metadata does not see, or that stays behind."""
    assert fa.install() and fa.install()
    try:
        assert importlib.util.find_spec("flash_attn") is not None
        assert importlib.util.find_spec("flash_attn.bert_padding") is not None
        assert importlib.metadata.version("flash-attn") == fa.VERSION
        assert importlib.metadata.version("flash_attn") == fa.VERSION
        assert "flash-attn" in importlib.metadata.packages_distributions()["flash_attn"]
        module = importlib.import_module("flash_attn")
        assert module.flash_attn_func is fa.flash_attn_func
        assert module.__version__ == fa.VERSION
        inner = importlib.import_module("flash_attn.flash_attn_interface")
        assert inner.flash_attn_varlen_func is fa.flash_attn_varlen_func
        padding = importlib.import_module("flash_attn.bert_padding")
        assert padding.unpad_input is unpad_input
        turned = importlib.import_module("flash_attn.layers.rotary")
        assert turned.apply_rotary_emb is rotary.apply_rotary_emb
        assert turned.RotaryEmbedding is rotary.RotaryEmbedding
        mha = importlib.import_module("flash_attn.modules.mha")
        assert mha.FlashSelfAttention is FlashSelfAttention
        assert inner._flash_attn_varlen_backward is passes.varlen_backward
        assert inner._wrapped_flash_attn_varlen_forward is passes.varlen_forward
        assert inner.flash_attn_gpu is importlib.import_module("flash_attn_2_cuda")
        assert inner.flash_attn_gpu.varlen_fwd is kernels.varlen_fwd
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.ops")
    finally:
        fa.uninstall()
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("flash_attn")


BAD = {
    "rank": (dict(q=(2, 3, 8)), r"q must have shape \[B, S, H, D\]"),
    "heads": (dict(k=(1, 4, 3, 8), v=(1, 4, 3, 8)), "heads"),
    "window": (dict(window_size=3), "window_size"),
    "window_type": (dict(window_size=("a", 1)), "window_size"),
    "causal": (dict(causal="yes"), "causal"),
    "softcap": (dict(softcap=-1.0), "softcap"),
    "dropout": (dict(dropout_p=1.5), "dropout_p"),
    "slopes": (dict(alibi_slopes=torch.zeros(3)), "alibi_slopes"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    """An error that does not name the argument, or none."""
    options, match = dict(BAD[name][0]), BAD[name][1]
    tensors = [normal(*options.pop(n, (1, 4, 4, 8))) for n in "qkv"]
    with pytest.raises((ValueError, TypeError), match=match):
        fa.flash_attn_func(*tensors, **options)


def test_bad_varlen_input():
    """Lengths that fall, which torch refuses without a name; a bound of lengths that makes work."""
    q, pages = normal(7, 4, 8), normal(5, 2, 4, 8)
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    falling = torch.tensor([0, 4, 3], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_k must"):
        fa.flash_attn_varlen_func(
            q, pages, pages, cumulative([3, 4]), falling, 4, 4, block_table=table
        )
    cu = cumulative([3, 4])
    call = varlen.varlen_call(q, q[:6], q[:6], cu, cumulative([3, 3]), 1 << 40, 1 << 40)
    assert (call.max_seqlen_q, call.max_seqlen_k) == (7, 6)  # without the cut the call takes hours


def test_bad_kvcache_input():
    """A cache overrun, lengths missing, tables that exclude one another."""
    q, cache, k = normal(2, 1, 4, 8), normal(2, 6, 4, 8), normal(2, 2, 4, 8)
    index = torch.tensor([0, 1], dtype=torch.int32)
    cases = (
        (dict(k=k, v=k), "cache_seqlens must be given"),
        (dict(k=k, v=k, cache_seqlens=5), "cache_seqlens must be between"),
        (dict(k=k, cache_seqlens=1), "v_new"),
        (dict(cache_seqlens=index[:1]), "cache_seqlens must be int32"),
        (dict(cache_batch_idx=index, block_table=index[:, None]), "cache_batch_idx must be None"),
        (dict(cache_batch_idx=index + 1), "cache_batch_idx must be between 0 and 1, got 2 at 1"),
        (
            dict(block_table=index[:, None], cache_seqlens=7),
            "block_table must have pages for cache_seqlens' 7",
        ),
        (dict(rotary_cos=cache[0, :, 0]), "rotary_cos needs"),
        (
            dict(k=k, v=k, cache_seqlens=3, rotary_cos=normal(4, 4), rotary_sin=normal(4, 4)),
            "rotary_cos must have at least 5 rows",
        ),
    )
    for options, match in cases:
        with pytest.raises((ValueError, TypeError, RuntimeError), match=match):
            fa.flash_attn_with_kvcache(q, cache.clone(), cache.clone(), **options)
