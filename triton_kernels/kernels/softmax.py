"""Softmax and sigmoid: weights of a tile of logits, the online sums of a row, and its results."""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.primitives import (
    FAR,
    FINFO_MIN,
    LEAST2,
    LN2,
    LOG2E,
    SIGMOID,
    SINK,
    STATS,
    UNSCALED,
)

LARGEST_UNSCALED = tl.constexpr(16777216.0)  # of which half a unit in the last place is 1/2


@triton.jit
def sigmoid(s):
    """1 / (1 + 2^-s): 0 for the -inf of an excluded pair."""
    return 1.0 / (1.0 + tl.exp2(-s))


@triton.jit
def online_softmax(s, scale, row_max, row_sum, e, bad, FLAGS: tl.constexpr):
    """(P, alpha, row_max, row_sum, e, bad) after the tile s [BLOCK_M, BLOCK_N] of base-2 logits.

    SIGMOID: P = 1 / (1 + 2^-s), and nothing to sum.  Else P = 2^(s - row_max) with the new row_max;
    what was summed before shrinks by alpha.  With STATS e = sum_j P_ij (s_ij - m_i), and `bad`
    counts the NaN of a row, which max ignores.  UNSCALED: s is q . k, to be multiplied by `scale`.
    """
    if SIGMOID & FLAGS:
        return sigmoid(s), row_sum + 1.0, row_max, row_sum, e, bad
    factor = scale if UNSCALED & FLAGS else 1.0
    m_new = tl.maximum(row_max, tl.max(s, 1) * factor)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows still empty: no -inf - -inf
    # UNSCALED: one multiply-add; what that means for huge logits says `far_count`
    distance = s * factor - m_safe[:, None]
    p = tl.exp2(distance)
    alpha = tl.exp2(row_max - m_safe)
    if STATS & FLAGS:
        before = tl.maximum(row_max - m_safe, -FAR)
        terms = tl.where(p > 0, p * distance, 0.0)
        e = alpha * (e + before * row_sum) + tl.sum(terms, 1)
        bad += tl.sum(tl.where(s != s, 1.0, 0.0), 1)
    row_sum = alpha * row_sum + tl.sum(p, 1)
    return p, alpha, m_new, row_sum, e, bad


@triton.jit
def far_count(row_max, FLAGS: tl.constexpr):
    """How many rows have logits so large that the rounding of row_max, which a multiply-add does
    not share, counts in an exponent, or an overflow of it: to be computed again by `careful_rows`,
    which rounds both alike."""
    if UNSCALED & FLAGS:
        far = (tl.abs(row_max) > LARGEST_UNSCALED) & (row_max != float("-inf"))
        return tl.sum(tl.where(far, 1, 0), 0)
    return 0


@triton.jit
def natural(s):
    """Base-2 logits in base e; what a bias of LEAST has left is finfo.min again."""
    lowest = (s < LEAST2) & (s != float("-inf"))
    return tl.where(lowest, FINFO_MIN, s * LN2)


@triton.jit
def row_ends(row_max, row_sum, e, bad, sink, h, FLAGS: tl.constexpr):
    """(factor, LSE, largest logit, entropy) of rows with sums row_sum and e; O = factor * acc.
    The sink joins the normaliser; a row without keys stays empty even then."""
    if SIGMOID & FLAGS:
        return row_sum + 1.0, row_sum, row_sum, row_sum
    empty = row_sum == 0  # not row_max == -inf, which is also a row of nothing but NaN
    largest = tl.where(bad > 0, float("nan"), natural(row_max))
    m_all, l_all, shrink = row_max, row_sum, tl.full(row_max.shape, 1.0, tl.float32)
    if SINK & FLAGS:
        extra = tl.load(sink + h).to(tl.float32) * LOG2E
        m_all = tl.maximum(row_max, extra)
        shrink = tl.exp2(row_max - tl.where(empty, 0.0, m_all))
        l_all = row_sum * shrink + tl.exp2(extra - m_all)
    total = tl.where(empty, 1.0, l_all)
    factor = tl.where(empty, 0.0, shrink / total)
    lse = tl.where(empty, float("-inf"), natural(m_all + tl.log2(total)))
    # -sum P ln P with P = shrink * p / total and ln P = ln p + ln(shrink / total).  The maxima
    # first: beside 1e9 the logarithm would be lost.
    apart = tl.minimum(m_all - row_max, FAR)
    entropy = (row_sum * (tl.log2(total) + apart) - e) * factor * LN2
    return factor, lse, largest, tl.where(empty, 0.0, entropy)
