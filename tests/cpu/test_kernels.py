"""The CPU kernels on every ISA of this machine, against the float64 reference.

Also the suite that runs under AddressSanitizer: shapes on the edges of tiles, vectors and pages.
"""

import math
import random

import pytest
import torch
from closeness import MEAN_IN_HALF, assert_close
from kernel_cases import FEATURES, LEVELS, SHAPES, check_threads, random_features

from attn_ext import _C
from attn_ext.backends import cpu
from attn_ext.core.schema import BOTTOM_RIGHT, TOP_LEFT, Needs
from attn_ext.testing import check_call, random_call

HALVES = (torch.bfloat16, torch.float16)


pytestmark = pytest.mark.usefixtures("isa")  # each test once per instruction set


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_shapes(name, dtype):
    """Wrong tails, reads or writes past a row, uninitialised outputs."""
    seqlen_q, seqlen_k, head_dim, head_dim_v = SHAPES[name]
    call = random_call(
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        dtype=dtype,
        stats=True,
        layout="padded",
    )
    check_call(call, "cpu")


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features(name, dtype):
    """A feature left out, or its gradient."""
    options = {"seqlen_q": 140, "seqlen_k": 260, "head_dim": 24, "stats": True, "dtype": dtype}
    check_call(random_call(**{**options, **FEATURES[name]}), "cpu")


@pytest.mark.parametrize("seqlen_k", [220, 385, 500])
@pytest.mark.parametrize("head_dim", [8, 72])
@pytest.mark.parametrize("name", ["mask with empty rows", "causal, top left", "dropout", "softcap"])
def test_many_heads(name, head_dim, seqlen_k):
    """The backward's larger blocks of keys: scratch, words of the mask, whole rows up to 384."""
    options = {**FEATURES[name], "seqlen_k": seqlen_k}
    call = random_call(batch=4, heads_q=8, seqlen_q=67, head_dim=head_dim, **options)
    check_call(call, "cpu")


@pytest.mark.parametrize("name", FEATURES)
def test_varlen(name):
    """Positions, masks or dropout bits counted from the buffer's start and not the sequence's."""
    options = {k: v for k, v in FEATURES[name].items() if k != "seqlen_k"}
    call = random_call(seqlens_q=[0, 5, 131, 1], seqlens_k=[4, 7, 140, 0], stats=True, **options)
    check_call(call, "cpu")


