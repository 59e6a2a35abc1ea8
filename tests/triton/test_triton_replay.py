"""A call as one before launches the same binaries with the same integers and its own pointers; a
call that differs in anything that Triton specialises on does not take another's binary.

No GPU: the launch code runs on CPU tensors with a stub in place of Triton's driver, in a process of
its own (tests/helpers/triton_launches.py), which compares each launch with that of the long way.
"""

import json
import os
import subprocess
import sys

import pytest
import seen
import torch
from repository import ROOT

triton = pytest.importorskip("triton")
SCRIPT = ROOT / "tests" / "helpers" / "triton_launches.py"

pytestmark = pytest.mark.xdist_group("replay")  # what the fixture below computes takes long


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the script prints: name of a check -> what it found."""

    def run_script():
        folder = str(tmp_path_factory.mktemp("triton"))
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "ATTN_EXT_CACHE_DIR": folder}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(SCRIPT)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    files = [*ROOT.glob("triton_kernels/**/*.py"), *ROOT.glob("attn_ext/core/*.py")]
    files += [SCRIPT, SCRIPT.with_name("triton_offline.py"), ROOT / "attn_ext" / "testing.py"]
    digest = seen.digest(files, torch.__version__, triton.__version__)
    return seen.printed("triton_replay", digest, run_script)


@pytest.mark.parametrize(
    "name",
    ["causal", "all features", "varlen", "paged, split", "sigmoid", "seqlen 1", "descriptors"],
)
def test_the_second_call_replays_the_same_launches(found, name):
    """A pointer in the wrong place, an allocation or a fill left out, a stale pointer."""
    assert found["replayed"][name] == {"forward": "same", "backward": "same"}


def test_calls_that_differ_take_their_own_binary(found):
    """A key that leaves something out: a stride, a scalar, a dtype, the tiles in force.  A
    misaligned pointer that meets a binary with vector loads."""
    for name, outcome in found["differ"].items():
        assert outcome == "long way, same launches as without memory", name


def test_misaligned_pointers_need_another_binary(found):
    """The check above would prove nothing if Triton compiled the same for both."""
    assert found["alignment matters"] is True


def test_copies_and_listeners_take_the_long_way(found):
    """A copy of the first call's values that a second call reads; a profiler that is told
    nothing."""
    assert found["long way"] == {"last stride 2": True, "launch hook": True, "float64 slopes": True}


@pytest.mark.parametrize("which", ["first", "second"])
def test_calls_can_be_captured_in_a_cuda_graph(found, which):
    """A stream that was current when the recipe was made, a value that is read back to the host, an
    allocation or a copy that a replayed call makes besides its outputs."""
    seen = found["capture"][which]
    assert seen["streams"] == [7 if which == "first" else 11]
    assert seen["launches"] == 6  # forward; delta, dK and dV, dQ; far rows' queries and keys
    assert seen["replayed"] == (0 if which == "first" else 2)
    assert not any(
        word in name for name in seen["operators"] for word in ("_local_scalar", "nonzero", "item")
    )
    if which == "second":
        assert seen["operators"] == ["aten.empty_strided.default"]
