"""scaled_dot_product_attention with torch's signature and meaning, on attn_ext's kernels.

query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev] with any number of leading
dimensions, which broadcast.
They are folded to the four dimensions [B, H, S, D] of the kernels without copying where strides
allow.
"""

from __future__ import annotations

import torch

from attn_ext.core import validate
from attn_ext.functional import jagged
from attn_ext.functional.common import autocast
from attn_ext.functional.dense import attention
from attn_ext.ops import fast


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """torch.nn.functional.scaled_dot_product_attention: the same arguments, meaning and result.

    query [..., Hq, L, E], key [..., H, S, E], value [..., H, S, Ev] -> [..., Hq, L, Ev]; leading
    dimensions broadcast, and there may be none.  attn_mask broadcasts to [..., Hq, L, S]: bool
    (True = attend) or floating (added, with gradient).  All three may be nested tensors of the
    jagged layout, [B, H, ragged, E].
    A torch.nn.attention.bias.CausalBias is causal as it says, top-left or bottom-right.
    is_causal aligns top-left and hides keys beside those that attn_mask hides (torch: on a CPU
    where its flash kernel serves the call, else it raises).  scale: 1/sqrt(E) if None.  enable_gqa:
    Hq may be a multiple of H.
    A row that sees no key is 0.  ValueError or TypeError where torch raises RuntimeError.
    """
    return serve(
        query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend="auto"
    )


def serve(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend):
    """`scaled_dot_product_attention` on the backend of that name."""
    deterministic = (
        isinstance(query, torch.Tensor)
        and query.device.type != "cpu"
        and torch.are_deterministic_algorithms_enabled()
    )
    flags = is_causal.__class__ is enable_gqa.__class__ is bool
    causal = "top_left" if flags and is_causal else False
    if flags and dropout_p.__class__ is float and dropout_p == 0 and not deterministic:
        out = _remembered(query, key, value, attn_mask, causal, scale, enable_gqa, backend)
        if out is not None:
            return out
    if attn_mask is None and flags and _plain(query, key, value):
        return attention(
            query, key, value, causal=causal, dropout_p=dropout_p, scale=scale,
            deterministic=deterministic, backend=backend,
        )  # fmt: skip
    if jagged.is_jagged(query, key, value):
        return jagged.serve(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend
        )
    validate.tensor("query", query)
    validate.tensor("key", key)
    validate.tensor("value", value)
    validate.boolean("is_causal", is_causal)
    validate.boolean("enable_gqa", enable_gqa)
    causal = "top_left" if is_causal else False
    if is_causal_bias(attn_mask):
        attn_mask, causal = None, _alignment(attn_mask, is_causal, query, key)
    if attn_mask is not None:
        validate.tensor("attn_mask", attn_mask)
        if attn_mask.dtype not in (torch.bool, *validate.FLOATING):
            raise TypeError(f"attn_mask must be bool or floating, got {attn_mask.dtype}")
        if attn_mask.device != query.device:
            raise ValueError(
                f"attn_mask must be on query's device {query.device}, got {attn_mask.device}"
            )
    query, key, value = autocast(query, key, value)
    validate.same_kind(
        query.dtype, key.dtype, value.dtype, query.device, key.device, value.device,
        ("query", "key", "value"),
    )  # fmt: skip
    batch = _batch_shape(query, key, value, enable_gqa)
    if 0 in batch[-1:]:  # an empty batch without a dimension of heads: give it one
        if attn_mask is not None and attn_mask.dim() > 2:
            attn_mask = attn_mask.unsqueeze(-3)
        wider = [x.unsqueeze(-3) for x in (query, key, value)]
        out = serve(*wider, attn_mask, dropout_p, is_causal, scale, False, backend)
        return out.squeeze(-3)
    heads = batch[-1] if batch else 1
    query4, key4, value4 = (
        _fold(query, batch, heads),
        _fold(key, batch, _kv_heads(key, value, batch)),
        _fold(value, batch, _kv_heads(key, value, batch)),
    )
    mask = bias = None
    if attn_mask is not None:
        folded = _fold_mask(attn_mask, batch, query.shape[-2], key.shape[-2])
        mask, bias = (folded, None) if attn_mask.dtype == torch.bool else (None, folded)
    out = attention(
        query4, key4, value4, causal=causal, mask=mask, bias=bias, dropout_p=dropout_p, scale=scale,
        backend=backend, deterministic=deterministic,
    )  # fmt: skip
    return out if len(batch) == 2 else out.reshape(*batch, query.shape[-2], value.shape[-1])


def _remembered(query, key, value, attn_mask, causal, scale, enable_gqa: bool, backend):
    """The output of a call that `attention` has served before, else None: nothing is checked here
    but what `attention` allows and torch does not.
    """
    if attn_mask is not None and (causal or type(attn_mask) is not torch.Tensor):
        return None
    mask = bias = None
    if attn_mask is not None:
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    seen = fast.key_of(
        query, key, value, mask, bias, causal, (None, None), 0.0, scale, False, backend
    )  # fmt: skip
    if seen is None or (not enable_gqa and query.shape[1:2] != key.shape[1:2]):
        return None
    return fast.run(seen, query, key, value, mask, bias)


def is_causal_bias(mask) -> bool:
    """Whether `mask` is a torch.nn.attention.bias.CausalBias.  That module brings the compiler, a
    second of `import attn_ext`, so it is imported for masks only that may be one.
    """
    if mask is None or type(mask) in (torch.Tensor, torch.nn.Parameter):
        return False
    from torch.nn.attention.bias import CausalBias

    return isinstance(mask, CausalBias)


