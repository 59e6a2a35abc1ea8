"""What makes a result known, so that a test need not compile it again (tests/helpers/seen.py)."""

import re

import pytest
import seen
from repository import ROOT


@pytest.fixture(autouse=True)
def tables(tmp_path, monkeypatch):
    """Tables of their own."""
    monkeypatch.setattr(seen, "TABLES", tmp_path)
    monkeypatch.setattr(seen, "WHAT", "write")


@pytest.mark.parametrize(
    ("name", "before", "same", "other"),
    [
        ("a.h", "int a = 1;  // one\n", "/* a\n b */ int a =\n 1;", "int a = 2;  // one\n"),
        ("a.h", 'f("// x");', 'f("// x");  // "', 'f("// y");'),
        ("a.py", "def f():\n    return 1\n", 'def f():\n    """1"""\n\n    return 1  # a\n',
         "def f():\n    return 2\n"),
        ("a.py", "if x:\n    y\nz\n", "if x:\n  y\nz\n", "if x:\n    y\n    z\n"),
    ],
)  # fmt: skip
def test_a_digest_is_of_the_code(name, before, same, other):
    """A comment that compiles everything again, or code that is taken for one."""
    first, second, third = (
        seen.digest([ROOT / name], "g++ 12", changed={name: text}) for text in (before, same, other)
    )
    assert first == second != third
    assert first != seen.digest([ROOT / name], "g++ 13", changed={name: before})


def test_included_files_count():
    """A kernel whose header changed."""
    found = seen.included(ROOT / "csrc/cuda/sm90/kernels.cuh", "emulation")
    names = {path.relative_to(ROOT / "csrc").as_posix() for path in found}
    assert names >= {"params.h", "cuda/ptx.cuh", "cuda/sm90/parts.cuh", "cuda/sm90/forward.cuh"}
    assert "cuda/sm80/forward.cuh" not in names and not any("emulation" in name for name in names)


def test_only_what_passed_for_these_sources_is_known(monkeypatch):
    """A stale table, a forged one, or one that nothing can overrule."""
    seen.passed("bugs", "one, two", "1234")
    assert seen.read("bugs") == {"one, two": "1234"}
    assert seen.known("bugs", "one, two", "1234") and not seen.known("bugs", "three", "1234")
    monkeypatch.setattr(seen, "WHAT", "")
    assert not seen.known("bugs", "one, two", "1234", due=["one, two"])  # compiled all the same
    with pytest.warns(UserWarning, match="make seen"):
        assert not seen.known("bugs", "one, two", "5678")
    seen.passed("bugs", "one, two", "5678")
    assert seen.read("bugs") == {"one, two": "1234"}  # only `make seen` writes
    monkeypatch.setattr(seen, "WHAT", "nothing")
    assert not seen.known("bugs", "one, two", "1234")


def test_lines_of_tests_that_are_gone_go(monkeypatch):
    """A line without a test: a bug that looks as if it was still caught."""
    for name in ("a", "b"):
        seen.passed("bugs", name, "1234")
    monkeypatch.setattr(seen, "WHAT", "")
    assert seen.strangers("bugs", ["a"]) == {"b"}
    monkeypatch.setattr(seen, "WHAT", "write")
    assert seen.strangers("bugs", ["a"]) == set() and seen.read("bugs") == {"a": "1234"}


def test_the_sample_changes_with_the_commit(monkeypatch):
    """A table of which the same lines are compiled for ever."""
    samples = []
    for commit in "abcdefgh":
        monkeypatch.setattr(seen, "commit", lambda commit=commit: commit)
        samples.append(frozenset(seen.sample(map(str, range(20)), 3)))
        assert samples[-1] == seen.sample(map(str, range(20)), 3)
    assert all(len(each) == 3 for each in samples) and len(set(samples)) > 4
    turns = []
    for commit in range(200):
        monkeypatch.setattr(seen, "commit", lambda commit=commit: str(commit))
        turns.append(seen.turn("x", 8))
    assert 5 < sum(turns) < 60


def test_what_a_script_printed_is_kept(monkeypatch):
    """The result of other sources."""
    monkeypatch.setattr(seen, "turn", lambda name, every: False)
    assert seen.printed("script", "1", lambda: {"a": 1}) == {"a": 1}
    assert seen.printed("script", "1", lambda: {"a": 2}) == {"a": 1}
    assert seen.printed("script", "2", lambda: {"a": 2}) == {"a": 2}
    monkeypatch.setattr(seen, "turn", lambda name, every: True)
    assert seen.printed("script", "2", lambda: {"a": 3}) == {"a": 3}


def test_the_committed_tables_are_sorted_lines_of_digest_and_name():
    """A merge that left both sides, a line written by hand, a table that no test reads."""
    committed = (ROOT / "tests" / "seen").glob("*.txt")
    tables = {path.stem: path.read_text().splitlines() for path in committed}
    folders = (ROOT / "tests/mutants").glob("c*/*/")  # cpu/far, ..: tests/helpers/planted_cpu.py
    bugs = {f"planted_bugs_{folder.parent.name}_{folder.name}" for folder in folders}
    assert tables.keys() <= bugs | {
        "planted_bugs",
        "compiled_ptx",
        "compiled_ptx_faults",
        "machine_code",
        "on_ptx",
        "triton",
        "triton_interpreted",
        "triton_ptx",
        "triton_ptx_faults",
        "programs",
    }
    for lines in tables.values():
        assert all(re.fullmatch(r"[0-9a-f]{16} \S.*", line) for line in lines)
        names = [line.split(" ", 1)[1] for line in lines]
        assert names == sorted(set(names))
    for line in tables.get("on_ptx", []):
        file, name = line.split(" ")[-1].split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), "a test that is gone"
    programs = {line.split(" ", 1)[1] for line in tables.get("programs", [])}
    assert programs <= {"portable fibers", "headers that parse alone"}
