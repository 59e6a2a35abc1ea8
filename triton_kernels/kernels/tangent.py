"""T1, the tangent of the forward: O' and L' (of LSE), given O and LSE.

With ' the tangent, t the logit, g' softcap's derivative and M dropout's factor:

    t' = g' scale (q'.k + q.k') + bias'      L' = sum P t' + P_sink sink'
    O' = (P M (t' - L')) V + (P M) V'

One program = BLOCK_M queries of one head of one sequence; it walks once over the keys that they
see.  LSE is the base of the exponentials, whose sum is taken again, so that its rounding does not
show.  t' is taken relative to its mean over the first tile in which a row sees a key: a part that
the tangents of all keys have in common costs no digits.  Inputs hold no NaN and no infinity, which
the launcher makes sure of.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from attn_ext.triton_kernels.kernels.dropout import dropout_state, keep
from attn_ext.triton_kernels.kernels.logits import score_tile, tile_logits
from attn_ext.triton_kernels.kernels.primitives import (
    DROPOUT,
    INTERPRETED,
    LOG2E,
    RUNTIME,
    SINK,
    SOFTCAP,
    block_of,
    diagonal,
    dot,
    key_range,
    load_tile,
    store_tile,
    sum_of_products,
)
from attn_ext.triton_kernels.kernels.scores import base2_lse, probabilities

# MOVES: which inputs have a tangent, one compile-time integer as FLAGS is
MOVED_Q = tl.constexpr(1)
MOVED_K = tl.constexpr(2)
MOVED_V = tl.constexpr(4)
MOVED_DOUT = tl.constexpr(8)
MOVED_BIAS = tl.constexpr(16)
MOVED_SINK = tl.constexpr(32)
MOVED_LOGITS = tl.constexpr(1 + 2 + 16 + 32)  # t' or L' is not 0


class Heads(NamedTuple):
    """A tensor like q or k by its strides: one argument of a kernel."""

    at: object  # None: the tensor is absent
    b: int
    h: int
    s: int


class Scores(NamedTuple):
    """A tensor like the bias by its strides."""

    at: object
    b: int
    h: int
    q: int
    k: int


@triton.jit
def rows_of(x, b, h, first):
    """Pointer to row `first` of head h of batch element b, all int64."""
    return x.at + b * x.b + h * x.h + first * x.s


@triton.jit
def moving_rows(x, tx, b, h, first, MOVED: tl.constexpr):
    """Pointers to row `first` of x and of its tangent; twice that of x where it has none."""
    rows = rows_of(x, b, h, first)
    moved = rows
    if MOVED:
        moved = rows_of(tx, b, h, first)
    return rows, moved


@triton.jit
def moving_tile(
    x, tx, b, h, first, at, seqlen,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr, FLAGS: tl.constexpr,
    MOVED: tl.constexpr,
):  # fmt: skip
    """Rows `at` and on of x and of its tangent; twice those of x where it has none."""
    rows, moved = moving_rows(x, tx, b, h, first, MOVED)
    tile = load_tile(rows, x.s, at, seqlen, WIDTH, BLOCK, BLOCK_WIDTH, True, FLAGS)
    moved_tile = tile
    if MOVED:
        moved_tile = load_tile(moved, tx.s, at, seqlen, WIDTH, BLOCK, BLOCK_WIDTH, True, FLAGS)
    return tile, moved_tile


@triton.jit
def key_products(
    q, tq, kv, j_first, seqlen_k,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """(S, S', K, K') of a tile of keys: S = Q @ K^T,  S' = Q' @ K^T + Q @ K'^T
    [BLOCK_M, BLOCK_N]; K' is K where K does not move."""
    k, k_s, tk, tk_s, _v, _v_s, _tv, _tv_s = kv
    zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k_tile = load_tile(k, k_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
    s = dot(q, tl.trans(k_tile), zero)
    ts = zero
    if MOVED_Q & MOVES:
        ts = dot(tq, tl.trans(k_tile), ts)
    tk_tile = k_tile
    if MOVED_K & MOVES:
        tk_tile = load_tile(tk, tk_s, j_first, seqlen_k, D, BLOCK_N, BLOCK_D, True, FLAGS)
        ts = dot(q, tl.trans(tk_tile), ts)
    return s, ts, k_tile, tk_tile


@triton.jit
def weighted_sum(weights, rows, acc):
    """acc + weights @ rows in float32.  The weights are rounded to bfloat16 beside rows of that
    dtype; beside float16, whose range tangents leave, the product is one of TF32: as many digits,
    and float32's range."""
    if INTERPRETED:
        return dot(weights, rows, acc)
    if rows.dtype == tl.float16:
        if is_cuda():
            return tl.dot(weights, rows.to(tl.float32), acc, input_precision="tf32")
        return tl.dot(weights, rows.to(tl.float32), acc, input_precision="ieee")
    return dot(weights, rows, acc)


@triton.jit
def logit_tangents(
    products, cap, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, bias, softmax_scale,
    FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """t' of the tile whose products q'.k + q.k' are given; cap: tanh's value with softcap."""
    t = products * softmax_scale
    if SOFTCAP & FLAGS:
        t = t * (1.0 - cap * cap)
    if MOVED_BIAS & MOVES:
        t += score_tile(
            bias.at, bias.b, bias.h, bias.q, bias.k, b, h, i_first, r, j_first, c, seqlen_q,
            seqlen_k, False, False, FLAGS,
        ).to(tl.float32)  # fmt: skip
    return t


@triton.jit
def sink_weight(sink, tsink, h, row_lse, FLAGS: tl.constexpr, MOVES: tl.constexpr):
    """(P_sink, sink') of rows of head h; zeros without a sink, and for rows without keys."""
    weight, moved = tl.zeros_like(row_lse), 0.0
    if SINK & FLAGS:
        value = tl.load(sink + h).to(tl.float32)
        empty = row_lse == float("-inf")
        weight = tl.exp2((value - tl.where(empty, 0.0, row_lse)) * LOG2E)
        weight = tl.where(empty, 0.0, weight)
        if MOVED_SINK & MOVES:
            moved = tl.load(tsink + h).to(tl.float32)
    return weight, moved


@triton.jit
def tangent_tiles(
    q, tq, kv, row_lse, of_sink, moved_sink, i_first, r, b, h, seqlen_q, seqlen_k, off, terms,
    tbias, rng, scale, softmax_scale, left, right, first, end,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """(W, sum P, sum P (t' - mean), mean) after key tiles first..end - 1, with
    W = sum P M ((t' - mean) V + V')   [BLOCK_M, BLOCK_DV]."""
    _k, _k_s, _tk, _tk_s, v, v_s, tv, tv_s = kv
    w = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    rest, mean = total, total
    for n_block in tl.range(first, end):
        j_first = n_block * BLOCK_N
        c = tl.arange(0, BLOCK_N)[None, :]
        s, ts, _k_tile, _tk_tile = key_products(
            q, tq, kv, j_first, seqlen_k, D, BLOCK_M, BLOCK_N, BLOCK_D, FLAGS, MOVES
        )
        s, cap = tile_logits(
            s, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
            True, FLAGS,
        )  # fmt: skip
        p = probabilities(s, row_lse[:, None], True, FLAGS)
        found = tl.sum(p, 1)
        kept = p
        if DROPOUT & FLAGS:
            stays = keep(i_first + r, j_first, b, h, terms, rng, BLOCK_N, FLAGS)
            kept = tl.where(stays, p, 0.0)
        if MOVED_LOGITS & MOVES:
            t = logit_tangents(
                ts, cap, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, tbias, softmax_scale,
                FLAGS, MOVES,
            )  # fmt: skip
            t = tl.where(p != 0, t, 0.0)  # an excluded K may be far away
            here = sum_of_products(p, t) + of_sink * moved_sink
            begins = (total == 0) & (found != 0)
            mean = tl.where(begins, here / tl.where(begins, found + of_sink, 1.0), mean)
            t = tl.where(p != 0, t - mean[:, None], 0.0)
            rest += sum_of_products(p, t)
            # W += (P M (t' - mean)) @ V   [BLOCK_M, BLOCK_DV]
            v_tile = load_tile(v, v_s, j_first, seqlen_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
            w = weighted_sum(kept * t, v_tile, w)
        if MOVED_V & MOVES:
            tv_tile = load_tile(tv, tv_s, j_first, seqlen_k, DV, BLOCK_N, BLOCK_DV, True, FLAGS)
            w = weighted_sum(kept, tv_tile, w)
        total += found
    return w, total, rest, mean


@triton.jit(do_not_specialize=RUNTIME)
def tangent_kernel(
    q, k, v, out, tq, tk, tv, tout, tbias, lse, tlse,
    terms, sink, tsink, rng_state, cu_seqlens_q, cu_seqlens_k, lse_b, lse_h,
    heads_q, group, total_q, total_k, seqlen_q, seqlen_k, blocks,
    scale, threshold, inverse_keep, left, right, softmax_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FLAGS: tl.constexpr, MOVES: tl.constexpr,
):  # fmt: skip
    """Grid: (blocks of queries * Hq * B).  O' [B, Hq, Sq, Dv], L' [B, Hq, Sq]."""
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
    q_tile, tq_tile = moving_tile(
        q, tq, b, h, q_first, i_first, length_q, D, BLOCK_M, BLOCK_D, FLAGS, MOVED_Q & MOVES
    )
    k_rows, tk_rows = moving_rows(k, tk, b, hk, k_first, MOVED_K & MOVES)
    v_rows, tv_rows = moving_rows(v, tv, b, hk, k_first, MOVED_V & MOVES)
    kv = (k_rows, k.s, tk_rows, tk.s, v_rows, v.s, tv_rows, tv.s)
    i = i_first + tl.arange(0, BLOCK_M)
    row = b * lse_b + h * lse_h + q_first + i
    there = i < length_q
    row_lse = tl.load(lse + row, mask=there, other=float("-inf"))
    of_sink, moved_sink = sink_weight(sink, tsink, h, row_lse, FLAGS, MOVES)
    off = diagonal(b, length_q, length_k, terms, FLAGS)
    i_last = tl.minimum(i_first + BLOCK_M, length_q) - 1
    first, _full, _full_end, end = key_range(
        i_first, i_last, length_k, off, left, right, BLOCK_N, FLAGS
    )
    w, total, rest, mean = tangent_tiles(
        q_tile, tq_tile, kv, base2_lse(lse, row, there), of_sink, moved_sink, i_first,
        tl.arange(0, BLOCK_M)[:, None], b, h, length_q, length_k, off, terms, tbias, rng, scale,
        softmax_scale, left, right, first, end,
        D, DV, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, FLAGS, MOVES,
    )  # fmt: skip
    # L' = mean + sum P (t' - mean) with the sink's share;  O' = W - (L' - mean) O
    total += of_sink
    factor = 1.0 / tl.where(total == 0, 1.0, total)
    rest = (rest + of_sink * (moved_sink - mean)) * factor
    o = w * (factor * inverse_keep)[:, None]
    if MOVED_LOGITS & MOVES:
        o_rows = rows_of(out, b, h, q_first)
        o_tile = load_tile(o_rows, out.s, i_first, length_q, DV, BLOCK_M, BLOCK_DV, True, FLAGS)
        o -= rest[:, None] * o_tile.to(tl.float32)
    to_rows = rows_of(tout, b, h, q_first)
    store_tile(to_rows, tout.s, i_first, length_q, o, DV, BLOCK_M, BLOCK_DV, FLAGS)
    tl.store(tlse + row, mean + rest, mask=there)
