"""Forward: O = softmax(scale Q K^T + ...) V by online softmax (arXiv 2205.14135, 2307.08691).

Q, O [B, Hq, Sq, D | Dv], K, V [B, Hk, Sk, D | Dv], LSE [B, Hq, Sq]; varlen: [total, H, D],
LSE [Hq, total_q].  One program = BLOCK_M queries of one head of one sequence; it walks over the
tiles of BLOCK_N keys that its queries see: first the tiles that an edge cuts, then the others.
If O has a NaN at the end, the tile is computed again with care (`primitives.nan_count`); so it is
where logits are huge (`softmax.far_count`).
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.dropout import (
    dropout_state,
    dropped,
    keep,
    keep_each,
    keep_ordered,
)
from attn_ext.triton_kernels.kernels.functions import settled
from attn_ext.triton_kernels.kernels.logits import (
    alibi_slope,
    is_steep,
    row_distance,
    tile_logits,
)
from attn_ext.triton_kernels.kernels.present import outer_present, product_each
from attn_ext.triton_kernels.kernels.primitives import (
    ALIBI,
    BOUNDED,
    DROPOUT,
    MASK,
    MASK_ONE_QUERY,
    PAGED,
    RELATIVE,
    STATS,
    STREAM,
    careful_flags,
    careful_rows_at_once,
    diagonal,
    dot,
    key_order,
    key_pointers,
    key_range,
    load_described,
    load_each,
    load_keys,
    load_rows,
    load_tile,
    load_whole,
    nan_count,
    part_of,
    program,
    row_pointers,
    sequences,
    store_tile,
    streamed_dot,
    tile_pointers,
    tile_step,
    unknown_zero,
)
from attn_ext.triton_kernels.kernels.softmax import (
    again_count,
    base2_max,
    online_softmax,
    row_ends,
    unit,
)

SPECIALIZED = tl.constexpr(2)  # LOADS: by descriptors, in warps of their own
REPAIR = tl.constexpr(3)  # LOADS: by pointers, and only for tiles of O that hold a NaN


@triton.jit
def forward_tiles(
    state, q, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, terms, rng, scale, left, right,
    first, skip_from, skip, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, EDGE: tl.constexpr, LOADS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Tiles first..end - 1 of keys, of which `skip` from `skip_from` on are left out.  q: a tile,
    or with STREAM the pointers to its rows."""
    acc, row_max, row_sum, e, bad = state
    k, k_s, k_p, v, v_s, v_p, pages, described = kv
    order = key_order(BLOCK_N, 0 if LOADS else FLAGS)  # a descriptor has the keys' own
    # Whole tiles at plain addresses: pointers that move, and no other arithmetic
    ADVANCE: tl.constexpr = not (EDGE or LOADS or (STREAM & FLAGS) or (PAGED & FLAGS))
    if ADVANCE:
        k_at = tile_pointers(k, k_s, first * BLOCK_N, BLOCK_N, BLOCK_D, FLAGS, order)
        v_at = tile_pointers(v, v_s, first * BLOCK_N, BLOCK_N, BLOCK_DV, FLAGS, order)
    factor, _shift = unit(terms, scale, FLAGS)
    slope = 0.0
    if ALIBI & FLAGS:
        slope = alibi_slope(b, h, terms, scale, FLAGS)
    OWN: tl.constexpr = (~RELATIVE & FLAGS) if EDGE else FLAGS
    for step in tl.range(first, end - skip, warp_specialize=LOADS == SPECIALIZED):
        n_block = step
        if EDGE and LOADS != SPECIALIZED:
            n_block = tl.where(step < skip_from, step, step + skip)
        j_first = n_block * BLOCK_N
        # S = Q @ K^T   [BLOCK_M, BLOCK_N]
        zero = tl.zeros([r.shape[0], BLOCK_N], tl.float32)
        if STREAM & FLAGS:
            keys = key_pointers(k, k_s, j_first, seqlen_k, pages, k_p, BLOCK_N, EDGE, FLAGS)
            qk = streamed_dot(q, keys, zero, D, BLOCK_D)
        else:
            if LOADS:
                k_desc, v_desc, index_b, index_h = described
                k_tile = load_described(k_desc, index_b, index_h, j_first, BLOCK_N, BLOCK_D)
            elif ADVANCE:
                k_tile = load_whole(k_at, D, BLOCK_D)
                k_at += tile_step(k_s, BLOCK_N, FLAGS)
            else:
                k_tile = load_keys(
                    k, k_s, j_first, seqlen_k, pages, k_p, D, BLOCK_N, BLOCK_D, EDGE, FLAGS
                )
            qk = dot(q, tl.trans(k_tile), zero)
        c = order[None, :]
        s, _ = tile_logits(
            qk, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
            EDGE, OWN, not EDGE, slope,
        )  # fmt: skip
        behind = 0.0
        if RELATIVE & OWN:
            behind = slope * factor * row_distance(
                i_first, j_first, b, seqlen_q, seqlen_k, terms, r.shape[0], FLAGS
            )  # fmt: skip
        p, alpha, row_max, row_sum, e, bad = online_softmax(
            s, factor, row_max, row_sum, e, bad, OWN, behind
        )
        if DROPOUT & FLAGS:
            if LOADS:
                kept = keep(i_first + r, j_first, b, h, terms, rng, BLOCK_N, FLAGS)
            else:
                kept = keep_ordered(i_first + r, j_first, b, h, terms, rng, BLOCK_N, FLAGS)
            p = dropped(p, kept, rng)
        # O = alpha * O + P @ V   [BLOCK_M, BLOCK_DV]
        if STREAM & FLAGS:
            values = key_pointers(v, v_s, j_first, seqlen_k, pages, v_p, BLOCK_N, EDGE, FLAGS)
            v_tile = load_rows(values, DV, BLOCK_DV)
        elif LOADS:
            v_tile = load_described(v_desc, index_b, index_h, j_first, BLOCK_N, BLOCK_DV)
        elif ADVANCE:
            v_tile = load_whole(v_at, DV, BLOCK_DV)
            v_at += tile_step(v_s, BLOCK_N, FLAGS)
        else:
            v_tile = load_keys(
                v, v_s, j_first, seqlen_k, pages, v_p, DV, BLOCK_N, BLOCK_DV, EDGE, FLAGS
            )
        if not (BOUNDED & FLAGS):
            acc = acc * alpha[:, None]
        acc = dot(p, v_tile, acc)
        if (MASK & FLAGS) and not (MASK_ONE_QUERY & FLAGS):
            # else ptxas waits for each wgmma of the kernel, since it cannot let this product run
            # into the next step
            acc = settled(acc)
    return acc, row_max, row_sum, e, bad


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """O, row_max, row_sum, e and the count of NaN before the first key."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    zero = tl.zeros([BLOCK_M], tl.float32)
    return acc, zero - float("inf"), zero, zero, zero


@triton.jit
def forward_rows(
    q, kv, r, b, h, i_first, i_last, seqlen_q, seqlen_k, split, splits, terms, rng, scale, left,
    right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LOADS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """State of the rows q [BLOCK_M, BLOCK_D], queries i_first + r up to i_last, after part `split`
    of `splits` of the keys that they see."""
    off = diagonal(b, seqlen_q, seqlen_k, terms, FLAGS)
    first, full_first, full_end, end = key_range(
        i_first, i_last, seqlen_k, off, left, right, BLOCK_N, FLAGS
    )
    first, end = part_of(first, end, split, splits)
    full_first = tl.minimum(tl.maximum(full_first, first), end)
    full_end = tl.minimum(tl.maximum(full_end, full_first), end)
    if RELATIVE & FLAGS:
        full_end = tl.where(is_steep(b, h, terms), full_first, full_end)

    state = empty_state(BLOCK_M, BLOCK_DV)
    if LOADS == SPECIALIZED:  # Triton takes one loop apart: all its tiles count as cut
        full_first, full_end = first, first
    # The cut tiles first: what their loop needs is not held through the other
    state = forward_tiles(
        state, q, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, terms, rng, scale, left, right,
        first, full_first, full_end - full_first, end,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, LOADS, FLAGS,
    )  # fmt: skip
    if LOADS != SPECIALIZED:
        state = forward_tiles(
            state, q, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, terms, rng, scale, left, right,
            full_first, full_first, 0, full_end,
            D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, LOADS, FLAGS,
        )  # fmt: skip
    acc, row_max, row_sum, e, bad = state
    _factor, shift = unit(terms, scale, FLAGS)
    row_max = base2_max(row_max, row_sum, shift, FLAGS)
    if BOUNDED & FLAGS:
        # A sink and the other parts of a split join by row_max: a sum of 2^-80 or 2^90 beside a
        # maximum of 0 would lose what they hold
        share = tl.exp2(tl.where(row_sum > 0, -row_max, 0.0))  # a power of two
        acc, row_sum = acc * share[:, None], row_sum * share
    return acc, row_max, row_sum, e, bad


@triton.jit
def careful_rows(
    q, kv, r, b, h, i_first, i_last, seqlen_q, seqlen_k, split, splits, terms, rng, scale, left,
    right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`forward_rows` again where that has left a NaN, or met huge logits: key by key, with sums
    that skip excluded pairs."""
    BASE2: tl.constexpr = careful_flags(FLAGS)
    k, k_s, k_p, v, v_s, v_p, pages, _described = kv
    off = diagonal(b, seqlen_q, seqlen_k, terms, FLAGS)
    first, _full, _full_end, end = key_range(
        i_first, i_last, seqlen_k, off, left, right, BLOCK_N, FLAGS
    )
    first, end = part_of(first, end, split, splits)
    j_first = first * BLOCK_N
    j_end = tl.minimum(end * BLOCK_N, seqlen_k)
    acc, row_max, row_sum, e, bad = empty_state(BLOCK_M, BLOCK_DV)
    c = tl.arange(0, 1)[None, :]
    for step in tl.range(0, j_end - j_first, num_stages=1):
        j = j_first + step
        # s = Q . k_j   [BLOCK_M, 1]
        k_row = load_each(k, k_s, j, pages, k_p, D, BLOCK_M, BLOCK_D, FLAGS)
        s, _cap = tile_logits(
            product_each(q, k_row), i_first, r, j, c, b, h, seqlen_q, seqlen_k, off, terms, scale,
            left, right, True, BASE2,
        )  # fmt: skip
        p, alpha, row_max, row_sum, e, bad = online_softmax(s, 1.0, row_max, row_sum, e, bad, BASE2)
        if DROPOUT & FLAGS:
            p = tl.where(keep_each(i_first + r, j + c, b, h, terms, rng, FLAGS), p, 0.0)
        # O = alpha * O + p v_j   [BLOCK_M, BLOCK_DV]; 0 * inf of keys that no longer count is 0
        v_row = load_each(v, v_s, j, pages, v_p, DV, BLOCK_M, BLOCK_DV, FLAGS)
        acc = tl.where(alpha[:, None] != 0, acc * alpha[:, None], 0.0) + outer_present(p, v_row)
    return acc, row_max, row_sum, e, bad


