"""Unified diffs applied to a copy of the tree, without fuzz: tests/mutants/README.md."""

import re
from pathlib import Path
from typing import NamedTuple

HUNK = re.compile(r"^@@ -(\d+).*@@.*\n", re.M)


class Stale(Exception):
    """The text that a patch changes is not there any more."""


class Patch(NamedTuple):
    """name: folder and file; what: the bug; caught, silent: the modes that must say so, and those
    that must not; files: path in the tree -> [(line, text before, text after)]."""

    name: str
    what: str
    caught: tuple[str, ...]
    silent: tuple[str, ...]
    files: dict[str, list[tuple[int, str, str]]]


MODES = (
    "plain",
    "random",
    "poison",
    "race",
    "all",
)  # of the emulator; beside them "banks" and "address"
HEAD = re.compile(
    r"(?P<what>.+)\. Caught by test_\w+_mutations\.py in: (?P<caught>[\w, ]+)\."
    r"(?: Not in: (?P<silent>[\w, ]+)\.)?"
)


def read(path: Path) -> Patch:
    """The patch in a file of tests/mutants."""
    name = f"{path.parent.name}/{path.stem}"
    first, _, diff = path.read_text().partition("\n")
    head = HEAD.fullmatch(first)
    assert head, f"{name}: the first line must say the bug and the modes, got {first!r}"
    caught, silent = (_modes(head[key] or "") for key in ("caught", "silent"))
    files = {}
    for part in re.split(r"^--- a/", diff, flags=re.M)[1:]:
        file, _, rest = part.partition("\n")
        pieces = HUNK.split(rest)[1:]
        files[file] = [
            (int(line), _side(body, "-"), _side(body, "+"))
            for line, body in zip(pieces[::2], pieces[1::2], strict=True)
        ]
    assert files, f"{name} changes nothing"
    return Patch(name, head["what"], caught, silent, files)


def _modes(text: str) -> tuple[str, ...]:
    return MODES if text == "every mode" else tuple(re.findall(r"\w+", text))


def _side(body: str, sign: str) -> str:
    """The text of a hunk before ("-") or after ("+")."""
    lines = body.splitlines(keepends=True)
    return "".join(line[1:] or "\n" for line in lines if line[0] in (" ", sign, "\n"))


def apply(patch: Patch, root: Path) -> dict[str, str]:
    """path -> text of each file that the patch changes, of the tree at root.  A hunk may have moved
    within its file; every line of it must be there."""
    found = {}
    for file, hunks in patch.files.items():
        path = root / file
        if not path.exists():
            raise Stale(f"{patch.name}.patch: {file} is no more")
        text, result, end = path.read_text(), "", 0
        for line, before, after in hunks:
            starts = [m.start() for m in re.finditer("(?m)^" + re.escape(before), text)]
            starts = [start for start in starts if start >= end]
            if not starts:
                raise Stale(f"{patch.name}.patch no longer applies: {file} has no\n{before}")
            start = min(starts, key=lambda at: abs(text.count("\n", 0, at) + 1 - line))
            result += text[end:start] + after
            end = start + len(before)
        found[file] = result + text[end:]
    return found


def row(what: str, fault) -> str:
    """A line of Markdown: the fault, the modes that must notice it, those that must not; fault: a
    Patch, or another that has both."""
    return f"| {what} | {', '.join(fault.caught)} | {', '.join(fault.silent)} |"


def table(rows: dict[str, str]) -> str:
    """The lines of a table of faults, by their names."""
    return "\n".join(rows[name] for name in sorted(rows))