@pytest.mark.parametrize("page_size", [0, 1, 3, 64, 256])
@pytest.mark.parametrize("seqlen_q", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode(page_size, seqlen_q, dtype):
    """A tile that crosses pages, keys beyond the used length (NaN there), a cache without keys."""
    call = random_call(
        seqlen_q=seqlen_q,
        heads_q=4,
        heads_k=2,
        seqlen_k=520,
        cache_seqlens=[0, 7, 520],
        page_size=page_size,
        causal=True,
        dtype=dtype,
    )
    check_call(call, "cpu", grads=False)


# What queries of one decode call see: the same keys, or each its own
VISIBLE = {
    "causal": {"causal": True},
    "window": {"causal": True, "window": (70, -1)},
    "a mask of the keys": {"mask": "k"},
    "a mask of its own": {"mask": "qk"},
    "ALiBi and softcap": {"alibi": True, "softcap": 3.0, "causal": True},
    "a bias of its own": {"bias": "qk"},
    "a bias of the keys": {"bias": "k"},
}


@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize("seqlen_q", [3, 16, 17])
@pytest.mark.parametrize("heads_q", [2, 6])
def test_several_queries_against_a_cache(name, seqlen_q, heads_q):
    """Queries worked on together though they see other keys, keys of one stream left out or taken
    twice, or heads of a group that take another head's panel."""
    call = random_call(
        seqlen_q=seqlen_q, heads_q=heads_q, heads_k=2, seqlen_k=331, head_dim=32,
        cache_seqlens=[331, 18, 200], page_size=5, **VISIBLE[name],
    )  # fmt: skip
    check_call(call, "cpu", grads=False)


@pytest.mark.parametrize("heads_q", [2, 4])  # their rows go to the decode kernel, or to panels
@pytest.mark.parametrize("seqlen_k", [64, 65, 127, 256, 257])
def test_a_tree_of_drafts(seqlen_k, heads_q):
    """Speculative verification: all queries see the context, and of the last keys their own."""
    call = random_call(
        batch=1, seqlen_q=9, heads_q=heads_q, heads_k=1, seqlen_k=seqlen_k, head_dim=64, mask="qk"
    )
    tree = torch.eye(9, dtype=torch.bool)
    tree[torch.arange(1, 9), torch.arange(8) // 2] = True
    call.mask[..., :-9] = True
    call.mask[..., -9:] = tree
    check_call(call, "cpu", grads=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    dict(seqlen_q=33, seqlen_k=400, causal=True, stats=True),
    dict(seqlen_q=20, seqlen_k=61, window=(30, 2), sink=True, softcap=4.0, heads_q=10),
    dict(seqlen_q=64, seqlen_k=64, causal=True, sink=True, head_dim=24, head_dim_v=9),
    dict(seqlen_q=5, seqlen_k=40, align=TOP_LEFT, causal=True, mask="bqk", heads_q=16),
    dict(seqlen_q=1, seqlen_k=1500, batch=1, heads_k=1, heads_q=40, mask="k"),
], ids=["statistics", "sink", "whole panels", "top left", "one query"])  # fmt: skip
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_heads_that_share_a_panel(options, layout, dtype):
    """A row that takes the diagonal, the mask, the sink or the place of another head's query."""
    call = random_call(**dict(heads_q=6, heads_k=2, layout=layout, dtype=dtype) | options)
    check_call(call, "cpu", grads=False)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("features", [{}, {"causal": True, "dropout_p": 0.3}], ids=["", "more"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_largest_logit_moves_between_tiles(level, features, dtype):
    """Weights on the base of an earlier tile that overflow, or are added up on two bases."""
    call = random_call(seqlen_q=75, seqlen_k=700, head_dim=16, heads_q=1, dtype=dtype, **features)
    call.k.mul_(LEVELS[level](torch.arange(700.0))[:, None].to(dtype))
    check_call(call, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_rows_of_the_smallest_number_stay_finite(dtype):
    """Logits of finfo.min, as masks added to the scores have them, that overflow in other units."""
    call = random_call(batch=1, heads_q=1, seqlen_q=20, seqlen_k=200, dtype=dtype, bias="qk")
    call.bias[:, :, 3:7] = torch.finfo(dtype).min
    out, lse, *_ = cpu.forward(call)
    grads = cpu.backward(call, torch.ones_like(out), out, lse, None, Needs(True, True, True, True))
    for x in (out, lse, *grads[:4]):
        assert x.isfinite().all()
    if dtype != torch.float16:  # -65504 does not absorb the products
        mean = call.v.float().mean(2)[0, 0]
        assert_close(out[0, 0, 3].float(), mean, MEAN_IN_HALF)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_largest_scale_stays_finite(dtype):
    """A scale that overflows in other units than its own."""
    call = random_call(seqlen_k=300, scale=3e38, dtype=dtype)
    call.q.mul_(1e-19), call.k.mul_(1e-19)  # logits up to about 30
    out, lse, *_ = cpu.forward(call)
    assert out.isfinite().all() and lse.isfinite().all() and out.abs().max() > 0.1


@pytest.mark.parametrize("keys", [slice(300, 400), slice(1, 400, 4)], ids=["late", "scattered"])
def test_overflow_on_a_small_base_does_not_reach_the_output(keys):
    """A tile that is not computed again: O = inf where the base is far too small, whether it is
    that of an earlier tile or was found among some keys only.
    """
    call = random_call(batch=1, heads_q=1, seqlen_q=65, seqlen_k=400, head_dim=4, scale=1.0)
    call.q.fill_(1.0)
    call.k.zero_()
    call.k[:, :, keys] = 60.0  # logits of 0, and of 240
    out, lse, *_ = cpu.forward(call)
    torch.testing.assert_close(out, call.v[:, :, keys].mean(2, keepdim=True).expand_as(out))
    torch.testing.assert_close(lse, torch.full_like(lse, 240 + math.log(100)))


@pytest.mark.parametrize("where", ["k", "v"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_excluded_values_reach_nothing(where, value):
    """0 * NaN from a key that only some queries see."""
    call = random_call(seqlen_q=150, causal=True, head_dim=8)
    getattr(call, where)[:, :, 70] = value
    check_call(call, "cpu")


# (left, right): what a query sees around its own position
WINDOWS = {"all": (-1, -1), "left": (290, -1), "right": (-1, 40), "both": (205, 131)}
WINDOWS["causal"] = (-1, 0)


@pytest.mark.parametrize("query", [64, 127, 130, 199])  # edges of panels of 64
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("align", [TOP_LEFT, BOTTOM_RIGHT])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_one_query_reaches_the_keys_that_it_sees(query, window, align, dtype):
    """Keys that some queries of a panel do not see among those computed for all of them at once."""
    left, right = WINDOWS[window]
    call = random_call(
        batch=1, seqlen_q=200, seqlen_k=601, window=(left, right), align=align, dtype=dtype
    )
    out, lse, *_ = cpu.forward(call)
    dout = torch.zeros_like(out)
    dout[:, :, query] = 1
    dq, dk, dv, *_ = cpu.backward(call, dout, out, lse, None, Needs(True, True, True))
    at = torch.arange(601) - query - (401 if align == BOTTOM_RIGHT else 0)
    seen = ((at >= -left) | (left < 0)) & ((at <= right) | (right < 0))
    assert ((dv != 0).any(-1) == seen).all()
    assert not dk[:, :, ~seen].any()
    assert not dq[:, :, torch.arange(200) != query].any()


@pytest.mark.parametrize("options", [{"causal": True}, {"bias": "k"}, {"heads_q": 4, "heads_k": 1}])
@pytest.mark.parametrize("openmp", [True, False], ids=["torch's threads", "own threads"])
def test_bitwise_equal_for_any_number_of_threads(options, openmp):
    """An order of additions that depends on scheduling."""
    for dtype in (torch.float32, torch.bfloat16):
        call = random_call(seqlen_q=300, dtype=dtype, batch=1, **options)
        check_threads(call, openmp, (1, 2, 3, 5))


def test_isas_are_chosen_and_refused():
    """An unknown name that falls back in silence."""
    with pytest.raises(ValueError, match=r"ATTN_EXT_ISA must be one .* got 'sse9'"):
        _C.set_isa("sse9")


@pytest.mark.parametrize("seed", range(40))
def test_random_mixes(seed):
    """Features that are right alone and wrong together."""
    r = random.Random(seed)
    heads_k = r.choice([1, 2])
    call = random_call(
        seed,
        batch=r.choice([0, 1, 2]),
        heads_q=heads_k * r.choice([1, 3]),
        heads_k=heads_k,
        seqlen_q=r.choice([1, 30, 129, 140]),
        seqlen_k=r.choice([1, 128, 129, 200]),
        head_dim=r.choice([1, 8, 40, 64]),
        head_dim_v=r.choice([None, 5, 72]),
        dtype=r.choice([torch.float32, torch.float64]),
        **random_features(r),
    )
    check_call(call, "cpu")


def test_negative_sizes_are_refused():
    """A corrupt struct that reaches a kernel."""
    call = random_call(seqlen_q=4)
    with pytest.raises(ValueError, match="at least"):
        t = cpu.canonical_inputs(call._replace(max_seqlen_q=-1))
        out = torch.empty_like(call.q)
        lse = torch.empty(call.q.shape[:3])
        cpu.native_call(call._replace(max_seqlen_q=-1), t, out, lse).forward(1)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "additive"])
def test_each_gradient_alone(kind):
    """A gradient that is written where none is wanted, or that others' absence changes."""
    call = random_call(seqlen_q=70, seqlen_k=300, heads_q=4, heads_k=2, head_dim=24)
    if kind == "sigmoid":
        call = call._replace(normalizer="sigmoid")
    if kind == "additive":
        call = call._replace(w=torch.randn(4, 24), scale=1.0)
    out, lse, *_ = cpu.forward(call)
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape)
    every = Needs(True, True, True, w=kind == "additive")
    whole = cpu.backward(call, dout, out, lse, None, every)
    for name in ("q", "k", "v"):
        alone = cpu.backward(call, dout, out, lse, None, Needs(**{name: True}))
        assert torch.equal(getattr(alone, name), getattr(whole, name))
        assert all(getattr(alone, other) is None for other in "qkv" if other != name)
