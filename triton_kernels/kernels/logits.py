"""Logits of a tile, elementwise over a row index i and a key index j: scale, soft cap, bias, ALiBi,
mask and window, as `primitives.Terms` names them, with the tiles of mask and bias that they read.

The indices broadcast against each other, so that one text serves S = Q K^T [BLOCK_M, BLOCK_N]
(forward, dQ, decode: i is [BLOCK_M, 1]) and its transpose [BLOCK_N, BLOCK_M] (dK and dV: i is
[1, BLOCK_M]).
"""

import triton
import triton.language as tl

from attn_ext.triton_kernels.kernels.functions import (
    tanh,
    tanh_approx,
    tanh_part,
    where_seen,
    widened,
)
from attn_ext.triton_kernels.kernels.primitives import (
    ALIBI,
    APPROX_TANH,
    BACKWARD,
    BIAS,
    BIAS_ONE_QUERY,
    DBIAS_ADD,
    FRAME,
    KEY_QUADS,
    KEY_WORDS,
    LEFT,
    LN2,
    LOG2E,
    MASK,
    MASK_ONE_QUERY,
    MASK_PAIRS,
    NATURAL,
    QUICK_TANH,
    RELATIVE,
    RIGHT,
    SIGMOID,
    SIGMOID_LENGTH,
    SOFTCAP,
    STEEP,
    UNSCALED,
    WIDE,
    hold,
    in_frame,
    last_distance,
)


