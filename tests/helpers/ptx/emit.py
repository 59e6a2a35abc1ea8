"""From the statements of a kernel to C++ on the emulated machine (csrc/emulation/ptx).

A register becomes a variable of its width, a label a label, a branch a goto; an instruction becomes
a statement, made by the handler of its first word (table HANDLERS, filled by the modules beside
this one).  A handler takes each part of the opcode that it knows; what is left over, as every
operand that it cannot read, is `Unsupported` with kernel, line and instruction.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from ptx import flow
from ptx.parse import Instruction, Kernel, Label, Unsupported, bits_of, cxx_name

CXX = {
    "pred": "bool", "f32": "float", "f64": "double", "f16": "uint16_t", "bf16": "uint16_t",
    "f16x2": "uint32_t", "bf16x2": "uint32_t", "tf32": "uint32_t",
    **{f"{kind}{n}": f"{'int' if kind == 's' else 'uint'}{n}_t"
       for kind in "sub" for n in (8, 16, 32, 64)},
}  # fmt: skip
SPECIAL = {
    "%tid.x": "ptx::thread_id()", "%tid.y": "0", "%tid.z": "0", "%ntid.x": "ptx::block_size()",
    "%ntid.y": "1", "%ntid.z": "1", "%laneid": "ptx::lane_id()", "%warpid": "ptx::warp_id()",
    "%cluster_ctarank": "0", "%cluster_nctarank": "1",
    **{f"%{name}.{x}": f"ptx::{call}().{x}" for x in "xyz"
       for name, call in (("ctaid", "block_id"), ("nctaid", "grid_size"))},
}  # fmt: skip
ADDRESS = re.compile(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]")


# For kernels of a debug build: vprintf, and a wait that gives up where nothing can end it.
PRINTING = r"""
static std::string printed;
static uint32_t print(uint64_t format, uint64_t values) {
  const char *at = reinterpret_cast<const char*>(format), *from = reinterpret_cast<char*>(values);
  int used = 0;
  const auto take = [&](int size) {
    used = (used + size - 1) / size * size + size;
    uint64_t value = 0;
    memcpy(&value, from + used - size, size);
    return value;
  };
  for (printed.clear(); *at; ++at) {
    if (*at != '%') { printed += *at; continue; }
    const std::string kind = at[1] == 'l' ? "lld" : std::string(1, at[1]);
    at += kind.size();
    printed += kind == "s" ? reinterpret_cast<const char*>(take(8))
                           : std::to_string(int64_t(take(kind == "lld" ? 8 : 4)));
  }
  return 0;
}
static bool try_wait_or_not(uint32_t barrier, uint32_t parity, PTX_AT) {
  try {
    return try_wait(barrier, parity, at);
  } catch (const emulation::Error& error) {
    if (std::string(error.what()).rfind("deadlock", 0)) throw;
    return false;
  }
}
"""


class Variable(NamedTuple):
    """The C++ variable of a register; index: its bit in the sets of flow.py."""

    name: str
    bits: int
    index: int


class Opcode:
    """The parts of an opcode that no handler has taken yet."""

    def __init__(self, parts: tuple[str, ...]):
        self.base, *self.parts = parts

    def take(self, part: str) -> bool:
        """Whether the part is there; it counts as understood."""
        if part not in self.parts:
            return False
        self.parts.remove(part)
        return True

    def one_of(self, *parts: str) -> str:
        """The one that is there, or ""."""
        return next((part for part in parts if self.take(part)), "")

    def kind(self) -> str:
        """The type at the end."""
        if not self.parts or self.parts[-1] not in CXX:
            raise Unsupported("no known type at the end of the opcode")
        return self.parts.pop()

    def ends(self) -> None:
        """Nothing may be left."""
        if self.parts:
            raise Unsupported(f"unknown modifier {'.'.join(self.parts)}")


Handler = Callable[["Emitter", Opcode, list[str]], str]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """A handler of instructions that begin with these words."""

    def keep(function: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, function))
        return function

    return keep


class Emitter:
    """One kernel.  `raw`: the instruction at hand may read accumulators in flight."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.variables: dict[tuple[int, str], Variable] = {}
        self.labels = {(s.name, s.scope) for s in kernel.body if isinstance(s, Label)}
        self.effect, self.flying, self.raw, self.scope, self.target = flow.Effect(), 0, False, 0, ""

    # ---- operands -----------------------------------------------------------------------------
    def _scopes(self):
        scope = self.scope
        while scope >= 0:
            yield scope
            scope = self.kernel.parents[scope]

    def variable(self, name: str) -> Variable | None:
        """Of a register, by the innermost declaration; None for what is no register."""
        kind = re.sub(r"\d+$", "<", name)
        for scope in self._scopes():
            bits = self.kernel.registers.get((scope, name), None)
            bits = self.kernel.registers.get((scope, kind), None) if bits is None else bits
            if bits is not None:
                cxx = re.sub(r"\W", "", name) + (f"_{scope}" if scope else "_")
                new = Variable(cxx, bits, len(self.variables))
                return self.variables.setdefault((scope, name), new)
        return None

    def label(self, name: str) -> str:
        """The C++ label of a PTX label that is seen from here."""
        for scope in self._scopes():
            if (name, scope) in self.labels:
                return f"L{re.sub(r'[^a-zA-Z0-9]', '_', name)}_{scope}"
        raise Unsupported(f"no label {name}")

    def read(self, operand: str, kind: str) -> str:
        """A C++ expression of an operand as a type of PTX."""
        if operand.startswith("!"):
            return f"!{self.read(operand[1:], kind)}"
        cxx = CXX[kind]
        if operand in SPECIAL:
            return f"{cxx}({SPECIAL[operand]})"
        found = self.variable(operand)
        if found is None:
            return self._constant(operand, kind)
        bits = bits_of(kind)
        if found.bits < bits or (found.bits == 1) != (bits == 1):
            raise Unsupported(f"{operand} has {found.bits} bits, {kind} needs {bits}")
        self.effect.reads |= 1 << found.index
        text = found.name
        if self.flying >> found.index & 1 and not self.raw:
            text = f"settled({text})"
        if found.bits > bits:
            text = f"uint{bits}_t({text})"
        return f"as<{cxx}>({text})" if kind in ("f32", "f64") or kind[0] == "s" else text

    def _constant(self, text: str, kind: str) -> str:
        cxx = CXX[kind]
        if text in self.kernel.shared:
            return f"{cxx}({0x400 + self.kernel.shared[text]})"  # SMEM_BASE of machine.h
        if text in self.kernel.arrays:
            return f"reinterpret_cast<{cxx}>({cxx_name(text)})"
        if text in self.kernel.parameters:
            return f"{cxx}({self.kernel.parameters[text][0]})"
        if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            suffix = "u" if match[1] in "fF" else "ull"
            bits = f"0x{match[2]}{suffix}"
            return f"as<{cxx}>({bits})" if kind in ("f32", "f64") else f"{cxx}({bits})"
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            raise Unsupported(f"operand {text}")
        value = int(text.rstrip("U"), 0)
        if kind == "pred":
            return "true" if value else "false"
        if kind in ("f32", "f64"):
            raise Unsupported(f"the number {text} as {kind}")
        return f"{cxx}({value & (1 << 64) - 1}ull)"

    def write(self, operand: str, kind: str, expression: str) -> str:
        """The statement that gives a register a value of a type."""
        if operand == "_":
            return f"(void)({expression});"
        found = self.variable(operand)
        if found is None:
            raise Unsupported(f"destination {operand}")
        bits = bits_of(kind)
        if found.bits < bits or (found.bits == 1) != (bits == 1):
            raise Unsupported(f"{operand} has {found.bits} bits, {kind} needs {bits}")
        self.effect.writes |= 1 << found.index
        if kind in ("f32", "f64"):
            return f"{found.name} = as<uint{bits}_t>({CXX[kind]}({expression}));"
        return f"{found.name} = {CXX[kind]}({expression});"

    def vector(self, operand: str) -> list[str]:
        """The registers of {a, b}, or the one that stands alone."""
        inner = operand[1:-1] if operand.startswith("{") else operand
        return [each.strip() for each in inner.split(",")]

    def address(self, operand: str, kind: str) -> str:
        """Of [register + number], as an integer type."""
        match = ADDRESS.fullmatch(operand)
        if match is None:
            raise Unsupported(f"address {operand}")
        found = self.variable(match[1])
        if found is not None and found.bits < bits_of(kind):
            base = f"{CXX[kind]}({self.read(match[1], f'u{found.bits}')})"
        else:
            base = self.read(match[1], kind)
        return f"{CXX[kind]}({base} + {CXX[kind]}({int(match[2], 0)}ll))" if match[2] else base

    # ---- statements ---------------------------------------------------------------------------
    def statement(self, each: Instruction, flying: int = 0) -> str:
        """The C++ of one instruction; self.effect is what it does."""
        self.effect, self.flying, self.raw, self.target = flow.Effect(), flying, False, ""
        self.scope = each.scope
        opcode = Opcode(each.opcode)
        try:
            handler = HANDLERS.get(opcode.base)
            if handler is None:
                raise Unsupported("unknown instruction")
            text = handler(self, opcode, each.operands)
            opcode.ends()
            if each.guard:
                text = f"if ({self.read(each.guard, 'pred')}) {{ {text} }}"
            else:
                self.effect.kills = self.effect.writes
        except (Unsupported, ValueError, IndexError) as error:
            where = f"{self.kernel.name}, line {each.line}: {each.text}"
            raise Unsupported(f"{where}: {error}") from error
        return text

    def function(self, file: str) -> str:
        """The whole kernel as a C++ function of its parameters' address."""
        code = [each for each in self.kernel.body if isinstance(each, Instruction)]
        lines = [self.statement(each) for each in code]
        lines = self._with_flight(code, lines)
        out, numbered = [], iter(zip(code, lines, strict=True))
        for each in self.kernel.body:
            if isinstance(each, Label):
                self.scope = each.scope
                out.append(f"{self.label(each.name)}:;")
            else:
                instruction, text = next(numbered)
                out.append(f'#line {instruction.line} "{file}"\n{{ {text} }}')
        types = {1: "bool", **{n: f"uint{n}_t" for n in (8, 16, 32, 64)}}
        declared = [f"{types[v.bits]} {v.name} = 0;" for v in self.variables.values()]
        return "\n".join(
            [
                f'extern "C" __attribute__((visibility("default"))) void {self.kernel.name}'
                "(void* parameters_) {",
                "const uint64_t parameters = reinterpret_cast<uint64_t>(parameters_);",
                "[[maybe_unused]] bool carry = false;",
                *self.kernel.arrays.values(), *declared, *out, "}",
            ]
        )  # fmt: skip

    def _with_flight(self, code: list[Instruction], lines: list[str]) -> list[str]:
        """The statements again, where registers may hold accumulators in flight."""
        places = self._places()
        effects, targets, falls = [], [], []
        for each in code:
            self.statement(each)
            effects.append(self.effect)
            targets.append(places[self.target] if self.target else None)
            falls.append(bool(each.guard) or each.opcode[0] not in ("bra", "ret", "exit"))
        if not any(effect.flies for effect in effects):
            return lines
        after = flow.successors(targets, falls)
        flying, live = flow.in_flight(effects, after), flow.live(effects, after)
        names = {v.index: v.name for v in self.variables.values()}
        lines = [self.statement(each, flying[i]) for i, each in enumerate(code)]
        for i, effect in enumerate(effects):
            if effect.lands:
                there = flying[i] & live[i]
                landing = [f"{n} = landed({n});" for x, n in names.items() if there >> x & 1]
                lines[i] = " ".join([lines[i], *landing])
        return lines

    def _places(self) -> dict[str, int]:
        """C++ label -> number of the instruction that follows."""
        found, count = {}, 0
        for each in self.kernel.body:
            if isinstance(each, Label):
                self.scope = each.scope
                found[self.label(each.name)] = count
            else:
                count += 1
        return found


HEAD = """#include "emulation/ptx/operations.h"
using namespace attn;
using namespace attn::compiled;
"""


def translate(kernel: Kernel, file: str) -> str:
    """The kernel as an exported function of its name, for a C++ file that begins with HEAD."""
    return f"{PRINTING if kernel.prints else ''}{Emitter(kernel).function(file)}\n"
