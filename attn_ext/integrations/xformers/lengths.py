"""Where the blocks of xformers' block-diagonal biases begin, and how many rows each of them uses.

seqstart int32 [blocks + 1] and seqlen int32 [blocks], beside the same numbers as lists.  Loops of
decoding write into these tensors between two calls, so that a call goes by the tensors:
`starts`, `used` and `intervals` read them, in the classes here and in xformers' own.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate

import torch


def integers(name: str, values: Iterable[int], low: int = 0) -> list[int]:
    """`values` as ints of Python."""
    if isinstance(values, torch.Tensor):
        raise TypeError(f"{name} must be a sequence of ints, got a tensor")
    if not isinstance(values, Iterable) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of ints, got {type(values).__name__}")
    found = []
    for value in values:
        whole = not isinstance(value, (bool, torch.Tensor)) and hasattr(value, "__index__")
        if not whole or value < low:
            raise ValueError(f"{name} must hold ints of at least {low}, got {value!r}")
        found.append(value if type(value) is int else operator.index(value))
    return found


def at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")


def _int32(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cpu")


def _written(tensor: torch.Tensor) -> bool:
    """Whether its numbers may have changed since it was made; a tensor of a GPU is read, which
    waits, only where they have."""
    return tensor.device.type == "cpu" or tensor.is_inference() or tensor._version > 0


def _numbers(info, name: str) -> list[int]:
    """The tensor info.seqstart or info.seqlen as a list."""
    tensor, listed = getattr(info, name, None), getattr(info, name + "_py")
    if not isinstance(tensor, torch.Tensor):
        return listed
    if torch.compiler.is_compiling():  # a graph has the numbers as constants
        same = (tensor == torch.tensor(listed, dtype=tensor.dtype, device=tensor.device)).all()
        torch._assert_async(same, f"{name} was written in place: compiled code needs a new bias")
        return listed
    return tensor.tolist() if _written(tensor) else listed


def starts(info) -> list[int]:
    """The first row of each block, and the number of rows."""
    return _numbers(info, "seqstart")


def used(info) -> list[int]:
    """The rows that each block uses, or, of gappy keys in pages, where it ends."""
    return _numbers(info, "seqlen")


def intervals(info) -> list[tuple[int, int]]:
    """(first, end) of the rows that each block uses."""
    first = starts(info)
    if not hasattr(info, "seqlen_py"):
        ends = first[1:]
    else:
        ends = [a + b for a, b in zip(first[:-1], used(info), strict=True)]
        room = getattr(info, "padding", None)
        for index, end in enumerate(ends):
            limit = first[-1] if room is None else first[index] + room
            if not first[index] <= end <= limit:
                raise ValueError(
                    f"kv_seqlen must be between 0 and the {limit - first[index]} rows from where "
                    f"block {index} begins, got {end - first[index]}"
                )
    return list(zip(first[:-1], ends, strict=True))


@dataclass
class SeqLenInfo:
    """Blocks one after the other: block i is [seqstart[i], seqstart[i + 1])."""

    seqstart: torch.Tensor = field(compare=False)
    max_seqlen: int
    min_seqlen: int
    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens, *, device=None):
        """Of the lengths; they are kept on the host."""
        lengths = integers("seqlens", seqlens)
        first = [0, *accumulate(lengths)]
        return cls(_int32(first), max(lengths, default=-1), min(lengths, default=-1), first)

    def from_seqlens_inplace(self, seqlens) -> None:
        """Other lengths of as many blocks."""
        _write(self, "seqlens", seqlens, lambda lengths: {"seqstart": [0, *accumulate(lengths)]})

    def to(self, device):
        """The same: lengths are kept on the host."""
        return self

    def intervals(self) -> list[tuple[int, int]]:
        """(first, end) of each block."""
        return intervals(self)

    def split(self, x, batch_sizes=None) -> list[torch.Tensor]:
        """x [1, total, ...] as a list of [batch, length, ...]."""
        first = starts(self)
        if x.shape[0] != 1 or x.shape[1] != first[-1]:
            raise ValueError(f"x must have shape [1, {first[-1]}, ...], got {tuple(x.shape)}")
        batch_sizes = batch_sizes or [1] * (len(first) - 1)
        parts, at = [], 0
        for batch in batch_sizes:
            part = x[:, first[at] : first[at + batch]]
            parts.append(part.reshape(batch, -1, *x.shape[2:]))
            at += batch
        return parts


def _write(info, name: str, seqlens, made) -> None:
    """Writes other numbers into the tensors and lists of `info`; made(lengths) are these."""
    lengths = integers(name, seqlens)
    blocks = len(info.seqstart_py) - 1
    if len(lengths) != blocks or max(lengths, default=-1) > info.max_seqlen:
        raise ValueError(
            f"{name} must hold {blocks} lengths of at most {info.max_seqlen}, got {lengths}"
        )
    for attribute, numbers in made(lengths).items():
        getattr(info, attribute).copy_(_int32(numbers))
        getattr(info, attribute + "_py")[:] = numbers


@dataclass
class PaddedSeqLenInfo(SeqLenInfo):
    """Blocks of `padding` rows each, of which block i uses the first seqlen[i]."""

    seqlen: torch.Tensor = field(compare=False)
    seqlen_py: list[int]
    padding: int

    @classmethod
    def from_seqlens(cls, seqlens, *, device=None):
        raise RuntimeError("use from_seqlens_padded, which takes the room of a block")

    @classmethod
    def from_seqlens_padded(cls, seqlens, padding, *, device=None):
        """Of the used lengths and the room of a block."""
        lengths = integers("kv_seqlen", seqlens)
        longest = max(lengths, default=0)
        at_least("kv_padding", padding, longest)
        first = [i * padding for i in range(len(lengths) + 1)]
        shortest = min(lengths, default=0)
        return cls(_int32(first), longest, shortest, first, _int32(lengths), lengths, padding)

    def from_seqlens_padded_inplace(self, seqlens) -> None:
        """Other used lengths of as many blocks."""
        _write(self, "seqlens", seqlens, lambda lengths: {"seqlen": lengths})

    def split(self, x, batch_sizes=None):
        raise NotImplementedError("keys with room between the blocks cannot be split")


@dataclass
class GappySeqInfo(SeqLenInfo):
    """Blocks that begin anywhere, at seqstart[i], and use seqlen[i] rows.  In pages seqstart counts
    within the block and seqlen is where it ends."""

    seqlen: torch.Tensor = field(compare=False)
    seqlen_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens, *, device=None):
        raise NotImplementedError("use from_seqlens_gappy, which takes where blocks begin")

    @classmethod
    def from_seqlens_gappy(cls, seqstarts, seqlens, paged: bool, *, device=None):
        """Of where blocks begin, and, unless `paged`, the number of rows, and the used lengths."""
        first = integers("kv_seqstarts", seqstarts)
        ends = lengths = integers("kv_seqlen", seqlens)
        if paged:
            ends = [a + b for a, b in zip(first, lengths, strict=True)]
            first = [*first, -1]
        longest, shortest = max(lengths, default=0), min(lengths, default=0)
        return cls(_int32(first), longest, shortest, first, _int32(ends), ends)

    def split(self, x, batch_sizes=None):
        raise NotImplementedError("keys with room between the blocks cannot be split")
