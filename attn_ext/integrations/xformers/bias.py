"""The attention biases of xformers.ops.fmha.attn_bias: names, constructors and meanings.

Each says which pairs are visible through `causal` (False, "top_left" or "bottom_right") and
`window` (left, right), both per block where there are blocks, and through `materialize`, the dense
additive tensor for tests.  A causal "window_size" counts the query itself: left = window_size - 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

UNBOUNDED = (None, None)


def integers(name: str, values: Sequence[int], low: int = 0) -> list[int]:
    if isinstance(values, torch.Tensor):
        raise TypeError(f"{name} must be a sequence of ints, got a tensor")
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of ints, got {type(values).__name__}")
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"{name} must hold ints of at least {low}, got {value!r}")
    return list(values)


def at_least(name: str, value: int, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an int of at least {low}, got {value!r}")


class AttentionBias:
    """Base of the biases."""

    causal = False
    window = UNBOUNDED

    def to(self, device):
        """The same bias; lengths are kept on the host."""
        return self

    def materialize(self, shape, dtype=torch.float32, device="cpu") -> torch.Tensor:
        """The dense additive tensor of `shape` [..., Mq, Mk]: 0 or -inf.  For tests."""
        return self._block(shape[-2], shape[-1], dtype, device).expand(shape)

    def _block(self, rows: int, cols: int, dtype, device) -> torch.Tensor:
        """0 where query i of `rows` sees key j of `cols`, else -inf."""
        shift = 0 if self.causal == "top_left" else cols - rows
        i = torch.arange(rows, device=device)[:, None] + shift
        j = torch.arange(cols, device=device)[None]
        left, right = self.window
        right = 0 if self.causal else right
        hidden = torch.zeros(rows, cols, dtype=torch.bool, device=device)
        if left is not None:
            hidden |= j < i - left
        if right is not None:
            hidden |= j > i + right
        zeros = torch.zeros(rows, cols, dtype=dtype, device=device)
        return zeros.masked_fill(hidden, -torch.inf)


class LowerTriangularMask(AttentionBias):
    """Causal, aligned top-left."""

    causal = "top_left"

    def __init__(self, device=None):
        del device

    def add_bias(self, bias) -> LowerTriangularMaskWithTensorBias:
        """This mask and an additive tensor."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """Causal, aligned top-left, with an additive tensor (differentiable)."""

    def __init__(self, bias):
        self._bias = bias

    def to(self, device):
        return LowerTriangularMaskWithTensorBias(self._bias.to(device))

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        return super().materialize(shape, dtype, device) + self._bias


class LowerTriangularFromBottomRightMask(AttentionBias):
    """Causal, aligned bottom-right."""

    causal = "bottom_right"

    def make_local_attention(self, window_size: int):
        """Causal with at most `window_size` keys a query."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


class _CausalWindow:
    """`window` of a causal bias whose _window_size keys end at the diagonal."""

    @property
    def window(self):
        return (self._window_size - 1, None)


@dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(
    _CausalWindow, LowerTriangularFromBottomRightMask
):
    """Causal, aligned bottom-right, at most _window_size keys a query."""

    _window_size: int

    def __post_init__(self):
        at_least("window_size", self._window_size, 1)


@dataclass
class LocalAttentionFromBottomRightMask(AttentionBias):
    """Keys from window_left before to window_right after the bottom-right diagonal, inclusive."""

    window_left: int
    window_right: int

    def __post_init__(self):
        at_least("window_left", self.window_left, 0)
        at_least("window_right", self.window_right, 0)

    @property
    def window(self):
        return (self.window_left, self.window_right)


@dataclass
class SeqLenInfo:
    """Blocks one after the other: block i is [seqstart_py[i], seqstart_py[i + 1])."""

    seqstart_py: list[int]

    @classmethod
    def from_seqlens(cls, seqlens, *, device=None):
        starts = [0]
        for length in integers("seqlens", seqlens):
            starts.append(starts[-1] + length)
        return cls(starts)

    @property
    def seqstart(self) -> torch.Tensor:
        """int32 [blocks + 1]"""
        return torch.tensor(self.seqstart_py, dtype=torch.int32, device="cpu")

    @property
    def max_seqlen(self) -> int:
        return max((b - a for a, b in self.intervals()), default=-1)

    @property
    def min_seqlen(self) -> int:
        return min((b - a for a, b in self.intervals()), default=-1)

    def to(self, device):
        return self

    def intervals(self) -> list[tuple[int, int]]:
        """(first, end) of each block."""
        return list(zip(self.seqstart_py[:-1], self.seqstart_py[1:], strict=True))

    def split(self, x, batch_sizes=None) -> list[torch.Tensor]:
        """x [1, total, ...] as a list of [batch, length, ...]."""
        if x.shape[0] != 1 or x.shape[1] != self.seqstart_py[-1]:
            raise ValueError(
                f"x must have shape [1, {self.seqstart_py[-1]}, ...], got {tuple(x.shape)}"
            )
        batch_sizes = batch_sizes or [1] * (len(self.seqstart_py) - 1)
        parts, at = [], 0
        for batch in batch_sizes:
            first, end = self.seqstart_py[at], self.seqstart_py[at + batch]
            parts.append(x[:, first:end].reshape(batch, -1, *x.shape[2:]))
            at += batch
        return parts


