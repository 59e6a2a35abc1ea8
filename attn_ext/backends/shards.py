"""Parts of attention in torch operations, on any device and in O(N) memory: what the queries of a
call get from its keys, where these are some of all the keys that the queries see.

    forward    O = sum_j exp(t_j - LSE) M_j v_j       LSE = ln sum_j exp(t_j), over these keys
    backward   P = exp(t - LSE)   dT = P (M dP - delta)   dQ = scale dZ K   dK = scale dZ^T Q ...

with LSE = base + rest, two numbers (`attn_ext.ops.parts`), and delta = rowsum(dO * O) - dLSE of
whole rows in the backward.  It serves what no kernel does: frames on a GPU without kernels, and
far rows on GPUs (sums.py).  All results are in the statistics' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from attn_ext.core import tiles
from attn_ext.core.reference import cached_rows, sequence_scores
from attn_ext.core.schema import Call, Frame, Grads, Needs, lse_shape, statistics_dtype


class _Sequence(NamedTuple):
    """A dense call, and where it lies in the one that it is a part of."""

    call: Call
    index: int
    frame: Frame | None
    packed: tuple[slice, slice] | None = None  # rows of q and of k
    used: int | None = None  # keys of a cache

    def of_rows(self, x, at: int = 0):
        """The part of a tensor like q (at = 0) or k (1)."""
        if x is None:
            return None
        if self.packed is not None:
            return x[self.packed[at]].transpose(0, 1)[None]
        x = x if self.frame is None else x[self.index : self.index + 1]
        return x[:, :, : self.used] if at == 1 and self.used is not None else x

    def of_statistics(self, x):
        """The part of a tensor like LSE."""
        if self.packed is not None:
            return x[:, self.packed[0]][None]
        return x if self.frame is None else x[self.index : self.index + 1]

    def of_scores(self, x, whole: Call):
        """The part of a mask, a bias or its gradient."""
        if x is None or (self.packed is None and self.frame is None):
            return x
        return sequence_scores(x, self.index, self.call.q.shape[2], self.call.k.shape[2])


def _sequences(call: Call) -> Iterator[_Sequence]:
    """The call as dense ones, of one sequence each where it has frames or lengths."""
    frames = None if call.frame is None else [Frame(*row) for row in call.frame.tolist()]
    if call.cu_seqlens_q is not None:
        starts_q, starts_k = call.cu_seqlens_q.tolist(), call.cu_seqlens_k.tolist()
        for b in range(len(starts_q) - 1):
            at = slice(starts_q[b], starts_q[b + 1]), slice(starts_k[b], starts_k[b + 1])
            lengths = at[0].stop - at[0].start, at[1].stop - at[1].start
            frame = Frame(b, 0, 0, 0, *lengths) if frames is None else frames[b]
            yield _one(call, _Sequence(call, b, frame, at))
    elif frames is None and call.seqlens_k is None and call.block_table is None:
        yield _Sequence(call, 0, None)
    else:
        used = [None] * call.q.shape[0] if call.seqlens_k is None else call.seqlens_k.tolist()
        for b, keys in enumerate(used):
            keys = call.max_seqlen_k if keys is None else keys
            frame = Frame(b, 0, 0, 0, call.q.shape[2], keys) if frames is None else frames[b]
            yield _one(call, _Sequence(call, b, frame, None, keys))


def _one(call: Call, part: _Sequence) -> _Sequence:
    """The sequence with its own tensors."""
    b = part.index
    slopes = call.alibi_slopes
    q = part.of_rows(call.q)
    if call.block_table is None:
        k, v = (part.of_rows(x, 1) for x in (call.k, call.v))
    else:
        k, v = (cached_rows(call, x, b, part.used) for x in (call.k, call.v))
    part = part._replace(call=call._replace(q=q, k=k, v=v))
    one = part.call._replace(
        mask=part.of_scores(call.mask, call), bias=part.of_scores(call.bias, call),
        alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[b : b + 1],
        cu_seqlens_q=None, cu_seqlens_k=None, seqlens_k=None, block_table=None, frame=None,
    )  # fmt: skip
    return part._replace(call=one)


@torch.no_grad()
def forward_partial(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, sums) of these keys alone, as `attn_ext.ops.parts` has them.  The call has no sink."""
    dtype = statistics_dtype(call.q.dtype)
    out = call.q.new_zeros((*call.q.shape[:-1], call.v.shape[-1]), dtype=dtype)
    sums = call.q.new_zeros((*lse_shape(call), 2), dtype=dtype)
    sums[..., 0] = -torch.inf
    finite = bool(tiles.finite(call))
    for part in _sequences(call):
        one, philox = part.call, tiles.key_of(part.call)
        of_out, of_sums = part.of_rows(out), part.of_statistics(sums)
        for panel in tiles.panels(one, 0, finite, part.frame):
            k, v = panel.of_keys(one.k), panel.of_keys(one.v)
            for r, c in tiles.tiles(one, part.frame):
                scores = tiles.scores(panel, panel.of_queries(one.q, r), k[:, :, c], r, c)
                largest = scores.t.amax(-1, keepdim=True)
                base = largest.masked_fill(largest == -torch.inf, 0.0)
                p = torch.exp(scores.t - base)
                total = p.sum(-1, keepdim=True)
                kept = tiles.dropout_factor(panel, philox, r, c)
                p = p if kept is None else p * kept
                found = panel.times(p, v[:, :, c]) / total.masked_fill(total == 0, 1.0)
                of_out[panel.b, panel.h, r] = found
                rest = torch.log(total.masked_fill(total == 0, 1.0))
                of_sums[panel.b, panel.h, r] = torch.cat([largest, rest], -1)
    return out, sums


