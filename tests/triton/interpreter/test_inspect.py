"""The Triton kernels of attn_ext.inspect, interpreted, against the N x N way."""

import pytest
import torch
from inspect_checks import check, check_mean, matrix
from planted_triton import planted
from torch.utils._python_dispatch import TorchDispatchMode

from attn_ext import inspect
from attn_ext.testing import random_call
from attn_ext.triton_kernels.launch import inspect as launch

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
        lambda backend: inspect.top_k(q, k, 3, per_head=False, backend=backend).weights,
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
    mean = inspect.top_k(q, k, 3, per_head=False, backend="triton")
    assert torch.isfinite(mean.weights[:, :39]).all()
    assert torch.isnan(mean.weights[:, 39]).all() and (mean.keys >= 0).all()


def test_ties_go_to_the_first_keys():
    """An order that depends on the tile: every key weighs the same here."""
    q, k = torch.zeros(1, 2, 3, 8), torch.randn(1, 1, 70, 8)
    best = inspect.top_k(q, k, 40, per_head=False, backend="triton")
    assert torch.equal(best.keys, torch.arange(40).expand(1, 3, 40))


class Largest(TorchDispatchMode):
    """The most bytes of one tensor that is made within."""

    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.nbytes)
        return made


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_memory_of_means_over_heads_grows_with_the_length(backend, monkeypatch):
    """A tensor of all queries by all keys, or of all heads by them."""
    monkeypatch.setattr("attn_ext.inspect.logits.BUDGET", 2048)
    batch, heads, length, n = 1, 4, 256, 4
    q, k = torch.randn(batch, heads, length, 8), torch.randn(batch, heads, length, 8)
    with Largest() as largest:
        inspect.top_k(q, k, n, per_head=False, backend=backend)
    assert 0 < largest.nbytes <= 4 * heads * length * 8 < 4 * length * length // 2


PLANTED = {  # in the kernel of means over heads -> what becomes wrong
    "the last head only": ("summed += p", "summed = p", {"weights", "keys"}),
    "a sum is no mean": ("summed / heads_q.to(tl.float32)", "summed", {"weights"}),
    "keys that no head sees are listed": (
        "packed(mean, j)", "packed(summed / heads_q.to(tl.float32), j)", {"keys"}),
    "keys of the last head are counted": (
        "tl.maximum(by_any, visible)", "visible", {"weights", "keys", "any"}),
    "excluded keys are counted": ("visible = tl.where(s != float(\"-inf\"), 1, 0)",
        "visible = tl.where(s == s, 1, 0)", {"keys", "seen", "any"}),
    "sums of the first head's rows": ("total + row, tl.sum(p, 1)",
        "total + b * lse_b + i, tl.sum(p, 1)", {"totals"}),
    "LSE of the first head": ("base2_lse(lse, row, there)", "base2_lse(lse, b * lse_b + i, there)",
        {"weights", "keys", "totals"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_bug_is_caught(name, monkeypatch, tmp_path):
    """A check of means over heads that could not tell."""
    options = {"batch": 1, "heads_q": 3, "heads_k": 1, "seqlen_q": 35, "seqlen_k": 70}
    call = random_call(3, mask="bhqk", causal=True, **options)
    p, truths = matrix(call)
    call = call._replace(v=call.k[..., :1].contiguous())
    told = (call, p, truths[0].float(), "triton", torch.float32)
    assert check_mean(*told, named=True, most=(7, 40)) == []
    before, after, wrong = PLANTED[name]
    module = planted("inspect", before, after, tmp_path)
    monkeypatch.setattr(launch, "mean_top_k_kernel", module.mean_top_k_kernel)
    assert set(check_mean(*told, named=True, most=(7, 40))) == wrong
