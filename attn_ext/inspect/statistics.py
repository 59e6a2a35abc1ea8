"""row_stats: LSE, largest logit and entropy of each query's row, differentiable, in O(N) memory.

Forward is one pass of the best backend's kernel.  Backward recomputes the logits tile by tile:

    d LSE_i / d s_ij     = P_ij
    d max_i / d s_ij     = 1 / n_i at the n_i keys that hold the largest logit
    d entropy_i / d s_ij = -P_ij (ln P_ij + 1 + entropy_i - sum_j P_ij)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_ext.core import reference
from attn_ext.core.schema import Call
from attn_ext.functional.common import RowStats
from attn_ext.inspect import logits
from attn_ext.ops import route

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

ONCE = (
    "attn_ext.inspect.row_stats has no {}: use attn_ext.attention with return_lse=True, whose LSE "
    "has it, or write entropy and largest logit in torch operations"
)


def row_stats(
    q: torch.Tensor, k: torch.Tensor, *,
    causal: bool | Literal["top_left", "bottom_right"] = False,
    window: Sequence[int | None] | None = (None, None), mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, sink: torch.Tensor | None = None,
    scale: float | None = None,
) -> RowStats:  # fmt: skip
    """LSE, largest logit and entropy of each row, [B, Hq, Sq] each, differentiable in q, k, bias
    and sink.

    q [B, Hq, Sq, D], k [B, Hk, Sk, D]; the options mean what they mean in `attn_ext.attention`,
    and so do the errors.  Natural logarithms: logits and entropy in nats; float32, float64 for
    float64 inputs.  Use the entropy as a regulariser, the largest logit for QK-clip.  A row that
    sees no key: lse and max_logit -inf, entropy 0, gradients 0.
    """
    call = logits.call_of(
        q, k, causal=causal, window=window, mask=mask, bias=bias, softcap=softcap,
        alibi_slopes=alibi_slopes, sink=sink, scale=scale,
    )  # fmt: skip
    return row_stats_of(call)


def row_stats_of(call: Call) -> RowStats:
    """`row_stats` of a canonical dense call of softmax over dot products."""
    call = call._replace(need_stats=True)
    inputs = (call.q, call.k, call.bias, call.sink)
    if route.wants_grad(*inputs) or torch.autograd.forward_ad._current_level >= 0:
        return RowStats(*reference.applied(_RowStats, *inputs, call))
    return RowStats(*logits.forward(logits.detached(call))[1:])


class _RowStats(torch.autograd.Function):
    """The statistics with the gradients above."""

    @staticmethod
    def forward(ctx, q, k, bias, sink, call: Call):
        _, lse, max_logit, entropy = logits.forward(logits.detached(call))
        ctx.save_for_backward(q, k, bias, sink, lse, entropy)
        ctx.call = call._replace(q=None, k=None, v=None, bias=None, sink=None)
        ctx.set_materialize_grads(False)
        return lse, max_logit, entropy

    @staticmethod
    def backward(ctx, dlse, dmax, dentropy):
        douts = (dlse, dmax, dentropy)
        if all(d is None for d in douts):
            return (None,) * 5
        if any(d is not None and torch._C._functorch.is_legacy_batchedtensor(d) for d in douts):
            raise NotImplementedError(
                ONCE.format("batched gradients (is_grads_batched=True, vectorize=True)")
            )
        grads = reference.applied(
            _Gradients, *ctx.saved_tensors, *douts, ctx.call, ctx.needs_input_grad
        )
        return *grads, None

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(ONCE.format("forward mode"))


class _Gradients(torch.autograd.Function):
    """The gradients, whose own derivative says that there is none: torch's once_differentiable
    leaves gradients without a graph where only the inputs are differentiated."""

    @staticmethod
    def forward(ctx, q, k, bias, sink, lse, entropy, dlse, dmax, dentropy, call: Call, needs):
        call = call._replace(q=q, k=k, v=k, bias=bias, sink=sink)
        grads = _gradients(call, needs, (lse, entropy), (dlse, dmax, dentropy))
        inputs = zip(grads, (q, k, bias, sink), strict=True)
        return tuple(None if g is None else g.to(x.dtype) for g, x in inputs)

    @staticmethod
    def backward(ctx, *cotangents):
        raise NotImplementedError(ONCE.format("second derivatives"))

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(ONCE.format("forward mode"))


def _gradients(call: Call, needs, stats, douts) -> list:
    """Gradients of q, k, bias and sink in the statistics' dtype; None where not needed."""
    dtype = logits.statistics_dtype(call)
    inputs = (call.q, call.k, call.bias, call.sink)
    dq, dk, dbias, dsink = (
        torch.zeros(x.shape, dtype=dtype, device=x.device) if need and x is not None else None
        for x, need in zip(inputs, needs, strict=False)
    )
    for tile in logits.tiles(call):
        if tile.c0 == tile.c1:  # rows that see no key
            continue
        s, derivative = logits.scores(call, tile, slope=True)
        lse, entropy = (x[tile.b, tile.h][..., tile.rows] for x in stats)
        dlse, dmax, dentropy = (
            None if d is None else d[tile.b, tile.h][..., tile.rows].to(dtype) for d in douts
        )
        p = logits.row_probabilities(call, tile, s)
        ds = torch.zeros_like(p)
        if dlse is not None:
            ds += p * dlse.unsqueeze(-1)
        if dentropy is not None:
            log_p = torch.where(p != 0, torch.log(p), 0.0)
            rest = (entropy - p.sum(-1)).unsqueeze(-1)
            ds -= p * (log_p + 1 + rest) * dentropy.unsqueeze(-1)
        if dmax is not None:
            # the largest of these very logits: the kernel's were summed in another order
            winner = (s == s.amax(-1, keepdim=True)) & (s != -torch.inf)
            share = winner / winner.sum(-1, keepdim=True).clamp_min(1)
            ds += share * dmax.unsqueeze(-1)
        # what an excluded key's derivative would be (0 * NaN) must stay out
        ds = torch.where(s == -torch.inf, 0.0, ds)
        if dbias is not None:
            logits.add_to_bias(dbias, ds, tile)
        if dsink is not None:
            dsink[tile.h] += _sink_gradient(call, tile, lse, entropy, p, dlse, dentropy)
        if derivative is not None:
            ds = torch.where(ds != 0, ds * derivative, 0.0)
        if dq is not None:
            product = logits.times_keys(ds, call, tile)
            dq[tile.b, tile.h, tile.rows[0] : tile.rows[-1] + 1] = product
        if dk is not None:
            logits.add_to_keys(dk, ds, call, tile)
    return [dq, dk, dbias, dsink]


def _sink_gradient(call, tile, lse, entropy, p, dlse, dentropy) -> torch.Tensor:
    """[h]: P_sink dLSE + P_sink (sum_j P_ij - entropy) dentropy, summed over batch and rows."""
    weight = torch.exp(call.sink[tile.h].to(lse.dtype)[None, :, None] - lse)
    weight = torch.where(lse == -torch.inf, 0.0, weight)
    total = torch.zeros_like(weight)
    if dlse is not None:
        total += weight * dlse
    if dentropy is not None:
        total += weight * (p.sum(-1) - entropy) * dentropy
    return total.sum((0, 2))
