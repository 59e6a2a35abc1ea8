"""FlashSelfAttention and FlashCrossAttention of flash_attn.modules.mha: attention without
projections, as modules that hold the options.  Of any dtype, also on CPU; nothing to learn.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate
from attn_ext.integrations.flash_attn import functions


class _Options(torch.nn.Module):
    """What both modules are told once."""

    def _hold(self, causal, softmax_scale, dropout, alibi_slopes, window_size, deterministic):
        dropout = validate.number("attention_dropout", dropout, 0.0, 1.0)
        self.causal, self.softmax_scale = causal, softmax_scale
        self.drop = torch.nn.Dropout(dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size, self.deterministic = window_size, deterministic

    def _options(self, causal) -> dict:
        slopes = self.alibi_slopes  # rounded where the model was converted to half precision
        return dict(
            dropout_p=self.drop.p if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=self.causal if causal is None else causal,
            window_size=self.window_size,
            alibi_slopes=None if slopes is None else slopes.float(),
            deterministic=self.deterministic,
        )


class FlashSelfAttention(_Options):
    """Attention of qkv to itself; attention_dropout is applied in training mode."""

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, window_size=(-1, -1),
        alibi_slopes=None, deterministic=False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._hold(
            causal, softmax_scale, attention_dropout, alibi_slopes, window_size, deterministic
        )

    def forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None):
        """qkv [B, S, 3, H, D] -> [B, S, H, D]; with cu_seqlens int32 [B + 1] and max_seqlen
        [total, 3, H, D] -> [total, H, D].  causal overrides the module's.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return functions.flash_attn_qkvpacked_func(qkv, **options)
        return functions.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_Options):
    """Attention of q to kv; attention_dropout is applied in training mode."""

    def __init__(
        self, causal=False, softmax_scale=None, attention_dropout=0.0, alibi_slopes=None,
        window_size=(-1, -1), deterministic=False,
    ) -> None:  # fmt: skip
        super().__init__()
        self._hold(
            causal, softmax_scale, attention_dropout, alibi_slopes, window_size, deterministic
        )

    def forward(
        self, q, kv, causal=None, cu_seqlens=None, max_seqlen=None, cu_seqlens_k=None,
        max_seqlen_k=None,
    ):  # fmt: skip
        """q [B, Sq, H, D], kv [B, Sk, 2, Hk, D] -> [B, Sq, H, D]; with cu_seqlens (of q) and
        cu_seqlens_k q [total_q, H, D], kv [total_k, 2, Hk, D].  causal overrides the module's.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return functions.flash_attn_kvpacked_func(q, kv, **options)
        return functions.flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options
        )
