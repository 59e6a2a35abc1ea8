"""Planted bugs in what the CUDA backward does with rows whose LSE is far from 0, in the folder
tests/mutants/cuda/far: each must make the gradients wrong of the calls that its first line names.

The kernels of float32 that know every row by itself are compiled from a copy of the sources and run
in place of those of attn_ext._emulated.  A bug that was caught in these very sources is known
(tests/helpers/seen.py): only a sample of them is compiled.
"""

import ctypes
import shutil
from pathlib import Path

import patches
import pytest
from emulator_build import compiler
from planted_cpu import Planted
from repository import ROOT

_emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from ptx import build  # noqa: E402

from attn_ext.backends import registry  # noqa: E402
from attn_ext.testing import check_call, random_call  # noqa: E402

SOURCE = ROOT / "csrc/cuda/sm80/backward_preprocess.cuh"  # which includes the others
KERNELS = (
    "backward_delta", "backward_sink", "backward_far_queries", "backward_far_keys",
    "backward_far_bias",
)  # fmt: skip


def far_call(**options):
    """A call with rows of a far bias beside ordinary ones."""
    options = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 20, "bias": "qk", **options}
    call = random_call(7, **options)
    call.bias[:, :, 2:5] = -1e4
    return call


def wrong() -> tuple[str, ...]:
    """The calls whose gradients are wrong."""
    calls = {
        "plain": far_call(),
        "sink": far_call(sink=True),
        "dropout": far_call(dropout_p=0.5),
        "keys": far_call(seqlen_k=40, bias="hqk"),
        "excluded": far_call(mask="bk"),
    }
    calls["sink"].sink[:] = -1e4
    calls["excluded"].mask[..., 5] = False
    calls["excluded"].k[:, :, 5] = float("nan")
    registry.get("emulated").set_mode("plain", 1)
    found = []
    for name, call in calls.items():
        try:
            check_call(call, "emulated")
        except AssertionError:
            found.append(name)
    return tuple(sorted(found))


def wrong_with(folder: Path, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernels with a bug."""
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree, ignore=shutil.ignore_patterns("cpu", "tests"))
    for file, text in (patches.apply(patch, ROOT) if patch else {}).items():
        (folder / file).write_text(text)
    unit = folder / "unit.cpp"
    unit.write_text(
        '#include "cuda/sm80/backward_preprocess.cuh"\n'
        + "".join(
            f'extern "C" __attribute__((visibility("default"))) void planted_{name}(void* p) {{\n'
            f"  attn::cuda::sm80::{name}<float>(*static_cast<attn::cuda::Params*>(p));\n}}\n"
            for name in KERNELS
        )
    )
    made = folder / "planted.so"
    compiler(*build.FLAGS, f"-I{tree}", unit, _emulated.__file__, "-o", made)
    loaded = ctypes.CDLL(str(made))
    planted = {
        f"attn::cuda::sm80::{name}<float>": ctypes.cast(
            getattr(loaded, f"planted_{name}"), ctypes.c_void_p
        ).value
        for name in KERNELS
    }
    used = set()

    def resolve(offset: int) -> int:
        name = build.expression(build.symbols()[offset])
        used.add(name)
        return planted.get(name, 0)

    _emulated.replace_kernels(resolve)
    try:
        found = wrong()
    finally:
        _emulated.replace_kernels(None)
    assert set(planted) <= used
    return found


PLANTED = Planted("cuda/far", SOURCE, __file__, wrong_with)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(6)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a lost sum passes; and without a bug, a check that always complains."""
    PLANTED.check(name, tmp_path)
