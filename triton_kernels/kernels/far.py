"""Backward of far rows: those whose LSE is so far from 0 that float32 has lost the sum in it.

LSE = max + ln(sum).  Beside a bias of -1e9 or of the smallest float over a whole row, and with
logits of 1e10, the logarithm is rounded away, and exp(S - LSE) is P times the number of keys.
The kernels of dkdv.py and dq.py take P = 0 in these rows, whose lse2 is inf (`delta_kernel`).  Here
they get P = 2^(S - base) * inverse with numbers of their own:

    base = max_j S,  inverse = 1 / sum_j 2^(S - base), the sink among them

and what comes of it is added to the gradients.  A call without far rows costs one look at LSE.

Two logits that differ by one unit in the last place may differ by thousands here, so a logit must
come out the same wherever it is computed: all kernels take the same tiles, in the same orientation,
and are compiled without fused multiply-adds, which would not round S before base is taken away.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import dropout_state, keep
from attn_ext.triton_kernels.kernels.logits import tile_logits
from attn_ext.triton_kernels.kernels.present import dot_present
from attn_ext.triton_kernels.kernels.primitives import (
    DBIAS_ADD,
    DBIAS_STORE,
    DROPOUT,
    GROUPED,
    RUNTIME,
    SINK,
    STREAM,
    block_of,
    diagonal,
    dot,
    head_rows,
    key_range,
    load_tile,
    query_range,
    row_pointers,
    store_tile,
    streamed_dot,
)
from attn_ext.triton_kernels.kernels.scores import add_dbias, is_far, score_gradient
from attn_ext.triton_kernels.kernels.softmax import sink_logit


@triton.jit
def product(
    a, a_s, i_first, length_a, b, b_s, j_first, length_b, DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_DIM: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Rows i_first, ... of a times rows j_first, ... of b, [BLOCK_M, BLOCK_N]."""
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if STREAM & FLAGS:
        a_rows = row_pointers(a, a_s, i_first, length_a, BLOCK_M)
        b_rows = row_pointers(b, b_s, j_first, length_b, BLOCK_N)
        return streamed_dot(a_rows, b_rows, zero, DIM, BLOCK_DIM)
    a_tile = load_tile(a, a_s, i_first, length_a, DIM, BLOCK_M, BLOCK_DIM, True, FLAGS)
    b_tile = load_tile(b, b_s, j_first, length_b, DIM, BLOCK_N, BLOCK_DIM, True, FLAGS)
    return dot(a_tile, tl.trans(b_tile), zero)


