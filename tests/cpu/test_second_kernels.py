"""The C++ kernels of second derivatives (csrc/cpu/kernels/tangent.h, backward_tangent.h), all
features and instruction sets, against autograd on the float64 reference.
tests/api/test_second_order.py has the ways of users, and float64, which other code serves.
"""

import functools

import pytest
import tiers
import torch
from closeness import assert_same
from second_calls import EVERY, MORE, SAMPLE, combination
from second_checks import by_double_backward, by_passes, by_reference, check_dtype, seeds_of

from attn_ext import _C
from attn_ext.backends import blocked, cpu_second
from attn_ext.core.schema import Needs, Rows, Tangents
from attn_ext.ops import execute
from attn_ext.testing import (
    assert_close_to_reference,
    needs_of,
    poisoned_memory,
    random_call,
    to_float64,
)

by_kernels = functools.partial(by_passes, module=cpu_second)
LONG = {"seqlen_q": 70, "seqlen_k": 300, "batch": 1}  # three blocks of keys, two panels of queries
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
        check_dtype(call, [by_kernels])


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


def test_a_far_lse_is_left_to_others():
    """Weights of which LSE has lost the number: all logits the smallest number, as additive masks
    have them, in rows of several blocks."""
    smallest = torch.finfo(torch.float32).min
    call = random_call(3, bias="q", **LONG)
    call.bias[:, :, 4] = smallest
    tangent, backward = passes_of(call, cpu_second)
    assert tangent is not None and backward is None
    seeds, twice = seeds_of(call), ("second q", "second k", "second v", "tangent lse")
    truths, naives = by_reference(to_float64(call), seeds.double()), by_reference(call, seeds)
    got = by_double_backward(call, seeds)
    for name in twice:
        assert_close_to_reference(
            got[name], truths[name].detach(), naives[name].detach(), "out", name, torch.float32
        )
    short = random_call(3, bias="q")
    short.bias[:, :, 4] = smallest
    check(short)


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
