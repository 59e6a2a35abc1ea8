"""The paged biases of xformers.ops.fmha.attn_bias: block-diagonal ones whose keys lie in pages.

key, value [1, pages * page_size, ..., K]; key p of block i is at row
block_tables[i, p // page_size] * page_size + p % page_size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attn_ext.integrations.xformers import bias as biases
from attn_ext.integrations.xformers.bias import Blocks
from attn_ext.integrations.xformers.lengths import (
    GappySeqInfo,
    PaddedSeqLenInfo,
    SeqLenInfo,
    at_least,
    integers,
    intervals,
    starts,
    used,
)


@dataclass
class Paged(Blocks):
    """Blocks of keys in pages; block_tables int32 [blocks, pages of a block]."""

    block_tables: torch.Tensor
    page_size: int

    def __post_init__(self):
        at_least("page_size", self.page_size, 1)
        blocks, tables = len(starts(self.q_seqinfo)) - 1, self.block_tables
        if not isinstance(tables, torch.Tensor) or tables.dim() != 2 or len(tables) != blocks:
            got = tuple(tables.shape) if isinstance(tables, torch.Tensor) else type(tables).__name__
            raise ValueError(f"block_tables must be a tensor [{blocks}, pages], got {got}")
        if tables.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"block_tables must be int32 or int64, got {tables.dtype}")
        logical(self)  # which checks them

    def to(self, device):
        return type(self)(
            self.q_seqinfo, self.k_seqinfo, self.block_tables.to(device), self.page_size
        )

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        """[..., Mq, rows of all pages up to the last one listed]; shape ends with Mq and blocks *
        pages * page_size.  For tests.
        """
        sizes = (starts(self.q_seqinfo)[-1], self.block_tables.numel() * self.page_size)
        if tuple(shape[-2:]) != sizes:
            raise ValueError(f"shape must end with {sizes}, got {tuple(shape)}")
        pages = int(self.block_tables.max()) + 1 if self.block_tables.numel() else 0
        columns = pages * self.page_size
        mask = torch.full((sizes[0], columns), -torch.inf, dtype=dtype, device=device)
        queries = intervals(self.q_seqinfo)
        for (q0, q1), rows in zip(queries, rows_of_blocks(self), strict=True):
            mask[q0:q1, rows.to(device)] = self._block(q1 - q0, len(rows), dtype, device)
        return mask.expand(*shape[:-1], columns)


def logical(attn_bias) -> list[tuple[int, int]]:
    """(first, end) of the keys of each block, counted within its own pages; ValueError beyond them.
    Reads the fields that xformers' own objects have too.
    """
    info, tables, size = attn_bias.k_seqinfo, attn_bias.block_tables, attn_bias.page_size
    ends = used(info)
    first = [0] * len(ends)
    if "Gappy" in type(attn_bias).__name__:  # there seqlen is where a block ends
        first = starts(info)[: len(ends)]
    spans = list(zip(first, ends, strict=True))
    for index, (begin, end) in enumerate(spans):
        if not 0 <= begin <= end <= tables.shape[1] * size:
            raise ValueError(
                f"block_tables must have pages for the keys of block {index}, [{begin}, {end})"
                f", got {tables.shape[1]} of {size}"
            )
    return spans


def rows_of_blocks(attn_bias) -> list[torch.Tensor]:
    """int64 rows of key and value of each block."""
    size, tables = attn_bias.page_size, attn_bias.block_tables.long()
    rows = []
    for table, (first, end) in zip(tables, logical(attn_bias), strict=True):
        at = torch.arange(first, end, device=tables.device)
        rows.append(table[at // size] * size + at % size)
    return rows


@dataclass
class PagedBlockDiagonalPaddedKeysMask(Paged):
    """Block i uses the first kv_seqlen[i] keys of its pages."""

    _UNPAGED_TYPE = biases.BlockDiagonalPaddedKeysMask

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen, block_tables, page_size: int, *, device=None):
        """Of the lengths of queries and keys."""
        integers("q_seqlen", q_seqlen)
        integers("kv_seqlen", kv_seqlen)
        if len(q_seqlen) != len(kv_seqlen):
            raise ValueError(
                f"kv_seqlen must have q_seqlen's {len(q_seqlen)} entries, got {len(kv_seqlen)}"
            )
        lengths = integers("kv_seqlen", kv_seqlen)
        info = PaddedSeqLenInfo.from_seqlens_padded(lengths, max(lengths, default=0))
        return cls(SeqLenInfo.from_seqlens(q_seqlen), info, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetPaddedKeysMask(PagedBlockDiagonalPaddedKeysMask):
    """Padded keys in pages, each block causal, aligned bottom-right with the used keys."""

    _UNPAGED_TYPE = biases.BlockDiagonalCausalWithOffsetPaddedKeysMask
    causal = "bottom_right"


@dataclass
class PagedBlockDiagonalGappyKeysMask(Paged):
    """Block i uses kv_seqlen[i] keys from kv_seqstarts[i], counted within its own pages."""

    _UNPAGED_TYPE = biases.BlockDiagonalGappyKeysMask

    @classmethod
    def in_pages(cls, q_seqinfo, kv_seqstarts, kv_seqlen, block_tables, page_size: int):
        """Of the first keys and the numbers of keys."""
        first = integers("kv_seqstarts", kv_seqstarts)
        lengths = integers("kv_seqlen", kv_seqlen)
        if len(first) != len(lengths):
            raise ValueError(f"kv_seqstarts must have {len(lengths)} entries, got {len(first)}")
        info = GappySeqInfo.from_seqlens_gappy(first, lengths, True)
        return cls(q_seqinfo, info, block_tables, page_size)

    @classmethod
    def from_seqlens(
        cls, q_seqlen, kv_seqstarts, kv_seqlen, block_tables, page_size: int, *, device=None
    ):
        """Of the lengths of queries, and the first keys and numbers of keys."""
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen)
        return cls.in_pages(q_seqinfo, kv_seqstarts, kv_seqlen, block_tables, page_size)


@dataclass
class PagedBlockDiagonalCausalWithOffsetGappyKeysMask(PagedBlockDiagonalGappyKeysMask):
    """Gappy keys in pages, each block causal, aligned bottom-right with the used keys."""

    _UNPAGED_TYPE = biases.BlockDiagonalCausalWithOffsetGappyKeysMask
    causal = "bottom_right"


PUBLIC = (
    PagedBlockDiagonalCausalWithOffsetGappyKeysMask,
    PagedBlockDiagonalCausalWithOffsetPaddedKeysMask, PagedBlockDiagonalGappyKeysMask,
    PagedBlockDiagonalPaddedKeysMask,
)  # fmt: skip
__all__ = [kind.__name__ for kind in PUBLIC]
