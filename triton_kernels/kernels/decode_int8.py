"""Decode against keys and values kept as int8, each row with a factor: k_j = factor_j * row_j.

q [B, Hq, Sq, D] float32; k, v int8 [pages, Hk, page_size, D | Dv] with factors float32
[pages, Hk, page_size, 1] and block_table [B, max_pages].  Programs, packed rows and parts as in
decode.py, whose `combine_kernel` joins the parts, too.

    S = (Q @ K8^T) * k_factor        O += (P * v_factor) @ V8

The rows of int8 are multiplied as bfloat16, which holds them exactly, by the other factor as a sum
of bfloat16 numbers (`times_whole`).  Every V8 is finite: what an excluded key holds cannot reach a
sum, so that no tile is computed again.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.decode import packed_rows, store_packed_rows
from attn_ext.triton_kernels.kernels.fwd import empty_state
from attn_ext.triton_kernels.kernels.logits import tile_logits
from attn_ext.triton_kernels.kernels.primitives import (
    INTERPRETED,
    diagonal,
    dot,
    key_range,
    part_of,
)
from attn_ext.triton_kernels.kernels.softmax import online_softmax


@triton.jit
def times_whole(x, whole, acc, PARTS: tl.constexpr):
    """acc + x @ whole, where x counts as the sum of PARTS bfloat16 numbers: 8 bits each."""
    rest = x
    for _ in tl.static_range(PARTS):
        part = rest.to(tl.bfloat16)
        value = part.to(tl.float32)
        acc = dot(value if INTERPRETED else part, whole, acc)
        rest = tl.where(tl.abs(value) < float("inf"), rest - value, 0.0)  # no inf - inf
    return acc


@triton.jit
def load_kept(
    base, page_stride, stride, page, slot, inside, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Rows of int8 [BLOCK_N, BLOCK_DIM] as products take them; 0 where there is none."""
    d = tl.arange(0, BLOCK_DIM)[None, :]
    rows = base + page * page_stride + slot * stride
    kept = tl.load(rows[:, None] + d, mask=inside[:, None] & (d < DIM), other=0)
    return kept.to(tl.float32) if INTERPRETED else kept.to(tl.bfloat16)


@triton.jit(
    do_not_specialize=[
        "page_size", "page_count", "heads_q", "group", "seqlen_q", "seqlen_k", "m_blocks",
        "splits", "left", "right",
    ]
)  # fmt: skip
def decode_int8_kernel(
    q, k, v, k_factors, v_factors, out, lse, part, sums,
    terms, sink, seqlens_k, block_table,
    q_b, q_h, q_s, k_p, k_h, k_s, v_p, v_h, v_s, kf_p, kf_h, kf_s, vf_p, vf_h, vf_s,
    o_b, o_h, o_s, lse_b, lse_h, table_b, page_size, page_count,
    heads_q, group, seqlen_q, seqlen_k, m_blocks, splits, scale, left, right,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, Q_PARTS: tl.constexpr, P_PARTS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (m_blocks * splits * Hk * B).  part and sums as in `decode_kernel`."""
    heads_k = heads_q // group
    split, hk, b, rows = packed_rows(m_blocks, splits, heads_k, group, seqlen_q, BLOCK_M)
    real, i, h, i_first, i_last = rows
    length = tl.minimum(tl.maximum(tl.load(seqlens_k + b), 0), seqlen_k)
    wide_b, wide_hk = b.to(tl.int64), hk.to(tl.int64)
    r = (i - i_first)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    q_rows = q + wide_b * q_b + h * q_h + i.to(tl.int64) * q_s
    q_tile = tl.load(q_rows[:, None] + d, mask=real[:, None] & (d < D), other=0.0)

    off = diagonal(b, seqlen_q, length, terms, FLAGS)
    first, _inner, _inner_end, end = key_range(i_first, i_last, length, off, left, right, BLOCK_N,
                                               FLAGS)  # fmt: skip
    first, end = part_of(first, end, split, splits)
    acc, row_max, row_sum, e, bad = empty_state(BLOCK_M, BLOCK_DV)
    c = tl.arange(0, BLOCK_N)
    for n_block in tl.range(first, end):
        j_first = n_block * BLOCK_N
        j = j_first + c
        inside = j < length
        page = tl.load(block_table + wide_b * table_b + j // page_size, mask=inside, other=0)
        page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
        slot = (j % page_size).to(tl.int64)
        # S = (Q @ K8^T) * k_factor   [BLOCK_M, BLOCK_N]
        kept = load_kept(k + wide_hk * k_h, k_p, k_s, page, slot, inside, D, BLOCK_D)
        at = k_factors + wide_hk * kf_h + page * kf_p + slot * kf_s
        factor = tl.load(at, mask=inside, other=0.0)
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        qk = times_whole(q_tile, tl.trans(kept), zero, Q_PARTS) * factor[None, :]
        s, _cap = tile_logits(
            qk, i_first, r, j_first, c[None, :], b, h[:, None], seqlen_q, length, off, terms,
            scale, left, right, True, FLAGS,
        )  # fmt: skip
        p, alpha, row_max, row_sum, e, bad = online_softmax(
            s, scale, row_max, row_sum, e, bad, FLAGS
        )
        # O = alpha * O + (P * v_factor) @ V8   [BLOCK_M, BLOCK_DV]
        kept = load_kept(v + wide_hk * v_h, v_p, v_s, page, slot, inside, DV, BLOCK_DV)
        at = v_factors + wide_hk * vf_h + page * vf_p + slot * vf_s
        factor = tl.load(at, mask=inside, other=0.0)
        weight = tl.where(p != 0, p * factor[None, :], 0.0)  # 0 * NaN of an excluded key
        acc = tl.where(alpha[:, None] != 0, acc * alpha[:, None], 0.0)
        acc = times_whole(weight, kept, acc, P_PARTS)
    state = (acc, row_max, row_sum, e, bad)
    ends = (out + wide_b * o_b, o_h, o_s, lse, lse, lse, wide_b * lse_b + h * lse_h + i,
            part, sums, sink, 1.0, split, splits, m_blocks, heads_q, seqlen_q, heads_k,
            real, h, i)  # fmt: skip
    store_packed_rows(state, ends, DV, BLOCK_DV, FLAGS)
