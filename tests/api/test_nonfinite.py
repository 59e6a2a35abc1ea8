"""NaN and inf in K, V and Q on the kernels: nothing leaks from an excluded pair, nothing visible is
swallowed.

check_call demands NaN exactly where the reference has it, in O, LSE and every gradient.
"""

import emulated_backend as emulated
import pytest
import torch
from nonfinite_cases import (
    ADDITIVE_OPTIONS,
    ADDITIVE_WEIGHTS,
    CASES,
    ROWS_OF_NAN,
    check_additive_weight,
    check_dropped_of_nan,
    check_emptied_additive_rows,
    check_in_float32,
    check_overflow,
)

from attn_ext.core import reference
from attn_ext.core.reference import attend
from attn_ext.testing import check_call, random_call

NAN, INF = torch.nan, torch.inf


@pytest.fixture(params=["cpu", *(["emulated"] if emulated.available() == "" else [])])
def kernels(request):
    """The CPU kernels, and the CUDA kernels on the emulator in mode "all"."""
    if request.param == "emulated":
        emulated.set_mode("all", 1)
    return request.param


@pytest.mark.parametrize("seqlen", [17, 150, 450])  # one tile of keys, several tiles, and blocks
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("name", CASES)
def test_bad_values_reach_exactly_who_sees_them(name, value, seqlen):
    """Would catch 0 * NaN in one of the five products, and NaN lost in a max or a skipped tile."""
    spoil, options = CASES[name]
    for dtype in (torch.float32, torch.bfloat16):
        call = random_call(7, dtype=dtype, seqlen_q=seqlen, **options)
        spoil(call, value)
        check_call(call, "cpu")


@pytest.mark.parametrize("value", [1000.0, -INF])
def test_extreme_sinks(value):
    """Would catch exp(sink) that overflows, and -inf - -inf: a sink of -inf is no sink."""
    call = random_call(7, sink=True, stats=True)
    call.sink[:] = value
    check_call(call, "cpu")


def negative_key(call):
    """K of key 5 is -inf: its logits are, and no row sees it."""
    call.q.abs_()
    call.k[:, :, 5] = -INF


def negative_key_with_value(call):
    """The same, with a V that must not reach O."""
    negative_key(call)
    call.v[:, :, 5] = INF


def query_without_keys(call):
    """Query 9 is inf before negative keys: an empty row, whose Q must not reach dK."""
    call.k.abs_().neg_()
    call.q[:, :, 9] = INF


def query_with_some_keys(call):
    """Query 9 is NaN by some keys; those of logit -inf get nothing of it."""
    call.q[:, :, 9] = INF
    call.k.abs_()[:, :, 1::3].neg_()


VISIBLE = (negative_key, negative_key_with_value, query_without_keys, query_with_some_keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"mask": "qk"}], ids=str)
@pytest.mark.parametrize("spoil", VISIBLE, ids=lambda f: f.__name__)
def test_infinities_in_visible_rows(kernels, spoil, options, dtype):
    """A logit of -inf excludes its pair: 0 * inf in the products of tiles that nothing cuts, NaN
    of three tf32 products with an infinite factor, exp(-inf - NaN) in a row of NaN."""
    call = random_call(7, dtype=dtype, seqlen_q=70, batch=1, **options)
    spoil(call)
    check_call(call, kernels)


@pytest.mark.parametrize("spoil", [negative_key, negative_key_with_value])
def test_infinities_in_a_cache(kernels, spoil):
    """The same in the kernels of few queries, whose keys are shared."""
    call = random_call(7, seqlen_q=1, seqlen_k=600, cache_seqlens=[600, 300], batch=2)
    spoil(call)
    check_call(call, kernels)


def smallest_row(call):
    """finfo.min, as additive masks have it, over a whole row."""
    call.bias[:, :, 2] = torch.finfo(call.bias.dtype).min


def billion_row(call):
    call.bias[:, :, 2] = -1e9


def smallest_keys(call):
    """finfo.min over the first tiles of keys."""
    call.bias[..., : call.k.shape[2] - 20] = torch.finfo(call.bias.dtype).min


def largest_row(call):
    """finfo.max over a whole row, as keys that must be seen."""
    call.bias[:, :, 2] = torch.finfo(call.bias.dtype).max


def largest_keys(call):
    """finfo.max at some keys of a tile in the midst, and of the last one."""
    call.bias[..., 70:73] = torch.finfo(call.bias.dtype).max
    call.bias[..., -1] = torch.finfo(call.bias.dtype).max