@triton.jit
def store_rows(
    state, ends, i_first, seqlen_q, h, DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Write O, LSE and the statistics of queries i_first, ... of head h."""
    acc, row_max, row_sum, e, bad = state
    o_rows, o_s, lse, max_logit, entropy, row_first, sink, inverse_keep = ends
    factor, row_lse, largest, spread = row_ends(row_max, row_sum, e, bad, sink, h, FLAGS)
    o = acc * (factor * inverse_keep)[:, None]
    store_tile(o_rows, o_s, i_first, seqlen_q, o, DV, BLOCK_M, BLOCK_DV, FLAGS)
    i = i_first + tl.arange(0, BLOCK_M)
    row = row_first + i
    tl.store(lse + row, row_lse, mask=i < seqlen_q)
    if STATS & FLAGS:
        tl.store(max_logit + row, largest, mask=i < seqlen_q)
        tl.store(entropy + row, spread, mask=i < seqlen_q)


@triton.jit(
    do_not_specialize=[
        "heads_q", "group", "total_q", "total_k", "seqlen_q", "seqlen_k", "m_blocks",
        "threshold", "left", "right",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, q_desc, k_desc, v_desc, out, lse, max_logit, entropy,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, lse_b, lse_h,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, m_blocks,
    scale, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LOADS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (m_blocks * Hq * B), the last query tiles first, since with causal they are longest.
    LOADS: 0 by pointers, 1 by descriptors [B, H, S, D], SPECIALIZED, which needs REPAIR after it
    since Triton specializes no kernel that has more than one loop."""
    block, h, b = program(m_blocks, heads_q)
    q_first, length_q, k_first, length_k = sequences(
        cu_seqlens_q, cu_seqlens_k, 0, b, total_q, total_k, seqlen_q, seqlen_k, FLAGS
    )
    i_first = (m_blocks - 1 - block) * BLOCK_M
    if LOADS != SPECIALIZED:  # noqa: SIM102 - which has no idle programs, and no branches
        if i_first >= length_q:
            return
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
    hk = wide_h // group
    rng = dropout_state(rng_state, threshold, inverse_keep, FLAGS)
    kv = (k + wide_b * k_b + hk * k_h + k_first * k_s, k_s, 0,
          v + wide_b * v_b + hk * v_h + k_first * v_s, v_s, 0, 0,
          (k_desc, v_desc, b, h // group))  # fmt: skip
    q_rows = q + wide_b * q_b + wide_h * q_h + q_first * q_s
    if STREAM & FLAGS:
        q_tile = row_pointers(q_rows, q_s, i_first, length_q, BLOCK_M)
    elif LOADS and LOADS != REPAIR:
        q_tile = load_described(q_desc, b, h, i_first, BLOCK_M, BLOCK_D)
    else:
        q_tile = load_tile(q_rows, q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
    ends = (out + wide_b * o_b + wide_h * o_h + q_first * o_s, o_s, lse, max_logit, entropy,
            wide_b * lse_b + wide_h * lse_h + q_first, sink, inverse_keep)  # fmt: skip
    if LOADS == REPAIR:
        o = load_tile(ends[0], o_s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        bad = nan_count(o)
    else:
        r = tl.arange(0, BLOCK_M)
        state = forward_rows(
            q_tile, kv, r[:, None], b, wide_h, i_first, i_last, length_q, length_k, 0, 1, terms,
            rng, scale, left, right, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LOADS, FLAGS,
        )  # fmt: skip
        bad = again_count(state[0], state[1], state[2], FLAGS)
    # Each way stores its own result: joined, they would share a layout that suits neither.
    if LOADS == SPECIALIZED:
        store_rows(state, ends, i_first, length_q, wide_h, DV, BLOCK_M, BLOCK_DV, FLAGS)
    elif bad > 0:
        zero = unknown_zero(bad)
        ROWS: tl.constexpr = careful_rows_at_once(BLOCK_M, 8192 // BLOCK_D)
        part_r = tl.arange(0, ROWS)[:, None]
        for part in tl.range(0, BLOCK_M // ROWS, num_stages=1):
            row = i_first + zero + part * ROWS
            part_q = load_tile(q_rows, q_s, row, length_q, D, ROWS, BLOCK_D, True, FLAGS)
            part_state = careful_rows(
                part_q, kv, part_r, b + zero, wide_h, row, tl.minimum(row + ROWS, length_q) - 1,
                length_q, length_k, 0, 1, terms, rng, scale, left, right,
                D, DV, ROWS, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
            )  # fmt: skip
            store_rows(part_state, ends, row, length_q, wide_h, DV, ROWS, BLOCK_DV, FLAGS)
    elif LOADS != REPAIR:
        store_rows(state, ends, i_first, length_q, wide_h, DV, BLOCK_M, BLOCK_DV, FLAGS)
