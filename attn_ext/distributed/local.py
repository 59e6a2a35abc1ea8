"""What one rank computes: its queries against keys that are there, piece by piece."""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_ext.backends.sums import of_lse
from attn_ext.core.schema import UNBOUNDED, Call, Frame, Needs, statistics_dtype
from attn_ext.distributed.pieces import Piece, rounds
from attn_ext.ops import parts


class Scalars(NamedTuple):
    """The numbers of a call that every piece has."""

    scale: float | None
    softcap: float
    dropout_p: float
    left: int
    right: int
    deterministic: bool
    backend: str
    packed: bool
    first_b: int = 0  # of a larger call, as which dropout counts these
    first_h: int = 0


class Sides(NamedTuple):
    """The tensors beside q, k and v.  mask, bias [.., S_local or 1, S or 1]."""

    mask: torch.Tensor | None
    bias: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    rng_state: torch.Tensor | None


class Block(NamedTuple):
    """One call of a kernel, and the rows of the shard that it is of."""

    call: Call
    q: slice | None  # None: all rows, packed
    k: slice | None
    piece: Piece | None = None

    def rows(self, x: torch.Tensor, at: int = 0) -> torch.Tensor:
        """The call's part of a tensor like q (at = 0) or k (1) of the shard."""
        where = self.k if at else self.q
        return x[0].transpose(0, 1) if where is None else x[:, :, where]

    def statistics(self, x: torch.Tensor) -> torch.Tensor:
        """The call's part of a tensor [B, Hq, S_local, ...]."""
        return x[0] if self.q is None else x[:, :, self.q]

    def as_dense(self, x: torch.Tensor) -> torch.Tensor:
        """A result of the call in the shard's dimensions."""
        return x.transpose(0, 1)[None] if self.q is None else x


def blocks(pieces: list[Piece], q, k, v, sides: Sides, scalars: Scalars) -> list[Block]:
    """The calls of these pieces.  Those of packed sequences become few, where each document needs
    no mask or bias of its own."""
    if scalars.packed and sides.mask is None and sides.bias is None:
        return [_packed(group, q, k, v, sides, scalars) for group in rounds(pieces)]
    return [_dense(piece, q, k, v, sides, scalars) for piece in pieces]


def _scores(x, piece: Piece):
    """The piece's part of a mask or bias, as a view."""
    if x is None:
        return None
    x = x if x.shape[2] == 1 else x[:, :, slice(*piece.q)]
    return x if x.shape[3] == 1 else x[..., slice(*piece.columns)]


def _slopes(slopes, document: int, packed: bool):
    """[Hq] or [B, Hq]; of packed sequences those of one document."""
    return slopes[document] if packed and slopes is not None and slopes.dim() == 2 else slopes


def _common(scalars: Scalars, sides: Sides, banded: bool) -> dict:
    return dict(
        scale=scalars.scale, softcap=scalars.softcap, dropout_p=scalars.dropout_p,
        window_left=scalars.left if banded else UNBOUNDED,
        window_right=scalars.right if banded else UNBOUNDED,
        rng_state=sides.rng_state, deterministic=scalars.deterministic, backend=scalars.backend,
    )  # fmt: skip


def _frame(piece: Piece, document: int, scalars: Scalars) -> Frame:
    q_first, k_first, whole = piece.frame
    return Frame(document, scalars.first_h, q_first, k_first, whole, whole)


def _dense(piece: Piece, q, k, v, sides: Sides, scalars: Scalars) -> Block:
    rows, keys = slice(*piece.q), slice(*piece.k)
    frame = None
    if piece.frame is not None:
        batch = range(scalars.first_b, scalars.first_b + q.shape[0])
        documents = [piece.document] if scalars.packed else batch
        frame = [_frame(piece, document, scalars) for document in documents]
        frame = torch.tensor(frame, dtype=torch.int32, device=q.device)
    call = Call(
        q=q[:, :, rows], k=k[:, :, keys], v=v[:, :, keys],
        mask=_scores(sides.mask, piece), bias=_scores(sides.bias, piece),
        alibi_slopes=_slopes(sides.alibi_slopes, piece.document, scalars.packed), frame=frame,
        max_seqlen_q=piece.q[1] - piece.q[0], max_seqlen_k=piece.k[1] - piece.k[0],
        **_common(scalars, sides, piece.banded),
    )  # fmt: skip
    return Block(call, rows, keys, piece)


