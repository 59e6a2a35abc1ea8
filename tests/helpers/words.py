"""Numbers and the 32-bit words in which a GPU's registers hold them."""

import numpy as np


def f32(words):
    """The float32 numbers of these bits."""
    return np.ascontiguousarray(words).view(np.float32)


def to_bf16(x):
    """bfloat16 as integers, rounded to nearest even."""
    v = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return ((v + 0x7FFF + ((v >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits):
    """The float32 numbers of bfloat16 as integers."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def words_of(lo, hi):
    """Words of two 16-bit halves."""
    return np.uint32(lo) | np.uint32(hi) << np.uint32(16)