def both_ends(call):
    """finfo.max beside finfo.min and an excluding -inf, whose distances overflow."""
    call.bias[..., ::2] = torch.finfo(call.bias.dtype).min
    call.bias[..., 1::4] = torch.finfo(call.bias.dtype).max
    call.bias[..., 3::4] = -INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"sink": True}, {"num_splits": 3, "cache_seqlens": [250, 180]}], ids=str
)
@pytest.mark.parametrize(
    "spoil",
    [smallest_row, billion_row, smallest_keys, largest_row, largest_keys, both_ends],
    ids=lambda f: f.__name__,
)
def test_rows_of_huge_biases(kernels, spoil, options, dtype):
    """An excluding -inf in other units (O = 0), a P whose LSE has lost ln(number of keys) (O = the
    sum of V, entropy 0), 0 * inf in the sum of the entropy, inf - inf."""
    call = random_call(7, dtype=dtype, bias="qk", seqlen_q=5, seqlen_k=250, stats=True, **options)
    spoil(call)
    check_call(call, kernels, grads=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROWS_OF_NAN)
def test_what_dropout_drops_of_a_row_of_nan(kernels, name, dtype):
    """NaN * 0 in dV at pairs that dropout drops; an O of 0, or of what is left of the row, in rows
    of NaN; an infinite sink whose LSE is a number, and so all gradients."""
    check_dropped_of_nan(name, dtype, kernels)


@pytest.mark.parametrize("seqlen", [150, 450])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_of_nan_over_several_tiles(dtype, seqlen):
    """The same where tiles, splits or blocks of keys meet."""
    check_dropped_of_nan("infinite bias", dtype, "cpu", seqlen_q=70, seqlen_k=seqlen)


@pytest.mark.parametrize("options", [{"additive": True}, {"seqlen_k": 300}], ids=str)
def test_dropped_weights_of_nan_of_other_scores(options):
    check_dropped_of_nan("infinite bias", torch.float32, "cpu", stats=False, **options)


@pytest.mark.parametrize("weight", ADDITIVE_WEIGHTS, ids=str)
@pytest.mark.parametrize("options", ADDITIVE_OPTIONS, ids=str)
def test_additive_weights_that_are_not_small(weight, options):
    """inf - inf and 0 * inf in the kernel and in the reference; exp(2q) exp(2k) w that
    overflows."""
    check_additive_weight("cpu", weight, **options)


@pytest.mark.parametrize("seqlen", [5, 70, 130])
def test_additive_rows_that_an_infinite_weight_empties(seqlen):
    """The padding of a panel of queries: NaN in dK and dw of rows that are empty."""
    check_emptied_additive_rows("cpu", seqlen)


def test_a_weight_of_infinity_hides_keys():
    """The reference: 0 * inf in the gradients of keys whose logit is -inf."""
    call = random_call(7, additive=True, batch=1, heads_q=1, seqlen_q=9)
    call.w[0, 2], call.q[..., 2] = INF, 0
    call.k[..., 2] = 1
    call.k[..., ::2, 2] = -1
    leaves = [x.requires_grad_() for x in (call.k, call.v)]
    dk, dv = torch.autograd.grad(attend(call)[0].sum(), leaves)
    for grad in (dk, dv):
        assert grad[..., ::2, :].eq(0).all()
        assert grad[..., 1::2, :].isnan().any(-1).all()


def test_second_derivatives_of_additive_scores():
    """Gradients that are 0 as a function of dS, where it is 0 and w is finite: a derivative of 0 in
    place of w; 0 * inf of an infinite one."""
    t = torch.rand(1, 1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([[1.0, -2.0, INF, 3.0]], dtype=torch.float64, requires_grad=True)
    ds = torch.zeros(1, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    s = reference._AdditiveScores.apply(t, w)
    dt, dw = torch.autograd.grad(s, (t, w), ds, create_graph=True)
    (by_t,) = torch.autograd.grad(dt.sum(), ds, retain_graph=True)
    assert by_t.eq(1.0 - 2.0 + 3.0).all()
    (by_w,) = torch.autograd.grad(dw.sum(), ds)
    torch.testing.assert_close(by_w, t.sum(-1).detach())


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.5}], ids=str)
def test_logits_that_overflow(kernels, options):
    """exp(scale * S - inf) of a finite S is 0: rows of NaN with an LSE of inf and gradients of 0;
    a pair of logit -inf whose gradient is that of a row of NaN."""
    check_overflow(kernels, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"bias": "qk"}], ids=str)
