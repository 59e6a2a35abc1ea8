"""The Triton kernels of attn_ext.inspect, interpreted, against the N x N way."""

import pytest
import torch
from inspect_checks import check

from attn_ext import inspect

# name -> random_call's options: what each would catch
CASES = {
    "one of everything": {"seqlen_q": 1, "head_dim": 1},
    "last tiles hold one row": {"seqlen_q": 33, "seqlen_k": 65, "head_dim": 7},
    "grouped heads, causal": {"heads_q": 4, "heads_k": 2, "seqlen_q": 40, "causal": True},
    "window": {"seqlen_q": 70, "seqlen_k": 97, "window": (20, 9)},
    "empty rows": {"seqlen_q": 60, "seqlen_k": 50, "window": (3, 2), "align": 0},
    "mask and bias": {"seqlen_q": 20, "seqlen_k": 40, "mask": "bhqk", "bias": "hq", "batch": 2},
    "softcap, alibi": {"seqlen_q": 20, "seqlen_k": 40, "softcap": 1.5, "alibi": "b", "batch": 2},
    "sink": {"seqlen_q": 33, "seqlen_k": 40, "sink": True, "causal": True},
    "padded storage": {"seqlen_q": 33, "layout": "padded", "mask": "qk"},
}


@pytest.mark.parametrize("name", CASES)
def test_cases(name):
    """Wrong tails, a key twice or lost, cells that overlap wrongly."""
    check({"batch": 1, **CASES[name]}, "triton", few=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Weights that are rounded to halves before they are summed."""
    options = {"batch": 1, "heads_q": 1, **CASES["last tiles hold one row"]}
    check(options, "triton", dtype, few=True)


def test_nan_of_an_excluded_key():
    """0 * NaN in a mass or a cell."""

    def spoil(call):
        call.mask[..., 5] = False
        call.k[:, :, 5] = torch.nan

    options = {"seqlen_q": 40, "seqlen_k": 70, "mask": "qk", "batch": 1}
    check(options, "triton", change=spoil, few=True)


def test_the_public_functions():
    """A backend that is not offered, or not used."""
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8)
    for function in (
        lambda backend: inspect.top_k(q, k, 3, causal=True, backend=backend).weights,
        lambda backend: inspect.column_mass(q, k, causal=True, backend=backend),
        lambda backend: inspect.pooled_map(q, k, 9, causal=True, backend=backend),
    ):
        torch.testing.assert_close(function("triton"), function("reference"))


def test_a_nan_query_stays_in_its_row():
    """One row's NaN in all cells of the map."""
    q, k = torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40, 8)
    q[:, :, 39] = torch.nan
    grid = inspect.pooled_map(q, k, 4, backend="triton")
    assert torch.isfinite(grid[:, :, :3]).all() and torch.isnan(grid[:, :, 3]).all()
    best = inspect.top_k(q, k, 3, backend="triton")
    assert torch.isfinite(best.weights[:, :, :39]).all()
    assert torch.isnan(best.weights[:, :, 39]).all() and (best.keys >= 0).all()
