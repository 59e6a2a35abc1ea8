"""bench/context.py on little work: its columns, its picture, and the model's figures by hand."""

import importlib
import json

import pytest
from repository import ROOT

from attn_ext.distributed import model


@pytest.fixture
def bench(monkeypatch):
    """The module of that file."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    return importlib.import_module("context")


def test_kernels_are_measured(bench, monkeypatch, tmp_path):
    """A rank that is left out, and a file that is not written."""
    pytest.importorskip("matplotlib")
    options = ["--seqlen", "128", "--parts", "2", "--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["context.py", *options])
    bench.main()
    found = json.loads((tmp_path / "context.json").read_text())
    for direction in ("forward", "backward"):
        assert len(found["kernels"][direction]["share"]) == 2
        assert all(x > 0 for x in found["kernels"][direction]["share"])
    assert (tmp_path / "context.png").stat().st_size > 3000


def test_the_model():
    """Thresholds that are not where the waiting of a ring ends, or begins to be less."""
    assert model.threshold(32, 8, True, model.NVLINK) == 750
    for parts, heads in ((8, (32, 8)), (8, (32, 32)), (16, (64, 8))):
        for wire in (model.NVLINK, model.INFINIBAND):
            hidden = model.threshold(*heads, True, wire)
            equal = model.ring_from(*heads, parts, True, wire)
            for tokens, waits in ((hidden * 0.99, True), (hidden * 1.01, False)):
                sizes = model.Sizes(1, *heads, tokens * parts, 128, 2, parts, True, "cuda")
                assert (model.exposed(sizes, wire)["ring"] > 0) == waits
            for tokens, less in ((equal * 0.99, False), (equal * 1.01, True)):
                sizes = model.Sizes(1, *heads, tokens * parts, 128, 2, parts, True, "cuda")
                times = model.exposed(sizes, wire)
                assert equal == 0 or (times["ring"] < times["ulysses"]) == less


def test_the_committed_figures_are_those_of_the_tree(bench):
    """A model that changed after its table was written."""
    written = json.loads((ROOT / "bench/results/context.json").read_text())["thresholds"]
    assert written == json.loads(json.dumps(bench.thresholds()))
