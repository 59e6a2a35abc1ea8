"""The lists of wrappers of csrc/cuda/ptx.cuh and ptx_sm90.cuh: one in the header for the GPU's
compiler, one for the CPU's, and what proves that they are the same."""

import re

import patches
import pytest
from repository import ROOT

PTX = {suffix: (ROOT / f"csrc/cuda/ptx{suffix}.cuh").read_text() for suffix in ("", "_sm90")}
TESTS = "".join(
    (ROOT / f"csrc/emulation/tests/{name}.cuh").read_text() for name in ("wrappers", "hopper")
)
# Of these another wrapper is the test: mbarrier_wait asks, wgmma serves wgmma_ss and wgmma_rs,
# unpack converts; stop ends a debug build (test_debug.py).
WITHIN = {"mbarrier_try_wait", "wgmma", "to_float", "stop"}


def assembly(text):
    """{(name, what tells overloads apart): text} of the wrappers with an instruction in them."""
    found = {}
    macros = "".join(re.findall(r"^#define ATTN_(?:[^\n]*\\\n)*[^\n]*", text, flags=re.M))
    text = re.sub(r"asm volatile\(\"\"[^;]*;", "", text)  # no instruction
    for body in re.findall(r"^ATTN_DEVICE [^;{]*\{.*?\}$", text, flags=re.M | re.S):
        name = re.match(r"ATTN_DEVICE [\w ]+? (\w+)(?:<(\w+)>)?\(([^)]*)", body)
        if name and re.search(r'asm\b[^;]*"[^"]*[a-z]\w*[.;]|ATTN_WGMMA_TYPES', body):
            found[name.groups()] = body + (macros if name[1] == "wgmma" else "")
    return found


@pytest.mark.parametrize(("suffix", "least"), [("", 45), ("_sm90", 18)])
def test_both_sides_of_the_header_have_the_same_wrappers(suffix, least):
    """A wrapper that only one compiler knows would fail in the other build only."""
    device = PTX[suffix].split("#else", 1)[1].split("#endif  // ATTN_EMULATED")[0]
    host = (ROOT / f"csrc/emulation/ptx_host{suffix}.h").read_text()
    names = set(re.findall(r"^ATTN_DEVICE [\w ]+? (\w+)\(", device, flags=re.M))
    names |= set(re.findall(r"^ATTN_DEVICE [\w ]+? (\w+)<", device, flags=re.M))
    names -= WITHIN - {"to_float"}
    assert len(names) >= least
    missing = [n for n in sorted(names) if not re.search(rf"\b{n}(<\w+>)?\(", host)]
    assert missing == []


@pytest.mark.parametrize(("suffix", "least"), [("", 35), ("_sm90", 18)])
def test_each_instruction_runs_as_compiled(suffix, least):
    """A new wrapper that neither test_ptx.py compares with its twin nor test_golden_bits.py and
    test_emulator_sm90.py run on a GPU."""
    names = {name for name, *_ in assembly(PTX[suffix])}
    assert len(names) >= least
    assert [n for n in sorted(names - WITHIN) if not re.search(rf"\b{n}\b", TESTS)] == []


# Without a fault of their own, each for its reason.
NO_FAULT = {
    "tma_prefetch",  # changes nothing but time
    "stop",  # test_debug.py
}


@pytest.mark.parametrize("suffix", PTX)
def test_each_instruction_has_a_planted_fault(suffix):
    """A wrapper whose PTX could be wrong unseen: no patch of tests/mutants/ptx changes it."""
    right, changed = assembly(PTX[suffix]), set()
    for path in sorted((ROOT / "tests/mutants/ptx").glob("*.patch")):
        files = patches.apply(patches.read(path), ROOT)
        wrong = assembly(files.get(f"csrc/cuda/ptx{suffix}.cuh", PTX[suffix]))
        changed |= {key for key, body in right.items() if wrong.get(key) != body}
    assert [key for key in right if key not in changed and key[0] not in NO_FAULT] == []
