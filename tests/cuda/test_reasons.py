"""Why the CUDA backend does not work, told by `attn_ext.backends()`, `attn_ext.explain` and
`attn-ext doctor`, on a driver without a GPU.
"""

import dataclasses
import re
import types

import pytest
import torch

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from fake_driver import driver

import attn_ext
from attn_ext._C import cuda as _cuda
from attn_ext.backends import cuda, registry, tuned
from attn_ext.backends.jit import first_use
from attn_ext.cli import doctor
from attn_ext.core.problem import Problem
from attn_ext.functional import explain

CACHED = (cuda.available, cuda._device_problem, cuda._driver, cuda.stands_back)
# name -> (compute capability, CUDA of the driver, NVRTC's version or None, what is told)
CASES = {
    "nothing is missing": (90, 13000, (13, 0), ""),
    "a driver of a later minor version": (80, 13020, (13, 0), ""),
    "no NVRTC": (80, 13000, None, "NVRTC, .* was not found: pip install nvidia-cuda-nvrtc"),
    "an old driver": (80, 12040, (13, 0),
        r"driver is for CUDA 12\.4, and NVRTC 13\.0 .* newer driver, or pip install .*-cu12"),
    "an old GPU": (75, 13000, (13, 0), r"capability 7\.5, the kernels need 8\.0 or newer"),
    "a GPU that NVRTC does not know": (130, 13000, (13, 0),
        r"NVRTC does not compile for compute capability 13\.0, only for 8\.0, 9\.0"),
}  # fmt: skip


@pytest.fixture
def gpu(monkeypatch):
    """torch sees a GPU; NVRTC is what a test says: gpu(version or None)."""

    def nvrtc(version):
        found = version and types.SimpleNamespace(version=version)
        monkeypatch.setattr(cuda, "find", lambda driver=None: found)
        known = types.SimpleNamespace(architectures=(75, 80, 90))
        monkeypatch.setattr(first_use, "default", lambda driver=None: known)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(doctor, "gpus", list)
    monkeypatch.setattr(doctor, "tables", dict)
    for each in CACHED:
        each.cache_clear()
    yield nvrtc
    for each in CACHED:
        each.cache_clear()


def told() -> list[str]:
    """What each of the three says of the cuda backend."""
    q = torch.zeros(1, 1, 4, 32, dtype=torch.bfloat16)
    problem = Problem.of(attn_ext.functional.dense.dense_call(q, q, q))
    problem = dataclasses.replace(problem, device="cuda")
    (row,) = [each for each in doctor.gather()["backends"] if each["name"] == "cuda"]
    assert row["works"] == (not row["reason"])
    return [attn_ext.backends()["cuda"], "; ".join(explain.of(problem, "cuda").reasons["cuda"]),
            row["reason"]]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_reasons(gpu, name):
    """A reason that is no reason, or that one of the three keeps to itself."""
    capability, version, nvrtc, reason = CASES[name]
    gpu(nvrtc)
    with driver(capability, version=version):
        for text in told():
            assert re.search(reason, text) if reason else text == "", text


FIRST = {90: "cuda", 100: "triton", 103: "triton", 110: "triton", 120: "cuda"}


@pytest.mark.parametrize(("capability", "first"), FIRST.items())
def test_what_comes_first(gpu, monkeypatch, capability, first):
    """Kernels of sm_80 on GPUs whose speed is in tcgen05, or Triton's where it has nothing better;
    an order that explain does not tell."""
    gpu((13, 0))
    able = {"cuda": [], "triton": []}
    monkeypatch.setattr(registry, "reasons", lambda name, problem: able.get(name, ["no"]))
    monkeypatch.setattr(tuned, "row_of", lambda problem: None)
    monkeypatch.setattr(tuned, "state", lambda *device: "nothing was measured")
    q = torch.zeros(1, 1, 4, 32, dtype=torch.bfloat16)
    on_cpu = Problem.of(attn_ext.functional.dense.dense_call(q, q, q))
    problem = dataclasses.replace(on_cpu, device="cuda")
    registry.select.cache_clear()
    with driver(capability, version=13000):
        for name in ("auto", "fastest"):
            assert registry.select(name, problem) == first
        text = explain.of(problem).decided
        number = rf"{capability // 10}\.{capability % 10}"
        told = re.search(f"triton before cuda since compute capability {number} .*tcgen05", text)
        assert bool(told) == (first == "triton"), text
        assert registry.candidates("auto", on_cpu) == registry.ORDER
    registry.select.cache_clear()


def test_no_driver_and_no_gpu(gpu, monkeypatch):
    """A machine without NVIDIA's driver, or whose driver sees nothing, as an error of an import."""
    gpu((13, 0))
    with driver(80, init=100):
        assert all("CUDA_ERROR_NO_DEVICE" in text for text in told())
    for each in CACHED:
        each.cache_clear()
    with driver(80):
        _cuda.open_driver("no such library")
        assert all("NVIDIA's driver is not installed" in text for text in told())
    cuda.available.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert all("torch sees no CUDA device" in text for text in told())
