"""The Triton kernels of second derivatives (tangent.py and backward_tangent.py of triton_kernels),
interpreted, against autograd on the float64 reference.  Tiles are 32 x 32 under the interpreter.
"""

import functools

import pytest
import torch
from closeness import FLOAT32, assert_close, assert_same
from far_calls import SMALLEST, far_call
from second_calls import FEATURES, SAMPLE, combination
from second_checks import (
    by_double_backward,
    by_forward_mode,
    by_moved,
    by_passes,
    by_reference,
    check_dtype,
    seeds_of,
)

import attn_ext
from attn_ext.backends import blocked, triton_second
from attn_ext.core.schema import Needs, Rows, Tangents
from attn_ext.testing import needs_of, poisoned_memory, random_call, to_float64
from attn_ext.triton_kernels.launch import second as launch

by_kernels = functools.partial(by_moved, module=triton_second)
SMALL = {"batch": 1, "heads_q": 1}
PAIR = {"batch": 1, "heads_q": 2}  # which may share a head of keys
LONG = {**SMALL, "seqlen_q": 34, "seqlen_k": 70}  # two tiles of queries, three of keys
ALL = tuple(name != "window" for name in FEATURES)  # which would leave no long rows


def on_triton(call):
    """The call, its forward too, by Triton."""
    return call._replace(backend="triton")


def check(call) -> None:
    """The kernels against the reference, in memory that holds NaN."""
    with poisoned_memory():
        check_dtype(on_triton(call), [by_kernels])


@pytest.mark.parametrize("chosen", SAMPLE, ids=lambda c: "".join("01"[x] for x in c))
def test_features(chosen):
    """A term of a tangent that a feature lacks, for each pair of features."""
    check(combination(chosen, torch.float32, **(PAIR if chosen[4] else SMALL)))


