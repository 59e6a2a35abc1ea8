"""T2, the tangent of the backward: dQ', dK', dV' and dbias', given L' and O' of T1.

With ' the tangent, t the logit, z = scale q.k, c = t' - L', M dropout's factor, G = dO, lam = dLSE,
and of each row D = G.O - lam and D' = G'.O + G.O' - lam':

    dT = P (M dP - D)          dT' = P [c (M dP - D) + M dP' - D']
    dZ = g' dT                 dZ' = g' dT' + g'' z' dT        g', g'': softcap's derivatives
    dQ' = scale (dZ' K + dZ K')             dK' = scale (dZ'^T Q + dZ^T Q')
    dV' = (P M c)^T G + (P M)^T G'          dbias' = dT'

Three launches: D and D' of each row; dK' and dV', a program = BLOCK_N keys of a K/V head, all heads
of its group; dQ' and dbias', a program = BLOCK_M queries.  No atomics but for a broadcast bias.
Inputs hold no NaN and no infinity, and LSE is near 0, which the launcher makes sure of.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import dropout_state, keep
from attn_ext.triton_kernels.kernels.logits import tile_logits
from attn_ext.triton_kernels.kernels.primitives import (
    DBIAS_ADD,
    DBIAS_STORE,
    DROPOUT,
    GROUPED,
    RUNTIME,
    SOFTCAP,
    block_of,
    diagonal,
    dot,
    key_range,
    load_tile,
    program,
    query_range,
    sequence,
    store_tile,
    sum_of_products,
)
from attn_ext.triton_kernels.kernels.scores import add_dbias, base2_lse, probabilities
from attn_ext.triton_kernels.kernels.tangent import (
    MOVED_DOUT,
    MOVED_K,
    MOVED_Q,
    MOVED_V,
    key_products,
    logit_tangents,
    moving_rows,
    moving_tile,
    rows_of,
    weighted_sum,
)


@triton.jit(do_not_specialize=["heads_q", "total_q", "seqlen_q", "blocks"])
def delta_tangent_kernel(
    out, dout, tout, tdout, lse, dlse, tdlse, delta, tdelta, lse2, cu_seqlens_q, lse_b, lse_h,
    heads_q, total_q, seqlen_q, blocks,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, DLSE: tl.constexpr,
    TDLSE: tl.constexpr, FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """D = G.O - lam, D' = G'.O + G.O' - lam' and LSE in base 2, float32 in the layout of LSE."""
    block, h, b = program(blocks, heads_q)
    i_first = block * BLOCK_M
    q_first, length_q = sequence(cu_seqlens_q, b, total_q, seqlen_q, FLAGS)
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    i = i_first + tl.arange(0, BLOCK_M)
    row, there = b * lse_b + h * lse_h + q_first + i, i < length_q
    o = load_tile(
        rows_of(out, b, h, q_first), out.s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS
    ).to(tl.float32)
    g = load_tile(
        rows_of(dout, b, h, q_first), dout.s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS
    ).to(tl.float32)
    to = load_tile(
        rows_of(tout, b, h, q_first), tout.s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS
    ).to(tl.float32)
    value, moved = sum_of_products(g, o), sum_of_products(g, to)
    if MOVED_DOUT & MOVES:
        tg_rows = rows_of(tdout, b, h, q_first)
        tg = load_tile(tg_rows, tdout.s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        moved += sum_of_products(tg, o)
    if DLSE:
        value -= tl.load(dlse + row, mask=there, other=0.0)
    if TDLSE:
        moved -= tl.load(tdlse + row, mask=there, other=0.0)
    tl.store(delta + row, value, mask=there)
    tl.store(tdelta + row, moved, mask=there)
    tl.store(lse2 + row, base2_lse(lse, row, there), mask=there)


@triton.jit
def row_numbers(rows, i, seqlen_q):
    """(LSE in base 2, L', D, D') of queries i; (inf, where P = 0, and zeros) past the last one."""
    lse2, tlse, delta, tdelta = rows
    there = i < seqlen_q
    return (
        tl.load(lse2 + i, mask=there, other=float("inf")),
        tl.load(tlse + i, mask=there, other=0.0),
        tl.load(delta + i, mask=there, other=0.0),
        tl.load(tdelta + i, mask=there, other=0.0),
    )


@triton.jit
def gradient_tangents(
    s, cap, ts, t, dp, tdp, stays, rng, numbers, cap_in, FLAGS: tl.constexpr
):  # fmt: skip
    """(P M, P M c, dT', dZ, dZ') of a tile whose rows have `numbers`, all without the factor
    1 / (1 - p) of dropout's M in the first two.  s: base-2 logits; ts: q'.k + q.k'; t: t'."""
    row_lse, row_tlse, row_delta, row_tdelta = numbers
    p = probabilities(s, row_lse, True, FLAGS)
    seen = p != 0
    c = tl.where(seen, t - row_tlse, 0.0)
    kept = p
    if DROPOUT & FLAGS:
        _, _, _, inverse_keep = rng
        kept = tl.where(stays, p, 0.0)
        dp = tl.where(stays, dp * inverse_keep, 0.0)
        tdp = tl.where(stays, tdp * inverse_keep, 0.0)
    gap = tl.where(seen, dp - row_delta, 0.0)  # products with an excluded key may be anything
    dt = p * gap
    tdt = p * (c * gap + tl.where(seen, tdp - row_tdelta, 0.0))
    dz, tdz = dt, tdt
    if SOFTCAP & FLAGS:
        slope = 1.0 - cap * cap  # and g'' z' = -2 cap g' z' / softcap
        dz = dt * slope
        tdz = tdt * slope - 2.0 * cap * tl.where(seen, ts * cap_in, 0.0) * dz
    return kept, kept * c, tdt, dz, tdz


@triton.jit
def key_gradient_tangents(
    tdk, tdv, kv, moved_kv, of_rows, numbers_at, b, h, j_first, seqlen_q, seqlen_k, off, terms,
    tbias, rng, scale, softmax_scale, left, right, first, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Adds query tiles first..end - 1 of head h.  Scores are transposed, [BLOCK_N, BLOCK_M], so
    that weights are left operands as they are."""
    q, q_s, tq, tq_s, g, g_s, tg, tg_s = of_rows
    k, v = kv
    tk, tv = moved_kv
    c = tl.arange(0, BLOCK_N)[:, None]
    r = tl.arange(0, BLOCK_M)[None, :]
    for m_block in tl.range(first, end):
        i_first = m_block * BLOCK_M
        # S^T = K @ Q^T,  S'^T = K @ Q'^T + K' @ Q^T   [BLOCK_N, BLOCK_M]
        zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        q_tile = load_tile(q, q_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
        s = dot(k, tl.trans(q_tile), zero)
        ts = zero
        tq_tile = q_tile
        if MOVED_Q & MOVES:
            tq_tile = load_tile(tq, tq_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
            ts = dot(k, tl.trans(tq_tile), ts)
        if MOVED_K & MOVES:
            ts = dot(tk, tl.trans(q_tile), ts)
        s, cap = tile_logits(
            s, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
            True, FLAGS,
        )  # fmt: skip
        t = logit_tangents(
            ts, cap, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, tbias, softmax_scale,
            FLAGS, MOVES,
        )  # fmt: skip
        # dP^T = V @ G^T,  dP'^T = V' @ G^T + V @ G'^T   [BLOCK_N, BLOCK_M]
        g_tile = load_tile(g, g_s, i_first, seqlen_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        dp = dot(v, tl.trans(g_tile), zero)
        tdp = zero
        tg_tile = g_tile
        if MOVED_V & MOVES:
            tdp = dot(tv, tl.trans(g_tile), tdp)
        if MOVED_DOUT & MOVES:
            tg_tile = load_tile(tg, tg_s, i_first, seqlen_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
            tdp = dot(v, tl.trans(tg_tile), tdp)
        i = i_first + tl.arange(0, BLOCK_M)
        row_lse, row_tlse, row_delta, row_tdelta = row_numbers(numbers_at, i, seqlen_q)
        numbers = (row_lse[None, :], row_tlse[None, :], row_delta[None, :], row_tdelta[None, :])
        stays = s != float("-inf")
        if DROPOUT & FLAGS:
            bits = keep(i[:, None], j_first, b, h, terms, rng, BLOCK_N, FLAGS)
            stays = tl.trans(bits.to(tl.int8)) != 0  # AMD has no transpose of single bits
        kept, moved, _, dz, tdz = gradient_tangents(
            s, cap, ts, t, dp, tdp, stays, rng, numbers, terms.cap_in, FLAGS
        )
        # dV' += (P M c)^T @ G + (P M)^T @ G',  dK' += dZ'^T @ Q + dZ^T @ Q'
        tdv = weighted_sum(moved, g_tile, tdv)
        if MOVED_DOUT & MOVES:
            tdv = weighted_sum(kept, tg_tile, tdv)
        tdk = weighted_sum(tdz, q_tile, tdk)
        if MOVED_Q & MOVES:
            tdk = weighted_sum(dz, tq_tile, tdk)
    return tdk, tdv


@triton.jit(do_not_specialize=RUNTIME)
def dkdv_tangent_kernel(
    q, k, v, dout, tq, tk, tv, tdout, tbias, lse2, tlse, delta, tdelta, tdk, tdv,
    terms, rng_state, cu_seqlens_q, cu_seqlens_k, lse_b, lse_h,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys * Hk * B).  dK', dV' [B, Hk, Sk, D | Dv]."""
    block, hk, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, 0,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q // group, FLAGS,
    )  # fmt: skip
    j_first = block * BLOCK_N
    if j_first >= length_k:
        return
    b, hk = b.to(tl.int64), hk.to(tl.int64)
    rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
    k_tile, tk_tile = moving_tile(
        k, tk, b, hk, k_first, j_first, length_k, D, BLOCK_N, BLOCK_D, FLAGS, MOVED_K & MOVES
    )
    v_tile, tv_tile = moving_tile(
        v, tv, b, hk, k_first, j_first, length_k, DV, BLOCK_N, BLOCK_DV, FLAGS, MOVED_V & MOVES
    )
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    j_last = tl.minimum(j_first + BLOCK_N, length_k) - 1
    first, _full, _full_end, end = query_range(
        j_first, j_last, length_q, off, left, right, BLOCK_M, FLAGS
    )
    tdk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    tdv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    members = group if (GROUPED & FLAGS) else 1
    for member in range(0, members):
        h = hk * group + member
        q_rows, tq_rows = moving_rows(q, tq, b, h, q_first, MOVED_Q & MOVES)
        g_rows, tg_rows = moving_rows(dout, tdout, b, h, q_first, MOVED_DOUT & MOVES)
        row = b * lse_b + h * lse_h + q_first
        tdk_tile, tdv_tile = key_gradient_tangents(
            tdk_tile, tdv_tile, (k_tile, v_tile), (tk_tile, tv_tile),
            (q_rows, q.s, tq_rows, tq.s, g_rows, dout.s, tg_rows, tdout.s),
            (lse2 + row, tlse + row, delta + row, tdelta + row), b, h, j_first, length_q, length_k,
            off, terms, tbias, rng, scale, softmax_scale, left, right, first, end,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS, MOVES,
        )  # fmt: skip
    tdk_tile, tdv_tile = tdk_tile * softmax_scale, tdv_tile * inverse_keep
    tdk_rows, tdv_rows = rows_of(tdk, b, hk, k_first), rows_of(tdv, b, hk, k_first)
    store_tile(tdk_rows, tdk.s, j_first, length_k, tdk_tile, D, BLOCK_N, BLOCK_D, FLAGS)
    store_tile(tdv_rows, tdv.s, j_first, length_k, tdv_tile, DV, BLOCK_N, BLOCK_DV, FLAGS)


@triton.jit
def query_gradient_tangents(
    tiles, kv, numbers, i_first, r, b, h, seqlen_q, seqlen_k, off, terms, tbias, rng, grad, scale,
    softmax_scale, left, right, first, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """dZ' K + dZ K' over key tiles first..end - 1   [BLOCK_M, BLOCK_D]; dbias' if any."""
    q, tq, g, tg = tiles
    _k, _k_s, _tk, _tk_s, v, v_s, tv, tv_s = kv
    tdq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    c = tl.arange(0, BLOCK_N)[None, :]
    for n_block in tl.range(first, end):
        j_first = n_block * BLOCK_N
        s, ts, k_tile, tk_tile = key_products(
            q, tq, kv, j_first, seqlen_k, D, BLOCK_M, BLOCK_N, BLOCK_D, FLAGS, MOVES
        )
        s, cap = tile_logits(
            s, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
            True, FLAGS,
        )  # fmt: skip
        t = logit_tangents(
            ts, cap, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, tbias, softmax_scale,
            FLAGS, MOVES,
        )  # fmt: skip
        # dP = G @ V^T,  dP' = G @ V'^T + G' @ V^T   [BLOCK_M, BLOCK_N]
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        v_tile = load_tile(v, v_s, j_first, seqlen_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
        dp = dot(g, tl.trans(v_tile), zero)
        tdp = zero
        if MOVED_DOUT & MOVES:
            tdp = dot(tg, tl.trans(v_tile), tdp)
        if MOVED_V & MOVES:
            tv_tile = load_tile(tv, tv_s, j_first, seqlen_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
            tdp = dot(g, tl.trans(tv_tile), tdp)
        stays = s != float("-inf")
        if DROPOUT & FLAGS:
            stays = keep(i_first + r, j_first, b, h, terms, rng, BLOCK_N, FLAGS)
        _, _, tdt, dz, tdz = gradient_tangents(
            s, cap, ts, t, dp, tdp, stays, rng, numbers, terms.cap_in, FLAGS
        )
        if (DBIAS_STORE & FLAGS) or (DBIAS_ADD & FLAGS):
            add_dbias(tdt, i_first + r, j_first + c, b, h, seqlen_q, seqlen_k, grad, FLAGS)
        tdq = weighted_sum(tdz, k_tile, tdq)
        if MOVED_K & MOVES:
            tdq = weighted_sum(dz, tk_tile, tdq)
    return tdq


@triton.jit(do_not_specialize=RUNTIME)
def dq_tangent_kernel(
    q, k, v, dout, tq, tk, tv, tdout, tbias, lse2, tlse, delta, tdelta, tdq, tdbias,
    terms, rng_state, cu_seqlens_q, cu_seqlens_k, lse_b, lse_h,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  dQ' [B, Hq, Sq, D]; dbias' float32, zero before."""
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
    grad = (tdbias.at, tdbias.b, tdbias.h, tdbias.q, tdbias.k)
    q_tile, tq_tile = moving_tile(
        q, tq, b, h, q_first, i_first, length_q, D, BLOCK_M, BLOCK_D, FLAGS, MOVED_Q & MOVES
    )
    g_tile, tg_tile = moving_tile(
        dout, tdout, b, h, q_first, i_first, length_q, DV, BLOCK_M, BLOCK_DV, FLAGS,
        MOVED_DOUT & MOVES,
    )  # fmt: skip
    k_rows, tk_rows = moving_rows(k, tk, b, hk, k_first, MOVED_K & MOVES)
    v_rows, tv_rows = moving_rows(v, tv, b, hk, k_first, MOVED_V & MOVES)
    row = b * lse_b + h * lse_h + q_first
    row_lse, row_tlse, row_delta, row_tdelta = row_numbers(
        (lse2 + row, tlse + row, delta + row, tdelta + row), i_first + tl.arange(0, BLOCK_M),
        length_q,
    )  # fmt: skip
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    first, _full, _full_end, end = key_range(
        i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
    )
    tdq_tile = query_gradient_tangents(
        (q_tile, tq_tile, g_tile, tg_tile),
        (k_rows, k.s, tk_rows, tk.s, v_rows, v.s, tv_rows, tv.s),
        (row_lse[:, None], row_tlse[:, None], row_delta[:, None], row_tdelta[:, None]),
        i_first, tl.arange(0, BLOCK_M)[:, None], b, h, length_q, length_k, off, terms, tbias, rng,
        grad, scale, softmax_scale, left, right, first, end,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS, MOVES,
    )  # fmt: skip
    tdq_rows = rows_of(tdq, b, h, q_first)
    tdq_tile = tdq_tile * softmax_scale
    store_tile(tdq_rows, tdq.s, i_first, length_q, tdq_tile, D, BLOCK_M, BLOCK_D, FLAGS)
