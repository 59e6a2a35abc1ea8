"""dbias of a broadcast bias, bitwise equal from run to run: for calls with deterministic=True.

The dQ kernel adds to a broadcast dbias by atomics, in no fixed order.  Here one program owns a tile
of dbias and computes every dS that belongs to it again, in a fixed order.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import dropout_state, keep
from attn_ext.triton_kernels.kernels.far import weights_and_gradients
from attn_ext.triton_kernels.kernels.logits import tile_logits
from attn_ext.triton_kernels.kernels.primitives import (
    DROPOUT,
    LEFT,
    RIGHT,
    STREAM,
    diagonal,
    dot,
    load_tile,
    row_pointers,
    sequences,
    streamed_dot,
)
from attn_ext.triton_kernels.kernels.scores import probabilities, score_gradient


@triton.jit
def tile_is_visible(
    i_first, j_first, seqlen_q, seqlen_k, off, left, right, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Whether any query of the tile sees any key of it."""
    visible = (i_first < seqlen_q) & (j_first < seqlen_k)
    if LEFT & FLAGS:
        visible = visible & (j_first + BLOCK_N - 1 >= i_first + off - left)
    if RIGHT & FLAGS:
        visible = visible & (j_first <= i_first + BLOCK_M - 1 + off + right)
    return visible


@triton.jit
def put(places, value, inside, ADD: tl.constexpr):
    """Write, or with ADD add to what the same program alone writes."""
    if ADD:
        value += tl.load(places, mask=inside, other=0.0)
    tl.store(places, value, mask=inside)


