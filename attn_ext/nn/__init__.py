"""Modules with attention inside, in O(N) memory."""

from attn_ext.nn.multihead import MultiheadAttention, convert, revert

__all__ = ["MultiheadAttention", "convert", "revert"]
