"""What the cpu and the cuda backend share: how a tensor is told to a native kernel."""

from __future__ import annotations

import torch

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
