"""What is asked of a backend: `Problem` says it without data (for dispatch and `explain`), `Call`
carries the tensors.

Both hold the canonical form that `attn_ext.functional` makes of the user's arguments: causal is
`window_right = 0`, windows are inclusive and relative to the aligned diagonal, -1 is an unbounded
side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TOP_LEFT, BOTTOM_RIGHT = 0, 1
UNBOUNDED = -1


@dataclass(slots=True)
class Call:
    """One attention call in canonical form.

    Dense: q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv].
    Varlen (cu_seqlens given): q [total_q, Hq, D], k [total_k, Hk, D], v [total_k, Hk, Dv].
    Paged (block_table given): k [pages, Hk, page_size, D], v alike.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None = None  # bool, 4-d, broadcastable to [B, Hq, Sq, Sk]; True = attend
    bias: torch.Tensor | None = None  # floating, 4-d, broadcastable to [B, Hq, Sq, Sk]
    alibi_slopes: torch.Tensor | None = None  # float32 [Hq] or [B, Hq]
    sink: torch.Tensor | None = None  # [Hq], float32 (float64 for float64 inputs)
    rng_state: torch.Tensor | None = None  # int64 [2]: seed, offset; on q's device
    cu_seqlens_q: torch.Tensor | None = None  # int32 [B + 1]
    cu_seqlens_k: torch.Tensor | None = None
    seqlens_k: torch.Tensor | None = None  # int32 [B]: used length of each K/V row or page list
    block_table: torch.Tensor | None = None  # int32 [B, max_pages]
    max_seqlen_q: int = 0  # Sq, or the longest sequence
    max_seqlen_k: int = 0
    scale: float = 1.0
    softcap: float = 0.0
    dropout_p: float = 0.0
    align: int = BOTTOM_RIGHT
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    need_stats: bool = False
    deterministic: bool = False
    normalizer: str = "softmax"  # or "sigmoid": P = sigmoid(s + sigmoid_bias), LSE is 0
    sigmoid_bias: float | None = None  # None: -ln of the sequence's number of keys
    num_splits: int = 0  # decode: parts of the keys that are worked on at a time; 0: not said


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
    stats: bool = False
    deterministic: bool = False
    grad: bool = False
    device_index: int = 0
    normalizer: str = "softmax"

    @classmethod
    def of(cls, call: Call, grad: bool = False, bias_grad: bool = False) -> Problem:
        """The problem that `call` poses."""
        q, k, v = call.q, call.k, call.v
        varlen = call.cu_seqlens_q is not None
        decode = call.block_table is not None or call.seqlens_k is not None
        if varlen:
            batch, heads_q, heads_k = call.cu_seqlens_q.shape[0] - 1, q.shape[1], k.shape[1]
        else:
            batch, heads_q, heads_k = q.shape[0], q.shape[1], k.shape[1]
        return cls(
            kind="varlen" if varlen else "decode" if decode else "dense",
            device=q.device.type,
            dtype=q.dtype,
            batch=batch,
            heads_q=heads_q,
            heads_k=heads_k,
            seqlen_q=call.max_seqlen_q,
            seqlen_k=call.max_seqlen_k,
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            causal=call.window_right == 0,
            align=call.align,
            window=call.window_left >= 0 or call.window_right > 0,
            mask=call.mask is not None,
            bias=call.bias is not None,
            bias_grad=bias_grad,
            softcap=call.softcap > 0,
            alibi=call.alibi_slopes is not None,
            sink=call.sink is not None,
            dropout=call.dropout_p > 0,
            paged=call.block_table is not None,
            stats=call.need_stats,
            deterministic=call.deterministic,
            grad=grad,
            device_index=q.device.index or 0,
            normalizer=call.normalizer,
        )
