"""The public functions, forward and backward, against the float64 reference under the tolerance
rule of DESIGN 5.

A curated list: each shape and feature set stands for a way to be wrong.  Views lie in NaN-poisoned
storage, and torch.empty gives NaN, so that a stray read or an element never written is seen.
"""

import importlib.metadata

import pytest
import torch
from closeness import ONE_SUM, assert_close
from hypothesis import given
from hypothesis import strategies as st

import attn_ext
from attn_ext.backends import reference as oracle
from attn_ext.backends import registry
from attn_ext.core.problem import Problem
from attn_ext.core.schema import BOTTOM_RIGHT, GRADIENTS, TOP_LEFT, UNBOUNDED, Needs
from attn_ext.testing import (
    assert_close_to_reference,
    differentiated,
    poisoned_memory,
    random_call,
    to_float64,
)

TENSORS = ("q", "k", "v", "mask", "bias", "alibi_slopes", "sink")

SHAPES = {
    "odd_sizes": dict(seqlen_q=37, seqlen_k=53, head_dim=16),
    "one_query": dict(seqlen_q=1, seqlen_k=45),
    "one_key": dict(seqlen_q=45, seqlen_k=1),
    "no_keys": dict(seqlen_q=5, seqlen_k=0),
    "no_queries": dict(seqlen_q=0, seqlen_k=5),
    "batch_0": dict(batch=0, seqlen_q=5, seqlen_k=5),
    "more_keys_than_queries": dict(seqlen_q=33, seqlen_k=97),
    "more_queries_than_keys": dict(seqlen_q=97, seqlen_k=33),
    "several_blocks": dict(batch=1, seqlen_q=193, seqlen_k=259, head_dim=32),
    "d_1": dict(head_dim=1, head_dim_v=1),
    "d_3": dict(head_dim=3),
    "d_40": dict(head_dim=40, seqlen_k=29),
    "d_64": dict(head_dim=64, seqlen_k=29),
    "d_80": dict(head_dim=80, seqlen_k=29),
    "d_111": dict(head_dim=111, seqlen_k=29),
    "d_128": dict(head_dim=128, seqlen_k=29),
    "d_256": dict(batch=1, head_dim=256, seqlen_k=29),
    "d_512": dict(batch=1, head_dim=512, seqlen_k=29),
    "dv_differs": dict(head_dim=24, head_dim_v=56, seqlen_k=29),
    "gqa_8_to_1": dict(batch=1, heads_q=8, heads_k=1, seqlen_k=29),
    "gqa_3_to_1": dict(heads_q=6, heads_k=2, seqlen_k=29),
    "heads_inner": dict(layout="bshd", seqlen_k=29),
    "views_in_poisoned_storage": dict(layout="padded", seqlen_k=29),
}
FEATURES = {
    "plain": {},
    "causal_bottom_right": dict(causal=True),
    "causal_top_left": dict(causal=True, align=TOP_LEFT),
    "window": dict(window=(7, 3)),
    "one_sided_window": dict(window=(4, UNBOUNDED)),
    "causal_window_gqa": dict(causal=True, window=(9, 0), heads_q=4, heads_k=2),
    "mask": dict(mask=True),
    "mask_broadcast": dict(mask="k", layout="padded"),
    "bias": dict(bias=True),
    "bias_per_head": dict(bias="hqk"),
    "bias_per_batch_key": dict(bias="bk", causal=True),
    "softcap": dict(softcap=2.0, bias="hq"),
    "alibi": dict(alibi=True, causal=True),
    "alibi_per_batch": dict(alibi="b", layout="bshd"),
    "sink": dict(sink=True, causal=True),
    "dropout": dict(dropout_p=0.3, mask=True),
    "dropout_everything": dict(dropout_p=1.0),
    "scale": dict(scale=-0.7),
    "all_at_once": dict(
        heads_q=4, heads_k=2, causal=True, window=(11, 0), mask="bqk", bias="hqk", softcap=3.0,
        alibi=True,
        sink=True, dropout_p=0.2,
    ),
}  # fmt: skip


