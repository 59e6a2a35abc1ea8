"""Lengths of xformers' biases: written in place, as loops of decoding do, by xformers' own methods,
and where compiled code has them as constants; against a naive formula in float64.
"""

import dataclasses
import types

import naive as formula
import numpy as np
import pytest
import torch

from attn_ext.integrations import xformers as xf


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


class TheirLengths:
    """A bias of xformers' own: tensors beside lists, which its loops of decoding do not update."""

    @dataclasses.dataclass
    class BlockDiagonalCausalWithOffsetPaddedKeysMask:
        q_seqinfo: object
        k_seqinfo: object

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_padding, kv_seqlen):
        ours = xf.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
            q_seqlen, kv_padding, kv_seqlen
        )
        infos = (types.SimpleNamespace(**vars(x)) for x in (ours.q_seqinfo, ours.k_seqinfo))
        return cls.BlockDiagonalCausalWithOffsetPaddedKeysMask(*infos)


@pytest.mark.parametrize(
    "kind", [xf.BlockDiagonalCausalWithOffsetPaddedKeysMask, TheirLengths], ids=["ours", "theirs"]
)
def test_lengths_that_are_written_in_place(kind):
    """As xformers' own example decodes: prompts of 3 and 2 rows, then one row and one key more."""
    attn_bias = kind.from_seqlens([3, 2], 6, [3, 2])
    q_starts, k_used = attn_bias.q_seqinfo.seqstart, attn_bias.k_seqinfo.seqlen
    k, v = normal(1, 12, 2, 8), normal(1, 12, 2, 8)
    for queries, used in (([3, 2], [3, 2]), ([1, 1], [4, 3]), ([1, 1], [5, 4])):
        q = normal(1, sum(queries), 2, 8)
        out = xf.memory_efficient_attention(q, k, v, attn_bias)
        at = 0
        for block, (rows, keys) in enumerate(zip(queries, used, strict=True)):
            mine = slice(6 * block, 6 * block + keys)
            hidden = ~torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
            scores = formula.scores(q[:, at : at + rows], k[:, mine])
            expected = formula.attend(scores, v[:, mine], hidden)[0]
            torch.testing.assert_close(out[:, at : at + rows], expected)
            at += rows
        q_starts.copy_(torch.arange(3))
        k_used.add_(k_used < 6)
    k_used.fill_(7)
    with pytest.raises(ValueError, match="kv_seqlen must be between 0 and the 6 rows"):
        xf.memory_efficient_attention(q, k, v, attn_bias)


def test_pages_whose_lengths_are_written_in_place():
    """Keys of before, or rows beyond the pages."""
    tables = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32)
    make = xf.PagedBlockDiagonalPaddedKeysMask.from_seqlens
    attn_bias = make([1, 1], [3, 2], tables, 4)
    q, k, v = normal(1, 2, 2, 8), normal(1, 16, 2, 8), normal(1, 16, 2, 8)
    attn_bias.k_seqinfo.seqlen.add_(3)
    out = xf.memory_efficient_attention(q, k, v, attn_bias)
    fresh = make([1, 1], [6, 5], tables, 4)
    assert out.equal(xf.memory_efficient_attention(q, k, v, fresh))
    assert attn_bias.materialize((2, 16)).equal(fresh.materialize((2, 16)))
    attn_bias.k_seqinfo.seqlen.fill_(9)
    with pytest.raises(ValueError, match="block_tables must have pages"):
        xf.memory_efficient_attention(q, k, v, attn_bias)


def test_lengths_are_updated_by_their_methods():
    """xformers' names for graphs that are captured: as many blocks, none longer than before."""
    attn_bias = xf.BlockDiagonalPaddedKeysMask.from_seqlens([2, 3], 4, [4, 3])
    attn_bias.q_seqinfo.from_seqlens_inplace([3, 1])
    attn_bias.k_seqinfo.from_seqlens_padded_inplace([2, 4])
    assert attn_bias.q_seqinfo.seqstart.tolist() == attn_bias.q_seqinfo.seqstart_py == [0, 3, 4]
    fresh = xf.BlockDiagonalPaddedKeysMask.from_seqlens([3, 1], 4, [2, 4])
    assert attn_bias.materialize((4, 8)).equal(fresh.materialize((4, 8)))
    for lengths in ([4, 1], [1, 1, 1]):
        with pytest.raises(ValueError, match="seqlens must hold 2 lengths of at most 3"):
            attn_bias.q_seqinfo.from_seqlens_inplace(lengths)


def test_lengths_of_numpy():
    """An error where xformers takes any whole numbers."""
    wanted = xf.BlockDiagonalMask.from_seqlens([2, 3])
    assert xf.BlockDiagonalMask.from_seqlens(np.array([2, 3])).q_seqinfo == wanted.q_seqinfo
    assert type(wanted.q_seqinfo.seqstart_py[1]) is int


def test_compiled_code_does_not_go_on_with_lengths_of_before():
    """Its graph has the lengths as constants: silently those of before the tensor was written."""
    attn_bias = xf.BlockDiagonalPaddedKeysMask.from_seqlens([4, 5], 6, [3, 6])
    q, k, v = normal(1, 9, 2, 8), normal(1, 12, 2, 8), normal(1, 12, 2, 8)
    compiled = torch.compile(xf.memory_efficient_attention, fullgraph=True, backend="aot_eager")
    compiled(q, k, v, attn_bias)
    attn_bias.k_seqinfo.seqlen.fill_(4)
    with pytest.raises(RuntimeError, match="seqlen was written in place"):
        compiled(q, k, v, attn_bias)
