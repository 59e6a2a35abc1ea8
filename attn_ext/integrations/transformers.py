"""attn_ext as an attention implementation of Hugging Face transformers (v5).

    import attn_ext.integrations.transformers as integration
    integration.register()
    model = AutoModelForCausalLM.from_config(config, attn_implementation="attn_ext")

`attention_forward` has the signature of transformers' AttentionInterface: query [B, Hq, Sq, D], key
[B, Hk, Sk, D], value [B, Hk, Sk, Dv], neither repeated -> ([B, Sq, Hq, Dv] contiguous, None).
"""

from __future__ import annotations

import functools
import math
import warnings

import torch

from attn_ext.core import validate, values
from attn_ext.functional import common
from attn_ext.functional.dense import attention
from attn_ext.functional.varlen import attention_varlen
from attn_ext.integrations import checks
from attn_ext.integrations.masks import LazyMask, mask_function
from attn_ext.integrations.paged_cache import CachedRows, paged_cache
from attn_ext.integrations.transformers_context import Context
from attn_ext.ops import route

__all__ = ["attention_forward", "mask_function", "paged_cache", "register"]


def register(
    name: str = "attn_ext", prefer: str = "fastest", *, mesh=None, layout=None, method: str = "auto"
) -> None:
    """Make `attn_implementation=name` available in transformers; a second call changes nothing.

    Registers `attention_forward` with AttentionInterface and `mask_function` with
    AttentionMaskInterface: without the second, transformers passes no mask at all to an
    implementation that it does not know, padding included, and says nothing.
    prefer: "fastest" lets torch's own flash attention compute a plain call where `attn-ext tune`
    measured it to be faster, "attn_ext" keeps every call.
    mesh: a DeviceMesh or process group over whose ranks the sequence is cut: `attention_forward` is
    then `attn_ext.distributed.context_attention`, by `method`, and each rank's model must be given
    its position_ids.  layout: a Layout, or a function without arguments that gives the step's;
    needed where shards are uneven or documents packed.  What cannot be said of a shard (padding, a
    cache, another mask function) is a ValueError or NotImplementedError.
    ImportError where transformers (v5 or newer) is not installed; ValueError for a name that
    transformers gives a meaning of its own.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__} {name!r}")
    try:
        from transformers import AttentionInterface
        from transformers.masking_utils import AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"register needs transformers 5 or newer (pip install transformers): {error}"
        ) from error
    known = getattr(AttentionInterface().get(name), "__module__", "")
    reserved = ("flash", "flex", "sdpa", "eager", "paged", "/")
    if not name or known.startswith("transformers.") or any(word in name for word in reserved):
        raise ValueError(
            "name must be new to transformers and hold none of flash, flex, sdpa, eager, paged and "
            f"'/', to which it gives meanings of its own, got {name!r}"
        )
    common.preferred(prefer)
    forward, mask = attention_forward, mask_function
    if prefer != "fastest":
        forward = functools.partial(attention_forward, prefer=prefer)
    if mesh is not None:
        context = Context(mesh, method, layout)
        context.check()
        forward, mask = context.attention_forward, context.mask_function
    elif layout is not None or method != "auto":
        raise ValueError("mesh must be given with layout or method, got None")
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, mask)


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    is_causal=None,
    position_bias=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Attention of one layer of a transformers model.

    query [B, Hq, Sq, D], key [B, Hk, Sk, D], value [B, Hk, Sk, Dv] -> ([B, Sq, Hq, Dv], None).
    attention_mask: bool (True = attend), floating (added), a LazyMask, or None; broadcasts to
    [B, Hq, Sq, Sk].  A given mask says all there is to say.  Without one a layer is causal where
    is_causal (the module's own, else True, if None) and Sq > 1, and sliding_window (positions, the
    query's own included) holds.
    position_bias is added to the logits, with gradient; softcap: softcap * tanh(logits / softcap);
    s_aux [Hq]: learnable sinks, `sinks` [B, Hq, Sq, 1]: sinks of each query.
    dropout: applied while module.training.  scaling: 1/sqrt(D) if None.
    kwargs: cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k (packed sequences), cache
    (continuous batching), indices [B, Sq, n] (the keys that a sparse layer chose),
    output_attentions (warned about: weights are never stored), prefer (see `register`), others
    have no meaning here.
    ValueError, TypeError and NotImplementedError as `attn_ext.attention`.
    """
    if kwargs.get("output_attentions"):
        _warn_no_weights()
    if kwargs.get("block_indices") is not None:
        raise NotImplementedError(
            "block_indices (block-sparse attention of MiniMax M3) is not supported by attn_ext: "
            "use attn_implementation='sdpa'"
        )
    if attention_mask is not None and not isinstance(attention_mask, torch.Tensor):
        raise TypeError(
            f"attention_mask must be a torch.Tensor or None, got {type(attention_mask).__name__}"
        )
    plain = attention_mask is not None and not isinstance(attention_mask, LazyMask)
    if plain and attention_mask.is_nested:
        raise TypeError("attention_mask must be a dense tensor, got a nested one")
    if plain and not 2 <= len(attention_mask.shape) <= 4:
        raise ValueError(
            "attention_mask must have 2 to 4 dimensions, those of [B, Hq, Sq, Sk], got shape "
            f"{tuple(attention_mask.shape)}"
        )
    if kwargs.get("cache") is not None:  # paged cache: appends, and gives all keys to attend to
        key, value = kwargs["cache"].update(
            key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs
        )
    query, key, value = _one_batch(query, key, value)
    checks.heads_first(query, key, value)
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = validate.switch("is_causal", is_causal)
    mask, indices, seqlen_q = attention_mask, kwargs.get("indices"), query.shape[2]
    if mask is None:
        causal = seqlen_q > 1 and is_causal
        if causal and key.shape[2] > seqlen_q:  # an empty static cache: its free space is behind
            key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
            position_bias = None if position_bias is None else position_bias[..., :seqlen_q]
        # a lone query is the last position: nothing is to its right
        if sliding_window is not None:
            sliding_window = validate.integer("sliding_window", sliding_window, 1)
        left = None if sliding_window is None else sliding_window - 1
        window = (left, 0 if causal else left)
    else:
        mask, window = _mask_and_window(mask, query, key, indices)
        if not isinstance(mask, LazyMask):
            mask = checks.scores("attention_mask", mask, query, key.shape[2])
    if position_bias is not None:
        position_bias = checks.scores("position_bias", position_bias, query, key.shape[2])
        if position_bias.dtype == torch.bool:
            raise TypeError("position_bias must be floating (it is added), got torch.bool")
    if indices is not None:
        mask = _chosen(mask, indices, query, key)
    options = {
        "window": window,  # aligned bottom-right; causal is right = 0
        "scale": None if scaling is None else _number("scaling", scaling),
        "softcap": 0.0 if softcap is None else _number("softcap", softcap, 0.0),
        "dropout_p": _dropout(dropout, getattr(module, "training", True)),
        "sink": None if s_aux is None else _sinks(s_aux, query),
        "backend": common.preferred(kwargs.get("prefer", "fastest")),
    }
    row_sinks, simple = kwargs.get("sinks"), mask is None or isinstance(mask, LazyMask)
    if position_bias is None and row_sinks is None and simple:
        bounds = _packed_bounds(mask, query, key, kwargs)
        if bounds is not None:
            return _varlen(query, key, value, *bounds, options), None
    if kwargs.get("cu_seq_lens_q") is not None:
        mask = _within_sequences(mask, query, key, kwargs["cu_seq_lens_q"])
    return _dense(query, key, value, mask, position_bias, row_sinks, options), None


