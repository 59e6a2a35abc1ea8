"""Forward: O = softmax(scale Q K^T + ...) V by online softmax (arXiv 2205.14135, 2307.08691).

Q, O [B, Hq, Sq, D | Dv], K, V [B, Hk, Sk, D | Dv], LSE [B, Hq, Sq]; varlen: [total, H, D],
LSE [Hq, total_q].  One program = BLOCK_M queries of one head of one sequence; it walks over the
tiles of BLOCK_N keys that its queries see: first the tiles without an edge, then the cut ones.
If O has a NaN at the end, the tile is computed again with care (`primitives.any_nan`).
"""

import triton
import triton.language as tl
from attn_ext.triton_kernels.primitives import (
    CAREFUL_BLOCK,
    DROPOUT,
    STATS,
    any_nan,
    diagonal,
    dot,
    dot_present,
    keep,
    key_range,
    load_described,
    load_keys,
    load_tile,
    online_softmax,
    philox_key,
    row_ends,
    sequence,
    store_tile,
    tile_logits,
)


@triton.jit
def forward_tiles(
    state, q, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, side, rng, scale, left, right,
    first, skip_from, skip, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, EDGE: tl.constexpr, CAREFUL: tl.constexpr, LOADS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Tiles first..end - 1 of keys, of which `skip` from `skip_from` on are left out."""
    acc, row_max, row_sum, e, bad = state
    k, k_s, k_p, v, v_s, v_p, pages, described = kv
    STAGES: tl.constexpr = 1 if CAREFUL else None
    SPECIALIZED: tl.constexpr = LOADS == 2
    for step in tl.range(first, end - skip, num_stages=STAGES, warp_specialize=SPECIALIZED):
        n_block = step
        if EDGE:
            n_block = tl.where(step < skip_from, step, step + skip)
        j_first = n_block * BLOCK_N
        # S = Q @ K^T   [BLOCK_M, BLOCK_N]
        if LOADS:
            k_desc, v_desc, index_b, index_h = described
            k_tile = load_described(k_desc, index_b, index_h, j_first, BLOCK_N, BLOCK_D)
        else:
            k_tile = load_keys(
                k, k_s, j_first, seqlen_k, pages, k_p, D, BLOCK_N, BLOCK_D, EDGE, FLAGS
            )
        zero = tl.zeros([q.shape[0], BLOCK_N], tl.float32)
        qk = dot(q, tl.trans(k_tile), zero)
        c = tl.arange(0, BLOCK_N)[None, :]
        s, _ = tile_logits(
            qk, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, side, scale, left, right,
            EDGE, FLAGS,
        )  # fmt: skip
        p, alpha, row_max, row_sum, e, bad = online_softmax(s, row_max, row_sum, e, bad, FLAGS)
        if DROPOUT & FLAGS:
            key0, key1, threshold = rng
            p = tl.where(keep(i_first + r, j_first, b, h, key0, key1, threshold, BLOCK_N), p, 0.0)
        # O = alpha * O + P @ V   [BLOCK_M, BLOCK_DV]
        if LOADS:
            v_tile = load_described(v_desc, index_b, index_h, j_first, BLOCK_N, BLOCK_DV)
        else:
            v_tile = load_keys(
                v, v_s, j_first, seqlen_k, pages, v_p, DV, BLOCK_N, BLOCK_DV, EDGE, FLAGS
            )
        acc = acc * alpha[:, None]
        acc = dot_present(p, v_tile, acc, False) if CAREFUL else dot(p, v_tile, acc)
    return acc, row_max, row_sum, e, bad


@triton.jit
def empty_state(BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr):
    """O, row_max, row_sum, e and the count of NaN before the first key."""
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    zero = tl.zeros([BLOCK_M], tl.float32)
    return acc, zero - float("inf"), zero, zero, zero


@triton.jit
def forward_rows(
    q, kv, r, b, h, i_first, i_last, seqlen_q, seqlen_k, split, splits, side, rng, scale, left,
    right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LOADS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """State of the rows q [BLOCK_M, BLOCK_D], queries i_first + r up to i_last, after part `split`
    of `splits` of the keys that they see."""
    off = diagonal(seqlen_q, seqlen_k, FLAGS)
    first, full_first, full_end, end = key_range(
        i_first, i_last, seqlen_k, off, left, right, BLOCK_N, FLAGS
    )
    share = (end - first + splits - 1) // splits
    first = tl.minimum(first + split * share, end)
    end = tl.minimum(first + share, end)
    full_first = tl.minimum(tl.maximum(full_first, first), end)
    full_end = tl.minimum(tl.maximum(full_end, full_first), end)

    state = empty_state(BLOCK_M, BLOCK_DV)
    state = forward_tiles(
        state, q, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, side, rng, scale, left, right,
        full_first, full_first, 0, full_end,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, False, False, LOADS, FLAGS,
    )  # fmt: skip
    state = forward_tiles(
        state, q, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, side, rng, scale, left, right,
        first, full_first, full_end - full_first, end,
        D, DV, BLOCK_N, BLOCK_D, BLOCK_DV, True, False, LOADS, FLAGS,
    )  # fmt: skip
    return state


@triton.jit
def careful_rows(
    q, kv, r, b, h, i_first, i_last, seqlen_q, seqlen_k, split, splits, side, rng, scale, left,
    right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`forward_rows` again where that has left a NaN, with products that skip excluded pairs."""
    off = diagonal(seqlen_q, seqlen_k, FLAGS)
    first, _, _, end = key_range(i_first, i_last, seqlen_k, off, left, right, BLOCK_N, FLAGS)
    share = (end - first + splits - 1) // splits
    first = tl.minimum(first + split * share, end)
    end = tl.minimum(first + share, end)
    PARTS: tl.constexpr = BLOCK_N // CAREFUL_BLOCK
    return forward_tiles(
        empty_state(BLOCK_M, BLOCK_DV), q, kv, i_first, r, b, h, seqlen_q, seqlen_k, off, side, rng,
        scale, left, right, first * PARTS, first * PARTS, 0, end * PARTS,
        D, DV, CAREFUL_BLOCK, BLOCK_D, BLOCK_DV, True, True, 0, FLAGS,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "heads_q", "group", "total_q", "total_k", "seqlen_q", "seqlen_k", "m_blocks",
        "threshold", "left", "right",
    ]
)  # fmt: skip
def forward_kernel(
    q, k, v, q_desc, k_desc, v_desc, out, lse, max_logit, entropy,
    mask, bias, alibi, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, o_b, o_h, o_s, lse_b, lse_h,
    mask_b, mask_h, mask_q, mask_k, bias_b, bias_h, bias_q, bias_k, alibi_b,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, m_blocks,
    scale, cap_in, cap_out, threshold, inverse_keep, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, LOADS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (m_blocks * Hq * B), the last query tiles first, since with causal they are longest.
    LOADS: 0 by pointers, 1 by descriptors [B, H, S, D], 2 so and with specialized warps."""
    pid = tl.program_id(0)
    m_block = m_blocks - 1 - pid % m_blocks
    head = pid // m_blocks
    h, b = head % heads_q, head // heads_q
    q_first, length_q = sequence(cu_seqlens_q, b, total_q, seqlen_q, FLAGS)
    k_first, length_k = sequence(cu_seqlens_k, b, total_k, seqlen_k, FLAGS)
    i_first = m_block * BLOCK_M
    if i_first >= length_q:
        return
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    wide_b, wide_h = b.to(tl.int64), h.to(tl.int64)
    hk = wide_h // group
    rng = (0, 0, 0)
    if DROPOUT & FLAGS:
        key0, key1 = philox_key(rng_state)
        rng = (key0, key1, threshold)
    side = (mask, mask_b, mask_h, mask_q, mask_k, bias, bias_b, bias_h, bias_q, bias_k,
            alibi, alibi_b, cap_in, cap_out)  # fmt: skip
    kv = (k + wide_b * k_b + hk * k_h + k_first * k_s, k_s, 0,
          v + wide_b * v_b + hk * v_h + k_first * v_s, v_s, 0, 0,
          (k_desc, v_desc, b, h // group))  # fmt: skip
    q_rows = q + wide_b * q_b + wide_h * q_h + q_first * q_s
    if LOADS:
        q_tile = load_described(q_desc, b, h, i_first, BLOCK_M, BLOCK_D)
    else:
        q_tile = load_tile(q_rows, q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
    r = tl.arange(0, BLOCK_M)
    i = i_first + r
    state = forward_rows(
        q_tile, kv, r[:, None], b, wide_h, i_first, i_last, length_q, length_k, 0, 1, side, rng,
        scale, left, right, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, LOADS, FLAGS,
    )  # fmt: skip
    if any_nan(state[0]):  # Q is read again: kept for this, it would cost the fast loops registers
        q_tile = load_tile(q_rows, q_s, i_first, length_q, D, BLOCK_M, BLOCK_D, True, FLAGS)
        state = careful_rows(
            q_tile, kv, r[:, None], b, wide_h, i_first, i_last, length_q, length_k, 0, 1, side,
            rng, scale, left, right, D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
        )  # fmt: skip
    acc, row_max, row_sum, e, bad = state

    factor, row_lse, largest, spread = row_ends(row_max, row_sum, e, bad, sink, wide_h, FLAGS)
    o_rows = out + wide_b * o_b + wide_h * o_h + q_first * o_s
    o = acc * (factor * inverse_keep)[:, None]
    store_tile(o_rows, o_s, i_first, length_q, o, DV, BLOCK_M, BLOCK_DV, FLAGS)
    row = wide_b * lse_b + wide_h * lse_h + q_first + i
    tl.store(lse + row, row_lse, mask=i < length_q)
    if STATS & FLAGS:
        tl.store(max_logit + row, largest, mask=i < length_q)
        tl.store(entropy + row, spread, mask=i < length_q)
