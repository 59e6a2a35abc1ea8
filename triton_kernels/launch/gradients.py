"""What backward needs besides its kernels: how dbias is written, and dsink."""

from __future__ import annotations

import math

import torch

from attn_ext.triton_kernels.kernels import primitives


def dbias_flags(plan, shape: tuple) -> int:
    """How dQ writes a dbias of this shape: plain stores, or atomic additions of its sums."""
    one = [n == 1 and full != 1 for n, full in zip(shape, plan.sizes, strict=True)]
    if not any(one):
        return primitives.DBIAS_STORE.value
    flags = primitives.DBIAS_ADD.value
    flags += primitives.DBIAS_ONE_QUERY.value if shape[2] == 1 else 0
    return flags + (primitives.DBIAS_ONE_KEY.value if shape[3] == 1 else 0)


def sink_gradient(sink, varlen: bool, lse, delta, base, inverse) -> torch.Tensor:
    """dsink [Hq] = -sum over rows that are not empty of exp(sink - LSE) * (delta - dLSE); far rows,
    where base is finite, take the weight 2^(sink - base) * inverse."""
    head = 0 if varlen else 1
    shape = [-1 if d == head else 1 for d in range(lse.dim())]
    sink = sink.detach().float().view(shape)
    share = torch.exp(sink - lse)
    least = primitives.LEAST.value
    held = torch.where(sink.isinf(), sink, sink.clamp(least, -least))
    far = torch.exp2(held * primitives.LOG2E.value - base) * inverse
    share = torch.where(base < math.inf, far, share)
    # rows without keys, and rows of a varlen buffer without a sequence, have no share
    terms = torch.where(lse == -math.inf, 0.0, share * delta)
    return -terms.sum([d for d in range(lse.dim()) if d != head])
