"""Backward: preprocess, dK and dV, dQ (and dbias), each P computed again from LSE.

    delta = rowsum(dO * O) - dLSE
    P = exp(S - LSE);  dP = keep / (1 - p) * (dO V^T);  dS = P * (dP - delta);  dbias = dS
    dV = (keep / (1 - p) * P)^T dO;  dS_raw = dS * (1 - tanh^2);  dQ = scale dS_raw K
    dK = scale dS_raw^T Q;  with sigmoid weights dS = P (1 - P) dP

Two passes, 7 products instead of 5: no atomics, so the results are bitwise equal from run to run.
dK and dV: a program = BLOCK_N keys of a K/V head, all heads of its group; dQ: BLOCK_M queries.
The functions of a block of keys also serve the one pass of 5 products (fused.py), which adds dQ up.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import (
    dropout_state,
    dropped,
    keep_each,
    keep_ordered,
    keep_own,
)
from attn_ext.triton_kernels.kernels.present import outer_present, product_each
from attn_ext.triton_kernels.kernels.primitives import (
    ALIBI,
    BIAS,
    DBIAS_ADD,
    DBIAS_STORE,
    DROPOUT,
    GROUPED,
    MASK,
    STREAM,
    SUM_ROWS,
    VARLEN,
    alibi_slope,
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
    own_key_order,
    program,
    query_range,
    row_pointers,
    sequence,
    sequences,
    store_tile,
    streamed_dot,
    sum_of_products,
    tile_logits,
    tile_pointers,
    tile_step,
    unknown_zero,
)
from attn_ext.triton_kernels.kernels.scores import (
    add_dbias,
    near_lse,
    probabilities,
    score_gradient,
)

RUNTIME = (
    "heads_q", "group", "total_q", "total_k", "seqlen_q", "seqlen_k", "blocks", "threshold",
    "left", "right",
)  # fmt: skip


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
    transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands as they are.  sums: of
    dQ, to which these keys' share is added, or None."""
    q, q_s, do, do_s = qdo
    lse2, delta = rows
    ADVANCE: tl.constexpr = not (EDGE or (STREAM & FLAGS))  # as in fwd.py
    if ADVANCE:
        q_at = tile_pointers(q, q_s, first * BLOCK_M, BLOCK_M, BLOCK_D, FLAGS)
        do_at = tile_pointers(do, do_s, first * BLOCK_M, BLOCK_M, BLOCK_DV, FLAGS)
    slope = 0.0
    if ALIBI & FLAGS:
        slope = alibi_slope(b, h, terms, scale, FLAGS)
    if sums is not None:
        start = first
        if EDGE:
            start = tl.where(first < skip_from, first, first + skip)
        sums_at = sums + start.to(tl.int64) * (BLOCK_M * BLOCK_D)
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
            EDGE, FLAGS, not EDGE, slope,
        )  # fmt: skip
        row_lse, row_delta = row_values(lse2, delta, i, seqlen_q, EDGE)
        p = probabilities(s, row_lse[None, :], False, FLAGS)
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
            dp = tl.where(kept, dp * rng[3], 0.0)
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
            dq = dot(tl.trans(ds), k, tl.zeros([BLOCK_M, BLOCK_D], tl.float32))
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
            sum, sums_b, sums_h = sums
            dq_sums = sums_of(sum, b, h, q_first, sums_b, sums_h, BLOCK_D, FLAGS)
        if CAREFUL:
            dk, dv = careful_key_gradients(
                dk, dv, k, v, qdo, rows, c, b, h, j_first, seqlen_q, seqlen_k, off, terms, rng,
                scale, left, right, first * BLOCK_M, tl.minimum(end * BLOCK_M, seqlen_q),
                D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
            )  # fmt: skip
        else:  # the cut tiles first: what their loop needs is not held through the other
            dk, dv = key_gradient_tiles(
                dk, dv, k, v, qdo, rows, dq_sums, c, b, h, j_first, seqlen_q, seqlen_k, off, terms,
                rng, scale, left, right, first, full_first, full_end - full_first, end,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, FLAGS,
            )  # fmt: skip
            dk, dv = key_gradient_tiles(
                dk, dv, k, v, qdo, rows, dq_sums, c, b, h, j_first, seqlen_q, seqlen_k, off, terms,
                rng, scale, left, right, full_first, full_first, 0, full_end,
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
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks = sizes
    scale, threshold, inverse_keep, left, right, softmax_scale = numbers
    block, hk, b = program(blocks, heads_q // group)
    j_first = block * BLOCK_N
    q_first, length_q, k_first, length_k = sequences(
        cu_seqlens_q, cu_seqlens_k, 0, b, total_q, total_k, seqlen_q, seqlen_k, FLAGS
    )
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
                D, DV, BLOCK_M, ROWS, BLOCK_D, BLOCK_DV, True, FLAGS,
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
    ADVANCE: tl.constexpr = not (EDGE or (STREAM & FLAGS))  # as in fwd.py
    if ADVANCE:
        k_at = tile_pointers(k, k_s, first * BLOCK_N, BLOCK_N, BLOCK_D, FLAGS, order)
        v_at = tile_pointers(v, v_s, first * BLOCK_N, BLOCK_N, BLOCK_DV, FLAGS, order)
    slope = 0.0
    if ALIBI & FLAGS:
        slope = alibi_slope(b, h, terms, scale, FLAGS)
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
            EDGE, FLAGS, not EDGE, slope,
        )  # fmt: skip
        p = probabilities(s, row_lse[:, None], DBIAS, FLAGS)
        if STREAM & FLAGS:
            v_rows = row_pointers(v, v_s, j_first, seqlen_k, BLOCK_N, order)
            dp = streamed_dot(do, v_rows, zero, DV, BLOCK_DV)
        else:
            dp = dot(do, tl.trans(v_tile), zero)
        if DROPOUT & FLAGS:
            kept = keep_ordered(i_first + r, j_first, b, h, terms, rng, BLOCK_N, FLAGS)
            dp = tl.where(kept, dp * rng[3], 0.0)
        ds, raw = score_gradient(p, dp, row_delta[:, None], cap, DBIAS, FLAGS)
        if DBIAS:
            add_dbias(ds, i_first + r, j_first + c, b, h, seqlen_q, seqlen_k, grad, FLAGS)
        # dQ += dS @ K   [BLOCK_M, BLOCK_D]
        if STREAM & FLAGS:
            tl.debug_barrier()
            k_tile = load_rows(k_rows, D, BLOCK_D)
        dq = dot(raw, k_tile, dq)
    return dq


@triton.jit
def careful_query_gradients(
    dq, q, do, row_lse, row_delta, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, terms, rng,
    scale, left, right, j_first, j_end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`query_gradient_tiles` of keys j_first..j_end - 1, one by one, with sums that skip excluded
    pairs; dbias is not written again."""
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
        _, raw = score_gradient(p, dp, row_delta[:, None], cap, True, FLAGS)
        dq += outer_present(raw, k_row)
    return dq


@triton.jit
def careful_query_block(
    inputs, dq, strides, key_strides, zero, b, h, hk, i_first, q_first, k_first, length_q, length_k,
    off, terms, rng, scale, left, right, softmax_scale, j_first, j_end,
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
            i_part, part_r, b, h, length_q, length_k, off, terms, rng, scale, left, right, j_first,
            j_end, D, DV, ROWS, BLOCK_D, BLOCK_DV, FLAGS,
        )  # fmt: skip
        part_acc = part_acc * softmax_scale
        store_tile(dq_rows, dq_s, i_part, length_q, part_acc, D, ROWS, BLOCK_D, FLAGS)


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
    block, h, b = program(blocks, heads_q)
    i_first = (blocks - 1 - block) * BLOCK_M  # with causal the last are longest
    q_first, length_q, k_first, length_k = sequences(
        cu_seqlens_q, cu_seqlens_k, 0, b, total_q, total_k, seqlen_q, seqlen_k, FLAGS
    )
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
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # The cut tiles first, as above
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
    bad = nan_count(acc)
    query_strides = (q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h, dq_b, dq_h, dq_s)
    if bad > 0:  # each way stores its own result, as in fwd.py
        careful_query_block(
            (q, k, v, dout, lse2, delta), dq, query_strides, (k_b, k_h, k_s, v_b, v_h, v_s),
            unknown_zero(bad), b, h, hk, i_first, q_first, k_first, length_q, length_k, off, terms,
            rng, scale, left, right, softmax_scale, first * BLOCK_N,
            tl.minimum(end * BLOCK_N, length_k), D, DV, BLOCK_M, BLOCK_D, BLOCK_DV, FLAGS,
        )  # fmt: skip
    else:
        dq_rows = head_rows(dq, b, h, q_first, dq_b, dq_h, dq_s)
        acc = acc * softmax_scale
        store_tile(dq_rows, dq_s, i_first, length_q, acc, D, BLOCK_M, BLOCK_D, FLAGS)