@triton.jit
def logits(
    qk, i, j, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right, POSITIONS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """`tile_logits` of any positions i and j, its offsets in 64 bits."""
    zero = b * 0
    EACH: tl.constexpr = ~MASK_PAIRS & (WIDE | FLAGS)  # keys need not be neighbours
    return tile_logits(
        qk, zero, i, zero, j, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right, POSITIONS,
        EACH,
    )  # fmt: skip


@triton.jit
def score_tile(
    base, b_s, h_s, q_s, k_s, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k,
    ONE_QUERY: tl.constexpr, WHOLE_KEYS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Elements (i_first + r, j_first + c) of a mask or bias of head h, 0 outside; with ONE_QUERY of
    its only query, shaped as c.  WHOLE_KEYS: all these keys exist; a check of each would keep loads
    from being vectors.  A query past the last one then gets the row of that, whose results are not
    stored: no comparison.  Within the tile 32 bits do (but WIDE): a tile of 64-bit offsets takes
    too many registers."""
    if WIDE & FLAGS:
        r, c = r.to(tl.int64), c.to(tl.int64)
    tile = base + b.to(tl.int64) * b_s + h * h_s + j_first.to(tl.int64) * k_s
    keys = j_first + c < seqlen_k
    if ONE_QUERY:
        places = tile + c * k_s
        found = tl.load(places) if WHOLE_KEYS else tl.load(places, mask=keys, other=0)
    else:
        places = tile + i_first.to(tl.int64) * q_s
        if WHOLE_KEYS:
            row = tl.minimum(r, seqlen_q - 1 - i_first)
            found = tl.load(places + (row * q_s + c * k_s))
        else:
            queries = i_first + r < seqlen_q
            found = tl.load(places + (r * q_s + c * k_s), mask=queries & keys, other=0)
    return found


@triton.jit
def mask_pairs(
    terms, b, h, i_first, r, j_first, seqlen_q, seqlen_k, PAIRS: tl.constexpr,
    WHOLE_KEYS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """Words of two keys of the mask, [BLOCK_M, PAIRS], or with MASK_ONE_QUERY [1, PAIRS]; rows past
    the last one as in `score_tile`."""
    tile = terms.mask + b.to(tl.int64) * terms.mask_b + h * terms.mask_h + j_first
    tile = (tile + i_first.to(tl.int64) * terms.mask_q).to(tl.pointer_type(tl.uint16), bitcast=True)
    row = tl.minimum(r, seqlen_q - 1 - i_first)
    if WIDE & FLAGS:
        row = row.to(tl.int64)
    pair = tl.arange(0, PAIRS)[None, :]
    places = tile + (pair if MASK_ONE_QUERY & FLAGS else row * (terms.mask_q // 2) + pair)
    if WHOLE_KEYS:
        words = tl.load(places)
    else:
        words = tl.load(places, mask=j_first + 2 * pair < seqlen_k, other=0)
    return words


@triton.jit
def score_words(
    base, b_s, h_s, q_s, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, KEYS: tl.constexpr,
    WHOLE_KEYS: tl.constexpr, FLAGS: tl.constexpr,
):  # fmt: skip
    """With KEY_WORDS: (words of KEYS keys, 2 or 4, of a mask or bias, each at all of its keys; each
    key's place in its word).  [BLOCK_M, BLOCK_N], of keys in `key_order`; or of S^T, where c is
    [BLOCK_N, 1], [BLOCK_N, BLOCK_M] of keys in `own_key_order`.  b_s, h_s, q_s: of elements.

    Triton's loops load 32 bits ahead and in the order in which a thread holds S, but fewer bits
    neither, and of loads of 8 bits it concludes that P is to be held in another order."""
    TRANSPOSED: tl.constexpr = c.shape[1] == 1
    N: tl.constexpr = c.shape[0] * c.shape[1]
    start = b.to(tl.int64) * (b_s // KEYS) + h * (h_s // KEYS)
    start += i_first.to(tl.int64) * (q_s // KEYS) + j_first // KEYS
    row = tl.minimum(r, seqlen_q - 1 - i_first)  # as in `score_tile`
    if WIDE & FLAGS:
        row = row.to(tl.int64)
    word = tl.arange(0, N // KEYS)
    word = word[:, None] if TRANSPOSED else word[None, :]
    places = base.to(tl.pointer_type(tl.uint32), bitcast=True) + start
    places += row * (q_s // KEYS) + word
    if WHOLE_KEYS:
        words = tl.load(places)
    else:
        words = tl.load(places, mask=j_first + KEYS * word < seqlen_k, other=0)
    n = tl.arange(0, N)
    if TRANSPOSED and (KEY_QUADS & FLAGS):
        # Rows (N / 2) e + 16 w + 8 p + g are keys 4 (8 w + g) + 2 e + p
        M: tl.constexpr = words.shape[1]
        words = tl.permute(tl.reshape(words, [N // 32, 8, 4 // KEYS, M]), [2, 0, 1, 3])
        words = tl.reshape(words, [4 // KEYS, N // 32, 1, 8, M])
        words = tl.broadcast_to(words, [2, N // 32, 2, 8, M])
        words = tl.reshape(words, [N, M])
        place = ((n // (N // 2) * 2 + ((n & 8) >> 3)) & (KEYS - 1))[:, None]
    elif TRANSPOSED:
        # Of 16 rows 8 e + g are keys 2 g + e: the word of 4 keys is g / 2, that of 2 keys g
        M: tl.constexpr = words.shape[1]
        words = tl.reshape(words, [N // 16, 1, 16 // KEYS, 1, M])
        words = tl.broadcast_to(words, [N // 16, 2, 16 // KEYS, KEYS // 2, M])
        words = tl.reshape(words, [N, M])
        place = (((n & 1) * 2 + ((n & 8) >> 3)) & (KEYS - 1))[:, None]
    else:
        # Of 16 columns 8 e + 2 q + p are keys 4 q + 2 e + p
        M: tl.constexpr = words.shape[0]
        words = tl.reshape(words, [M, N // 16, 4, 4 // KEYS, 1])
        words = tl.broadcast_to(tl.permute(words, [0, 1, 3, 2, 4]), [M, N // 16, 2, 4, 2])
        words = tl.reshape(words, [M, N])
        place = ((((n & 8) >> 2) + (n & 1)) & (KEYS - 1))[None, :]
    return words, place.to(tl.uint32)


@triton.jit
def mask_words(
    terms, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, WHOLE_KEYS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """`score_words` of the mask: four keys each."""
    return score_words(
        terms.mask, terms.mask_b, terms.mask_h, terms.mask_q, b, h, i_first, r, j_first, c,
        seqlen_q, seqlen_k, 4, WHOLE_KEYS, FLAGS,
    )  # fmt: skip


@triton.jit
def visible_keys(
    terms, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, WHOLE_KEYS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """A tile of the mask: not 0 where a query sees a key."""
    if (KEY_WORDS & FLAGS) and not (MASK_ONE_QUERY & FLAGS):
        words, place = mask_words(
            terms, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, WHOLE_KEYS, FLAGS
        )
        found = words & (tl.full(place.shape, 0xFF, tl.uint32) << (place * 8))
    elif (MASK_PAIRS & FLAGS) and not (KEY_WORDS & FLAGS) and c.shape[1] > 1:
        words = mask_pairs(
            terms, b, h, i_first, r, j_first, seqlen_q, seqlen_k, c.shape[1] // 2, WHOLE_KEYS, FLAGS
        )
        # Not tl.join, nor bytes: Triton would then hold the factors of P V on sm_80 in an order
        # that takes a shuffle for each pair of P
        PAIRS: tl.constexpr = c.shape[1] // 2
        found = tl.broadcast_to(words.to(tl.uint32)[:, :, None], [words.shape[0], PAIRS, 2])
        found = tl.reshape(found, [words.shape[0], c.shape[1]])
        found = found & (0xFF << ((tl.arange(0, c.shape[1]) & 1) * 8))[None, :].to(tl.uint32)
    else:
        found = score_tile(
            terms.mask, terms.mask_b, terms.mask_h, terms.mask_q, terms.mask_k, b, h, i_first, r,
            j_first, c, seqlen_q, seqlen_k, MASK_ONE_QUERY & FLAGS, WHOLE_KEYS, FLAGS,
        )  # fmt: skip
    return found


@triton.jit
def bias_tile(
    terms, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, WHOLE_KEYS: tl.constexpr,
    FLAGS: tl.constexpr,
):  # fmt: skip
    """A tile of the bias in float32, or of its only query's row."""
    HALVES: tl.constexpr = terms.bias.dtype.element_ty.primitive_bitwidth == 16
    if (KEY_WORDS & FLAGS) and HALVES and not (BIAS_ONE_QUERY & FLAGS):
        words, place = score_words(
            terms.bias, terms.bias_b, terms.bias_h, terms.bias_q, b, h, i_first, r, j_first, c,
            seqlen_q, seqlen_k, 2, WHOLE_KEYS, FLAGS,
        )  # fmt: skip
        if terms.bias.dtype.element_ty == tl.bfloat16:
            wide = tl.where(place == 0, words << 16, words & 0xFFFF0000)
            wide = wide.to(tl.float32, bitcast=True)
        else:
            half = tl.where(place == 0, words, words >> 16).to(tl.uint16)
            wide = half.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        tile = score_tile(
            terms.bias, terms.bias_b, terms.bias_h, terms.bias_q, terms.bias_k, b, h, i_first, r,
            j_first, c, seqlen_q, seqlen_k, BIAS_ONE_QUERY & FLAGS, WHOLE_KEYS, FLAGS,
        )  # fmt: skip
        wide = widened(tile)
    return wide


@triton.jit
def alibi_slope(b, h, terms, scale, FLAGS: tl.constexpr):
    """The slope of head h in the units of the logits."""
    slope = tl.load(terms.alibi + b.to(tl.int64) * terms.alibi_b + h).to(tl.float32)
    if NATURAL & FLAGS:
        return slope
    return slope * LOG2E / scale if UNSCALED & FLAGS else slope * LOG2E


@triton.jit
def row_distance(i_first, j_first, b, seqlen_q, seqlen_k, terms, BLOCK_M, FLAGS: tl.constexpr):
    """How far the keys of queries i_first, ... lie behind j_first, [BLOCK_M]."""
    last = last_distance(b, seqlen_q, seqlen_k, terms, FLAGS)
    # of floats: an integer of each row would be converted
    return (i_first + last - j_first).to(tl.float32) + tl.arange(0, BLOCK_M).to(tl.float32)


@triton.jit
def is_steep(b, h, terms):
    """Whether RELATIVE would lose digits of the logits of head h."""
    slope = tl.load(terms.alibi + b.to(tl.int64) * terms.alibi_b + h).to(tl.float32)
    return (tl.abs(slope) <= STEEP) == 0  # NaN is


@triton.jit
def tile_logits(
    qk, i_first, r, j_first, c, b, h, seqlen_q, seqlen_k, off, terms, scale, left, right,
    POSITIONS: tl.constexpr, FLAGS: tl.constexpr, WHOLE_KEYS: tl.constexpr = False, slope=None,
):  # fmt: skip
    """(s2, cap): base-2 logits, -inf where excluded, and tanh's value where softcap is on.  With
    UNSCALED or NATURAL the logits are in other units (softmax.py).

    qk: q_i . k_j of queries i_first + r and keys j_first + c; r, c and h broadcast to its shape.
    POSITIONS: the tile is cut by a window, or by the last key; WHOLE_KEYS: no key is past the last.
    slope: `alibi_slope`, which is loaded here if not given.  RELATIVE: to the logit of a key's
    distance from j_first, to which the caller adds that of a row (`row_distance`).
    """
    unit = LN2 if NATURAL & FLAGS else 1.0
    cap = qk
    if SOFTCAP & FLAGS:
        if APPROX_TANH & FLAGS:
            cap = tanh_approx(qk * terms.cap_in)
            part = cap
        elif QUICK_TANH & FLAGS:
            part = tanh_part(qk, terms.cap_in)
            cap = 2.0 * part - 1.0
        else:
            cap = tanh(qk * terms.cap_in)
        s = part if UNSCALED & FLAGS else cap * (terms.cap_out * unit)
    elif UNSCALED & FLAGS:
        s = qk
    else:
        s = qk * (scale * unit)
    if SIGMOID_LENGTH & FLAGS:
        keys = in_frame(terms, b, 5) if (FRAME & FLAGS) else seqlen_k
        s -= tl.log2(tl.maximum(keys, 1).to(tl.float32))
    elif SIGMOID & FLAGS:
        s += terms.shift
    if BIAS & FLAGS:
        added = bias_tile(
            terms, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, WHOLE_KEYS, FLAGS
        )
        if NATURAL & FLAGS:  # -inf + NaN is found by `nan_count`
            s += added
        else:
            s += hold(added) * LOG2E
    if RELATIVE & FLAGS:
        s += slope * c.to(tl.float32)
    elif ALIBI & FLAGS:
        if slope is None:
            slope = alibi_slope(b, h, terms, scale, FLAGS)
        # of floats: an integer of each pair would be converted
        last = last_distance(b, seqlen_q, seqlen_k, terms, FLAGS)
        row = (i_first + r + last - j_first).to(tl.float32)
        distance = row - c.to(tl.float32)
        s -= slope * (distance if BACKWARD & FLAGS else tl.abs(distance))
    if MASK & FLAGS:
        visible = visible_keys(
            terms, b, h, i_first, r, j_first, c, seqlen_q, seqlen_k, WHOLE_KEYS, FLAGS
        )
        s = where_seen(visible.to(tl.uint32), s)
    if (BIAS & FLAGS) and (not (NATURAL & FLAGS) or (POSITIONS and (DBIAS_ADD & FLAGS))):
        # a bias of -inf excludes even where q . k is NaN
        s = tl.where(added == float("-inf"), float("-inf"), s)
    if POSITIONS:
        i, j = i_first + r, j_first + c
        inside = (i < seqlen_q) & (j < seqlen_k)
        if LEFT & FLAGS:
            inside = inside & (j >= i + off - left)
        if RIGHT & FLAGS:
            inside = inside & (j <= i + off + right)
        s = tl.where(inside, s, float("-inf"))
    return s, cap
