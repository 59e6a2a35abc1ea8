"""Backward, dQ: a program = BLOCK_M queries of a head, over the keys that they see; and dbias.

    dQ = scale dS_raw K;  dbias = dS, by stores, or by atomics where the bias is broadcast

P, dP and dS are those of dkdv.py, computed again.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import (
    dropout_state,
    keep_each,
    keep_ordered,
)
from attn_ext.triton_kernels.kernels.functions import byte_signs, only_seen
from attn_ext.triton_kernels.kernels.logits import (
    alibi_slope,
    is_steep,
    mask_words,
    row_distance,
    tile_logits,
)
from attn_ext.triton_kernels.kernels.present import outer_present, product_each
from attn_ext.triton_kernels.kernels.primitives import (
    ALIBI,
    DBIAS_ADD,
    DBIAS_STORE,
    DROPOUT,
    KEY_WORDS,
    MASK,
    MASK_ONE_QUERY,
    NATURAL,
    RELATIVE,
    RUNTIME,
    STREAM,
    block_of,
    careful_flags,
    careful_rows_at_once,
    diagonal,
    dot,
    head_rows,
    key_order,
    key_range,
    load_each,
    load_rows,
    load_tile,
    load_whole,
    nan_count,
    row_pointers,
    store_tile,
    streamed_dot,
    tile_pointers,
    tile_step,
    unknown_zero,
    without_mask,
)
from attn_ext.triton_kernels.kernels.scores import (
    add_dbias,
    add_whole_dbias,
    probabilities,
    score_gradient,
    tile_probabilities,
)
from attn_ext.triton_kernels.kernels.softmax import unit


@triton.constexpr_function
def clears(k, dbias: bool, flags: int) -> bool:
    """Whether `query_gradient_tiles` leaves the mask out of the logits, and clears dS by it."""
    words = int(flags) & KEY_WORDS.value and not int(flags) & MASK_ONE_QUERY.value
    sixteen = k.dtype.element_ty.primitive_bitwidth == 16
    return bool(int(flags) & MASK.value and words and sixteen and not dbias)


@triton.jit
def query_gradient_tiles(
    dq, q, do, row_lse, row_delta, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, terms, rng, grad,
    scale, left, right, first, skip_from, skip, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dq + dS K over key tiles first..end - 1, less `skip` from `skip_from` on; dbias if any."""
    k, k_s, v, v_s = kv
    order = key_order(BLOCK_N, FLAGS)
    DBIAS: tl.constexpr = (DBIAS_STORE & FLAGS) or (DBIAS_ADD & FLAGS)
    # What is added to dbias stays: 0 for excluded pairs, whatever they hold.  What is stored, the
    # careful way stores again, as NaN in dS is NaN in dQ.  In whole tiles with NATURAL a P of NaN
    # is that of an excluded pair, or of a far row, whose lse2 is inf, where a logit overflows in
    # base 2: inf - inf.  POSITIVE makes 0 of both; far.py adds what such a row's pairs have.
    CHECKED: tl.constexpr = (DBIAS_ADD & FLAGS) and (EDGE or not (NATURAL & FLAGS))
    POSITIVE: tl.constexpr = (DBIAS_ADD & FLAGS) and not CHECKED
    # The mask of words clears dS in 16 bits, two at a time, where nothing else takes dS or P
    CLEARS: tl.constexpr = clears(k, DBIAS, FLAGS)
    OWN: tl.constexpr = (~RELATIVE & FLAGS) if EDGE else FLAGS
    LOGITS: tl.constexpr = without_mask(OWN) if CLEARS else OWN
    ADVANCE: tl.constexpr = not (EDGE or (STREAM & FLAGS))  # as in fwd.py
    if ADVANCE:
        k_at = tile_pointers(k, k_s, first * BLOCK_N, BLOCK_N, BLOCK_D, FLAGS, order)
        v_at = tile_pointers(v, v_s, first * BLOCK_N, BLOCK_N, BLOCK_DV, FLAGS, order)
    slope = 0.0
    if ALIBI & FLAGS:
        slope = alibi_slope(b, h, terms, scale, FLAGS)
    factor, _shift = unit(terms, scale, FLAGS)
    for step in tl.range(first, end - skip):
        n_block = step
        if EDGE:
            n_block = tl.where(step < skip_from, step, step + skip)
        j_first = n_block * BLOCK_N
        # S = Q @ K^T, dP = dO @ V^T   [BLOCK_M, BLOCK_N]
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if STREAM & FLAGS:
            k_rows = row_pointers(k, k_s, j_first, seqlen_k, BLOCK_N, order)
            qk = streamed_dot(q, k_rows, zero, D, BLOCK_D)
        else:
            if ADVANCE:
                k_tile, v_tile = load_whole(k_at, D, BLOCK_D), load_whole(v_at, DV, BLOCK_DV)
                k_at += tile_step(k_s, BLOCK_N, FLAGS)
                v_at += tile_step(v_s, BLOCK_N, FLAGS)
            else:
                k_tile = load_tile(
                    k, k_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D, True, FLAGS, order
                )
                v_tile = load_tile(
                    v, v_s, j_first, seqlen_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS, order
                )
            qk = dot(q, tl.trans(k_tile), zero)
        c = order[None, :]
        s, cap = tile_logits(
            qk, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
            EDGE, LOGITS, not EDGE, slope,
        )  # fmt: skip
        behind = 0.0
        if RELATIVE & OWN:
            behind = slope * factor * row_distance(
                i_first, j_first, b, seqlen_q, seqlen_k, terms, BLOCK_M, FLAGS
            )[:, None]  # fmt: skip
        p = tile_probabilities(s, row_lse[:, None], terms, scale, CHECKED, OWN, behind)
        if STREAM & FLAGS:
            v_rows = row_pointers(v, v_s, j_first, seqlen_k, BLOCK_N, order)
            dp = streamed_dot(do, v_rows, zero, DV, BLOCK_DV)
        else:
            dp = dot(do, tl.trans(v_tile), zero)
        if DROPOUT & FLAGS:
            kept = keep_ordered(i_first + r, j_first, b, h, terms, rng, BLOCK_N, FLAGS)
            dp = tl.where(kept, dp, 0.0) * rng[3]  # and less delta: one multiply-add
        ds, raw = score_gradient(p, dp, row_delta[:, None], cap, CHECKED, FLAGS, POSITIVE)
        if CLEARS:
            words, place = mask_words(
                terms, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, not EDGE, FLAGS
            )
            raw = only_seen(raw.to(k_tile.dtype), byte_signs(words), place)
        if DBIAS and EDGE:
            add_dbias(ds, i_first + r, j_first + c, b, h, seqlen_q, seqlen_k, grad, FLAGS)
        elif DBIAS:
            add_whole_dbias(
                ds, i_first, j_first, b, h, seqlen_q, seqlen_k, grad, BLOCK_M, BLOCK_N, FLAGS
            )
        # dQ += dS @ K   [BLOCK_M, BLOCK_D]
        if STREAM & FLAGS:
            tl.debug_barrier()
            k_tile = load_rows(k_rows, D, BLOCK_D)
        dq = dot(raw, k_tile, dq)
    return dq


