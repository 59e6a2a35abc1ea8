"""The kernels of attn_ext.inspect (csrc/cpu/kernels/inspect.h and the blocked torch code) against
the N x N way, for dot-product, additive and sigmoid attention, on every ISA.
"""

import pytest
import torch
from inspect_checks import CASES, check

from attn_ext.backends import registry
from attn_ext.core.problem import MAPS
from attn_ext.inspect import kernels, logits
from attn_ext.testing import random_call

ADDITIVE = [name for name, options in CASES.items() if "sink" not in options]


@pytest.mark.parametrize("name", CASES)
def test_dot_products(name, isa):
    """Wrong tails, a key of another tile, cells that overlap wrongly, a heap that loses a key."""
    check(CASES[name], "cpu")


@pytest.mark.parametrize("family", ["additive", "sigmoid"])
@pytest.mark.parametrize("name", ADDITIVE)
def test_the_family(name, family, isa):
    """Weights of a softmax where there is none, scores of products where there are none."""
    check(CASES[name], "cpu", family=family)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["dot", "additive", "sigmoid"])
def test_dtypes(family, dtype, isa):
    """Conversions of halves, the double kernel."""
    check(CASES["odd sizes: every tail"], "cpu", dtype, family)


@pytest.mark.parametrize("family", ["dot", "additive", "sigmoid"])
@pytest.mark.parametrize("name", ["grouped heads, causal", "mask and bias", "empty rows"])
def test_blocked_torch(name, family, monkeypatch):
    """The fallback: tiles so small that there are several in every direction."""
    monkeypatch.setattr("attn_ext.inspect.logits.BUDGET", 3000)
    check(CASES[name], "reference", family=family)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", ["dot", "additive", "sigmoid"])
def test_nan_of_an_excluded_key(backend, family):
    """0 * NaN in a mass or a cell."""

    def spoil(call):
        call.mask[..., 5] = False
        call.k[:, :, 5] = torch.nan

    check({"seqlen_q": 40, "seqlen_k": 70, "mask": "qk"}, backend, family=family, change=spoil)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nan_of_a_query_stays_in_its_row(backend):
    """One row's NaN in all cells of the map."""
    call = random_call(seqlen_q=40, seqlen_k=70, batch=1)
    call.q[:, :, 39] = torch.nan
    call = call._replace(v=call.k[..., :1].contiguous())
    lse = logits.forward(call)[1]
    grid = kernels.pooled_map(call, 4, 7, lse, backend)
    assert torch.isfinite(grid[:, :, :3]).all() and torch.isnan(grid[:, :, 3]).all()
    weights, keys = kernels.top_k(call, 3, lse, backend)
    assert torch.isfinite(weights[:, :, :39]).all() and torch.isnan(weights[:, :, 39]).all()
    assert (keys >= 0).all()
    found = kernels.mean_top_k(call, 3, lse, backend)
    assert torch.isfinite(found.weights[:, :39]).all()
    assert torch.isnan(found.weights[:, 39]).all() and torch.isnan(found.total[:, :, 39]).all()
    assert (found.keys >= 0).all() and (found.seen_by_any == 70).all()


def test_ties_go_to_the_first_keys():
    """An order that depends on the tile: every key weighs the same here."""
    call = random_call(seqlen_q=3, seqlen_k=200, batch=1)
    call.q.zero_()
    call = call._replace(v=call.k[..., :1].contiguous())
    _, keys = kernels.top_k(call, 70, logits.forward(call)[1], "cpu")
    assert torch.equal(keys, torch.arange(70).expand(1, 2, 3, 70))
    found = kernels.mean_top_k(call, 70, logits.forward(call)[1], "cpu")
    assert torch.equal(found.keys, torch.arange(70).expand(1, 3, 70))


def test_threads_do_not_change_the_result():
    """Sums in an order that depends on the number of threads."""
    call = random_call(seqlen_q=700, seqlen_k=300, batch=1, causal=True, head_dim=32)
    call = call._replace(v=call.k[..., :1].contiguous())
    lse, before, found = logits.forward(call)[1], torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        mean = kernels.mean_top_k(call, 9, lse)
        found.append((kernels.column_mass(call, lse), kernels.pooled_map(call, 16, 16, lse), *mean))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dispatch():
    """A kernel that is chosen for a call that it does not serve; an unknown name in silence."""
    call = random_call()
    for name in MAPS:
        assert kernels.select("auto", call, name) == "cpu"
    with pytest.raises(NotImplementedError, match="no cuda kernel for top_k"):
        kernels.select("cuda", call, "top_k")
    with pytest.raises(NotImplementedError, match="no triton kernel for row_stats"):
        kernels.select("triton", call, "row_stats")
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        kernels.select("gpu", call, "top_k")
    unsupported = registry.get("triton").unsupported
    additive = kernels.problem_of(call._replace(w=call.q), "top_k")
    assert any("softmax over dot" in why for why in unsupported(additive))
    many = kernels.problem_of(call, "top_k", top_k=65)
    assert any("n must be at most 64" in why for why in unsupported(many))
