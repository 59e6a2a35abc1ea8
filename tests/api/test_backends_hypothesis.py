"""Random mixes of all features, forward and backward, on every backend that can run here."""

import os

import emulated_backend as emulated
import pytest
import strategies
import tiers
import torch
from hypothesis import HealthCheck, given, settings

from attn_ext.backends import registry
from attn_ext.core.problem import Problem
from attn_ext.testing import check_call, random_call

# not the reference, which would be compared to itself; Triton interpreted has tests of its own
COMPILED = os.environ.get("ATTN_EXT_EMULATED_RUNS") == "triton-ptx"  # its PTX, on CPU tensors
TRITON = COMPILED or torch.cuda.is_available()
NAMES = [n for n in registry.ORDER if n != "reference" and (n != "triton" or TRITON)]


def able(name):
    """The backend can run on this machine; a backend that does not exist yet cannot."""
    try:
        return registry.get(name).available() == ""
    except ModuleNotFoundError as error:
        assert error.name == f"attn_ext.backends.{name}"
        return False


ABLE = [
    (name, mode)
    for name in NAMES
    if able(name)
    for mode in (emulated.MODES if name == "emulated" else ("",))
]


def test_the_cpu_backend_is_among_those_tested():
    """Would catch a missing build, which would leave the test below without a backend."""
    assert ("cpu", "") in ABLE


# The same examples on every run of CI; ATTN_EXT_HYPOTHESIS=explore for many others.
EXPLORE = os.environ.get("ATTN_EXT_HYPOTHESIS") == "explore"


@pytest.mark.parametrize(("name", "mode"), ABLE, ids=["-".join(filter(None, p)) for p in ABLE])
@settings(
    max_examples=settings().max_examples if EXPLORE or tiers.CHECK else 60,
    deadline=None,
    derandomize=not EXPLORE,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(options=strategies.call_options())
def test_any_mix_of_features_obeys_the_tolerance_rule(name, mode, options):
    """Would catch features that are right alone and wrong together, around every tile edge."""
    if mode:
        emulated.set_mode(mode, options["seed"])
    if name != "cpu" and options["dtype"] == torch.float64:  # only the cpu backend promises it
        options["dtype"] = torch.bfloat16
    device = "cuda" if name == "cuda" or (name == "triton" and not COMPILED) else "cpu"
    call = random_call(device=device, **options)
    grad = "cache_seqlens" not in options
    if name != "cpu" and registry.get(name).unsupported(Problem.of(call._replace(grad=grad))):
        return  # only the cpu backend promises every feature
    check_call(call, name, dlse=options["seed"] % 2 == 0)
