"""Handlers of instructions on registers alone: arithmetic, comparisons, conversions, bits."""

from __future__ import annotations

from ptx.emit import CXX, Emitter, Opcode, handles
from ptx.parse import Unsupported, bits_of

FLOATS = ("f32", "f64")
HALVES = {"f16": "fp16", "bf16": "bf16"}
UNSIGNED = {"s16": "u16", "s32": "u32", "s64": "u64"}
DOUBLE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


def _subnormal(op: Opcode) -> str:
    return "Flush" if op.take("ftz") else "Keep"


def _unsigned(kind: str) -> str:
    """Where the bits are the same for both: signed overflow wraps around."""
    return UNSIGNED.get(kind, kind)


@handles("add", "sub", "mul")
def arithmetic(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    sign = {"add": "+", "sub": "-", "mul": "*"}[op.base]
    if kind in FLOATS:
        op.take("rn")
        a, b = (em.read(each, kind) for each in args[1:3])
        if kind == "f64":
            return em.write(args[0], kind, f"{a} {sign} {b}")
        call = "mul" if op.base == "mul" else "add"
        second = f"-{b}" if op.base == "sub" else b
        text = f"{call}<{_subnormal(op)}>({a}, {second})"
        return em.write(args[0], kind, f"saturate({text})" if op.take("sat") else text)
    if kind not in UNSIGNED and kind not in UNSIGNED.values():
        return _packed(em, op, args, kind, sign)
    if op.base == "mul":
        return _multiply(em, op, args, kind)
    same = _unsigned(kind)
    a, b = (em.read(each, same) for each in args[1:3])
    return em.write(args[0], same, f"{a} {sign} {b}")


def _packed(em: Emitter, op: Opcode, args: list[str], kind: str, sign: str) -> str:
    """One or two numbers of 16 bits: exact in fp32, then rounded."""
    name = HALVES.get(kind.removesuffix("x2"))
    if name is None:
        raise Unsupported(f"arithmetic of {kind}")
    op.take("rn")
    words = [em.read(each, kind) for each in args[1:]]

    def one(shift: int) -> str:
        numbers = [f"{name}_value(uint16_t({word} >> {shift}))" for word in words]
        if sign == "fma":
            return f"to_{name}(__builtin_fmaf({', '.join(numbers)}))"
        return f"to_{name}({numbers[0]} {sign} {numbers[1]})"

    both = f"{one(0)} | uint32_t({one(16)}) << 16" if kind.endswith("x2") else one(0)
    return em.write(args[0], kind, both)


@handles("mad", "madc")
def multiply_add(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    if op.base == "madc" or "cc" in op.parts:
        return _with_carry(em, op, args, kind)
    if kind in FLOATS:
        op.parts.append(kind)
        return fused(em, op, args)
    return _multiply(em, op, args, kind)


def _with_carry(em: Emitter, op: Opcode, args: list[str], kind: str) -> str:
    """mad.cc leaves the carry of its sum, which madc adds to its own."""
    half, leaves = op.one_of("lo", "hi"), op.take("cc")
    if kind != "u32" or not half:
        raise Unsupported(f"a carry of {kind}")
    a, b, c = (em.read(each, kind) for each in args[1:4])
    product = f"{a} * {b}" if half == "lo" else f"high_half<uint32_t>({a}, {b})"
    carry = " + carry" if op.base == "madc" else ""
    text = f"const uint64_t sum = uint64_t({product}) + {c}{carry};"
    text += em.write(args[0], kind, "uint32_t(sum)")
    return f"{text} carry = (sum >> 32) != 0;" if leaves else text


def _multiply(em: Emitter, op: Opcode, args: list[str], kind: str) -> str:
    half = op.one_of("lo", "hi", "wide")
    same = _unsigned(kind)
    if half == "lo":
        text, out = f"{CXX[same]}({em.read(args[1], same)} * {em.read(args[2], same)})", same
    elif half == "hi":
        text = f"high_half<{CXX[kind]}>({em.read(args[1], kind)}, {em.read(args[2], kind)})"
        out = kind
    elif half == "wide":
        wide = DOUBLE[kind]
        text = f"{CXX[wide]}({em.read(args[1], kind)}) * {CXX[wide]}({em.read(args[2], kind)})"
        out = wide
    else:
        raise Unsupported("a product of integers is .lo, .hi or .wide")
    if op.base == "mad":
        out = _unsigned(out)
        text = f"{CXX[out]}({text}) + {em.read(args[3], out)}"
    return em.write(args[0], out, text)


@handles("fma")
def fused(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    if kind not in FLOATS:
        return _packed(em, op, args, kind, "fma")
    if not op.take("rn"):
        raise Unsupported("fma rounds to nearest (.rn) only")
    a, b, c = (em.read(each, kind) for each in args[1:4])
    if kind == "f64":
        return em.write(args[0], kind, f"__builtin_fma({a}, {b}, {c})")
    text = f"compiled::fma<{_subnormal(op)}>({a}, {b}, {c})"
    return em.write(args[0], kind, f"saturate({text})" if op.take("sat") else text)


@handles("div", "rem")
def division(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    a, b = (em.read(each, kind) for each in args[1:3])
    if kind in FLOATS and op.base == "div":
        # div.full and div.approx are within 2 units in the last place, of which exact is one case
        rounded = op.one_of("rn", "full", "approx")
        if not rounded:
            raise Unsupported("division without a rounding")
        if op.take("ftz"):
            return em.write(args[0], kind, f"flush(flush({a}) / flush({b}))")
        return em.write(args[0], kind, f"{a} / {b}")
    name = "divide" if op.base == "div" else "compiled::remainder"
    return em.write(args[0], kind, f"{name}<{CXX[kind]}>({a}, {b})")


@handles("max", "min")
def extremum(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    a, b = (em.read(each, kind) for each in args[1:3])
    word = {"max": "maximum", "min": "minimum"}[op.base]
    if kind in FLOATS:
        word += "_or_nan" * op.take("NaN")
        if op.take("ftz"):
            a, b = f"flush({a})", f"flush({b})"
        return em.write(args[0], kind, f"{word}<{CXX[kind]}>({a}, {b})")
    if kind in ("f16", "bf16"):
        word += "_or_nan" * op.take("NaN")
        name = HALVES[kind]
        return em.write(
            args[0], kind, f"to_{name}({word}<float>({name}_value({a}), {name}_value({b})))"
        )
    text = f"std::{op.base}<{CXX[kind]}>({a}, {b})"
    if op.take("relu"):
        text = f"std::max<{CXX[kind]}>(0, {text})"
    return em.write(args[0], kind, text)


@handles("neg", "abs", "not")
def unary(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    if kind in FLOATS:
        x = em.read(args[1], kind)
        x = f"flush({x})" if op.take("ftz") else x
        return em.write(args[0], kind, f"-{x}" if op.base == "neg" else f"std::fabs({x})")
    if op.base == "not":
        x = em.read(args[1], kind)
        return em.write(args[0], kind, f"!{x}" if kind == "pred" else f"~{x}")
    if kind.endswith("x2") or kind in HALVES:
        mask = {"neg": "^ 0x8000u", "abs": "& 0x7fffu"}[op.base]
        mask = (
            mask.replace("8000", "80008000").replace("7fff", "7fff7fff") if "x2" in kind else mask
        )
        return em.write(args[0], kind, f"{em.read(args[1], kind)} {mask}")
    same = _unsigned(kind)
    negative = f"{CXX[same]}(0 - {em.read(args[1], same)})"
    if op.base == "abs":
        negative = f"{em.read(args[1], kind)} < 0 ? {negative} : {em.read(args[1], same)}"
    return em.write(args[0], same, negative)


@handles("and", "or", "xor")
def logic(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    sign = {"and": "&", "or": "|", "xor": "^"}[op.base]
    return em.write(args[0], kind, f"{em.read(args[1], kind)} {sign} {em.read(args[2], kind)}")


@handles("lop3")
def logic_of_three(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    return em.write(args[0], kind, f"logic3({', '.join(em.read(x, 'b32') for x in args[1:5])})")


@handles("shl", "shr")
def shift(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind, word = op.kind(), {"shl": "left", "shr": "right"}[op.base]
    text = f"shift_{word}<{CXX[kind]}>({em.read(args[1], kind)}, {em.read(args[2], 'u32')})"
    return em.write(args[0], kind, text)


@handles("shf")
def funnel_shift(em: Emitter, op: Opcode, args: list[str]) -> str:
    op.kind()
    word, wraps = op.one_of("l", "r"), op.one_of("wrap", "clamp") == "wrap"
    lo, hi, n = (em.read(each, "u32") for each in args[1:4])
    name = "funnel_left" if word == "l" else "funnel_right"
    n = f"({n} & 31)" if wraps else f"std::min<uint32_t>({n}, 32)"
    # shf.l gives the upper half of what moved, shf.r the lower
    text = f"{name}({lo}, {hi}, {n})"
    return em.write(args[0], "u32", text)


@handles("bfe")
def extract(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    if bits_of(kind) not in (32, 64):
        raise Unsupported(f"bfe of {kind}")
    place, length = (em.read(each, "u32") for each in args[2:])
    taken = f"extract_bits<{CXX[kind]}>({em.read(args[1], kind)}, {place}, {length})"
    return em.write(args[0], kind, taken)


@handles("bfi")
def insert(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = f"u{bits_of(op.kind())}"
    if kind not in ("u32", "u64"):
        raise Unsupported(f"bfi of {kind}")
    a, b = (em.read(each, kind) for each in args[1:3])
    place, length = (em.read(each, "u32") for each in args[3:])
    return em.write(args[0], kind, f"insert_bits<{CXX[kind]}>({a}, {b}, {place}, {length})")


@handles("prmt", "popc", "clz", "brev")
def bits(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    words = [em.read(each, "u32") for each in args[1:]]
    if bits_of(kind) != 32:
        raise Unsupported(f"{op.base} of {kind}")
    text = {
        "prmt": f"permute_bytes({', '.join(words)})",
        "popc": f"uint32_t(__builtin_popcount({words[0]}))",
        "clz": f"({words[0]} ? uint32_t(__builtin_clz({words[0]})) : 32u)",
    }.get(op.base)
    if text is None:
        raise Unsupported(f"{op.base} of {kind}")
    return em.write(args[0], "u32", text)


@handles("copysign")
def copy_sign(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    if kind != "f32":
        raise Unsupported(f"copysign of {kind}")
    return em.write(args[0], kind, f"with_sign({em.read(args[1], kind)}, {em.read(args[2], kind)})")


@handles("ex2", "lg2", "rcp", "sqrt", "rsqrt")
def special_function(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    rounded, flushed = op.one_of("rn", "approx"), op.take("ftz")
    if kind != "f32" or not rounded:
        raise Unsupported(f"{op.base} of {kind} without .approx or .rn")
    x = em.read(args[1], kind)
    if op.base == "ex2":
        text = f"exp2_{'flushed' if flushed else 'kept'}({x})"
    else:
        x = f"flush({x})" if flushed else x
        text = {
            "lg2": f"log2f({x})", "rcp": f"1.0f / {x}", "sqrt": f"std::sqrt({x})",
            "rsqrt": f"1.0f / std::sqrt({x})",
        }[op.base]  # fmt: skip
        text = f"flush({text})" if flushed else text
    return em.write(args[0], kind, text)


@handles("selp")
def select(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind = op.kind()
    chosen = em.read(args[3], "pred")
    return em.write(
        args[0], kind, f"{chosen} ? {em.read(args[1], kind)} : {em.read(args[2], kind)}"
    )


ORDERED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
OPPOSITE = {"lt": ">=", "le": ">", "gt": "<=", "ge": "<"}
OF_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}
COMPARISONS = (*ORDERED, *OF_UNSIGNED, *(f"{c}u" for c in ORDERED), "num", "nan")


def _compare_floats(name: str, a: str, b: str) -> str:
    nan = f"(std::isnan({a}) || std::isnan({b}))"
    if name in ("num", "nan"):
        return f"!{nan}" if name == "num" else nan
    if name == "ne":
        return f"({a} < {b} || {a} > {b})"
    if name == "equ":
        return f"!({a} < {b} || {a} > {b})"
    if name == "neu":
        return f"({a} != {b})"
    if name.endswith("u"):
        return f"!({a} {OPPOSITE[name[:-1]]} {b})"
    return f"({a} {ORDERED[name]} {b})"


@handles("setp")
def compare(em: Emitter, op: Opcode, args: list[str]) -> str:
    kind, name = op.kind(), op.one_of(*COMPARISONS)
    combine, flushed = op.one_of("and", "or", "xor"), op.take("ftz")
    targets = [each.strip() for each in args[0].split("|")]
    a, b = (em.read(each, kind) for each in args[1:3])
    if kind in ("f16x2", "bf16x2"):
        value = f"{HALVES[kind[:-2]]}_value"
        return "".join(
            em.write(
                target, "pred",
                _compare_floats(name, *(f"{value}(uint16_t({x} >> {16 * i}))" for x in (a, b))),
            )
            for i, target in enumerate(targets)
        )  # fmt: skip
    if kind in HALVES:
        a, b = (f"{HALVES[kind]}_value({x})" for x in (a, b))
    if flushed:
        a, b = f"flush({a})", f"flush({b})"
    if kind in (*FLOATS, *HALVES):
        text = _compare_floats(name, a, b)
    else:
        text = f"({a} {(ORDERED | OF_UNSIGNED)[name]} {b})"
    sign = {"and": "&", "or": "|", "xor": "^"}.get(combine, "")
    other = em.read(args[3], "pred") if combine else ""
    statements = f"const bool result = {text};"
    for target, value in zip(targets, ("result", "!result"), strict=False):
        statements += em.write(target, "pred", f"{value} {sign} {other}" if sign else value)
    return statements


WHOLE = {"rzi": "truncf", "rni": "nearbyintf", "rmi": "floorf", "rpi": "ceilf"}


@handles("cvt")
def convert(em: Emitter, op: Opcode, args: list[str]) -> str:
    source = op.kind()
    target = op.kind()
    rounding = op.one_of("rn", "rz", "rna", *WHOLE)
    if target.endswith("16x2") and source == "f32":
        return _convert_pair(em, op, args, target, rounding)
    relu, flushed = op.take("relu"), op.take("ftz")
    if target[0] in "sub" and target != "bf16" and source[0] in "sub" and source != "bf16":
        x = em.read(args[1], source)
        text = f"clamped<{CXX[target]}>({x})" if op.take("sat") else f"{CXX[target]}({x})"
        return em.write(args[0], target, text)
    if target[0] in "sub" and target != "bf16":
        value = _as_float(em, source, args[1])
        value = f"flush({value})" if flushed else value
        op.take("sat")  # out of range is the nearest number anyway
        whole = WHOLE[rounding] if source != "f64" else WHOLE[rounding].removesuffix("f")
        return em.write(args[0], target, f"to_integer<{CXX[target]}>({whole}({value}))")
    return em.write(
        args[0], target, _to_float(em, op, args[1], source, target, rounding, relu, flushed)
    )


def _as_float(em: Emitter, kind: str, operand: str) -> str:
    value = em.read(operand, kind)
    return f"{HALVES[kind]}_value({value})" if kind in HALVES else value


def _to_float(em: Emitter, op: Opcode, operand: str, source: str, target: str, rounding: str,
              relu: bool, flushed: bool) -> str:  # fmt: skip
    value = _as_float(em, source, operand)
    if target == "tf32":
        if rounding != "rna":
            raise Unsupported("tf32 by another rounding than .rna")
        return f"emulation::tf32_bits({value})"
    if rounding not in ("", "rn") and not (source[0] == "f" and rounding in WHOLE):
        raise Unsupported(f"rounding .{rounding} from {source} to {target}")
    value = f"flush({value})" if flushed and source == "f32" else value
    value = f"saturate({value})" if op.take("sat") else value
    value = f"relu({value})" if relu else value
    if rounding in WHOLE:
        return f"{WHOLE[rounding]}({value})"
    if target in HALVES:
        return f"to_{HALVES[target]}(float({value}))"
    text = f"{CXX[target]}({value})"
    return f"flush({text})" if flushed and target == "f32" else text


def _convert_pair(em: Emitter, op: Opcode, args: list[str], target: str, rounding: str) -> str:
    """The first number goes to the upper half."""
    if rounding != "rn":
        raise Unsupported(f"rounding .{rounding} to {target}")
    name, relu = HALVES[target[:-2]], op.take("relu")
    high, low = (em.read(each, "f32") for each in args[1:3])
    if relu:
        high, low = f"relu({high})", f"relu({low})"
    return em.write(args[0], target, f"to_{name}({low}) | uint32_t(to_{name}({high})) << 16")


@handles("tanh")
def least_exact_tanh(em: Emitter, op: Opcode, args: list[str]) -> str:
    """tanh.approx as far from tanh as the manual's page allows, 2^-11 of it, to either side."""
    kind = op.kind()
    if kind != "f32" or not op.one_of("approx"):
        raise Unsupported(f"tanh of {kind} without .approx")
    error = "std::fmod(std::fabs(t) * 4096.0f, 2.0f) < 1.0f ? 0x1p-11f : -0x1p-11f"
    text = f"[](float t) {{ return t + t * ({error}); }}(std::tanh({em.read(args[1], kind)}))"
    return em.write(args[0], kind, text)
