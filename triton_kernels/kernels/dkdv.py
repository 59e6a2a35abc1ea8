"""Backward, dK and dV: a program = BLOCK_N keys of a K/V head, over all query heads of its group.

    P = exp(S - LSE);  dP = keep / (1 - p) * (dO V^T);  dS = P * (dP - delta)
    dV = (keep / (1 - p) * P)^T dO;  dK = scale dS_raw^T Q, with dS_raw = dS * (1 - tanh^2)

With sigmoid weights dS = P (1 - P) dP.  P is computed again from LSE.  With dQ in a kernel of its
own (dq.py) there are 7 products in place of 5 and no atomics, so that the results are bitwise equal
from run to run.  `key_block` also serves the one pass of 5 products (fused.py), which adds dQ up.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.delta import sum_places, sums_of
from attn_ext.triton_kernels.kernels.dropout import (
    dropout_state,
    dropped,
    keep_each,
    keep_own,
)
from attn_ext.triton_kernels.kernels.logits import (
    alibi_slope,
    is_steep,
    row_distance,
    tile_logits,
)
from attn_ext.triton_kernels.kernels.present import outer_present, product_each
from attn_ext.triton_kernels.kernels.primitives import (
    ALIBI,
    BIAS,
    DROPOUT,
    GROUPED,
    MASK,
    OLD_TRITON,
    RELATIVE,
    RUNTIME,
    STREAM,
    block_of,
    careful_flags,
    careful_rows_at_once,
    diagonal,
    dot,
    has_wgmma,
    head_rows,
    load_each,
    load_rows,
    load_tile,
    load_whole,
    nan_count,
    own_key_order,
    query_range,
    register_factor,
    row_pointers,
    several,
    store_tile,
    streamed_dot,
    tile_pointers,
    tile_step,
    unknown_zero,
)
from attn_ext.triton_kernels.kernels.scores import (
    probabilities,
    score_gradient,
    tile_probabilities,
)
from attn_ext.triton_kernels.kernels.softmax import unit


@triton.jit
def row_values(lse2, delta, i, seqlen_q, EDGE: tl.constexpr):
    """(LSE in base 2, delta) of queries i; inf, where P = 0, and 0 past the last one."""
    if EDGE:
        row_lse = tl.load(lse2 + i, mask=i < seqlen_q, other=float("inf"))
        row_delta = tl.load(delta + i, mask=i < seqlen_q, other=0.0)
    else:
        row_lse, row_delta = tl.load(lse2 + i), tl.load(delta + i)
    return row_lse, row_delta


@triton.jit
def key_gradient_tiles(
    dk, dv, k, v, qdo, rows, sums, c, b, h, j_first, seqlen_q, seqlen_k, off, terms, rng, scale,
    left, right, first, skip_from, skip, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Adds query tiles first..end - 1 of head h, less `skip` from `skip_from` on.  Scores are
    transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands as they are.  sums: None,
    or (those of dQ, to which these keys' share is added, K as it was loaded)."""
    q, q_s, do, do_s = qdo
    lse2, delta = rows
    ADVANCE: tl.constexpr = not (EDGE or (STREAM & FLAGS))  # as in fwd.py
    if ADVANCE:
        q_at = tile_pointers(q, q_s, first * BLOCK_M, BLOCK_M, BLOCK_D, FLAGS)
        do_at = tile_pointers(do, do_s, first * BLOCK_M, BLOCK_M, BLOCK_DV, FLAGS)
    # on sm_90 pointers that move spill more with several options, and with Triton 3.6
    MOVES: tl.constexpr = ADVANCE and not (has_wgmma() and (OLD_TRITON or several(FLAGS)))
    if MOVES:
        row = first * BLOCK_M + tl.arange(0, BLOCK_M)
        lse_at, delta_at = lse2 + row, delta + row
    slope = 0.0
    if ALIBI & FLAGS:
        slope = alibi_slope(b, h, terms, scale, FLAGS)
    OWN: tl.constexpr = (~RELATIVE & FLAGS) if EDGE else FLAGS
    factor, _shift = unit(terms, scale, FLAGS)
    if sums is not None:
        start = first
        if EDGE:
            start = tl.where(first < skip_from, first, first + skip)
        dq_sums, k_loaded = sums
        sums_at = dq_sums + start.to(tl.int64) * (BLOCK_M * BLOCK_D)
    for step in tl.range(first, end - skip):
        m_block = step
        if EDGE:
            m_block = tl.where(step < skip_from, step, step + skip)
        i_first = m_block * BLOCK_M
        i = i_first + tl.arange(0, BLOCK_M)
        # S^T = K @ Q^T   [BLOCK_N, BLOCK_M]
        zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if STREAM & FLAGS:
            q_rows = row_pointers(q, q_s, i_first, seqlen_q, BLOCK_M)
            kq = streamed_dot(k, q_rows, zero, D, BLOCK_D)
        else:
            if ADVANCE:
                q_tile = load_whole(q_at, D, BLOCK_D)
                q_at += tile_step(q_s, BLOCK_M, FLAGS)
            else:
                q_tile = load_tile(q, q_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
            kq = dot(k, tl.trans(q_tile), zero)
        r = tl.arange(0, BLOCK_M)[None, :]
        s, cap = tile_logits(
            kq, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
            EDGE, OWN, not EDGE, slope,
        )  # fmt: skip
        behind = 0.0
        if RELATIVE & OWN:
            behind = slope * factor * row_distance(
                i_first, j_first, b, seqlen_q, seqlen_k, terms, BLOCK_M, FLAGS
            )[None, :]  # fmt: skip
        if MOVES:
            row_lse, row_delta = tl.load(lse_at), tl.load(delta_at)
            lse_at += BLOCK_M
            delta_at += BLOCK_M
        else:
            row_lse, row_delta = row_values(lse2, delta, i, seqlen_q, EDGE)
        p = tile_probabilities(s, row_lse[None, :], terms, scale, False, OWN, behind)
        # dV += P^T @ dO   [BLOCK_N, BLOCK_DV];  dP^T = V @ dO^T   [BLOCK_N, BLOCK_M]
        if STREAM & FLAGS:
            do_rows = row_pointers(do, do_s, i_first, seqlen_q, BLOCK_M)
            dp = streamed_dot(v, do_rows, zero, DV, BLOCK_DV)
        else:
            if ADVANCE:
                do_tile = load_whole(do_at, DV, BLOCK_DV)
                do_at += tile_step(do_s, BLOCK_M, FLAGS)
            else:
                do_tile = load_tile(do, do_s, i_first, seqlen_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
            dp = dot(v, tl.trans(do_tile), zero)
        used = p
        if DROPOUT & FLAGS:
            kept = keep_own(i[None, :], j_first, b, h, terms, rng, BLOCK_N, FLAGS)
            used = dropped(p, kept, rng)
            dp = tl.where(kept, dp, 0.0) * rng[3]  # and less delta: one multiply-add
        if STREAM & FLAGS:
            tl.debug_barrier()  # no hazard: keeps this read from moving up, into more registers
            do_tile = load_rows(do_rows, DV, BLOCK_DV)
        dv = dot(used, do_tile, dv)
        # dK += dS^T @ Q   [BLOCK_N, BLOCK_D]
        _, ds = score_gradient(p, dp, row_delta[None, :], cap, False, FLAGS)
        if STREAM & FLAGS:
            tl.debug_barrier()
            q_tile = load_rows(q_rows, D, BLOCK_D)
        if sums is None:
            dk = dot(ds, q_tile, dk)
        else:
            ds = ds.to(k.dtype)  # of which both products are; transposed, it is half as much
            dk = dot(ds, q_tile, dk)
            # dQ += dS @ K   [BLOCK_M, BLOCK_D], as programs of other keys do
            dq = dot(tl.trans(ds), k_loaded, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
            tl.atomic_add(sums_at + sum_places(BLOCK_M, BLOCK_D), dq, sem="relaxed")
            # not from i_first: Triton takes products whose addresses share a number for a chain,
            # and gives all of them the arrangement of warps that suits dQ
            sums_at += BLOCK_M * BLOCK_D
            if EDGE:
                skipped = tl.where(step + 1 == skip_from, skip, 0)
                sums_at += skipped.to(tl.int64) * (BLOCK_M * BLOCK_D)
    return dk, dv


@triton.jit
def careful_key_gradients(
    dk, dv, k, v, qdo, rows, c, b, h, j_first, seqlen_q, seqlen_k, off, terms, rng, scale, left,
    right, i_first, i_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`key_gradient_tiles` of queries i_first..i_end - 1, one by one, with sums that skip excluded
    pairs."""
    q, q_s, do, do_s = qdo
    lse2, delta = rows
    r = tl.arange(0, 1)[None, :]
    for step in tl.range(0, i_end - i_first, num_stages=1):
        i = i_first + step
        q_row = load_each(q, q_s, i, 0, 0, D, BLOCK_N, BLOCK_D, FLAGS)
        s, cap = tile_logits(
            product_each(k, q_row), i, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale,
            left, right, True, FLAGS,
        )  # fmt: skip
        p = probabilities(s, tl.load(lse2 + i), True, FLAGS)
        do_row = load_each(do, do_s, i, 0, 0, DV, BLOCK_N, BLOCK_DV, FLAGS)
        dp = product_each(v, do_row)
        used = p
        if DROPOUT & FLAGS:
            kept = keep_each(i + r, j_first + c, b, h, terms, rng, FLAGS)
            used = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp * rng[3], 0.0)
        dv += outer_present(used, do_row)
        _, ds = score_gradient(p, dp, tl.load(delta + i), cap, True, FLAGS)
        dk += outer_present(ds, q_row)
    return dk, dv


@triton.jit
def key_gradients(
    k, v, pointers, strides, sums, c, b, hk, j_first, q_first, seqlen_q, seqlen_k, group, terms,
    rng, scale, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAREFUL: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dK and dV of the keys j_first + c over the group's query heads and the queries that see
    them."""
    q, do, lse2, delta = pointers
    q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h = strides
    off = diagonal(b, seqlen_q, seqlen_k, terms, FLAGS)
    j_last = tl.minimum(j_first + BLOCK_N, seqlen_k) - 1
    first, full_first, full_end, end = query_range(
        j_first, j_last, seqlen_q, off, left, right, BLOCK_M, FLAGS
    )
    if (MASK & FLAGS) or (BIAS & FLAGS):
        # Tiles with keys past the last one count as cut, so that whole ones load vectors
        full_end = tl.where(j_first + BLOCK_N > seqlen_k, full_first, full_end)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    members = group if (GROUPED & FLAGS) else 1
    for member in range(0, members):
        h = hk * group + member
        qdo = (q + b * q_b + h * q_h + q_first * q_s, q_s,
               do + b * do_b + h * do_h + q_first * do_s, do_s)  # fmt: skip
        row = b * lse_b + h * lse_h + q_first
        rows = (lse2 + row, delta + row)
        dq_sums = None
        if sums is not None:
            sum, sums_b, sums_h, k_loaded = sums
            of_head = sums_of(sum, b, h, q_first, sums_b, sums_h, BLOCK_D, FLAGS)
            dq_sums = (of_head, k_loaded)
        whole_end = full_end
        if RELATIVE & FLAGS:
            whole_end = tl.where(is_steep(b, h, terms), full_first, full_end)
        if CAREFUL:
            dk, dv = careful_key_gradients(
                dk, dv, k, v, qdo, rows, c, b, h, j_first, seqlen_q, seqlen_k, off, terms, rng,
                scale, left, right, first * BLOCK_M, tl.minimum(end * BLOCK_M, seqlen_q),
                D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
            )  # fmt: skip
        else:  # the cut tiles first: what their loop needs is not held through the other
            dk, dv = key_gradient_tiles(
                dk, dv, k, v, qdo, rows, dq_sums, c, b, h, j_first, seqlen_q, seqlen_k, off, terms,
                rng, scale, left, right, first, full_first, whole_end - full_first, end,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, FLAGS,
            )  # fmt: skip
            dk, dv = key_gradient_tiles(
                dk, dv, k, v, qdo, rows, dq_sums, c, b, h, j_first, seqlen_q, seqlen_k, off, terms,
                rng, scale, left, right, full_first, full_first, 0, whole_end,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, FLAGS,
            )  # fmt: skip
    return dk, dv


@triton.jit
def store_key_gradients(
    dk, dv, ends, j_first, seqlen_k, D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr, order=None,
):  # fmt: skip
    """Write dK and dV of keys j_first, ..., or in that order, with the factors that the loops leave
    out."""
    dk_rows, dk_s, dv_rows, dv_s, softmax_scale, inverse_keep = ends
    if DROPOUT & FLAGS:
        dv = dv * inverse_keep
    dk = dk * softmax_scale
    store_tile(dv_rows, dv_s, j_first, seqlen_k, dv, DV, BLOCK_N, BLOCK_DV, FLAGS, order)
    store_tile(dk_rows, dk_s, j_first, seqlen_k, dk, D, BLOCK_N, BLOCK_D, FLAGS, order)


@triton.jit
def key_block(
    inputs, grads, sums, terms, rng_state, cu_seqlens, strides, key_strides, grad_strides, sizes,
    numbers,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """A program of `dkdv_kernel`, and with (sums of dQ, their strides of batch and head) one of
    `fused_kernel`."""
    q, k, v, dout, lse2, delta = inputs
    dk, dv = grads
    cu_seqlens_q, cu_seqlens_k = cu_seqlens
    k_b, k_h, k_s, v_b, v_h, v_s = key_strides
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s = grad_strides
    heads_q, group, _total_q, _total_k, _seqlen_q, _seqlen_k, _blocks = sizes
    scale, threshold, inverse_keep, left, right, softmax_scale = numbers
    block, hk, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, 0, sizes, heads_q // group, FLAGS
    )
    j_first = block * BLOCK_N
    if j_first >= length_k:
        return
    b, hk = b.to(tl.int64), hk.to(tl.int64)
    rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
    pointers = (q, dout, lse2, delta)
    k_rows = head_rows(k, b, hk, k_first, k_b, k_h, k_s)
    v_rows = head_rows(v, b, hk, k_first, v_b, v_h, v_s)
    order = own_key_order(BLOCK_N, FLAGS)
    if STREAM & FLAGS:
        k_tile = row_pointers(k_rows, k_s, j_first, length_k, BLOCK_N, order)
        v_tile = row_pointers(v_rows, v_s, j_first, length_k, BLOCK_N, order)
    else:
        k_tile = load_tile(k_rows, k_s, j_first, length_k, D, BLOCK_N, BLOCK_D, True, FLAGS, order)
        v_tile = load_tile(
            v_rows, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS, order
        )
        if sums is not None:
            sums = (sums[0], sums[1], sums[2], k_tile)
        k_tile, v_tile = register_factor(k_tile, FLAGS), register_factor(v_tile, FLAGS)
    c = order[:, None]
    dk_tile, dv_tile = key_gradients(
        k_tile, v_tile, pointers, strides, sums, c, b, hk, j_first, q_first, length_q, length_k,
        group, terms, rng, scale, left, right,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, FLAGS,
    )  # fmt: skip
    bad = nan_count(dk_tile) + nan_count(dv_tile)
    zero = unknown_zero(bad)
    b, hk, k_first, j_first = b + zero, hk + zero, k_first + zero, j_first + zero
    dk_rows = head_rows(dk, b, hk, k_first, dk_b, dk_h, dk_s)
    dv_rows = head_rows(dv, b, hk, k_first, dv_b, dv_h, dv_s)
    ends = (dk_rows, dk_s, dv_rows, dv_s, softmax_scale, inverse_keep)
    if bad > 0:  # each way stores its own result, as in fwd.py
        k_rows = head_rows(k, b, hk, k_first, k_b, k_h, k_s)
        v_rows = head_rows(v, b, hk, k_first, v_b, v_h, v_s)
        ROWS: tl.constexpr = careful_rows_at_once(BLOCK_N, 4096 // (BLOCK_D + BLOCK_DV))
        part_c = tl.arange(0, ROWS)[:, None]
        for part in tl.range(0, BLOCK_N // ROWS, num_stages=1):
            row = j_first + part * ROWS
            part_k = load_tile(k_rows, k_s, row, length_k, D, ROWS, BLOCK_D, True, FLAGS)
            part_v = load_tile(v_rows, v_s, row, length_k, DV, ROWS, BLOCK_DV, True, FLAGS)
            part_dk, part_dv = key_gradients(
                part_k, part_v, pointers, strides, None, part_c, b, hk, row, q_first, length_q,
                length_k, group, terms, rng, scale, left, right,
                D, DV, BLOCK_M, ROWS, BLOCK_D, BLOCK_DV, True, careful_flags(FLAGS),
            )  # fmt: skip
            store_key_gradients(
                part_dk, part_dv, ends, row, length_k, D, DV, ROWS, BLOCK_D, BLOCK_DV, FLAGS
            )
    else:
        store_key_gradients(
            dk_tile, dv_tile, ends, j_first, length_k, D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
            order,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def dkdv_kernel(
    q, k, v, dout, lse2, delta, dk, dv,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys * Hk * B).  dK, dV [B, Hk, Sk, D | Dv]."""
    key_block(
        (q, k, v, dout, lse2, delta), (dk, dv), None, terms, rng_state,
        (cu_seqlens_q, cu_seqlens_k), (q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h),
        (k_b, k_h, k_s, v_b, v_h, v_s), (dk_b, dk_h, dk_s, dv_b, dv_h, dv_s),
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks),
        (scale, threshold, inverse_keep, left, right, softmax_scale),
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
    )  # fmt: skip
