"""Softmax and sigmoid: weights of a tile of logits, the online sums of a row, and its results."""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.primitives import (
    APPROX_TANH,
    BOUNDED,
    DROPOUT,
    FAR,
    FINFO_MIN,
    LEAST2,
    LN2,
    LOG2E,
    NATURAL,
    RELATIVE,
    SIGMOID,
    SINK,
    SOFTCAP,
    STATS,
    UNSCALED,
    hold,
    nan_count,
)

LARGEST_UNSCALED = tl.constexpr(16777216.0)  # of which half a unit in the last place is 1/2
# In base e: floats are 64 apart from here on.  COARSE2: in base 2, past all that a maximum below
# COARSE may share weights with.
COARSE = tl.constexpr(536870912.0)
COARSE2 = tl.constexpr(774550000.0)


@triton.jit
def sigmoid(s):
    """1 / (1 + 2^-s): 0 for the -inf of an excluded pair."""
    return 1.0 / (1.0 + tl.exp2(-s))


@triton.jit
def unit(terms, scale, FLAGS: tl.constexpr):
    """(factor, shift): base-2 logits are factor times what `tile_logits` gives, plus shift.

    UNSCALED: with softcap that is tanh or `tanh_part`, else q . k and ALiBi's share over the
    scale.  NATURAL: in base e.  Else base-2 logits themselves."""
    if (UNSCALED & FLAGS) and (SOFTCAP & FLAGS):
        # of tanh itself, or of `tanh_part`
        return (
            (terms.cap_out, 0.0) if APPROX_TANH & FLAGS else (2.0 * terms.cap_out, -terms.cap_out)
        )
    if UNSCALED & FLAGS:
        return scale, 0.0
    return (LOG2E, 0.0) if NATURAL & FLAGS else (1.0, 0.0)


@triton.jit
def base2_max(row_max, row_sum, shift, FLAGS: tl.constexpr):
    """The rows' maxima of `online_softmax` in base 2, shift included; with BOUNDED the logarithm of
    the sum, rounded up, which stands for them."""
    if BOUNDED & FLAGS:
        return tl.where(row_sum > 0, tl.ceil(tl.log2(row_sum)), float("-inf"))
    if NATURAL & FLAGS:
        return hold(row_max) * LOG2E
    return row_max + shift if (SOFTCAP & FLAGS) and (UNSCALED & FLAGS) else row_max


