"""Which rank has which positions of a sequence, or of documents that are packed one after the
other.

A layout is a list of segments for each rank: positions [first, last) of a document.  A rank's shard
of a tensor is its segments one after the other, in ascending order; lengths may be uneven, and a
rank may have nothing.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from attn_ext.core.validate import MAX_SEQLEN
from attn_ext.functional import tree

if TYPE_CHECKING:
    import torch.distributed as dist

BALANCES = ("zigzag", "contiguous")
MOST = 1 << 20  # ranks, and blocks of `striped`: more are a list that takes seconds to make


class Segment(NamedTuple):
    """Positions [first, last) of a document."""

    document: int
    first: int
    last: int

    @property
    def length(self) -> int:
        return self.last - self.first


def _chunks(length: int, count: int) -> list[tuple[int, int]]:
    """[0, length) in `count` ranges whose lengths differ by at most one."""
    ends = [length * i // count for i in range(count + 1)]
    return list(itertools.pairwise(ends))


def _joined(segments) -> tuple[Segment, ...]:
    """Segments in ascending order; empty ones are dropped, neighbours become one."""
    found: list[Segment] = []
    for segment in sorted(s for s in segments if s.length > 0):
        last = found[-1] if found else None
        if last is not None and (last.document, last.last) == segment[:2]:
            found[-1] = last._replace(last=segment.last)
        else:
            found.append(segment)
    return tuple(found)


def _positive(name: str, value, low: int, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__} {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
    return value


@dataclass(frozen=True)
class Layout:
    """Made by `contiguous`, `zigzag`, `striped` or `packed`.

    zigzag cuts a sequence into 2 P chunks, of which rank r has r and 2 P - 1 - r: causal work is
    the same for all.  striped deals blocks of positions round.  packed takes documents of any
    lengths, as `attention_varlen` does.
    """

    lengths: tuple[int, ...]  # of the documents; one of them unless packed
    shards: tuple[tuple[Segment, ...], ...]  # of each rank
    is_packed: bool = False

    @classmethod
    def contiguous(cls, seqlen: int, parts: int) -> Layout:
        """Rank r has the r-th of `parts` equal ranges."""
        _positive("seqlen", seqlen, 0, MAX_SEQLEN), _positive("parts", parts, 1, MOST)
        return cls((seqlen,), tuple(_joined([Segment(0, *c)]) for c in _chunks(seqlen, parts)))

    @classmethod
    def zigzag(cls, seqlen: int, parts: int) -> Layout:
        """Of 2 P chunks rank r has r and 2 P - 1 - r."""
        _positive("seqlen", seqlen, 0, MAX_SEQLEN), _positive("parts", parts, 1, MOST)
        chunks = [Segment(0, *c) for c in _chunks(seqlen, 2 * parts)]
        return cls((seqlen,), tuple(_joined([chunks[r], chunks[-1 - r]]) for r in range(parts)))

    @classmethod
    def striped(cls, seqlen: int, parts: int, block: int = 128) -> Layout:
        """Block i of `block` positions is rank i % parts'.  There are at most 2^20 blocks, so that
        more than 2^27 positions need a larger block than 128."""
        _positive("seqlen", seqlen, 0, MAX_SEQLEN), _positive("parts", parts, 1, MOST)
        if seqlen > MOST * _positive("block", block, 1):
            least = -(-seqlen // MOST)
            raise ValueError(f"block must be at least {least} for {seqlen} positions, got {block}")
        blocks = [Segment(0, i, min(i + block, seqlen)) for i in range(0, seqlen, block)]
        return cls((seqlen,), tuple(_joined(blocks[r::parts]) for r in range(parts)))

    @classmethod
    def packed(cls, cu_seqlens, parts: int, balance: str = "zigzag") -> Layout:
        """Documents that begin at cu_seqlens [documents + 1].  zigzag cuts each into 2 P chunks;
        contiguous cuts the whole row of tokens into P ranges."""
        _positive("parts", parts, 1, MOST)
        if balance not in BALANCES:
            raise ValueError(f"balance must be one of {', '.join(BALANCES)}, got {balance!r}")
        starts = tree.integers("cu_seqlens", cu_seqlens)
        if not starts or starts[0] != 0 or any(b < a for a, b in itertools.pairwise(starts)):
            raise ValueError(f"cu_seqlens must begin at 0 and never fall, got {starts}")
        lengths = tuple(b - a for a, b in itertools.pairwise(starts))
        _positive("a document of cu_seqlens", max(lengths, default=0), 0, MAX_SEQLEN)
        deal = _zigzag_documents if balance == "zigzag" else _cut_documents
        return cls(lengths, tuple(map(_joined, deal(lengths, parts))), True)

    @property
    def parts(self) -> int:
        """The number of ranks."""
        return len(self.shards)

    @property
    def seqlen(self) -> int:
        """Positions of all documents."""
        return sum(self.lengths)

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """What a rank has, in its order."""
        if not 0 <= rank < self.parts:
            raise ValueError(f"rank must be between 0 and {self.parts - 1}, got {rank}")
        return self.shards[rank]

    def length(self, rank: int) -> int:
        """Positions that a rank has."""
        return sum(s.length for s in self.segments(rank))

    def position_ids(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """int64 [S_local], the position of each of a rank's tokens in its document."""
        return _counted([(s.first, s.last) for s in self.segments(rank)], device)

    def indices(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """int64 [S_local], the place of each of a rank's tokens in the whole row of tokens."""
        return _counted([self.columns(s) for s in self.segments(rank)], device)

    def columns(self, segment: Segment) -> tuple[int, int]:
        """The range of a segment in the whole row of tokens."""
        start = self._starts[segment.document]
        return start + segment.first, start + segment.last

    @functools.cached_property
    def _starts(self) -> list[int]:
        return [sum(self.lengths[:i]) for i in range(len(self.lengths) + 1)]

    def cu_seqlens(self, rank: int, device: torch.device | str | None = None) -> torch.Tensor:
        """int32 [documents + 1], where each document begins among a rank's tokens."""
        own = [0] * len(self.lengths)
        for s in self.segments(rank):
            own[s.document] += s.length
        ends = torch.tensor([0, *own], dtype=torch.int64, device="cpu").cumsum(0)
        return ends.to(torch.int32).to(device)

    def shard(self, x: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
        """A rank's part of a whole tensor; differentiable."""
        if x.shape[dim] != self.seqlen:
            raise ValueError(
                f"x must have {self.seqlen} positions in dim {dim}, got {tuple(x.shape)}"
            )
        cuts = [self.columns(s) for s in self.segments(rank)]
        parts = [x.narrow(dim, first, last - first) for first, last in cuts]
        return torch.cat(parts, dim) if parts else x.narrow(dim, 0, 0)

    def unshard(self, x: torch.Tensor, dim: int, group: dist.ProcessGroup | None) -> torch.Tensor:
        """The whole tensor on every rank of the group, from each rank's part; no gradients."""
        from attn_ext.distributed import agree, comm

        group = comm.one_group(group, "group")
        rank = comm.rank_of(group)
        if comm.size_of(group) != self.parts:
            raise ValueError(f"group must have {self.parts} ranks, got {comm.size_of(group)}")
        own = self.length(rank)
        if x.shape[dim] != own:
            raise ValueError(f"x must have {own} positions in dim {dim}, got {tuple(x.shape)}")
        moved = x.detach().movedim(dim, 0)
        lengths = [self.length(r) for r in range(self.parts)]
        width = math.prod(moved.shape[1:])
        agree.alike(group, "unshard", {"numbers of a position": width}, x.dtype, self.fingerprint)
        with comm.announced([group]):
            rows = comm.gather_rows(moved.reshape(own, width), lengths, group)
        whole = torch.empty_like(rows)
        whole[torch.cat([self.indices(r, x.device) for r in range(self.parts)])] = rows
        return whole.view(self.seqlen, *moved.shape[1:]).movedim(0, dim)

    def shift_labels(self, labels: torch.Tensor, rank: int, ignore: int = -100) -> torch.Tensor:
        """A rank's labels [..., S_local] of the next token, from the whole labels [..., S]: the
        last token of each document has none."""
        if labels.shape[-1] != self.seqlen:
            raise ValueError(f"labels must have {self.seqlen} positions, got {tuple(labels.shape)}")
        shifted = torch.full_like(labels, ignore)
        shifted[..., :-1] = labels[..., 1:]
        ends = [end - 1 for end, n in zip(self._starts[1:], self.lengths, strict=True) if n]
        shifted[..., torch.tensor(ends, dtype=torch.long, device=labels.device)] = ignore
        return self.shard(shifted, -1, rank)

    def grouped(self, size: int) -> Layout:
        """The layout of groups of `size` neighbouring ranks, each of which has all of theirs."""
        if size < 1 or self.parts % size:
            raise ValueError(f"size must divide the {self.parts} ranks of the layout, got {size}")
        if size == 1:
            return self
        if size not in self._grouped:
            groups = [self.shards[i : i + size] for i in range(0, self.parts, size)]
            shards = tuple(_joined(sum(g, ())) for g in groups)
            self._grouped[size] = Layout(self.lengths, shards, self.is_packed)
        return self._grouped[size]

    @functools.cached_property
    def _grouped(self) -> dict[int, Layout]:
        return {}

    @functools.cached_property
    def fingerprint(self) -> str:
        """The same for equal layouts on all ranks."""
        text = repr((self.lengths, [[tuple(s) for s in shard] for shard in self.shards]))
        return hashlib.sha256((text + str(self.is_packed)).encode()).hexdigest()

    def causal_work(self, rank: int) -> int:
        """Pairs of a query of this rank and a key that it sees, with causal attention."""
        ends = [(s.first, s.last) for s in self.segments(rank)]
        return sum((b * (b + 1) - a * (a + 1)) // 2 for a, b in ends)


def _counted(ranges, device) -> torch.Tensor:
    parts = [torch.arange(a, b, device=device) for a, b in ranges]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def _zigzag_documents(lengths: Sequence[int], parts: int) -> list[list[Segment]]:
    """2 P chunks of each document; chunks that are one longer go to ranks with less work so far."""
    shards: list[list[Segment]] = [[] for _ in range(parts)]
    work = [0] * parts
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        base, rest = divmod(lengths[document], 2 * parts)
        owners = [*range(parts), *reversed(range(parts))]
        order = sorted(range(2 * parts), key=lambda c: (work[owners[c]], -c))
        longer = set(order[:rest])
        first = 0
        for chunk, owner in enumerate(owners):
            last = first + base + (chunk in longer)
            shards[owner].append(Segment(document, first, last))
            work[owner] += (last * (last + 1) - first * (first + 1)) // 2
            first = last
    return shards


def _cut_documents(lengths: Sequence[int], parts: int) -> list[list[Segment]]:
    """The row of all tokens in P ranges."""
    shards: list[list[Segment]] = []
    for low, high in _chunks(sum(lengths), parts):
        own, start = [], 0
        for document, length in enumerate(lengths):
            first, last = max(low - start, 0), min(high - start, length)
            if first < last:
                own.append(Segment(document, first, last))
            start += length
        shards.append(own)
    return shards
