"""transformers' models whose sequences lie on several ranks: `register(mesh=...)`.

Each rank's model is given its shard of the tokens and their position_ids, from which the layout is
known.  transformers builds masks as if the shard were the whole sequence, so the mask function here
gives a description of what the mask means, and what cannot be described is an error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from attn_ext.core import validate
from attn_ext.integrations.masks import LazyMask, Structure, describe

if TYPE_CHECKING:
    from attn_ext.distributed import Layout

WAYS = "contiguous or zigzag shards of equal length"
NOT_SERVED = {
    "cache": "a cache of keys: use attn_ext.distributed.context_decode",
    "indices": "keys that a sparse layer chose",
    "block_indices": "block-sparse attention",
    "sinks": "sinks of each query",
    "cu_seq_lens_q": "cu_seq_lens: give register(layout=Layout.packed(...))",
}


@dataclasses.dataclass(frozen=True)
class Context:
    """The functions that transformers calls, for one mesh.

    layout: a Layout, a function that gives that of the step, or None: position_ids say it.
    """

    mesh: object
    method: str
    layout: Layout | Callable[[], Layout] | None = None

    def check(self) -> None:
        """TypeError or ValueError for a mesh, method or layout that cannot be."""
        from attn_ext.distributed import Layout, attention

        attention.groups_of(self.mesh, self.method)
        fits = self.layout is None or isinstance(self.layout, Layout) or callable(self.layout)
        if not fits:
            kind = type(self.layout).__name__
            raise TypeError(f"layout must be a Layout or a function that gives one, got {kind}")

    def mask_function(
        self, batch_size, q_length=None, kv_length=None, q_offset=0, kv_offset=0,
        mask_function=None, attention_mask=None, **kwargs,
    ):  # fmt: skip
        """transformers' mask interface: what the mask means, without elements."""
        from transformers import masking_utils

        try:
            found = describe(mask_function or masking_utils.causal_mask_function)
            if found is None or kwargs.get("use_vmap"):
                raise ValueError(
                    "attention_mask must be causal, bidirectional, a sliding window or that of "
                    "packed documents with register(mesh=...), got another mask function: give "
                    "the model a mask [B or 1, 1 or H, S_local, S]"
                )
            if kv_length != q_length or q_offset != 0 or kv_offset != 0:
                raise ValueError(
                    f"keys must be as many as queries with register(mesh=...), got {kv_length} and "
                    f"{q_length}: a cache is not sharded"
                )
            if attention_mask is not None and not bool(attention_mask.all()):
                raise ValueError(
                    "attention_mask must not hide tokens with register(mesh=...), got padding: "
                    "pack the documents and give register(layout=Layout.packed(...))"
                )
        except ValueError:
            self.refuse()
            raise
        # documents are those of the layout: the positions of a shard look packed where they jump
        meant = Structure(found.left, found.right)
        device = torch.device(kwargs.get("device", "cpu"))
        return LazyMask((batch_size, 1, q_length, kv_length), device, meant, _no_elements)

    def attention_forward(
        self, module, query, key, value, attention_mask, scaling=None, dropout=0.0,
        is_causal=None, position_bias=None, sliding_window=None, softcap=None, s_aux=None,
        position_ids=None, **kwargs,
    ):  # fmt: skip
        """`attn_ext.integrations.transformers.attention_forward` of a shard: query [B, Hq, S_local,
        D] -> ([B, S_local, Hq, Dv], None).

        position_ids [B or 1, S_local] must be given, also to the model.  attention_mask: what
        `mask_function` gave, a mask or bias [B or 1, 1 or Hq, S_local, S], or None: causal where
        the module is.  ValueError, on every rank, for what cannot be said of a shard.
        """
        from attn_ext.distributed import context_attention

        try:
            _refuse(module, kwargs)
            layout = self._layout_of(position_ids, query)
            window, mask, bias = _mask_of(
                module, attention_mask, is_causal, sliding_window, query, layout.seqlen
            )
            bias = _sum(bias, position_bias, query, layout.seqlen)
        except (ValueError, TypeError, NotImplementedError):
            self.refuse()
            raise
        left, right = window
        out = context_attention(
            query, key, value, layout=layout, mesh=self.mesh, method=self.method,
            causal=right == 0, window=(left, None if right == 0 else right), mask=mask, bias=bias,
            softcap=0.0 if softcap is None else softcap, scale=scaling,
            sink=None if s_aux is None else s_aux.flatten(),
            dropout_p=dropout if getattr(module, "training", True) else 0.0,
        )  # fmt: skip
        return out.transpose(1, 2).contiguous(), None

    def refuse(self) -> None:
        """Tells the other ranks that this one's call is wrong."""
        from attn_ext.distributed import attention

        attention.refuse(self.mesh, self.method)

    def _layout_of(self, position_ids, query) -> Layout:
        if position_ids is None:
            raise ValueError(
                "position_ids must be given with register(mesh=...), got None: "
                "layout.position_ids(rank)[None]"
            )
        validate.tensor("position_ids", position_ids)
        n = query.shape[2]
        if position_ids.dim() != 2 or position_ids.shape[1] != n:
            shape = tuple(position_ids.shape)
            raise ValueError(f"position_ids must have shape [B or 1, {n}], got {shape}")
        if not bool((position_ids == position_ids[:1]).all()):
            raise ValueError("position_ids must be the same for all rows of the batch")
        rank, parts = _place(self.mesh)
        known = self.layout() if callable(self.layout) else self.layout
        layouts = _usual_layouts(n * parts, parts) if known is None else [known]
        for layout in layouts:
            own = layout.position_ids(rank, position_ids.device)
            if torch.equal(position_ids[0].to(own.dtype), own):
                return layout
        got = position_ids[0].tolist()
        got = got if len(got) < 9 else [*got[:4], "...", *got[-4:]]
        want = f"those of {WAYS}, or of register(layout=...)" if known is None else "the layout's"
        raise ValueError(f"position_ids must be {want}, got {got} on rank {rank} of {parts}")


