"""scaled_dot_product_attention of torch's nested tensors in the jagged layout, by attention_varlen.

query [B, Hq, j, D] is the transpose of a nested [B, j, Hq, D], whose values [total_q, Hq, D] are
packed one sequence after the other: exactly what attention_varlen takes, without a copy.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate
from attn_ext.functional.varlen import attention_varlen

# torch 2.6 cannot trace the lengths that a nested tensor keeps ("Unexpected type in sourceless
# builder torch.SymInt").
_LENGTHS_ARE_TRACED = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


def is_jagged(*tensors) -> bool:
    """Whether all are nested tensors of the jagged layout."""
    return all(
        isinstance(x, torch.Tensor) and x.is_nested and x.layout == torch.jagged for x in tensors
    )


def _packed(name: str, nested) -> tuple[torch.Tensor, torch.Tensor]:
    """(values [total, H, D], offsets [B + 1]) of a nested [B, H, j, D]."""
    if nested.dim() != 4 or nested._ragged_idx != 2:
        raise NotImplementedError(
            f"a nested {name} must have shape [B, H, ragged, D], got {tuple(nested.shape)}"
        )
    if nested.lengths() is not None:
        raise NotImplementedError(f"a nested {name} must have no holes (lengths must be None)")
    packed = nested.transpose(1, 2)
    return packed.values(), packed.offsets()


def values(query, key, value) -> tuple:
    """The packed values [total, H, D] of nested [B, H, j, D]."""
    named = zip(("query", "key", "value"), (query, key, value), strict=True)
    return tuple(_packed(name, x)[0] for name, x in named)


def _known_lengths(query, key) -> tuple:
    """(shortest, longest query sequence, longest key sequence), each None where it is not known."""
    if torch.compiler.is_compiling() and not _LENGTHS_ARE_TRACED:
        return None, None, None
    return query._maybe_min_seqlen, query._maybe_max_seqlen, key._maybe_max_seqlen


def serve(
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend
) -> torch.Tensor:
    """scaled_dot_product_attention of nested query [B, Hq, j1, D], key [B, H, j2, D] and value
    [B, H, j2, Dv]: a nested [B, Hq, j1, Dv].  is_causal is aligned top-left in each sequence.
    """
    if attn_mask is not None:
        raise NotImplementedError("attn_mask must be None with nested tensors")
    validate.boolean("is_causal", is_causal)
    q, offsets_q = _packed("query", query)
    k, offsets_k = _packed("key", key)
    v, offsets_v = _packed("value", value)
    if k.shape[0] != v.shape[0] or offsets_k.shape != offsets_v.shape:
        raise ValueError("key and value must have sequences of the same lengths")
    if q.shape[1] != k.shape[1] and not enable_gqa:
        raise ValueError(
            f"key must have query's {q.shape[1]} heads without enable_gqa, got {k.shape[1]}"
        )
    cu_q = offsets_q.to(torch.int32)
    cu_k = cu_q if offsets_k is offsets_q else offsets_k.to(torch.int32)
    shortest, longest, longest_k = _known_lengths(query, key)
    out = attention_varlen(
        q, k, v, cu_q, cu_k, longest, longest_k,
        causal="top_left" if is_causal else False, dropout_p=dropout_p, scale=scale,
        backend=backend,
    )  # fmt: skip
    nested = torch.nested.nested_tensor_from_jagged(
        out, offsets_q, min_seqlen=shortest, max_seqlen=longest
    )
    return nested.transpose(1, 2)
