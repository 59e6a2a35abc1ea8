"""The two passes by which attention is differentiated twice and in forward mode, in torch
operations on any device and in O(N) memory.

With ' the tangent, M dropout's factor, P, t and z as in `attn_ext.core.tiles`, G = dO, lam = dLSE,
D = G.O - lam, and c = t' - L' the centred tangent of the logits:

T1, the tangent of the forward:
    t' = (ds/dz) scale (q'.k + q.k') + bias'     L' = sum P t' + P_sink sink'
    O' = (P M c) V + (P M) V'
T2, the tangent of the backward:
    dT = P (dP - D)             dT' = P [c (dP - D) + dP' - D']
    dZ = (ds/dz) dT             dZ' = (ds/dz) dT' + (d2s/dz2) z' dT
    dQ' = scale (dZ' K + dZ K')       dK' = scale (dZ'^T Q + dZ^T Q')
    dV' = (P M c)^T G + (P M)^T G'    dSink' = -sum P_sink [(sink' - L') D + D']

Tiles hold all keys of their rows, so that P, L', D and D' are sums within a tile.  c is centred
twice: a large part that all keys' tangents have in common costs no digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from attn_ext.core import tiles
from attn_ext.core.layout import empty_like_layout
from attn_ext.core.reference import sequence_scores
from attn_ext.core.schema import Call, Grads, Needs, Rows, Tangents, lse_shape, statistics_dtype
from attn_ext.core.tiles import Panel


def tangent(
    call: Call, tangents: Tangents, rows: Rows | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """T1: (O', L') of a dense or varlen call.  Tiles know O and LSE without `rows`."""
    out = empty_like_layout(call.q, call.v.shape[-1]).zero_()
    lse = call.q.new_zeros(lse_shape(call), dtype=statistics_dtype(call.q.dtype))
    if all(x is None for x in tangents):
        return out, lse
    finite = bool(tiles.finite(call, *tangents))
    for part in _sequences(call):
        views = part.rows(out), part.statistics(lse)
        _dense_tangent(part.call, part.tangents(tangents), *views, part.first_batch, finite)
    return out, lse


def backward_tangent(
    call: Call, tangents: Tangents, rows: Rows, needs: Needs, primal: Needs
) -> tuple[Grads, Grads]:
    """T2: the tangents of the gradients that `needs` asks for, and the gradients that `primal` asks
    for.  Those of the bias have its shape."""
    found = _blank(call, needs), _blank(call, primal)
    of_rows = rows.dout, rows.dlse, rows.tdout, rows.tdlse
    finite = bool(tiles.finite(call, *tangents, *of_rows))
    for part in _sequences(call):
        views = tuple(map(part.gradients, found))
        of_rows = part.all_rows(rows)
        arguments = part.call, part.tangents(tangents), of_rows, *views, part.first_batch, finite
        _dense_backward_tangent(*arguments)
    return tuple(_in_their_dtypes(call, grads) for grads in found)


def _blank(call: Call, needs: Needs) -> Grads:
    """Zeros that gradients are written or added to."""
    wide = statistics_dtype(call.q.dtype)
    made = {
        name: empty_like_layout(getattr(call, name), getattr(call, name).shape[-1]).zero_()
        for name in ("q", "k", "v")
        if getattr(needs, name)
    }
    for name in ("bias", "sink"):
        if getattr(needs, name):
            made[name] = torch.zeros_like(getattr(call, name), dtype=wide)
    return Grads(**made)


def _in_their_dtypes(call: Call, grads: Grads) -> Grads:
    sums = {name: getattr(grads, name) for name in ("bias", "sink")}
    wanted = {n: x.to(getattr(call, n).dtype) for n, x in sums.items() if x is not None}
    return grads._replace(**wanted)


@dataclass(slots=True, frozen=True)
class _Sequence:
    """A dense call, or one sequence of a varlen one as a dense call; its part of other tensors."""

    call: Call
    first_batch: int = 0
    queries: slice | None = None  # None: the call was dense
    keys: slice | None = None

    def _packed(self, x, rows):
        if x is None or rows is None:
            return x
        return x[rows].transpose(0, 1)[None]

    def rows(self, x):
        """A tensor like q."""
        return self._packed(x, self.queries)

    def statistics(self, x):
        """A tensor like LSE."""
        return x if x is None or self.queries is None else x[:, self.queries][None]

    def _scores(self, x):
        if self.queries is None:
            return x
        return sequence_scores(x, self.first_batch, self.call.q.shape[2], self.call.k.shape[2])

    def tangents(self, all_of_them: Tangents) -> Tangents:
        """The tangents of `call`."""
        return Tangents(*self.gradients(all_of_them))

    def gradients(self, grads) -> Grads:
        """The gradients of `call`, as views."""
        q, k, v, bias, sink, _ = grads
        k, v = self._packed(k, self.keys), self._packed(v, self.keys)
        return Grads(q=self.rows(q), k=k, v=v, bias=self._scores(bias), sink=sink)

    def all_rows(self, rows: Rows) -> Rows:
        """The rows of `call`."""
        return Rows(
            dout=self.rows(rows.dout), tdout=self.rows(rows.tdout),
            dlse=self.statistics(rows.dlse), tdlse=self.statistics(rows.tdlse),
        )  # fmt: skip


def _sequences(call: Call):
    """The call as dense ones."""
    if call.cu_seqlens_q is None:
        yield _Sequence(call)
        return
    starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        rows, cols = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
        q, k, v = (
            x[s].transpose(0, 1)[None] for x, s in ((call.q, rows), (call.k, cols), (call.v, cols))
        )
        mask, bias = (sequence_scores(x, b, q.shape[2], k.shape[2]) for x in (call.mask, call.bias))
        slopes = call.alibi_slopes
        slopes = slopes[b : b + 1] if slopes is not None and slopes.dim() == 2 else slopes
        one = call._replace(
            q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=slopes, cu_seqlens_q=None,
            cu_seqlens_k=None,
        )  # fmt: skip
        yield _Sequence(one, b, rows, cols)


class _Tile(NamedTuple):
    """What both passes compute of a tile."""

    q: torch.Tensor
    tq: torch.Tensor | None
    scores: tiles.Scores
    weights: tiles.Weights
    kept: torch.Tensor | float | None  # M
    tz: torch.Tensor | None  # z'
    centred: torch.Tensor | None  # c; None where it is 0
    tlse: torch.Tensor | float  # L' [b, h, r, 1]
    tsink: torch.Tensor | None  # sink' - L'; None without a sink


class _Keys(NamedTuple):
    """Keys and values of a panel, and their tangents."""

    k: torch.Tensor
    v: torch.Tensor
    tk: torch.Tensor | None
    tv: torch.Tensor | None


def _keys_of(panel: Panel, tangents: Tangents) -> _Keys:
    call = panel.call
    return _Keys(*map(panel.of_keys, (call.k, call.v, tangents.k, tangents.v)))


def _tile(panel: Panel, tangents: Tangents, keys: _Keys, r: slice, c: slice, philox) -> _Tile:
    """Logits, weights and centred tangents of the tile at queries r and keys c."""
    q, tq = panel.of_queries(panel.call.q, r), panel.of_queries(tangents.q, r)
    scores = tiles.scores(panel, q, keys.k[:, :, c], r, c)
    weights = tiles.weights(panel, scores)
    tz = None
    if tq is not None:
        tz = panel.against(tq, keys.k[:, :, c])
    if keys.tk is not None:
        other = panel.against(q, keys.tk[:, :, c])
        tz = other if tz is None else tz.add_(other)
    hidden = None if panel.finite or scores.seen is None else ~scores.seen
    tz = tz if tz is None else tz.mul_(panel.call.scale)
    if hidden is not None and tz is not None:
        tz = tz.masked_fill(hidden, 0.0)
    tt = tz if tz is None or scores.slope is None else scores.slope * tz
    if tangents.bias is not None:
        of_bias = panel.part(tangents.bias, r, c).to(panel.dtype)
        tt = of_bias.expand(scores.t.shape) if tt is None else tt + of_bias
        tt = tt if hidden is None else tt.masked_fill(hidden, 0.0)
    kept = tiles.dropout_factor(panel, philox, r, c)
    return _Tile(q, tq, scores, weights, kept, tz, *_centre(panel, tangents, weights, tt))


def _centre(panel: Panel, tangents: Tangents, weights: tiles.Weights, tt) -> tuple:
    """(t' - L', L', sink' - L'), the mean taken out in two steps."""
    sink = weights.of_sink
    tsink = None
    if sink is not None:
        tsink = sink.new_zeros(())
        if tangents.sink is not None:
            tsink = tangents.sink[panel.h].to(panel.dtype)[:, None, None]
    if tt is None and (tsink is None or tangents.sink is None):
        return None, 0.0, tsink
    tt = torch.zeros_like(weights.p) if tt is None else tt
    tlse = 0.0
    for _ in range(2):
        mean = (weights.p * tt).sum(-1, keepdim=True)
        if tsink is not None:
            mean = mean + sink * tsink
            tsink = tsink - mean
        tt = tt - mean
        tlse = tlse + mean
    return tt, tlse, tsink


def _dense_tangent(call, tangents, out, lse, first_batch: int, finite: bool) -> None:
    """T1 of a dense call, into out [B, Hq, Sq, Dv] and lse [B, Hq, Sq], which are 0."""
    philox = tiles.key_of(call)
    for panel in tiles.panels(call, first_batch, finite):
        keys = _keys_of(panel, tangents)
        for r, c in tiles.tiles(call):
            tile = _tile(panel, tangents, keys, r, c, philox)
            p = _kept(panel, tile.weights.p, tile)
            found = None
            if tile.centred is not None:
                found = panel.times(_times(panel, p, tile.centred), keys.v[:, :, c])
                lse[panel.b, panel.h, r] = tile.tlse.squeeze(-1)
            if keys.tv is not None:
                other = panel.times(p, keys.tv[:, :, c])
                found = other if found is None else found.add_(other)
            if found is not None:
                out[panel.b, panel.h, r] = found.to(out.dtype)


def _kept(panel: Panel, x, tile: _Tile):
    """x M"""
    return x if tile.kept is None or x is None else _times(panel, tile.kept, x)


def _times(panel: Panel, p, x):
    """p x, and 0 where p is: in a row of NaN a pair that is hidden or dropped adds nothing."""
    if panel.finite:
        return p * x
    if not isinstance(p, torch.Tensor):  # the factor of dropout that keeps all or nothing
        return p * x if p else torch.zeros_like(x)
    return torch.where(p == 0, 0.0, p * x)


class _Weighed(NamedTuple):
    """A tile's gradients of P and of the logits, and their tangents."""

    dt: torch.Tensor  # [b, h, r, c]
    tdt: torch.Tensor
    d: torch.Tensor  # D [b, h, r, 1]
    td: torch.Tensor  # D'


def _value_gradients(panel: Panel, keys: _Keys, tile: _Tile, g, tg, c: slice) -> tuple:
    """M dP and M dP'; the latter None where it is 0."""
    dp, tdp = panel.against(g, keys.v[:, :, c]), None
    if keys.tv is not None:
        tdp = panel.against(g, keys.tv[:, :, c])
    if tg is not None:
        other = panel.against(tg, keys.v[:, :, c])
        tdp = other if tdp is None else tdp.add_(other)
    seen = tile.scores.seen
    if seen is not None and not panel.finite:
        dp = torch.where(seen, dp, 0.0)
        tdp = tdp if tdp is None else torch.where(seen, tdp, 0.0)
    return _kept(panel, dp, tile), _kept(panel, tdp, tile)


def _weigh(panel: Panel, tile: _Tile, rows: Rows, r: slice, dp, tdp) -> _Weighed:
    """dT and dT' of M dP and M dP'.  D and D' are sums within the tile: O, whose product with G
    gives them too, has been rounded to the inputs' dtype."""
    p, of_sink = tile.weights
    d, td = (p * dp).sum(-1, keepdim=True), 0.0
    if rows.dlse is not None:
        d = d - panel.of_queries(rows.dlse, r)[..., None]
    dp = dp - d
    dt = _times(panel, p, dp)
    moved = tdp  # c (dP - D) + dP'
    if tile.centred is not None:
        moved = tile.centred * dp if tdp is None else torch.addcmul(tdp, tile.centred, dp)
    if moved is not None:
        td = (p * moved).sum(-1, keepdim=True)
        if tile.tsink is not None:  # sum P c = -P_sink (sink' - L')
            td = td - d * of_sink * tile.tsink
    if rows.tdlse is not None:
        td = td - panel.of_queries(rows.tdlse, r)[..., None]
    moved = torch.zeros_like(p) - td if moved is None else moved - td
    return _Weighed(dt, _times(panel, p, moved), d, td)


class _Sums(NamedTuple):
    """Where the gradients of one kind go: the results, and sums over the rows of a panel."""

    found: Grads
    k: torch.Tensor | None  # [b, hk, Sk, D]
    v: torch.Tensor | None


def _sums_of(panel: Panel, keys: _Keys, found: Grads) -> _Sums:
    k = None if found.k is None else torch.zeros_like(keys.k)
    v = None if found.v is None else torch.zeros_like(keys.v)
    return _Sums(found, k, v)


def _dense_backward_tangent(
    call: Call, tangents: Tangents, rows: Rows, second: Grads, first: Grads, first_batch, finite
) -> None:
    """T2 of a dense call: tangents of the gradients into `second`, gradients into `first`, all of
    them 0."""
    philox = tiles.key_of(call)
    for panel in tiles.panels(call, first_batch, finite):
        keys = _keys_of(panel, tangents)
        of_second, of_first = _sums_of(panel, keys, second), _sums_of(panel, keys, first)
        for r, c in tiles.tiles(call):
            tile = _tile(panel, tangents, keys, r, c, philox)
            g, tg = panel.of_queries(rows.dout, r), panel.of_queries(rows.tdout, r)
            dp, tdp = _value_gradients(panel, keys, tile, g, tg, c)
            weighed = _weigh(panel, tile, rows, r, dp, tdp)
            _add_scores(panel, tile, weighed, second, first, r, c)
            dz, tdz = _through_softcap(call, tile, weighed)
            _add_first(panel, tile, keys, of_first, dz, g, r, c)
            _add_second(panel, tile, keys, of_second, (dz, tdz), (g, tg), r, c)
        for sums in (of_second, of_first):
            if sums.k is not None:
                sums.found.k[panel.b, panel.hk] = sums.k.mul_(call.scale).to(call.k.dtype)
            if sums.v is not None:
                sums.found.v[panel.b, panel.hk] = sums.v.to(call.v.dtype)


def _add_scores(panel, tile: _Tile, weighed: _Weighed, second, first, r, c) -> None:
    """Adds the gradients of bias and sink, and their tangents."""
    for found, dt in ((second, weighed.tdt), (first, weighed.dt)):
        if found.bias is not None:
            into = panel.part(found.bias, r, c)
            into.add_(dt.sum_to_size(into.shape))
    of_sink = tile.weights.of_sink
    if first.sink is not None:
        first.sink[panel.h] -= (of_sink * weighed.d).sum((0, 2, 3))
    if second.sink is not None:
        moved = tile.tsink * weighed.d + weighed.td
        second.sink[panel.h] -= (of_sink * moved).sum((0, 2, 3))


def _through_softcap(call: Call, tile: _Tile, weighed: _Weighed) -> tuple:
    """(dZ, dZ')"""
    dt, tdt, scores = weighed.dt, weighed.tdt, tile.scores
    if scores.slope is None:
        return dt, tdt
    tdz, dz = tdt * scores.slope, dt * scores.slope
    if tile.tz is not None:  # d2s / dz2 = -2 s (ds / dz) / softcap^2
        tdz.addcmul_(dz, scores.capped * tile.tz, value=-2.0 / call.softcap**2)
    return dz, tdz


def _add_first(panel, tile: _Tile, keys: _Keys, sums: _Sums, dz, g, r, c) -> None:
    """Adds the gradients of q, k and v."""
    if sums.found.q is not None:
        dq = panel.times(dz, keys.k[:, :, c]).mul_(panel.call.scale)
        sums.found.q[panel.b, panel.h, r] = dq.to(panel.call.q.dtype)
    if sums.k is not None:
        sums.k[:, :, c] += panel.transposed(dz, tile.q)
    if sums.v is not None:
        sums.v[:, :, c] += panel.transposed(_kept(panel, tile.weights.p, tile), g)


def _add_second(panel, tile: _Tile, keys: _Keys, sums: _Sums, dzs, gs, r, c) -> None:
    """Adds the tangents of the gradients of q, k and v."""
    (dz, tdz), (g, tg) = dzs, gs
    if sums.found.q is not None:
        dq = panel.times(tdz, keys.k[:, :, c])
        if keys.tk is not None:
            dq += panel.times(dz, keys.tk[:, :, c])
        sums.found.q[panel.b, panel.h, r] = dq.mul_(panel.call.scale).to(panel.call.q.dtype)
    if sums.k is not None:
        sums.k[:, :, c] += panel.transposed(tdz, tile.q)
        if tile.tq is not None:
            sums.k[:, :, c] += panel.transposed(dz, tile.tq)
    if sums.v is not None:
        p = _kept(panel, tile.weights.p, tile)
        if tile.centred is not None:
            sums.v[:, :, c] += panel.transposed(_times(panel, p, tile.centred), g)
        if tg is not None:
            sums.v[:, :, c] += panel.transposed(p, tg)
