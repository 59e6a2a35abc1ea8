"""What tests that compile for minutes have seen, by a digest of all that they depend on.

A planted bug is caught, and a kernel takes so many registers, by the sources, the compiler and its
options alone.  Where the committed tables of tests/seen hold the digest of today's, compiling again
repeats what is known: `make test` does it for a sample, which changes from commit to commit, and
compiles everything whose digest is another one.  `make seen` runs what is not in the tables and
writes it there; ATTN_EXT_SEEN says otherwise:

    ATTN_EXT_SEEN=nothing    everything is compiled, whatever the tables hold
    ATTN_EXT_SEEN=write      what is new is compiled, and written when the test passes

A table is a line for each test, its digest and its name; a .json file is what a script printed,
with its digest.  A line that was written by hand, or that the digest does not protect, shows when
the sample comes to it.
"""

import fcntl
import functools
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tokenize
import warnings
from pathlib import Path

from repository import ROOT

TABLES = ROOT / "tests" / "seen"
WHAT = os.environ.get("ATTN_EXT_SEEN", "")
assert WHAT in ("", "nothing", "write"), f"ATTN_EXT_SEEN must be nothing or write, got {WHAT!r}"

CXX_TOKENS = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.S)
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.M)


def cxx_code(text: str) -> str:
    """A C++ text without comments, every run of white space one space."""
    code = CXX_TOKENS.sub(lambda m: m[0] if m[0][0] == '"' else " ", text)
    return " ".join(code.split())


def python_code(text: str) -> str:
    """A Python text without comments, blank lines and docstrings."""
    found, line = [], []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT):
            found.append("+" if token.type == tokenize.INDENT else "-")
        elif token.type == tokenize.NEWLINE:
            docstring = [each.type for each in line] == [tokenize.STRING]
            found += [] if docstring else [*(each.string for each in line), "\n"]
            line = []
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            line.append(token)
    return " ".join(found)


@functools.cache
def code(path: Path, text: str | None = None) -> str:
    """What counts of a source file, or of `text` in its place."""
    text = path.read_text() if text is None else text
    return python_code(text) if path.suffix == ".py" else cxx_code(text)


def included(path: Path, without: str = "") -> set[Path]:
    """A C++ file of csrc and all that it includes by quotes, but for folders of that name."""
    found, work = set(), [path.resolve()]
    while work:
        file = work.pop()
        if file in found or (without and without in file.parts):
            continue
        found.add(file)
        for name in INCLUDE.findall(file.read_text()):
            here, top = (file.parent / name).resolve(), ROOT / "csrc" / name
            work += [next(p for p in (here, top) if p.exists())]
    return found


def digest(files, *facts, changed=None) -> str:
    """Of files of the tree, some of them as `changed` (path -> text) has them, and of other facts
    such as a compiler's version and options."""
    total = hashlib.sha256(repr(facts).encode())
    for path in sorted(files):
        name = path.relative_to(ROOT).as_posix()
        total.update(f"\n{name}\n{code(path, (changed or {}).get(name))}".encode())
    return total.hexdigest()[:16]


@functools.cache
def commit() -> str:
    """What says which sample is due: the commit; "" where there is no git."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def sample(names, count: int) -> set[str]:
    """So many of the names, others at each commit."""
    today = commit()
    key = {name: hashlib.sha256(f"{today} {name}".encode()).digest() for name in names}
    return set(sorted(key, key=key.get)[:count])


def turn(name: str, every: int) -> bool:
    """Whether this is the one commit of `every` at which `name` is computed whatever was seen."""
    return name in sample([name, *map(str, range(every - 1))], 1)


def read(table: str) -> dict[str, str]:
    """{name: digest} of a table of tests/seen."""
    path = TABLES / f"{table}.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return {name: digest for digest, name in (line.split(" ", 1) for line in lines)}


def known(table: str, name: str, digest: str, due=()) -> bool:
    """Whether `name` need not be computed: it is in the table with this digest, and not `due`."""
    there = read(table).get(name)
    if there is not None and there != digest and WHAT == "":
        warnings.warn(
            f"tests/seen/{table}.txt is of other sources for {name!r}: `make seen` renews it",
            stacklevel=2,
        )
    return there == digest and WHAT != "nothing" and (name not in due or WHAT == "write")


def passed(table: str, name: str, digest: str) -> None:
    """To be called when it was computed and is right: `make seen` writes it down."""
    if WHAT == "write":
        _rewrite(table, lambda rows: rows | {name: digest})


def strangers(table: str, names) -> set[str]:
    """Lines of a table for which there is no test any more; `make seen` takes them out."""
    if WHAT == "write":
        _rewrite(table, lambda rows: {name: rows[name] for name in rows if name in names})
    return read(table).keys() - set(names)


def printed(name: str, digest: str, compute):
    """What compute() gives, or gave for this digest; every eighth commit it must be the same."""
    path = TABLES / f"{name}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    if kept.get("digest") == digest and WHAT != "nothing" and not turn(name, 8):
        return kept["printed"]
    found = compute()
    if WHAT == "write":
        TABLES.mkdir(exist_ok=True)
        path.write_text(json.dumps({"digest": digest, "printed": found}, indent=1) + "\n")
    return found


def _rewrite(table: str, change) -> None:
    TABLES.mkdir(exist_ok=True)
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build" / "seen.lock").open("w") as lock:  # two workers
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = change(read(table))
        text = "".join(f"{rows[name]} {name}\n" for name in sorted(rows))
        (TABLES / f"{table}.txt").write_text(text)


def shared_folder(factory) -> Path:
    """What the workers of one run of pytest have in common; factory: the fixture
    tmp_path_factory."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder: Path, build) -> Path:
    """`folder`, filled by `build(folder)` by the first of the workers that asks for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "done").exists():
            folder.mkdir(exist_ok=True)
            build(folder)
            (folder / "done").touch()
    return folder
