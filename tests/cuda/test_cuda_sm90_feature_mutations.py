"""Planted bugs in the Hopper forward with features, in the folder tests/mutants/cuda/sm90_features:
each must make the calls wrong that its first line names, or be noticed by the emulator there.

The kernel of bf16 and 64 columns that knows any feature is compiled from a copy of the sources and
runs in place of that of attn_ext._emulated.  A bug that was caught in these very sources is known
(tests/helpers/seen.py): only a sample of them is compiled.
"""

import ctypes
import shutil
from pathlib import Path

import patches
import pytest
import torch
from emulator_build import compiler
from planted_cpu import Planted
from repository import ROOT

_emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from ptx import build  # noqa: E402

from attn_ext.backends import registry  # noqa: E402
from attn_ext.testing import check_call, random_call  # noqa: E402

SOURCE = ROOT / "csrc/cuda/sm90/forward_features.cuh"
# 1048576: kAny, which asks for features at run time.
KERNEL = "attn::cuda::sm90::forward_features<attn::ptx::bf16, 64, 1048576>"
SIZES = {"batch": 1, "heads_q": 2, "heads_k": 1, "seqlen_q": 130, "seqlen_k": 400, "head_dim": 64,
         "dtype": torch.bfloat16}  # fmt: skip
# name -> (mode of the emulator, features)
CALLS = {
    "mask": ("plain", {"mask": "bhqk"}),
    "bias": ("plain", {"bias": "hqk"}),
    "alibi": ("plain", {"alibi": True}),
    "dropout": ("plain", {"dropout_p": 0.3}),
    "stats": ("plain", {"stats": True, "scale": 1.0}),
    "causal": ("plain", {"softcap": 2.0, "causal": True}),
    "far": ("plain", {"bias": "hqk"}),
    "grows": ("plain", {"mask": "qk"}),
    # rings go round
    "poison": ("poison", {"mask": "qk", "dropout_p": 0.3, "seqlen_q": 70, "seqlen_k": 800}),
    "race": ("race", {"mask": "qk", "dropout_p": 0.3, "seqlen_q": 70, "seqlen_k": 800}),
}


def made(name, options):
    """The call of a name."""
    call = random_call(3, **SIZES | options)
    # a row all of whose keys are far, one whose first are, one whose last are, one whose first are
    # just not
    if name == "far":
        call.bias[:, :, 2] = torch.finfo(torch.bfloat16).min
        call.bias[:, :, 3, :200] = -1e9
        call.bias[:, :, 4, 200:] = -1e9
        call.bias[:, :, 5, :200], call.bias[:, :, 5, 200:] = 5.5e8, 5.3e8
    if name == "grows":  # logits of which each tile has larger ones
        call.k.mul_(torch.arange(400).div(128, rounding_mode="floor").mul(3)[:, None] + 1)
    return call


def wrong() -> tuple[str, ...]:
    """The calls that are wrong."""
    emulated, found = registry.get("emulated"), []
    kernels = emulated._kernels()
    before = kernels.sm90, dict(kernels._devices)
    kernels.sm90, kernels._devices = True, {0: (1, True)}
    try:
        for name, (mode, options) in CALLS.items():
            emulated.set_mode(mode, 1)
            try:
                check_call(made(name, options), emulated, grads=False)
            except (AssertionError, RuntimeError):
                found.append(name)
    finally:
        kernels.sm90, kernels._devices = before
    return tuple(sorted(found))


def wrong_with(folder: Path, patch=None) -> tuple[str, ...]:
    """`wrong` of the kernel with a bug."""
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree, ignore=shutil.ignore_patterns("cpu", "tests"))
    for file, text in (patches.apply(patch, ROOT) if patch else {}).items():
        (folder / file).write_text(text)
    unit, library = folder / "unit.cpp", folder / "planted.so"
    unit.write_text(
        '#include "cuda/sm90/forward_features.cuh"\n'
        'extern "C" __attribute__((visibility("default"))) void planted(void* p) {\n'
        f"  {KERNEL}(*static_cast<attn::cuda::sm90::ForwardParams*>(p));\n}}\n"
    )
    compiler(*build.FLAGS, f"-I{tree}", unit, _emulated.__file__, "-o", library)
    address = ctypes.cast(ctypes.CDLL(str(library)).planted, ctypes.c_void_p).value
    used = set()

    def resolve(offset: int) -> int:
        name = build.expression(build.symbols()[offset])
        used.add(name)
        return address if name == KERNEL else 0

    _emulated.replace_kernels(resolve)
    try:
        found = wrong()
    finally:
        _emulated.replace_kernels(None)
    assert KERNEL in used
    return found


PLANTED = Planted("cuda/sm90_features", SOURCE, __file__, wrong_with)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(10)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A check that a feature left out passes; and without a bug, a check that always complains."""
    PLANTED.check(name, tmp_path)