def test_a_scale_of_zero_keeps_nan(kernels, options, dtype):
    """A gradient of NaN that is 0 since the scale is: 0 * NaN is NaN, as in the formula."""
    call = random_call(5, seqlen_q=70, seqlen_k=150, head_dim=64, dtype=dtype, scale=0.0,
                       **options)  # fmt: skip
    call.q[:, :, 3] = NAN
    check_call(call, kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("softcap", "scale", "size"), [
    (3e38, 0.125, 1.0), (1e38, 0.125, 1.0), (1e26, 1e-20, 1e10), (2e-38, 0.125, 1.0),
], ids=str)  # fmt: skip
def test_soft_caps_at_the_ends_of_float32(kernels, softcap, scale, size, dtype):
    """A cap, its reciprocal, or that times the scale, which no float is: NaN, or logits of 0."""
    call = random_call(5, seqlen_q=70, seqlen_k=150, head_dim=64, dtype=dtype, softcap=softcap,
                       scale=scale)  # fmt: skip
    call.q.mul_(size), call.k.mul_(size)
    check_call(call, kernels)


@pytest.mark.parametrize("later", [17, 700, 1299, "sink"])  # of another block, of another share
@pytest.mark.parametrize("options", [
    {"seqlen_q": 1}, {"seqlen_q": 1, "cache_seqlens": [1300], "num_splits": 3}, {"seqlen_q": 33},
], ids=["few", "splits", "many"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_infinite_sum_of_which_nothing_is_left(dtype, options, later):
    """0 * inf: a sum of V that is infinite, by what V holds or since it is more than a float, and
    then a logit, or a sink, so far above that nothing of it is left."""
    call = random_call(heads_q=4, heads_k=2, seqlen_k=1300, head_dim=64, dtype=dtype, bias="qk",
                       sink=later == "sink", stats=True, **options)  # fmt: skip
    if later == "sink":
        call.sink.fill_(1000.0)
    else:
        call.bias[..., later] = 1000.0
    call.v[:, :, 3, 5:9] = INF
    call.v[:, :, 3, 9] = -INF
    call.v[:, :, :16, 20:24] = 3e38
    check_call(call, "cpu", grads=False)


@pytest.mark.parametrize("seqlen", [20, 300])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"dropout_p": 0.5}], ids=str)
def test_a_scale_near_the_largest_float(options, seqlen):
    """The same where all logits of a vector of rows are beside 0 or infinite, so that nothing else
    has them multiplied in memory."""
    check_in_float32(random_call(7, batch=1, seqlen_q=seqlen, scale=3e38, **options), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("bias", ["qk", "k"])
@pytest.mark.parametrize("more", [{}, {"mask": "qk"}], ids=str)
def test_a_bias_of_pairs_outside_of_the_band(kernels, more, bias, value, dtype):
    """An odd number of queries, whose last lane has the bias of the row before it and sees a key
    more."""
    call = random_call(
        3, batch=1, seqlen_q=33, seqlen_k=36, head_dim=64, bias=bias, causal=True, align=0,
        dtype=dtype, **more,
    )  # fmt: skip
    call.bias[..., -1:, 33:] = value
    check_call(call, kernels)


def test_a_nan_in_a_bias_is_not_a_small_number(kernels):
    """max(NaN, least number) is the least number."""
    call = random_call(7, bias="qk", seqlen_q=5)
    call.bias[:, :, 2, 3] = NAN
    check_call(call, kernels)


def test_a_logit_of_minus_infinity_gets_no_gradient():
    """The reference: 0 * NaN of a row of NaN at a key that the row does not see."""
    call = random_call(7, seqlen_q=12, batch=1)
    query_with_some_keys(call)
    call.k.requires_grad_()
    (dk,) = torch.autograd.grad(attend(call)[0][:, :, 9].sum(), call.k)
    assert dk[:, :, 1::3].eq(0).all()
    assert dk[:, :, 0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_row_of_the_smallest_number_is_a_mean(dtype):
    """exp(S - LSE) where LSE has lost ln(number of keys): O, entropy and dV n times too large."""
    call = random_call(7, dtype=dtype, bias="qk", stats=True)
    call.bias[:, :, 2] = torch.finfo(torch.float32).min
    group, count = call.q.shape[1] // call.k.shape[1], call.k.shape[2]
    call.v.requires_grad_()
    out, _, _, entropy = attend(call)
    torch.testing.assert_close(out[:, :, 2], call.v.mean(2).repeat_interleave(group, 1))
    torch.testing.assert_close(entropy[:, :, 2], torch.full_like(entropy[:, :, 2], count).log())
    (dv,) = torch.autograd.grad(out[:, :, 2].sum(), call.v)
    torch.testing.assert_close(dv, torch.full_like(dv, group / count))
