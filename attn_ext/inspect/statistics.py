"""row_stats: LSE, largest logit and entropy of each query's row, differentiable, in O(N) memory.

Forward is one pass of the best backend's kernel.  Backward recomputes the logits tile by tile:

    d LSE_i / d s_ij     = P_ij
    d max_i / d s_ij     = 1 / n_i at the n_i keys that hold the largest logit
    d entropy_i / d s_ij = -P_ij (ln P_ij + 1 + entropy_i - sum_j P_ij)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_ext.core.schema import Call
from attn_ext.functional.common import RowStats
from attn_ext.inspect import logits
from attn_ext.ops import route

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal


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
    if route.wants_grad(call.q, call.k, call.bias, call.sink):
        return RowStats(*_RowStats.apply(call.q, call.k, call.bias, call.sink, call))
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
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlse, dmax, dentropy):
        q, k, bias, sink, lse, entropy = ctx.saved_tensors
        if dlse is None and dmax is None and dentropy is None:
            return (None,) * 5
        call = ctx.call._replace(q=q, k=k, v=k, bias=bias, sink=sink)
        grads = _gradients(call, ctx.needs_input_grad, (lse, entropy),
                           (dlse, dmax, dentropy))  # fmt: skip
        inputs = (q, k, bias, sink)
        return *(None if g is None else g.to(x.dtype)
                 for g, x in zip(grads, inputs, strict=True)), None  # fmt: skip


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