def _number(name: str, value, low: float = -math.inf, high: float = math.inf) -> float:
    """A float of a number, or of a tensor or array that holds one."""
    if not isinstance(value, (int, float)) and getattr(value, "shape", None) == (1,):
        value = value.item()
    return float(validate.number(name, value, low, high))


def _dropout(dropout, training: bool) -> float:
    dropout = 0.0 if dropout is None else _number("dropout", dropout, 0.0, 1.0)
    return dropout if training else 0.0


def _floating(name: str, value, query) -> None:
    validate.tensor(name, value)
    validate.floating(name, value)
    if value.device != query.device:
        raise ValueError(f"{name} must be on {query.device}, got {value.device}")


def _sinks(s_aux, query):
    """[Hq] of one logit a head, of whatever shape."""
    _floating("s_aux", s_aux, query)
    if s_aux.numel() != query.shape[1]:
        raise ValueError(
            f"s_aux must hold a logit for each of the {query.shape[1]} heads, "
            f"got shape {tuple(s_aux.shape)}"
        )
    return s_aux.flatten()


@functools.cache
def _warn_no_weights() -> None:
    warnings.warn(
        "attn_ext never stores attention weights, so output_attentions=True gives none: use "
        "attn_implementation='eager' for them, or attn_ext.inspect",
        stacklevel=3,
    )