def keywords(call) -> dict:
    """The public keyword arguments that say what `call` says."""
    causal = False
    if call.window_right == 0:
        causal = "top_left" if call.align == TOP_LEFT else "bottom_right"
    side = lambda n: None if n == UNBOUNDED else n  # noqa: E731
    return dict(
        causal=causal, window=(side(call.window_left), side(call.window_right)), mask=call.mask,
        bias=call.bias, softcap=call.softcap, alibi_slopes=call.alibi_slopes, sink=call.sink,
        dropout_p=call.dropout_p, scale=call.scale, deterministic=call.deterministic,
    )  # fmt: skip


def skip_unable(call, backend: str, grad: bool) -> None:
    """An honest refusal is a skip that shows the reason."""
    why = registry.reasons(backend, Problem.of(differentiated(call, grad)))
    if why:
        pytest.skip("; ".join(why))


def check(call, backend: str, monkeypatch=None) -> None:
    """`call` through the public API on `backend`: outputs, statistics and gradients within
    tolerance.
    """
    skip_unable(call, backend, grad=True)
    held = {n: getattr(call, n) for n in GRADIENTS if getattr(call, n) is not None}
    leaves = {n: t.detach().requires_grad_() for n, t in held.items()}
    public = call._replace(**leaves)
    options = dict(keywords(public), return_lse=True, return_stats=True, backend=backend)
    torch.manual_seed(11)
    with poisoned_memory():
        if call.cu_seqlens_q is None:
            out, lse, stats = attn_ext.attention(public.q, public.k, public.v, **options)
        else:
            out, lse, stats = attn_ext.attention_varlen(
                public.q, public.k, public.v, call.cu_seqlens_q, call.cu_seqlens_k, **options
            )
        dout, dlse = torch.randn(out.shape).to(out), torch.randn(lse.shape).to(lse)
        grads = torch.autograd.grad((out, lse), list(leaves.values()), (dout, dlse))
    if call.dropout_p > 0:
        torch.manual_seed(11)
        rng_state = torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=call.q.device)
        call = call._replace(rng_state=rng_state)
    call = call._replace(need_stats=True)
    exact = to_float64(call)
    truths, naives = oracle.naive(exact), oracle.naive(call)
    results = (out, lse, stats.max_logit, stats.entropy)
    names = ("out", "lse", "max_logit", "entropy")
    for name, got, truth, naive in zip(names, results, truths, naives, strict=True):
        assert_close_to_reference(got, truth, naive, "out", name, call.q.dtype)
    assert torch.equal(stats.lse, lse)
    needs = Needs(**{name: True for name in leaves})
    truths = oracle.forward_and_backward(exact, dout.double(), dlse.double(), needs)[1]
    naives = oracle.forward_and_backward(call, dout, dlse, needs)[1]
    got = dict(zip(leaves, grads, strict=True))
    for name, truth, naive in zip(GRADIENTS, truths, naives, strict=True):
        if name in got:
            assert got[name].dtype == leaves[name].dtype
            assert_close_to_reference(got[name], truth, naive, "grad", f"d{name}", call.q.dtype)


def make(device, **options):
    """random_call with sizes that span more than one vector and block edge unless told."""
    defaults = dict(batch=2, heads_q=2, seqlen_q=21, head_dim=16)
    return random_call(**{**defaults, **options}, device=device)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, backend, device):
    """A size that a tile, a vector tail, a stride or an empty range gets wrong."""
    check(make(device, **SHAPES[shape]), backend)


@pytest.mark.parametrize(
    "shape", ["odd_sizes", "no_keys", "gqa_8_to_1", "d_80", "views_in_poisoned_storage"]
)
def test_shapes_with_every_feature(shape, backend, device):
    """A shape that is right plain and wrong beside mask, bias and dropout."""
    options = {**FEATURES["all_at_once"], **SHAPES[shape]}
    if "heads_q" not in SHAPES[shape]:
        options.update(heads_q=4, heads_k=2)
    check(make(device, **options), backend)


