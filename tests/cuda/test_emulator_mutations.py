"""Planted bugs in the CUDA kernels, and which mode of the emulator catches each.

Each bug is a patch of tests/mutants, applied to a copy of csrc.  Only the kernels of its folder
(csrc/emulation/tests/mutant_kernels.cpp) are compiled again; the emulator and the problems that
they run on are compiled once.  A bug that passes everywhere would mean that the emulator, or these
problems, cannot see its kind.

A bug that was caught in these very sources is known (tests/helpers/seen.py): only a sample of those
is compiled, and whatever a change of the kernels, of the emulator or of a patch can affect.
"""

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import emulator_build
import patches
import pytest
import seen
from emulator_build import FLAGS, SOURCES, compiler, compiler_version, emulator
from repository import ROOT

pytest.importorskip(
    "attn_ext._emulated", reason="built by the test install only: ATTN_EXT_EMULATED=1 pip install ."
)

# folders of tests/mutants in the order of PART in csrc/emulation/tests/mutant.h
PARTS = (
    "example", "sm80_forward", "sm80_backward", "sm90_forward", "sm90_backward",
    "sm90_backward_split", "sm90_backward_fused", "sm80_forward_plain",
    "sm80_backward_fused",
)  # fmt: skip
OTHERS = ("cpu_second", "ptx", "second", "triton_second")  # whose tests are elsewhere
FILES = [p for p in sorted(ROOT.glob("tests/mutants/*/*.patch")) if p.parent.name not in OTHERS]
MUTANTS = {p.name: p for p in map(patches.read, FILES)}
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# headers that every kernel takes half a second to read
PRELUDE = ("algorithm", "array", "cmath", "cstdint", "cstring", "functional", "map", "stdexcept",
           "string", "vector")  # fmt: skip


class Workshop(NamedTuple):
    """tree: a copy of csrc in which bugs are planted, one after the other; objects: what no bug
    changes; prelude: headers compiled beforehand; sanitize: flags of a sanitizer."""

    tree: object
    objects: list
    prelude: object
    sanitize: list

    @classmethod
    def build(cls, factory, sanitize=()):
        """With what all workers of the run share."""
        tree = factory.mktemp("mutants") / "tree"
        shutil.copytree(
            ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("cpu", "bindings.cpp")
        )
        shared = seen.shared_folder(factory)
        name = "sanitized" if sanitize else "driver"
        driver = seen.once(shared / name, functools.partial(build_driver, sanitize=sanitize))
        objects = [driver / "mutant.o", *emulator(factory)]
        return cls(tree, objects, driver / "prelude.h", list(sanitize))

    def run(self, part, folder, modes, *flags):
        """What the kernels in the tree say: exit code, {mode: verdict}, stderr."""
        binary = folder / "kernels"
        flags = [*FLAGS, *self.sanitize, *flags, f"-DPART_HERE={PARTS.index(part)}"]
        source = self.tree / "csrc/emulation/tests/mutant_kernels.cpp"
        compiler(*flags, "-include", self.prelude, "-c", source, "-o", f"{binary}.o")
        # first of all: of an inline function in several objects the linker takes the first
        compiler(*flags, f"{binary}.o", *self.objects, "-o", binary)
        done = subprocess.run([binary, *modes], capture_output=True, text=True, timeout=120)
        verdicts = dict(line.split(": ", 1) for line in done.stdout.splitlines())
        return done.returncode, verdicts, done.stderr

    def run_with(self, patch, part, folder, modes):
        """The same with a bug planted."""
        changed = patches.apply(patch, self.tree)
        before = {file: (self.tree / file).read_text() for file in changed}
        try:
            for file, text in changed.items():
                (self.tree / file).write_text(text)
            return self.run(part, folder, modes)
        finally:
            for file, text in before.items():
                (self.tree / file).write_text(text)


DRIVER = ROOT / "csrc/emulation/tests/mutant.cpp"
HELPERS = (patches.__file__, emulator_build.__file__)