def _one_batch(query, key, value):
    """Batch sizes of 1 beside a larger one broadcast, as in torch's SDPA."""
    checks.tensors(dict(query=query, key=key, value=value), 4, "[B, H, S, D]")
    batch = max(query.shape[0], key.shape[0])
    if query.shape[0] == key.shape[0] == value.shape[0]:
        return query, key, value
    return tuple(
        x.expand(batch, *x.shape[1:]) if x.shape[0] == 1 else x for x in (query, key, value)
    )


def _mask_and_window(mask, query, key, indices):
    """A LazyMask and its window where it fits the call as it is; else a plain tensor, no window."""
    if isinstance(mask, LazyMask):
        fits = mask.sizes == (query.shape[0], 1, query.shape[2], key.shape[2])
        if fits and indices is None:
            return mask, (mask.structure.left, mask.structure.right)
        mask = mask.dense()
    if mask.shape[-1] > key.shape[2]:
        mask = mask[..., : key.shape[2]]  # made for the whole of a static cache
    return mask, (None, None)


def _chosen(mask, indices, query, key):
    """`mask` with only the keys whose numbers are in indices [B, Sq, n] (negative: none)."""
    seqlen_k = key.shape[2]
    validate.tensor("indices", indices)
    shape = (query.shape[0], query.shape[2])
    if indices.dtype not in (torch.int32, torch.int64) or indices.shape[:-1] != shape:
        raise ValueError(
            f"indices must be int32 or int64 of shape [{shape[0]}, {shape[1]}, n], got "
            f"{indices.dtype} {tuple(indices.shape)}"
        )
    tracing = torch.compiler.is_compiling()
    if not tracing and indices.device.type == "cpu" and (indices >= seqlen_k).any():
        raise ValueError(f"indices must be below {seqlen_k}, got {int(indices.max())}")
    shape = (query.shape[0], query.shape[2], seqlen_k + 1)  # one more for the negative ones
    numbers = torch.where(indices < 0, seqlen_k, indices).long()
    keep = torch.zeros(shape, dtype=torch.bool, device=query.device).scatter(-1, numbers, True)
    keep = keep[:, None, :, :seqlen_k]
    if mask is None:
        return keep
    return mask & keep if mask.dtype == torch.bool else mask.masked_fill(~keep, -torch.inf)


def _checked_bounds(side: str, cu, x, longest):
    """Check cu_seq_lens_* of packed x [B, H, S, D] and max_length_*; return the latter."""
    name = f"cu_seq_lens_{side}"
    validate.tensor(name, cu)
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {cu.dtype}")
    validate.index_tensor(name, cu.to(torch.int32), x.device, 1)
    longest = None if longest is None else validate.integer(f"max_length_{side}", longest)
    if cu.device.type != "cpu" or torch.compiler.is_compiling() or not route.is_plain(cu, cu, cu):
        return longest
    most = max(values.cumulative(name, cu, x.shape[0] * x.shape[2]), default=0)
    if longest is not None and longest < most:
        raise ValueError(f"max_length_{side} must be at least {most}, got {longest}")
    return longest