@triton.jit
def row_sums(
    top, total, q, k, i_first, first, end, b, h, length_q, length_k, off, terms, scale, left, right,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """(max_j S, sum_j 2^(S - max)) of queries i_first, ... over key tiles first..end - 1."""
    q_rows, q_s = q
    k_rows, k_s = k
    r, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    for n_block in tl.range(first, end, num_stages=1):
        j_first = n_block * BLOCK_N
        qk = product(
            q_rows, q_s, i_first, length_q, k_rows, k_s, j_first, length_k, D, BLOCK_M, BLOCK_N,
            BLOCK_D, FLAGS,
        )  # fmt: skip
        s, _ = tile_logits(
            qk, i_first, r, j_first, c, b, h, length_q, length_k, off, terms, scale, left, right,
            True, FLAGS,
        )  # fmt: skip
        now = tl.maximum(top, tl.max(s, 1))
        usable = tl.where(now == float("-inf"), 0.0, now)  # rows still empty: no -inf - -inf
        total = total * tl.exp2(top - usable) + tl.sum(tl.exp2(s - usable[:, None]), 1)
        top = now
    return top, total


@triton.jit
def weights_and_gradients(
    q, k, v, do, i_first, j_first, base, inverse, row_delta, b, h, length_q, length_k, off, terms,
    rng, scale, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """(P as dropout leaves it, dS, dS before softcap) of a tile [BLOCK_M, BLOCK_N]; base is inf in
    rows that are not far, where all are 0."""
    q_rows, q_s = q
    k_rows, k_s = k
    v_rows, v_s = v
    do_rows, do_s = do
    r, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    qk = product(
        q_rows, q_s, i_first, length_q, k_rows, k_s, j_first, length_k, D, BLOCK_M, BLOCK_N,
        BLOCK_D, FLAGS,
    )  # fmt: skip
    s, cap = tile_logits(
        qk, i_first, r, j_first, c, b, h, length_q, length_k, off, terms, scale, left, right, True,
        FLAGS,
    )  # fmt: skip
    p = tl.exp2(s - base[:, None]) * inverse[:, None]
    p = tl.where((s == float("-inf")) | (base == float("inf"))[:, None], 0.0, p)
    dp = product(
        do_rows, do_s, i_first, length_q, v_rows, v_s, j_first, length_k, DV, BLOCK_M, BLOCK_N,
        BLOCK_DV, FLAGS,
    )  # fmt: skip
    used = p
    if DROPOUT & FLAGS:
        kept = keep(i_first + r, j_first, b, h, terms, rng, BLOCK_N, FLAGS)
        used = tl.where(kept, p, 0.0)
        dp = tl.where(kept, dp * rng[3], 0.0)
    ds, raw = score_gradient(p, dp, row_delta[:, None], cap, True, FLAGS)
    return used, ds, raw


@triton.jit(do_not_specialize=RUNTIME)
def far_queries_kernel(
    q, k, v, dout, lse, delta, base, inverse, marks, dq, dbias,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dq_b, dq_h, dq_s, g_b, g_h, g_q, g_k,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, DQ: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  marks [B, Hq, blocks]: how many far rows a block has;
    base (inf in other rows) and inverse like LSE; and, with DQ, their dQ and dbias."""
    block, h, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, 0,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q, FLAGS,
    )  # fmt: skip
    i_first = block * BLOCK_M
    b, h = b.to(tl.int64), h.to(tl.int64)
    i = i_first + tl.arange(0, BLOCK_M)
    inside = i < length_q
    row = b * lse_b + h * lse_h + q_first + i
    far = is_far(tl.load(lse + row, mask=inside, other=0.0))
    count = tl.sum(tl.where(far, 1, 0), 0)
    tl.store(marks + tl.program_id(0), count)
    if count == 0:
        tl.store(base + row, tl.full([BLOCK_M], float("inf"), tl.float32), mask=inside)
        return
    hk = h // group
    q_rows = (head_rows(q, b, h, q_first, q_b, q_h, q_s), q_s)
    do_rows = (head_rows(dout, b, h, q_first, do_b, do_h, do_s), do_s)
    k_rows = (head_rows(k, b, hk, k_first, k_b, k_h, k_s), k_s)
    v_rows = (head_rows(v, b, hk, k_first, v_b, v_h, v_s), v_s)
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    first, _full_first, _full_end, end = key_range(
        i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
    )
    total = tl.zeros([BLOCK_M], tl.float32)
    top = total - float("inf")
    if SINK & FLAGS:
        top = total + sink_logit(sink, h)
        total += 1.0
    top, total = row_sums(
        top, total, q_rows, k_rows, i_first, first, end, b, h, length_q, length_k, off, terms,
        scale, left, right, D, BLOCK_M, BLOCK_N, BLOCK_D, FLAGS,
    )  # fmt: skip
    row_base = tl.where(far, top, float("inf"))
    row_inverse = tl.where(far, 1.0 / total, 0.0)
    tl.store(base + row, row_base, mask=inside)
    tl.store(inverse + row, row_inverse, mask=inside)
    if DQ:
        DBIAS: tl.constexpr = (DBIAS_STORE & FLAGS) or (DBIAS_ADD & FLAGS)
        row_delta = tl.load(delta + row, mask=inside, other=0.0)
        rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
        grad = (dbias, g_b, g_h, g_q, g_k)
        only_far = tl.where(far, i, length_q)[:, None]  # other rows of dbias are written already
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for n_block in tl.range(first, end, num_stages=1):
            j_first = n_block * BLOCK_N
            _used, ds, raw = weights_and_gradients(
                q_rows, k_rows, v_rows, do_rows, i_first, j_first, row_base, row_inverse,
                row_delta, b, h, length_q, length_k, off, terms, rng, scale, left, right,
                D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
            )  # fmt: skip
            if DBIAS:
                j = j_first + tl.arange(0, BLOCK_N)[None, :]
                add_dbias(ds, only_far, j, b, h, length_q, length_k, grad, FLAGS)
            # dQ += dS @ K   [BLOCK_M, BLOCK_D]
            k_tile = load_tile(k_rows[0], k_s, j_first, length_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
            acc = dot_present(raw, k_tile, acc, True)
        d = tl.arange(0, BLOCK_D)[None, :]
        at = head_rows(dq, b, h, q_first, dq_b, dq_h, dq_s) + i.to(tl.int64)[:, None] * dq_s + d
        value = (acc * softmax_scale).to(dq.dtype.element_ty)
        tl.store(at, value, mask=far[:, None] & (d < D))


@triton.jit(do_not_specialize=[*RUNTIME, "m_blocks"])
def far_keys_kernel(
    q, k, v, dout, delta, base, inverse, marks, dk, dv,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale, m_blocks,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys * Hk * B).  Adds the share of far rows to dK and dV."""
    block, hk, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, 0,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q // group, FLAGS,
    )  # fmt: skip
    j_first = block * BLOCK_N
    if j_first >= length_k:
        return
    b, hk = b.to(tl.int64), hk.to(tl.int64)
    members = group if (GROUPED & FLAGS) else 1
    of_group = marks + (b * heads_q + hk * group) * m_blocks
    LOOK: tl.constexpr = 256
    found = tl.zeros([LOOK], tl.int32)
    for at in tl.range(0, members * m_blocks, LOOK, num_stages=1):
        places = at + tl.arange(0, LOOK)
        found += tl.load(of_group + places, mask=places < members * m_blocks, other=0)
    if tl.max(found, 0) == 0:
        return
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    j_last = tl.minimum(j_first + BLOCK_N, length_k) - 1
    first, _full_first, _full_end, end = query_range(
        j_first, j_last, length_q, off, left, right, BLOCK_M, FLAGS
    )
    rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
    k_rows = (head_rows(k, b, hk, k_first, k_b, k_h, k_s), k_s)
    v_rows = (head_rows(v, b, hk, k_first, v_b, v_h, v_s), v_s)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for member in tl.range(0, members, num_stages=1):
        h = hk * group + member
        q_rows = (head_rows(q, b, h, q_first, q_b, q_h, q_s), q_s)
        do_rows = (head_rows(dout, b, h, q_first, do_b, do_h, do_s), do_s)
        for m_block in tl.range(first, end, num_stages=1):
            if tl.load(of_group + member * m_blocks + m_block) > 0:
                i_first = m_block * BLOCK_M
                i = i_first + tl.arange(0, BLOCK_M)
                row = b * lse_b + h * lse_h + q_first + i
                row_base = tl.load(base + row, mask=i < length_q, other=float("inf"))
                row_inverse = tl.load(inverse + row, mask=i < length_q, other=0.0)
                row_delta = tl.load(delta + row, mask=i < length_q, other=0.0)
                used, _ds, raw = weights_and_gradients(
                    q_rows, k_rows, v_rows, do_rows, i_first, j_first, row_base, row_inverse,
                    row_delta, b, h, length_q, length_k, off, terms, rng, scale, left, right,
                    D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
                )  # fmt: skip
                # dV += P^T @ dO   [BLOCK_N, BLOCK_DV];  dK += dS^T @ Q   [BLOCK_N, BLOCK_D]
                do_tile = load_tile(
                    do_rows[0], do_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS
                )
                dv_tile = dot_present(tl.trans(used), do_tile, dv_tile, False)
                q_tile = load_tile(
                    q_rows[0], q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS
                )
                dk_tile = dot_present(tl.trans(raw), q_tile, dk_tile, True)
    if DROPOUT & FLAGS:
        dv_tile = dv_tile * inverse_keep
    dk_rows = head_rows(dk, b, hk, k_first, dk_b, dk_h, dk_s)
    dv_rows = head_rows(dv, b, hk, k_first, dv_b, dv_h, dv_s)
    # What the near rows have left there is rounded to the gradient's dtype, and the sum once more
    near = load_tile(dk_rows, dk_s, j_first, length_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
    dk_tile = near.to(tl.float32) + dk_tile * softmax_scale
    store_tile(dk_rows, dk_s, j_first, length_k, dk_tile, D, BLOCK_N, BLOCK_D, FLAGS)
    near = load_tile(dv_rows, dv_s, j_first, length_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
    dv_tile = near.to(tl.float32) + dv_tile
    store_tile(dv_rows, dv_s, j_first, length_k, dv_tile, DV, BLOCK_N, BLOCK_DV, FLAGS)
