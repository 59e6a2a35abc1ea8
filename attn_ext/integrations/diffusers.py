"""attn_ext as an attention backend of Hugging Face diffusers, and as a processor of its UNets.

    from attn_ext.integrations import diffusers as integration
    integration.register()
    transformer.set_attention_backend("attn_ext")          # Flux, Wan, Qwen-Image, LTX ...
    unet.set_attn_processor(integration.AttnProcessor())   # UNets and VAEs: the old Attention class
    with attn_ext.replace_sdpa(): ...                      # all that call torch's SDPA: SD3 ...

`attention_backend` takes diffusers' layout, query [B, Sq, Hq, D], key and value [B, Sk, Hk, D].
"""

from __future__ import annotations

import importlib

import torch

from attn_ext.core import validate
from attn_ext.functional.dense import attention
from attn_ext.integrations import checks

__all__ = ["AttnAddedKVProcessor", "AttnProcessor", "attention_backend", "register"]


def register(name: str = "attn_ext") -> None:
    """Make `set_attention_backend(name)` and diffusers' `attention_backend(name)` work; a second
    call changes nothing.

    The names of diffusers' backends are an Enum without a public way to add one: the member is made
    here.  ImportError where diffusers (0.35 or newer) is not installed, ValueError for one of its
    own names.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {type(name).__name__} {name!r}")
    try:
        from diffusers.models.attention_dispatch import (
            AttentionBackendName,
            _AttentionBackendRegistry,
            _check_device,
        )
    except ImportError as error:
        raise ImportError(
            f"register needs diffusers 0.35 or newer (pip install diffusers): {error}"
        ) from error
    members = AttentionBackendName._value2member_map_
    if name in members:
        if _AttentionBackendRegistry._backends.get(members[name]) is attention_backend:
            return
        raise ValueError(f"name must not be one of diffusers' own backends, got {name!r}")
    if not name.isidentifier() or name != name.lower():
        raise ValueError(f"name must be a lower-case identifier, got {name!r}")
    member = str.__new__(AttentionBackendName, name)
    member._name_, member._value_ = name.upper(), name
    member._sort_order_ = len(members)
    AttentionBackendName._member_map_[member._name_] = member
    AttentionBackendName._member_names_.append(member._name_)
    members[name] = member
    _AttentionBackendRegistry.register(member, constraints=[_check_device])(attention_backend)


def attention_backend(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    _parallel_config=None,
):
    """Attention with the arguments that diffusers' dispatcher passes by name.

    query [B, Sq, Hq, D], key [B, Sk, Hk, D], value [B, Sk, Hk, Dv] -> [B, Sq, Hq, Dv]; with
    return_lse also lse [B, Sq, Hq] (natural log).  attn_mask: bool (True = attend) or floating
    (added), broadcastable to [B, Hq, Sq, Sk], or [B, Sk].  is_causal aligns top-left, as torch.
    enable_gqa is not needed: Hq may always be a multiple of Hk.
    NotImplementedError with context parallelism; otherwise as `attn_ext.attention`.
    """
    if _parallel_config is not None:
        raise NotImplementedError(
            "_parallel_config (context parallelism) is not supported by attn_ext: use the native "
            "backend"
        )
    checks.heads_last(query, key, value)
    is_causal = validate.switch("is_causal", is_causal)
    return_lse = validate.switch("return_lse", return_lse)
    if attn_mask is not None:
        validate.tensor("attn_mask", attn_mask)
    if attn_mask is not None and tuple(attn_mask.shape) == (query.shape[0], key.shape[1]):
        attn_mask = attn_mask[:, None, None, :]  # diffusers' padding masks
    mask = bias = None
    if attn_mask is not None:
        attn_mask = checks.scores("attn_mask", attn_mask, query.transpose(1, 2), key.shape[1])
        mask, bias = (None, attn_mask) if attn_mask.is_floating_point() else (attn_mask, None)
    result = attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask=mask, bias=bias,
        causal="top_left" if is_causal else False, dropout_p=dropout_p, scale=scale,
        return_lse=return_lse,
    )  # fmt: skip
    if not return_lse:
        return result.transpose(1, 2)
    return result[0].transpose(1, 2), result[1].transpose(1, 2)


class AttnProcessor:
    """The processor of diffusers' `Attention` (UNets, VAEs) that computes with attn_ext.

    It stands for AttnProcessor2_0 and, in layers with added keys and values (`add_k_proj`), for
    AttnAddedKVProcessor2_0: pictures [B, C, H, W] or tokens [B, Sq, C] in, the same shape out.
    encoder_hidden_states [B, Sk, C']; attention_mask as diffusers makes it, added to the logits.

    To diffusers, which asks for the class of a processor (`set_default_attn_processor`, the dtype
    of a VAE), it is an AttnProcessor2_0, and from its first call in a layer with added keys on an
    AttnAddedKVProcessor2_0; `AttnAddedKVProcessor` is one from the start.
    """

    _stands_for = "AttnProcessor2_0"

    @property
    def __class__(self):
        return getattr(
            importlib.import_module("diffusers.models.attention_processor"), self._stands_for
        )

    def __reduce__(self):  # pickle compares the two classes
        return type(self), ()

    def __call__(
        self,
        attn,
        hidden_states,
        encoder_hidden_states=None,
        attention_mask=None,
        temb=None,
    ):
        residual, shape = hidden_states, hidden_states.shape
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        added = attn.added_kv_proj_dim is not None
        if added and not torch.compiler.is_compiling():
            self._stands_for = AttnAddedKVProcessor._stands_for
        if added or len(shape) == 4:  # [B, C, H, W] or [B, C, S] -> [B, S, C]
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attention_mask is not None:
            length = hidden_states.shape[1] if added else context.shape[1]
            batch = hidden_states.shape[0]
            attention_mask = attn.prepare_attention_mask(attention_mask, length, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is None:
            context = hidden_states
        query = self._heads(attn, attn.to_q(hidden_states))
        if added:
            key = self._heads(attn, attn.add_k_proj(context))
            value = self._heads(attn, attn.add_v_proj(context))
            if not attn.only_cross_attention:
                own = self._heads(attn, attn.to_k(hidden_states))
                key = torch.cat([key, own], dim=1)
                own = self._heads(attn, attn.to_v(hidden_states))
                value = torch.cat([value, own], dim=1)
        else:
            key = self._heads(attn, attn.to_k(context))
            value = self._heads(attn, attn.to_v(context))
        if attn.norm_q is not None:
            query = attn.norm_q(query.transpose(1, 2)).transpose(1, 2)
        if attn.norm_k is not None:
            key = attn.norm_k(key.transpose(1, 2)).transpose(1, 2)
        out = attention_backend(query, key, value, attention_mask, scale=float(attn.scale))
        out = attn.to_out[1](attn.to_out[0](out.flatten(2)))
        if added or len(shape) == 4:
            out = out.transpose(-1, -2).reshape(shape)
        if added or attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor

    @staticmethod
    def _heads(attn, x):
        """[B, S, H * D] -> [B, S, H, D]"""
        return x.unflatten(-1, (attn.heads, -1))


class AttnAddedKVProcessor(AttnProcessor):
    """`AttnProcessor` for UNets whose layers have added keys and values."""

    _stands_for = "AttnAddedKVProcessor2_0"