def _packed_bounds(mask, query, key, kwargs):
    """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k) of a packed call, else None."""
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    structure = mask.structure if isinstance(mask, LazyMask) else None
    if structure is not None and structure.padding is not None:
        return None
    if cu_q is not None:
        cu_k = cu_q if cu_k is None else cu_k
        longest = [
            _checked_bounds(side, cu, rows, kwargs.get(f"max_length_{side}"))
            for side, cu, rows in (("q", cu_q, query), ("k", cu_k, key))
        ]
        if cu_k.shape != cu_q.shape:
            raise ValueError(
                f"cu_seq_lens_k must have cu_seq_lens_q's {len(cu_q)} entries, got {len(cu_k)}"
            )
        return (
            cu_q.to(torch.int32),
            cu_q.to(torch.int32) if cu_k is cu_q else cu_k.to(torch.int32),
            *longest,
        )
    if structure is not None and structure.segments is not None:
        return mask.cu_seqlens(), mask.cu_seqlens(), None, None
    return None


def _varlen(query, key, value, cu_q, cu_k, longest_q, longest_k, options):
    """Packed sequences: the rows of all of the batch, one after the other."""

    def rows(x):  # [B, H, S, D] -> [B * S, H, D]
        return x.transpose(1, 2).flatten(0, 1)

    out = attention_varlen(
        rows(query), rows(key), rows(value), cu_q, cu_k, longest_q, longest_k, **options
    )
    return out.reshape(query.shape[0], query.shape[2], *out.shape[1:]).contiguous()


def _within_sequences(mask, query, key, cu_seqlens):
    """`mask` that also keeps packed sequences apart (where varlen cannot serve the call)."""
    batch, seqlen = query.shape[0], query.shape[2]
    if key.shape[2] != seqlen:
        raise NotImplementedError(
            "cu_seq_lens_q with position_bias, sinks of each query or a mask needs as many keys as "
            f"queries, got {key.shape[2]} and {seqlen}"
        )
    rows = torch.arange(batch * seqlen, device=query.device)
    ids = torch.searchsorted(cu_seqlens.to(rows), rows, right=True).view(batch, 1, seqlen)
    same = ids[..., :, None] == ids[..., None, :]
    if mask is None:
        return same
    if isinstance(mask, LazyMask):  # its window stays in the call
        return same & mask.dense()
    return mask & same if mask.dtype == torch.bool else mask.masked_fill(~same, -torch.inf)


def _dense(query, key, value, mask, position_bias, row_sinks, options):
    """One dense call -> [B, Sq, Hq, Dv] contiguous."""
    if isinstance(mask, LazyMask):
        structure = mask.structure
        if structure.segments is not None:
            mask = mask.dense()
        else:
            mask = None if structure.padding is None else structure.padding[:, None, None, :]
    bias = position_bias
    if mask is not None and mask.dtype != torch.bool:
        bias = mask if bias is None else bias + mask
        mask = None
    if isinstance(key, CachedRows) and row_sinks is None and not options["dropout_p"]:
        rest = {name: x for name, x in options.items() if name != "dropout_p"}
        out = key.cache.attend(query, causal=False, mask=mask, bias=bias, **rest)
    elif row_sinks is None:
        out = attention(query, key, value, mask=mask, bias=bias, **options)
    else:
        _floating("sinks", row_sinks, query)
        out, lse = attention(query, key, value, mask=mask, bias=bias, return_lse=True, **options)
        if tuple(row_sinks.shape) != (*lse.shape, 1):
            raise ValueError(
                f"sinks must have shape {(*lse.shape, 1)}, got {tuple(row_sinks.shape)}"
            )
        # one more term exp(sink) in each row's sum
        share = torch.sigmoid(lse[..., None] - row_sinks.to(lse.dtype))
        out = (out * share).to(out.dtype)
    return out.transpose(1, 2).contiguous()
