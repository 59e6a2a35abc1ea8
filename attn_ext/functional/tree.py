"""Queries whose mask speaks of the last positions of a KV cache alone, as the trees of drafts of
speculative decoding have it (arXiv 2305.09781), and checks of what a cache is given.

    out, lse = merge(attention to all before the last Sq positions, attention to these by the mask)

Both parts are exact and their (out, lse) are merged in float32, so that nothing spans the cache.
"""

from __future__ import annotations

import math
from functools import partial

import torch

from attn_ext.core import mistakes, validate
from attn_ext.functional import quantised
from attn_ext.functional.decode import attention_decode
from attn_ext.functional.dense import attention

SPANNING = ("mask", "bias", "alibi_slopes")  # with these a mask over all positions is made


def countable(batch: int, width: int, *sizes: int) -> None:
    """ValueError where torch cannot count the bytes of a cache's block table [batch, width], or of
    its pages; sizes: pages, heads, page_size and head_dim."""
    most = validate.MAX_ELEMENTS // 8
    for what, each in (
        ("batch and pages for max_length", (batch, width)),
        ("pages, heads, page_size and head_dim", sizes),
    ):
        if math.prod(each) > most:
            raise ValueError(
                f"{what} must have a product of at most {most}, got {' * '.join(map(str, each))}"
            )


def new_rows(name: str, x, pages, batch: int) -> None:
    """Check keys or values [B, Hk, S, D] that go into pages [pages, Hk, page_size, D]."""
    validate.tensor(name, x)
    _, heads, _, head_dim = pages.shape
    shape = tuple(x.shape)
    if len(shape) != 4 or (shape[0], shape[1], shape[3]) != (batch, heads, head_dim):
        raise ValueError(
            f"{name} must have shape [{batch}, {heads}, S, {head_dim}], got {shape}"
            f"{mistakes.of_rows(name, shape, batch, heads, head_dim)}"
        )
    if pages.dtype == torch.int8:
        quantised.check_dtype(name, x)
    elif x.dtype != pages.dtype:
        raise TypeError(f"{name} must have the cache's dtype {pages.dtype}, got {x.dtype}")
    if x.device != pages.device:
        raise ValueError(f"{name} must be on the cache's device {pages.device}, got {x.device}")


def refuse_transformed(**tensors) -> None:
    """NotImplementedError for new rows that have a tangent, which no page holds, and for those of
    torch.func.vmap, of which a page holds one alone."""
    if torch.compiler.is_compiling():
        return
    for name, x in tensors.items():
        if validate.has_tangent(x):
            raise NotImplementedError(
                f"KVCache.append has no forward-mode AD, but {name} has a tangent: use "
                "attn_ext.attention"
            )
        if torch._C._functorch.is_batchedtensor(x):
            raise NotImplementedError(
                f"KVCache.append cannot be mapped by torch.func.vmap, as {name} is: append the "
                "rows of all examples at once, one sequence each"
            )


def integers(name: str, values) -> list[int]:
    """Python's ints of a sequence or a tensor [n] of integers."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1 or values.is_floating_point() or values.dtype == torch.bool:
            raise TypeError(
                f"{name} must be integers in one dimension, got {values.dtype} of shape "
                f"{tuple(values.shape)}"
            )
        return values.tolist()
    if not hasattr(values, "__iter__") or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of ints, got {type(values).__name__}")
    return [validate.integer(name, value) for value in values]


def sequences(name: str, values, batch: int, distinct: bool) -> list[int]:
    """`integers` that are numbers of a cache's sequences."""
    rows = integers(name, values)
    for b in rows:
        if not 0 <= b < batch:
            raise ValueError(f"{name} must hold numbers of sequences, 0 to {batch - 1}, got {b}")
    if distinct and len(set(rows)) < len(rows):
        raise ValueError(f"{name} must name each sequence once, got {rows}")
    return rows


def lists(name: str, values) -> list[list[int]]:
    """`integers` of each entry of a sequence or a tensor [n, m]."""
    if not hasattr(values, "__iter__") or (isinstance(values, torch.Tensor) and not values.dim()):
        raise TypeError(f"{name} must be a sequence of sequences of ints, got {values!r}")
    return [integers(name, numbers) for numbers in values]


def device(value) -> torch.device:
    """`value` as a device of torch."""
    try:
        return torch.device(value)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"device must be one of torch's, got {value!r}: {error}") from None


