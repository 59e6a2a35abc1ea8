"""attention and attention_varlen: validation, meaning and documentation of the dense and the packed
call.

The user's arguments become the flat canonical arguments of `attn_ext.ops` (causal is window_right =
0, -1 is an unbounded side, mask and bias have 4 dimensions).  FlashAttention: arXiv 2205.14135,
2307.08691; online softmax: arXiv 1805.02867.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_ext.core import validate
from attn_ext.core.call import Call
from attn_ext.ops import execute, fast

MAX_SEED = 2**63 - 1
NO_LSE = "return_lse must be False with normalizer='sigmoid', which has no LSE, got True"


class RowStats(NamedTuple):
    """Statistics of each query's row, [B, Hq, Sq] ([Hq, total_q] for varlen), from the same pass;
    not differentiable.
    """

    lse: (
        torch.Tensor
    )  # natural log of the sum of exp(logits), the sink included; -inf for an empty row
    max_logit: torch.Tensor  # the largest visible logit, without the sink; -inf for an empty row
    entropy: torch.Tensor  # -sum P ln P over keys, in nats; 0 for an empty row


def autocasting(device: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises for meta


def autocast(*tensors):
    """The tensors in autocast's dtype where autocast is on (as torch's SDPA does it; float64
    stays).
    """
    device = tensors[0].device.type
    if not autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def draw_rng_state(q: torch.Tensor) -> torch.Tensor:
    """int64 [2], seed and offset of a dropout mask, from the default generator of q's device."""
    return torch.randint(0, MAX_SEED, (2,), dtype=torch.int64, device=q.device)


def dense_args(
    q, k, v, *, causal=False, window=(None, None), mask=None, bias=None, softcap=0.0,
    alibi_slopes=None, sink=None, dropout_p=0.0, scale=None, need_stats=False, deterministic=False,
    normalizer="softmax", sigmoid_bias=None, backend="auto",
) -> tuple:  # fmt: skip
    """The checked flat op arguments of a dense call."""
    validate.tensor("q", q)
    validate.tensor("k", k)
    validate.tensor("v", v)
    if autocasting(q.device.type):
        if bias is not None:
            validate.tensor("bias", bias)
        q, k, v, bias = autocast(q, k, v, bias)
    left, right = validate.window_pair(window)
    softcap, dropout_p, scale = validate.scalars(softcap, dropout_p, scale)
    lean = not torch.compiler.is_compiling() and execute.is_plain(q, k, v)
    q_shape, k_shape = q.shape, k.shape
    align, window_left, window_right = (validate.dense_cached if lean else validate.dense)(
        q_shape, k_shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
        causal, left, right, softcap, dropout_p, scale, deterministic, backend,
    )  # fmt: skip
    batch, heads, seqlen_q, _ = q_shape
    seqlen_k = k_shape[2]
    if mask is not None:
        mask = validate.scores("mask", mask, True, q.device, batch, heads, seqlen_q, seqlen_k)
    if bias is not None:
        bias = validate.scores("bias", bias, False, q.device, batch, heads, seqlen_q, seqlen_k)
    if alibi_slopes is not None:
        alibi_slopes = validate.alibi(alibi_slopes, q.device, batch, heads)
    if sink is not None:
        sink = validate.sink_logits(sink, q.device, q.dtype, heads)
    if normalizer != "softmax" or sigmoid_bias is not None:
        sigmoid_bias = validate.normalizer(normalizer, sigmoid_bias, sink, need_stats)
    if scale is None and lean:
        scale = q_shape[3] ** -0.5
    return (
        q, k, v, mask, bias, alibi_slopes, sink,
        draw_rng_state(q) if dropout_p > 0 else None,
        None, None, None, None, seqlen_q, seqlen_k, scale, softcap, dropout_p, align, window_left,
        window_right, need_stats, deterministic, normalizer, sigmoid_bias, 0,
        execute.wants_grad(q, k, v, bias, sink),
        bias is not None and bias.requires_grad and torch.is_grad_enabled(), backend,
    )  # fmt: skip


def result(args: tuple, return_lse: bool, return_stats: bool):
    """Run the call and shape what the user asked for."""
    validate.boolean("return_lse", return_lse)
    validate.boolean("return_stats", return_stats)
    out, lse, max_logit, entropy = execute.run(args)
    if return_stats:
        stats = RowStats(lse.detach(), max_logit, entropy)
        return (out, lse, stats) if return_lse else (out, stats)
    return (out, lse) if return_lse else out


