"""The local attention of DeepSpeed's Ulysses: DeepSpeed exchanges rows for heads, and attn_ext
computes all rows of this rank's heads.

    from deepspeed.sequence.layer import DistributedAttention
    attend = DistributedAttention(LocalAttention(causal=True), group)
    out = attend(q, k, v, batch_dim_idx=1)  # q [S / P, B, H, D]
"""

from __future__ import annotations

import torch

from attn_ext.functional.dense import attention

# what counts heads (dropout's weights are drawn by them), or returns more than the output
OF_HEADS = ("mask", "bias", "alibi_slopes", "sink", "dropout_p", "return_lse", "return_stats")


class LocalAttention(torch.nn.Module):
    """forward(q, k, v [S, B, H, D]) -> [S, B, H, Dv]; with sequence_dim=1 [B, S, H, D].

    options: keywords of `attn_ext.attention` that are the same for all heads.  What counts heads
    would be that of other heads on each rank, and is a ValueError;
    `attn_ext.distributed.context_attention` takes it.
    """

    def __init__(self, sequence_dim: int = 0, **options):
        super().__init__()
        if sequence_dim not in (0, 1):
            raise ValueError(f"sequence_dim must be 0 or 1, got {sequence_dim}")
        for name in OF_HEADS:
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} must not be given to LocalAttention, which knows only some of the "
                    "heads: use attn_ext.distributed.context_attention(method='ulysses')"
                )
        self.sequence_dim, self.options = sequence_dim, options

    def forward(self, query, key, value, *others, **named):
        """As DistributedAttention calls it; others, named: refused where they say something."""
        given = [x for x in (*others, *named.values()) if x is not None]
        if given:
            raise ValueError(
                "LocalAttention must be given query, key and value alone, got also "
                f"{', '.join(type(x).__name__ for x in given)}"
            )
        to, back = ((1, 2, 0, 3), (2, 0, 1, 3)) if self.sequence_dim == 0 else ((0, 2, 1, 3),) * 2
        out = attention(*(x.permute(to) for x in (query, key, value)), **self.options)
        return out.permute(back)
