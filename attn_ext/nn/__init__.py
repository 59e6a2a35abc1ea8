"""Modules with attention inside, in O(N) memory."""

from attn_ext.nn.blocks import (
    AdditiveAttention,
    AttentionPooling,
    CrossModalAttention,
    HierarchicalAttention,
)
from attn_ext.nn.conversion import Conversion, convert, converted, revert
from attn_ext.nn.multihead import MultiheadAttention

__all__ = [
    "AdditiveAttention", "AttentionPooling", "Conversion", "CrossModalAttention",
    "HierarchicalAttention", "MultiheadAttention", "convert", "converted", "revert",
]  # fmt: skip
