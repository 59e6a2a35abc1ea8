"""What the backward kernels compute from a tile of logits: P from LSE, dS from P and dP, dbias."""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.primitives import (
    DBIAS_ONE_KEY,
    DBIAS_ONE_QUERY,
    DBIAS_STORE,
    FAR_LSE,
    LOG2E,
    NATURAL,
    RELATIVE,
    SIGMOID,
    SOFTCAP,
    UNSCALED,
    WIDE,
    hold,
    key_order,
    orders_keys,
)
from attn_ext.triton_kernels.kernels.softmax import sigmoid, unit


@triton.jit
def base2_lse(lse, row, inside):
    """LSE in base 2: 0 for empty rows, so that no -inf - -inf arises; inf outside, where P = 0."""
    value = tl.load(lse + row, mask=inside, other=float("inf"))
    return tl.where(value == float("-inf"), 0.0, hold(value) * LOG2E)


@triton.jit
def is_far(lse):
    """Whether LSE, in base e, is so far from 0 that the sum in it is lost (far.py)."""
    return (tl.abs(lse) > FAR_LSE) & (tl.abs(lse) < float("inf"))


@triton.jit
def near_lse(lse, row, inside):
    """`base2_lse`, and inf in far rows too, so that P = 0 there: they are left to far.py."""
    far = is_far(tl.load(lse + row, mask=inside, other=0.0))
    return tl.where(far, float("inf"), base2_lse(lse, row, inside))


@triton.jit
def probabilities(s, lse, ALWAYS: tl.constexpr, FLAGS: tl.constexpr):
    """P = 2^(s - lse); 0 where s = -inf if ALWAYS, else there 0 or (LSE is NaN) NaN.  lse is inf
    for rows past the last query, which makes P 0 with SIGMOID (where it is 0 elsewhere) too."""
    p = sigmoid(s - lse) if (SIGMOID & FLAGS) else tl.exp2(s - lse)
    if ALWAYS:
        p = tl.where(s == float("-inf"), 0.0, p)
    return p


@triton.jit
def tile_probabilities(s, lse, terms, scale, ALWAYS: tl.constexpr, FLAGS: tl.constexpr, behind=0.0):
    """`probabilities` of what `tile_logits` gives, in its units: the exponent is one multiply-add,
    whose product is not rounded.  behind: with RELATIVE what the logits are less than s, in base 2,
    once a row."""
    if RELATIVE & FLAGS:
        lse += behind
    if (UNSCALED | NATURAL) & FLAGS:
        factor, shift = unit(terms, scale, FLAGS)
        p = tl.exp2(s * factor - (lse - shift))
        if ALWAYS:  # also where a logit overflows in base 2, whose row is a far one
            p = tl.where((s == float("-inf")) | (lse == float("inf")), 0.0, p)
    else:
        p = probabilities(s, lse, ALWAYS, FLAGS)
    return p


@triton.jit
def score_gradient(
    p, dp, delta, cap, ALWAYS: tl.constexpr, FLAGS: tl.constexpr, POSITIVE: tl.constexpr = False
):
    """(dS, dS before softcap); 0 where P = 0 if ALWAYS, else there 0 or NaN.  POSITIVE: 0
    where P is 0 or NaN."""
    weight = p * (1.0 - p) if (SIGMOID & FLAGS) else p
    grad = dp if (SIGMOID & FLAGS) else dp - delta
    ds = weight * grad
    raw = ds
    if SOFTCAP & FLAGS:
        # Not ds times it: of P and tanh one number is held until dP is there
        raw = (weight * (1.0 - cap * cap)) * grad
    if ALWAYS:
        ds = tl.where(p != 0, ds, 0.0)
        raw = tl.where(p != 0, raw, 0.0)
    elif POSITIVE:
        ds = tl.where(p > 0, ds, 0.0)
        raw = tl.where(p > 0, raw, 0.0)
    return ds, raw


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
def add_whole_dbias(
    ds, i_first, j_first, b, h, seqlen_q, seqlen_k, grad, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """`add_dbias` of queries i_first, ... and of keys j_first, ... in `key_order`, all of which
    exist: so its places are vectors.  Keys in another order than their own are four of a thread,
    and rows are put as lanes and warps hold them, so that nothing goes through shared memory."""
    dbias, g_b, g_h, g_q, g_k = grad
    if (DBIAS_ONE_QUERY & FLAGS) or (DBIAS_ONE_KEY & FLAGS):
        i, j = i_first + tl.arange(0, BLOCK_M), j_first + key_order(BLOCK_N, FLAGS)
        add_dbias(ds, i[:, None], j[None, :], b, h, seqlen_q, seqlen_k, grad, FLAGS)
    else:
        base = dbias + b * g_b + h * g_h
        base += i_first.to(tl.int64) * g_q + j_first.to(tl.int64) * g_k
        if orders_keys(FLAGS):
            # Rows 16 m + 8 e + g and 16 columns n each, of which 8 e + 2 q + p are keys
            # 4 q + 2 e + p, as [2 e, n, m, 8 g, 16 keys]: Triton gives lanes the last, then warps
            ds = tl.reshape(ds, [BLOCK_M // 16, 2, 8, BLOCK_N // 16, 2, 4, 2])
            ds = tl.permute(ds, [1, 3, 0, 2, 5, 4, 6])
            ds = tl.reshape(ds, [2, BLOCK_N // 16, BLOCK_M // 16, 8, 16])
            r = 8 * tl.arange(0, 2)[:, None, None, None, None]
            r = r + 16 * tl.arange(0, BLOCK_M // 16)[None, None, :, None, None]
            r = r + tl.arange(0, 8)[None, None, None, :, None]
            c = 16 * tl.arange(0, BLOCK_N // 16)[None, :, None, None, None]
            c = c + tl.arange(0, 16)[None, None, None, None, :]
        else:
            r, c = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
        inside = i_first + r < seqlen_q
        if WIDE & FLAGS:
            r, c = r.to(tl.int64), c.to(tl.int64)
        places = base + (r * g_q + c * g_k)
        if DBIAS_STORE & FLAGS:
            tl.store(places, ds, mask=inside)
        else:
            tl.atomic_add(places, ds, mask=inside, sem="relaxed")
