"""What an error adds where tensors were given as [B, S, H, D], the layout of other libraries: said
only where the shapes fit that reading and do not fit [B, H, S, D].
"""

from __future__ import annotations

import torch


def transposed(*names: str) -> str:
    """How the error ends."""
    calls = ", ".join(f"{name}.transpose(1, 2)" for name in names)
    return (
        "; read as [B, S, H, D] the shapes fit together, but the layout here is [B, H, S, D]: pass "
        f"{calls}"
    )


def explained(
    error: ValueError, q, k, v, names=("q", "k", "v"), causal=False, scores=(), of_heads=()
) -> ValueError:
    """`error` of a call with q, k, v, and how to mend it where they are [B, S, H, D].  causal: as
    the caller gave it; scores: mask and bias; of_heads: what has an entry for each head (or None).
    """
    if not all(isinstance(x, torch.Tensor) for x in (q, k, v, *_given(scores), *_given(of_heads))):
        return error
    shapes = [tuple(x.shape) for x in (q, k, v)]
    if any(len(shape) != 4 or 0 in shape for shape in shapes):
        return error
    swapped = [(b, h, s, d) for b, s, h, d in shapes]
    if _fit(*shapes, causal, scores, of_heads) or not _fit(*swapped, causal, scores, of_heads):
        return error
    return ValueError(f"{error}{transposed(*names)}")


def _given(tensors) -> list:
    return [x for x in tensors if x is not None]


def _fit(q, k, v, causal, scores, of_heads) -> bool:
    """Whether these shapes [B, H, S, D] make a call."""
    together = q[0] == k[0] == v[0] and k[1:3] == v[1:3] and q[3] == k[3] and k[1] > 0
    lengths = causal is not True or q[2] == k[2]
    full = (q[0], q[1], q[2], k[2])
    broadcast = all(
        size in (1, want)
        for x in _given(scores)
        for size, want in zip(x.shape[::-1], full[::-1], strict=False)
    )
    heads = all(x.dim() > 0 and x.shape[-1] == q[1] for x in _given(of_heads))
    return together and q[1] % max(k[1], 1) == 0 and lengths and broadcast and heads


def paged(error: ValueError, q, k_cache) -> ValueError:
    """`error` of q [B, Hq, Sq, D] and a cache [B or pages, Hk, S, D], explained alike."""
    if q.dim() != 4 or k_cache.dim() != 4 or q.shape[3] != k_cache.shape[3]:
        return error
    (_, heads_q, length_q, _), (_, heads_k, length_k, _) = q.shape, k_cache.shape
    as_given = heads_k > 0 and heads_q % heads_k == 0
    if as_given or not length_k or length_q % length_k:
        return error
    return ValueError(f"{error}{transposed('q', 'k_cache', 'v_cache')}")


def of_rows(name: str, shape, batch: int, heads: int, head_dim: int) -> str:
    """The end of an error about keys or values that should be [B, heads, S, head_dim]."""
    is_last = len(shape) == 4 and shape[1] != heads and shape[2] == heads
    fits = is_last and shape[0] == batch and shape[3] == head_dim
    return transposed(name) if fits else ""
