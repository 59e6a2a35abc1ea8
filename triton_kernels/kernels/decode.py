"""Decode: few queries against a long cache, the keys split over programs (Flash-Decoding).

q, O [B, Hq, Sq, D | Dv]; k, v [B, Hk, Smax, D | Dv], or [pages, Hk, page_size, D | Dv] with
block_table [B, max_pages].  The query heads of a group share K and V, so their rows are packed
into one tile: row r of K/V head hk is query r // group of head hk * group + r % group.  One
program = BLOCK_M such rows and one part of the keys; `combine_kernel` joins the parts by their
maxima and sums.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import dropout_state
from attn_ext.triton_kernels.kernels.fwd import careful_rows, forward_rows
from attn_ext.triton_kernels.kernels.primitives import (
    FAR,
    INTERPRETED,
    PAGED,
    SEQLENS,
    SPLIT,
    STATS,
    STREAM,
    unknown_zero,
)
from attn_ext.triton_kernels.kernels.softmax import again_count, row_ends


@triton.jit
def packed_rows(m_blocks, splits, heads_k, group, seqlen_q, BLOCK_M: tl.constexpr):
    """(part of the keys, K/V head, batch element, rows) of this program; rows: which exist, their
    queries and heads, [BLOCK_M] each, and the first and the last of the queries."""
    pid = tl.program_id(0)
    m_block, split = pid % m_blocks, pid // m_blocks % splits
    hk, b = pid // m_blocks // splits % heads_k, pid // m_blocks // splits // heads_k
    r = m_block * BLOCK_M + tl.arange(0, BLOCK_M)
    real = r < group * seqlen_q
    h = (hk * group + r % group).to(tl.int64)
    h = tl.where(real, h, 0)  # rows past the last one read the terms of head 0
    i_first = m_block * BLOCK_M // group
    i_last = tl.minimum((m_block * BLOCK_M + BLOCK_M - 1) // group, seqlen_q - 1)
    return split, hk, b, (real, r // group, h, i_first, i_last)


@triton.jit
def store_results(
    state, out_rows, lse, max_logit, entropy, row, real, sink, h, inverse_keep,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Write O to out_rows (pointers [BLOCK_M]), LSE and the statistics to place `row` of theirs, of
    the rows that are `real`; h [BLOCK_M] are their heads."""
    acc, row_max, row_sum, e, bad = state
    factor, row_lse, largest, spread = row_ends(row_max, row_sum, e, bad, sink, h, FLAGS)
    c = tl.arange(0, BLOCK_DV)[None, :]
    o = acc * (factor * inverse_keep)[:, None]
    inside = real[:, None] & (c < DV)
    tl.store(out_rows[:, None] + c, o.to(out_rows.dtype.element_ty), mask=inside)
    tl.store(lse + row, row_lse, mask=real)
    if STATS & FLAGS:
        tl.store(max_logit + row, largest, mask=real)
        tl.store(entropy + row, spread, mask=real)


