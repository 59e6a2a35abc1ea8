"""attention_varlen: validation, meaning and documentation of the packed call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from attn_ext.core import validate, values
from attn_ext.core.schema import Call
from attn_ext.functional.common import NO_LSE, autocast, draw_rng_state, result, sides
from attn_ext.ops import route

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

    from attn_ext.functional.common import RowStats
    from attn_ext.functional.dense import AttentionOptions


def _longest(name: str, value, cu_seqlens, total):
    """max_seqlen_*: the given one, else the longest sequence (reads cu_seqlens), else the bound
    `total` when traced.
    """
    if value is not None:
        if torch.compiler.is_compiling():  # the graph may know it only when it runs; values.check
            return validate.some_integer(name, value)
        return validate.integer(name, value)
    if torch.compiler.is_compiling() or not route.is_plain(cu_seqlens, cu_seqlens, cu_seqlens):
        return total
    if cu_seqlens.device.type == "cpu":
        return max(
            values.cumulative(name.replace("max_seqlen", "cu_seqlens"), cu_seqlens, total),
            default=0,
        )
    return int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0


def longest_pair(q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, free: bool) -> tuple:
    """`_longest` of both sides.  free: no mask or bias has these sizes."""
    longest_q = _longest("max_seqlen_q", max_seqlen_q, cu_seqlens_q, q.shape[0])
    longest_k = _longest("max_seqlen_k", max_seqlen_k, cu_seqlens_k, k.shape[0])
    if free and not torch.compiler.is_compiling():
        # no sequence is longer than all of them: a huge bound must not make work
        return min(longest_q, q.shape[0]), min(longest_k, k.shape[0])
    return longest_q, longest_k


def equal_lengths(cu_seqlens_q, cu_seqlens_k) -> None:
    """causal=True: ValueError unless both sides have the same lengths.  Traced calls must pass one
    tensor twice.
    """
    if cu_seqlens_q is cu_seqlens_k:
        return
    rule = "causal=True needs equal lengths of queries and keys in each sequence"
    advice = "say causal='top_left' or causal='bottom_right'"
    if torch.compiler.is_compiling() or not route.is_plain(
        cu_seqlens_q, cu_seqlens_k, cu_seqlens_q
    ):
        raise ValueError(f"{rule}, which cannot be seen in a traced call of two tensors: {advice}")
    if not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError(
            f"{rule}, got {cu_seqlens_q.tolist()} and {cu_seqlens_k.tolist()}: {advice}"
        )


def varlen_call(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, causal=False,
    window=(None, None), mask=None, bias=None, softcap=0.0, alibi_slopes=None, sink=None,
    dropout_p=0.0,
    scale=None, need_stats=False, deterministic=False, normalizer="softmax", sigmoid_bias=None,
    backend="auto",
) -> Call:  # fmt: skip
    """The checked, canonical call."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, value)
    if bias is not None:
        validate.tensor("bias", bias)
    q, k, v, bias = autocast(q, k, v, bias)
    softcap, dropout_p, scale = validate.scalars(softcap, dropout_p, scale)
    align, window_left, window_right = validate.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, causal, *validate.window_pair(window), softcap,
        dropout_p,
        scale, deterministic, backend,
    )  # fmt: skip
    longest_q, longest_k = longest_pair(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, mask is bias is None
    )
    if causal is True:
        equal_lengths(cu_seqlens_q, cu_seqlens_k)
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    mask, bias, alibi_slopes, sink = sides(
        q, mask, bias, alibi_slopes, sink, batch, heads, longest_q, longest_k
    )
    if type(normalizer) is not str or normalizer != "softmax" or sigmoid_bias is not None:
        sigmoid_bias = validate.normalizer(normalizer, sigmoid_bias, sink, need_stats)
    return Call(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sink=sink,
        rng_state=draw_rng_state(q) if dropout_p > 0 else None,
        cu_seqlens_q=cu_seqlens_q.contiguous(), cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=longest_q, max_seqlen_k=longest_k, scale=scale, softcap=softcap,
        dropout_p=dropout_p, align=align, window_left=window_left, window_right=window_right,
        need_stats=need_stats, deterministic=deterministic, normalizer=normalizer,
        sigmoid_bias=sigmoid_bias, grad=route.wants_grad(q, k, v, bias, sink),
        bias_grad=route.wants_grad(bias), backend=backend,
    )  # fmt: skip


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, RowStats]: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor, RowStats]: ...


@overload
def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    return_lse: bool,
    return_stats: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any: ...


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, causal=False,
    window=(None, None), mask=None, bias=None, softcap=0.0, alibi_slopes=None, sink=None,
    dropout_p=0.0,
    scale=None, return_lse=False, return_stats=False, deterministic=False, normalizer="softmax",
    sigmoid_bias=None, backend="auto",
):  # fmt: skip
    """Attention over sequences of unequal lengths packed one after the other; each sees only its
    own keys.

    q [total_q, Hq, D], k [total_k, Hk, D], v [total_k, Hk, Dv].  cu_seqlens_q, cu_seqlens_k: int32
    [B + 1], the rows at which the sequences begin, from 0, never falling, at most the total; empty
    sequences are allowed.
    max_seqlen_*: upper bounds of the lengths in positions; read from cu_seqlens if None (a device
    sync on GPU).
    Returns out [total_q, Hq, Dv]; lse and statistics are [Hq, total_q].  Rows past the last
    sequence are 0.

    mask and bias broadcast to [B, Hq, max_seqlen_q, max_seqlen_k] and are indexed by positions
    within a sequence; alibi_slopes [Hq] or [B, Hq].  causal=True needs equal lengths in each
    sequence; say "top_left" or "bottom_right" otherwise.  All other arguments, gradients and
    errors: as `attention`.
    """
    call = varlen_call(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        window=window,
        mask=mask, bias=bias, softcap=softcap, alibi_slopes=alibi_slopes, sink=sink,
        dropout_p=dropout_p,
        scale=scale, need_stats=return_stats, deterministic=deterministic, normalizer=normalizer,
        sigmoid_bias=sigmoid_bias, backend=backend,
    )  # fmt: skip
    if normalizer == "sigmoid" and return_lse:
        raise ValueError(NO_LSE)
    return result(call, return_lse, return_stats)
