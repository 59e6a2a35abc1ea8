"""Checks of what tensors hold that say where a kernel reads: sequence starts, lengths and pages, on
the CPU.  Each message gives the argument, the rule and the value.
"""

from __future__ import annotations

import itertools

import torch


def cumulative(name: str, cu_seqlens: torch.Tensor, total: int) -> list[int]:
    """Check cu_seqlens (CPU): from 0, never falling, at most `total`.  Returns the lengths."""
    ends = cu_seqlens.tolist()
    if not ends:
        raise ValueError(f"{name} must have batch + 1 entries, got 0")
    if ends[0] != 0:
        raise ValueError(f"{name} must start at 0, got {ends[0]}")
    lengths = [b - a for a, b in itertools.pairwise(ends)]
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(
                f"{name} must not fall, got {ends[index]} then {ends[index + 1]} at {index + 1}"
            )
    if ends[-1] > total:
        raise ValueError(f"{name} must end at or before the {total} rows there are, got {ends[-1]}")
    return lengths


def lengths(name: str, seqlens: torch.Tensor, capacity: int, extra: int = 0) -> list[int]:
    """Check the values of cache_seqlens (CPU): each in [0, capacity - extra]."""
    listed = seqlens.tolist()
    for index, length in enumerate(listed):
        if not 0 <= length <= capacity - extra:
            room = f" with {extra} new rows" if extra else ""
            raise ValueError(
                f"{name} must be between 0 and {capacity - extra} (capacity {capacity}{room}), "
                f"got {length} at {index}"
            )
    return listed


def pages(block_table: torch.Tensor, used: list[int], page_size: int, num_pages: int) -> None:
    """Check the page numbers (CPU) that the used lengths reach; no others are ever read."""
    for row, length in zip(block_table.tolist(), used, strict=False):
        for page in row[: -(-length // page_size)]:
            if not 0 <= page < num_pages:
                raise ValueError(
                    f"block_table must hold pages between 0 and {num_pages - 1}, got {page}"
                )


def check(call) -> None:
    """Check the values that a kernel takes for addresses, where they can be read (CPU)."""
    if call.q.device.type != "cpu":
        return
    if call.cu_seqlens_q is not None:
        for name, cu, rows, longest in (
            ("cu_seqlens_q", call.cu_seqlens_q, call.q.shape[0], call.max_seqlen_q),
            ("cu_seqlens_k", call.cu_seqlens_k, call.k.shape[0], call.max_seqlen_k),
        ):
            most = max(cumulative(name, cu, rows), default=0)
            if most > longest:
                raise ValueError(
                    f"max_{name[3:-3]}_{name[-1]} must be at least {most}, got {longest}"
                )
    if call.seqlens_k is not None:
        name = "cache_seqlens" if call.w is None else "lengths"
        used = lengths(name, call.seqlens_k, call.max_seqlen_k)
        if call.block_table is not None:
            pages(call.block_table, used, call.k.shape[2], call.k.shape[0])
