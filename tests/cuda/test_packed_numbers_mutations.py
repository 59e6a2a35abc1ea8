"""Which tile of which packed sequence a number stands for (csrc/cuda/packed.h), by the program
csrc/tests/packed_numbers.cpp, which also counts how many sequences are looked at for a number; and
how many numbers a call has.
"""

import shutil
import subprocess

import patches
import pytest
import torch
from emulator_build import compiler
from planted_cpu import Planted
from repository import ROOT

PROGRAM = ROOT / "csrc/tests/packed_numbers.cpp"


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """The cases that the program finds wrong, with a bug or without."""
    for name in ("cuda/packed.h", "tests/packed_numbers.cpp"):
        (folder / "csrc" / name).parent.mkdir(parents=True)
        shutil.copy(ROOT / "csrc" / name, folder / "csrc" / name)
    for file, text in (patches.apply(patch, ROOT) if patch else {}).items():
        (folder / file).write_text(text)
    program = folder / "program"
    compiler("-O1", "-std=c++17", folder / PROGRAM.relative_to(ROOT), "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60)
    return tuple(sorted(done.stdout.split()))


PLANTED = Planted("cuda/packed", PROGRAM, __file__, wrong_with)


def test_every_patch_applies():
    """Numbers that are found otherwise where a bug is planted; a table with a bug that is gone."""
    PLANTED.check_patches(7)


@pytest.mark.parametrize("name", PLANTED.names)
def test_planted_bug_is_caught(name, tmp_path):
    """A walk over all sequences for each tile, which makes 100,000 sequences of one token slow
    whatever is computed; a tile that no number stands for."""
    PLANTED.check(name, tmp_path)


def test_a_call_has_numbers_for_its_rows_not_for_its_longest_sequence(hopper):
    """CTAs that return at once: a tile of the longest sequence's in each."""
    call = hopper.call(seqlens_q=[3000] + [1] * 49, seqlens_k=[1] * 50, head_dim=64,
                       heads_q=1, heads_k=1)  # fmt: skip
    out = torch.empty_like(call.q)
    lse = torch.empty(call.q.shape[:3])
    native = hopper.kernels._native(call, hopper.kernels._canonical(call), out, lse)
    numbers = 3049 // 128 + 50  # 50 * 24 in the other way
    assert native.forward_workspace(numbers, True) == 0  # no counter: a CTA a number
    assert native.forward_workspace(numbers - 1, True) == 1
