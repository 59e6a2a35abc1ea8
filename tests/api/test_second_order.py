"""Second derivatives and forward mode: numbers.  tests/torch/test_second_transforms.py has the
transforms and what is refused.
"""

import itertools

import high_water
import pytest
import torch
import torch.nn.functional as F
from second_calls import EVERY, FEATURES, MORE, SAMPLE, combination
from second_checks import (
    by_double_backward,
    by_forward_mode,
    by_reference,
    check_dtype,
    check_float64,
    seeds_of,
)

import attn_ext
from attn_ext.core import tiles
from attn_ext.testing import random_call, to_float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles and panels of small calls."""
    monkeypatch.setattr(tiles, "BUDGET", 300)
    monkeypatch.setattr(tiles, "FEWEST_ROWS", 3)


def test_the_sample_holds_each_pair():
    """A combination that was taken out of the sample, and with it a pair of features."""
    for a, b in itertools.combinations(range(len(FEATURES)), 2):
        assert {(c[a], c[b]) for c in SAMPLE} == set(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize("chosen", SAMPLE, ids=lambda c: "".join("01"[x] for x in c))
def test_features(chosen):
    """A term of the tangent or of the double backward that a feature lacks."""
    check_float64(combination(chosen))


def test_every_combination_of_features():
    """The same of all 256."""
    for chosen in EVERY:
        check_float64(combination(chosen))


@pytest.mark.parametrize("name", MORE)
def test_calls(name):
    """A call that no combination above has."""
    check_float64(random_call(3, **{"head_dim": 4, "dtype": torch.float64, **MORE[name]}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chosen", [SAMPLE[0], SAMPLE[1]], ids=["plain", "everything"])
def test_dtypes(chosen, dtype):
    """Halves computed in halves, results in other dtypes than the inputs'."""
    check_dtype(combination(chosen, dtype))


def test_rows_without_keys_are_exact_zeros():
    """NaN of -inf - -inf, or what rounding leaves."""
    call = random_call(3, seqlen_q=9, seqlen_k=5, causal=True, sink=True, mask="bhqk")
    call.mask[:, :, 7] = False
    seeds = seeds_of(call)
    for found in (by_double_backward(call, seeds), by_forward_mode(call, seeds)):
        assert all(x.isfinite().all() for x in found.values())
        for name in ("tangent out", "tangent lse", *({"second q", "moved q"} & found.keys())):
            for row in (0, 3, 7):
                assert (found[name][:, :, row] == 0).all(), (name, row)


