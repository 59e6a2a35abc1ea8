"""Attention that one can look into: statistics and maps of the weights in O(N) memory, from Q, K
and LSE.

    from attn_ext import inspect
    stats = inspect.row_stats(q, k, causal=True)      # LSE, largest logit, entropy; differentiable
    best = inspect.top_k(q, k, 5, causal=True)        # the 5 most attended keys of each query
    image = inspect.pooled_map(q, k, 256, causal=True)
"""

from attn_ext.inspect.look import look
from attn_ext.inspect.maps import TopK, column_mass, pooled_map, rollout, top_k, weights
from attn_ext.inspect.recording import record
from attn_ext.inspect.records import CallRecord, load
from attn_ext.inspect.statistics import row_stats

__all__ = [
    "CallRecord", "TopK", "column_mass", "load", "look", "pooled_map", "record", "rollout",
    "row_stats", "top_k", "weights",
]  # fmt: skip
