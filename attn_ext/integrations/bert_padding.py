"""flash_attn.bert_padding: to packed sequences and back.

hidden_states [B, S, ...] with attention_mask [B, S] (nonzero = a real token) <-> [total, ...].
All functions are differentiable.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def index_first_axis(input, indices):
    """input [N, ...], indices [M] -> [M, ...]"""
    return input[indices]


def index_first_axis_residual(input, indices):
    """(input[indices], input): the second for a residual path."""
    return input[indices], input


def index_put_first_axis(values, indices, first_axis_dim):
    """values [M, ...] at rows `indices` of zeros [first_axis_dim, ...]"""
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
    kept = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = kept.sum(dim=-1, dtype=torch.int32)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    indices = torch.nonzero(kept.flatten(), as_tuple=False).flatten()
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), _longest(lengths), used


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """(packed, indices, cu_seqlens, max_seqlen): rows that hold several sequences one after the
    other.

    attention_mask_in_length [B, S]: each row begins with the lengths of its sequences, then zeros.
    """
    total = attention_mask_in_length.sum(dim=-1)
    seqlen = attention_mask_in_length.shape[-1]
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
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )
