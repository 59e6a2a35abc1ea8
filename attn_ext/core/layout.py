"""How tensors lie in memory: dimensions, strides, and the order of an output's dimensions."""

from __future__ import annotations

import torch


def four(scores: torch.Tensor | None) -> torch.Tensor | None:
    """A mask or bias with its missing leading dimensions."""
    return scores if scores is None else scores[(None,) * (4 - scores.dim())]


def prototype(x: torch.Tensor) -> torch.Tensor:
    """A tensor like x without memory, for torch.empty_like: the cheapest allocation there is."""
    x.untyped_storage().resize_(0)
    return x


def memory_order(q: torch.Tensor) -> tuple[int, ...]:
    """q's dimensions from the outermost in memory to the innermost, which is always the last."""
    if q.is_contiguous():
        return tuple(range(q.dim()))
    order = sorted(range(q.dim() - 1), key=lambda d: q.stride(d), reverse=True)
    return (*order, q.dim() - 1)


def empty_like_layout(
    q: torch.Tensor, last_dim: int, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An uninitialised tensor of q's shape but for the last dimension, its dimensions in q's
    memory order.

    So a q that is a transposed [B, S, H, D] gives an output whose transpose back is contiguous.
    The last dimension is always the innermost.
    """
    dtype = dtype or q.dtype
    shape = (*q.shape[:-1], last_dim)
    if q.is_contiguous():  # half the time of the general way
        return torch.empty(shape, dtype=dtype, device=q.device)
    return torch.empty_permuted(shape, memory_order(q), dtype=dtype, device=q.device)


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
