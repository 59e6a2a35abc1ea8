"""Exact attention in O(N) memory for CPUs and GPUs, forward and backward, beside any torch >= 2.6.

import attn_ext
out = attn_ext.attention(q, k, v, causal=True)   # q [B, Hq, S, D], k and v [B, Hk, S, D]
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

# before what imports torch: it says what to do where torch is missing or too old
import attn_ext.core.requires as _requires  # noqa: F401

# isort: split
from attn_ext import inspect, nn, testing  # noqa: F401

# at once, not at the first call: it prepares for fork()
from attn_ext.backends import cpu as _cpu  # noqa: F401
from attn_ext.core import reference  # noqa: F401
from attn_ext.core.pages import CacheFullError
from attn_ext.core.version import __version__  # noqa: F401
from attn_ext.functional.additive import additive_attention, additive_attention_varlen
from attn_ext.functional.cache import KVCache
from attn_ext.functional.common import RowStats
from attn_ext.functional.decode import attention_decode
from attn_ext.functional.dense import attention
from attn_ext.functional.explain import explain
from attn_ext.functional.sdpa import scaled_dot_product_attention
from attn_ext.functional.varlen import attention_varlen
from attn_ext.integrations import torch_flash as _torch_flash
from attn_ext.integrations.sdpa import replace_sdpa
from attn_ext.measure.recorder import profile
from attn_ext.ops import flops as _flops  # noqa: F401
from attn_ext.ops import route as _route

if _TYPE_CHECKING:

    def backends() -> dict[str, str]:
        """Each backend's name, with "" where it runs on this machine, else reason and remedy."""

else:
    from attn_ext import backends  # a module that can be called, which no type checker knows

_torch_flash.offer()


def _of_dtensors(call):
    """The results of a call of DTensors, or None where their sharding needs nothing of ours."""
    from attn_ext.distributed import sharded

    return sharded.run(call)


_route.of_dtensors = _of_dtensors

__all__ = [
    "CacheFullError", "KVCache", "RowStats", "additive_attention", "additive_attention_varlen",
    "attention", "attention_decode", "attention_varlen", "backends", "explain", "profile",
    "replace_sdpa", "scaled_dot_product_attention",
]  # fmt: skip


def __getattr__(name: str):
    """`attn_ext.distributed`, loaded at its first use: it brings torch.distributed with it."""
    if name == "distributed":
        import importlib

        return importlib.import_module("attn_ext.distributed")
    raise AttributeError(f"module 'attn_ext' has no attribute {name!r}")
