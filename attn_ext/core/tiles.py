"""Tiles of an attention call that hold all keys of their rows, in torch operations.

    z = scale q . k       s = softcap tanh(z / softcap)       t: the logit, -inf where hidden
    P = exp(t - LSE)      [b, h, rows, keys]                  M: dropout's factor, 0 or 1 / (1 - p)

A panel is a block of batch elements and whole groups of heads; a tile is a block of its queries
with the keys that its window reaches, at most about BUDGET pairs.  All of it is in the statistics'
dtype.  `Panel.times` and its like know the groups of heads: K and V are never repeated.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from attn_ext.core import logit, reference
from attn_ext.core.schema import Call, Frame, statistics_dtype

BUDGET = 1 << 17  # pairs of a tile: half a MiB of float32 for each of some fifteen tensors
FEWEST_ROWS = 16  # of a group of heads; products of fewer read K and V too often


@dataclass(slots=True, frozen=True)
class Panel:
    """Batch elements b, query heads h and their key heads hk of a dense call."""

    call: Call
    b: slice
    h: slice
    hk: slice
    first_batch: int  # of the call within the whole, for dropout's counter
    finite: bool  # whether no input holds NaN or inf, but for a bias of -inf
    frame: Frame | None = None  # of the panel's one sequence, where it is a part of a longer one

    def of_queries(self, x: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
        """The panel's part of x [B, Hq, Sq, ...] in the statistics' dtype."""
        return None if x is None else x[self.b, self.h, rows].to(self.dtype)

    def of_keys(self, x: torch.Tensor | None) -> torch.Tensor | None:
        """The panel's part of x [B, Hk, Sk, ...] in the statistics' dtype."""
        return None if x is None else x[self.b, self.hk].to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The statistics' dtype."""
        return statistics_dtype(self.call.q.dtype)

    def _folded(self, x: torch.Tensor) -> torch.Tensor:
        """[b, h, r, x] -> [b, hk, group * r, x], the rows of a group one after the other."""
        group = self.call.q.shape[1] // self.call.k.shape[1]
        return x if group == 1 else x.unflatten(1, (-1, group)).flatten(2, 3)

    def _of_heads(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `_folded`."""
        group = self.call.q.shape[1] // self.call.k.shape[1]
        return x if group == 1 else x.unflatten(2, (group, -1)).flatten(1, 2)

    def _product(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b if self.finite else reference.safe_matmul(a, b)

    def against(self, a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """a y^T: a [b, h, r, x], y [b, hk, c, x] -> [b, h, r, c]; NaN stays where it arises."""
        return self._of_heads(self._folded(a) @ y.mT)

    def times(self, p: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """p y: p [b, h, r, c], y [b, hk, c, x] -> [b, h, r, x]; a zero of p silences NaN of y."""
        return self._of_heads(self._product(self._folded(p), y))

    def transposed(self, p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """p^T x, summed over each group: p [b, h, r, c], x [b, h, r, d] -> [b, hk, c, d]."""
        return self._product(self._folded(p).mT, self._folded(x))

    def part(self, scores: torch.Tensor | None, rows: slice, keys: slice) -> torch.Tensor | None:
        """The tile of a mask or bias [B or 1, Hq or 1, Sq or 1, Sk or 1], as a view."""
        return logit.part(scores, self.b, self.h, rows, keys)


def finite(call: Call, *others: torch.Tensor | None) -> torch.Tensor:
    """Whether neither the call's inputs nor `others` hold NaN or an infinity, as their sums say,
    which is one pass over each; False where a sum of large numbers overflows, too, which only costs
    time.  A bias of -inf hides a pair, which is nothing unusual."""
    wide = statistics_dtype(call.q.dtype)
    tensors = (call.q, call.k, call.v, call.sink, *others)
    sums = [x.sum(dtype=wide) for x in tensors if x is not None]
    if call.bias is not None and call.bias.numel():  # in place of a copy without -inf
        largest = call.bias.amax().to(wide)  # NaN where there is one
        sums.append(torch.where(largest == -torch.inf, 0.0, largest))
    return torch.isfinite(torch.stack(sums).sum())


def panels(
    call: Call, first_batch: int, finite: bool, frame: Frame | None = None
) -> Iterator[Panel]:
    """Panels that cover a dense call; one with a frame has one sequence."""
    batch, heads, seqlen_q, _ = call.q.shape
    heads_k = call.k.shape[1]
    group = heads // heads_k
    unit = max(group * call.k.shape[2] * min(seqlen_q, rows_of(call)), 1)  # pairs of one key head
    heads_at_once = min(max(BUDGET // unit, 1), heads_k)
    batch_at_once = max(BUDGET // (unit * heads_k), 1)
    for b in range(0, batch, batch_at_once):
        for hk in range(0, heads_k, heads_at_once):
            last = min(hk + heads_at_once, heads_k)
            of_b = slice(b, min(b + batch_at_once, batch))
            of_h = slice(hk * group, last * group)
            yield Panel(call, of_b, of_h, slice(hk, last), first_batch, finite, frame)


def rows_of(call: Call) -> int:
    """How many queries a tile has."""
    group = call.q.shape[1] // call.k.shape[1]
    fewest = max(FEWEST_ROWS // group, 1)
    return max(BUDGET // max(group * call.k.shape[2], 1), fewest)


def tiles(call: Call, frame: Frame | None = None) -> Iterator[tuple[slice, slice]]:
    """(rows, keys) of the tiles that have any: the keys are those that the window lets see."""
    seqlen_q, seqlen_k = call.q.shape[2], call.k.shape[2]
    for first in range(0, seqlen_q, rows_of(call)):
        last = min(first + rows_of(call), seqlen_q)
        low, high = logit.key_range(call, first, last - 1, seqlen_q, seqlen_k, frame)
        if low < high:
            yield slice(first, last), slice(low, high)


class Scores(NamedTuple):
    """The logits of a tile and what their derivatives need."""

    t: torch.Tensor  # [b, h, r, c], -inf at hidden pairs
    seen: torch.Tensor | None  # bool, broadcastable to t; None: all pairs
    capped: torch.Tensor | None  # s; None without softcap
    slope: torch.Tensor | None  # ds / dz; None without softcap


def scores(panel: Panel, q: torch.Tensor, k: torch.Tensor, rows: slice, keys: slice) -> Scores:
    """The logits of queries q [b, h, r, D] and keys k [b, hk, c, D] at these positions."""
    call = panel.call
    i, j = (torch.arange(x.start, x.stop, device=call.q.device) for x in (rows, keys))
    pairs = logit.Pairs(i, j, call.q.shape[2], call.k.shape[2], panel.b, panel.h)
    pairs = pairs if panel.frame is None else pairs.within(panel.frame)
    mask, bias = (panel.part(x, rows, keys) for x in (call.mask, call.bias))
    seen = logit.restriction(call, pairs, mask, bias)
    products = panel.against(q, k)
    if seen is not None and not panel.finite:
        products = torch.where(seen, products, 0.0)  # what tanh makes of a hidden NaN
    t, (capped, slope) = logit.with_derivatives(call, products, pairs, bias)
    if not panel.finite:  # a logit of -inf hides, too
        seen = t != -torch.inf if seen is None else seen & (t != -torch.inf)
    if seen is not None:
        t = torch.where(seen, t, -torch.inf)
    return Scores(t, seen, capped, slope)


class Weights(NamedTuple):
    """The softmax of a tile's rows."""

    p: torch.Tensor  # [b, h, r, c]
    of_sink: torch.Tensor | None  # [b, h, r, 1]: the sink's weight


def weights(panel: Panel, found: Scores) -> Weights:
    """P, from the logits alone: they hold all keys of their rows, and LSE has lost the number of
    keys beside logits of finfo.min, as additive masks have them.  Rows without keys are 0."""
    sink = panel.call.sink
    largest = found.t.amax(-1, keepdim=True)
    empty = None if found.seen is None else largest == -torch.inf
    if sink is not None:
        sink = sink[panel.h].to(panel.dtype)[:, None, None]
        largest = torch.maximum(largest, sink)
    if empty is not None:
        largest = largest.masked_fill(empty, 0.0)
    p = torch.exp(found.t - largest)
    total = p.sum(-1, keepdim=True)
    rest = None if sink is None else torch.exp(sink - largest)
    total = total if rest is None else total + rest
    if empty is not None:
        total = total.masked_fill(empty, 1.0)
        rest = rest if rest is None else rest.masked_fill(empty, 0.0)
    p = p.div_(total)
    if found.seen is not None and not panel.finite:  # of a row of NaN
        p = torch.where(found.seen, p, 0.0)
    return Weights(p, rest if rest is None else rest / total)


def dropout_factor(panel: Panel, key, rows: slice, keys: slice) -> torch.Tensor | float | None:
    """M [b, h, r, c] of the call's Philox `key`; None without dropout."""
    p = panel.call.dropout_p
    if p == 0:
        return None
    if p >= 1:
        return 0.0
    b = range(panel.b.start + panel.first_batch, panel.b.stop + panel.first_batch)
    h, i, j = (range(s.start, s.stop) for s in (panel.h, rows, keys))
    if panel.frame is not None:
        b, h, i, j = (
            range(at + r.start, at + r.stop)
            for at, r in zip(panel.frame[:4], (range(len(b)), h, i, j), strict=True)
        )
    keep = reference.keep_tile(key, p, b, h, i, j, panel.call.q.device)
    return keep.to(panel.dtype).mul_(1 / (1 - p))


def key_of(call: Call) -> tuple[int, int] | None:
    """The Philox key of a call; None without dropout."""
    return reference.philox_key(*call.rng_state.tolist()) if 0 < call.dropout_p < 1 else None
