"""What the cpu and the cuda backend share: how a tensor is told to a native kernel."""

from __future__ import annotations

import torch

from attn_ext.core.call import Call, Problem

NO_SCORES = (0, 0, 0, 0)


def rows(x: torch.Tensor) -> torch.Tensor:
    """x itself when its last dimension is contiguous (its stride is free when it has one element)
    and its memory holds its values (a view with torch's negative bit holds -x), else a copy."""
    x = x.resolve_neg()
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def strides(x: torch.Tensor, varlen: bool) -> tuple[int, int, int]:
    """(batch, head, position) strides of a dense [B, H, S, D] or varlen [total, H, D] tensor."""
    s = x.stride()
    return (0, s[1], s[0]) if varlen else (s[0], s[1], s[2])


def score_strides(
    x: torch.Tensor | None, sizes: tuple[int, int, int, int]
) -> tuple[int, int, int, int]:
    """Strides of a mask or bias, 0 in each dimension that is broadcast to `sizes`."""
    if x is None:
        return NO_SCORES
    return tuple(
        0 if n == 1 and full != 1 else s
        for n, s, full in zip(x.shape, x.stride(), sizes, strict=True)
    )


def alibi_stride_b(slopes: torch.Tensor | None) -> int:
    """The batch stride of slopes [Hq] or [B, Hq]; 0 where all sequences share them."""
    per_batch = slopes is not None and slopes.dim() == 2 and slopes.shape[0] > 1
    return slopes.stride(0) if per_batch else 0


def fields(call: Call, t: dict, out: torch.Tensor, lse: torch.Tensor, dtypes: dict) -> dict:
    """The native problem's sizes, strides and scalars, of the canonical tensors `t`; dtypes: the
    numbers of csrc/params.h."""
    problem = Problem.of(call)
    varlen = problem.kind == "varlen"
    sizes = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
    paged = t["block_table"] is not None
    return dict(
        dtype=dtypes[call.q.dtype],
        bias_dtype=0 if t["bias"] is None else dtypes[t["bias"].dtype],
        sizes=(
            problem.batch,
            problem.heads_q,
            problem.heads_k,
            problem.seqlen_q,
            problem.seqlen_k,
            problem.head_dim,
            problem.head_dim_v,
        ),
        q=strides(t["q"], varlen),
        k=strides(t["k"], varlen),
        v=strides(t["v"], varlen),
        o=strides(out, varlen),
        mask=score_strides(t["mask"], sizes),
        bias=score_strides(t["bias"], sizes),
        lse=(0, lse.stride(0)) if varlen else (lse.stride(0), lse.stride(1)),
        pages=(t["block_table"].stride(0), t["k"].shape[2]) if paged else (0, 0),
        scale=call.scale,
        softcap=call.softcap,
        dropout_p=call.dropout_p,
        window_left=call.window_left,
        window_right=call.window_right,
        bottom_right=call.align,
        num_splits=call.num_splits,
    )


def keep(plans: dict, key: tuple, plan):
    """`plan`, remembered under `key` for calls that look alike; old ones go when there are many."""
    if len(plans) > 4096:
        plans.clear()
    plans[key] = plan
    return plan
