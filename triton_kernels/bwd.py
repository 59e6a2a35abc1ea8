"""Backward: preprocess, dK and dV, dQ (and dbias), each P computed again from LSE.

    delta = rowsum(dO * O) - dLSE
    P = exp(S - LSE);  dP = keep / (1 - p) * (dO V^T);  dS = P * (dP - delta);  dbias = dS
    dV = (keep / (1 - p) * P)^T dO;  dS_raw = dS * (1 - tanh^2);  dQ = scale dS_raw K
    dK = scale dS_raw^T Q;  with sigmoid weights dS = P (1 - P) dP

Two passes, 7 products instead of 5: no atomics, so the results are bitwise equal from run to run.
dK and dV: one program = BLOCK_N keys of one K/V head, over all query heads of its group.
dQ: one program = BLOCK_M queries of one head.
"""

import triton
import triton.language as tl
from attn_ext.triton_kernels.primitives import (
    CAREFUL_BLOCK,
    DBIAS_ADD,
    DBIAS_ONE_KEY,
    DBIAS_ONE_QUERY,
    DBIAS_STORE,
    DROPOUT,
    LOG2E,
    SIGMOID,
    SOFTCAP,
    any_nan,
    diagonal,
    dot,
    dot_present,
    keep,
    key_range,
    load_tile,
    philox_key,
    query_range,
    sequence,
    sigmoid,
    store_tile,
    tile_logits,
)

RUNTIME = (
    "heads_q", "group", "total_q", "total_k", "seqlen_q", "seqlen_k", "blocks", "threshold",
    "left", "right",
)  # fmt: skip


