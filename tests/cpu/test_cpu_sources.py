"""How the text of csrc/cpu is kept: headers that an editor can read, and what belongs in one place
only.
"""

import re
import shlex
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import seen
from emulator_build import compiler_version
from repository import ROOT

CSRC = ROOT / "csrc"
SHARED = [CSRC / name for name in ("params.h", "philox.h", "logit.h")]  # with csrc/cuda
HEADERS = sorted([*(CSRC / "cpu").rglob("*.h"), *SHARED])
FLAGS = shlex.split((CSRC / "compile_flags.txt").read_text())  # what clangd reads, too
PARSED = "headers that parse alone"


@pytest.mark.skipif(shutil.which("g++") is None, reason="parses with g++")
def test_headers_parse_alone():
    """A header that stands on what another one happened to include before it: an editor that opens
    it sees nothing but errors."""

    def errors(header: Path) -> str:
        command = ["g++", *FLAGS, "-w", "-fsyntax-only", str(header)]
        return subprocess.run(command, cwd=CSRC, capture_output=True, text=True).stderr

    # and the programs of tests, most of which need a processor that few machines have
    files = [*HEADERS, *sorted((CSRC / "tests").glob("*.cpp"))]
    assert len(files) > 25
    digest = seen.digest({*files, Path(__file__).resolve()}, compiler_version(), FLAGS)
    due = [PARSED] if seen.turn(PARSED, 8) else []
    if seen.known("programs", PARSED, digest, due):
        return
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(files, pool.map(errors, files), strict=True))
    assert {str(h.relative_to(CSRC)): e for h, e in found.items() if e} == {}
    seen.passed("programs", PARSED, digest)


def test_kernels_include_nothing_that_is_compiled_for_other_processors():
    """A library's function inside a target region: the linker may hand its AVX-512 code to the
    baseline.  isa/region.h includes all that is needed before a region opens."""
    kernels = [h for h in HEADERS if "namespace attn::cpu::ATTN_ISA" in h.read_text()]
    assert len(kernels) > 12
    for header in kernels:
        outside = re.findall(r'#include (<.*>|"(?!cpu/|logit\.h).*")', header.read_text())
        assert outside == [], header
    # The shared formula is compiled for each instruction set: no function of it stands by itself.
    text = (CSRC / "logit.h").read_text()
    functions = re.findall(r"^ *(.*\b(?:of|plain|with_exactly|logit)\()", text, re.M)
    declared = [f for f in functions if not f.startswith("//")]
    assert len(declared) == 5 and all("ATTN_FORMULA" in f for f in declared), declared


MOST_LINES = 40


def long_functions(text: str) -> list[tuple[int, str]]:
    """(lines, head) of each function of a C++ text that is longer than MOST_LINES, from the line of
    its opening parenthesis' name to the closing brace."""
    code = re.sub(r"//[^\n]*", "", text)
    code = re.sub(r"""\"(?:\\.|[^"\\\n])*\"|'(?:\\.|[^'\\\n])*'""", '""', code)
    found, scopes, head, line, first = [], [], "", 1, 1
    for c in code:
        if c == "{":
            scope = re.search(r"\b(namespace|struct|class|enum|union)\b[^()]*$", head)
            scopes.append((first if ")" in head and not scope else None, head.strip()))
        elif c == "}" and scopes:
            begin, name = scopes.pop()
            if begin and not any(b for b, _ in scopes) and line - begin >= MOST_LINES:
                found.append((line - begin + 1, " ".join(name.split())))
        if c in "{};":
            head = ""
        elif head.strip() or not c.isspace():
            first = first if head else line
            head += c
        line += c == "\n"
    return found


def test_functions_are_short():
    """A driver that grows by one flag after the other until nobody can follow it."""
    bodies = ["", "  y();\n" * 39, "  if (x) {\n" + "    y();\n" * 38 + "  }\n"]
    texts = [f"struct A {{\n  int f(int x) const {{\n{b}  }}\n}};\n" for b in bodies]
    assert [len(long_functions(t)) for t in texts] == [0, 1, 1]  # the count itself
    sources = [*HEADERS, *(CSRC / "cpu").rglob("*.cpp")]
    assert {
        str(s.relative_to(CSRC)): f for s in sources if (f := long_functions(s.read_text()))
    } == {}


def test_tile_sizes_are_in_one_file():
    """A tile's size that someone who tunes the kernels does not find."""
    for header in HEADERS:
        if header.name != "tiles.h":
            assert not re.search(
                r"\bk\w*(Keys|Queries|Panels?|Grains?) = \d", header.read_text()
            ), header


def test_each_intrinsic_of_avx512_has_a_stand_in():
    """An instruction that kernels come to use, without which they no longer compile on a machine
    that has AVX2 only (tests/cpu/avx512.sh), as who has AVX-512 never sees."""
    called = re.compile(r"\b_mm(?:512|256_mask|256_maskz|256_test)_\w+(?=\()")
    kernels = [*HEADERS, *(CSRC / "cpu/isa").glob("avx512*.cpp")]
    used = {name for path in kernels for name in called.findall(path.read_text())}
    assert len(used) > 40
    stand_ins = (CSRC / "tests/avx512_stand_in.h").read_text()
    assert used - set(re.findall(r"#define (\w+) attn::cpu::stand_in", stand_ins)) == set()