@triton.jit
def near_gradient(
    q, k, v, do, i_first, j_first, lse2, delta, b, h, length_q, length_k, off, terms, rng_state,
    scale, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """dS of a tile [BLOCK_M, BLOCK_N]."""
    q_rows, q_s = q
    k_rows, k_s = k
    v_rows, v_s = v
    do_rows, do_s = do
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if STREAM & FLAGS:
        queries = row_pointers(q_rows, q_s, i_first, length_q, BLOCK_M)
        keys = row_pointers(k_rows, k_s, j_first, length_k, BLOCK_N)
        qk = streamed_dot(queries, keys, zero, D, BLOCK_D)
        queries = row_pointers(do_rows, do_s, i_first, length_q, BLOCK_M)
        keys = row_pointers(v_rows, v_s, j_first, length_k, BLOCK_N)
        dp = streamed_dot(queries, keys, zero, DV, BLOCK_DV)
    else:
        qt = load_tile(q_rows, q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
        kt = load_tile(k_rows, k_s, j_first, length_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
        qk = dot(qt, tl.trans(kt), zero)
        do = load_tile(do_rows, do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        vt = load_tile(v_rows, v_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
        dp = dot(do, tl.trans(vt), zero)
    i = i_first + tl.arange(0, BLOCK_M)
    r, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    s, cap = tile_logits(
        qk, i_first, r, j_first, c, b, h, length_q, length_k, off, terms, scale, left,
        right, True, FLAGS,
    )  # fmt: skip
    row_lse = tl.load(lse2 + i, mask=i < length_q, other=float("inf"))
    p = probabilities(s, row_lse[:, None], True, FLAGS)
    if DROPOUT & FLAGS:
        rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
        kept = keep(i[:, None], j_first, b, h, terms, rng, BLOCK_N, FLAGS)
        dp = tl.where(kept, dp * inverse_keep, 0.0)
    row_delta = tl.load(delta + i, mask=i < length_q, other=0.0)
    ds, _ = score_gradient(p, dp, row_delta[:, None], cap, True, FLAGS)
    return ds


@triton.jit(
    do_not_specialize=[
        "heads_q", "group", "total_q", "total_k", "seqlen_q", "seqlen_k", "threshold", "left",
        "right", "own_h", "own_m", "own_n", "sum_b", "sum_h", "sum_m", "sum_n",
    ]
)  # fmt: skip
def dbias_kernel(
    q, k, v, dout, lse2, delta, inverse, dbias,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    g_b, g_h, g_q, g_k, own_h, own_m, own_n, sum_b, sum_h, sum_m, sum_n,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k,
    scale, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ONE_QUERY: tl.constexpr,
    ONE_KEY: tl.constexpr, FAR_ROWS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (own_n * own_m * own_h * own_b).  Of each dimension (b, h, query tile m, key tile n)
    either the grid holds all, or the program sums over all (sum_* of them).  FAR_ROWS: adds the
    share of far rows to dbias, with their base in place of lse2 and their inverse (far.py)."""
    pid = tl.program_id(0)
    pid_n, pid_m = pid % own_n, pid // own_n % own_m
    pid_h, pid_b = pid // own_n // own_m % own_h, pid // own_n // own_m // own_h
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(0, sum_b * sum_h * sum_m * sum_n):
        n_block, m_block = pid_n + step % sum_n, pid_m + step // sum_n % sum_m
        h = (pid_h + step // sum_n // sum_m % sum_h).to(tl.int64)
        b = pid_b + step // sum_n // sum_m // sum_h
        q_first, length_q, k_first, length_k = sequences(
            cu_seqlens_q, cu_seqlens_k, 0, b, total_q, total_k, seqlen_q, seqlen_k, FLAGS
        )
        b = b.to(tl.int64)
        i_first, j_first = m_block * BLOCK_M, n_block * BLOCK_N
        off = diagonal(b, length_q, length_k, terms, FLAGS)
        if tile_is_visible(
            i_first, j_first, length_q, length_k, off, left, right, BLOCK_M, BLOCK_N, FLAGS
        ):
            hk = h // group
            q_rows = q + b * q_b + h * q_h + q_first * q_s
            do_rows = dout + b * do_b + h * do_h + q_first * do_s
            k_rows = k + b * k_b + hk * k_h + k_first * k_s
            v_rows = v + b * v_b + hk * v_h + k_first * v_s
            row = b * lse_b + h * lse_h + q_first
            if FAR_ROWS:
                i = i_first + tl.arange(0, BLOCK_M)
                inside = i < length_q
                row_base = tl.load(lse2 + row + i, mask=inside, other=float("inf"))
                if tl.min(row_base, 0) < float("inf"):
                    row_inverse = tl.load(inverse + row + i, mask=inside, other=0.0)
                    row_delta = tl.load(delta + row + i, mask=inside, other=0.0)
                    rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
                    _used, ds, _raw = weights_and_gradients(
                        (q_rows, q_s), (k_rows, k_s), (v_rows, v_s), (do_rows, do_s), i_first,
                        j_first, row_base, row_inverse, row_delta, b, h, length_q, length_k, off,
                        terms, rng, scale, left, right,
                        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
                    )  # fmt: skip
                    acc += ds
            else:
                acc += near_gradient(
                    (q_rows, q_s), (k_rows, k_s), (v_rows, v_s), (do_rows, do_s), i_first, j_first,
                    lse2 + row, delta + row, b, h, length_q, length_k, off, terms, rng_state,
                    scale, threshold, inverse_keep, left, right,
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
                )  # fmt: skip

    base = dbias + pid_b.to(tl.int64) * g_b + pid_h.to(tl.int64) * g_h
    i = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    j = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if ONE_QUERY and ONE_KEY:
        put(base, tl.sum(tl.sum(acc, 1), 0), seqlen_k > 0, FAR_ROWS)
    elif ONE_QUERY:
        put(base + j * g_k, tl.sum(acc, 0), j < seqlen_k, FAR_ROWS)
    elif ONE_KEY:
        put(base + i * g_q, tl.sum(acc, 1), i < seqlen_q, FAR_ROWS)
    else:
        inside = (i < seqlen_q)[:, None] & (j < seqlen_k)[None, :]
        put(base + (i * g_q)[:, None] + (j * g_k)[None, :], acc, inside, FAR_ROWS)