def _packed(group: list[Piece], q, k, v, sides: Sides, scalars: Scalars) -> Block:
    """Many pieces as one packed call.  What lies between them are sequences without keys, and
    sequences without queries."""
    starts_q, starts_k, own = [0], [0], []

    def sequence(q_end: int, k_end: int, piece: Piece | None) -> None:
        if piece is None and (q_end, k_end) == (starts_q[-1], starts_k[-1]):
            return
        starts_q.append(q_end), starts_k.append(k_end), own.append(piece)

    for piece in group:
        sequence(piece.q[0], starts_k[-1], None)
        sequence(piece.q[0], piece.k[0], None)
        sequence(piece.q[1], piece.k[1], piece)
    sequence(q.shape[2], starts_k[-1], None)
    device, frame, slopes = q.device, None, sides.alibi_slopes
    if group[0].frame is not None:
        nowhere = Frame(0, 0, 0, 0, 0, 0)
        frame = [nowhere if p is None else _frame(p, p.document, scalars) for p in own]
        frame = torch.tensor(frame, dtype=torch.int32, device=device)
    if slopes is not None and slopes.dim() == 2:
        slopes = slopes[[0 if p is None else p.document for p in own]]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32, device=device) for x in (starts_q, starts_k))
    call = Call(
        q=q[0].transpose(0, 1), k=k[0].transpose(0, 1), v=v[0].transpose(0, 1),
        alibi_slopes=slopes, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, frame=frame,
        max_seqlen_q=max(p.q[1] - p.q[0] for p in group),
        max_seqlen_k=max(p.k[1] - p.k[0] for p in group),
        **_common(scalars, sides, group[0].banded),
    )  # fmt: skip
    longest_q, longest_k = (int(x.diff().max()) for x in (cu_q, cu_k))
    return Block(call._replace(max_seqlen_q=longest_q, max_seqlen_k=longest_k), None, None)


def forward(found: list[Block], out, sums, fresh: bool = False) -> None:
    """Merges what the blocks give into out [B, Hq, S_local, Dv] and sums [B, Hq, S_local, 2]
    (`attn_ext.ops.parts`).  fresh: nothing is there yet, so that the first part of some rows is
    copied."""
    done: list[tuple[int, int]] = []
    for block in found:
        part, part_sums = parts.forward_partial(block.call)
        into = block.statistics(sums)
        into = into if block.q is not None else into[None]
        rows = out if block.q is None else out[:, :, block.q]
        part_sums = part_sums[None] if block.q is None else part_sums
        first, last, _ = (slice(None) if block.q is None else block.q).indices(out.shape[2])
        if fresh and not any(a < last and first < b for a, b in done):
            rows.copy_(block.as_dense(part)), into.copy_(part_sums)
        else:
            parts.merge(rows, into, block.as_dense(part), part_sums)
        done.append((first, last))


class Gradients(NamedTuple):
    """Gradients in the statistics' dtype that blocks add to; None where one is not wanted."""

    q: torch.Tensor | None
    k: torch.Tensor | None
    v: torch.Tensor | None
    bias: torch.Tensor | None


def backward(found: list[Block], dout, delta, sums, into: Gradients) -> None:
    """Adds the gradients that the blocks give; sums: of whole rows."""
    needs = Needs(*[x is not None for x in into])
    for block in found:
        rows = block.rows(dout), block.statistics(delta), block.statistics(sums)
        grads = parts.backward_partial(block.call, *rows, needs)
        for name, at in (("q", 0), ("k", 1), ("v", 1)):
            total, grad = getattr(into, name), getattr(grads, name)
            if total is not None:
                block.rows(total, at).add_(grad)
        if into.bias is not None:
            _scores(into.bias, block.piece).add_(grads.bias)


def no_rows(q, v) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, sums) of queries that have seen no key yet."""
    dtype = statistics_dtype(q.dtype)
    out = q.new_zeros((*q.shape[:-1], v.shape[-1]), dtype=dtype)
    return out, of_lse(q.new_full(q.shape[:-1], -torch.inf, dtype=dtype))


def add_sink(out, sums, sink) -> None:
    """The sink joins the normaliser of all rows that see a key, in place."""
    logits = sink.to(sums.dtype)[None, :, None].expand(sums.shape[:-1])
    empty = sums[..., 0] == -torch.inf
    logits = logits.masked_fill(empty, -torch.inf)
    parts.merge(out, sums, torch.zeros_like(out), of_lse(logits))


def sink_gradient(sink, sums, delta) -> torch.Tensor:
    """-sum over rows of exp(sink - LSE) delta."""
    base, rest = sums.unbind(-1)
    weight = torch.exp(sink.to(sums.dtype)[None, :, None] - base - rest)
    weight = torch.where(base == -torch.inf, 0.0, weight)
    return -(weight * delta).sum((0, 2))
