"""Random mixes of all features, forward and backward, on every backend that can run here."""

import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from attn_ext import backends
from attn_ext.problem import Problem
from attn_ext.testing import check_call, random_call

# tests/ is no package (importlib mode), so its helper is loaded by path
_spec = importlib.util.spec_from_file_location(
    "strategies", Path(__file__).with_name("strategies.py")
)
strategies = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(strategies)

# not the reference, which would be compared to itself; Triton interpreted has tests of its own
NAMES = [
    n for n in backends.ORDER if n != "reference" and (n != "triton" or torch.cuda.is_available())
]


def able(name):
    """The backend can run on this machine; a backend that does not exist yet cannot."""
    try:
        return backends.get(name).available() == ""
    except ModuleNotFoundError as error:
        assert error.name == f"attn_ext.backends.{name}"
        return False


ABLE = [name for name in NAMES if able(name)]


def test_the_cpu_backend_is_among_those_tested():
    """Would catch a missing build, which would leave the test below without a backend."""
    assert "cpu" in ABLE


@pytest.mark.parametrize("name", ABLE)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,  # the same examples on every run of CI
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(options=strategies.call_options())
def test_any_mix_of_features_obeys_the_tolerance_rule(name, options):
    """Would catch features that are right alone and wrong together, around every tile edge."""
    device = "cuda" if name in ("cuda", "triton") else "cpu"
    call = random_call(device=device, **options)
    if name != "cpu" and backends.get(name).unsupported(Problem.of(call, grad=True)):
        return  # only the cpu backend promises every feature
    check_call(call, name, dlse=options["seed"] % 2 == 0)