@triton.jit
def careful_query_gradients(
    dq, q, do, row_lse, row_delta, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, terms, rng,
    grad, scale, left, right, j_first, j_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`query_gradient_tiles` of keys j_first..j_end - 1, one by one, with sums that skip excluded
    pairs; a stored dbias is stored again."""
    k, k_s, v, v_s = kv
    c = tl.arange(0, 1)[None, :]
    for step in tl.range(0, j_end - j_first, num_stages=1):
        j = j_first + step
        k_row = load_each(k, k_s, j, 0, 0, D, BLOCK_M, BLOCK_D, FLAGS)
        v_row = load_each(v, v_s, j, 0, 0, DV, BLOCK_M, BLOCK_DV, FLAGS)
        s, cap = tile_logits(
            product_each(q, k_row), i_first, r, j, c, b, h, seqlen_q, seqlen_k, off, terms, scale,
            left, right, True, FLAGS,
        )  # fmt: skip
        p = probabilities(s, row_lse[:, None], True, FLAGS)
        dp = product_each(do, v_row)
        if DROPOUT & FLAGS:
            kept = keep_each(i_first + r, j + c, b, h, terms, rng, FLAGS)
            dp = tl.where(kept, dp * rng[3], 0.0)
        ds, raw = score_gradient(p, dp, row_delta[:, None], cap, True, FLAGS)
        if DBIAS_STORE & FLAGS:
            add_dbias(ds, i_first + r, j + c, b, h, seqlen_q, seqlen_k, grad, FLAGS)
        dq += outer_present(raw, k_row)
    return dq


@triton.jit
def careful_query_block(
    inputs, dq, grad, strides, key_strides, zero, b, h, hk, i_first, q_first, k_first, length_q,
    length_k, off, terms, rng, scale, left, right, softmax_scale, j_first, j_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Writes dQ of queries i_first, ..., by `careful_query_gradients` of keys j_first..j_end - 1;
    zero: `unknown_zero`."""
    q, k, v, dout, lse2, delta = inputs
    q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h, dq_b, dq_h, dq_s = strides
    k_b, k_h, k_s, v_b, v_h, v_s = key_strides
    b, h, hk, q_first, k_first = b + zero, h + zero, hk + zero, q_first + zero, k_first + zero
    q_rows = head_rows(q, b, h, q_first, q_b, q_h, q_s)
    do_rows = head_rows(dout, b, h, q_first, do_b, do_h, do_s)
    dq_rows = head_rows(dq, b, h, q_first, dq_b, dq_h, dq_s)
    kv = (head_rows(k, b, hk, k_first, k_b, k_h, k_s), k_s,
          head_rows(v, b, hk, k_first, v_b, v_h, v_s), v_s)  # fmt: skip
    ROWS: tl.constexpr = careful_rows_at_once(BLOCK_M, 8192 // (BLOCK_D + BLOCK_DV))
    part_r = tl.arange(0, ROWS)[:, None]
    for part in tl.range(0, BLOCK_M // ROWS, num_stages=1):
        i_part = i_first + zero + part * ROWS
        part_q = load_tile(q_rows, q_s, i_part, length_q, D, ROWS, BLOCK_D, True, FLAGS)
        part_do = load_tile(do_rows, do_s, i_part, length_q, DV, ROWS, BLOCK_DV, True, FLAGS)
        part_i = i_part + tl.arange(0, ROWS)
        part_row = b * lse_b + h * lse_h + q_first + part_i
        part_lse = tl.load(lse2 + part_row, mask=part_i < length_q, other=float("inf"))
        part_delta = tl.load(delta + part_row, mask=part_i < length_q, other=0.0)
        part_acc = careful_query_gradients(
            tl.zeros([ROWS, BLOCK_D], tl.float32), part_q, part_do, part_lse, part_delta, kv,
            i_part, part_r, b, h, length_q, length_k, off, terms, rng, grad, scale, left, right,
            j_first, j_end, D, DV, ROWS, BLOCK_D, BLOCK_DV, FLAGS,
        )  # fmt: skip
        part_acc = part_acc * softmax_scale
        store_tile(dq_rows, dq_s, i_part, length_q, part_acc, D, ROWS, BLOCK_D, FLAGS)


@triton.jit
def store_query_block(
    acc, bad, inputs, dq, grad, strides, key_strides, b, h, hk, i_first, q_first, k_first, length_q,
    length_k, terms, rng_state, numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Writes dQ of queries i_first, ...: acc, or where `bad` of its numbers are NaN by the careful
    way.  Each way stores its own result, as in fwd.py."""
    scale, threshold, inverse_keep, left, right, softmax_scale = numbers
    if bad > 0:
        if DBIAS_STORE & FLAGS:
            tl.debug_barrier()  # other threads than before store dbias again
        off = diagonal(b, length_q, length_k, terms, FLAGS)
        i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
        first, _full_first, _full_end, end = key_range(
            i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
        )
        careful_query_block(
            inputs, dq, grad, strides, key_strides, unknown_zero(bad), b, h, hk, i_first, q_first,
            k_first, length_q, length_k, off, terms,
            dropout_state(rng_state, threshold, inverse_keep, FLAGS), scale, left, right,
            softmax_scale, first * BLOCK_N, tl.minimum(end * BLOCK_N, length_k),
            D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, careful_flags(FLAGS),
        )  # fmt: skip
    else:
        _q_b, _q_h, _q_s, _do_b, _do_h, _do_s, _lse_b, _lse_h, dq_b, dq_h, dq_s = strides
        dq_rows = head_rows(dq, b, h, q_first, dq_b, dq_h, dq_s)
        acc = acc * softmax_scale
        store_tile(dq_rows, dq_s, i_first, length_q, acc, D, BLOCK_M, BLOCK_D, FLAGS)


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    q, k, v, dout, lse2, delta, dq, dbias,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dq_b, dq_h, dq_s, g_b, g_h, g_q, g_k,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  dQ [B, Hq, Sq, D]; dbias float32, zero before."""
    block, h, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, 0,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q, FLAGS,
    )  # fmt: skip
    i_first = (blocks - 1 - block) * BLOCK_M  # with causal the last are longest
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    hk = h // group
    rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
    grad = (dbias, g_b, g_h, g_q, g_k)
    kv = (head_rows(k, b, hk, k_first, k_b, k_h, k_s), k_s,
          head_rows(v, b, hk, k_first, v_b, v_h, v_s), v_s)  # fmt: skip
    q_rows = head_rows(q, b, h, q_first, q_b, q_h, q_s)
    do_rows = head_rows(dout, b, h, q_first, do_b, do_h, do_s)
    if STREAM & FLAGS:
        q_tile = row_pointers(q_rows, q_s, i_first, length_q, BLOCK_M)
        do_tile = row_pointers(do_rows, do_s, i_first, length_q, BLOCK_M)
    else:
        q_tile = load_tile(q_rows, q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
        do_tile = load_tile(do_rows, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
    i = i_first + tl.arange(0, BLOCK_M)
    row = b * lse_b + h * lse_h + q_first + i
    row_lse = tl.load(lse2 + row, mask=i < length_q, other=float("inf"))
    row_delta = tl.load(delta + row, mask=i < length_q, other=0.0)
    r = tl.arange(0, BLOCK_M)[:, None]
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    first, full_first, full_end, end = key_range(
        i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
    )
    if (DBIAS_ADD & FLAGS) and (NATURAL & FLAGS):
        # Pairs that are not excluded may have a P of NaN in rows without LSE: no tile is whole
        lost = tl.sum(tl.where(row_lse != row_lse, 1, 0), 0)
        full_end = tl.where(lost > 0, full_first, full_end)
    if RELATIVE & FLAGS:
        full_end = tl.where(is_steep(b, h, terms), full_first, full_end)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The cut tiles first, as in dkdv.py
    acc = query_gradient_tiles(
        acc, q_tile, do_tile, row_lse, row_delta, kv, i_first, r, b, h, length_q, length_k, off,
        terms, rng, grad, scale, left, right, first, full_first, full_end - full_first, end,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, FLAGS,
    )  # fmt: skip
    acc = query_gradient_tiles(
        acc, q_tile, do_tile, row_lse, row_delta, kv, i_first, r, b, h, length_q, length_k, off,
        terms, rng, grad, scale, left, right, full_first, full_first, 0, full_end,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, FLAGS,
    )  # fmt: skip
    store_query_block(
        acc, nan_count(acc), (q, k, v, dout, lse2, delta), dq, grad,
        (q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h, dq_b, dq_h, dq_s),
        (k_b, k_h, k_s, v_b, v_h, v_s), b, h, hk, i_first, q_first, k_first, length_q, length_k,
        terms, rng_state, (scale, threshold, inverse_keep, left, right, softmax_scale),
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
    )  # fmt: skip
