"""Planted bugs in the Triton kernels of second derivatives, tests/mutants/triton_second: each must
make the results wrong that its first line names.
"""

import functools
import importlib.util

import patches
import pytest
import torch
from repository import ROOT
from second_calls import FEATURES, combination
from second_checks import by_moved, by_reference, seeds_of

from attn_ext.backends import triton_second
from attn_ext.testing import allowed_error, to_float64
from attn_ext.triton_kernels.launch import second as launch

MUTANTS = {
    p.name.split("/")[1]: p
    for p in map(patches.read, sorted(ROOT.glob("tests/mutants/triton_second/*.patch")))
}
CHOSEN = tuple(name != "window" for name in FEATURES)  # which would leave no long rows


@functools.cache
def truths() -> tuple:
    """A call with every feature and two tiles of keys, its results, and those of the reference in
    float32."""
    options = {"batch": 1, "heads_q": 2, "seqlen_k": 40}
    call = combination(CHOSEN, torch.float32, **options)._replace(backend="triton")
    seeds = seeds_of(call)
    return call, seeds, by_reference(to_float64(call), seeds.double()), by_reference(call, seeds)


def wrong() -> set[str]:
    """The kinds of results that are wrong."""
    call, seeds, exact, naive = truths()
    found, got = set(), by_moved(call, seeds, triton_second)
    for name, y in got.items():
        x = exact[name]
        error = (y.double() - x).abs().max()
        if not error <= allowed_error(x.detach(), naive[name].detach(), "out", torch.float32):
            found.add(name.split()[0])
    return found


def plant(patch, monkeypatch, folder) -> None:
    """Put the kernels with a bug in place of those that are launched."""
    ((file, text),) = patches.apply(patch, ROOT).items()
    path = folder / "planted.py"  # Triton reads the text of a kernel from its file
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    where = launch.kernels if file.endswith("/tangent.py") else launch
    kernels = [name for name in vars(module) if name.endswith("_kernel") and hasattr(where, name)]
    assert kernels, file
    for name in kernels:
        monkeypatch.setattr(where, name, getattr(module, name))


def test_the_kernels_as_they_are():
    """Without this, a check that always complains would pass all tests below."""
    assert wrong() == set()
    assert len(MUTANTS) >= 6


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, monkeypatch, tmp_path):
    """A check that a lost term passes."""
    plant(MUTANTS[name], monkeypatch, tmp_path)
    assert wrong() == set(MUTANTS[name].caught)