def build_driver(folder, sanitize):
    """What runs the kernels, and the headers that these take."""
    prelude = folder / "prelude.h"
    prelude.write_text("".join(f"#include <{name}>\n" for name in PRELUDE))
    compiler(*FLAGS, *sanitize, "-x", "c++-header", prelude, "-o", f"{prelude}.gch")
    compiler(*FLAGS, "-O2", *sanitize, "-c", DRIVER, "-o", folder / "mutant.o")


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    return Workshop.build(tmp_path_factory)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The same under AddressSanitizer."""
    return Workshop.build(tmp_path_factory, SANITIZE)


@functools.cache
def sources(part):
    """The files that the kernels of a part are made of, and those that run them."""
    kernels = DRIVER.with_name("mutant_kernels.cpp")
    command = [os.environ.get("CXX", "c++"), *FLAGS, f"-DPART_HERE={PARTS.index(part)}", "-MM"]
    done = subprocess.run([*command, kernels], capture_output=True, text=True, check=True)
    found = {Path(name).resolve() for name in done.stdout.replace("\\\n", " ").split()[1:]}
    for source in (DRIVER, *SOURCES):
        found |= seen.included(source)
    return found | {Path(file).resolve() for file in (__file__, *HELPERS)}


def digest(part, *facts, patch=None):
    """Of all that decides what the kernels of a part do on the emulator."""
    changed = patches.apply(patch, ROOT) if patch else {}
    return seen.digest(sources(part), compiler_version(), *facts, changed=changed)


TABLE = "planted_bugs"
BUGS = [name for name in MUTANTS if not name.startswith("sanitizer/")]
CLEAN = [f"no bug: {part}" for part in PARTS]
WITHIN = [
    f"within tensors: {part}{' general' * general}"
    for part in PARTS[1:]
    for general in ((False, True) if part == "sm80_backward" else (False,))
    if part != "sm90_backward_split"
]
OUTSIDE = {  # and the part whose kernels it breaks
    "sanitizer/a-copy-past-the-last-key": "sm80_forward",
    "sanitizer/a-tile-behind-the-last-key": "sm80_forward_plain",
}
# at each commit, whatever was seen: eight bugs, one part without a bug or for its tensors
DUE = {*seen.sample(BUGS, 8), *seen.sample([*CLEAN, *WITHIN], 1)}


def test_the_table_names_no_bug_that_is_gone():
    """A bug that was taken out, and still looks as if it was caught."""
    assert not seen.strangers(TABLE, [*BUGS, *CLEAN, *WITHIN, *OUTSIDE])


@pytest.mark.parametrize("part", PARTS)
def test_kernels_as_they_are_pass_every_mode(part, request, tmp_path):
    """Without this, a driver that always complains would pass all tests below."""
    name, today = f"no bug: {part}", digest(part)
    if seen.known(TABLE, name, today, DUE):
        return
    code, found, stderr = request.getfixturevalue("workshop").run(part, tmp_path, ())
    assert code == 0, stderr
    assert found == dict.fromkeys([*patches.MODES, "banks"], "ok")
    seen.passed(TABLE, name, today)


def test_every_patch_applies():
    """A kernel that changed where a bug is planted, a bug that no folder compiles: all by name."""
    stale = []
    for patch in MUTANTS.values():
        try:
            assert patches.apply(patch, ROOT)
        except patches.Stale as error:
            stale.append(str(error))
    assert not stale, "\n".join(stale)
    assert {name.split("/")[0] for name in MUTANTS} == {*PARTS, "sanitizer"}


def test_all_notices_what_any_mode_notices():
    """A bug for which the tests of the kernels would need another mode than "plain" and "all"."""
    for patch in MUTANTS.values():
        assert "all" in patch.caught or not set(patch.caught) & set(patches.MODES), patch.name


def test_a_stale_patch_is_named(tmp_path):
    """A patch that applies to text which is not quite what it was made for."""
    file = tmp_path / "csrc/a.h"
    file.parent.mkdir()
    (tmp_path / "a.patch").write_text(
        "A is two. Caught by test_emulator_mutations.py in: race, all. Not in: plain.\n"
        "--- a/csrc/a.h\n+++ b/csrc/a.h\n@@ -1,2 +1,2 @@\n-int a = 1;\n+int a = 2;\n int b = 1;\n"
    )
    patch = patches.read(tmp_path / "a.patch")
    assert (patch.what, patch.caught, patch.silent) == ("A is two", ("race", "all"), ("plain",))
    file.write_text("// moved\nint a = 1;\nint b = 1;\n")
    assert patches.apply(patch, tmp_path) == {"csrc/a.h": "// moved\nint a = 2;\nint b = 1;\n"}
    file.write_text("int a = 1;\n\nint b = 1;\n")
    with pytest.raises(patches.Stale, match=r"a\.patch no longer applies: csrc/a\.h has no"):
        patches.apply(patch, tmp_path)


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_caught(name, request, tmp_path):
    patch, part = MUTANTS[name], name.split("/")[0]
    today = digest(part, patch.caught, patch.silent, patch=patch)
    if seen.known(TABLE, name, today, DUE):
        return
    workshop, modes = request.getfixturevalue("workshop"), (*patch.caught, *patch.silent)
    code, found, stderr = workshop.run_with(patch, part, tmp_path, modes)
    assert code == 0, f"the driver died: {stderr}"
    assert set(found) == set(modes)
    passed = [mode for mode in patch.caught if found[mode] == "ok"]
    assert passed == [], f"not caught by {passed}: {found}"
    noticed = [mode for mode in patch.silent if found[mode] != "ok"]
    assert noticed == [], f"caught by more modes than stated, {noticed}: {found}"
    seen.passed(TABLE, name, today)


@pytest.mark.parametrize("name", WITHIN)
def test_kernels_stay_within_their_tensors(name, request, tmp_path):
    """Global memory, which the emulator does not check: ragged ends under AddressSanitizer."""
    part, general = name.split()[2], name.endswith("general")
    today = digest(part, SANITIZE, general)
    if seen.known(TABLE, name, today, DUE):
        return
    flag = f"-DKERNELS_GENERAL={str(general).lower()}"
    sanitized = request.getfixturevalue("sanitized")
    code, found, stderr = sanitized.run(part, tmp_path, ("plain",), flag)
    assert code == 0, stderr[-3000:]
    assert found == {"plain": "ok"}
    seen.passed(TABLE, name, today)


@pytest.mark.parametrize(("name", "part"), OUTSIDE.items())
def test_sanitizer_sees_a_copy_past_the_last_key(name, part, request, tmp_path):
    """Without this the test above might pass because nothing looks."""
    patch = MUTANTS[name]
    today = digest(part, SANITIZE, patch=patch)
    if seen.known(TABLE, name, today):
        return
    sanitized = request.getfixturevalue("sanitized")
    code, _, stderr = sanitized.run_with(patch, part, tmp_path, ("plain",))
    assert code != 0 and "heap-buffer-overflow" in stderr
    seen.passed(TABLE, name, today)