@triton.jit(do_not_specialize=["heads_q", "total_q", "seqlen_q", "blocks"])
def delta_kernel(
    out, dout, dlse, delta, cu_seqlens_q,
    o_b, o_h, o_s, do_b, do_h, do_s, lse_b, lse_h, heads_q, total_q, seqlen_q, blocks,
    DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr, DLSE: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE, float32 in the layout of LSE."""
    pid = tl.program_id(0)
    h, b = (pid // blocks) % heads_q, pid // blocks // heads_q
    i_first = (pid % blocks) * BLOCK_M
    q_first, length_q = sequence(cu_seqlens_q, b, total_q, seqlen_q, FLAGS)
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    o_rows = out + b * o_b + h * o_h + q_first * o_s
    do_rows = dout + b * do_b + h * do_h + q_first * do_s
    o = load_tile(o_rows, o_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
    do = load_tile(do_rows, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
    value = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    i = i_first + tl.arange(0, BLOCK_M)
    row = b * lse_b + h * lse_h + q_first + i
    if DLSE:
        value -= tl.load(dlse + row, mask=i < length_q, other=0.0)
    tl.store(delta + row, value, mask=i < length_q)


@triton.jit
def base2_lse(lse, row, inside):
    """LSE in base 2: 0 for empty rows, so that no -inf - -inf arises; inf outside, where P = 0."""
    value = tl.load(lse + row, mask=inside, other=float("inf"))
    return tl.where(value == float("-inf"), 0.0, value * LOG2E)


@triton.jit
def probabilities(s, lse, ALWAYS: tl.constexpr, FLAGS: tl.constexpr):
    """P = 2^(s - lse); 0 where s = -inf if ALWAYS, else there 0 or (LSE is NaN) NaN.  lse is inf
    for rows past the last query, which makes P 0 with SIGMOID (where it is 0 elsewhere) too."""
    p = sigmoid(s - lse) if (SIGMOID & FLAGS) else tl.exp2(s - lse)
    if ALWAYS:
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def score_gradient(p, dp, delta, cap, ALWAYS: tl.constexpr, FLAGS: tl.constexpr):
    """(dS, dS before softcap); 0 where P = 0 if ALWAYS, else there 0 or NaN."""
    ds = p * (1.0 - p) * dp if (SIGMOID & FLAGS) else p * (dp - delta)
    raw = ds
    if SOFTCAP & FLAGS:
        raw = ds * (1.0 - cap * cap)
    if ALWAYS:
        ds = tl.where(p != 0, ds, 0.0)
        raw = tl.where(p != 0, raw, 0.0)
    return ds, raw


@triton.jit
def key_gradient_tiles(
    dk, dv, k, v, qdo, rows, c, b, h, j_first, seqlen_q, seqlen_k, off, side, rng, scale, left,
    right, first, skip_from, skip, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
    WITH_DK: tl.constexpr, WITH_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Adds query tiles first..end - 1 of head h, less `skip` from `skip_from` on.  Scores are
    transposed, [BLOCK_N, BLOCK_M], so that P^T and dS^T are left operands as they are."""
    q, q_s, do, do_s = qdo
    lse, delta = rows
    STAGES: tl.constexpr = 1 if CAREFUL else None
    for step in tl.range(first, end - skip, num_stages=STAGES):
        m_block = step
        if EDGE:
            m_block = tl.where(step < skip_from, step, step + skip)
        i_first = m_block * BLOCK_M
        i = i_first + tl.arange(0, BLOCK_M)
        # S^T = K @ Q^T   [BLOCK_N, BLOCK_M]
        q_tile = load_tile(q, q_s, i_first, seqlen_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
        zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        kq = dot(k, tl.trans(q_tile), zero)
        r = tl.arange(0, BLOCK_M)[None, :]
        s, cap = tile_logits(
            kq, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, side, scale, left, right,
            EDGE, FLAGS,
        )  # fmt: skip
        p = probabilities(s, base2_lse(lse, i, i < seqlen_q)[None, :], CAREFUL, FLAGS)
        # dV += P^T @ dO   [BLOCK_N, BLOCK_DV];  dP^T = V @ dO^T   [BLOCK_N, BLOCK_M]
        do_tile = load_tile(do, do_s, i_first, seqlen_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        dp = dot(v, tl.trans(do_tile), zero)
        used = p
        if DROPOUT & FLAGS:
            key0, key1, threshold, inverse_keep = rng
            kept = keep(i[:, None], j_first, b, h, key0, key1, threshold, BLOCK_N)
            kept = tl.trans(kept.to(tl.int8)) != 0  # AMD has no transpose of single bits
            used = tl.where(kept, p, 0.0)
            dp = tl.where(kept, dp * inverse_keep, 0.0)
        if WITH_DV:
            dv = dot_present(used, do_tile, dv, False) if CAREFUL else dot(used, do_tile, dv)
        # dK += dS^T @ Q   [BLOCK_N, BLOCK_D]
        if WITH_DK:
            row_delta = tl.load(delta + i, mask=i < seqlen_q, other=0.0)
            _, ds = score_gradient(p, dp, row_delta[None, :], cap, CAREFUL, FLAGS)
            dk = dot_present(ds, q_tile, dk, True) if CAREFUL else dot(ds, q_tile, dk)
    return dk, dv


@triton.jit
def key_gradients(
    k, v, pointers, strides, c, b, hk, j_first, q_first, seqlen_q, seqlen_k, group, side, rng,
    scale, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, CAREFUL: tl.constexpr,
    WITH_DK: tl.constexpr, WITH_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dK and dV of the keys j_first + c over the group's query heads and the queries that see
    them."""
    q, do, lse, delta = pointers
    q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h = strides
    off = diagonal(seqlen_q, seqlen_k, FLAGS)
    j_last = tl.minimum(j_first + BLOCK_N, seqlen_k) - 1
    first, full_first, full_end, end = query_range(
        j_first, j_last, seqlen_q, off, left, right, BLOCK_M, FLAGS
    )
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in range(0, group):
        h = hk * group + member
        qdo = (q + b * q_b + h * q_h + q_first * q_s, q_s,
               do + b * do_b + h * do_h + q_first * do_s, do_s)  # fmt: skip
        row = b * lse_b + h * lse_h + q_first
        rows = (lse + row, delta + row)
        if CAREFUL:
            PARTS: tl.constexpr = BLOCK_M // CAREFUL_BLOCK
            dk, dv = key_gradient_tiles(
                dk, dv, k, v, qdo, rows, c, b, h, j_first, seqlen_q, seqlen_k, off, side, rng,
                scale, left, right, first * PARTS, first * PARTS, 0, end * PARTS,
                D, DV, CAREFUL_BLOCK, BLOCK_N, BLOCK_D, BLOCK_DV, True, True, WITH_DK, WITH_DV,
                FLAGS,
            )  # fmt: skip
        else:
            dk, dv = key_gradient_tiles(
                dk, dv, k, v, qdo, rows, c, b, h, j_first, seqlen_q, seqlen_k, off, side, rng,
                scale, left, right, full_first, full_first, 0, full_end,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, True, True, FLAGS,
            )  # fmt: skip
            dk, dv = key_gradient_tiles(
                dk, dv, k, v, qdo, rows, c, b, h, j_first, seqlen_q, seqlen_k, off, side, rng,
                scale, left, right, first, full_first, full_end - full_first, end,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, True, True, FLAGS,
            )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=RUNTIME)
def dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv,
    mask, bias, alibi, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, alibi_b,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, cap_in, cap_out, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys * Hk * B).  dK, dV [B, Hk, Sk, D | Dv]."""
    pid = tl.program_id(0)
    heads_k = heads_q // group
    hk, b = (pid // blocks) % heads_k, pid // blocks // heads_k
    j_first = (pid % blocks) * BLOCK_N
    q_first, length_q = sequence(cu_seqlens_q, b, total_q, seqlen_q, FLAGS)
    k_first, length_k = sequence(cu_seqlens_k, b, total_k, seqlen_k, FLAGS)
    if j_first >= length_k:
        return
    b, hk = b.to(tl.int64), hk.to(tl.int64)
    rng = (0, 0, 0, 0)
    if DROPOUT & FLAGS:
        key0, key1 = philox_key(rng_state)
        rng = (key0, key1, threshold, inverse_keep)
    side = (mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            alibi, alibi_b, cap_in, cap_out)  # fmt: skip
    pointers = (q, dout, lse, delta)
    strides = (q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h)
    k_rows = k + b * k_b + hk * k_h + k_first * k_s
    v_rows = v + b * v_b + hk * v_h + k_first * v_s
    k_tile = load_tile(k_rows, k_s, j_first, length_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
    v_tile = load_tile(v_rows, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
    c = tl.arange(0, BLOCK_N)[:, None]
    dk_rows = dk + b * dk_b + hk * dk_h + k_first * dk_s
    dv_rows = dv + b * dv_b + hk * dv_h + k_first * dv_s
    dk_tile, dv_tile = key_gradients(
        k_tile, v_tile, pointers, strides, c, b, hk, j_first, q_first, length_q, length_k, group,
        side, rng, scale, left, right,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, True, True, FLAGS,
    )  # fmt: skip
    again = any_nan(dk_tile) | any_nan(dv_tile)
    if again:  # dV, then dK, from K and V read again: together they would not fit the registers
        k_tile = load_tile(k_rows, k_s, j_first, length_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
        v_tile = load_tile(v_rows, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
        _, dv_tile = key_gradients(
            k_tile, v_tile, pointers, strides, c, b, hk, j_first, q_first, length_q, length_k,
            group, side, rng, scale, left, right,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, True, FLAGS,
        )  # fmt: skip
    if DROPOUT & FLAGS:
        dv_tile = dv_tile * inverse_keep
    store_tile(dv_rows, dv_s, j_first, length_k, dv_tile, DV, BLOCK_N, BLOCK_DV, FLAGS)
    if again:
        k_tile = load_tile(k_rows, k_s, j_first, length_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
        v_tile = load_tile(v_rows, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
        dk_tile, _ = key_gradients(
            k_tile, v_tile, pointers, strides, c, b, hk, j_first, q_first, length_q, length_k,
            group, side, rng, scale, left, right,
            D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, True, False, FLAGS,
        )  # fmt: skip
    dk_tile = dk_tile * softmax_scale
    store_tile(dk_rows, dk_s, j_first, length_k, dk_tile, D, BLOCK_N, BLOCK_D, FLAGS)


@triton.jit
def add_dbias(ds, i, j, b, h, seqlen_q, seqlen_k, grad, FLAGS: tl.constexpr):
    """Put the tile dS [BLOCK_M, BLOCK_N] into dbias, summed over what dbias broadcasts."""
    dbias, g_b, g_h, g_q, g_k = grad
    base = dbias + b * g_b + h * g_h
    if DBIAS_STORE & FLAGS:
        inside = (i < seqlen_q) & (j < seqlen_k)
        tl.store(base + i.to(tl.int64) * g_q + j.to(tl.int64) * g_k, ds, mask=inside)
    else:
        ds = tl.where((i < seqlen_q) & (j < seqlen_k), ds, 0.0)
        if (DBIAS_ONE_QUERY & FLAGS) and (DBIAS_ONE_KEY & FLAGS):
            tl.atomic_add(base, tl.sum(tl.sum(ds, 1), 0), sem="relaxed")
        elif DBIAS_ONE_QUERY & FLAGS:
            column = base + j.to(tl.int64) * g_k
            tl.atomic_add(column, tl.sum(ds, 0)[None, :], mask=j < seqlen_k, sem="relaxed")
        elif DBIAS_ONE_KEY & FLAGS:
            row = base + i.to(tl.int64) * g_q
            tl.atomic_add(row, tl.sum(ds, 1)[:, None], mask=i < seqlen_q, sem="relaxed")
        else:
            inside = (i < seqlen_q) & (j < seqlen_k)
            places = base + i.to(tl.int64) * g_q + j.to(tl.int64) * g_k
            tl.atomic_add(places, ds, mask=inside, sem="relaxed")


@triton.jit
def query_gradient_tiles(
    dq, q, do, row_lse, row_delta, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, side, rng, grad,
    scale, left, right, first, skip_from, skip, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """dq + dS K over key tiles first..end - 1, less `skip` from `skip_from` on; dbias if any."""
    k, k_s, v, v_s = kv
    DBIAS: tl.constexpr = ((DBIAS_STORE & FLAGS) or (DBIAS_ADD & FLAGS)) and not CAREFUL
    STAGES: tl.constexpr = 1 if CAREFUL else None
    for step in tl.range(first, end - skip, num_stages=STAGES):
        n_block = step
        if EDGE:
            n_block = tl.where(step < skip_from, step, step + skip)
        j_first = n_block * BLOCK_N
        # S = Q @ K^T, dP = dO @ V^T   [BLOCK_M, BLOCK_N]
        k_tile = load_tile(k, k_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D, EDGE, FLAGS)
        v_tile = load_tile(v, v_s, j_first, seqlen_k, DV, BLOCK_N, BLOCK_DV, EDGE, FLAGS)
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        qk = dot(q, tl.trans(k_tile), zero)
        c = tl.arange(0, BLOCK_N)[None, :]
        s, cap = tile_logits(
            qk, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, side, scale, left, right,
            EDGE, FLAGS,
        )  # fmt: skip
        p = probabilities(s, row_lse[:, None], CAREFUL or DBIAS, FLAGS)
        dp = dot(do, tl.trans(v_tile), zero)
        if DROPOUT & FLAGS:
            key0, key1, threshold, inverse_keep = rng
            kept = keep(i_first + r, j_first, b, h, key0, key1, threshold, BLOCK_N)
            dp = tl.where(kept, dp * inverse_keep, 0.0)
        ds, raw = score_gradient(p, dp, row_delta[:, None], cap, CAREFUL or DBIAS, FLAGS)
        if DBIAS:
            add_dbias(ds, i_first + r, j_first + c, b, h, seqlen_q, seqlen_k, grad, FLAGS)
        # dQ += dS @ K   [BLOCK_M, BLOCK_D]
        dq = dot_present(raw, k_tile, dq, True) if CAREFUL else dot(raw, k_tile, dq)
    return dq


@triton.jit(do_not_specialize=RUNTIME)
def dq_kernel(
    q, k, v, dout, lse, delta, dq, dbias,
    mask, bias, alibi, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, alibi_b,
    dq_b, dq_h, dq_s, g_b, g_h, g_q, g_k,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, cap_in, cap_out, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  dQ [B, Hq, Sq, D]; dbias float32, zero before."""
    pid = tl.program_id(0)
    h, b = (pid // blocks) % heads_q, pid // blocks // heads_q
    i_first = (blocks - 1 - pid % blocks) * BLOCK_M  # with causal the last are longest
    q_first, length_q = sequence(cu_seqlens_q, b, total_q, seqlen_q, FLAGS)
    k_first, length_k = sequence(cu_seqlens_k, b, total_k, seqlen_k, FLAGS)
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    hk = h // group
    rng = (0, 0, 0, 0)
    if DROPOUT & FLAGS:
        key0, key1 = philox_key(rng_state)
        rng = (key0, key1, threshold, inverse_keep)
    side = (mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            alibi, alibi_b, cap_in, cap_out)  # fmt: skip
    grad = (dbias, g_b, g_h, g_q, g_k)
    kv = (k + b * k_b + hk * k_h + k_first * k_s, k_s,
          v + b * v_b + hk * v_h + k_first * v_s, v_s)  # fmt: skip
    q_rows = q + b * q_b + h * q_h + q_first * q_s
    do_rows = dout + b * do_b + h * do_h + q_first * do_s
    q_tile = load_tile(q_rows, q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
    do_tile = load_tile(do_rows, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
    i = i_first + tl.arange(0, BLOCK_M)
    row = b * lse_b + h * lse_h + q_first + i
    row_lse = base2_lse(lse, row, i < length_q)
    row_delta = tl.load(delta + row, mask=i < length_q, other=0.0)
    r = tl.arange(0, BLOCK_M)[:, None]
    off = diagonal(length_q, length_k, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    first, full_first, full_end, end = key_range(
        i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
    )
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = query_gradient_tiles(
        acc, q_tile, do_tile, row_lse, row_delta, kv, i_first, r, b, h, length_q, length_k, off,
        side, rng, grad, scale, left, right, full_first, full_first, 0, full_end,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, FLAGS,
    )  # fmt: skip
    acc = query_gradient_tiles(
        acc, q_tile, do_tile, row_lse, row_delta, kv, i_first, r, b, h, length_q, length_k, off,
        side, rng, grad, scale, left, right, first, full_first, full_end - full_first, end,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, FLAGS,
    )  # fmt: skip
    if any_nan(acc):  # with tiles read again, as in the forward kernel
        q_tile = load_tile(q_rows, q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
        do_tile = load_tile(do_rows, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        PARTS: tl.constexpr = BLOCK_N // CAREFUL_BLOCK
        acc = query_gradient_tiles(
            acc, q_tile, do_tile, row_lse, row_delta, kv, i_first, r, b, h, length_q, length_k,
            off, side, rng, grad, scale, left, right, first * PARTS, first * PARTS, 0, end * PARTS,
            D, DV, BLOCK_M, CAREFUL_BLOCK, BLOCK_D, BLOCK_DV, True, True, FLAGS,
        )  # fmt: skip
    dq_rows = dq + b * dq_b + h * dq_h + q_first * dq_s
    acc = acc * softmax_scale
    store_tile(dq_rows, dq_s, i_first, length_q, acc, D, BLOCK_M, BLOCK_D, FLAGS)
