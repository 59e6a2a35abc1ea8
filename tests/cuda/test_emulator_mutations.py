"""Planted bugs in the CUDA kernels, and which mode of the emulator catches each.

Each mutant is a textual change of a copy of csrc, compiled with the driver csrc/emulation/tests/
mutant.cpp and run in all modes.  A mutant that passes everywhere would mean that the emulator, or
the problems that the kernels are tested on, cannot see that kind of bug.
"""

import os
import shutil
import subprocess
from pathlib import Path

import planted_bugs
import planted_bugs_sm90_backward
import pytest
from planted_bugs import ALL_MODES, BACKWARD, FORWARD, GEMM, HOPPER, SMEM
from planted_bugs_sm90_backward import HOPPER_BACKWARD, HOPPER_FUSED, HOPPER_SPLIT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = {**planted_bugs.MUTANTS, **planted_bugs_sm90_backward.MUTANTS}
PARTS = [GEMM, FORWARD, BACKWARD, HOPPER, HOPPER_BACKWARD, HOPPER_SPLIT, HOPPER_FUSED]
FLAGS = [
    "-O1",
    "-std=c++17",
    "-w",
    "-fno-strict-aliasing",
    "-pthread",
    "-DATTN_EMULATED",
]


def compiler():
    return os.environ.get("CXX", "c++")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The emulator's own objects, compiled once: no mutant touches them."""
    folder = tmp_path_factory.mktemp("emulator")
    objects = []
    for source in sorted((ROOT / "csrc/emulation").glob("*.cpp")):
        if source.stem != "bindings":
            objects.append(str(folder / f"{source.stem}.o"))
            subprocess.run(
                [compiler(), *FLAGS, "-O2", "-c", str(source), "-o", objects[-1]], check=True
            )
    return objects


def build(emulator, csrc, part, folder, *flags):
    """Compiles the driver with the kernels in csrc; the binary's path."""
    binary = str(folder / "mutant")
    source = str(csrc / "emulation/tests/mutant.cpp")
    subprocess.run(
        [compiler(), *FLAGS, *flags, f"-DPART={part}", source, *emulator, "-o", binary], check=True
    )
    return binary


def verdicts(emulator, csrc, part, folder):
    """{mode: what the driver says}, of the kernels in csrc."""
    binary = build(emulator, csrc, part, folder)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"the driver died: {done.stderr}"
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("part", PARTS)
def test_kernels_as_they_are_pass_every_mode(part, emulator, tmp_path):
    """Without this, a driver that always complains would pass all tests below."""
    found = verdicts(emulator, ROOT / "csrc", part, tmp_path)
    assert found == dict.fromkeys([*ALL_MODES, "banks"], "ok")


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, emulator, tmp_path):
    mutant = MUTANTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu"))
    path = csrc / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) >= 1, f"{mutant.file} has changed: update the mutant {name!r}"
    path.write_text(text.replace(mutant.old, mutant.new))
    found = verdicts(emulator, csrc, mutant.part, tmp_path)
    passed = [mode for mode in mutant.caught if found[mode] == "ok"]
    assert passed == [], f"not caught by {passed}: {found}"
    noticed = [mode for mode in mutant.silent if found[mode] != "ok"]
    assert noticed == [], f"caught by more modes than stated, {noticed}: {found}"


SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@pytest.mark.parametrize(
    ("part", "general"),
    [
        (FORWARD, False),
        (FORWARD, True),
        (BACKWARD, False),
        (BACKWARD, True),
        (HOPPER, False),
        (HOPPER_BACKWARD, False),
        (HOPPER_FUSED, False),
    ],
)
def test_kernels_stay_within_their_tensors(part, general, emulator, tmp_path):
    """Global memory, which the emulator does not check: ragged ends under AddressSanitizer."""
    flags = (*SANITIZE, f"-DKERNELS_GENERAL={str(general).lower()}")
    binary = build(emulator, ROOT / "csrc", part, tmp_path, *flags)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert dict(line.split(": ", 1) for line in done.stdout.splitlines())["plain"] == "ok"


def test_sanitizer_sees_a_copy_past_the_last_key(emulator, tmp_path):
    """Without this the test above might pass because nothing looks."""
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc, ignore=shutil.ignore_patterns("cpu"))
    path = csrc / SMEM
    text, old = path.read_text(), "const bool valid = inside && first + row < end;"
    assert old in text, "smem.cuh has changed: update this test"
    path.write_text(text.replace(old, "const bool valid = inside;"))
    binary = build(emulator, csrc, FORWARD, tmp_path, *SANITIZE)
    done = subprocess.run([binary], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
