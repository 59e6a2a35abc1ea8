"""The code that ships, without a GPU: our CUDA kernels compiled by NVRTC, their PTX run on the
emulated machine (tests/helpers/ptx, docs/design/emulation.md).

ATTN_EXT_EMULATED_RUNS=ptx runs every test of the backend `emulated` that way (`make test-ptx`);
here are the wrappers one by one, a chosen kernel of each kind, and what the executor refuses.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import seen
import torch

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

import ptx  # noqa: E402  after the module that it needs is known to be there
from ptx import build, flow, twins  # noqa: E402

from attn_ext.backends import registry  # noqa: E402
from attn_ext.testing import check_call, random_call  # noqa: E402

pytestmark = pytest.mark.skipif(build.nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed")
MODES = ["plain", "random", "poison", "race", "all"]


@pytest.fixture(autouse=True)
def plain_mode():
    yield
    emulated.set_mode("plain")


@pytest.fixture(scope="module")
def compiled():
    return build.Replacement(others=twins.KERNELS)


# ---- the libraries ------------------------------------------------------------------------------
def test_several_makers_of_one_library(monkeypatch, tmp_path):
    """Workers of a test run that make one library at once: each gets it, nothing else is left.
    Would catch a temporary file whose name two of them share."""
    kernel = ".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry one()\n{\n\tret;\n}\n"
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    with ThreadPoolExecutor(2) as pool:
        made = set(pool.map(lambda _: build.library(kernel, "one.ptx"), range(2)))
    assert len(made) == 1
    assert list((tmp_path / "libraries").iterdir()) == list(made)


# ---- wrappers -----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["plain", "all"])
def test_wrappers(compiled, mode):
    """The PTX of each wrapper of ptx.cuh gives the words that its host twin gives."""
    emulated.set_mode(mode, seed=3)
    for op in twins.OPS:
        want = twins.run(op)
        with compiled.active():
            got = twins.run(op)
        twins.assert_same(op, got, want)
    assert "attn::wrappers::wrappers" in compiled.used


@pytest.mark.parametrize("mode", MODES)
def test_wrappers_of_hopper(compiled, mode):
    """The same of ptx_sm90.cuh: TMA, mbarriers, wgmma with its accumulators in flight."""
    emulated.set_mode(mode, seed=3)
    for op in twins.HOPPER_OPS:
        emulated.set_ordered(op == "IN_TURN")
        want = twins.run_hopper(op)
        with compiled.active():
            got = twins.run_hopper(op)
        if op == "VOTES":  # elect.sync takes any lane
            elected, *rest = got[:512].reshape(128, 4).T
            assert elected.reshape(4, 32).sum(1).tolist() == [1, 1, 1, 1]
            np.testing.assert_array_equal(rest, want[:512].reshape(128, 4).T[1:])
        else:
            twins.assert_same(op, got, want)
    for kernel in ("wrappers", "registers"):
        assert f"attn::hopper::{kernel}<attn::ptx::bf16>" in compiled.used


@pytest.mark.parametrize("op", twins.OUT_OF_TURN)
def test_additions_out_of_turn_in_compiled_code(compiled, op):
    """A missing fence or word between blocks, in any mode, with the line of PTX."""
    emulated.set_mode("plain")
    emulated.set_ordered(True)
    with (
        compiled.active(),
        pytest.raises(RuntimeError, match=r"wrappers<ptx::bf16>\.ptx:\d+: adds .* orders the two"),
    ):
        twins.run_hopper(op)


@pytest.mark.parametrize("op", twins.RACES)
def test_races_in_compiled_code_name_lines_of_ptx(compiled, op):
    """A missing proxy fence, floats overwritten while they are read: what only `race` sees."""
    emulated.set_mode("race")
    with (
        compiled.active(),
        pytest.raises(RuntimeError, match=r"wrappers<ptx::bf16>\.ptx:\d+.*race"),
    ):
        twins.run_hopper(op)


# ---- kernels ------------------------------------------------------------------------------------
CALLS = {  # what each would catch, beside the instructions of its kernels
    "plain, ragged and causal": {"seqlen_q": 70, "seqlen_k": 201, "causal": True},
    "every feature": {"seqlen_q": 70, "seqlen_k": 130, "mask": "bk", "bias": "hqk", "softcap": 5.0,
                      "alibi": True, "sink": True, "dropout_p": 0.2, "window": (60, -1)},
    "deterministic": {"seqlen_q": 150, "seqlen_k": 200, "causal": True, "deterministic": True},
    "paged decode, split": {"seqlen_q": 1, "cache_seqlens": [300, 41], "seqlen_k": 320,
                            "page_size": 16, "heads_q": 4, "heads_k": 2},
}  # fmt: skip
HOPPER = {
    "plain, ragged and causal": CALLS["plain, ragged and causal"],
    "features of whole tiles": {"seqlen_q": 70, "seqlen_k": 300, "mask": "qk", "bias": "hqk",
                                "softcap": 5.0, "alibi": True, "sink": True, "dropout_p": 0.2},
    "blocks of keys in order": {"seqlen_q": 70, "seqlen_k": 300, "deterministic": True},
}  # fmt: skip
NAMES = [*CALLS, *(f"hopper: {name}" for name in HOPPER)]
DUE = {name for name in NAMES if seen.turn(name, 16)}  # half a minute each


def _digest(name):
    """Of kernels, of what says which of them run, of executor and emulator."""
    files = seen.included(seen.ROOT / "csrc/emulation/ptx/operations.h")
    files.add(seen.ROOT / "attn_ext/backends/native_gpu.py")
    for header in ("sm80/kernels.cuh", "sm90/kernels.cuh", "launch.cpp"):
        files |= seen.included(seen.ROOT / "csrc/cuda" / header)
    files |= set((seen.ROOT / "csrc/emulation").glob("*.cpp"))
    files |= set((seen.ROOT / "csrc/emulation/ptx").glob("*.cpp"))
    files |= set((seen.ROOT / "tests/helpers/ptx").glob("*.py"))
    return seen.digest(files, build.nvrtc().version, repr((CALLS | HOPPER).get(name)))


@pytest.mark.parametrize("name", NAMES)
def test_kernels(name, monkeypatch):
    """Forward and backward in bf16 at a head dimension of 64, in every mode."""
    digest = _digest(name)
    if seen.known("compiled_ptx", name, digest, DUE):
        return
    backend, kernels = registry.get("emulated"), registry.get("emulated")._kernels()
    monkeypatch.setattr(kernels, "sm90", name.startswith("hopper"))
    monkeypatch.setattr(kernels, "_devices", {})
    options = (CALLS | HOPPER)[name.removeprefix("hopper: ")]
    call = random_call(1, head_dim=64, dtype=torch.bfloat16, **options)
    replacement = build.Replacement()
    for mode in MODES:
        backend.set_mode(mode, 3, smem_kib=163)
        with replacement.active():
            check_call(call, backend, grads="cache_seqlens" not in options)
    assert len(replacement.used) >= 2, replacement.used
    seen.passed("compiled_ptx", name, digest)


# ---- what is not known fails --------------------------------------------------------------------
KERNEL = """.version 9.0
.target sm_80
.address_size 64
.visible .entry k(
    .param .u64 k_param_0
)
{
    .reg .b32 %%r<4>;
    .reg .b64 %%rd<2>;
    .reg .pred %%p<2>;
    ld.param.u64 %%rd1, [k_param_0];
    %s
    ret;
}
"""


@pytest.mark.parametrize(
    ("instruction", "why"),
    {
        "nanosleep.u32 20;": "unknown instruction",
        "add.rz.f32 %r1, %r2, %r3;": "unknown modifier rz",
        "add.s64 %rd1, %r2, %rd1;": "%r2 has 32 bits, u64 needs 64",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1}, {%r2}, {%r3}, {%r1};": "mma",
        "mov.u32 %r1, %clock;": "operand %clock",
        "bra $missing;": r"no label \$missing",
        "ld.local.u32 %r1, [%rd1];": "space local",
    }.items(),
)
def test_what_the_executor_does_not_know(instruction, why):
    """An instruction that would be run as something near it: named with kernel and line."""
    (kernel,) = ptx.kernels(KERNEL.replace("%%", "%").replace("%s", instruction))
    with pytest.raises(ptx.Unsupported, match=rf"k, line 12: .*{why}"):
        ptx.translate(kernel, "k.ptx")


def test_registers_in_flight():
    """The analysis that says where a product's registers may be read: through moves, around a
    loop, to the wait."""
    product = flow.Effect(reads=1, writes=1, kills=1, flies=True)
    moves = flow.Effect(reads=1, writes=2, kills=2, moves=True)
    some, everything = flow.Effect(lands=1), flow.Effect(lands=2)
    read = flow.Effect(reads=2)
    effects = [product, moves, some, everything, read]
    after = flow.successors([None, None, None, 0, None], [True] * 5)
    assert flow.in_flight(effects, after) == [0, 1, 3, 3, 0]
    assert flow.live(effects, after) == [3 & 1, 3, 3, 3, 0]
