"""Additive attention (arXiv 1409.0473), forward and backward: O = softmax(S) V with
s_ij = w . tanh(q_i + k_j); q and k are projected already.

Q [B, Hq, Sq, D], K [B, Hk, Sk, D], V [B, Hk, Sk, Dv], w float32 [Hq, D]; varlen: [total, H, D].
The [Sq, Sk, D] tensor of tanh never exists: a program walks over the columns d of its tile,
r = 1 / (1 + exp(2 (q_id + k_jd))) is [BLOCK_M, BLOCK_N] in registers, and with it

    tanh = 1 - 2 r;   tanh' = 4 r (1 - r);   S = sum_d w_d (1 - 2 r)
    dQ_id = sum_j dS_ij 4 r (1 - r) w_d;   dK alike over i;   dw_d = sum_ij dS_ij (1 - 2 r)

A pair whose dS is 0 adds nothing, whatever w is: w stands in the sums, not before them.

Forward and dQ (with dw and dbias): one program = BLOCK_M queries of one head.  dK and dV: one
program = BLOCK_N keys of one K/V head.  Column d of a gradient is added to its tile [BLOCK, D] as
an outer product with the d-th unit vector: sums stay in registers, in a fixed order.  Exponentials
are the bottleneck, so every product of matrices may take the way that skips excluded NaN.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import dropout_state, keep
from attn_ext.triton_kernels.kernels.logits import logits
from attn_ext.triton_kernels.kernels.present import dot_present
from attn_ext.triton_kernels.kernels.primitives import (
    DBIAS_ADD,
    DBIAS_STORE,
    DROPOUT,
    RUNTIME,
    block_of,
    diagonal,
    dot,
    key_range,
    load_tile,
    query_range,
    store_tile,
    sum_of_products,
)
from attn_ext.triton_kernels.kernels.scores import (
    add_dbias,
    base2_lse,
    probabilities,
    score_gradient,
)
from attn_ext.triton_kernels.kernels.softmax import online_softmax, row_ends

TWICE_LOG2E = tl.constexpr(2.8853900817779268)


@triton.jit
def column(base, offsets, d, inside):
    """Numbers d of the rows at `offsets`, float32 [BLOCK]; 0 outside."""
    return tl.load(base + offsets + d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def half_complement(q_column, k_column):
    """r = (1 - tanh(q + k)) / 2   [BLOCK_M, BLOCK_N]"""
    return 1.0 / (1.0 + tl.exp2((q_column[:, None] + k_column[None, :]) * TWICE_LOG2E))


@triton.jit
def additive_scores(q, q_rows, q_in, k, k_rows, k_in, w, D: tl.constexpr):
    """S [BLOCK_M, BLOCK_N] of the rows at q + q_rows and k + k_rows."""
    acc = tl.zeros([q_rows.shape[0], k_rows.shape[0]], tl.float32)
    for d in range(0, D):
        r = half_complement(column(q, q_rows, d, q_in), column(k, k_rows, d, k_in))
        acc += tl.load(w + d) * (1.0 - 2.0 * r)
    return acc


@triton.jit(do_not_specialize=RUNTIME)
def additive_forward_kernel(
    q, k, v, w, out, lse,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k, seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, lse_b, lse_h,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B), the last ones first: with causal they are longest."""
    block, h, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, seqlens_k,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q, FLAGS,
    )  # fmt: skip
    i_first = (blocks - 1 - block) * BLOCK_M
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    hk = h // group
    q += b * q_b + h * q_h + q_first * q_s
    k += b * k_b + hk * k_h + k_first * k_s
    v += b * v_b + hk * v_h + k_first * v_s
    i = i_first + tl.arange(0, BLOCK_M)
    q_rows, q_in = i.to(tl.int64) * q_s, i < length_q
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    first, _inner, _inner_end, end = key_range(
        i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
    )
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    row_max, e, bad = row_sum - float("inf"), row_sum, row_sum
    for n_block in tl.range(first, end, num_stages=1):
        j_first = n_block * BLOCK_N
        j = j_first + tl.arange(0, BLOCK_N)
        # S   [BLOCK_M, BLOCK_N]
        k_rows = j.to(tl.int64) * k_s
        s = additive_scores(q, q_rows, q_in, k, k_rows, j < length_k, w + h * D, D)
        s, _cap = logits(
            s, i[:, None], j[None, :], b, h, length_q, length_k, off, terms, scale, left, right,
            True, FLAGS,
        )  # fmt: skip
        p, alpha, row_max, row_sum, e, bad = online_softmax(
            s, scale, row_max, row_sum, e, bad, FLAGS
        )
        if DROPOUT & FLAGS:
            rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
            p = tl.where(keep(i[:, None], j_first, b, h, terms, rng, BLOCK_N, FLAGS), p, 0.0)
        # O = alpha * O + P @ V   [BLOCK_M, BLOCK_DV]
        v_tile = load_tile(v, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
        acc = dot_present(p, v_tile, acc * alpha[:, None], False)
    factor, row_lse, _, _ = row_ends(row_max, row_sum, e, bad, sink, h, FLAGS)
    o = acc * (factor * inverse_keep)[:, None]
    o_rows = out + b * o_b + h * o_h + q_first * o_s
    store_tile(o_rows, o_s, i_first, length_q, o, DV, BLOCK_M, BLOCK_DV, FLAGS)
    tl.store(lse + b * lse_b + h * lse_h + q_first + i, row_lse, mask=q_in)


@triton.jit
def pair_gradients(
    s, dp, row_lse, row_delta, i, j, j_first, b, h, seqlen_q, seqlen_k, off, terms, rng_state,
    threshold, inverse_keep, scale, left, right, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """(P that dropout keeps, dS) of a tile of scores S and dP = dO V^T   [BLOCK_M, BLOCK_N]"""
    s, cap = logits(
        s, i[:, None], j[None, :], b, h, seqlen_q, seqlen_k, off, terms, scale, left, right, True,
        FLAGS,
    )  # fmt: skip
    p = probabilities(s, row_lse[:, None], True, FLAGS)
    used = p
    if DROPOUT & FLAGS:
        rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
        kept = keep(i[:, None], j_first, b, h, terms, rng, BLOCK_N, FLAGS)
        used = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * inverse_keep, 0.0)
    ds, _ = score_gradient(p, dp, row_delta[:, None], cap, True, FLAGS)
    return used, ds


@triton.jit(do_not_specialize=RUNTIME)
def additive_dkdv_kernel(
    q, k, v, w, dout, lse, delta, dk, dv,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k, seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys * Hk * B).  dK, dV [B, Hk, Sk, D | Dv]."""
    block, hk, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, seqlens_k,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q // group, FLAGS,
    )  # fmt: skip
    j_first = block * BLOCK_N
    if j_first >= length_k:
        return
    b, hk = b.to(tl.int64), hk.to(tl.int64)
    k += b * k_b + hk * k_h + k_first * k_s
    v += b * v_b + hk * v_h + k_first * v_s
    v_tile = load_tile(v, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
    j = j_first + tl.arange(0, BLOCK_N)
    k_rows, k_in = j.to(tl.int64) * k_s, j < length_k
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    j_last = tl.minimum(j_first + BLOCK_N, length_k) - 1
    first, _inner, _inner_end, end = query_range(
        j_first, j_last, length_q, off, left, right, BLOCK_M, FLAGS
    )
    columns = tl.arange(0, BLOCK_D)[None, :]
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        h = hk * group + member
        q_head = q + b * q_b + h * q_h + q_first * q_s
        do_head = dout + b * do_b + h * do_h + q_first * do_s
        row = b * lse_b + h * lse_h + q_first
        for m_block in tl.range(first, end, num_stages=1):
            i_first = m_block * BLOCK_M
            i = i_first + tl.arange(0, BLOCK_M)
            q_rows, q_in = i.to(tl.int64) * q_s, i < length_q
            s = additive_scores(q_head, q_rows, q_in, k, k_rows, k_in, w + h * D, D)
            do_tile = load_tile(do_head, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True,
                                FLAGS)  # fmt: skip
            dp = dot(do_tile, tl.trans(v_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
            row_lse = base2_lse(lse, row + i, q_in)
            row_delta = tl.load(delta + row + i, mask=q_in, other=0.0)
            used, ds = pair_gradients(
                s, dp, row_lse, row_delta, i, j, j_first, b, h, length_q, length_k, off, terms,
                rng_state, threshold, inverse_keep, scale, left, right, BLOCK_N, FLAGS,
            )  # fmt: skip
            # dV += P^T @ dO   [BLOCK_N, BLOCK_DV]
            dv_tile = dot_present(tl.trans(used), do_tile, dv_tile, False)
            # dK_jd += sum_i dS 4 r (1 - r) w_d   [BLOCK_N, BLOCK_D]
            for d in range(0, D):
                r = half_complement(column(q_head, q_rows, d, q_in), column(k, k_rows, d, k_in))
                slope = ds * r * (4.0 - 4.0 * r) * tl.load(w + h * D + d)
                slope = tl.where(ds != 0, slope, 0.0)  # r may be NaN, and w, where dS is 0
                dk_tile += tl.where(columns == d, tl.sum(slope, 0)[:, None], 0.0)
    if DROPOUT & FLAGS:
        dv_tile = dv_tile * inverse_keep
    dk_rows = dk + b * dk_b + hk * dk_h + k_first * dk_s
    dv_rows = dv + b * dv_b + hk * dv_h + k_first * dv_s
    store_tile(dv_rows, dv_s, j_first, length_k, dv_tile, DV, BLOCK_N, BLOCK_DV, FLAGS)
    store_tile(dk_rows, dk_s, j_first, length_k, dk_tile, D, BLOCK_N, BLOCK_D, FLAGS)


@triton.jit(do_not_specialize=RUNTIME)
def additive_dq_kernel(
    q, k, v, w, dout, lse, delta, dq, dw, dbias,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k, seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dq_b, dq_h, dq_s, g_b, g_h, g_q, g_k,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  dQ [B, Hq, Sq, D]; dw float32 [B, Hq, blocks, D], which
    the caller sums; dbias float32, zero before."""
    block, h, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, seqlens_k,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q, FLAGS,
    )  # fmt: skip
    i_first = block * BLOCK_M
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    hk = h // group
    q += b * q_b + h * q_h + q_first * q_s
    k += b * k_b + hk * k_h + k_first * k_s
    v += b * v_b + hk * v_h + k_first * v_s
    i = i_first + tl.arange(0, BLOCK_M)
    q_rows, q_in = i.to(tl.int64) * q_s, i < length_q
    do_head = dout + b * do_b + h * do_h + q_first * do_s
    do_tile = load_tile(do_head, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
    row = b * lse_b + h * lse_h + q_first + i
    row_lse = base2_lse(lse, row, q_in)
    row_delta = tl.load(delta + row, mask=q_in, other=0.0)
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    first, _inner, _inner_end, end = key_range(
        i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
    )
    columns = tl.arange(0, BLOCK_D)
    dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dw_row = tl.zeros([BLOCK_D], tl.float32)
    for n_block in tl.range(first, end, num_stages=1):
        j_first = n_block * BLOCK_N
        j = j_first + tl.arange(0, BLOCK_N)
        k_rows, k_in = j.to(tl.int64) * k_s, j < length_k
        s = additive_scores(q, q_rows, q_in, k, k_rows, k_in, w + h * D, D)
        v_tile = load_tile(v, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
        dp = dot(do_tile, tl.trans(v_tile), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        _used, ds = pair_gradients(
            s, dp, row_lse, row_delta, i, j, j_first, b, h, length_q, length_k, off, terms,
            rng_state, threshold, inverse_keep, scale, left, right, BLOCK_N, FLAGS,
        )  # fmt: skip
        if (DBIAS_STORE & FLAGS) or (DBIAS_ADD & FLAGS):
            grad = (dbias, g_b, g_h, g_q, g_k)
            add_dbias(ds, i[:, None], j[None, :], b, h, length_q, length_k, grad, FLAGS)
        # dQ_id += sum_j dS 4 r (1 - r) w_d   [BLOCK_M, BLOCK_D];  dw_d += sum_ij dS (1 - 2 r)
        for d in range(0, D):
            r = half_complement(column(q, q_rows, d, q_in), column(k, k_rows, d, k_in))
            r = tl.where(ds != 0, r, 0.0)  # r may be NaN where dS is 0
            weight = tl.where(ds != 0, tl.load(w + h * D + d), 0.0)  # and w may be infinite
            total = sum_of_products(ds * r * (4.0 - 4.0 * r), weight)
            dq_tile += tl.where(columns[None, :] == d, total[:, None], 0.0)
            dw_row += tl.where(columns == d, tl.sum(sum_of_products(ds, 1.0 - 2.0 * r), 0), 0.0)
    dq_rows = dq + b * dq_b + h * dq_h + q_first * dq_s
    store_tile(dq_rows, dq_s, i_first, length_q, dq_tile, D, BLOCK_M, BLOCK_D, FLAGS)
    place = ((b * heads_q + h) * blocks + block) * D
    tl.store(dw + place + columns, dw_row, mask=columns < D)
