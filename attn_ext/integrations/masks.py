"""Masks of transformers models that stay descriptions until somebody looks at their elements.

transformers builds one [B, 1, Sq, Sk] bool mask a forward.  `mask_function` recognises what it is
made of (causal, sliding window, key padding, packed sequences) and returns a `LazyMask` that holds
just that, in O(B S) memory; the attention function turns it into kernel arguments.  Whatever else
touches it (a model that slices or adds masks) gets the true tensor from transformers' own
`sdpa_mask`, and what is not recognised is that tensor from the start.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable

import torch
from torch.utils._pytree import tree_map

_DETACH = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


@dataclasses.dataclass(frozen=True)
class Structure:
    """visible(i, j) <=> i + off - left <= j <= i + off + right, off = Sk - Sq, None = unbounded;
    and same segment; and key j is not padding.
    """

    left: int | None = None
    right: int | None = None
    segments: torch.Tensor | None = None  # [B, S] equal numbers = one packed sequence
    padding: torch.Tensor | None = None  # bool [B, Sk], True = a real key


class LazyMask(torch.Tensor):
    """A bool mask [B, 1, Sq, Sk] with a `structure`; any operation on it works on the real mask."""

    @staticmethod
    def __new__(cls, shape, device, structure, build):
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=device)

    def __init__(self, shape, device, structure: Structure, build: Callable[[], torch.Tensor]):
        self.structure = structure
        self.sizes = tuple(shape)  # the shape, also where torch 2.6 compiles and sees no tensor
        self._build = build
        self._dense = None
        self._cu_seqlens = None

    def dense(self) -> torch.Tensor:
        """The mask as transformers builds it, bool [B, 1, Sq, Sk]; built once."""
        if self._dense is None:
            self._dense = self._build()
        return self._dense

    def cu_seqlens(self) -> torch.Tensor:
        """int32 [sequences + 1]: where the packed sequences begin in the B * S flattened rows."""
        if self._cu_seqlens is None:
            segments = self.structure.segments
            new = torch.ones_like(segments, dtype=torch.bool)  # each row of the batch begins one
            new[:, 1:] = segments[:, 1:] != segments[:, :-1]
            starts = new.flatten().nonzero().flatten()
            end = starts.new_tensor([segments.numel()])
            self._cu_seqlens = torch.cat([starts, end]).to(torch.int32)
        return self._cu_seqlens

    def __repr__(self, *, tensor_contents=None):
        return f"LazyMask(shape={tuple(self.shape)}, {self.structure})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in _DETACH:  # reentrant checkpointing detaches what it is given
            mask = args[0]
            return LazyMask(mask.shape, mask.device, mask.structure, mask.dense)

        def real(x):  # contiguous, as it says of itself: torch makes a view of a reshape by that
            return x.dense().contiguous() if isinstance(x, LazyMask) else x

        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


def _cells(function) -> dict:
    """The closed-over variables of a mask function."""
    names = function.__code__.co_freevars
    return dict(zip(names, (c.cell_contents for c in function.__closure__ or ()), strict=True))


def _name(function) -> str:
    return getattr(function, "__qualname__", "").split(".<locals>")[0]


def describe(mask_function) -> Structure | None:
    """What transformers' `mask_function` (of positions) means, or None if it is not one we know.

    Only functions of transformers.masking_utils itself are recognised, by name and by what they
    close over, so that a user's function of the same name is never mistaken for one.  These names
    are private to transformers: one that a later version changes is not recognised any more, and
    the mask is then the tensor that transformers builds.
    """
    if getattr(mask_function, "__module__", None) != "transformers.masking_utils":
        return None
    name, cells = _name(mask_function), _cells(mask_function)
    if name == "causal_mask_function":
        return Structure(right=0)
    if name == "bidirectional_mask_function":
        return Structure()
    window = cells.get("sliding_window")
    if name == "sliding_window_overlay" and window is not None:  # j > i - sliding_window
        return Structure(left=window - 1)
    if name == "sliding_window_bidirectional_overlay" and window is not None:
        return Structure(left=window, right=window)  # |i - j| <= sliding_window
    segments = cells.get("packed_sequence_mask")
    if name == "packed_sequence_mask_function" and segments is not None:
        return Structure(segments=segments)
    if name == "remap_positions_for_packed_sequence":
        # within a packed sequence positions rise by one, so distances are those of the rows
        return describe(cells.get("mask_function"))
    if name == "and_masks" and "mask_functions" in cells:
        parts = [describe(part) for part in cells["mask_functions"]]
        return _intersection(parts)
    return None  # or closes over other names than in the versions that we know


def _intersection(parts: list) -> Structure | None:
    if any(part is None for part in parts):
        return None
    left = [p.left for p in parts if p.left is not None]
    right = [p.right for p in parts if p.right is not None]
    segments = [p.segments for p in parts if p.segments is not None]
    if len(segments) > 1:
        return None
    return Structure(
        min(left) if left else None,
        min(right) if right else None,
        segments[0] if segments else None,
    )


def _structure(
    mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask
) -> Structure | None:
    """The structure of a whole mask, or None where it is not one of ours."""
    found = describe(mask_function)
    sizes = (batch_size, q_length, kv_length, q_offset, kv_offset)
    # a static cache counts in tensors, and its mask may enter a compiled graph
    if found is None or not all(type(size) is int for size in sizes):
        return None
    bounded = found.left is not None or found.right is not None
    if bounded and q_offset - kv_offset != kv_length - q_length:
        return None  # keys beyond the last query, as in a cache with free space
    if found.segments is not None and (
        q_length != kv_length or tuple(found.segments.shape) != (batch_size, q_length)
    ):
        return None
    if attention_mask is None:
        return found
    if found.segments is not None or attention_mask.dim() != 2:
        return None
    padding = attention_mask[:, kv_offset : kv_offset + kv_length]
    if tuple(padding.shape) != (batch_size, kv_length):
        return None
    padding = padding.to(torch.bool)
    return found if bool(padding.all()) else dataclasses.replace(found, padding=padding)


def _computes_attention_itself(config) -> bool:
    """Whether the layers of a configuration never ask for an attention function (Bloom, Mpt,
    MPNet ...).  Such code adds its mask to the logits: a bool one would be wrong without a word.
    """
    if config is None:
        return False
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return _never_asks(type(text))


def _is_tracing(tensor) -> bool:
    try:
        from transformers.utils.import_utils import is_tracing
    except ImportError:  # transformers 4
        return torch.jit.is_tracing()
    return is_tracing(tensor)


_warned: set = set()  # configurations whose models compute attention themselves


def _never_asks(config_class: type) -> bool:
    name = config_class.__module__.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(name)
    if ".modeling_" not in name or modeling is None or hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        return False
    if config_class not in _warned and not torch.compiler.is_compiling():
        _warned.add(config_class)
        warnings.warn(
            f"{config_class.__name__}: this model computes attention in its own code, so "
            "attn_implementation='attn_ext' changes nothing for it; where it supports 'sdpa', use "
            "that together with attn_ext.replace_sdpa()",
            stacklevel=5,
        )
    return True


def _positions(cache_position: torch.Tensor, tracing: bool) -> tuple:
    """(q_length, q_offset) of the positions that older transformers (4.57, 5.0) give instead;
    q_offset is None where they do not rise by one, or cannot be read.
    """
    length = cache_position.shape[0]
    if tracing or length == 0:
        return length, None
    first = int(cache_position[0])
    rows = torch.arange(first, first + length, device=cache_position.device)
    return length, first if torch.equal(cache_position, rows.to(cache_position.dtype)) else None


def mask_function(
    batch_size,
    q_length=None,
    kv_length=None,
    q_offset=0,
    kv_offset=0,
    mask_function=None,
    attention_mask=None,
    allow_is_causal_skip=True,
    allow_is_bidirectional_skip=False,
    **kwargs,
):
    """transformers' mask interface: `sdpa_mask`, as a LazyMask where the structure is known.

    Returns None where transformers lets a mask be left out and the attention function's causal rule
    gives the same result, a LazyMask or a bool [B, 1, Sq, Sk] (True = attend) otherwise.
    """
    from transformers import masking_utils

    mask_function = mask_function or masking_utils.causal_mask_function
    arguments = dict(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    tracing = torch.compiler.is_compiling() or _is_tracing(attention_mask)
    cache_position = kwargs.get("cache_position")
    if cache_position is None:
        arguments |= dict(q_length=q_length, q_offset=q_offset)
    else:
        kwargs.setdefault("device", cache_position.device)
        q_length, q_offset = _positions(cache_position, tracing)
    if _computes_attention_itself(kwargs.get("config")):
        return masking_utils.eager_mask(
            allow_is_bidirectional_skip=allow_is_bidirectional_skip, **arguments
        )

    def build(causal_skip=False, bidirectional_skip=False):
        return masking_utils.sdpa_mask(
            allow_is_causal_skip=causal_skip,
            allow_is_bidirectional_skip=bidirectional_skip,
            **arguments,
        )

    structure = None
    if not tracing and not kwargs.get("use_vmap"):
        structure = _structure(
            mask_function, batch_size, q_length, kv_length, q_offset, kv_offset, attention_mask
        )
    if structure is None:
        return build(allow_is_causal_skip, allow_is_bidirectional_skip)
    if structure.padding is None and structure.segments is None:
        window = structure.left is not None and structure.left < kv_length - 1
        if not window and structure.right is None and allow_is_bidirectional_skip:
            return None
        aligned = q_length in (1, kv_length)
        if not window and structure.right == 0 and allow_is_causal_skip and aligned:
            return None
    device = torch.device(kwargs.get("device", "cpu"))
    return LazyMask((batch_size, 1, q_length, kv_length), device, structure, build)
