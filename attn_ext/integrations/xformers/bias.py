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

from attn_ext.integrations.xformers.lengths import (
    GappySeqInfo,
    PaddedSeqLenInfo,
    SeqLenInfo,
    at_least,
    integers,
    intervals,
    starts,
)

UNBOUNDED = (None, None)


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
class Blocks(AttentionBias):
    """Queries of block i see keys of block i only."""

    q_seqinfo: SeqLenInfo
    k_seqinfo: SeqLenInfo

    def blocks(self) -> tuple[list, list]:
        """(first, end) of each block of queries and of keys."""
        return intervals(self.q_seqinfo), intervals(self.k_seqinfo)

    def materialize(self, shape, dtype=torch.float32, device="cpu"):
        sizes = (starts(self.q_seqinfo)[-1], starts(self.k_seqinfo)[-1])
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
        if starts(self.q_seqinfo) != starts(self.k_seqinfo):
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
        info = GappySeqInfo.from_seqlens_gappy(kv_seqstarts, kv_seqlen, False)
        return cls(SeqLenInfo.from_seqlens(q_seqlen), info)

    def make_paged(self, block_tables, page_size: int, notional_padding: int, paged_type):
        """The same keys in pages, where block i lies in row i of rows of notional_padding keys."""
        at_least("page_size", page_size, 1)
        if notional_padding % page_size:
            raise ValueError(
                f"notional_padding must be a multiple of page_size {page_size}, "
                f"got {notional_padding}"
            )
        spans = intervals(self.k_seqinfo)
        first = [begin - i * notional_padding for i, (begin, _) in enumerate(spans)]
        lengths = [end - begin for begin, end in spans]
        return paged_type.in_pages(self.q_seqinfo, first, lengths, block_tables, page_size)


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
