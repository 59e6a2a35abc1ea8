"""Elementary functions of float32 numbers: reciprocal and tanh; casts and bytes."""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
EXP_2X = tl.constexpr(2.885390081777927)  # 2 log2(e): 2^(EXP_2X x) = exp(2 x)


@triton.jit
def reciprocal(x):
    """1 / x to one unit in the last place, in one instruction on NVIDIA GPUs; 0 where that would be
    no normal number."""
    if INTERPRETED:
        return 1.0 / x
    if is_cuda():
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def tanh(x):
    """tanh to 2 units in the last place: Cephes' odd polynomial below 0.625, exp2 above, where no
    digits cancel."""
    z = x * x
    p = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    small = x + x * z * ((p + 1.33314422036e-1) * z - 3.33332819422e-1)
    large = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * EXP_2X) + 1.0)
    return tl.where(tl.abs(x) < 0.625, small, tl.where(x < 0, -large, large))


@triton.jit
def tanh_part(x, factor):
    """1 / (1 + exp(-2 factor x)), of which tanh(factor x) is twice it less 1; to 2^-23 of 1, so
    near 0 it has fewer digits than `tanh`, which takes twenty instructions; this takes four."""
    return reciprocal(tl.exp2(x * (factor * -EXP_2X)) + 1.0)


@triton.jit
def tanh_approx(x):
    """tanh to 2^-11 of it, in one instruction on NVIDIA GPUs."""
    if INTERPRETED or not is_cuda():
        return tanh(x)
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def widened(x):
    """A tile in float32.  Of bfloat16 each half of a register in one instruction; Triton's own cast
    takes two for the upper one."""
    PAIRS: tl.constexpr = x.dtype == tl.bfloat16 and x.shape[0] * x.shape[1] > 1
    # With `else`: what follows a return is compiled, too, and Triton refuses pairs of one element
    if INTERPRETED or not is_cuda() or not PAIRS:
        wide = x.to(tl.float32)
    else:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    return wide


@triton.jit
def where_seen(seen, s):
    """s, and -inf where the word `seen` is 0, in two instructions with taking a byte out of
    it; the compiler would first move the byte."""
    if INTERPRETED or not is_cuda():
        return tl.where(seen != 0, s, float("-inf"))
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.u32 p, $2, 0; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r",
        [s, seen], dtype=tl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def byte_signs(words):
    """Words whose bytes have their highest bit set where they were not 0."""
    return ((words & 0x7F7F7F7F) + 0x7F7F7F7F) | words


@triton.jit
def only_seen(x, signs, place):
    """x in 16 bits, and 0 where byte `place` of `byte_signs` lacks its bit: two instructions for
    two elements, where a test and a selection each are four."""
    if INTERPRETED or not is_cuda():
        kept = tl.where(((signs >> (place * 8 + 7)) & 1) != 0, x, 0.0)
    else:
        # prmt with 8 in a digit repeats a byte's highest bit; digits of the second word have 4
        kept = tl.inline_asm_elementwise(
            "{ .reg .b32 s, m; mad.lo.u32 s, $5, 0x1100, 0xcc00; mad.lo.u32 s, $4, 0x11, s;"
            " add.u32 s, s, 0x88; prmt.b32 m, $2, $3, s; and.b32 $0, $1, m; }",
            "=r,r,r,r,r,r", [x, signs, place], dtype=x.dtype, is_pure=True, pack=2,
        )  # fmt: skip
    return kept


@triton.jit
def settled(x):
    """x, whose product is complete here: a use of it without an instruction."""
    if INTERPRETED or not is_cuda():
        return x
    return tl.inline_asm_elementwise("", "=f,0", [x], dtype=tl.float32, is_pure=True, pack=1)
