"""Fixtures: the backends of this machine (tests never name one), seeds, and the hypothesis
profile.
"""

import importlib.util
import os
import sys
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import attn_ext

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("ATTN_EXT_HYPOTHESIS", "ci"))


def register_emulated() -> None:
    """Makes `backend="emulated"` a name of the registry, last in its order: the CUDA kernels on the
    emulator, where attn_ext._emulated is built."""
    name = "attn_ext.backends.emulated"
    path = Path(__file__).with_name("emulated_backend.py")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.available() == "":
        sys.modules[name] = module
        registry = sys.modules["attn_ext.backends"]
        registry.ORDER = (*registry.ORDER, "emulated")


register_emulated()

# (backend, device) pairs that run here.  Triton without a GPU has interpreter processes of its own.
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "reference": ("cpu",)}
DEVICES["emulated"] = ("cpu",)
AVAILABLE = [
    (name, device)
    for name, missing in attn_ext.backends().items()
    if not missing
    for device in DEVICES[name]
    if device == "cpu" or torch.cuda.is_available()
]


@pytest.fixture(params=AVAILABLE, ids=lambda pair: pair[0])
def backend_and_device(request):
    """Each backend of this machine and the device it works on."""
    return request.param


@pytest.fixture
def backend(backend_and_device):
    """Name of a backend that is available on this machine."""
    return backend_and_device[0]


@pytest.fixture
def device(backend_and_device):
    """The device that `backend` works on."""
    return backend_and_device[1]


@pytest.fixture(autouse=True)
def seeded():
    """The same random inputs in every run and order of tests."""
    torch.manual_seed(20240607)


@pytest.fixture(autouse=True)
def emulator_mode(request):
    """Each test meets one mode of the emulator, the same in every run: by a hash of its name.

    ATTN_EXT_EMULATOR_MODE=all (or race, ...) forces one for all tests.
    """
    if "emulated" not in dict(AVAILABLE):
        return
    from attn_ext import _emulated

    number = zlib.crc32(request.node.name.encode())
    modes = ("plain", "random", "poison", "race", "all")
    forced = os.environ.get("ATTN_EXT_EMULATOR_MODE")
    _emulated.set_mode(forced or modes[number % 5], seed=number)


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach attn_ext from transformers' attention interface."""
    from model_checks import Calls, integration

    return Calls(monkeypatch, integration())