@triton.jit
def store_packed_rows(state, ends, DV: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr):
    """Write the rows' part of O and of the sums, or where there is one part the results."""
    (out, o_h, o_s, lse, max_logit, entropy, row, part, sums, sink, inverse_keep, split, splits,
     m_blocks, heads_q, seqlen_q, heads_k, real, h, i) = ends  # fmt: skip
    if SPLIT & FLAGS:
        acc, row_max, row_sum, e, bad = state
        c = tl.arange(0, BLOCK_DV)[None, :]
        count = tl.num_programs(0).to(tl.int64) // (m_blocks * splits * heads_k)
        count = count * heads_q * seqlen_q
        place = split * count + row
        tl.store(part + place[:, None] * DV + c, acc, mask=real[:, None] & (c < DV))
        tl.store(sums + place, row_max, mask=real)
        tl.store(sums + splits * count + place, row_sum, mask=real)
        if STATS & FLAGS:
            tl.store(sums + 2 * splits * count + place, e, mask=real)
            tl.store(sums + 3 * splits * count + place, bad, mask=real)
    else:
        store_results(
            state, out + h * o_h + i.to(tl.int64) * o_s, lse, max_logit, entropy, row, real, sink,
            h, inverse_keep, DV, BLOCK_DV, FLAGS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "page_count", "heads_q", "group", "seqlen_q", "seqlen_k", "m_blocks",
        "splits", "threshold", "left", "right",
    ]
)  # fmt: skip
def decode_kernel(
    q, k, v, out, lse, max_logit, entropy, part, sums,
    terms, sink, rng_state, seqlens_k, block_table,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, lse_b, lse_h,
    table_b, page_count,
    heads_q, group, seqlen_q, seqlen_k, m_blocks, splits,
    scale, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (m_blocks * splits * Hk * B).  part float32 [splits, B, Hq, Sq, Dv] and sums float32
    [4, splits, B, Hq, Sq] (maximum, sum, entropy's sum, NaN) where SPLIT, else the results."""
    heads_k = heads_q // group
    split, hk, b, rows = packed_rows(m_blocks, splits, heads_k, group, seqlen_q, BLOCK_M)
    real, i, h, i_first, i_last = rows
    length = seqlen_k
    if SEQLENS & FLAGS:
        length = tl.minimum(tl.maximum(tl.load(seqlens_k + b), 0), seqlen_k)
    wide_b, wide_hk = b.to(tl.int64), hk.to(tl.int64)
    d = tl.arange(0, BLOCK_D)[None, :]
    q_rows = q + wide_b * q_b + h * q_h + i.to(tl.int64) * q_s
    if STREAM & FLAGS:
        q_tile = (q_rows, real)
    else:
        q_tile = tl.load(q_rows[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
        q_tile = q_tile.to(tl.float32) if INTERPRETED else q_tile
    rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
    if PAGED & FLAGS:  # k_b and v_b are the strides of pages
        kv = (k + wide_hk * k_h, k_s, k_b, v + wide_hk * v_h, v_s, v_b,
              (block_table + wide_b * table_b, PAGE_SIZE, page_count), 0)  # fmt: skip
    else:
        kv = (k + wide_b * k_b + wide_hk * k_h, k_s, 0,
              v + wide_b * v_b + wide_hk * v_h, v_s, 0, 0, 0)  # fmt: skip
    state = forward_rows(
        q_tile, kv, (i - i_first)[:, None], b, h[:, None], i_first, i_last, seqlen_q, length,
        split, splits, terms, rng, scale, left, right, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
        0, FLAGS,
    )  # fmt: skip
    ends = (out + wide_b * o_b, o_h, o_s, lse, max_logit, entropy, wide_b * lse_b + h * lse_h + i,
            part, sums, sink, inverse_keep, split, splits, m_blocks, heads_q, seqlen_q, heads_k,
            real, h, i)  # fmt: skip
    bad = again_count(state[0], state[1], state[2], FLAGS)
    if bad > 0:  # each way stores its own result, as in the forward kernel
        zero = unknown_zero(bad)
        again = tl.load(zero + q_rows[:, None] + d, mask=real[:, None] & (d < D), other=0.0)
        again = again.to(tl.float32) if INTERPRETED else again
        state = careful_rows(
            again, kv, (i - i_first)[:, None], b + zero, h[:, None], i_first + zero, i_last,
            seqlen_q, length, split, splits, terms, rng, scale, left, right,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
        )  # fmt: skip
        store_packed_rows(state, ends, DV, BLOCK_DV, FLAGS)
    else:
        store_packed_rows(state, ends, DV, BLOCK_DV, FLAGS)


@triton.jit(do_not_specialize=["heads_q", "seqlen_q", "count", "splits"])
def combine_kernel(
    part, sums, out, lse, max_logit, entropy, sink,
    o_b, o_h, o_s, heads_q, seqlen_q, count, splits, inverse_keep,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (count / BLOCK_M), count = B * Hq * Sq rows.  Joins the parts of `decode_kernel`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = row < count
    i, h, b = row % seqlen_q, row // seqlen_q % heads_q, row // seqlen_q // heads_q
    h = tl.where(real, h, 0)
    c = tl.arange(0, BLOCK_DV)[None, :]
    inside = real[:, None] & (c < DV)
    wide = tl.full([1], 1, tl.int64) * count * splits  # between the four sums
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max = row_sum - float("inf")
    e, bad = row_sum, row_sum
    place = row
    for _ in range(0, splits):
        part_max = tl.load(sums + place, mask=real, other=float("-inf"))
        part_sum = tl.load(sums + wide + place, mask=real, other=0.0)
        tile = tl.load(part + place[:, None] * DV + c, mask=inside, other=0.0)
        new_max = tl.maximum(row_max, part_max)
        safe = tl.where(new_max == float("-inf"), 0.0, new_max)  # no -inf - -inf
        old_share, new_share = tl.exp2(row_max - safe), tl.exp2(part_max - safe)
        if STATS & FLAGS:
            part_e = tl.load(sums + 2 * wide + place, mask=real, other=0.0)
            bad += tl.load(sums + 3 * wide + place, mask=real, other=0.0)
            before = tl.maximum(row_max - safe, -FAR)
            part_before = tl.maximum(part_max - safe, -FAR)
            e = old_share * (e + before * row_sum) + new_share * (part_e + part_before * part_sum)
        row_sum = old_share * row_sum + new_share * part_sum
        acc = old_share[:, None] * acc + new_share[:, None] * tile
        row_max = new_max
        place += count
    store_results(
        (acc, row_max, row_sum, e, bad), out + b * o_b + h * o_h + i * o_s, lse, max_logit, entropy,
        row, real, sink, h, inverse_keep, DV, BLOCK_DV, FLAGS,
    )  # fmt: skip
