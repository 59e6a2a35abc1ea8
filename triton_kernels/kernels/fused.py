"""Backward in one pass of 5 products, for calls that need not be deterministic, and what it leaves.

    fused: a program = BLOCK_N keys of a K/V head, as in dK and dV (dkdv.py); the share of these
           keys in dQ is added to float32 sums by atomic additions, so in an order that varies
    dq_from_sums: a program = BLOCK_M queries of a head; dQ = scale * sums, rounded to its dtype

The sums are zero before (`delta_kernel`).  A NaN among them may be 0 * NaN of an excluded pair:
these queries are then computed again, key by key.
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.delta import sum_places, sums_of
from attn_ext.triton_kernels.kernels.dkdv import key_block
from attn_ext.triton_kernels.kernels.dq import store_query_block
from attn_ext.triton_kernels.kernels.primitives import RUNTIME, block_of, nan_count


@triton.jit(do_not_specialize=RUNTIME)
def fused_kernel(
    q, k, v, dout, lse2, delta, dk, dv, sums,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dk_b, dk_h, dk_s, dv_b, dv_h, dv_s, sums_b, sums_h,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of keys * Hk * B).  dK, dV [B, Hk, Sk, D | Dv]; sums of dQ as `sums_of`."""
    key_block(
        (q, k, v, dout, lse2, delta), (dk, dv), (sums, sums_b, sums_h), terms, rng_state,
        (cu_seqlens_q, cu_seqlens_k), (q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h),
        (k_b, k_h, k_s, v_b, v_h, v_s), (dk_b, dk_h, dk_s, dv_b, dv_h, dv_s),
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks),
        (scale, threshold, inverse_keep, left, right, softmax_scale),
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def dq_from_sums_kernel(
    q, k, v, dout, lse2, delta, dq, sums,
    terms, sink, rng_state, cu_seqlens_q, cu_seqlens_k,
    q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, do_b, do_h, do_s, lse_b, lse_h,
    dq_b, dq_h, dq_s, sums_b, sums_h,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  dQ [B, Hq, Sq, D]."""
    block, h, b, q_first, length_q, k_first, length_k = block_of(
        cu_seqlens_q, cu_seqlens_k, 0,
        (heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks), heads_q, FLAGS,
    )  # fmt: skip
    i_first = block * BLOCK_M
    if i_first >= length_q:
        return
    b, h = b.to(tl.int64), h.to(tl.int64)
    rows = sums_of(sums, b, h, q_first, sums_b, sums_h, BLOCK_D, FLAGS)
    acc = tl.load(rows + i_first.to(tl.int64) * BLOCK_D + sum_places(BLOCK_M, BLOCK_D))
    inside = (i_first + tl.arange(0, BLOCK_M) < length_q)[:, None]
    store_query_block(
        acc, nan_count(tl.where(inside, acc, 0.0)), (q, k, v, dout, lse2, delta), dq, None,
        (q_b, q_h, q_s, do_b, do_h, do_s, lse_b, lse_h, dq_b, dq_h, dq_s),
        (k_b, k_h, k_s, v_b, v_h, v_s), b, h, h // group, i_first, q_first, k_first, length_q,
        length_k, terms, rng_state, (scale, threshold, inverse_keep, left, right, softmax_scale),
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS,
    )  # fmt: skip
