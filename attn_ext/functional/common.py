"""What the functions of every kind of call share: autocast, dropout's seed, and how results are
given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from attn_ext.core import validate
from attn_ext.core.schema import Call
from attn_ext.ops import route

if TYPE_CHECKING:
    # what type checkers see of the keywords of the public functions
    class ScoreOptions(TypedDict, total=False):
        """Of every function."""

        window: Sequence[int | None] | None
        mask: torch.Tensor | None
        bias: torch.Tensor | None
        backend: str


LOWERED = (torch.float16, torch.bfloat16, torch.float32)  # what autocast makes its own dtype
PREFER = {"fastest": "fastest", "attn_ext": "auto"}  # the backend that each means
MAX_SEED = 2**63 - 1
NO_LSE = "return_lse must be False with normalizer='sigmoid', which has no LSE, got True"


def preferred(prefer: str) -> str:
    """The backend of an option `prefer`: "fastest" takes torch's own attention where `attn-ext
    tune` measured it to be faster; without a table, and with "attn_ext", it is attn_ext's.

    TypeError or ValueError for another one.
    """
    if not isinstance(prefer, str):
        raise TypeError(f"prefer must be a str, got {type(prefer).__name__} {prefer!r}")
    if prefer not in PREFER:
        raise ValueError(f"prefer must be {' or '.join(map(repr, PREFER))}, got {prefer!r}")
    return PREFER[prefer]


class RowStats(NamedTuple):
    """Statistics of each query's row, [B, Hq, Sq] ([Hq, total_q] for varlen), from the same pass;
    not differentiable.
    """

    lse: torch.Tensor  # natural log of sum exp(logits), the sink included; -inf for an empty row
    max_logit: torch.Tensor  # the largest visible logit, without the sink; -inf for an empty row
    entropy: torch.Tensor  # -sum P ln P over keys, in nats; 0 for an empty row


def autocasting(device: str) -> bool:
    """Whether autocast is on for this kind of device."""
    return device != "meta" and torch.is_autocast_enabled(device)  # torch raises for meta


def autocast(*tensors):
    """The tensors in autocast's dtype where autocast is on (as torch's SDPA does it; float64
    stays).
    """
    device = tensors[0].device.type
    if not autocasting(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def stored(name: str, new: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    """New rows of a cache: where autocast is on in the cache's dtype, which they are to be kept in,
    else as they are."""
    validate.tensor(name, new)
    if autocasting(cache.device.type) and new.dtype in LOWERED and cache.dtype in LOWERED:
        return new.to(cache.dtype)
    return new


def autocast_of_cache(q, k_cache, v_cache) -> torch.dtype | None:
    """Autocast's dtype where it is on and reaches a call with a cache; None elsewhere, for caches
    of two dtypes, too, which are the caller's mistake."""
    if not autocasting(q.device.type) or k_cache.dtype != v_cache.dtype:
        return None
    reached = q.dtype in LOWERED and k_cache.dtype in LOWERED
    return torch.get_autocast_dtype(q.device.type) if reached else None


def asked_of_cache(q, bias, k_cache, v_cache) -> tuple:
    """q and bias of a call with a cache: rounded to autocast's dtype where that is on, and q then
    in the cache's dtype, in which the call is computed: a copy of the cache would be made at every
    token."""
    dtype = autocast_of_cache(q, k_cache, v_cache)
    if dtype is None:
        return q, bias
    if bias is not None:
        validate.tensor("bias", bias)
        bias = bias.to(dtype) if bias.dtype in LOWERED else bias
    return q.to(dtype).to(k_cache.dtype), bias


def in_dtype(found, dtype: torch.dtype):
    """out, or (out, lse), with out in dtype."""
    return (found[0].to(dtype), found[1]) if isinstance(found, tuple) else found.to(dtype)


def autocast_off(q: torch.Tensor):
    """A context without autocast on q's device."""
    if not autocasting(q.device.type):
        return contextlib.nullcontext()
    return torch.autocast(q.device.type, enabled=False)


def draw_rng_state(q: torch.Tensor) -> torch.Tensor:
    """int64 [2], seed and offset of a dropout mask, from the default generator of q's device."""
    return torch.randint(0, MAX_SEED, (2,), dtype=torch.int64, device=q.device)


def scores(q, mask, bias, batch, heads, seqlen_q, seqlen_k) -> tuple:
    """mask and bias, checked, as four-dimensional tensors that broadcast to these sizes."""
    sizes = (batch, heads, seqlen_q, seqlen_k)
    if mask is not None:
        mask = validate.scores("mask", mask, True, q.device, *sizes)
    if bias is not None:
        bias = validate.scores("bias", bias, False, q.device, *sizes)
    return mask, bias


def sides(q, mask, bias, alibi_slopes, sink, batch, heads, seqlen_q, seqlen_k) -> tuple:
    """mask, bias, alibi_slopes and sink, checked, as a `Call` has them."""
    mask, bias = scores(q, mask, bias, batch, heads, seqlen_q, seqlen_k)
    if alibi_slopes is not None:
        alibi_slopes = validate.alibi(alibi_slopes, q.device, batch, heads)
    if sink is not None:
        sink = validate.sink_logits(sink, q.device, q.dtype, heads)
    return mask, bias, alibi_slopes, sink


def result(call: Call, return_lse: bool, return_stats: bool):
    """Run the call and shape what the user asked for."""
    validate.boolean("return_lse", return_lse)
    validate.boolean("return_stats", return_stats)
    out, lse, max_logit, entropy = route.run(call)
    if return_stats:
        stats = RowStats(lse.detach(), max_logit, entropy)
        return (out, lse, stats) if return_lse else (out, stats)
    return (out, lse) if return_lse else out