@triton.jit
def online_softmax(s, factor, row_max, row_sum, e, bad, FLAGS: tl.constexpr, behind=0.0):
    """(P, alpha, row_max, row_sum, e, bad) after the tile s [BLOCK_M, BLOCK_N] of logits, of which
    `unit` says the factor; row_max is in base 2, but with NATURAL in base e, since the least number
    in base 2 is -inf.

    SIGMOID: P = 1 / (1 + 2^-s), and nothing to sum.  Else P = 2^(s - row_max) with the new row_max;
    what was summed before shrinks by alpha.  With STATS e = sum_j P_ij (s_ij - m_i), and `bad`
    counts the NaN of a row, which max ignores.  BOUNDED: P = 2^s, and row_max is not used.
    behind: with RELATIVE what the logits, in base 2, are less than s, [BLOCK_M].
    """
    if SIGMOID & FLAGS:
        return sigmoid(s), row_sum + 1.0, row_max, row_sum, e, bad
    if BOUNDED & FLAGS:
        p = tl.exp2(s * factor)
        return p, row_sum, row_max, row_sum + tl.sum(p, 1), e, bad
    if NATURAL & FLAGS:
        m_new = tl.maximum(row_max, tl.max(s, 1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)  # rows still empty: no -inf - -inf
        # One multiply-add, as below.  Of coarse logits two are equal or so far apart that the
        # smaller weighs nothing in either base: base e serves, in which the least number is finite.
        coarse = tl.abs(m_safe) >= COARSE
        times = tl.where(coarse, 1.0, factor)
        base2 = m_safe * times
        distance = s * times[:, None] - base2[:, None]
        shrink = tl.where(coarse, row_max - m_safe, row_max * factor - base2)
    else:
        times = factor if UNSCALED & FLAGS else 1.0
        largest = tl.max(s, 1) * times
        if RELATIVE & FLAGS:
            largest -= behind
        m_new = tl.maximum(row_max, largest)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        base = m_safe
        if RELATIVE & FLAGS:
            base += behind
        # UNSCALED: one multiply-add; what that means for huge logits says `far_count`
        distance = s * times - base[:, None]
        shrink = row_max - m_safe
    p = tl.exp2(distance)
    alpha = tl.exp2(shrink)
    if STATS & FLAGS:
        before = tl.maximum(shrink, -FAR)
        terms = tl.where(p > 0, p * distance, 0.0)
        e = alpha * (e + before * row_sum) + tl.sum(terms, 1)
        bad += tl.sum(tl.where(s != s, 1.0, 0.0), 1)
    row_sum = alpha * row_sum + tl.sum(p, 1)
    return p, alpha, m_new, row_sum, e, bad


@triton.jit
def lost_count(row_sum, FLAGS: tl.constexpr):
    """How many rows have a sum that is NaN: dropout may have kept its NaN from O, and NATURAL does
    not look for biases of -inf, so that the pair may be an excluded one."""
    if (DROPOUT & FLAGS) and (NATURAL & FLAGS):
        return tl.sum(tl.where(row_sum != row_sum, 1, 0), 0)
    return 0


@triton.jit
def far_count(row_max, FLAGS: tl.constexpr):
    """How many rows have logits so large that the rounding of row_max, which a multiply-add does
    not share, counts in an exponent, or an overflow of it: to be computed again by `careful_rows`,
    which rounds both alike.  With NATURAL those that `online_softmax` takes as coarse are not."""
    if (UNSCALED | NATURAL) & FLAGS:
        far = (tl.abs(row_max) > LARGEST_UNSCALED) & (row_max != float("-inf"))
        if NATURAL & FLAGS:
            far = far & (tl.abs(row_max) < COARSE2)
        return tl.sum(tl.where(far, 1, 0), 0)
    return 0


@triton.jit
def again_count(acc, row_max, row_sum, FLAGS: tl.constexpr):
    """Not 0 if rows are to be computed again by `careful_rows`; row_max in base 2."""
    if BOUNDED & FLAGS:
        acc = acc * 0.0  # inf counts as well: a weight above 1 may have made it of a finite value
    return nan_count(acc) + far_count(row_max, FLAGS) + lost_count(row_sum, FLAGS)


@triton.jit
def natural(s):
    """Base-2 logits in base e; what LEAST and -LEAST have left is the least and largest float
    again."""
    beyond = (tl.abs(s) > -LEAST2) & (tl.abs(s) < float("inf"))
    return tl.where(beyond, tl.where(s < 0, FINFO_MIN, -FINFO_MIN), s * LN2)


@triton.jit
def sink_logit(sink, h):
    """The sink of head h in base 2."""
    return hold(tl.load(sink + h).to(tl.float32)) * LOG2E


@triton.jit
def row_ends(row_max, row_sum, e, bad, sink, h, FLAGS: tl.constexpr):
    """(factor, LSE, largest logit, entropy) of rows with sums row_sum and e; O = factor * acc.
    The sink joins the normaliser; a row without keys stays empty even then."""
    if SIGMOID & FLAGS:
        return row_sum + 1.0, row_sum, row_sum, row_sum
    empty = row_sum == 0  # not row_max == -inf, which is also a row of nothing but NaN
    # A row with a logit of inf is one of NaN as well: that logit's weight is 2^(inf - inf)
    lost = (bad > 0) | (row_max == float("inf"))
    largest = tl.where(lost, float("nan"), natural(row_max))
    m_all, l_all, shrink = row_max, row_sum, tl.full(row_max.shape, 1.0, tl.float32)
    if SINK & FLAGS:
        extra = sink_logit(sink, h)
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
