"""What is asked of a backend, without data: for dispatch and for `attn_ext.explain`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_ext.core.schema import BOTTOM_RIGHT, Call, is_decode

MAPS = ("row_stats", "top_k", "mean_top_k", "column_mass", "pooled_map")
FAR_LSE = 256.0  # beyond it half of float32's last bit is 1.5e-5 of a weight


@dataclass(frozen=True, slots=True)
class Problem:
    """The features and sizes of a call; hashable, so that dispatch can be cached."""

    kind: str  # "dense", "varlen" or "decode"
    device: str  # torch.device.type
    dtype: torch.dtype
    batch: int
    heads_q: int
    heads_k: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    head_dim_v: int
    causal: bool = False
    align: int = BOTTOM_RIGHT
    window: bool = False
    mask: bool = False
    bias: bool = False
    bias_grad: bool = False
    softcap: bool = False
    alibi: bool = False
    sink: bool = False
    dropout: bool = False
    paged: bool = False
    frame: bool = False  # a shard of a larger call
    stats: bool = False
    deterministic: bool = False
    grad: bool = False
    device_index: int = 0
    normalizer: str = "softmax"
    score: str = "dot"  # q . k, or "additive": w . tanh(q + k)
    # what attn_ext.inspect asks for in place of attention: a name of `MAPS`
    map: str = ""
    top_k: int = 0  # keys a query, for the map of that name
    far_lse: float = 0.0  # the largest |LSE| where one is beyond FAR_LSE, which kernels cannot use

    @classmethod
    def of(cls, call: Call, **more) -> Problem:
        """The problem that `call` poses; more: fields that no call has."""
        q, k, v = call.q, call.k, call.v
        varlen = call.cu_seqlens_q is not None
        return cls(
            kind="varlen" if varlen else "decode" if is_decode(call) else "dense",
            device=q.device.type,
            dtype=q.dtype,
            batch=call.cu_seqlens_q.shape[0] - 1 if varlen else q.shape[0],
            heads_q=q.shape[1],
            heads_k=k.shape[1],
            seqlen_q=call.max_seqlen_q,
            seqlen_k=call.max_seqlen_k,
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            causal=call.window_right == 0,
            align=call.align,
            window=call.window_left >= 0 or call.window_right > 0,
            mask=call.mask is not None,
            bias=call.bias is not None,
            bias_grad=call.bias_grad,
            softcap=call.softcap > 0,
            alibi=call.alibi_slopes is not None,
            sink=call.sink is not None,
            dropout=call.dropout_p > 0,
            paged=call.block_table is not None,
            frame=call.frame is not None,
            stats=call.need_stats,
            deterministic=call.deterministic,
            grad=call.grad,
            device_index=q.device.index or 0,
            normalizer=call.normalizer,
            score="dot" if call.w is None else "additive",
            **more,
        )
