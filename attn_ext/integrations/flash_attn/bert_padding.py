"""flash_attn.bert_padding: to packed sequences and back.

hidden_states [B, S, ...] with attention_mask [B, S] (nonzero = a real token) <-> [total, ...].
All functions are differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from attn_ext.core import validate


def _tensor(name: str, value, least: int) -> None:
    validate.tensor(name, value)
    if value.dim() < least:
        raise ValueError(
            f"{name} must have at least {least} dimensions, got shape {tuple(value.shape)}"
        )


def _rows(name: str, indices, rows: int, device) -> None:
    """int64 (or int32) [M] on `device`, each below `rows` where reading them is free (CPU)."""
    validate.tensor(name, indices)
    if indices.dtype not in (torch.int32, torch.int64) or indices.dim() != 1:
        raise ValueError(
            f"{name} must be int64 [M], got {indices.dtype} of shape {tuple(indices.shape)}"
        )
    if indices.device != device:
        raise ValueError(f"{name} must be on device {device}, got {indices.device}")
    if device.type == "cpu" and len(indices):
        low, high = (int(n) for n in indices.aminmax())
        if low < 0 or high >= rows:
            raise ValueError(f"{name} must be between 0 and {rows - 1}, got {low} to {high}")


def _mask(name: str, mask, hidden_states) -> None:
    """bool, integer or floating [B, S] of hidden_states [B, S, ...]."""
    validate.tensor(name, mask)
    if mask.dtype.is_complex:
        raise TypeError(f"{name} must be bool, integer or floating, got {mask.dtype}")
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must have hidden_states' shape {tuple(hidden_states.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != hidden_states.device:
        raise ValueError(f"{name} must be on device {hidden_states.device}, got {mask.device}")


def index_first_axis(input, indices):
    """input [N, ...], indices [M] -> [M, ...]"""
    _tensor("input", input, 1)
    _rows("indices", indices, input.shape[0], input.device)
    return input[indices]


def index_first_axis_residual(input, indices):
    """(input[indices], input): the second for a residual path."""
    return index_first_axis(input, indices), input


def index_put_first_axis(values, indices, first_axis_dim):
    """values [M, ...] at rows `indices` of zeros [first_axis_dim, ...]"""
    _tensor("values", values, 1)
    first_axis_dim = validate.integer("first_axis_dim", first_axis_dim)
    _rows("indices", indices, first_axis_dim, values.device)
    if len(indices) != len(values):
        raise ValueError(
            f"values must have the {len(indices)} rows that indices name, got {len(values)}"
        )
    out = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return out.index_put((indices,), values)


def _cumulative(lengths):
    """int32 [B + 1]"""
    return F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))


def _longest(lengths) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """(packed [total, ...], indices [total], cu_seqlens int32 [B + 1], max_seqlen, seqused [B]).

    hidden_states [B, S, ...]; attention_mask [B, S], 1 = a token, 0 = padding; unused_mask [B, S],
    1 = a place that is kept in the packing though it holds no token.  seqused counts the tokens
    without those places (int32).
    """
    _tensor("hidden_states", hidden_states, 2)
    _mask("attention_mask", attention_mask, hidden_states)
    if unused_mask is not None:
        _mask("unused_mask", unused_mask, hidden_states)
    token = attention_mask != 0
    kept = token if unused_mask is None else token | (unused_mask != 0)
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    used = token.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """(packed, indices, cu_seqlens, max_seqlen): rows that hold several sequences one after the
    other.

    attention_mask_in_length [B, S]: each row begins with the lengths of its sequences, then zeros.
    """
    _tensor("hidden_states", hidden_states, 2)
    _mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    name, listed = "attention_mask_in_length", attention_mask_in_length
    seqlen, total = listed.shape[-1], listed.sum(dim=-1)
    if listed.device.type == "cpu" and listed.numel():
        if listed.min() < 0:
            raise ValueError(f"{name} must hold lengths of at least 0, got {listed.min().item()}")
        if total.max() > seqlen:
            raise ValueError(
                f"{name} must hold lengths that add up to at most {seqlen} in a row, "
                f"got {total.max().item()}"
            )
    tokens = torch.arange(seqlen, device=total.device) < total[:, None]
    flat = attention_mask_in_length.flatten()
    lengths = flat[torch.nonzero(flat, as_tuple=False).flatten()]
    indices = torch.nonzero(tokens.flatten(), as_tuple=False).flatten()
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), _longest(lengths)


def pad_input(hidden_states, indices, batch, seqlen):
    """packed [total, ...] and the indices that unpad_input gave -> [batch, seqlen, ...], zeros
    elsewhere.
    """
    _tensor("hidden_states", hidden_states, 1)
    batch, seqlen = validate.integer("batch", batch), validate.integer("seqlen", seqlen)
    _rows("indices", indices, batch * seqlen, hidden_states.device)
    if len(indices) != len(hidden_states):
        raise ValueError(
            f"hidden_states must have the {len(indices)} rows that indices name, "
            f"got {len(hidden_states)}"
        )
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )
