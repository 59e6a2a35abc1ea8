"""Rows against heads (DeepSpeed-Ulysses, Jacobs et al., 2023, arXiv 2309.14509): a rank gives its
rows of all heads and gets all rows of its heads, in the order of positions.

Where ranks outnumber the heads and divide by them, neighbouring ranks get the same head; on the way
back, which is that of gradients, what they give is added up.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_ext.distributed import comm
from attn_ext.distributed.layout import Layout
from attn_ext.distributed.names import Names


@dataclass(frozen=True)
class Heads:
    """The exchange of one group: rank i of it is rank first + i of the layout."""

    layout: Layout
    group: str
    first: int

    @classmethod
    def of(cls, name: str) -> Heads:
        """The exchange of a name."""
        return _known.get(name)

    def name(self, keep: bool = False) -> str:
        """Under which `of` finds it; keep: for ever."""
        return _known.put(f"{self.layout.fingerprint} {self.group} {self.first}", self, keep)

    def _place(self) -> tuple:
        group = comm.by_name(self.group)
        size = comm.size_of(group)
        return group, comm.rank_of(group), [self.layout.length(self.first + r) for r in range(size)]

    def _order(self, size: int, device) -> torch.Tensor:
        """Of the group's rows, one rank after the other: their order by position."""
        ranks = range(self.first, self.first + size)
        return torch.cat([self.layout.indices(r, device) for r in ranks]).argsort()

    def ranges(self, heads: int, size: int) -> list[tuple[int, int]]:
        """The heads of each rank."""
        share = max(heads // size, 1)
        return [(r * heads // size, r * heads // size + share) for r in range(size)]

    def shape_of_heads(self, x) -> tuple:
        _, _, lengths = self._place()
        return x.shape[0], max(x.shape[1] // len(lengths), 1), sum(lengths), x.shape[3]

    def shape_of_rows(self, x, heads: int) -> tuple:
        _, rank, lengths = self._place()
        return x.shape[0], heads, lengths[rank], x.shape[3]

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, S_local, D] -> [B, heads of this rank, S, D]"""
        group, rank, lengths = self._place()
        ranges = self.ranges(x.shape[1], len(lengths))
        batch, share, width = x.shape[0], ranges[0][1] - ranges[0][0], x.shape[3]
        rows = x.permute(2, 1, 0, 3)  # [S_local, H, B, D]
        send = torch.cat([rows[:, a:b].reshape(-1) for a, b in ranges])
        line = share * batch * width
        came = comm.all_to_all(
            send, [lengths[rank] * line] * len(lengths), [n * line for n in lengths], group,
            "the exchange of rows for heads",
        )  # fmt: skip
        whole = came.view(sum(lengths), line)[self._order(len(lengths), x.device)]
        return whole.view(-1, share, batch, width).permute(2, 1, 0, 3).contiguous()

    def to_rows(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        """[B, heads of this rank, S, D] -> [B, H, S_local, D], replicas of a head added up."""
        group, rank, lengths = self._place()
        batch, share, width = x.shape[0], x.shape[1], x.shape[3]
        line = share * batch * width
        by_position = x.permute(2, 1, 0, 3).reshape(-1, line)
        rows = torch.empty_like(by_position)
        rows[self._order(len(lengths), x.device)] = by_position
        came = comm.all_to_all(
            rows.reshape(-1), [n * line for n in lengths], [lengths[rank] * line] * len(lengths),
            group, "the exchange of heads for rows",
        )  # fmt: skip
        parts = came.view(len(lengths), lengths[rank], share, batch, width)
        wide = torch.promote_types(x.dtype, torch.float32)
        out = x.new_zeros((lengths[rank], heads, batch, width), dtype=wide)
        for part, (a, b) in zip(parts, self.ranges(heads, len(lengths)), strict=True):
            out[:, a:b] += part
        return out.to(x.dtype).permute(2, 1, 0, 3).contiguous()


_known: Names[Heads] = Names()