def _usual_layouts(seqlen: int, parts: int) -> list:
    from attn_ext.distributed import Layout

    return [Layout.zigzag(seqlen, parts), Layout.contiguous(seqlen, parts)]


def _place(mesh) -> tuple[int, int]:
    """(rank, ranks) of a mesh, or of a process group."""
    import torch.distributed as dist

    if isinstance(mesh, dist.ProcessGroup):
        return dist.get_rank(mesh), dist.get_world_size(mesh)
    sizes, at = mesh.mesh.shape, mesh.get_coordinate()
    rank = 0
    for size, place in zip(sizes, at, strict=True):
        rank = rank * size + place
    return rank, mesh.size()


def _refuse(module, kwargs) -> None:
    """NotImplementedError or ValueError for what would be lost without a word."""
    for name, what in NOT_SERVED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"{name} is not supported with register(mesh=...): {what}")
    for hook in getattr(module, "_forward_pre_hooks", {}).values():
        if getattr(hook, "__module__", "") == "accelerate.big_modeling":
            raise ValueError(
                "accelerate's own context parallelism must be off (cp_size=1) with "
                "register(mesh=...), since it takes masks away before attention sees them"
            )


def _no_elements():
    raise ValueError(
        "this model looks at the elements of its mask, which register(mesh=...) cannot give: a "
        "shard's mask is one of the whole sequence"
    )


def _mask_of(module, attention_mask, is_causal, sliding_window, query, seqlen: int) -> tuple:
    """((left, right), mask, bias) of a call."""
    if isinstance(attention_mask, LazyMask):
        return (attention_mask.structure.left, attention_mask.structure.right), None, None
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = validate.switch("is_causal", causal)
        left = None
        if sliding_window is not None:
            left = validate.integer("sliding_window", sliding_window, 1) - 1
        return (left, 0 if causal else left), None, None
    _rows_and_columns("attention_mask", attention_mask, query, seqlen)
    if attention_mask.dtype == torch.bool:
        return (None, None), attention_mask, None
    return (None, None), None, attention_mask


def _rows_and_columns(name: str, x, query, seqlen: int) -> None:
    validate.tensor(name, x)
    if x.dim() != 4 or x.shape[2] not in (1, query.shape[2]) or x.shape[3] not in (1, seqlen):
        raise ValueError(
            f"{name} must have this rank's {query.shape[2]} rows and all {seqlen} columns with "
            f"register(mesh=...), got shape {tuple(x.shape)}"
        )


def _sum(bias, position_bias, query, seqlen: int):
    if position_bias is None:
        return bias
    _rows_and_columns("position_bias", position_bias, query, seqlen)
    return position_bias if bias is None else bias + position_bias
