"""Products in which a weight of 0 silences what it meets: NaN and inf of rows that are not seen."""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.primitives import (
    INTERPRETED,
    dot,
    sum_of_products,
)


@triton.jit
def add_special(acc, present, code, plus, minus):
    """acc + NaN, `plus` or `minus` where the row of `present` meets such a code in the column."""
    small = tl.float32 if INTERPRETED else tl.bfloat16
    zero = tl.zeros_like(acc)
    met = dot(tl.where(present, 1.0, 0.0).to(small), code.to(small), zero).to(tl.int32)
    acc += tl.where((met & 255) > 0, float("nan"), 0.0)
    acc += tl.where(((met >> 8) & 255) > 0, plus, 0.0)
    return acc + tl.where((met >> 16) > 0, minus, 0.0)


@triton.jit
def dot_present(a, b, acc, SIGNED: tl.constexpr):
    """acc + sum_k a_ik b_kj over the k with a_ik != 0: a zero also silences NaN and inf of b.

    The finite part is one product.  What non-finite elements add is found by counting them: NaN in
    units of 1, inf of 2^8, -inf of 2^16, exact in bfloat16 factors and a float32 sum for at most
    255 terms.  SIGNED: `a` may be negative.
    """
    wide = b.to(tl.float32)
    acc = dot(a, tl.where(tl.abs(wide) < float("inf"), wide, 0.0).to(b.dtype), acc)
    code = tl.where(wide != wide, 1.0, 0.0)
    code = tl.where(wide == float("inf"), 256.0, code)
    code = tl.where(wide == float("-inf"), 65536.0, code)
    acc = add_special(acc, (a > 0) | (a != a), code, float("inf"), float("-inf"))
    if SIGNED:
        acc = add_special(acc, a < 0, code, float("-inf"), float("inf"))
    return acc


@triton.jit
def product_each(a, b):
    """Products of the rows of a and b [BLOCK, D], as [BLOCK, 1]."""
    return sum_of_products(a, b)[:, None]


@triton.jit
def outer_present(weight, rows):
    """weight [BLOCK, 1] times rows [BLOCK, D]; 0, whatever a row holds, where its weight is 0."""
    return tl.where(weight != 0, weight * rows, 0.0)