@dataclass
class PaddedSeqLenInfo(SeqLenInfo):
    """Blocks that begin at seqstart_py[i] and use seqlen_py[i] of their room."""

    seqlen_py: list[int]
    padding: int = 0

    @classmethod
    def from_seqlens_padded(cls, seqlens, padding, *, device=None):
        seqlens = integers("kv_seqlen", seqlens)
        at_least("kv_padding", padding, max(seqlens, default=0))
        starts = [i * padding for i in range(len(seqlens) + 1)]
        return cls(starts, seqlens, padding)

    @property
    def seqlen(self) -> torch.Tensor:
        """int32 [blocks]"""
        return torch.tensor(self.seqlen_py, dtype=torch.int32, device="cpu")

    def intervals(self):
        return [
            (start, start + used)
            for start, used in zip(self.seqstart_py[:-1], self.seqlen_py, strict=True)
        ]

    def split(self, x, batch_sizes=None):
        raise NotImplementedError("keys with room between the blocks cannot be split")


@dataclass
class Blocks(AttentionBias):
    """Queries of block i see keys of block i only."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo

    def blocks(self) -> tuple[list, list]:
        """(first, end) of each block of queries and of keys."""
        return self.q_seqinfo.intervals(), self.k_seqinfo.intervals()

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        sizes = (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1])
        if tuple(shape[-2:]) != sizes:
            raise ValueError(f"shape must end with {sizes}, got {tuple(shape)}")
        mask = torch.full(sizes, -torch.inf, dtype=dtype, device=device)
        for (q0, q1), (k0, k1) in zip(*self.blocks(), strict=True):
            mask[q0:q1, k0:k1] = self._block(q1 - q0, k1 - k0, dtype, device)
        return mask.expand(shape)


def _pack(tensors) -> torch.Tensor:
    """[B_i, M_i, ...] -> [1, sum B_i M_i, ...]"""
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], dim=1)


@dataclass
class BlockDiagonalMask(Blocks):
    """Sequences of different lengths packed in one row: block i sees block i."""

    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
        """Of the lengths of queries and keys (the same if None)."""
        integers("q_seqlen", q_seqlen)
        if kv_seqlen is not None:
            integers("kv_seqlen", kv_seqlen)
        q_seqinfo = SeqLenInfo.from_seqlens(q_seqlen)
        if kv_seqlen is None or list(q_seqlen) == list(kv_seqlen):
            return cls(q_seqinfo=q_seqinfo, k_seqinfo=q_seqinfo)
        if len(q_seqlen) != len(kv_seqlen):
            raise ValueError(
                f"kv_seqlen must have q_seqlen's {len(q_seqlen)} entries, got {len(kv_seqlen)}"
            )
        return cls(q_seqinfo=q_seqinfo, k_seqinfo=SeqLenInfo.from_seqlens(kv_seqlen))

    @classmethod
    def from_tensor_list(cls, tensors):
        """(bias, packed [1, total, ...]) of tensors [B_i, M_i, ...]."""
        bias = cls.from_seqlens([x.shape[1] for x in tensors for _ in range(x.shape[0])])
        bias._batch_sizes = [x.shape[0] for x in tensors]
        return bias, _pack(tensors)

    @classmethod
    def from_tensor_lists_qkv(cls, tensors_q, tensors_k, tensors_v=None):
        """(bias, packed queries, keys and values) of lists of [B_i, M_i, ...]."""
        if len(tensors_q) != len(tensors_k) or len(tensors_q) != len(tensors_v or tensors_q):
            raise ValueError("tensors_q, tensors_k and tensors_v must have one length")
        for q, k in zip(tensors_q, tensors_k, strict=True):
            if q.shape[0] != k.shape[0]:
                raise ValueError(
                    f"tensors_k must have tensors_q's batch sizes, got {k.shape[0]} "
                    f"for {q.shape[0]}"
                )
        lengths = [
            [x.shape[1] for x in tensors for _ in range(x.shape[0])]
            for tensors in (tensors_q, tensors_k)
        ]
        bias = cls.from_seqlens(*lengths)
        bias._batch_sizes = [x.shape[0] for x in tensors_q]
        packed = (_pack(tensors_q), _pack(tensors_k))
        return bias, *packed, None if tensors_v is None else _pack(tensors_v)

    def split_queries(self, tensor):
        """Packed queries or outputs as a list of [B_i, M_i, ...]."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor):
        """Packed keys or values as a list of [B_i, M_i, ...]."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor):
        """The inverse of `from_tensor_list`."""
        if self.q_seqinfo.seqstart_py != self.k_seqinfo.seqstart_py:
            raise ValueError("split needs equal lengths: use split_queries or split_kv")
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def _as(self, kind, **more):
        return kind(self.q_seqinfo, self.k_seqinfo, self._batch_sizes, **more)

    def make_causal(self):
        """Each block causal, aligned top-left."""
        return self._as(BlockDiagonalCausalMask)

    def make_causal_from_bottomright(self):
        """Each block causal, aligned bottom-right."""
        return self._as(BlockDiagonalCausalFromBottomRightMask)

    def make_local_attention(self, window_size: int):
        """Each block causal from the top left, at most `window_size` keys a query."""
        return self._as(BlockDiagonalCausalLocalAttentionMask, _window_size=window_size)

    def make_local_attention_from_bottomright(self, window_size: int):
        """Each block causal from the bottom right, at most `window_size` keys a query."""
        return self._as(
            BlockDiagonalCausalLocalAttentionFromBottomRightMask, _window_size=window_size
        )


@dataclass
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """Each block causal, aligned top-left."""

    causal = "top_left"


@dataclass
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """Each block causal, aligned bottom-right; a block needs at least as many keys as queries."""

    causal = "bottom_right"

    def __post_init__(self):
        for index, ((q0, q1), (k0, k1)) in enumerate(zip(*self.blocks(), strict=True)):
            if k1 - k0 < q1 - q0:
                raise ValueError(
                    f"kv_seqlen must be at least q_seqlen in each block, got {k1 - k0} keys for "
                    f"{q1 - q0} queries in block {index}"
                )


@dataclass
class BlockDiagonalCausalLocalAttentionMask(_CausalWindow, BlockDiagonalCausalMask):
    """Each block causal from the top left, at most _window_size keys a query."""

    _window_size: int = 0

    def __post_init__(self):
        at_least("window_size", self._window_size, 1)


@dataclass
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(
    _CausalWindow, BlockDiagonalCausalFromBottomRightMask
):
    """Each block causal from the bottom right, at most _window_size keys a query."""

    _window_size: int = 0

    def __post_init__(self):
        super().__post_init__()
        at_least("window_size", self._window_size, 1)


@dataclass
class BlockDiagonalPaddedKeysMask(Blocks):
    """Keys in blocks of one room kv_padding, of which kv_seqlen[i] are used."""

    @classmethod
    def _infos(cls, q_seqlen, kv_padding, kv_seqlen) -> dict:
        integers("q_seqlen", q_seqlen)
        integers("kv_seqlen", kv_seqlen)
        if len(q_seqlen) != len(kv_seqlen):
            raise ValueError(
                f"kv_seqlen must have q_seqlen's {len(q_seqlen)} entries, got {len(kv_seqlen)}"
            )
        return dict(
            q_seqinfo=SeqLenInfo.from_seqlens(q_seqlen),
            k_seqinfo=PaddedSeqLenInfo.from_seqlens_padded(kv_seqlen, kv_padding),
        )

    @classmethod
    def from_seqlens(
        cls, q_seqlen, kv_padding, kv_seqlen, causal_diagonal: Any = None, *, device=None
    ):
        """Of the lengths of queries, the room of a block of keys and its used lengths."""
        return cls(**cls._infos(q_seqlen, kv_padding, kv_seqlen))

    def make_local_attention(self, window_left: int, window_right: int):
        """These blocks with a window around the bottom-right diagonal."""
        return BlockDiagonalLocalAttentionPaddedKeysMask(
            self.q_seqinfo, self.k_seqinfo, window_left=window_left, window_right=window_right
        )

    def make_paged(self, block_tables, page_size: int, paged_type):
        """The same lengths with keys in pages: a `paged_type` of the module `paged`."""
        return paged_type(self.q_seqinfo, self.k_seqinfo, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys, each block causal, aligned bottom-right with the used keys."""

    causal = "bottom_right"
    causal_diagonal: Any = None