CALLS = {
    "three tiles of keys": {**LONG, "causal": True, "softcap": 3.0},
    "everything in three tiles": {**LONG, "heads_q": 2, "mask": "bqk", "bias": "hqk",
        "softcap": 1.5, "sink": True, "dropout_p": 0.2, "heads_k": 1, "head_dim": 17,
        "head_dim_v": 33},
    "rows that see no key": {**SMALL, "causal": True, "seqlen_q": 9, "seqlen_k": 5, "sink": True},
    "top-left, bias of each key": {**SMALL, "align": 0, "causal": True, "bias": "k", "seqlen_k": 5},
    "bias of one number a head": {**PAIR, "bias": "h", "mask": "k", "alibi": "b"},
    "bias of each query, batches share it": {"heads_q": 1, "bias": "q", "window": (2, 3)},
    "memory in another order": {**SMALL, "layout": "padded", "bias": "bhqk"},
    "all of P dropped": {**SMALL, "dropout_p": 1.0},
    "varlen": {"seqlens_q": (5, 0, 4), "seqlens_k": (6, 3, 0), "window": (3, 2), "mask": "bqk",
        "bias": "hqk", "softcap": 2.0, "sink": True, "dropout_p": 0.3, "alibi": "b", "heads_q": 2,
        "heads_k": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_calls(name):
    """Sums over several tiles, edges, layouts: a call that no combination above has."""
    check(random_call(3, **{"head_dim": 4, **CALLS[name]}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves(dtype):
    """Halves computed in halves, results in other dtypes than the inputs'."""
    options = {"seqlen_k": 40, "head_dim": 17, "head_dim_v": 33}
    check(combination(ALL, dtype, **PAIR, **options))


def test_the_ways_of_users():
    """A call whose tangents go past the kernels, or whose results lie otherwise than promised."""
    call = combination(SAMPLE[1], torch.float32, **PAIR)
    check_dtype(on_triton(call), (by_double_backward, by_forward_mode))


def test_absent_tangents():
    """A tangent that is read where there is none, or taken for one of another input."""
    call = combination(ALL, torch.float32, **PAIR)
    seeds = seeds_of(call)._replace(tdout=None, tdlse=None)
    for names in (("q", "sink"), ("k",), ("v", "bias")):
        few = {n: seeds.tangents[n] for n in names}
        zeros = {n: torch.zeros_like(x) for n, x in seeds.tangents.items()}
        want = by_moved(call, seeds._replace(tangents={**zeros, **few}), blocked)
        for result, x in by_kernels(call, seeds._replace(tangents=few)).items():
            assert_close(x, want[result], FLOAT32)


def test_rows_without_keys_are_exact_zeros():
    """NaN of -inf - -inf, or what rounding leaves."""
    call = random_call(3, seqlen_q=9, seqlen_k=5, causal=True, sink=True, mask="bhqk", **SMALL)
    call.mask[:, :, 7] = False
    found = by_kernels(on_triton(call), seeds_of(call))
    assert all(x.isfinite().all() for x in found.values())
    for name in ("tangent out", "tangent lse", "moved q"):
        assert (found[name][:, :, [0, 3, 7]] == 0).all(), name


def test_tangents_with_a_large_common_part():
    """Digits lost to a part that the tangents of all keys have in common, which cancels."""
    call = on_triton(random_call(3, seqlen_q=32, seqlen_k=70, head_dim=16, batch=1, heads_q=1))
    seeds = seeds_of(call)
    seeds.tangents["k"] += 1e3 * torch.randn(16, generator=torch.Generator().manual_seed(1))
    truths, naives = by_reference(to_float64(call), seeds.double()), by_reference(call, seeds)
    got = by_kernels(call, seeds)
    for name in got:
        error, naive = ((x[name].double() - truths[name]).norm() for x in (got, naives))
        assert error <= 2 * naive, (name, error / naive)


def passes_of(call) -> tuple:
    """What both passes give for a call, of which nothing but the inputs counts."""
    seeds, needs = seeds_of(call), needs_of(call)
    rows = Rows(out=seeds.dout, lse=seeds.dlse)
    tangents = Tangents(**seeds.tangents)
    more = rows._replace(dout=seeds.dout, tout=seeds.dout, tlse=seeds.dlse)
    return (
        triton_second.tangent(call, tangents, rows),
        triton_second.backward_tangent(call, tangents, more, needs, Needs()),
    )


def test_what_the_kernels_leave_to_others(monkeypatch):
    """NaN of a hidden key times a weight of 0; weights of which LSE has lost the number."""
    asked = {"tangent": lambda *a: "served", "backward_tangent": lambda *a: "served"}
    for name, function in asked.items():
        monkeypatch.setattr(launch, name, function)
    call = random_call(3, mask="k", bias="k", head_dim=5)
    call.bias[..., 1] = -torch.inf  # hides a key, which is nothing unusual
    assert passes_of(call) == ("served", "served")
    for name in ("q", "k", "v", "bias"):
        spoilt = call._replace(**{name: torch.full_like(getattr(call, name), torch.inf)})
        assert passes_of(spoilt) == (None, None), name
    seeds = seeds_of(call)
    rows = Rows(*[seeds.dout, None] * 4)._replace(lse=seeds.dlse + 1e4)
    assert triton_second.backward_tangent(call, Tangents(), rows, Needs(), Needs()) is None
    assert triton_second.tangent(call, Tangents(), rows) is None
    monkeypatch.setattr(launch, "tangent", lambda *a: 1 / 0)
    hidden = random_call(3, mask="k", head_dim=5, **SMALL)
    hidden.mask[..., 2], hidden.mask[..., 0] = False, True
    hidden.k[:, :, 2] = torch.nan
    found = by_forward_mode(on_triton(hidden), seeds_of(hidden))
    assert all(x.isfinite().all() for x in found.values())


def test_a_captured_graph_does_not_wait(monkeypatch):
    """Silently wrong numbers where a replayed CUDA graph meets inputs that the kernels leave to
    others; a read of a device's answer, which ends the capture."""
    monkeypatch.setattr(triton_second, "_capturing", lambda call: True)
    monkeypatch.setattr(launch, "tangent", lambda *a: (torch.ones(2), torch.ones(3)))
    grads = [(torch.ones(2), None), (torch.ones(3),)]
    monkeypatch.setattr(launch, "backward_tangent", lambda *a: grads)
    call = random_call(3, bias="k", head_dim=5)
    seeds = seeds_of(call)
    near = Rows(*[seeds.dout, None] * 4)._replace(lse=seeds.dlse)
    far, spoilt = near._replace(lse=seeds.dlse + 1e4), call._replace(v=call.v / 0)

    def results(call, rows):
        with monkeypatch.context() as waiting:
            waiting.setattr(torch.Tensor, "__bool__", lambda x: 1 / 0)
            found = triton_second.tangent(call, Tangents(), rows)
            moved = triton_second.backward_tangent(call, Tangents(), rows, Needs(), Needs())
        return [x for group in (found, *moved) for x in group if x is not None]

    assert [x.tolist() for x in results(call, near)] == [[1] * 2, [1] * 3] * 2
    for one, rows in ((call, far), (spoilt, near)):
        assert all(x.isnan().all() for x in results(one, rows))
        grads = [(torch.ones(2), None), (torch.ones(3),)]


def test_rows_far_from_zero():
    """NaN in tangents of logits of 1e10, of which LSE has fewer digits; a far sink."""
    products = random_call(7, head_dim=32, seqlen_q=20, seqlen_k=34, **SMALL)
    products.q.mul_(1e5), products.k.mul_(1e5)
    beside_sink = far_call(SMALLEST, seqlen_q=34, sink=True)
    beside_sink.sink[:] = SMALLEST
    for call in (products, beside_sink):
        check_dtype(on_triton(call), [by_double_backward, by_forward_mode])


def test_who_serves():
    """A name that `explain` does not give, or a call that no kernel serves and is not left to
    torch operations."""
    q = torch.randn(1, 1, 4, 129)
    narrow, half = q[..., :64], q[..., :128].half()
    for served in (narrow, half):
        assert "Triton kernels" in str(attn_ext.explain(*[served] * 3, backend="triton"))
    for left in (q[..., :65], q.half()):
        assert "torch operations" in attn_ext.explain(*[left] * 3, backend="triton").second
    options = {"bias": torch.zeros(1, 1), "deterministic": True, "backend": "triton"}
    assert "torch operations" in attn_ext.explain(narrow, narrow, narrow, **options).second
    for size, dtype in ((2, torch.float16), (4, torch.float32)):
        assert launch.widest(size) == triton_second.WIDEST[dtype]


def test_gradients_beside_the_tangents_are_those_of_the_backward():
    """A second formula for what there is already."""
    call = on_triton(random_call(3, seqlen_q=6, head_dim=5, bias="qk", **SMALL))
    seeds, needs = seeds_of(call), needs_of(call)
    found = by_passes(call, seeds, triton_second)
    rows = {n: x for n, x in found.items() if n.startswith("first")}
    assert len(rows) == sum(needs)
    leaves = [getattr(call, n.split()[1]).clone().requires_grad_() for n in rows]
    again = dict(zip((n.split()[1] for n in rows), leaves, strict=True))
    out, lse = attn_ext.ops.route.run(call._replace(**again, grad=True, bias_grad=True))[:2]
    want = torch.autograd.grad((out, lse), leaves, (seeds.dout, seeds.dlse))
    for name, x in zip(rows, want, strict=True):
        assert_same(rows[name], x)