def queries(q, pages, batch: int) -> None:
    """Check queries [B, Hq, Sq, D] of a cache whose pages are [pages, Hk, page_size, D]."""
    _, heads, _, head_dim = pages.shape
    shape = tuple(q.shape)
    fits = len(shape) == 4 and shape[0] == batch and shape[3] == head_dim
    if not fits or shape[1] == 0 or shape[1] % heads:
        hint = fits and shape[2] > 0 and shape[2] % heads == 0
        raise ValueError(
            f"q must have shape [{batch}, Hq, Sq, {head_dim}], Hq a multiple of {heads}, got "
            f"{shape}{mistakes.transposed('q') if hint else ''}"
        )


def positions(pages, table, at):
    """[B, Hk, n, D]: the positions at [B, n] of each sequence, from pages [pages, Hk, page_size,
    D] of a block table [B, max_pages].
    """
    page_size = pages.shape[2]
    numbers = table.long().gather(1, (at // page_size).long())
    return pages[numbers, :, (at % page_size).long()].transpose(1, 2)


def larger(pages, count: int, page_size: int):
    """A copy of pages [pages, Hk, page_size, D] with room for more of them, or longer ones."""
    found = pages.new_empty((count, pages.shape[1], page_size, pages.shape[3]))
    found[: len(pages), :, : pages.shape[2]] = pages
    return found


def attend(
    q, k_pages, v_pages, held, table, tree_mask, return_lse, options, factors=(), dtype=None
):  # fmt: skip
    """`KVCache.attend` with a tree_mask; held [B] and table [B, max_pages] of the sequences;
    factors: of pages of int8, where q is float32 and was `dtype`."""
    if "causal" in options:
        raise ValueError(
            f"causal must not be given with tree_mask, which takes its place, got "
            f"{options['causal']!r}"
        )
    batch, heads, seqlen, _ = q.shape
    sizes = (batch, heads, seqlen, seqlen)
    tree_mask = validate.scores("tree_mask", tree_mask, True, q.device, *sizes)
    paged = dict(block_table=table, causal=False)
    decode = partial(quantised.decode, dtype=dtype) if factors else attention_decode
    before = held - seqlen  # [B]: positions that every query sees
    if options.get("window") or any(options.get(name) is not None for name in SPANNING):
        options = options | {"mask": _spanning(tree_mask, seqlen, before, table, k_pages, options)}
        call = (q, k_pages, v_pages, held, *factors)
        return decode(*call, return_lse=return_lse, **paged, **options)
    at = before[:, None] + torch.arange(seqlen, device=q.device)  # [B, Sq]
    k, v, *scales = (positions(x, table, at.clamp(min=0)) for x in (k_pages, v_pages, *factors))
    if factors:
        k, v = map(quantised.dequantise, (k, v), scales)
    mask = tree_mask & (at >= 0)[:, None, None, :]
    rest = {name: options[name] for name in options if name not in ("window", "sink")}
    both = {name: rest[name] for name in rest if name != "num_splits"}
    last = attention(q, k, v, mask=mask, return_lse=True, **both)
    before = before.clamp(min=0)
    call = (q, k_pages, v_pages, before, *factors)
    first = decode(*call, return_lse=True, **paged, **rest)
    sink = options.get("sink")
    sink = None if sink is None else validate.sink_logits(sink, q.device, q.dtype, heads)
    out, lse = _merged(*first, *last, sink)
    return (out, lse) if return_lse else out


def _merged(out_a, lse_a, out_b, lse_b, sink):
    """(out, lse) of one attention to the keys of both, and to a sink [Hq] or None in rows that see
    a key; out is 0 and LSE -inf in the others.
    """
    lse = torch.logaddexp(lse_a, lse_b)
    empty = lse == -torch.inf
    if sink is not None:
        lse = torch.where(empty, lse, torch.logaddexp(lse, sink[:, None]))
    base = torch.where(empty, 0.0, lse)  # not -inf - -inf
    a, b = torch.exp(lse_a - base)[..., None], torch.exp(lse_b - base)[..., None]
    return (a * out_a.to(lse.dtype) + b * out_b.to(lse.dtype)).to(out_a.dtype), lse


def _spanning(tree_mask, seqlen, before, table, k_pages, options):
    """The mask [B, ., Sq, S] over all S positions that the table has room for."""
    capacity = table.shape[1] * k_pages.shape[2]
    number = torch.arange(capacity, device=table.device) - before[:, None]  # [B, S] in the tree
    tree_mask = tree_mask.expand(len(number), -1, seqlen, seqlen)
    index = number.clamp(0, seqlen - 1).long()[:, None, None, :]
    seen = tree_mask.gather(3, index.expand(*tree_mask.shape[:3], -1))
    seen = seen | (number < 0)[:, None, None, :]
    mask = options.get("mask")
    return seen if mask is None else seen & mask
