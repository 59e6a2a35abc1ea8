"""Context parallelism: sequences that lie on several devices, on torch.distributed.

from attn_ext.distributed import Layout, context_attention
layout = Layout.zigzag(seqlen, parts=4)
out = context_attention(q, k, v, layout=layout, mesh=mesh, causal=True)  # this rank's shard
"""

from attn_ext.distributed.attention import context_attention
from attn_ext.distributed.comm import ContextParallelError
from attn_ext.distributed.decode import context_decode
from attn_ext.distributed.explain import explain
from attn_ext.distributed.layout import Layout, Segment
from attn_ext.distributed.loss import mean_loss

__all__ = [
    "ContextParallelError", "Layout", "Segment", "context_attention", "context_decode", "explain",
    "mean_loss",
]  # fmt: skip
