"""Planted bugs in the CPU kernels for few queries, tests/mutants/cpu_few: in the four streams of
keys of
the decode kernel, and in the panels that heads of a group share.  Each must make the cases of
csrc/tests/few_queries.cpp wrong that its first line names.

A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of them
is compiled.
"""

import shutil
import subprocess

import patches
import pytest
import seen
from emulator_build import compiler, compiler_version
from repository import ROOT

MUTANTS = {p.name: p for p in map(patches.read, sorted(ROOT.glob("tests/mutants/cpu_few/*.patch")))}
SOURCE = ROOT / "csrc/tests/few_queries.cpp"
FLAGS = ["-O0", "-std=c++17", "-w", "-Wno-psabi", "-pthread"]
TABLE, CLEAN = "planted_bugs_cpu_few", "no bug"
DUE = seen.sample([*MUTANTS, CLEAN], 1)


def wrong_with(folder, patch=None) -> tuple[str, ...]:
    """The cases that are wrong, of the kernels with a bug."""
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree, ignore=shutil.ignore_patterns("cuda", "emulation"))
    for file, text in (patches.apply(patch, ROOT) if patch else {}).items():
        (folder / file).write_text(text)
    program = folder / "few_queries"
    compiler(*FLAGS, f"-I{tree}", tree / SOURCE.relative_to(ROOT / "csrc"), "-o", program)
    done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60)
    return tuple(sorted(done.stdout.split()))


def digest(patch=None) -> str:
    """Of all that decides what is wrong."""
    changed = patches.apply(patch, ROOT) if patch else {}
    files = {*seen.included(SOURCE), *map(type(SOURCE), (__file__, patches.__file__))}
    facts = (compiler_version(), FLAGS, patch.caught if patch else ())
    return seen.digest(files, *facts, changed=changed)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted; a table with a bug that is gone."""
    for patch in MUTANTS.values():
        assert patches.apply(patch, ROOT), patch.name
    assert len(MUTANTS) >= 8
    assert not seen.strangers(TABLE, [*MUTANTS, CLEAN])


@pytest.mark.parametrize("name", [CLEAN, *MUTANTS])
def test_planted_bug_is_caught(name, tmp_path):
    """Cases that a lost or doubled key passes, or which are wrong without a bug."""
    patch = MUTANTS.get(name)
    if seen.known(TABLE, name, digest(patch), DUE):
        return
    assert wrong_with(tmp_path, patch) == tuple(sorted(patch.caught if patch else ()))
    seen.passed(TABLE, name, digest(patch))
