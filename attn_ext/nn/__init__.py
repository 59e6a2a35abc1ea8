"""Modules with attention inside, in O(N) memory."""

from attn_ext.nn.family import (
    AdditiveAttention,
    AttentionPooling,
    CrossModalAttention,
    HierarchicalAttention,
)
from attn_ext.nn.multihead import MultiheadAttention, convert, revert

__all__ = [
    "AdditiveAttention", "AttentionPooling", "CrossModalAttention", "HierarchicalAttention",
    "MultiheadAttention", "convert", "revert",
]  # fmt: skip