def attention(
    q, k, v, *, causal=False, window=(None, None), mask=None, bias=None, softcap=0.0,
    alibi_slopes=None, sink=None, dropout_p=0.0, scale=None, return_lse=False, return_stats=False,
    deterministic=False, normalizer="softmax", sigmoid_bias=None,
    backend="auto",
):  # fmt: skip
    """Exact attention softmax(scale * q k^T) v in O(N) memory, differentiable in q, k, v, bias,
    sink and through LSE.

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
    backend can serve the call (`attn_ext.explain` says why), and for double backward and
    forward-mode AD.
    """
    key = None
    if (
        alibi_slopes is sink is sigmoid_bias is None
        and return_lse is return_stats is False
        and type(dropout_p) in (float, int) and dropout_p == 0
        and normalizer == "softmax" and isinstance(q, torch.Tensor)
    ):  # fmt: skip
        key, out = fast.attempt(
            q, k, v, mask, bias, causal, window, softcap, scale, deterministic, backend
        )
        if out is not None:
            return out
    args = dense_args(
        q, k, v, causal=causal, window=window, mask=mask, bias=bias, softcap=softcap,
        alibi_slopes=alibi_slopes, sink=sink, dropout_p=dropout_p, scale=scale,
        need_stats=return_stats, deterministic=deterministic, normalizer=normalizer,
        sigmoid_bias=sigmoid_bias, backend=backend,
    )  # fmt: skip
    if normalizer == "sigmoid" and return_lse:
        raise ValueError(NO_LSE)
    answer = result(args, return_lse, return_stats)
    fast.remember(key, args)
    return answer


def _longest(name: str, value, cu_seqlens, total):
    """max_seqlen_*: the given one, else the longest sequence (reads cu_seqlens), else the bound
    `total` when traced.
    """
    if value is not None:
        return validate.integer(name, value)
    if torch.compiler.is_compiling() or not execute.is_plain(cu_seqlens, cu_seqlens, cu_seqlens):
        return total
    if cu_seqlens.device.type == "cpu":
        return max(
            validate.cumulative(name.replace("max_seqlen", "cu_seqlens"), cu_seqlens, total),
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


def _equal_lengths(cu_seqlens_q, cu_seqlens_k) -> None:
    """causal=True: ValueError unless both sides have the same lengths.  Traced calls must pass one
    tensor twice.
    """
    if cu_seqlens_q is cu_seqlens_k:
        return
    rule = "causal=True needs equal lengths of queries and keys in each sequence"
    advice = "say causal='top_left' or causal='bottom_right'"
    if torch.compiler.is_compiling() or not execute.is_plain(
        cu_seqlens_q, cu_seqlens_k, cu_seqlens_q
    ):
        raise ValueError(f"{rule}, which cannot be seen in a traced call of two tensors: {advice}")
    if not torch.equal(cu_seqlens_q, cu_seqlens_k):
        raise ValueError(
            f"{rule}, got {cu_seqlens_q.tolist()} and {cu_seqlens_k.tolist()}: {advice}"
        )


def varlen_args(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None, *, causal=False,
    window=(None, None), mask=None, bias=None, softcap=0.0, alibi_slopes=None, sink=None,
    dropout_p=0.0,
    scale=None, need_stats=False, deterministic=False, normalizer="softmax", sigmoid_bias=None,
    backend="auto",
) -> tuple:  # fmt: skip
    """The checked flat op arguments of a varlen call."""
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
        _equal_lengths(cu_seqlens_q, cu_seqlens_k)
    batch, heads = cu_seqlens_q.shape[0] - 1, q.shape[1]
    if mask is not None:
        mask = validate.scores("mask", mask, True, q.device, batch, heads, longest_q, longest_k)
    if bias is not None:
        bias = validate.scores("bias", bias, False, q.device, batch, heads, longest_q, longest_k)
    if alibi_slopes is not None:
        alibi_slopes = validate.alibi(alibi_slopes, q.device, batch, heads)
    if sink is not None:
        sink = validate.sink_logits(sink, q.device, q.dtype, heads)
    if normalizer != "softmax" or sigmoid_bias is not None:
        sigmoid_bias = validate.normalizer(normalizer, sigmoid_bias, sink, need_stats)
    return (
        q, k, v, mask, bias, alibi_slopes, sink,
        draw_rng_state(q) if dropout_p > 0 else None,
        cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), None, None, longest_q, longest_k,
        scale,
        softcap, dropout_p, align, window_left, window_right, need_stats, deterministic,
        normalizer, sigmoid_bias, 0, execute.wants_grad(q, k, v, bias, sink),
        bias is not None and bias.requires_grad and torch.is_grad_enabled(), backend,
    )  # fmt: skip


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
    args = varlen_args(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=causal,
        window=window,
        mask=mask, bias=bias, softcap=softcap, alibi_slopes=alibi_slopes, sink=sink,
        dropout_p=dropout_p,
        scale=scale, need_stats=return_stats, deterministic=deterministic, normalizer=normalizer,
        sigmoid_bias=sigmoid_bias, backend=backend,
    )  # fmt: skip
    if normalizer == "sigmoid" and return_lse:
        raise ValueError(NO_LSE)
    return result(args, return_lse, return_stats)


def call_of(args: tuple) -> Call:
    """The `Call` of flat op arguments."""
    return Call(*args[: execute.CALL_FIELDS])
