"""attention_decode: a few new queries against a contiguous or paged KV cache, optionally appending
new keys and values.

q [B, Hq, Sq, D] against k_cache [B, Hk, Smax, D], or [pages, Hk, page_size, D] with block_table [B,
max_pages] (the paged layout of vLLM, arXiv 2309.06180).  Not differentiable.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, overload

import torch

from attn_ext.core import mistakes, validate, values
from attn_ext.core.schema import BOTTOM_RIGHT, Call
from attn_ext.functional.common import (
    asked_of_cache,
    autocast_of_cache,
    in_dtype,
    result,
    sides,
    stored,
)
from attn_ext.ops import execute, fast, route

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

    from attn_ext.functional.dense import DotOptions

    class DecodeOptions(DotOptions, total=False):
        """The keywords of `attention_decode`."""

        k_new: Tensor | None
        v_new: Tensor | None
        block_table: Tensor | None
        causal: bool
        num_splits: int


def refuse_grad(caller: str, **tensors) -> None:
    """NotImplementedError where one of the tensors requires a gradient that would be recorded."""
    if torch.is_grad_enabled():
        for name, value in tensors.items():
            if value is not None and value.requires_grad:
                raise NotImplementedError(
                    f"{caller} is not differentiable, but {name} requires a gradient: use "
                    "attn_ext.attention_varlen to train, or torch.no_grad() to decode"
                )


def _append(k_cache, v_cache, k_new, v_new, starts, block_table) -> None:
    """Write k_new, v_new [B, Hk, Snew, D] at positions starts[b] ... in place."""
    batch, _, count, _ = k_new.shape
    positions = starts.long()[:, None] + torch.arange(count, device=starts.device)  # [B, Snew]
    if block_table is None:
        rows = torch.arange(batch, device=starts.device)[:, None].expand(batch, count)
        slots = positions
    else:
        page_size = k_cache.shape[2]
        rows = block_table.long().gather(1, positions // page_size)
        slots = positions % page_size
    k_cache[rows, :, slots] = k_new.transpose(1, 2)
    v_cache[rows, :, slots] = v_new.transpose(1, 2)


def _check_new(q, k_cache, v_cache, cache_seqlens, k_new, v_new) -> int:
    """Check k_new and v_new; return Snew (0 without them)."""
    if k_new is None and v_new is None:
        return 0
    if k_new is None or v_new is None:
        raise ValueError(
            f"{'v_new' if k_new is None else 'k_new'} needs the other of k_new and v_new, got None"
        )
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k_new and v_new, got None")
    validate.new_rows("k_new", k_new, k_cache, q, "k_cache")
    validate.new_rows("v_new", v_new, v_cache, q, "v_cache")
    if k_new.shape[2] != v_new.shape[2]:
        raise ValueError(f"v_new must have k_new's {k_new.shape[2]} rows, got {v_new.shape[2]}")
    return k_new.shape[2]


def _check_shapes(q, k_cache, v_cache, cache_seqlens, block_table) -> None:
    try:
        validate.decode_shapes(q, k_cache, v_cache, cache_seqlens, block_table)
    except ValueError as error:
        raise mistakes.paged(error, q, k_cache) from None


def decode_call(
    q, k_cache, v_cache, cache_seqlens=None, *, k_new=None, v_new=None, block_table=None,
    causal=True,
    window=(None, None), mask=None, bias=None, softcap=0.0, alibi_slopes=None, sink=None,
    scale=None,
    num_splits=0, need_stats=False, backend="auto", append=True,
) -> Call:  # fmt: skip
    """The checked, canonical call; appends k_new and v_new to the caches on the way."""
    for name, value in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        validate.tensor(name, value)
    q, bias = asked_of_cache(q, bias, k_cache, v_cache)
    if k_new is not None and v_new is not None:
        k_new, v_new = stored("k_new", k_new, k_cache), stored("v_new", v_new, v_cache)
    validate.boolean(
        "causal", causal
    )  # always aligned bottom-right, so there is nothing else to say
    left, right = validate.window_pair(window)
    softcap, _, scale = validate.scalars(softcap, 0.0, scale)
    _, window_left, window_right = validate.options(
        "bottom_right" if causal else False, left, right, softcap, 0.0, scale, False, backend
    )
    # more than there are keys; the kernels take an int64
    num_splits = min(validate.integer("num_splits", num_splits), 1 << 30)
    _check_shapes(q, k_cache, v_cache, cache_seqlens, block_table)
    added = _check_new(q, k_cache, v_cache, cache_seqlens, k_new, v_new)
    batch, heads, seqlen_q, _ = q.shape
    capacity = k_cache.shape[2] if block_table is None else block_table.shape[1] * k_cache.shape[2]
    mask, bias, alibi_slopes, sink = sides(
        q, mask, bias, alibi_slopes, sink, batch, heads, seqlen_q, capacity
    )
    refuse_grad(
        "attention_decode", q=q, k_cache=k_cache, v_cache=v_cache, k_new=k_new, v_new=v_new,
        bias=bias, sink=sink,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    if added and not compiling and q.device.type == "cpu" and route.is_plain(q, k_cache, v_cache):
        lengths = values.lengths("cache_seqlens", cache_seqlens, capacity, added)
        if block_table is not None:
            values.pages(
                block_table, [n + added for n in lengths], k_cache.shape[2], k_cache.shape[0]
            )
    starts, cache_seqlens = cache_seqlens, cache_seqlens + added if added else cache_seqlens
    call = Call(
        q=q, k=k_cache, v=v_cache, mask=mask, bias=bias, alibi_slopes=alibi_slopes, sink=sink,
        seqlens_k=None if cache_seqlens is None else cache_seqlens.contiguous(),
        block_table=None if block_table is None else block_table.contiguous(),
        max_seqlen_q=seqlen_q, max_seqlen_k=capacity, scale=scale, softcap=softcap,
        align=BOTTOM_RIGHT, window_left=window_left, window_right=window_right,
        need_stats=need_stats, num_splits=num_splits, backend=backend,
    )  # fmt: skip
    if added and append:
        if not compiling:  # nothing is written for a call that none serves
            execute.backend_of(call)
        _append(k_cache, v_cache, k_new, v_new, starts, block_table)
    return call


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    return_lse: Literal[False] = False,
    **options: Unpack[DecodeOptions],
) -> Tensor: ...


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    return_lse: Literal[True],
    **options: Unpack[DecodeOptions],
) -> tuple[Tensor, Tensor]: ...


@overload
def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    return_lse: bool,
    **options: Unpack[DecodeOptions],
) -> Any: ...


def attention_decode(
    q, k_cache, v_cache, cache_seqlens=None, *, k_new=None, v_new=None, block_table=None,
    causal=True,
    window=(None, None), mask=None, bias=None, softcap=0.0, alibi_slopes=None, sink=None,
    scale=None,
    return_lse=False, num_splits=0, backend="auto",
):  # fmt: skip
    """Attention of a few new queries to a KV cache, contiguous or paged.  Not differentiable.

    q [B, Hq, Sq, D].  Contiguous: k_cache [B, Hk, Smax, D], v_cache [B, Hk, Smax, Dv].  Paged:
    k_cache [pages, Hk, page_size, D], v_cache alike, block_table int32 [B, max_pages]; any page
    size.
    cache_seqlens int32 [B]: valid positions of each sequence, all Smax if None.
    k_new [B, Hk, Snew, D], v_new [B, Hk, Snew, Dv]: written into the caches in place at
    cache_seqlens[b] before attending; the length attended to is then cache_seqlens[b] + Snew
    (cache_seqlens itself is not changed).
    Returns out [B, Hq, Sq, Dv]; with return_lse also lse [B, Hq, Sq].

    causal is aligned bottom-right: the last query is the last position.  mask and bias broadcast to
    [B, Hq, Sq, Smax] (max_pages * page_size when paged).  num_splits: how many parts of
    the keys are worked on at a time, 0 lets the backend choose.  The GPU kernels take at most 128
    and one a tile of keys, the CPU kernel for few queries one per 64 keys; other CPU calls do not
    split.  It changes rounding and time, never the meaning.  Other arguments and errors: as
    `attention`.  Under autocast q and bias are rounded to its dtype, which is that of the result;
    the caches keep theirs, in which new rows are stored and the call is computed.

    NotImplementedError where a gradient is required: use `attention_varlen`.  On CPU a length or
    page out of range is a ValueError; on GPU these values are not read back (it would cost a device
    sync), they are the caller's promise.
    """
    validate.boolean("return_lse", return_lse)  # before anything is written into the caches
    tensors = (
        q, k_cache, v_cache, mask, bias, alibi_slopes, sink, cache_seqlens, block_table, k_new,
        v_new,
    )  # fmt: skip
    key, found = fast.decode_attempt(
        tensors, causal, window, softcap, scale, num_splits, backend, return_lse
    )
    if found is not None:
        return found if return_lse else found[0]
    call = decode_call(
        q, k_cache, v_cache, cache_seqlens, k_new=k_new, v_new=v_new, block_table=block_table,
        causal=causal,
        window=window, mask=mask, bias=bias, softcap=softcap, alibi_slopes=alibi_slopes, sink=sink,
        scale=scale, num_splits=num_splits, backend=backend,
    )  # fmt: skip
    answer = result(call, return_lse, False)
    dtype = autocast_of_cache(q, k_cache, v_cache)
    if dtype is not None:
        return in_dtype(answer, dtype)
    if key is not None:
        fast.remember_decode(key, call, tensors)
    return answer
