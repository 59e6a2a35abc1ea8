"""From the product of a query and a key to their logit: the one formula of attention in Python, for
the whole matrix or a block of it, as csrc/logit.h is the one of the native kernels.

    s = scale * product;   s = softcap * tanh(s / softcap)    where softcap > 0
    s = s + bias - slope[h] * |i + (Sk - Sq) - j|
    excluded where window, mask or a bias of -inf say so

`of` takes products q_i . k_j (or additive scores) and gives s; `seen` says which pairs count.
A new term of the logit is added in `_added`, or in `_capped`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_ext.core.schema import BOTTOM_RIGHT, Call, Frame, statistics_dtype

EVERY = slice(None)


class Pairs(NamedTuple):
    """Queries and keys of one block of a sequence of seqlen_q queries and seqlen_k keys.  In a
    call with frames these are positions and lengths of the whole sequence."""

    rows: torch.Tensor  # int64 [r], positions of the queries
    cols: torch.Tensor  # int64 [c], positions of the keys
    seqlen_q: int
    seqlen_k: int
    b: slice = EVERY  # batch elements
    h: slice = EVERY  # query heads

    @classmethod
    def all_of(cls, seqlen_q: int, seqlen_k: int, device, b: slice = EVERY) -> Pairs:
        """Every query with every key."""
        rows, cols = (torch.arange(n, device=device) for n in (seqlen_q, seqlen_k))
        return cls(rows, cols, seqlen_q, seqlen_k, b)

    def within(self, frame: Frame) -> Pairs:
        """These pairs of a call's own positions as those of the whole sequence."""
        rows, cols = self.rows + frame.q_first, self.cols + frame.k_first
        return Pairs(rows, cols, frame.whole_q, frame.whole_k, self.b, self.h)


def in_window(call: Call, pairs: Pairs) -> torch.Tensor:
    """bool [r, c]: i + off - left <= j <= i + off + right, off = Sk - Sq when bottom-right aligned,
    else 0.
    """
    off = pairs.seqlen_k - pairs.seqlen_q if call.align == BOTTOM_RIGHT else 0
    diagonal, j = pairs.rows[:, None] + off, pairs.cols[None, :]
    shape = (len(pairs.rows), len(pairs.cols))
    inside = torch.ones(shape, dtype=torch.bool, device=pairs.rows.device)
    if call.window_left >= 0:
        inside &= j >= diagonal - call.window_left
    if call.window_right >= 0:
        inside &= j <= diagonal + call.window_right
    return inside


def key_range(
    call: Call, first: int, last: int, seqlen_q: int, seqlen_k: int, frame: Frame | None = None
) -> tuple[int, int]:
    """The keys from c0 to c1 that the window lets any query from `first` to `last` see."""
    frame = Frame(0, 0, 0, 0, seqlen_q, seqlen_k) if frame is None else frame
    off = frame.whole_k - frame.whole_q if call.align == BOTTOM_RIGHT else 0
    off += frame.q_first - frame.k_first
    low = first + off - call.window_left if call.window_left >= 0 else 0
    high = last + off + call.window_right + 1 if call.window_right >= 0 else seqlen_k
    low = min(max(low, 0), seqlen_k)
    return low, min(max(high, low), seqlen_k)


def part(scores: torch.Tensor | None, b, h, rows, keys) -> torch.Tensor | None:
    """The block of a mask or bias [B or 1, Hq or 1, Sq or 1, Sk or 1] at these slices (rows may be
    positions): a view where all are; broadcast dimensions stay.
    """
    if scores is None:
        return None
    at = zip(scores.shape, (b, h, rows, keys), strict=True)
    return scores[tuple(EVERY if n == 1 else where for n, where in at)]


def restriction(call: Call, pairs: Pairs, mask, bias) -> torch.Tensor | None:
    """`seen`, or None where the call has neither window nor mask nor bias."""
    windowed = call.window_left >= 0 or call.window_right >= 0
    visible = in_window(call, pairs) if windowed else None
    there = None if bias is None else bias.detach() != -torch.inf
    for each in (mask, there):
        if each is not None:
            visible = each if visible is None else visible & each
    return visible


def seen(call: Call, pairs: Pairs, mask, bias) -> torch.Tensor:
    """bool, broadcastable to [b, h, r, c]: the pairs that window, mask and bias (-inf) leave.  mask
    and bias are those of the block, broadcastable alike.
    """
    visible = restriction(call, pairs, mask, bias)
    return in_window(call, pairs) if visible is None else visible


class Derivatives(NamedTuple):
    """What the derivatives of softcap need of a block's logits; None without one."""

    capped: torch.Tensor | None  # softcap * tanh(scale * product / softcap)
    slope: torch.Tensor | None  # its derivative by scale * product


def of(call: Call, products: torch.Tensor, pairs: Pairs, bias) -> torch.Tensor:
    """s [b, h, r, c] of products [b, h, r, c], in their dtype.  What `seen` leaves out has no
    meaning in it.
    """
    return _added(call, _capped(call, products)[0], pairs, bias)


def with_derivatives(call: Call, products: torch.Tensor, pairs: Pairs, bias) -> tuple:
    """(s, its `Derivatives`)"""
    s, bent = _capped(call, products)
    found = Derivatives(None, None) if bent is None else Derivatives(s, 1 - bent * bent)
    return _added(call, s, pairs, bias), found


def _capped(call: Call, products: torch.Tensor) -> tuple:
    """(scale * products through softcap, the tanh in it or None)"""
    s = products * (call.q.shape[-1] ** -0.5 if call.scale is None else call.scale)
    if call.softcap <= 0:
        return s, None
    bent = torch.tanh(s / call.softcap)
    return call.softcap * bent, bent


def _added(call: Call, s: torch.Tensor, pairs: Pairs, bias) -> torch.Tensor:
    """The terms that are added to capped products."""
    if bias is not None:
        s = s + bias.to(s.dtype)
    if call.alibi_slopes is not None:
        s = s - _alibi(call, pairs).to(s.dtype)
    return s


def _alibi(call: Call, pairs: Pairs) -> torch.Tensor:
    """slope[b, h] * |i + (Sk - Sq) - j|   [b or 1, h, r, c]"""
    slopes = call.alibi_slopes.to(statistics_dtype(call.q.dtype))
    slopes = slopes if slopes.dim() == 2 else slopes[None]
    slopes = slopes[pairs.b] if slopes.shape[0] > 1 else slopes
    aligned = pairs.rows[:, None] + (pairs.seqlen_k - pairs.seqlen_q)
    distance = (aligned - pairs.cols[None, :]).abs().to(slopes.dtype)
    return slopes[:, pairs.h, None, None] * distance