class _Sums(NamedTuple):
    """The gradients of one dense call, as views of the whole's."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    bias: torch.Tensor | None


@torch.no_grad()
def backward_partial(call: Call, dout, delta, sums, needs: Needs) -> Grads:
    """What these keys add to the gradients of q, k, v and the bias; delta and sums are those of
    whole rows."""
    dtype = statistics_dtype(call.q.dtype)
    inputs = (call.q, call.k, call.v, call.bias)
    wanted = (needs.q, needs.k, needs.v, needs.bias)
    made = [
        x.new_zeros(x.shape, dtype=dtype) if need else None
        for x, need in zip(inputs, wanted, strict=True)
    ]
    finite = bool(tiles.finite(call, dout, delta))
    for part in _sequences(call):
        dq, dk, dv, dbias = made
        gradients = _Sums(
            part.of_rows(dq), part.of_rows(dk, 1), part.of_rows(dv, 1), part.of_scores(dbias, call)
        )
        of_rows = part.of_rows(dout), part.of_statistics(delta), part.of_statistics(sums)
        for panel in tiles.panels(part.call, 0, finite, part.frame):
            for r, c in tiles.tiles(part.call, part.frame):
                _add_tile(panel, tiles.key_of(part.call), of_rows, gradients, r, c)
    return Grads(*made)


def _add_tile(panel: tiles.Panel, philox, of_rows, sums: _Sums, r: slice, c: slice) -> None:
    """Adds the gradients of one tile."""
    call = panel.call
    q, k, v = panel.of_queries(call.q, r), panel.of_keys(call.k), panel.of_keys(call.v)
    dout, delta, of_whole = (panel.of_queries(x, r) for x in of_rows)
    scores = tiles.scores(panel, q, k[:, :, c], r, c)
    base, rest = of_whole.unbind(-1)
    base = torch.where(base == -torch.inf, torch.inf, base)  # empty rows: P = 0
    p = torch.exp(scores.t - base[..., None] - rest[..., None])
    if scores.seen is not None:
        p = torch.where(scores.seen, p, 0.0)
    kept = tiles.dropout_factor(panel, philox, r, c)
    dp = panel.against(dout, v[:, :, c])
    dp = dp if kept is None else dp * kept
    dt = torch.where(p != 0, p * (dp - delta[..., None]), 0.0)
    if sums.bias is not None:
        into = panel.part(sums.bias, r, c)
        into.add_(dt.sum_to_size(into.shape))
    if sums.v is not None:
        weights = p if kept is None else p * kept
        sums.v[panel.b, panel.hk, c] += panel.transposed(weights, dout)
    dz = dt if scores.slope is None else torch.where(dt != 0, dt * scores.slope, 0.0)
    if sums.q is not None:
        sums.q[panel.b, panel.h, r] = panel.times(dz, k[:, :, c]).mul_(call.scale)
    if sums.k is not None:
        sums.k[panel.b, panel.hk, c] += panel.transposed(dz, q).mul_(call.scale)