@pytest.mark.parametrize("feature", FEATURES)
def test_features(feature, backend, device):
    """A feature whose meaning or gradient differs from the reference, Sq != Sk both ways round."""
    check(make(device, seqlen_q=29, seqlen_k=43, **FEATURES[feature]), backend)
    check(make(device, seqlen_q=43, seqlen_k=29, **FEATURES[feature]), backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("feature", ["plain", "all_at_once", "sink", "bias_per_head"])
def test_dtypes(feature, dtype, backend, device):
    """Accumulating or storing in a narrower type than promised."""
    check(make(device, seqlen_q=33, seqlen_k=70, dtype=dtype, **FEATURES[feature]), backend)


VARLEN = {
    "ragged": dict(seqlens_q=(3, 17, 1, 30)),
    "empty_sequences": dict(seqlens_q=(0, 7, 0, 5, 0), seqlens_k=(4, 7, 0, 0, 0)),
    "no_sequences": dict(seqlens_q=()),
    "cross": dict(seqlens_q=(5, 20), seqlens_k=(31, 2)),
}


@pytest.mark.parametrize(
    "feature", ["plain", "causal_top_left", "causal_bottom_right", "dropout", "all_at_once"]
)
@pytest.mark.parametrize("lengths", VARLEN)
def test_varlen(lengths, feature, backend, device):
    """A sequence that sees a neighbour's keys, or alignment and dropout by row instead of by
    position.
    """
    check(make(device, **{**FEATURES[feature], **VARLEN[lengths]}), backend)


def test_varlen_is_each_sequence_alone(backend, device):
    """Packing changes a sequence's result."""
    call = make(device, seqlens_q=(5, 9, 2), seqlens_k=(8, 9, 4), head_dim=24)
    out = attn_ext.attention_varlen(
        call.q,
        call.k,
        call.v,
        call.cu_seqlens_q,
        call.cu_seqlens_k,
        causal="bottom_right",
        backend=backend,
    )
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for b in range(3):
        q = call.q[starts_q[b] : starts_q[b + 1]].transpose(0, 1)[None]
        k, v = (x[starts_k[b] : starts_k[b + 1]].transpose(0, 1)[None] for x in (call.k, call.v))
        alone = attn_ext.attention(q, k, v, causal="bottom_right", backend=backend)[0].transpose(
            0, 1
        )
        torch.testing.assert_close(out[starts_q[b] : starts_q[b + 1]], alone)


def test_rows_past_the_last_sequence_are_zero(backend, device):
    """Rows beyond cu_seqlens[-1] left uninitialised."""
    q = torch.randn(9, 2, 8, device=device, requires_grad=True)
    cu = torch.tensor([0, 3, 6], dtype=torch.int32, device=device)
    with poisoned_memory():
        out = attn_ext.attention_varlen(q, q, q, cu, cu, backend=backend)
        out.sum().backward()
    assert out[6:].abs().max() == 0
    assert q.grad[6:].abs().max() == 0
    assert torch.isfinite(q.grad).all()


@pytest.mark.parametrize("page_size", [0, 1, 7, 14])
@pytest.mark.parametrize("feature", ["plain", "window", "all_but_dropout"])
def test_decode(feature, page_size, backend, device):
    """Lengths, pages or alignment of the cache read wrongly; the unused part of the cache is
    NaN.
    """
    options = FEATURES.get(feature) or dict(FEATURES["all_at_once"], dropout_p=0.0)
    options = {} if feature == "plain" else options
    call = make(
        device, seqlen_q=3, seqlen_k=28, cache_seqlens=(28, 5, 0), page_size=page_size, **options
    )
    skip_unable(call, backend, grad=False)
    words = keywords(call)
    for name in ("dropout_p", "deterministic"):
        words.pop(name)
    words["causal"] = call.window_right == 0
    words["window"] = (None if call.window_left < 0 else call.window_left, words["window"][1])
    with poisoned_memory():
        out, lse = attn_ext.attention_decode(
            call.q, call.k, call.v, call.seqlens_k, block_table=call.block_table, return_lse=True,
            backend=backend, **words,
        )  # fmt: skip
    truths, naives = oracle.naive(to_float64(call)), oracle.naive(call)
    assert_close_to_reference(out, truths[0], naives[0], "out", "out", call.q.dtype)
    assert_close_to_reference(lse, truths[1], naives[1], "out", "lse", call.q.dtype)


@pytest.mark.parametrize("page_size", [0, 16])
@pytest.mark.parametrize("num_splits", [0, 1, 2, 3, 64, 10**6])
def test_decode_in_any_number_of_parts(num_splits, page_size, backend, device):
    """A part without keys, or parts merged wrongly; num_splits is only a hint."""
    sizes = dict(seqlen_q=2, heads_q=4, heads_k=1, seqlen_k=300, head_dim=32)
    call = make(device, cache_seqlens=(300, 65, 0), page_size=page_size, sink=True, **sizes)
    skip_unable(call, backend, grad=False)
    with poisoned_memory():
        out, lse = attn_ext.attention_decode(
            call.q, call.k, call.v, call.seqlens_k, block_table=call.block_table, causal=False,
            sink=call.sink, num_splits=num_splits, return_lse=True, backend=backend,
        )  # fmt: skip
    truths, naives = oracle.naive(to_float64(call)), oracle.naive(call)
    assert_close_to_reference(out, truths[0], naives[0], "out", "out", call.q.dtype)
    assert_close_to_reference(lse, truths[1], naives[1], "out", "lse", call.q.dtype)


def test_num_splits_reaches_the_kernel_that_splits(backend, device):
    """The hint is dropped on the way: sums in one and in nine parts then agree bit by bit."""
    call = make(device, cache_seqlens=(600, 600), seqlen_q=1, seqlen_k=600, head_dim=64)
    run = lambda n: attn_ext.attention_decode(  # noqa: E731
        call.q, call.k, call.v, call.seqlens_k, num_splits=n, backend=backend
    )
    assert torch.equal(run(3), run(3))
    assert torch.equal(run(1), run(9)) == (backend == "reference")


@pytest.mark.parametrize("page_size", [0, 4])
def test_decode_appends(page_size, backend, device):
    """New keys written to the wrong position or page, or not attended to."""
    lengths, new = (9, 2, 0), 3
    full = make(
        device,
        seqlen_q=new,
        seqlen_k=12,
        cache_seqlens=tuple(n + new for n in lengths),
        page_size=page_size,
    )
    skip_unable(full, backend, grad=False)
    want = attn_ext.attention_decode(
        full.q, full.k, full.v, full.seqlens_k, block_table=full.block_table, backend=backend
    )
    dense = make(device, seqlen_q=new, seqlen_k=12, cache_seqlens=tuple(n + new for n in lengths))
    rows = [slice(n, n + new) for n in lengths]
    k_new, v_new = (
        torch.stack([x[b, :, r] for b, r in enumerate(rows)]) for x in (dense.k, dense.v)
    )
    k, v = full.k.clone(), full.v.clone()
    for b, n in enumerate(lengths):  # the cache before: NaN where the new rows will go
        for s in range(n, n + new):
            if page_size:
                page = full.block_table[b, s // page_size].long()
                k[page, :, s % page_size] = v[page, :, s % page_size] = torch.nan
            else:
                k[b, :, s] = v[b, :, s] = torch.nan
    before = torch.tensor(lengths, dtype=torch.int32, device=device)
    got = attn_ext.attention_decode(
        full.q,
        k,
        v,
        before,
        k_new=k_new,
        v_new=v_new,
        block_table=full.block_table,
        backend=backend,
    )
    assert torch.equal(got, want)
    assert torch.equal(k.nan_to_num(), full.k.nan_to_num())
    assert torch.equal(v.nan_to_num(), full.v.nan_to_num())
    assert before.tolist() == list(lengths)


def test_decode_is_not_differentiable(backend, device):
    """A gradient silently lost instead of refused."""
    call = make(device, seqlen_q=1, seqlen_k=8, cache_seqlens=(8, 3))
    with pytest.raises(NotImplementedError, match="attention_varlen"):
        attn_ext.attention_decode(
            call.q.requires_grad_(), call.k, call.v, call.seqlens_k, backend=backend
        )


@given(
    sizes=st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(1, 20), st.integers(1, 20)),
    heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    causal=st.booleans(),
    align=st.sampled_from([TOP_LEFT, BOTTOM_RIGHT]),
    window=st.tuples(st.integers(-1, 12), st.integers(-1, 12)),
    scores=st.tuples(*[st.sampled_from([False, "k", "qk", "bhqk", "bh"])] * 2),
    flags=st.tuples(st.booleans(), st.booleans()),
    dropout_p=st.sampled_from([0.0, 0.25]),
)
def test_generated_calls(sizes, heads, causal, align, window, scores, flags, dropout_p):
    """A combination that nobody thought of."""
    seqlen_q, seqlen_k, head_dim, head_dim_v = sizes
    align = (
        align if causal else BOTTOM_RIGHT
    )  # the public API has no top-left window without causal
    call = random_call(
        heads_q=heads[0], heads_k=heads[1], seqlen_q=seqlen_q, seqlen_k=seqlen_k, head_dim=head_dim,
        head_dim_v=head_dim_v, causal=causal, align=align, window=window, mask=scores[0],
        bias=scores[1],
        alibi=flags[0], sink=flags[1], dropout_p=dropout_p,
    )  # fmt: skip
    check(call, attn_ext.explain(call.q, call.k, call.v).chosen)


def test_empty_rows_and_sink(backend, device):
    """A row that sees no key gives NaN, takes the sink's LSE, or a gradient that is not 0."""
    q = torch.randn(1, 2, 6, 8, device=device, requires_grad=True)
    k = torch.randn(1, 2, 3, 8, device=device, requires_grad=True)
    sink = torch.randn(2, device=device, requires_grad=True)
    out, lse, stats = attn_ext.attention(
        q,
        k,
        k,
        causal="bottom_right",
        sink=sink,
        return_lse=True,
        return_stats=True,
        backend=backend,
    )
    (out.sum() + lse[:, :, 3:].sum()).backward()
    assert (out[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -torch.inf).all()
    assert (stats.max_logit[:, :, :3] == -torch.inf).all()
    assert (stats.entropy[:, :, :3] == 0).all()
    assert (q.grad[:, :, :3] == 0).all()
    assert torch.isfinite(torch.cat([k.grad.flatten(), sink.grad])).all()


def test_hidden_nan_stays_hidden(backend, device):
    """NaN or inf at a masked key reaches the output or another gradient."""
    q, k, v = (torch.randn(1, 2, 7, 8, device=device) for _ in range(3))
    mask = torch.ones(7, 7, dtype=torch.bool, device=device)
    mask[:, 4] = False
    k[:, :, 4], v[:, :, 4] = torch.nan, torch.inf
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attn_ext.attention(*leaves, mask=mask, backend=backend)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert torch.isfinite(out).all()
    for grad in grads:
        assert torch.isfinite(grad).all()


def test_visible_nan_propagates(backend, device):
    """A NaN that the user should see is swallowed."""
    q, k, v = (torch.randn(1, 1, 6, 8, device=device) for _ in range(3))
    k[:, :, 2] = torch.nan
    out = attn_ext.attention(q, k, v, causal=True, backend=backend)
    assert torch.isfinite(out[:, :, :2]).all()
    assert out[:, :, 2:].isnan().all()


def test_returns(backend, device):
    """The tuple of results in another order or of another length than documented."""
    q = torch.randn(1, 2, 4, 8, device=device)
    out = attn_ext.attention(q, q, q, backend=backend)
    assert isinstance(out, torch.Tensor)
    pair = attn_ext.attention(q, q, q, return_lse=True, backend=backend)
    assert pair[1].shape == (1, 2, 4) and pair[1].dtype == torch.float32
    pair = attn_ext.attention(q, q, q, return_stats=True, backend=backend)
    assert isinstance(pair[1], attn_ext.RowStats)
    triple = attn_ext.attention(q, q, q, return_lse=True, return_stats=True, backend=backend)
    assert torch.equal(triple[1], triple[2].lse)
    assert_close(triple[0], out, ONE_SUM)  # GPUs round logits otherwise where statistics are wanted


@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_output_in_memory_order_of_q(layout, backend, device):
    """[B, S, H, D] models pay for a copy after the call."""
    call = make(device, layout=layout, head_dim_v=24)
    out = attn_ext.attention(call.q, call.k, call.v, backend=backend)
    assert (out.transpose(1, 2) if layout == "bshd" else out).is_contiguous()


def test_other_last_stride(backend, device):
    """A q, k or v whose last dimension is not contiguous read as if it were."""
    q, k, v = (torch.randn(2, 2, 16, 9, device=device) for _ in range(3))
    strided = [x.transpose(2, 3).requires_grad_() for x in (q, k, v)]
    plain = [x.transpose(2, 3).contiguous().requires_grad_() for x in (q, k, v)]
    outs = [attn_ext.attention(*xs, causal=True, backend=backend) for xs in (strided, plain)]
    grads = [
        torch.autograd.grad(o.square().sum(), xs)
        for o, xs in zip(outs, (strided, plain), strict=True)
    ]
    assert torch.equal(*outs)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_manual_seed_repeats_dropout(backend, device):
    """torch.manual_seed does not reach the dropout mask, or two calls share one mask."""
    q = torch.randn(1, 2, 32, 8, device=device)
    run = lambda: attn_ext.attention(q, q, q, dropout_p=0.5, backend=backend)  # noqa: E731
    torch.manual_seed(5)
    first, second = run(), run()
    torch.manual_seed(5)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_explain_names_each_backend_and_the_choice():
    """A backend left out of explain, or a choice that the call does not make."""
    q = torch.randn(1, 2, 4, 8)
    text = str(attn_ext.explain(q, q, q, causal=True, return_lse=True))
    for name in attn_ext.backends():
        assert name in text
    assert "chosen" in text
    cu = torch.tensor([0, 4], dtype=torch.int32)
    packed = torch.randn(4, 2, 8)
    assert (
        attn_ext.explain(packed, packed, packed, cu_seqlens_q=cu, cu_seqlens_k=cu).problem.kind
        == "varlen"
    )
    lengths = torch.tensor([2], dtype=torch.int32)
    cache, new = torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 4, 8)
    found = attn_ext.explain(q, cache, cache, cache_seqlens=lengths, k_new=new, v_new=new)
    assert found.problem.kind == "decode"
    assert cache.abs().max() == 0  # explaining computes nothing and appends nothing


def test_named_backend_never_falls_back():
    """backend='cuda' on CPU tensors quietly runs elsewhere."""
    q = torch.randn(1, 1, 4, 8)
    for name, missing in attn_ext.backends().items():
        if missing:
            with pytest.raises(NotImplementedError, match=name):
                attn_ext.attention(q, q, q, backend=name)
            assert attn_ext.explain(q, q, q, backend=name).chosen is None


def test_version_is_that_of_the_package():
    """Two sources of the version."""
    assert attn_ext.__version__ == importlib.metadata.version("attn_ext")
