"""Handlers of control flow, moves, memory and atomic operations."""

from __future__ import annotations

import re

from ptx.emit import CXX, Emitter, Opcode, handles
from ptx.parse import Unsupported, bits_of

HERE = "{__builtin_FILE(), __builtin_LINE()}"
SPACES = ("param", "global", "shared", "shared::cta", "local", "const")
# What says where data are kept, how long, and in which order others see them: blocks run one after
# the other here, and one thread at a time.
HINTS = (
    "volatile", "weak", "relaxed", "acquire", "release", "acq_rel", "cta", "gpu", "sys", "cluster",
    "nc", "ca", "cg", "cs", "cv", "wb", "wt", "lu", "noftz", "L1::evict_last", "L1::evict_first",
    "L1::no_allocate", "L1::evict_normal", "L1::evict_unchanged", "L2::evict_first",
    "L2::evict_last", "L2::64B", "L2::128B", "L2::256B",
)  # fmt: skip


@handles("bra")
def branch(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("uni")
    em.target = em.label(args[0])
    return f"goto {em.target};"


@handles("ret", "exit")
def leave(em: Emitter, op: Opcode, args: list[str]) -> str:
    return "return;"


@handles("trap")
def trap(em: Emitter, op: Opcode, args: list[str]) -> str:
    said = '"trap: " + printed' if em.kernel.prints else '"trap"'
    return f"machine.fail({{__builtin_FILE(), __builtin_LINE()}}, {said});"


@handles("call")
def call(em: Emitter, op: Opcode, args: list[str]) -> str:
    """vprintf(format, arguments), which a debug build calls."""
    op.take("uni")
    result, function, arguments = args
    if function != "vprintf":
        raise Unsupported(f"a call of {function}")
    text, values = (em.read(each, "u64") for each in em.vector(arguments.replace("(", "{")))
    return em.write(result.strip("() "), "u32", f"print({text}, {values})")


@handles("mov")
def move(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    em.raw = em.effect.moves = bits_of(kind) == 32 and "{" not in "".join(args)
    if args[0].startswith("{"):
        targets = em.vector(args[0])
        part = bits_of(kind) // len(targets)
        text = f"const {CXX[kind]} whole = {em.read(args[1], kind)};"
        return text + "".join(
            em.write(target, f"b{part}", f"whole >> {part * i}") for i, target in enumerate(targets)
        )
    if args[1].startswith("{"):
        words = em.vector(args[1])
        part = bits_of(kind) // len(words)
        return em.write(args[0], kind, " | ".join(
            f"{CXX[kind]}({em.read(word, f'b{part}')}) << {part * i}"
            for i, word in enumerate(words)
        ))  # fmt: skip
    return em.write(args[0], kind, em.read(args[1], kind))


@handles("cvta")
def convert_address(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    op.take("to")
    space = op.one_of("param", "global", "local")
    if not space:
        raise Unsupported("generic addresses are those of global memory, parameters and arrays")
    base = "parameters + " if space == "param" else ""
    return em.write(args[0], kind, base + em.read(args[1], kind))


def _space(em: Emitter, op: Opcode) -> str:
    """ "global", where nothing is said, too: there are no generic addresses of shared memory."""
    space = op.one_of(*SPACES) or "global"
    if space == "const" or (space == "local" and not em.kernel.arrays):
        raise Unsupported(f"memory of the space {space}")
    for hint in HINTS:
        op.take(hint)
    return "shared" if space == "shared::cta" else space


def _count(op: Opcode) -> int:
    return int((op.one_of("v2", "v4", "v8") or "v1")[1:])


def _argument(em: Emitter, address: str) -> str:
    """The argument or result of a call that an address is; "" where it is in a kernel's parameters,
    by a name of theirs or a register."""
    name = address.strip("[] ").removesuffix("+0")
    return name if not name.startswith("%") and em.variable(name) else ""


def _of_all_blocks(op: Opcode) -> bool:
    """Whether an acquire or a release orders blocks of a grid, and not those of a cluster alone."""
    return "gpu" in op.parts or "sys" in op.parts


@handles("ld")
def load(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("L2::cache_hint")
    acquires = "acquire" in op.parts and _of_all_blocks(op)
    kind, space, count = op.kind(), _space(em, op), _count(op)
    if acquires and space == "global" and count == 1 and bits_of(kind) == 32:
        word = f"reinterpret_cast<const int*>({em.address(args[1], 'u64')})"
        return em.write(args[0], "s32", f"machine.load_acquire({word}, {HERE})")
    if space == "shared":
        value = f"load_shared<{CXX[kind]}, {count}>({em.address(args[1], 'u32')})"
    elif space == "param" and (argument := _argument(em, args[1])):
        return em.write(args[0], kind, em.read(argument, kind))
    elif space == "param":
        offset = em.address(args[1], "u64")
        value = f"load_parameter<{CXX[kind]}, {count}>(parameters, {offset})"
    else:
        value = f"load<{CXX[kind]}, {count}>({em.address(args[1], 'u64')})"
    return f"const auto v = {value};" + "".join(
        em.write(target, kind, f"v.x[{i}]") for i, target in enumerate(em.vector(args[0]))
    )


@handles("st")
def store(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.take("L2::cache_hint")
    releases = "release" in op.parts and _of_all_blocks(op)
    kind, space, count = op.kind(), _space(em, op), _count(op)
    if releases and space == "global" and count == 1 and bits_of(kind) == 32:
        word = f"reinterpret_cast<int*>({em.address(args[0], 'u64')})"
        return f"machine.store_release({word}, int({em.read(args[1], kind)}), {HERE});"
    values = ", ".join(em.read(each, kind) for each in em.vector(args[1]))
    value = f"Vector<{CXX[kind]}, {count}>{{{{{values}}}}}"
    if space == "shared":
        return f"store_shared<{CXX[kind]}, {count}>({em.address(args[0], 'u32')}, {value});"
    if space == "param":
        if not (argument := _argument(em, args[0])):
            raise Unsupported("stores to parameters")
        return em.write(argument, kind, em.read(args[1], kind))
    return f"store<{CXX[kind]}, {count}>({em.address(args[0], 'u64')}, {value});"


CHANGES = {
    "add": "{before} + {value}", "min": "std::min({before}, {value})", "exch": "{value}",
    "max": "std::max({before}, {value})", "and": "{before} & {value}", "or": "{before} | {value}",
    "xor": "{before} ^ {value}", "cas": "{before} == {value} ? {other} : {before}",
}  # fmt: skip


def _change(em: Emitter, name: str, kind: str, values: list[str]) -> str:
    halves, whole = ("f16", "bf16", "f16x2", "bf16x2"), ("add", "exch")
    if kind in halves or (kind[0] == "f" and name not in whole):
        raise Unsupported(f"atomic {name} of {kind}")
    value, other = em.read(values[0], kind), em.read(values[1], kind) if values[1:] else ""
    return CHANGES[name].format(before="before", value=value, other=other)


def _atomic(em: Emitter, op: Opcode, address: str, values: list[str]) -> tuple[str, str]:
    """(kind, expression) of the value before."""
    op.take("L2::cache_hint")
    kind, space, name = op.kind(), _space(em, op), op.one_of(*CHANGES)
    if not name:
        raise Unsupported("unknown atomic operation")
    change = f"[&]({CXX[kind]} before) {{ return {_change(em, name, kind, values)}; }}"
    if space == "shared":
        return kind, f"atomic_shared<{CXX[kind]}>({em.address(address, 'u32')}, {change})"
    return kind, f"compiled::atomic<{CXX[kind]}>({em.address(address, 'u64')}, {change})"


@handles("atom")
def atomic(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind, value = _atomic(em, op, args[1], args[2:])
    return em.write(args[0], kind, value)


@handles("red")
def reduce_memory(em: Emitter, op: Opcode, args: list[str]) -> str:
    count = _count(op)
    if count == 1:
        return _atomic(em, op, args[0], args[1:])[1] + ";"
    text, parts = "", list(op.parts)
    size = bits_of(op.parts[-1]) // 8
    base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\d+))?\s*\]", args[0]).groups("0")
    for i, value in enumerate(em.vector(args[1])):
        op.parts = list(parts)
        text += _atomic(em, op, f"[{base} + {int(offset) + size * i}]", [value])[1] + "; "
    return text


@handles("membar", "fence")
def fence(em: Emitter, op: Opcode, args: list[str]) -> str:
    if op.take("proxy"):
        op.take("async")
        space = op.one_of("shared::cta", "global")  # neither: both
        shared = f"machine.fence_proxy_async({HERE});" if space != "global" else ""
        return shared + (f"machine.fence_proxy_async_global({HERE});"
                         if space != "shared::cta" else "")  # fmt: skip
    if op.take("mbarrier_init"):
        op.take("release"), op.take("cluster")
        return "machine.fence_mbarrier_init({__builtin_FILE(), __builtin_LINE()});"
    for part in ("gl", "sc", *HINTS):
        op.take(part)
    return ";"


@handles("prefetch", "griddepcontrol", "applypriority", "discard")
def hint(em: Emitter, op: Opcode, args: list[str]) -> str:
    """What changes no value."""
    if op.base in ("prefetch", "griddepcontrol"):
        op.parts.clear()
    return ";"
