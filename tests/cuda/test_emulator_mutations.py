"""Planted bugs in the CUDA kernels, and which mode of the emulator catches each.

Each bug is a patch of tests/mutants, applied to a copy of csrc.  Only the kernels of its folder
(csrc/emulation/tests/mutant_kernels.cpp) are compiled again; the emulator and the problems that
they run on are compiled once.  A bug that passes everywhere would mean that the emulator, or these
problems, cannot see its kind.
"""

import os
import shutil
import subprocess
from typing import NamedTuple

import patches
import pytest
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
MUTANTS = {p.name: p for p in map(patches.read, sorted(ROOT.glob("tests/mutants/*/*.patch")))}
FLAGS = ["-O1", "-std=c++17", "-w", "-Wno-psabi", "-fno-strict-aliasing", "-pthread",
         "-DATTN_EMULATED"]  # fmt: skip
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# headers that every kernel takes half a second to read
PRELUDE = ("algorithm", "array", "cmath", "cstdint", "cstring", "functional", "map", "stdexcept",
           "string", "vector")  # fmt: skip


def compiler(*arguments):
    """The C++ compiler, which must succeed."""
    command = [os.environ.get("CXX", "c++"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr[-3000:]}"


class Workshop(NamedTuple):
    """tree: a copy of csrc in which bugs are planted, one after the other; objects: what no bug
    changes; prelude: headers compiled beforehand; sanitize: flags of a sanitizer."""

    tree: object
    objects: list
    prelude: object
    sanitize: list

    @classmethod
    def build(cls, folder, emulator, sanitize=()):
        tree, prelude = folder / "tree", folder / "prelude.h"
        shutil.copytree(
            ROOT / "csrc", tree / "csrc", ignore=shutil.ignore_patterns("cpu", "bindings.cpp")
        )
        prelude.write_text("".join(f"#include <{name}>\n" for name in PRELUDE))
        compiler(*FLAGS, *sanitize, "-x", "c++-header", prelude, "-o", f"{prelude}.gch")
        driver = folder / "mutant.o"
        source = tree / "csrc/emulation/tests/mutant.cpp"
        compiler(*FLAGS, "-O2", *sanitize, "-c", source, "-o", driver)
        return cls(tree, [driver, *emulator], prelude, list(sanitize))

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


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """The emulator's objects.  It checks what it is given itself: no sanitizer."""
    folder, objects = tmp_path_factory.mktemp("emulator"), []
    for source in sorted(ROOT.glob("csrc/emulation/*.cpp")):
        if source.stem != "bindings":
            objects.append(folder / f"{source.stem}.o")
            compiler(*FLAGS, "-O2", "-c", source, "-o", objects[-1])
    return objects


@pytest.fixture(scope="module")
def workshop(emulator, tmp_path_factory):
    return Workshop.build(tmp_path_factory.mktemp("mutants"), emulator)


@pytest.fixture(scope="module")
def sanitized(emulator, tmp_path_factory):
    """The same under AddressSanitizer."""
    return Workshop.build(tmp_path_factory.mktemp("sanitized"), emulator, SANITIZE)


@pytest.mark.parametrize("part", PARTS)
def test_kernels_as_they_are_pass_every_mode(part, workshop, tmp_path):
    """Without this, a driver that always complains would pass all tests below."""
    code, found, stderr = workshop.run(part, tmp_path, ())
    assert code == 0, stderr
    assert found == dict.fromkeys([*patches.MODES, "banks"], "ok")


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


@pytest.mark.parametrize("name", [name for name in MUTANTS if not name.startswith("sanitizer/")])
def test_planted_bug_is_caught(name, workshop, tmp_path):
    patch = MUTANTS[name]
    modes = (*patch.caught, *patch.silent)
    code, found, stderr = workshop.run_with(patch, name.split("/")[0], tmp_path, modes)
    assert code == 0, f"the driver died: {stderr}"
    assert set(found) == set(modes)
    passed = [mode for mode in patch.caught if found[mode] == "ok"]
    assert passed == [], f"not caught by {passed}: {found}"
    noticed = [mode for mode in patch.silent if found[mode] != "ok"]
    assert noticed == [], f"caught by more modes than stated, {noticed}: {found}"


@pytest.mark.parametrize(
    ("part", "general"),
    [
        ("sm80_forward", True),
        ("sm80_forward_plain", False),
        ("sm80_backward", False),
        ("sm80_backward_fused", False),
        ("sm80_backward", True),
        ("sm90_forward", False),
        ("sm90_backward", False),
        ("sm90_backward_fused", False),
    ],
)
def test_kernels_stay_within_their_tensors(part, general, sanitized, tmp_path):
    """Global memory, which the emulator does not check: ragged ends under AddressSanitizer."""
    flag = f"-DKERNELS_GENERAL={str(general).lower()}"
    code, found, stderr = sanitized.run(part, tmp_path, ("plain",), flag)
    assert code == 0, stderr[-3000:]
    assert found == {"plain": "ok"}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a-copy-past-the-last-key", "sm80_forward"),
        ("a-tile-behind-the-last-key", "sm80_forward_plain"),
    ],
)
def test_sanitizer_sees_a_copy_past_the_last_key(name, part, sanitized, tmp_path):
    """Without this the test above might pass because nothing looks."""
    code, _, stderr = sanitized.run_with(MUTANTS[f"sanitizer/{name}"], part, tmp_path, ("plain",))
    assert code != 0 and "heap-buffer-overflow" in stderr
