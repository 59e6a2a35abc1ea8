"""The C++ kernels of second derivatives (csrc/cpu/kernels/tangent.h, backward_tangent.h), all
features and instruction sets, against autograd on the float64 reference.
tests/api/test_second_order.py has the ways of users, and float64, which other code serves.
"""

import functools

import pytest
import tiers
import torch
from closeness import assert_same
from far_calls import SMALLEST, far_call
from second_calls import EVERY, MORE, SAMPLE, combination
from second_checks import (
    by_double_backward,
    by_forward_mode,
    by_passes,
    by_reference,
    check_dtype,
    seeds_of,
)

import attn_ext
from attn_ext import _C
from attn_ext.backends import blocked, cpu_second
from attn_ext.core.schema import Needs, Rows, Tangents
from attn_ext.ops import execute
from attn_ext.testing import (
    needs_of,
    poisoned_memory,
    random_call,
    to_float64,
)

by_kernels = functools.partial(by_passes, module=cpu_second)
LONG = {"seqlen_q": 70, "seqlen_k": 300, "batch": 1}  # three blocks of keys, two panels of queries
WHOLE = _C.SECOND_WHOLE  # keys of the longest rows that one block holds
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=tiers.isas(_C.supported_isas(), _C.isa()))
def isa(request):
    """Each instruction set of this machine."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


def check(call) -> None:
    """The kernels against the reference, in memory that holds NaN."""
    with poisoned_memory():
        check_dtype(call, [by_kernels, by_double_backward])


def test_every_combination_of_features():
    """A term that a feature lacks, in rows that one block of keys holds."""
    for chosen in EVERY:
        check(combination(chosen, torch.float32))


@pytest.mark.parametrize("chosen", SAMPLE, ids=lambda c: "".join("01"[x] for x in c))
def test_long_rows(chosen, isa):
    """The same of rows that several blocks hold: sums that are taken from O and LSE, and those that
    blocks add to one after the other."""
    check(combination(chosen, torch.float32, **LONG))


@pytest.mark.parametrize("name", [name for name in MORE if name != "no keys"])
def test_calls(name, isa):
    """A call that no combination above has."""
    check(random_call(3, **{"head_dim": 4, **MORE[name]}))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("long", [{}, LONG], ids=["one block", "three blocks"])
def test_halves(dtype, long, isa):
    """Halves computed in halves, results in other dtypes than the inputs'."""
    check(combination(SAMPLE[1], dtype, **long, head_dim=17, head_dim_v=33))


def test_wide_heads(isa):
    """Scratch that is too small, columns beyond the last whole vector."""
    check(random_call(3, head_dim=130, head_dim_v=70, seqlen_q=20, seqlen_k=140, causal=True))


def test_any_number_of_threads():
    """Bits that depend on which thread adds first."""
    call = combination(SAMPLE[1], torch.float32, **LONG)
    seeds, before = seeds_of(call), torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(by_kernels(call, seeds))
    torch.set_num_threads(before)
    for name, x in found[0].items():
        assert_same(x, found[1][name])


def test_absent_tangents():
    """A tangent that is read where there is none, or taken for one of another input."""
    call = combination(SAMPLE[1], torch.float32)
    seeds = seeds_of(call)
    for name in seeds.tangents:
        only = {n: x if n == name else torch.zeros_like(x) for n, x in seeds.tangents.items()}
        want = by_kernels(call, seeds._replace(tangents=only))
        got = by_kernels(call, seeds._replace(tangents={name: seeds.tangents[name]}))
        for result, x in want.items():
            torch.testing.assert_close(got[result], x)


def second_by(call, **rows) -> list:
    """The tangents of the gradients of q, k, v, with these of a call's `Rows` beside O and LSE."""
    seeds = seeds_of(call)
    out, lse = execute.forward(call)[:2]
    given = Rows(**{"dout": seeds.dout, "out": out, "lse": lse, **rows})
    found, _ = cpu_second.backward_tangent(
        call, Tangents(**seeds.tangents), given, needs_of(call), Needs()
    )
    return [x for x in found if x is not None]