@dataclass
class BlockDiagonalLocalAttentionPaddedKeysMask(BlockDiagonalPaddedKeysMask):
    """Padded keys, window_left before to window_right after the bottom-right diagonal."""

    window_left: int = 0
    window_right: int = 0

    def __post_init__(self):
        at_least("window_left", self.window_left, 0)
        at_least("window_right", self.window_right, 0)

    @property
    def window(self):
        return (self.window_left, self.window_right)

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding, kv_seqlen, window_left, window_right):
        """As `BlockDiagonalPaddedKeysMask.from_seqlens`, with a window."""
        return cls(
            **cls._infos(q_seqlen, kv_padding, kv_seqlen),
            window_left=window_left, window_right=window_right,
        )  # fmt: skip


@dataclass
class BlockDiagonalCausalLocalAttentionPaddedKeysMask(_CausalWindow, BlockDiagonalPaddedKeysMask):
    """Padded keys, causal from the bottom right, at most _window_size keys a query."""

    causal = "bottom_right"
    _window_size: int = 1

    def __post_init__(self):
        at_least("window_size", self._window_size, 1)

    @classmethod
    def from_seqlens_local(cls, q_seqlen, kv_padding, kv_seqlen, window_size):
        """As `BlockDiagonalPaddedKeysMask.from_seqlens`, with a window."""
        return cls(**cls._infos(q_seqlen, kv_padding, kv_seqlen), _window_size=window_size)


