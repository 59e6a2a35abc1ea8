"""Checks of the drop-ins' arguments under the names that the other library gives them.

What passes here is checked by `attn_ext.functional`, too, whose messages name q, k, v, mask, bias.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate
from attn_ext.functional.common import autocasting

NAMES = ("query", "key", "value")


def tensors(named: dict, dims: int, layout: str) -> None:
    """Dense tensors of `dims` dimensions."""
    for name, value in named.items():
        validate.tensor(name, value)
        validate.dimensions(name, value.shape, dims, layout)


def heads_first(query, key, value, names=NAMES) -> None:
    """TypeError or ValueError by `names` unless query, key and value [B, H, S, D] fit together."""
    if not isinstance(query, torch.Tensor) or not autocasting(query.device.type):
        tensors(dict(zip(names, (query, key, value), strict=True)), 4, "[B, H, S, D]")
        _fit(query, key, value, names)


def _fit(query, key, value, names) -> None:
    known = validate.dense if torch.compiler.is_compiling() else validate.dense_cached
    known(
        query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype, query.device,
        key.device, value.device, False, None, None, 0.0, 0.0, None, False, "auto", names,
    )  # fmt: skip


def heads_last(query, key, value, names=NAMES) -> None:
    """`heads_first` of [B, S, H, D]."""
    tensors(dict(zip(names, (query, key, value), strict=True)), 4, "[B, S, H, D]")
    if not autocasting(query.device.type):
        _fit(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), names)


def rows(query, key, value, names=NAMES) -> None:
    """`heads_first` of packed [total, H, D]."""
    tensors(dict(zip(names, (query, key, value), strict=True)), 3, "[total, H, D]")
    if not autocasting(query.device.type):
        _fit(*(x.transpose(0, 1)[None] for x in (query, key, value)), names)


def scores(name: str, value, query, seqlen_k: int):
    """A mask (bool) or bias (floating) that broadcasts to [B, H, Sq, Sk] of query [B, H, Sq, D]."""
    validate.tensor(name, value)
    if value.dtype != torch.bool and value.dtype not in validate.FLOATING:
        raise TypeError(f"{name} must be bool or floating, got {value.dtype}")
    is_mask, (batch, heads, seqlen_q, _) = value.dtype == torch.bool, query.shape
    return validate.scores(name, value, is_mask, query.device, batch, heads, seqlen_q, seqlen_k)