def test_hidden_nan_stays_hidden():
    """NaN of a masked key in O', or in any second derivative but its own row's."""
    call = random_call(3, seqlen_q=5, seqlen_k=6, mask="k", dtype=torch.float64, softcap=2.0)
    call.mask[..., 2], call.mask[..., 0] = False, True
    seeds = seeds_of(call)
    want = by_double_backward(call, seeds) | by_forward_mode(call, seeds)
    for x in (call.k, call.v, seeds.tangents["k"], seeds.tangents["v"]):
        x[:, :, 2] = torch.nan
    got = by_double_backward(call, seeds) | by_forward_mode(call, seeds)
    for name, x in want.items():
        torch.testing.assert_close(got[name], x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_row_of_nan_stays_with_the_pairs_that_count(backend):
    """0 * NaN in the tangents of dK and dV at keys that the row does not see or dropout drops."""
    q, k, v, dout = torch.randn(4, 1, 1, 6, 4).unbind()
    mask = torch.ones(6, 6, dtype=torch.bool)
    mask[2, 4] = False
    q[0, 0, 2] = torch.nan

    def gradients(q, k, v):
        def attend(q, k, v):
            torch.manual_seed(5)
            return attn_ext.attention(q, k, v, mask=mask, dropout_p=0.5, backend=backend)

        return torch.func.vjp(attend, q, k, v)[1](dout)

    found, tangents = torch.func.jvp(gradients, (q, k, v), (torch.ones_like(q), k, v))
    for at, name in enumerate("qkv"):
        bad = found[at].isnan().any(-1)
        assert bad.any() and not bad.all(), name
        assert tangents[at].isnan().any(-1).equal(bad), name


def test_tangents_with_a_large_common_part():
    """Digits lost to a part that the tangents of all keys have in common, which cancels."""
    call = random_call(3, seqlen_q=64, head_dim=16, batch=1)
    seeds = seeds_of(call)
    common = torch.randn(16, generator=torch.Generator().manual_seed(1))
    seeds.tangents["k"] += 1e3 * common
    truths = by_reference(to_float64(call), seeds.double())
    naives = by_reference(call, seeds)
    for found in (by_double_backward(call, seeds), by_forward_mode(call, seeds)):
        for name, got in found.items():
            error, naive = ((x.double() - truths[name]).norm() for x in (got, naives[name]))
            assert error <= 2 * naive, (name, error / naive)


MEMORY = """
import torch, attn_ext
from attn_ext.backends import registry
torch.set_num_threads(1)
if PATH == "blocked":
    registry.SECOND.clear()
def run(n):
    q, k, v = (torch.randn(1, 1, n, 16, dtype=DTYPE, requires_grad=True) for _ in range(3))
    out = attn_ext.attention(q, k, v, causal=True)
    first = torch.autograd.grad(out.sum(), (q, k, v), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in first), (q, k, v))
run(64)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak while torch was imported
before = high_water()
run(8192)
"""


@pytest.mark.parametrize(
    "path, dtype",
    [("kernels", torch.float32), ("kernels", torch.float16), ("blocked", torch.bfloat16)],
    ids=str,
)
def test_memory(path, dtype):
    """Anything of size N x N, which would be 256 MiB each, or copies of halves in float32.
    Allowed: 6 times q, k and v beyond these themselves, and 32 MiB."""
    inputs = 3 * 8192 * 16 * dtype.itemsize / 2**20
    script = f"PATH = {path!r}\n{MEMORY}".replace("DTYPE", str(dtype))
    assert high_water.grown_mib(script) < 7 * inputs + 32


def leaves(*shapes):
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]


def test_finite_differences_agree():
    """A derivative that agrees with the reference's because both are wrong."""

    def f(q, k, v, bias, sink):
        return attn_ext.attention(q, k, v, bias=bias, sink=sink, softcap=3.0, return_lse=True)

    inputs = leaves((1, 2, 2, 3), (1, 1, 3, 3), (1, 1, 3, 2), (2, 1, 3), (2,))
    batched = {"check_batched_grad": True, "check_batched_forward_grad": True}
    assert torch.autograd.gradcheck(f, inputs, check_forward_ad=True, fast_mode=True, **batched)
    assert torch.autograd.gradgradcheck(f, inputs, check_fwd_over_rev=True, fast_mode=True)


def test_functions_and_modules_built_on_attention():
    """A public name whose own code hides the second derivative or the tangent."""
    q, k, v = leaves((1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))
    bias = leaves((3, 3))[0]

    def served(q, k, v, bias):
        with attn_ext.replace_sdpa(strict=True):
            return F.scaled_dot_product_attention(q, k, v, bias)

    functions = (attn_ext.scaled_dot_product_attention, served)
    for f in functions:
        inputs = (q, k, v, bias)
        tangents = tuple(torch.randn_like(x) for x in inputs)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            want = torch.func.jvp(F.scaled_dot_product_attention, inputs, tangents)
        torch.testing.assert_close(torch.func.jvp(f, inputs, tangents), want)
        assert torch.autograd.gradgradcheck(f, inputs, fast_mode=True)
    module = attn_ext.nn.MultiheadAttention(4, 2, dtype=torch.float64)
    x = leaves((1, 3, 4))[0]
    f = lambda x: module(x, x, x, need_weights=False)[0]  # noqa: E731
    assert torch.autograd.gradgradcheck(f, (x,), check_fwd_over_rev=True, fast_mode=True)


def test_explain_names_the_path():
    """A user cannot see who computes the second derivative, or that nobody does."""
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64)
    found = attn_ext.explain(q, q, q)
    assert "torch operations" in found.second and found.second in str(found)
    assert "C++ kernels" in attn_ext.explain(*[q.float()] * 3).second
    assert "formula" in attn_ext.explain(q, q, q, normalizer="sigmoid").second
    lengths = torch.tensor([3], dtype=torch.int32)
    assert "attention_varlen" in attn_ext.explain(q, q, q, cache_seqlens=lengths).second
