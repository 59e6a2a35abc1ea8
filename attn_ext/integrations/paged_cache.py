"""A cache of transformers whose layers are `attn_ext.KVCache`s.

A layer of a model hands what `update` returns to its attention function.  That is a `CachedRows`
here, a tensor of the right shape without memory: `attention_forward` attends to the pages, and
whatever else touches it gets a gathered copy, so that other attention functions are right, too.
"""

from __future__ import annotations

import functools

import torch
from torch.utils._pytree import tree_map

from attn_ext.core import validate
from attn_ext.functional.cache import KVCache

LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


class CachedRows(torch.Tensor):
    """The keys or values [B, Hk, S, D] of a KVCache; any operation on it works on a copy."""

    @staticmethod
    def __new__(cls, cache: KVCache, is_value: bool, length: int):
        pages = cache.v_pages if is_value else cache.k_pages
        shape = (cache.batch, pages.shape[1], length, pages.shape[3])
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=pages.dtype, device=pages.device
        )

    def __init__(self, cache: KVCache, is_value: bool, length: int):
        self.cache, self.is_value, self.length = cache, is_value, length

    def dense(self) -> torch.Tensor:
        """A copy that has memory, contiguous as this tensor says of itself: torch makes a view of
        a reshape by that."""
        return self.cache.gathered()[self.is_value][:, :, : self.length].contiguous()

    def __repr__(self, *, tensor_contents=None):
        return f"CachedRows(shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def real(x):
            return x.dense() if isinstance(x, CachedRows) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


def paged_cache(config, *, page_size: int = 64, max_length: int | None = None):
    """A cache for `model.generate(..., past_key_values=paged_cache(model.config))`.

    Beams share the pages of what they have in common, and nothing is copied when a token comes.
    config: the model's, from which the kinds of its layers are told.  max_length: positions a
    sequence to take memory for at first; without it, twice the prompt.  It grows by itself.
    ImportError where transformers is not installed; NotImplementedError for models whose layers
    keep a state of another kind (Mamba, linear attention).
    """
    page_size = validate.integer("page_size", page_size, 1)
    if max_length is not None:
        max_length = validate.integer("max_length", max_length, 1)
    try:
        from transformers.cache_utils import Cache
    except ImportError as error:
        raise ImportError(
            f"paged_cache needs transformers 5 or newer (pip install transformers): {error}"
        ) from error
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ()) - set(LAYERS)
    if kinds:
        raise NotImplementedError(
            f"paged_cache serves layers of the kinds {', '.join(LAYERS)}, got "
            f"{', '.join(sorted(map(str, kinds)))}: use transformers' DynamicCache"
        )
    layer = functools.partial(_layer_class(), page_size=page_size, max_length=max_length)
    return Cache(layer_class_to_replicate=layer)


@functools.cache
def _layer_class() -> type:
    """The class of a layer, made when transformers is there."""
    from transformers.cache_utils import CacheLayerMixin

    class PagedLayer(CacheLayerMixin):
        """Keys and values of one layer; all sequences have the same length, padding included."""

        is_sliding, is_compileable, is_croppable = False, False, True

        def __init__(self, page_size: int, max_length: int | None):
            super().__init__()
            self.page_size, self.max_length = page_size, max_length
            self.cache: KVCache | None = None
            self.length = 0

        def lazy_initialization(self, key_states, value_states) -> None:
            batch, heads, seqlen, head_dim = key_states.shape
            self.cache = KVCache(
                batch, heads, head_dim, head_dim_v=value_states.shape[-1],
                max_length=self.max_length or max(2 * seqlen, self.page_size),
                page_size=self.page_size, dtype=key_states.dtype, device=key_states.device,
            )  # fmt: skip
            self.is_initialized = True

        def update(self, key_states, value_states, *args, **kwargs):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            cache, first = self.cache, self.length == 0
            length = self.length + key_states.shape[2]
            if length > cache.max_length:
                width = -(-2 * length // cache.page_size)
                cache.resize(max_length=width * cache.page_size, pages=cache.batch * width)
            cache.append(key_states, value_states)
            self.length = length
            if first:
                return key_states, value_states
            return CachedRows(cache, False, length), CachedRows(cache, True, length)

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return self.length + int(query_length), 0

        def get_seq_length(self) -> int:
            return self.length

        def get_max_length(self) -> int:
            return -1

        @property
        def batch_size(self) -> int:
            return -1 if self.cache is None else self.cache.batch

        def reset(self) -> None:
            self.cache, self.length, self.is_initialized = None, 0, False

        def crop(self, tokens_to_remove: int) -> None:
            if tokens_to_remove > 0:
                raise ValueError(
                    "tokens_to_remove must be negative (-n removes the last n), got "
                    f"{tokens_to_remove}"
                )
            if self.is_initialized and tokens_to_remove:
                self.length = max(0, self.length + tokens_to_remove)
                self.cache.truncate([self.length] * self.cache.batch)

        def reorder_cache(self, beam_idx) -> None:
            self.batch_select_indices(beam_idx)

        def batch_select_indices(self, indices) -> None:
            if self.is_initialized:
                self._room(len(indices))
                self.cache.reorder(indices)

        def batch_repeat_interleave(self, repeats: int) -> None:
            if self.is_initialized:
                self._room(repeats * self.cache.batch)
                self.cache.reorder([b for b in range(self.cache.batch) for _ in range(repeats)])

        def _room(self, batch: int) -> None:
            """Pages for each of so many sequences to be full."""
            width = self.cache.max_length // self.cache.page_size
            if batch > self.cache.batch:
                self.cache.resize(pages=max(batch * width, len(self.cache.k_pages)))

        def offload(self) -> None:
            raise NotImplementedError("a paged cache stays on its device: offloading is not served")

        prefetch = offload

    return PagedLayer