def _lower_right(bias) -> bool:
    """Whether a CausalBias is aligned bottom-right."""
    from torch.nn.attention.bias import CausalVariant

    return bias.variant == CausalVariant.LOWER_RIGHT


def _alignment(bias, is_causal: bool, query, key) -> str:
    """What a CausalBias means; its elements are never set, only its description is."""
    if is_causal:
        raise ValueError(
            "attn_mask must be None when is_causal=True: CausalBias should not be used with "
            "causal=True"
        )
    told, needed = (bias.seq_len_q, bias.seq_len_kv), (query.shape[-2], key.shape[-2])
    if told != needed:
        raise ValueError(f"attn_mask must be a CausalBias of lengths {needed}, got {told}")
    return "bottom_right" if _lower_right(bias) else "top_left"


def as_mask(bias, device) -> torch.Tensor:
    """The bool mask [L, S] that a CausalBias stands for."""
    lengths = (bias.seq_len_q, bias.seq_len_kv)
    shift = lengths[1] - lengths[0] if _lower_right(bias) else 0
    return torch.ones(lengths, dtype=torch.bool, device=device).tril(shift)


def _plain(query, key, value) -> bool:
    """Whether the tensors are [B, H, S, D] of one kind as they come: nothing to check (`attention`
    would name its own arguments, not torch's) or to fold.
    """
    if not type(query) is type(key) is type(value) is torch.Tensor or query.dim() != 4:
        return False
    if query.is_nested or key.is_nested or value.is_nested:  # which has no shape
        return False
    shape = query.shape
    wanted = key.shape
    return (
        len(wanted) == 4
        and shape[0] == wanted[0]
        and shape[1] == wanted[1] > 0
        and shape[3] == wanted[3] > 0
        and wanted[:3] == value.shape[:3]
        and value.shape[3] > 0
        and query.dtype == key.dtype == value.dtype
        and query.dtype in validate.FLOATING
        and query.device == key.device == value.device
        and query.layout == key.layout == value.layout == torch.strided
    )


def _batch_shape(query, key, value, enable_gqa: bool) -> tuple:
    """The broadcast leading dimensions of the result."""
    shapes = []
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(
                f"{name} must have at least 2 dimensions, got shape {tuple(tensor.shape)}"
            )
        shapes.append(tuple(tensor.shape[:-2]))
    for name, tensor in (("query", query), ("value", value)):
        if tensor.shape[-1] == 0:
            raise ValueError(f"{name}'s head_dim must be at least 1, got 0")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(f"key must have query's E {query.shape[-1]}, got {key.shape[-1]}")
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"value must have key's S {key.shape[-2]}, got {value.shape[-2]}")
    if enable_gqa:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            if tensor.dim() < 3:
                raise ValueError(
                    f"{name} must have 3 dimensions (enable_gqa), got shape {tuple(tensor.shape)}"
                )
        heads, heads_k, heads_v = (shape[-1] for shape in shapes)
        if heads_k != heads_v or heads_k == 0 or heads % heads_k != 0:
            raise ValueError(
                "enable_gqa needs query's heads to be a multiple of key's and value's, "
                f"got {heads}, {heads_k} and {heads_v}"
            )
        shapes = [shapes[0], (*shapes[1][:-1], heads), (*shapes[2][:-1], heads)]
    if shapes[0] == shapes[1] == shapes[2]:
        return shapes[0]
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError:
        raise ValueError(
            "query, key and value must have leading dimensions that broadcast, got "
            f"{shapes[0]}, {shapes[1]} and {shapes[2]}"
        ) from None


def _kv_heads(key, value, batch: tuple) -> int:
    """Heads that key and value keep: fewer than the result's where both have the same smaller
    number.
    """
    if not batch:
        return 1
    heads_k = key.shape[-3] if key.dim() > 2 else 1
    heads_v = value.shape[-3] if value.dim() > 2 else 1
    return heads_k if heads_k == heads_v else batch[-1]


def _fold(tensor, batch: tuple, heads: int):
    """[..., S, E] -> [B, heads, S, E]."""
    tail = tensor.shape[-2:]
    if (
        tensor.dim() == 4
        and len(batch) == 2
        and tensor.shape[0] == batch[0]
        and tensor.shape[1] == heads
    ):
        return tensor
    full = tensor.expand(*batch[:-1], heads, *tail) if batch else tensor.unsqueeze(0)
    if full.dim() == 4:
        return full
    return full.unsqueeze(0) if full.dim() == 3 else full.flatten(0, full.dim() - 4)


def _fold_mask(mask, batch: tuple, seqlen_q, seqlen_k):
    """attn_mask as up to 4 dimensions, expanded over leading dimensions only where they are
    folded.
    """
    full = (*batch, seqlen_q, seqlen_k)
    if mask.dim() > len(full) or any(
        size not in (1, want)
        for size, want in zip(mask.shape, full[len(full) - mask.dim() :], strict=True)
    ):
        raise ValueError(
            f"attn_mask must be broadcastable to {full}, got shape {tuple(mask.shape)}"
        )
    if len(batch) <= 2 or mask.dim() <= 3:
        return mask
    mask = mask.expand(*batch[:-1], *mask.shape[-3:])
    return mask.flatten(0, mask.dim() - 4)
