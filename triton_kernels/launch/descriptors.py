"""Tensor descriptors made by the host: what TMA loads from on sm_90 and newer."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor


def described_strides(x: torch.Tensor) -> list[int]:
    """x's strides as a tensor descriptor takes them: those of dimensions of size 1 do not matter,
    and become multiples of 16 bytes."""
    *outer, last = (0 if n == 1 else s for n, s in zip(x.shape, x.stride(), strict=True))
    return [s or x.shape[-1] * 16 for s in outer] + [last or 1]


def describable(x: torch.Tensor) -> bool:
    """Whether TMA can load from x [B, H, S, D]: base and strides are multiples of 16 bytes, no
    dimension is broadcast or as long as 2^31, and the head has 16 bytes at least."""
    size = x.element_size()
    if x.dim() != 4 or x.data_ptr() % 16 or x.shape[-1] * size < 16:
        return False
    if x.numel() == 0 or max(x.shape) >= 1 << 31 or x.is_neg():
        return False
    outer = zip(x.shape[:-1], x.stride()[:-1], strict=True)
    return all(n == 1 or (s > 0 and s * size % 16 == 0 and s * size < 1 << 40) for n, s in outer)


def describe(tile, plan) -> tuple:
    """Descriptors of q, k and v for the forward kernel with this tile, or None each."""
    if not tile.loads:
        return (None, None, None)
    blocks = (
        (tile.block_m, plan.block_d), (tile.block_n, plan.block_d), (tile.block_n, plan.block_dv)
    )  # fmt: skip
    return tuple(
        TensorDescriptor(x, list(x.shape), described_strides(x), [1, 1, *block])
        for x, block in zip((plan.q, plan.k, plan.v), blocks, strict=True)
    )
