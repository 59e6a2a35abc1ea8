"""Dropout by Philox4x32-7, bit for bit that of csrc/philox.h (Salmon et al., SC11)."""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from attn_ext.triton_kernels.kernels.primitives import (
    DROPOUT,
    FRAME,
    INTERPRETED,
    KEY_QUADS,
    in_frame,
    key_order,
    own_key_order,
)


@triton.jit
def philox_key(rng_state):
    """The two key words: splitmix64 of (seed, offset), as csrc/philox.h."""
    seed = tl.load(rng_state).to(tl.uint64, bitcast=True)
    offset = tl.load(rng_state + 1).to(tl.uint64, bitcast=True)
    z = seed + (offset + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    z = z ^ (z >> 31)
    return (z & 0xFFFFFFFF).to(tl.uint32), (z >> 32).to(tl.uint32)


@triton.jit
def dropout_state(rng_state, threshold, inverse_keep, FLAGS: tl.constexpr):
    """(key word, key word, threshold, 1 / (1 - p)), which `keep` and the products take; zeros
    without dropout."""
    state = (0, 0, 0, 0)
    if DROPOUT & FLAGS:
        key0, key1 = philox_key(rng_state)
        state = (key0, key1, threshold, inverse_keep)
    return state


@triton.jit
def product_words(x, FACTOR: tl.constexpr):
    """(high, low) word of the 64 bits of x * FACTOR: one instruction."""
    product = x.to(tl.uint64) * FACTOR
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def wide_product(x, factor):
    """The 64 bits of the product of two uint32: one instruction.  LLVM makes a selection of 64 bits
    of a factor that is one of two numbers, of which ptxas does not know that half of it is 0."""
    if INTERPRETED or not is_cuda():
        product = x.to(tl.uint64) * factor.to(tl.uint64)
    else:
        product = tl.inline_asm_elementwise(
            "mul.wide.u32 $0, $1, $2;", "=l,r,r", [x, factor], dtype=tl.uint64, is_pure=True, pack=1
        )
    return product


@triton.jit
def philox_rounds(i, j4, b, h, key0, key1, ROUNDS: tl.constexpr):
    """(four uint32 words, two of the key) after the first rounds of Philox4x32 at (j4, i, h, b)."""
    # Not broadcast: what depends on a row, or a column, alone is computed once for it
    c0, c1, c2, c3 = j4.to(tl.uint32), i.to(tl.uint32), h.to(tl.uint32), b.to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        high0, low0 = product_words(c0, 0xD2511F53)
        high1, low1 = product_words(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3, key0, key1


@triton.jit
def philox_words(i, j4, b, h, key0, key1):
    """The four uint32 words of Philox4x32-7 at (j4, i, h, b): of keys 4 j4 .. 4 j4 + 3."""
    c0, c1, c2, c3, _, _ = philox_rounds(i, j4, b, h, key0, key1, 7)
    return c0, c1, c2, c3


@triton.jit
def philox_pair(i, j4, b, h, key0, key1, first):
    """The first two of `philox_words` where `first`, else the last two: of the last round, one
    product and what it is combined with."""
    c0, c1, c2, c3, key0, key1 = philox_rounds(i, j4, b, h, key0, key1, 6)
    factor = tl.where(first, 0xCD9E8D57, 0xD2511F53).to(tl.uint32)
    product = wide_product(tl.where(first, c2, c0), factor)
    high = (product >> 32).to(tl.uint32)
    high ^= tl.where(first, c1, c3) ^ tl.where(first, key0, key1)
    return high, product.to(tl.uint32)


@triton.jit
def keep(i, j_first, b, h, terms, rng, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr):
    """int1 [BLOCK_M, BLOCK_N]: dropout keeps (i, j_first + n); j_first is a multiple of 4; rng is
    that of `dropout_state`.

    Kept iff word > threshold, which is floor(p * 2^32) - 1 in the bits of an int32.
    """
    key0, key1, threshold, _ = rng
    if FRAME & FLAGS:  # whose first key may be no multiple of 4
        j = (j_first + tl.arange(0, BLOCK_N))[None, :]
        return keep_each(i, j, b, h, terms, rng, FLAGS)
    j4 = (j_first // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    c0, c1, c2, c3 = philox_words(i, j4, b, h, key0, key1)
    words = tl.interleave(tl.interleave(c0, c2), tl.interleave(c1, c3))
    return words > threshold.to(tl.uint32, bitcast=True)


@triton.jit
def keep_each(i, j, b, h, terms, rng, FLAGS: tl.constexpr):
    """`keep` of any i and j that broadcast: four times the work."""
    key0, key1, threshold, _ = rng
    if FRAME & FLAGS:
        i, j = i + in_frame(terms, b, 2), j + in_frame(terms, b, 3)
        b, h = in_frame(terms, b, 0), h + in_frame(terms, b, 1)
    c0, c1, c2, c3 = philox_words(i, j >> 2, b, h, key0, key1)
    low = tl.where(j % 2 == 0, c0, c1)
    high = tl.where(j % 2 == 0, c2, c3)
    return tl.where(j % 4 < 2, low, high) > threshold.to(tl.uint32, bitcast=True)


@triton.jit
def keep_ordered(i, j_first, b, h, terms, rng, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr):
    """`keep` of keys in `key_order`, with i [BLOCK_M, 1]: a thread evaluates what it uses."""
    key0, key1, threshold, _ = rng
    if FRAME & FLAGS:
        c = key_order(BLOCK_N, FLAGS)[None, :]
        return keep_each(i, j_first + c, b, h, terms, rng, FLAGS)
    j4 = (j_first >> 2) + tl.arange(0, BLOCK_N // 4)[None, :]
    c0, c1, c2, c3 = philox_words(i, j4, b, h, key0, key1)
    if INTERPRETED or is_cuda():
        # [BLOCK_M, BLOCK_N / 16, 4 q, 2 of an eight, 2 eights] to the order of columns
        words = tl.join(tl.join(c0, c1), tl.join(c2, c3))
        words = tl.reshape(words, [i.shape[0], BLOCK_N // 16, 4, 2, 2])
        words = tl.permute(words, [0, 1, 4, 2, 3])
    else:
        words = tl.join(tl.join(c0, c2), tl.join(c1, c3))
    words = tl.reshape(words, [i.shape[0], BLOCK_N])
    return words > threshold.to(tl.uint32, bitcast=True)


@triton.jit
def keep_own(i, j_first, b, h, terms, rng, BLOCK_N: tl.constexpr, FLAGS: tl.constexpr):
    """`keep` transposed, [BLOCK_N, BLOCK_M], of keys in `own_key_order`, with i [1, BLOCK_M].  A
    thread holds two keys of an evaluation, or with KEY_QUADS all four."""
    key0, key1, threshold, _ = rng
    if (FRAME & FLAGS) or not (INTERPRETED or is_cuda()):
        c = own_key_order(BLOCK_N, FLAGS)[:, None]
        return keep_each(i, j_first + c, b, h, terms, rng, FLAGS)
    if KEY_QUADS & FLAGS:
        j4 = (j_first >> 2) + tl.arange(0, BLOCK_N // 4)[:, None]
        c0, c1, c2, c3 = philox_words(i, j4, b, h, key0, key1)
        # [warps, 8 g, BLOCK_M, 2 p, 2 e] to the order of rows
        words = tl.join(tl.join(c0, c1), tl.join(c2, c3))
        words = tl.reshape(words, [BLOCK_N // 32, 8, i.shape[1], 2, 2])
        words = tl.permute(words, [4, 0, 3, 1, 2])
    else:
        j2 = tl.arange(0, BLOCK_N // 2)[:, None]
        first = (j2 & 1) == 0
        low, high = philox_pair(i, (j_first >> 2) + (j2 >> 1), b, h, key0, key1, first)
        # [BLOCK_N / 16, 8 g, BLOCK_M, 2] to the order of rows
        words = tl.reshape(tl.join(low, high), [BLOCK_N // 16, 8, i.shape[1], 2])
        words = tl.permute(words, [0, 3, 1, 2])
    words = tl.reshape(words, [BLOCK_N, i.shape[1]])
    return words > threshold.to(tl.uint32, bitcast=True)


@triton.jit
def dropped(p, kept, rng):
    """p, and 0 where it is dropped.  A 0 that the compiler knows would be selected after the
    rounding to 16 bits, half a register at a time, in two instructions more."""
    return tl.where(kept, p, rng[3] * 0.0)
