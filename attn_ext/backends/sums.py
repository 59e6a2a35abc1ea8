"""The sums of a part's rows where its kernels know LSE alone: (base, rest) with LSE = base + rest,
as `attn_ext.ops.parts` has them.  Beside logits of 1e9 or the smallest float LSE has lost the
logarithm of the sum; such far rows are computed once more by torch operations on tiles.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from attn_ext.backends import shards
from attn_ext.core.schema import Call, Grads, Needs

FAR = 256.0  # as kFarLse of csrc/cpu: beyond it LSE has lost digits of a weight exp(S - LSE)


def of_lse(lse: torch.Tensor) -> torch.Tensor:
    """The sums of rows whose LSE has all digits."""
    return torch.stack([lse, torch.zeros_like(lse)], -1)


def is_far(lse: torch.Tensor) -> torch.Tensor:
    """Which rows have an LSE so far from 0 that it has lost the sum."""
    return (lse.abs() > FAR) & (lse.abs() < torch.inf)


def forward(call: Call, out, lse) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, sums) of a part from the O and LSE that kernels gave, in LSE's dtype."""
    out, sums, far = out.to(lse.dtype), of_lse(lse), is_far(lse)
    if bool(far.any()):
        exact, exact_sums = shards.forward_partial(call)
        packed = call.cu_seqlens_q is not None  # rows of O have their heads behind them
        out = torch.where((far.transpose(0, 1) if packed else far)[..., None], exact, out)
        sums = torch.where(far[..., None], exact_sums, sums)
    return out, sums


def backward(
    call: Call, dout, delta, sums, needs: Needs, near: Callable[[torch.Tensor], tuple]
) -> Grads:
    """The gradients of a part, in the dtype of the sums.  near(lse): those that kernels find with
    such an LSE of whole rows; it is inf, so that P = 0, in far rows, whose share is added."""
    lse = sums.sum(-1)
    far = is_far(lse)
    grads = near(lse.masked_fill(far, torch.inf))[:4]
    grads = [g if g is None else g.to(lse.dtype) for g in grads]
    if bool(far.any()):
        only_far = torch.where(far[..., None], sums, of_lse(torch.full_like(lse, -torch.inf)))
        more = shards.backward_partial(call, dout, delta, only_far, needs)[:4]
        grads = [g if g is None else g + x for g, x in zip(grads, more, strict=True)]
    return Grads(*grads)
