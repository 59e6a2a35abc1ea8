"""C++ kernels of the CPU with a bug: compiled alone from a copy of the sources, as a program, or as
a library whose functions `attn_ext._C.plant` puts in place of the built ones.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import patches
import seen
from emulator_build import compiler, compiler_version
from repository import ROOT

from attn_ext import _C

FLAGS = ["-O0", "-std=c++17", "-w", "-Wno-psabi", "-pthread"]


def bugs(folder: str) -> dict[str, patches.Patch]:
    """Those of a folder of tests/mutants by name."""
    found = map(patches.read, sorted(ROOT.glob(f"tests/mutants/{folder}/*.patch")))
    return {patch.name: patch for patch in found}


def compiled(folder: Path, source: Path, *flags: str, patch=None) -> Path:
    """What a source of csrc makes, with a bug or without."""
    tree = folder / "csrc"
    shutil.copytree(ROOT / "csrc", tree, ignore=shutil.ignore_patterns("cuda", "emulation"))
    for file, text in (patches.apply(patch, ROOT) if patch else {}).items():
        (folder / file).write_text(text)
    made = folder / source.stem
    compiler(*FLAGS, *flags, f"-I{tree}", tree / source.relative_to(ROOT / "csrc"), "-o", made)
    return made


def addresses(folder: Path, source: Path, names, patch=None) -> list[int]:
    """Where the functions of a library are, once it is loaded."""
    library = compiled(folder, source, "-fPIC", "-shared", patch=patch)
    loaded = ctypes.CDLL(str(library))
    return [ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value for name in names]


def wrong_with(source: Path, wrong, **functions: str):
    """The last argument of `Planted`: what `wrong()` says while kernels of attn_ext._C are those of
    a source of csrc.  functions: what they are called there, by the names of `_C.plant`."""

    def planted(folder: Path, patch=None) -> tuple[str, ...]:
        found = addresses(folder, source, functions.values(), patch)
        try:
            _C.plant(**dict(zip(functions, found, strict=True)))
            return wrong()
        finally:
            _C.plant()

    return planted


def wrong_in_program(source: Path):
    """The same of a program, which prints the cases that are wrong."""

    def planted(folder: Path, patch=None) -> tuple[str, ...]:
        program = compiled(folder, source, patch=patch)
        done = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60)
        return tuple(sorted(done.stdout.split()))

    return planted


def digest(source: Path, test: str, patch=None) -> str:
    """Of all that decides what a check of the test file sees."""
    changed = patches.apply(patch, ROOT) if patch else {}
    files = {*seen.included(source), *map(Path, (test, __file__, patches.__file__))}
    facts = (compiler_version(), FLAGS, patch.caught if patch else ())
    return seen.digest(files, *facts, changed=changed)


class Planted:
    """The bugs of a folder, and what a test file sees of each; wrong_with(folder, patch=None): the
    names of what is wrong with a bug, or without one."""

    CLEAN = "no bug"

    def __init__(self, folder: str, source: Path, test: str, wrong_with):
        self.bugs, self.table = bugs(folder), f"planted_bugs_{folder.replace('/', '_')}"
        self.names = [self.CLEAN, *self.bugs]
        self.source, self.test, self.wrong_with = source, test, wrong_with
        self.due = seen.sample(self.names, 1)

    def check_patches(self, least: int) -> None:
        """Each applies, there are so many, and the table has none that is gone."""
        for patch in self.bugs.values():
            assert patches.apply(patch, ROOT), patch.name
        assert len(self.bugs) >= least
        assert not seen.strangers(self.table, self.names)

    def check(self, name: str, folder: Path) -> None:
        """What its first line names is wrong with a bug, and nothing without one."""
        patch = self.bugs.get(name)
        today = digest(self.source, self.test, patch)
        if not seen.known(self.table, name, today, self.due):
            caught = tuple(sorted(patch.caught)) if patch else ()
            assert self.wrong_with(folder, patch) == caught
            seen.passed(self.table, name, today)
