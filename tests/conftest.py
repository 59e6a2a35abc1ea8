"""Fixtures: the backends of this machine (tests never name one), seeds, and the hypothesis
profile.
"""

import importlib.util
import os
import sys
import tempfile
import zlib
from pathlib import Path

import ptx_runs
import pytest
import tiers
import torch
import truths
from hypothesis import settings

import attn_ext
from attn_ext import _C

# What a developer has measured on this machine chooses no kernel here, nor in processes of tests.
CACHE = tempfile.TemporaryDirectory()
os.environ["ATTN_EXT_CACHE_DIR"] = CACHE.name

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25, database=None)
settings.register_profile("explore", deadline=None, max_examples=500)
settings.register_profile("check", settings.get_profile("ci"), max_examples=5)
settings.load_profile(os.environ.get("ATTN_EXT_HYPOTHESIS", "check" if tiers.CHECK else "ci"))


def pytest_configure(config):
    """Tests on compiled PTX are left out where they have passed for these kernels."""
    ptx_runs.register(config)


def pytest_ignore_collect(collection_path, config):
    """`make check` does not even import what it leaves out."""
    place = collection_path.relative_to(Path(__file__).parent).as_posix()
    return True if tiers.CHECK and tiers.reason(place) else None


def pytest_itemcollected(item):
    """Marks tests as `thorough` by the table of tests/helpers/tiers.py.  A case that several
    instruction sets or backends meet stays with one worker, which remembers the reference's results
    (tests/helpers/truths.py).
    """
    if why := tiers.reason(item.nodeid):
        item.add_marker(pytest.mark.thorough(reason=why))
    params = getattr(item, "callspec", None)
    if params and {"isa", "backend_and_device"} & params.params.keys():
        item.add_marker(pytest.mark.xdist_group(item.nodeid.split("[")[0]))


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that no worker waits for it at the end."""
    items.sort(key=lambda item: tiers.place_in_line(item.nodeid))


# Triton without a GPU has interpreter processes of its own.
DEVICES = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",), "reference": ("cpu",)}
DEVICES["emulated"] = ("cpu",)


def register_emulated():
    """tests/helpers/emulated_backend.py, as the name "emulated" of the registry, last in its order,
    where attn_ext._emulated is built: the CUDA kernels on the emulator.

    With ATTN_EXT_TEST_AUTO=emulated it is the first, and "auto" takes it for CPU tensors: files
    that name no backend then test the CUDA kernels, in mode "all".
    """
    name = "attn_ext.backends.emulated"
    path = Path(__file__).parent / "helpers" / "emulated_backend.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.available() == "":
        sys.modules[name] = module
        registry = sys.modules["attn_ext.backends.registry"]
        registry.ORDER = (*registry.ORDER, "emulated")
    if os.environ.get("ATTN_EXT_EMULATED_RUNS") == "ptx":  # all kernels as NVRTC compiles them
        assert module.available() == "", module.available()
        from ptx import build

        from attn_ext import _emulated

        _emulated.replace_kernels(build.Replacement().resolve)
    if os.environ.get("ATTN_EXT_EMULATED_RUNS") == "triton-ptx":  # Triton's PTX as backend "triton"
        from ptx import triton_driver

        triton_driver.stand_in(sys.modules["attn_ext.backends.registry"])
        DEVICES["triton"] = ("cpu",)
    if os.environ.get("ATTN_EXT_TEST_AUTO") == "emulated":
        assert module.available() == "", module.available()
        registry.ORDER = ("emulated", *registry.ORDER[:-1])
        module.set_mode("all", 1)
    return module


emulated_backend = register_emulated()
truths.remember()

# (backend, device, emulator mode) that run here: the emulated backend once a mode.
AVAILABLE = [
    (name, device, mode)
    for name, missing in attn_ext.backends().items()
    if not missing
    for device in DEVICES[name]
    if device == "cpu" or torch.cuda.is_available()
    for mode in (emulated_backend.MODES if name == "emulated" else ("",))
]


@pytest.fixture(params=AVAILABLE, ids=lambda triple: "-".join(filter(None, triple[::2])))
def backend_and_device(request):
    """Each backend of this machine and the device it works on; the emulator in each of its
    modes."""
    name, device, mode = request.param
    if mode:
        emulated_backend.set_mode(mode, zlib.crc32(request.node.name.encode()))
    return name, device


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


@pytest.fixture
def fresh_compiler():
    """No graph of another test is reused."""
    torch.compiler.reset()


@pytest.fixture
def calls(monkeypatch):
    """The calls that reach attn_ext from transformers' attention interface."""
    from model_checks import Calls, integration

    return Calls(monkeypatch, integration())


@pytest.fixture(params=tiers.isas(_C.supported_isas(), _C.isa()))
def isa(request):
    """Each instruction set of the machine"""
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa("")
