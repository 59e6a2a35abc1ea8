"""The text of a PTX module as kernels: their parameters, and statements in order.

Directives that say nothing about what a kernel computes (.loc, .file, .pragma, launch bounds) are
passed over; anything else that is not understood is an error with its line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unsupported(Exception):
    """What the executor does not know: kernel, line, instruction."""


@dataclass
class Instruction:
    """guard: "", "%p1" or "!%p1"; opcode: its parts between the dots; operands as they stand."""

    line: int
    guard: str
    opcode: tuple[str, ...]
    operands: list[str]
    scope: int

    @property
    def text(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{'.'.join(self.opcode)} {', '.join(self.operands)}"


@dataclass
class Label:
    """A place to jump to; its name holds in its scope and those within."""

    name: str
    scope: int


@dataclass
class Kernel:
    """parameters: name -> (offset, bytes); registers: (scope, name) -> bits, 1 for predicates, or
    for name "%r<" of all of that kind; parents: of each scope, -1 for the outermost."""

    name: str
    parameters: dict[str, tuple[int, int]]
    parameter_bytes: int
    shared: dict[str, int]
    body: list[Instruction | Label] = field(default_factory=list)
    registers: dict[tuple[int, str], int] = field(default_factory=dict)
    parents: list[int] = field(default_factory=lambda: [-1])
    arrays: dict[str, str] = field(default_factory=dict)  # symbol -> a C++ array, of a thread

    @property
    def prints(self) -> bool:
        """Whether it calls anything: vprintf is all that it may."""
        return any(isinstance(x, Instruction) and x.opcode[0] == "call" for x in self.body)


ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(")
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr(?:\s+\.(?:align\s+\d+|\w+))*)?\s+"
    r"([\w$]+)(?:\[(\d+)\])?"
)
SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
TEXT = re.compile(r"\.global\s+\.align\s+1\s+\.b8\s+(\$str[\w$]*)\[\d+\]\s*=\s*\{([\d, ]*)\}")
LOCAL = re.compile(r"\.local\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]")
SPACE = re.compile(r"\s*")
LABEL = re.compile(r"(\$?[\w$]+):(?!:)")
LINE_DIRECTIVE = re.compile(r"\.(loc|file|section)\b[^\n]*\n")
INSTRUCTION = re.compile(r"(?:@(!?[%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
BITS = {"pred": 1, **{f"{kind}{n}": n for kind in "busf" for n in (8, 16, 32, 64)}}
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)


def bits_of(kind: str) -> int:
    """The width of a type: 32 for f32 and bf16x2, 1 for predicates."""
    if kind.endswith("x2"):
        return 32
    return 16 if kind in ("f16", "bf16") else 32 if kind == "tf32" else BITS[kind]


def split(text: str) -> list[str]:
    """At commas outside of brackets."""
    found, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "[{(") - (char in ")}]")
        if char == "," and depth == 0:
            found.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*found, last] if last else found


def cxx_name(symbol: str) -> str:
    """Of an array."""
    return "array_" + re.sub(r"\W", "_", symbol)


def kernels(text: str) -> list[Kernel]:
    """All entries of a module."""
    text = COMMENT.sub(lambda m: "\n" * m[0].count("\n"), text)
    found = []
    for match in ENTRY.finditer(text):
        end = text.index(")", match.end())
        parameters, size = _parameters(text[match.end() : end])
        start = text.index("{", end)
        kernel = Kernel(match[1], parameters, size, _shared(text[: match.start()], match[1]))
        _Body(kernel, text, start + 1).read()
        if kernel.prints:
            for name, codes in TEXT.findall(text):
                kernel.arrays[name] = f"const char {cxx_name(name)}[] = {{{codes}, 0}};"
        found.append(kernel)
    return found


def _parameters(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    found, offset = {}, 0
    for align, kind, name, count in PARAMETER.findall(text):
        size = int(count) if count else BITS[kind] // 8
        step = int(align) if align and count else size
        offset = -(-offset // step) * step
        found[name] = (offset, size)
        offset += size
    return found, offset


def _shared(text: str, kernel: str) -> dict[str, int]:
    """Symbols of shared memory before the kernel.  All lie at its begin: dynamic memory, of which
    there is one piece, has no size here."""
    found = {name: 0 for _, name, size in SHARED.findall(text) if size in ("", "0")}
    static = [name for _, name, size in SHARED.findall(text) if size not in ("", "0")]
    if (static and found) or len(static) > 1:
        raise Unsupported(f"{kernel}: static shared memory {static}")
    return found | dict.fromkeys(static, 0)


class _Body:
    """Reads the statements of one kernel, up to its closing bracket."""

    def __init__(self, kernel: Kernel, text: str, start: int):
        self.kernel, self.text, self.at, self.scope = kernel, text, start, 0
        self.line, self.counted = text.count("\n", 0, start) + 1, start

    def _here(self) -> int:
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def read(self) -> None:
        while True:
            self.at = SPACE.match(self.text, self.at).end()
            char = self.text[self.at]
            if char == "{":
                self.kernel.parents.append(self.scope)
                self.scope = len(self.kernel.parents) - 1
                self.at += 1
            elif char == "}":
                if self.scope == 0:
                    return
                self.scope = self.kernel.parents[self.scope]
                self.at += 1
            elif match := LABEL.match(self.text, self.at):
                self.kernel.body.append(Label(match[1], self.scope))
                self.at = match.end()
            elif match := LINE_DIRECTIVE.match(self.text, self.at):
                self.at = match.end()
            else:
                self._statement()

    def _statement(self) -> None:
        end = self.text.index(";", self.at)
        line, statement = self._here(), self.text[self.at : end].strip()
        self.at = end + 1
        if statement.startswith((".reg", ".param")):  # the second: an argument of a call
            return self._declare(statement, line)
        if local := LOCAL.fullmatch(statement):
            align, name, size = local.groups()
            array = f"alignas({align}) unsigned char {cxx_name(name)}[{size}] = {{}};"
            self.kernel.arrays[name] = array
            return None
        if not statement or statement.startswith(".pragma"):
            return None
        match = INSTRUCTION.fullmatch(statement)
        if match is None:
            raise Unsupported(f"{self.kernel.name}, line {line}: {statement.splitlines()[0]}")
        opcode = tuple(match[2].split("."))
        operands = split(" ".join(match[3].split()))
        self.kernel.body.append(Instruction(line, match[1] or "", opcode, operands, self.scope))
        return None

    def _declare(self, statement: str, line: int) -> None:
        _, kind, names = statement.split(None, 2)
        if kind[1:] not in BITS:
            raise Unsupported(f"{self.kernel.name}, line {line}: registers of type {kind}")
        for name in names.split(","):
            name = re.sub(r"<\d+>$", "<", name.strip())
            self.kernel.registers[self.scope, name] = BITS[kind[1:]]