@dataclass
class BlockDiagonalGappyKeysMask(Blocks):
    """Keys in blocks that begin anywhere: kv_seqlen[i] keys from kv_seqstarts[i]."""

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device=None):
        """kv_seqstarts has one entry more than kv_seqlen: the number of keys in all."""
        if not len(kv_seqstarts) == len(kv_seqlen) + 1 == len(q_seqlen) + 1:
            raise ValueError(
                f"kv_seqstarts must have {len(q_seqlen) + 1} entries and kv_seqlen "
                f"{len(q_seqlen)}, got {len(kv_seqstarts)} and {len(kv_seqlen)}"
            )
        starts = integers("kv_seqstarts", kv_seqstarts)
        used = integers("kv_seqlen", kv_seqlen)
        return cls(SeqLenInfo.from_seqlens(q_seqlen), PaddedSeqLenInfo(starts, used))

    def make_paged(self, block_tables, page_size: int, notional_padding: int, paged_type):
        """The same keys in pages, where block i lies in row i of rows of notional_padding keys."""
        at_least("page_size", page_size, 1)
        if notional_padding % page_size:
            raise ValueError(
                f"notional_padding must be a multiple of page_size {page_size}, "
                f"got {notional_padding}"
            )
        starts = [s - i * notional_padding for i, s in enumerate(self.k_seqinfo.seqstart_py[:-1])]
        lengths = self.k_seqinfo.seqlen_py
        return paged_type.in_pages(self.q_seqinfo, starts, lengths, block_tables, page_size)


@dataclass
class BlockDiagonalCausalWithOffsetGappyKeysMask(BlockDiagonalGappyKeysMask):
    """Gappy keys, each block causal, aligned bottom-right with the used keys."""

    causal = "bottom_right"


PUBLIC = (
    AttentionBias, BlockDiagonalCausalFromBottomRightMask,
    BlockDiagonalCausalLocalAttentionFromBottomRightMask, BlockDiagonalCausalLocalAttentionMask,
    BlockDiagonalCausalLocalAttentionPaddedKeysMask, BlockDiagonalCausalMask,
    BlockDiagonalCausalWithOffsetGappyKeysMask, BlockDiagonalCausalWithOffsetPaddedKeysMask,
    BlockDiagonalGappyKeysMask, BlockDiagonalLocalAttentionPaddedKeysMask, BlockDiagonalMask,
    BlockDiagonalPaddedKeysMask, LocalAttentionFromBottomRightMask,
    LowerTriangularFromBottomRightLocalAttentionMask, LowerTriangularFromBottomRightMask,
    LowerTriangularMask, LowerTriangularMaskWithTensorBias,
)  # fmt: skip
__all__ = [kind.__name__ for kind in PUBLIC]
