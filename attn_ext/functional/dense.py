"""attention: validation, meaning and documentation of the dense call.

The user's arguments become a canonical `attn_ext.core.schema.Call`.  FlashAttention: arXiv
2205.14135, 2307.08691; online softmax: arXiv 1805.02867.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from attn_ext.core import mistakes, validate
from attn_ext.core.schema import Call
from attn_ext.functional.common import NO_LSE, autocast, autocasting, draw_rng_state, result, sides
from attn_ext.ops import fast, route

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

    from attn_ext.functional.common import RowStats, ScoreOptions

    class DotOptions(ScoreOptions, total=False):
        """The keywords of every function of dot products."""

        softcap: float
        alibi_slopes: Tensor | None
        sink: Tensor | None
        scale: float | None

    class AttentionOptions(DotOptions, total=False):
        """Those of `attention` and `attention_varlen`."""

        causal: bool | Literal["top_left", "bottom_right"]
        dropout_p: float
        deterministic: bool
        normalizer: Literal["softmax", "sigmoid"]
        sigmoid_bias: float | None


def dense_call(q, k, v, **options) -> Call:
    """The checked, canonical call of the keywords of `attention`."""
    if torch.compiler.is_compiling():
        return _call(q, k, v, **options)
    try:
        return _call(q, k, v, **options)
    except ValueError as error:
        scores, of_heads = (
            [options.get(name) for name in names]
            for names in (("mask", "bias"), ("alibi_slopes", "sink"))
        )
        causal = options.get("causal", False)
        more = dict(causal=causal, scores=scores, of_heads=of_heads)
        raise mistakes.explained(error, q, k, v, **more) from None


def _call(
    q, k, v, *, causal=False, window=(None, None), mask=None, bias=None, softcap=0.0,
    alibi_slopes=None, sink=None, dropout_p=0.0, scale=None, need_stats=False, deterministic=False,
    normalizer="softmax", sigmoid_bias=None, backend="auto",
) -> Call:  # fmt: skip
    validate.tensor("q", q)
    validate.tensor("k", k)
    validate.tensor("v", v)
    if autocasting(q.device.type):
        if bias is not None:
            validate.tensor("bias", bias)
        q, k, v, bias = autocast(q, k, v, bias)
    left, right = validate.window_pair(window)
    softcap, dropout_p, scale = validate.scalars(softcap, dropout_p, scale)
    lean = not torch.compiler.is_compiling() and route.is_plain(q, k, v)
    q_shape, k_shape = q.shape, k.shape
    align, window_left, window_right = (validate.dense_cached if lean else validate.dense)(
        q_shape, k_shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        causal, left, right, softcap, dropout_p, scale, deterministic, backend,
    )  # fmt: skip
    batch, heads, seqlen_q, _ = q_shape
    seqlen_k = k_shape[2]
    mask, bias, alibi_slopes, sink = sides(
        q, mask, bias, alibi_slopes, sink, batch, heads, seqlen_q, seqlen_k
    )
    if type(normalizer) is not str or normalizer != "softmax" or sigmoid_bias is not None:
        sigmoid_bias = validate.normalizer(normalizer, sigmoid_bias, sink, need_stats)
    if scale is None and lean:
        scale = q_shape[3] ** -0.5
    return Call(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sink=sink,
        rng_state=draw_rng_state(q) if dropout_p > 0 else None, max_seqlen_q=seqlen_q,
        max_seqlen_k=seqlen_k, scale=scale, softcap=softcap, dropout_p=dropout_p, align=align,
        window_left=window_left, window_right=window_right, need_stats=need_stats,
        deterministic=deterministic, normalizer=normalizer, sigmoid_bias=sigmoid_bias,
        grad=route.wants_grad(q, k, v, bias, sink), bias_grad=route.wants_grad(bias),
        backend=backend,
    )  # fmt: skip


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: Literal[False] = False,
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[False] = False,
    return_stats: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, RowStats]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[AttentionOptions],
) -> tuple[Tensor, Tensor, RowStats]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    return_lse: bool,
    return_stats: bool = False,
    **options: Unpack[AttentionOptions],
) -> Any: ...


def attention(
    q, k, v, *, causal=False, window=(None, None), mask=None, bias=None, softcap=0.0,
    alibi_slopes=None, sink=None, dropout_p=0.0, scale=None, return_lse=False, return_stats=False,
    deterministic=False, normalizer="softmax", sigmoid_bias=None,
    backend="auto",
):  # fmt: skip
    """Exact attention softmax(scale * q k^T) v in O(N) memory, differentiable in q, k, v, bias,
    sink and through LSE, twice and in forward mode (sigmoid: once).

    q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv] of one floating dtype and device; Hq is a
    multiple of Hk (GQA).
    Returns out [B, Hq, Sq, Dv] in q's memory order; with return_lse also lse [B, Hq, Sq] (natural
    log; float32, float64 for float64 inputs); with return_stats also a RowStats.  A row that sees
    no key: out 0, lse -inf, gradients 0.

    causal: False, True (needs Sq == Sk), "top_left" (torch) or "bottom_right" (flash-attn).
    window: (left, right), inclusive distances from the aligned diagonal in positions, None =
    unbounded.
    mask: bool, broadcastable to [B, Hq, Sq, Sk], True = attend.   bias: floating, broadcastable,
    added to the logits.
    softcap: logits become softcap * tanh(logits / softcap) before the bias where softcap > 0.
    alibi_slopes [Hq] or [B, Hq]: slope * |i + Sk - Sq - j| is subtracted (arXiv 2108.12409).
    sink [Hq]: a logit per head that joins the normaliser only (arXiv 2309.17453).
    dropout_p: probability of dropping an attention weight; the mask is Philox (Salmon et al., SC11)
    keyed on (b, h, i, j) with a seed from torch's generator, so torch.manual_seed repeats it.
    scale: factor of the dot products, 1/sqrt(D) if None.   deterministic: bitwise equal from run to
    run.
    normalizer: "softmax", or "sigmoid" (arXiv 2409.04431): weights sigmoid(logit + sigmoid_bias),
    which need not sum to 1; sigmoid_bias is -ln of the number of keys if None.  Sigmoid has no LSE,
    statistics or sink.
    backend: "auto", or a name of `attn_ext.backends()`, which then never falls back.

    ValueError or TypeError name the argument, the rule and the value; NotImplementedError when no
    backend can serve the call (`attn_ext.explain` says why), and for third derivatives.
    """
    key = None
    if (
        alibi_slopes is sink is sigmoid_bias is None
        and return_lse is return_stats is False
        and type(dropout_p) in (float, int) and dropout_p == 0
        and type(normalizer) is str and normalizer == "softmax" and isinstance(q, torch.Tensor)
    ):  # fmt: skip
        key, out = fast.attempt(
            q, k, v, mask, bias, causal, window, softcap, scale, deterministic, backend
        )
        if out is not None:
            return out
    call = dense_call(
        q, k, v, causal=causal, window=window, mask=mask, bias=bias, softcap=softcap,
        alibi_slopes=alibi_slopes, sink=sink, dropout_p=dropout_p, scale=scale,
        need_stats=return_stats, deterministic=deterministic, normalizer=normalizer,
        sigmoid_bias=sigmoid_bias, backend=backend,
    )  # fmt: skip
    if normalizer == "sigmoid" and return_lse:
        raise ValueError(NO_LSE)
    answer = result(call, return_lse, return_stats)
    fast.remember(key, call)
    return answer
