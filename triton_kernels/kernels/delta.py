"""Before the backward: delta = rowsum(dO * O) - dLSE, LSE in base 2, and zeros in the sums of dQ.

O, dO [B, Hq, Sq, Dv]; LSE, dLSE, delta float32 [B, Hq, Sq].  One program = 32 queries of a head.
The sums are those to which the one pass of 5 products adds (fused.py).
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.primitives import (
    SUM_ROWS,
    VARLEN,
    load_tile,
    program,
    sequence,
    sum_of_products,
)
from attn_ext.triton_kernels.kernels.scores import near_lse


@triton.jit(do_not_specialize=["heads_q", "total_q", "seqlen_q", "blocks"])
def delta_kernel(
    out, dout, lse, dlse, delta, lse2, sums, cu_seqlens_q,
    o_b, o_h, o_s, do_b, do_h, do_s, lse_b, lse_h, sums_b, sums_h, heads_q, total_q, seqlen_q,
    blocks,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    DLSE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE, without O dlse for it, and LSE in base 2 (`near_lse`), float32
    in LSE's layout; and zeros in the sums of dQ, if any (fused.py)."""
    block, h, b = program(blocks, heads_q)
    i_first = block * BLOCK_M
    q_first, length_q = sequence(cu_seqlens_q, b, total_q, seqlen_q, FLAGS)
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    i = i_first + tl.arange(0, BLOCK_M)
    row = b * lse_b + h * lse_h + q_first + i
    if out is None:
        value = tl.load(dlse + row, mask=i < length_q, other=0.0)
    else:
        o_rows = out + b * o_b + h * o_h + q_first * o_s
        do_rows = dout + b * do_b + h * do_h + q_first * do_s
        o = load_tile(o_rows, o_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        do = load_tile(do_rows, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        value = sum_of_products(o, do)
        if DLSE:
            value -= tl.load(dlse + row, mask=i < length_q, other=0.0)
    tl.store(delta + row, value, mask=i < length_q)
    tl.store(lse2 + row, near_lse(lse, row, i < length_q), mask=i < length_q)
    if sums is not None:
        rows = sums_of(sums, b, h, q_first, sums_b, sums_h, BLOCK_D, FLAGS)
        places = i_first.to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_M * BLOCK_D)
        tl.store(rows + places, tl.zeros([BLOCK_M * BLOCK_D], tl.float32))


@triton.jit
def sums_of(sums, b, h, q_first, sums_b, sums_h, BLOCK_D: tl.constexpr, FLAGS: tl.constexpr):
    """The sums of dQ of a sequence's head: float32 [rows, BLOCK_D], SUM_ROWS at a time in an order
    of their own (`sum_places`).  Each begins at a multiple of SUM_ROWS rows and no two share one,
    so that programs add whole tiles, without a look at which rows exist."""
    first = b * 0
    if VARLEN & FLAGS:
        first = (q_first // SUM_ROWS + b) * SUM_ROWS
    return sums + b * sums_b + h * sums_h + first * BLOCK_D


@triton.jit
def sum_places(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Where the elements of a tile lie in the sums of dQ, [BLOCK_M, BLOCK_D]."""
    return tl.arange(0, BLOCK_M)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
