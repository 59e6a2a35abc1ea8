"""Keys and values that go round: each rank keeps its queries, computes with the keys that are there
while the next ones travel, and merges.  In the backward dK and dV travel with their keys, in
float32, and come home after the last hop (Liu, Zaharia and Abbeel, 2023, arXiv 2310.01889).

Gathered keys are the other way: all keys come at once, dK and dV go back to their owners.
"""

from __future__ import annotations

import torch

from attn_ext.core.schema import statistics_dtype
from attn_ext.distributed import comm, local
from attn_ext.distributed.layout import Segment
from attn_ext.distributed.pieces import pieces


def _whole(layout) -> list[Segment]:
    return [Segment(d, 0, n) for d, n in enumerate(layout.lengths) if n]


class Ring:
    """One rank's place in the ring of a `attn_ext.distributed.plan.Plan`."""

    def __init__(self, plan, q, k, v, sides: local.Sides):
        self.plan, self.sides = plan, sides
        self.q, self.k, self.v = q, k, v
        self.group = comm.by_name(plan.group)
        self.rank, self.parts = comm.rank_of(self.group), comm.size_of(self.group)
        self.next, self.previous = (self.rank + 1) % self.parts, (self.rank - 1) % self.parts

    def owner(self, hop: int) -> int:
        """Whose keys are here at a hop."""
        return (self.rank - hop) % self.parts

    def shapes(self, owner: int) -> tuple:
        """Shapes of a rank's keys and values."""
        n = self.plan.layout.length(owner)
        return tuple((*x.shape[:2], n, x.shape[3]) for x in (self.k, self.v))

    def views(self, flat: torch.Tensor, owner: int) -> tuple:
        """(k, v) of one flat buffer."""
        of_k, of_v = self.shapes(owner)
        cut = torch.Size(of_k).numel()
        return flat[:cut].view(of_k), flat[cut:].view(of_v)

    def empty(self, owner: int, dtype) -> torch.Tensor:
        """A flat buffer for a rank's pair."""
        return self.q.new_empty(sum(torch.Size(s).numel() for s in self.shapes(owner)), dtype=dtype)

    def blocks(self, keys, k, v) -> list[local.Block]:
        """The calls of this rank's queries with keys of these segments."""
        plan = self.plan
        found = pieces(plan.layout, plan.layout.segments(self.rank), keys, plan.rules(self.sides))
        return local.blocks(found, self.q, k, v, self.sides, plan.scalars)

    def send(self, flat: torch.Tensor, hop: int, what: str) -> tuple[torch.Tensor, comm.Waiting]:
        """(buffer, operation) by which what is here at a hop goes on and the next one comes."""
        coming = self.empty(self.owner(hop + 1), flat.dtype)
        name = f"{what} of hop {hop + 1} of {self.parts}"
        return coming, comm.permute(flat, coming, self.next, self.previous, self.group, name)

    def hops(self):
        """(hop, k, v) of the keys that come by; the next ones travel meanwhile."""
        here = torch.cat([self.k.reshape(-1), self.v.reshape(-1)])
        for hop in range(self.parts):
            coming, moving = None, None
            if hop + 1 < self.parts:
                coming, moving = self.send(here, hop, "keys")
            yield hop, *self.views(here, self.owner(hop))
            if moving is not None:
                moving.wait()  # before the next hop reads what came
                here = coming

    def forward(self, out, sums) -> None:
        """Merges all hops into out and sums."""
        for hop, k, v in self.hops():
            keys = self.plan.layout.segments(self.owner(hop))
            local.forward(self.blocks(keys, k, v), out, sums, fresh=hop == 0)

    def backward(self, dout, delta, sums, dq, dbias) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds to dq and dbias; returns dK and dV of this rank's keys, in float32."""
        wide = statistics_dtype(self.q.dtype)
        travelling = self.plan.travelling(wide)
        coming = moving = None
        for hop, k, v in self.hops():
            owner = self.owner(hop)
            own = torch.zeros_like(self.empty(owner, wide))
            into = local.Gradients(dq, *self.views(own, owner), dbias)
            keys = self.plan.layout.segments(owner)
            local.backward(self.blocks(keys, k, v), dout, delta, sums, into)
            if moving is not None:
                moving.wait()  # before its sums are read
                own += coming
            # only now: what goes on holds this rank's part, too
            coming, moving = self.send(own.to(travelling), hop, "gradients of keys")
        moving.wait()
        return self.views(coming.to(wide), self.rank)


class Gathered(Ring):
    """All keys at once."""

    def _order(self) -> torch.Tensor:
        layout, device = self.plan.layout, self.q.device
        return torch.cat([layout.indices(r, device) for r in range(self.parts)])

    def _lengths(self) -> list[int]:
        return [self.plan.layout.length(r) for r in range(self.parts)]

    def _gather(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, S, D] in the order of positions."""
        width = x.shape[0] * x.shape[1] * x.shape[3]  # not -1: a rank may have no position
        rows = x.movedim(2, 0).reshape(x.shape[2], width)
        rows = comm.gather_rows(rows, self._lengths(), self.group, "the gather of keys")
        whole = torch.empty_like(rows)
        whole[self._order()] = rows
        shape = (rows.shape[0], x.shape[0], x.shape[1], x.shape[3])
        return whole.view(shape).permute(1, 2, 0, 3)

    def _scatter(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over ranks of [B, H, S, D], of which each rank gets its positions."""
        lengths = self._lengths()
        width = x.shape[0] * x.shape[1] * x.shape[3]
        rows = x.permute(2, 0, 1, 3).reshape(x.shape[2], width)[self._order()]
        rows = rows.to(self.plan.travelling(x.dtype))
        own = lengths[self.rank]
        came = comm.all_to_all(
            rows.reshape(-1), [n * width for n in lengths], [own * width] * self.parts,
            self.group, "the gradients of gathered keys",
        )  # fmt: skip
        found = came.view(self.parts, own, width).to(x.dtype).sum(0)
        return found.view(own, x.shape[0], x.shape[1], x.shape[3]).permute(1, 2, 0, 3)

    def forward(self, out, sums) -> None:
        found = self.blocks(_whole(self.plan.layout), self._gather(self.k), self._gather(self.v))
        local.forward(found, out, sums, fresh=True)

    def backward(self, dout, delta, sums, dq, dbias) -> tuple[torch.Tensor, torch.Tensor]:
        k, v = self._gather(self.k), self._gather(self.v)
        wide = statistics_dtype(self.q.dtype)
        dk, dv = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        found = self.blocks(_whole(self.plan.layout), k, v)
        local.backward(found, dout, delta, sums, local.Gradients(dq, dk, dv, dbias))
        return self._scatter(dk), self._scatter(dv)