@pytest.mark.parametrize("keys", [WHOLE // 2 + 1, WHOLE, WHOLE + 1])
def test_tangents_of_rows_are_found_where_they_are_needed(keys, isa):
    """O' and L' taken for 0 where rows have several blocks; a pass for them where they have one."""
    call = random_call(3, seqlen_q=70, seqlen_k=keys, batch=1, causal=True)
    out, lse = execute.forward(call)[:2]
    tangents = Tangents(**seeds_of(call).tangents)
    tout, tlse = cpu_second.tangent(call, tangents, Rows(out=out, lse=lse))
    want = second_by(call, tout=tout, tlse=tlse)
    if keys <= WHOLE:
        tout, tlse = torch.full_like(tout, torch.nan), torch.full_like(tlse, torch.nan)
        ways = [second_by(call), second_by(call, tout=tout, tlse=tlse)]
    else:
        ways = [second_by(call), second_by(call, tout=tout), second_by(call, tlse=tlse)]
        assert not torch.equal(want[0], second_by(call, tout=0 * tout, tlse=0 * tlse)[0])
    for way in ways:
        for got, x in zip(way, want, strict=True):
            assert_same(got, x)


ALIKE = {"plain": {}, "bias": {"bias": "hqk"}, "band": {"causal": True, "window": (3, 2)}}


@pytest.mark.parametrize("name", ALIKE)
def test_calls_that_look_alike(name):
    """A remembered double backward that differs from the first, of other values, or that takes a
    gradient for one that was asked for before."""
    call = random_call(3, seqlen_q=40, seqlen_k=30, **ALIKE[name])
    first = by_double_backward(call, seeds_of(call))
    for seed in (8, 9):
        seeds = seeds_of(call, seed)
        again = by_double_backward(call, seeds)
        cpu_second.forget()
        for key, x in by_double_backward(call, seeds).items():
            assert_same(again[key], x)
        assert not torch.equal(first["second q"], again["second q"])


@pytest.mark.parametrize("keys, want", [(WHOLE, 0), (WHOLE + 1, 1)])
def test_double_backward_takes_no_pass_twice(keys, want, monkeypatch):
    """A pass over the keys for a tangent of O that nobody needs or that another pass finds."""
    passes, kernel = [], cpu_second.tangent
    monkeypatch.setattr(cpu_second, "tangent", lambda *a: passes.append(a) or kernel(*a))
    q, k, v, dout = (torch.randn(1, 2, keys, 8, requires_grad=True) for _ in range(4))
    for cotangent in (dout, dout.detach()):
        out = attn_ext.attention(q, k, v)
        first = torch.autograd.grad(out, (q, k, v), cotangent, create_graph=True)
        sum(x.square().sum() for x in first).backward()
        assert len(passes) == want
        passes.clear()


def passes_of(call, module):
    """What a module makes of both passes."""
    seeds, needs = seeds_of(call), needs_of(call)
    tangents = Tangents(**seeds.tangents)
    out, lse = execute.forward(call)[:2]
    rows = Rows(out=out, lse=lse)
    tout, tlse = blocked.tangent(call, tangents, rows)
    return (
        module.tangent(call, tangents, rows),
        module.backward_tangent(
            call, tangents, rows._replace(dout=seeds.dout, tout=tout, tlse=tlse), needs, Needs()
        ),
    )


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_what_is_not_finite_is_left_to_others(name):
    """NaN of a hidden key times a weight of 0, which is NaN."""
    call = random_call(3, mask="k", head_dim=5)
    assert all(x is not None for x in passes_of(call, cpu_second))
    getattr(call, name)[1, 1, 3, 2] = torch.inf
    assert all(x is None for x in passes_of(call, cpu_second))


# Rows of a bias far from 0, in one block of keys and in several.
FAR = {
    "one block": {"seqlen_q": 30},
    "several": {"seqlen_q": 34, "seqlen_k": 300},
    "two panels, grouped heads": {"seqlen_q": 70, "seqlen_k": 300, "heads_q": 2, "causal": True},
    "packed": {"seqlens_q": [34, 0, 9], "seqlens_k": [300, 3, 9], "batch": 3},
    "window and sink": {"seqlen_q": 300, "window": (150, 20), "sink": True},
    "dropout": {"seqlen_q": 20, "seqlen_k": 300, "dropout_p": 0.3},
    "softcap and mask": {"seqlen_q": 20, "seqlen_k": 300, "softcap": 2.0, "mask": "bk"},
}


@pytest.mark.parametrize("value", [SMALLEST, -1e9, 1e9])
@pytest.mark.parametrize("shape", FAR)
def test_rows_of_a_far_bias(shape, value):
    """exp(S - LSE) without the sum: second derivatives 300 times too large, or squared."""
    call = far_call(value, **{"heads_k": 1, **FAR[shape]})
    check_dtype(call, [by_kernels, by_double_backward, by_forward_mode])


@pytest.mark.parametrize("sink", [1e4, -1e9, SMALLEST])
@pytest.mark.parametrize("seqlen", [34, 300])
def test_a_far_sink(sink, seqlen, isa):
    """The second gradient of a sink by exp(sink - LSE): 34 times too large in rows of 34 keys."""
    call = far_call(sink, seqlen_q=34, seqlen_k=seqlen, sink=True)
    call.sink[:] = sink
    check_dtype(call, [by_kernels, by_double_backward, by_forward_mode])


@pytest.mark.parametrize("seqlen", [34, 300])
def test_logits_of_ten_billion(seqlen, isa):
    """NaN of exp(S - LSE) where LSE has fewer digits than a fused scale * S."""
    call = far_call(0.0, seqlen_q=20, seqlen_k=seqlen, head_dim=32)
    call.q.mul_(1e5), call.k.mul_(1e5)
    check_dtype(call, [by_kernels, by_double_backward, by_forward_mode])


def test_tangents_with_a_large_common_part_in_long_rows():
    """Digits lost to a part that the tangents of all keys have in common, which cancels: the mean
    that is taken out is that of the first tile."""
    call = random_call(3, seqlen_q=64, seqlen_k=300, head_dim=16, batch=1)
    seeds = seeds_of(call)
    seeds.tangents["k"] += 1e3 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    truths, naives = by_reference(to_float64(call), seeds.double()), by_reference(call, seeds)
    got = by_kernels(call, seeds)
    for name, truth in truths.items():
        error, naive = ((x[name].double() - truth).norm() for x in (got, naives))
        assert error <= 2 * naive, (name, error / naive)
