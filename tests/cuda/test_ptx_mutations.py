"""Faults planted in the PTX half of csrc/cuda/ptx.cuh and ptx_sm90.cuh, which the emulator's host
twins cannot show, and which mode of the executor notices each.

Each fault is a patch of tests/mutants/ptx, applied to a copy of csrc; the wrappers' kernels
(csrc/emulation/tests) are compiled from that by NVRTC.  Noticed: a wrapper gives other words than
its twin, or the launch ends with an error.  Compiled at each commit is a sample, and what a change
can affect (tests/helpers/seen.py).
"""

import runpy
import shutil

import numpy as np
import patches
import pytest
import seen
from repository import ROOT

emulated = pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

from ptx import build, twins  # noqa: E402  after the module that it needs is known to be there

pytestmark = pytest.mark.skipif(build.nvrtc() is None, reason="nvidia-cuda-nvrtc is not installed")

FAULTS = {p.stem: p for p in sorted((ROOT / "tests/mutants/ptx").glob("*.patch"))}
DUE = seen.sample(FAULTS, 2)


@pytest.fixture(autouse=True)
def plain_mode():
    yield
    emulated.set_mode("plain")


def _digest(patch):
    """Of the fault, the wrappers' kernels and all that runs them."""
    files = seen.included(ROOT / "csrc/emulation/ptx/operations.h")
    for header, _ in twins.KERNELS.values():
        files |= seen.included(ROOT / "csrc" / header)
    files |= set((ROOT / "csrc/emulation").glob("*.cpp"))
    files |= set((ROOT / "csrc/emulation/ptx").glob("*.cpp"))
    files |= set((ROOT / "tests/helpers/ptx").glob("*.py"))
    changed = patches.apply(patch, ROOT)
    return seen.digest(files, build.nvrtc().version, patch.caught, patch.silent, changed=changed)


def _notices(op, run, replacement):
    """What is wrong with one wrapper, or ""."""
    want = run(op)
    try:
        with replacement.active():
            got = run(op)
    except RuntimeError as error:
        return f"{op}: raised {error}"
    if op == "VOTES":
        words = [x[:512].reshape(-1, 4) for x in (got, want)]
        elected, votes = [x[:, 0] for x in words], [x[:, 1:3] for x in words]
        if not np.array_equal(*votes):
            return "VOTES: other votes"
        # any lane of a warp, but one
        counts = [each.reshape(4, 32).sum(1).tolist() for each in elected]
        return "" if counts[0] == counts[1] else "VOTES: other than one lane"
    try:
        twins.assert_same(op, got, want)
    except AssertionError:
        return f"{op}: other words"
    return ""


def first_notice(mode, hopper, replacement):
    """What is noticed first in this mode, or "ok"."""
    ops = twins.HOPPER_OPS if hopper else twins.OPS
    for seed in range(2 if mode in ("random", "all") else 1):
        emulated.set_mode(mode, seed=seed)
        emulated.set_ordered(True)
        for op in ops:
            notice = _notices(op, twins.run_hopper if hopper else twins.run, replacement)
            if notice:
                return notice
    return "ok"


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_noticed(name, tmp_path):
    patch = patches.read(FAULTS[name])
    digest = _digest(patch)
    if seen.known("compiled_ptx_faults", name, digest, DUE):
        return
    tree = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", tree, ignore=shutil.ignore_patterns("cpu", "*.cpp"))
    for file, text in patches.apply(patch, ROOT).items():
        (tmp_path / file).write_text(text)
    replacement = build.Replacement(tree, others=twins.KERNELS)
    hopper = name.startswith(("hopper-", "blocks-"))
    modes = (*patch.caught, *patch.silent)
    found = {mode: first_notice(mode, hopper, replacement) for mode in modes}
    assert replacement.used
    missed = [mode for mode in patch.caught if found[mode] == "ok"]
    assert missed == [], f"not noticed by {missed}: {found}"
    noticed = [mode for mode in patch.silent if found[mode] != "ok"]
    assert noticed == [], f"noticed by more modes than stated, {noticed}: {found}"
    seen.passed("compiled_ptx_faults", name, digest)


PAGE = ROOT / "docs/design/emulation.md"


def test_the_table_of_the_document():
    """A fault that the document tells otherwise than it is held to here."""
    rows = {
        fault.what: patches.row(fault.what, fault) for fault in map(patches.read, FAULTS.values())
    }
    assert len(rows) == len(FAULTS) >= 15
    assert patches.table(rows) in PAGE.read_text()


def test_the_table_of_tritons_faults():
    """The same of tests/triton/test_triton_ptx_mutations.py."""
    pytest.importorskip("triton", minversion="3.9", reason="its launcher is Python from 3.9 on")
    faults = runpy.run_path(str(ROOT / "tests/triton/test_triton_ptx_mutations.py"))["FAULTS"]
    rows = {name: patches.row(f"{each.architecture} {each.kernel}: {name}", each)
            for name, each in faults.items()}  # fmt: skip
    assert len(rows) >= 8
    assert patches.table(rows) in PAGE.read_text()


def test_the_tables_name_no_fault_that_is_gone():
    """A fault that was taken out, and still looks as if it was noticed."""
    assert not seen.strangers("compiled_ptx_faults", FAULTS)
