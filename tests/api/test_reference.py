"""The oracle itself, against F.scaled_dot_product_attention, gradcheck, and direct formulas.

One long file, since whoever asks what the oracle is held to reads it as a whole.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from closeness import assert_same

from attn_ext.backends import reference as backend
from attn_ext.core import logit
from attn_ext.core.reference import attend, dropout_keep_mask, safe_matmul
from attn_ext.core.schema import BOTTOM_RIGHT, GRADIENTS, TOP_LEFT, Call, Needs
from attn_ext.testing import assert_close_to_reference, check_call, needs_of, padded, random_call

F64 = torch.float64


def close(actual, expected):
    """Equal up to float64 rounding, NaN and inf included: the tolerance rule, naive exact."""
    assert_close_to_reference(actual, expected.double(), expected.double(), dtype=F64)


def gradients(call, dout=None, dlse=None):
    """(out, lse), {name: gradient} of `call` for dout, dlse drawn from a fixed seed."""
    out, lse, _, _ = backend.forward(call)
    generator = torch.Generator().manual_seed(1)
    if dout is None:
        dout = torch.randn(out.shape, generator=generator, dtype=out.dtype)
        dlse = torch.randn(lse.shape, generator=generator, dtype=lse.dtype)
    needs = needs_of(call)
    grads = backend.backward(call, dout, out, lse, dlse, needs)
    return (out, lse), dict(zip(GRADIENTS, grads, strict=True))


# --- against torch -------------------------------------------------------------------------------

SDPA_CASES = {
    "plain": {},
    "cross lengths": {"seqlen_q": 5, "seqlen_k": 9},
    "value dim differs": {"head_dim_v": 7},
    "grouped heads are consecutive": {"heads_q": 6, "heads_k": 2},
    "scale": {"scale": 0.3},
    "mask over keys only": {"mask": "bk"},
    "mask per head": {"mask": "hqk"},
    "bias broadcast over batch": {"bias": "hqk"},
    "top-left causal, more keys": {"causal": True, "align": TOP_LEFT, "seqlen_k": 25},
    "top-left causal, more queries": {"causal": True, "align": TOP_LEFT, "seqlen_k": 7},
}


@pytest.mark.parametrize("name", SDPA_CASES)
def test_agrees_with_torch_sdpa_forward_and_backward(name):
    """Would catch a wrong scale, head grouping, mask polarity, broadcast or causal diagonal."""
    call = random_call(3, dtype=F64, **SDPA_CASES[name])
    causal = call.window_right == 0
    (out, _), grads = gradients(call, dout := torch.randn_like(attend(call)[0]), None)
    leaves = [t.detach().requires_grad_() for t in (call.q, call.k, call.v)]
    bias = None if call.bias is None else call.bias.detach().requires_grad_()
    expected = F.scaled_dot_product_attention(
        *leaves,
        attn_mask=call.mask if bias is None else bias,
        is_causal=causal,
        scale=call.scale,
        enable_gqa=True,
    )
    expected.backward(dout)
    close(out, expected.detach())
    for name, leaf in zip(("q", "k", "v", "bias"), [*leaves, bias], strict=True):
        if leaf is not None:
            close(grads[name], leaf.grad)


# --- gradients -----------------------------------------------------------------------------------

GRADCHECK_CASES = {
    "bias broadcast": {"bias": "hk", "mask": "bqk"},
    "sink and causal": {"sink": True, "causal": True},
    "softcap and alibi": {"softcap": 1.5, "alibi": True, "bias": "q"},
    "dropout": {"dropout_p": 0.4, "sink": True},
    "grouped, window, value dim": {"heads_k": 1, "window": (1, 2), "head_dim_v": 2, "seqlen_k": 6},
    "rows without keys": {"causal": True, "seqlen_q": 5, "seqlen_k": 3, "sink": True},
    "varlen": {"seqlens_q": [2, 0, 3], "seqlens_k": [3, 2, 1], "bias": True, "dropout_p": 0.3},
}


@pytest.mark.parametrize("name", GRADCHECK_CASES)
def test_gradcheck_through_out_and_lse(name):
    """Would catch a wrong term in the backward of the two custom products, or a gradient cut by
    a detach.
    """
    options = {"seqlen_q": 4, "head_dim": 3, **GRADCHECK_CASES[name]}
    call = random_call(5, dtype=F64, **options)
    names = [n for n in GRADIENTS if getattr(call, n) is not None]
    leaves = [getattr(call, n).detach().clone().requires_grad_() for n in names]

    def outputs(*values):
        out, lse, _, _ = attend(call._replace(**dict(zip(names, values, strict=True))))
        return out, torch.where(lse.isinf(), torch.zeros_like(lse), lse)

    assert torch.autograd.gradcheck(outputs, leaves)


def test_sink_gradient_is_the_formula_of_the_contract():
    """Would catch a sink gradient that misses the LSE term: dsink = sum exp(sink - LSE) (dLSE -
    delta).
    """
    call = random_call(6, dtype=F64, sink=True, causal=True)
    out, lse, _, _ = backend.forward(call)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    _, grads = gradients(call, dout, dlse)
    delta = (dout * out).sum(-1)
    expected = (torch.exp(call.sink[:, None] - lse) * (dlse - delta)).sum((0, 2))
    close(grads["sink"], expected)


def test_backward_returns_only_what_is_needed():
    """Would catch a gradient computed for an input that did not ask, or a missing zero for an
    unused one.
    """
    call = random_call(dtype=F64, bias=True, sink=True, dropout_p=1.0)
    out, lse, _, _ = backend.forward(call)
    needs = Needs(k=True, v=True, sink=True)
    dout = torch.ones_like(out)
    dq, dk, dv, dbias, dsink, _ = backend.backward(call, dout, out, lse, None, needs)
    assert dq is None and dbias is None
    for grad in (dk, dv, dsink):
        assert torch.equal(grad, torch.zeros_like(grad))


# --- every feature written out -------------------------------------------------------------------


def by_hand(call, b, h, i):
    """(O row, LSE, max_logit, entropy) of one query of a dense call: loops and math only."""
    seqlen_q, seqlen_k = call.q.shape[2], call.k.shape[2]
    kv = h // (call.q.shape[1] // call.k.shape[1])
    off = seqlen_k - seqlen_q if call.align == BOTTOM_RIGHT else 0
    scores = {}
    for j in range(seqlen_k):
        if call.window_left >= 0 and j < i + off - call.window_left:
            continue
        if call.window_right >= 0 and j > i + off + call.window_right:
            continue
        full = (*call.q.shape[:3], seqlen_k)
        if call.mask is not None and not call.mask.expand(full)[b, h, i, j]:
            continue
        s = call.scale * sum((call.q[b, h, i] * call.k[b, kv, j]).tolist())
        if call.softcap > 0:
            s = call.softcap * math.tanh(s / call.softcap)
        if call.bias is not None:
            s += call.bias.expand(full)[b, h, i, j].item()
        if call.alibi_slopes is not None:
            slope = call.alibi_slopes.expand(full[:2])[b, h].item()
            s -= slope * abs(i + seqlen_k - seqlen_q - j)
        scores[j] = s
    zero = torch.zeros_like(call.v[0, 0, 0])
    if not scores:
        return zero, -math.inf, -math.inf, 0.0
    total = sum(math.exp(s) for s in scores.values())
    if call.sink is not None:
        total += math.exp(call.sink[h].item())
    lse = math.log(total)
    out, entropy = zero, 0.0
    keep = None
    if call.dropout_p > 0:
        seed, offset = call.rng_state.tolist()
        sizes = (*call.q.shape[:3], seqlen_k)
        keep = dropout_keep_mask(seed, offset, *sizes, call.dropout_p)[b, h, i]
    for j, s in scores.items():
        p = math.exp(s - lse)
        entropy -= p * math.log(p)
        if keep is None or keep[j]:
            out = out + p / (1 - call.dropout_p) * call.v[b, kv, j]
    return out, lse, max(scores.values()), entropy


BY_HAND_CASES = {
    "everything, bottom right": {"causal": True, "seqlen_k": 11, "alibi": "b", "dropout_p": 0.3},
    "everything, top left": {"window": (3, 1), "align": TOP_LEFT, "seqlen_k": 5, "alibi": True},
    "left window, fewer keys": {"window": (2, -1), "seqlen_k": 4, "dropout_p": 0.5},
}


@pytest.mark.parametrize("name", BY_HAND_CASES)
def test_every_row_is_what_the_formula_says(name):
    """Would catch any feature in the wrong order or with the wrong sign, sinks in max_logit,
    dropout in LSE.
    """
    common = {"mask": True, "bias": "bqk", "sink": True, "softcap": 2.0, "stats": True}
    call = random_call(
        8, dtype=F64, heads_q=4, heads_k=2, seqlen_q=7, head_dim=3, **common, **BY_HAND_CASES[name]
    )
    out, lse, max_logit, entropy = attend(call)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(7)).tolist():
        row, *numbers = by_hand(call, b, h, i)
        close(out[b, h, i], row)
        got = torch.stack((lse[b, h, i], max_logit[b, h, i], entropy[b, h, i]))
        close(got, torch.tensor(numbers, dtype=F64))


def test_window_edges_are_inclusive():
    """Would catch a window that is off by one: left 1 and right 0 keep the diagonal and its
    left neighbour.
    """
    call = random_call(seqlen_q=2, seqlen_k=4, window=(1, 0))
    assert logit.in_window(call, logit.Pairs.all_of(2, 4, "cpu")).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


# --- sequences and caches ------------------------------------------------------------------------


def test_varlen_is_a_loop_of_dense_calls():
    """Would catch a wrong offset, or dropout, mask, bias and slopes of the wrong sequence."""
    lengths_q, lengths_k = [4, 0, 7, 3], [6, 2, 5, 0]
    call = random_call(
        2,
        dtype=F64,
        seqlens_q=lengths_q,
        seqlens_k=lengths_k,
        heads_q=4,
        heads_k=2,
        causal=True,
        mask="bqk",
        bias="bhk",
        alibi="b",
        dropout_p=0.3,
        stats=True,
    )
    out, lse, max_logit, entropy = attend(call)
    start_q = start_k = 0
    for b, (sq, sk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        # batch elements before b are there only to put the sequence at index b of dropout's counter
        def dense(x, start, length, b=b):
            return x[start : start + length].transpose(0, 1).expand(b + 1, -1, -1, -1)

        single = call._replace(
            q=dense(call.q, start_q, sq),
            k=dense(call.k, start_k, sk),
            v=dense(call.v, start_k, sk),
            mask=call.mask[b : b + 1, :, :sq, :sk],
            bias=call.bias[b : b + 1, :, :, :sk],
            alibi_slopes=call.alibi_slopes[b],
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        rows = slice(start_q, start_q + sq)
        expected = attend(single)
        close(out[rows], expected[0][b].transpose(0, 1))
        for got, value in zip((lse, max_logit, entropy), expected[1:], strict=True):
            close(got[:, rows], value[b])
        start_q, start_k = start_q + sq, start_k + sk


def test_varlen_rows_past_the_last_sequence_are_empty():
    """Would catch an output shorter than q, or rubbish in rows that no sequence owns."""
    call = random_call(seqlens_q=[3, 2], stats=True)
    longer = torch.cat((call.q, torch.full_like(call.q, torch.nan)))
    out, lse, max_logit, entropy = attend(call._replace(q=longer))
    assert out.shape[0] == 10 and out[5:].eq(0).all() and entropy[:, 5:].eq(0).all()
    assert lse[:, 5:].eq(-torch.inf).all() and max_logit[:, 5:].eq(-torch.inf).all()


def test_decode_is_dense_on_the_used_part_and_pages_change_nothing():
    """Would catch a wrong page order, a length that is not per sequence, or a read of the
    unused cache (NaN).
    """
    lengths = [9, 0, 1, 12]
    options = {
        "seqlen_q": 2,
        "seqlen_k": 13,
        "cache_seqlens": lengths,
        "heads_q": 4,
        "heads_k": 2,
        "causal": True,
        "alibi": True,
        "bias": "bhqk",
        "dtype": F64,
        "stats": True,
    }
    flat, paged = random_call(4, **options), random_call(4, page_size=5, **options)
    results = attend(flat)
    for a, b in zip(results, attend(paged), strict=True):
        close(b, a)
    for b, length in enumerate(lengths):
        single = flat._replace(
            q=flat.q[b : b + 1],
            k=flat.k[b : b + 1, :, :length],
            v=flat.v[b : b + 1, :, :length],
            bias=flat.bias[b : b + 1, ..., :length],
            seqlens_k=None,
        )
        for got, expected in zip(results, attend(single), strict=True):
            close(got[b : b + 1], expected)


# --- empty rows and values that are not finite ---------------------------------------------------

EMPTY_CASES = {
    "no keys at all": {"seqlen_k": 0},
    "causal with fewer keys": {"causal": True, "seqlen_k": 5},
    "mask of False": {"mask": "b"},
}


@pytest.mark.parametrize("sink", [None, 1.0, 800.0, torch.inf])
@pytest.mark.parametrize("name", EMPTY_CASES)
def test_empty_rows_give_zeros_and_no_nan(name, sink):
    """Would catch -inf - -inf, 0 / 0, and a gradient that leaks out of a row without keys, also
    with a sink, and with one whose exponential is inf.
    """
    call = random_call(sink=sink is not None, bias="h", stats=True, dtype=F64, **EMPTY_CASES[name])
    if sink is not None:
        call = call._replace(sink=torch.full_like(call.sink, sink))
    if call.mask is not None:
        call = call._replace(mask=torch.zeros_like(call.mask))
    first = 12  # rows before it see nothing, in all three cases
    out, lse, max_logit, entropy = attend(call)
    assert out[:, :, :first].eq(0).all() and entropy[:, :, :first].eq(0).all()
    assert lse[:, :, :first].eq(-torch.inf).all() and max_logit[:, :, :first].eq(-torch.inf).all()
    dout, dlse = torch.zeros_like(out), torch.zeros_like(lse)
    dout[:, :, :first], dlse[:, :, :first] = torch.randn(out.shape[-1], dtype=F64), 3.0
    _, grads = gradients(call, dout, dlse)
    if sink == torch.inf:  # the other rows are NaN
        call = call._replace(mask=torch.zeros(1, 1, 1, call.k.shape[2], dtype=torch.bool))
        _, grads = gradients(call, dout, dlse)
    for grad in grads.values():
        assert grad is None or grad.eq(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_excluded_keys_reach_nothing(value, softcap):
    """Would catch 0 * NaN in P V, dS K or dO V^T, and NaN that passes a where in its backward."""
    call = random_call(7, dtype=F64, mask="bk", bias="hk", sink=True, softcap=softcap, causal=True)
    call.mask[:, :, :, 4] = False
    call.mask[:, :, :, 0] = True
    (out, lse), grads = gradients(call)
    bad = call._replace(k=call.k.clone(), v=call.v.clone())
    bad.k[:, :, 4], bad.v[:, :, 4] = value, value
    (bad_out, bad_lse), bad_grads = gradients(bad)
    assert torch.equal(bad_out, out) and torch.equal(bad_lse, lse)
    for name, grad in grads.items():
        assert (grad is None) == (name == "w")
        if grad is not None:
            close(bad_grads[name], grad)
    assert bad_grads["k"][:, :, 4].eq(0).all() and bad_grads["v"][:, :, 4].eq(0).all()


def test_nan_is_seen_exactly_by_the_rows_that_see_its_key():
    """Would catch both leaks and swallowed NaN: causally, rows before key 9 are clean and all
    others are NaN.
    """
    call = random_call(7, dtype=F64, causal=True)
    (clean, _), _ = gradients(call)
    call.k[:, :, 9, 2] = torch.nan
    (out, lse), grads = gradients(call)
    close(out[:, :, :9], clean[:, :, :9])
    assert out[:, :, 9:].isnan().all() and lse[:, :, 9:].isnan().all()
    assert grads["q"][:, :, :9].isfinite().all() and grads["q"][:, :, 9:].isnan().all()
    # every key is seen by some NaN row
    assert grads["k"].isnan().all() and grads["v"].isnan().all()


def test_nan_query_reaches_only_its_keys():
    """Would catch P = NaN at the excluded keys of a NaN row, which leaks into their dK and dV."""
    call = random_call(7, dtype=F64, causal=True)
    call.q[:, :, 3] = torch.nan
    (out, _), grads = gradients(call)
    assert out[:, :, 3].isnan().all() and out[:, :, 4:].isfinite().all()
    for name in ("k", "v"):
        assert grads[name][:, :, :4].isnan().all() and grads[name][:, :, 4:].isfinite().all()


def test_nan_value_reaches_only_its_column():
    """Would catch a whole row of O turned NaN by one element of V."""
    call = random_call(7, dtype=F64)
    call.v[0, 1, 2, 3] = torch.nan
    out = attend(call)[0]
    bad = torch.zeros_like(out, dtype=torch.bool)
    bad[0, 1, :, 3] = True
    assert torch.equal(out.isnan(), bad)


def test_infinite_bias_excludes_like_a_mask():
    """Would catch NaN from a row whose bias is -inf everywhere, and NaN keys behind such a bias."""
    call = random_call(7, dtype=F64, mask="hqk")
    call.mask[:, :, 5] = False
    bias = torch.zeros_like(call.mask, dtype=F64).masked_fill(~call.mask, -torch.inf)
    call.mask[..., 2] = False
    bias[..., 2] = -torch.inf
    k = call.k.clone()
    k[:, :, 2] = torch.nan
    biased = call._replace(mask=None, bias=bias, k=k)
    (out, lse), grads = gradients(call)
    (bias_out, bias_lse), bias_grads = gradients(biased)
    close(bias_out, out)
    close(bias_lse, lse)
    for name in ("q", "k", "v"):
        close(bias_grads[name], grads[name])
    assert bias_grads["bias"].isfinite().all()


def test_underflowed_weights_silence_their_values():
    """Would catch 0 * NaN at a visible key whose P is 0: it must stay out of O, dQ and dbias."""
    call = random_call(7, dtype=F64, bias="k")
    call.bias[..., 3] = -1e6
    (out, _), grads = gradients(call)
    call.v[:, :, 3] = torch.nan
    (bad_out, _), bad_grads = gradients(call)
    close(bad_out, out)
    for name in ("q", "k", "v", "bias"):
        close(bad_grads[name], grads[name])


def test_large_sink_does_not_overflow():
    """Would catch a running maximum without the sink: exp(1000) is inf, the row must be about 0."""
    call = random_call(7, dtype=F64, sink=True)
    call.sink[:] = 1000.0
    out, lse, _, _ = attend(call)
    close(lse, torch.full_like(lse, 1000.0))
    close(out, torch.zeros_like(out))


def test_safe_matmul_adds_infinities_as_floating_point_does():
    """Would catch a lost sign: inf - inf is NaN, -1 * inf is -inf, 0 * inf is nothing."""
    inf, nan = torch.inf, torch.nan
    a = torch.tensor([[1.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 2.0]])
    b = torch.tensor([[inf, 1.0], [-inf, inf], [3.0, nan]])
    expected = torch.tensor([[nan, inf], [-inf, -1.0], [-inf, nan], [6.0, nan]])
    assert_same(safe_matmul(a, b), expected)


# --- the test helpers ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_reference_passes_its_own_check(dtype):
    """Would catch a wrong dtype, layout or None in what the reference backend returns."""
    call = random_call(dtype=dtype, layout="bshd", bias=True, sink=True, causal=True, stats=True)
    check_call(call, "reference")
    check_call(random_call(dtype=dtype, seqlens_q=[3, 0, 5], layout="padded"), "reference")


class _Wrong:
    """The reference backend with one result spoiled by `change`."""

    def __init__(self, direction, index, change):
        self.__name__ = "wrong"
        self.available, self.unsupported = backend.available, backend.unsupported
        self.forward, self.backward = backend.forward, backend.backward
        original = getattr(backend, direction)

        def spoiled(*args):
            results = list(original(*args))
            results[index] = change(results[index])
            return tuple(results)

        setattr(self, direction, spoiled)


def _one_nan(x):
    x = x.clone()
    x.view(-1)[5] = torch.nan
    return x


WRONG = {
    "out off by 1 %": ("forward", 0, lambda x: x * 1.01, "out: max error"),
    "one element unwritten": ("forward", 0, _one_nan, r"out: max error inf at \(0, 0, 0, 5\)"),
    "lse in base 2": ("forward", 1, lambda x: x / math.log(2), "lse: max error"),
    "lse in half": ("forward", 1, lambda x: x.half(), "lse: must be torch.float32"),
    "statistic missing": ("forward", 3, lambda x: None, "entropy: must be given"),
    "dq without scale": ("backward", 0, lambda x: 4 * x, "dq: max error"),
    "dbias not reduced": ("backward", 3, lambda x: x.expand(2, 2, 17, 17), "must have one shape"),
    "dsink negated": ("backward", 4, lambda x: -x, "dsink: max error"),
}


@pytest.mark.parametrize("name", WRONG)
def test_check_call_refuses_a_wrong_backend(name):
    """Would catch a tolerance so wide, or a comparison so lax, that real bugs pass."""
    direction, index, change, message = WRONG[name]
    call = random_call(bias="hqk", sink=True, stats=True)
    with pytest.raises(AssertionError, match=message):
        check_call(call, _Wrong(direction, index, change))


def test_padded_keeps_values_within_nan():
    """Would catch a padding that copies instead of viewing, or that leaves finite values around."""
    x = torch.randn(2, 3, 4)
    view = padded(x)
    assert torch.equal(view, x) and not view.is_contiguous() and view.stride(-1) == 1
    storage = torch.empty(0).set_(view.untyped_storage())
    assert int(storage.isfinite().sum()) == x.numel()


def test_call_is_the_same_for_the_same_seed_in_every_dtype_and_layout():
    """Would catch inputs that differ between the call under test and its rounded copy."""
    a, b = random_call(1, dtype=F64), random_call(1, dtype=torch.float16, layout="padded")
    assert torch.equal(a.q.half(), b.q) and torch.equal(a.v.half(), b.v)
    assert isinstance(a, Call) and not torch.equal(a.q, random_call(2, dtype=F64).q)
