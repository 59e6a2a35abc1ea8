"""NaN and inf in K, V and Q on the kernels: nothing leaks from an excluded pair, nothing visible is
swallowed.

check_call demands NaN exactly where the reference has it, in O, LSE and every gradient.
"""

import pytest
import torch

import attn_ext
from attn_ext.reference import attend
from attn_ext.testing import check_call, random_call

NAN, INF = torch.nan, torch.inf


def masked_key(call, value):
    """Key 4 is masked everywhere: dQ needs 0 * K = 0, with softcap also through the derivative
    of tanh.
    """
    call.mask[..., 4] = False
    call.k[:, :, 4] = call.v[:, :, 4] = value


def value_seen_causally(call, value):
    """V of key 9 is bad: queries before 9 are clean, the others are not."""
    call.v[:, :, 9] = value


def key_seen_causally(call, value):
    """K of key 9 is bad: the rows from 9 on are NaN in O and LSE."""
    call.k[:, :, 9] = value


def query(call, value):
    """Query 9 is bad: dK and dV of the keys after it are clean."""
    call.q[:, :, 9] = value


def behind_infinite_bias(call, value):
    """A bias of -inf excludes key 3 as a mask would."""
    call.bias[..., 3] = -INF
    call.k[:, :, 3] = call.v[:, :, 3] = value


CASES = {
    "masked key": (masked_key, {"mask": "bk", "bias": "hk", "sink": True, "causal": True}),
    "masked key under softcap": (masked_key, {"mask": "bk", "softcap": 2.0}),
    "value seen causally": (value_seen_causally, {"causal": True}),
    "key seen causally": (key_seen_causally, {"causal": True}),
    "query": (query, {"causal": True}),
    "behind infinite bias": (behind_infinite_bias, {"bias": "k"}),
}


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_of_the_smallest_number_weighs_its_keys_alike(backend, dtype):
    """finfo.min, as additive masks have it, over a whole row: an excluding -inf in other units
    (O = 0), and a P = exp(S - LSE) whose LSE has lost ln(number of keys) (O = the sum of V).
    """
    call = random_call(7, dtype=dtype, bias="qk", seqlen_q=5, seqlen_k=70)
    call.bias[:, :, 2] = torch.finfo(dtype).min
    out = attn_ext.attention(call.q, call.k, call.v, bias=call.bias, backend=backend)
    assert out.isfinite().all()
    mean = call.v.float().mean(2).repeat_interleave(call.q.shape[1] // call.k.shape[1], 1)
    torch.testing.assert_close(out[:, :, 2].float(), mean, atol=4e-3, rtol=0)


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
