"""Which rank has what, and which of its queries meet which keys: no process group is needed."""

import itertools

import pytest
import torch

from attn_ext.distributed import Layout, explain
from attn_ext.distributed.pieces import Rules, pieces, rounds

LAYOUTS = {
    "contiguous": lambda p: Layout.contiguous(61, p),
    "zigzag": lambda p: Layout.zigzag(61, p),
    "short": lambda p: Layout.zigzag(3, p),
    "striped": lambda p: Layout.striped(61, p, block=5),
    "packed": lambda p: Layout.packed([0, 4, 7, 7, 8, 61], p),
    "cut": lambda p: Layout.packed(torch.tensor([0, 4, 7, 7, 8, 61]), p, balance="contiguous"),
}


@pytest.mark.parametrize("parts", (1, 2, 3, 4, 8))
@pytest.mark.parametrize("name", LAYOUTS)
def test_each_position_is_on_one_rank(name, parts):
    """A position that is lost, or there twice, and what a rank says of its own."""
    layout = LAYOUTS[name](parts)
    every = torch.cat([layout.indices(r) for r in range(parts)])
    assert torch.equal(every.sort().values, torch.arange(layout.seqlen))
    x = torch.arange(layout.seqlen)
    starts = torch.tensor([0, *layout.lengths]).cumsum(0)
    for rank in range(parts):
        own = layout.shard(x, 0, rank)
        assert torch.equal(own, layout.indices(rank)) and len(own) == layout.length(rank)
        document = torch.repeat_interleave(
            torch.arange(len(layout.lengths)), layout.cu_seqlens(rank).diff().long()
        )
        assert torch.equal(layout.position_ids(rank) + starts[document], own)


RULES = (
    Rules(),
    Rules(right=0),
    Rules(left=7, right=0),
    Rules(left=9, right=4),
    Rules(right=0, distances=True),
    Rules(distances=True),
    Rules(left=20, right=0, counted=True),
    Rules(right=0, scores=True),
)


def _pairs_of(piece, layout, queries, keys, rules):
    """The pairs that a piece computes, by the meaning of its fields."""
    i, j = torch.arange(*piece.q), torch.arange(*piece.k)
    if piece.frame is not None:
        q_first, k_first, whole = piece.frame
        assert whole == layout.lengths[piece.document]
        assert torch.equal(queries[i], q_first + torch.arange(len(i)))
        assert torch.equal(keys[j], k_first + torch.arange(len(j)))
        off = (queries[i][:, None] - keys[j][None]) * -1
    else:  # aligned at the end
        off = torch.arange(len(j))[None] - torch.arange(len(i))[:, None] - (len(j) - len(i))
    seen = torch.ones_like(off, dtype=torch.bool)
    if piece.banded and rules.left >= 0:
        seen &= off >= -rules.left
    if piece.banded and rules.right >= 0:
        seen &= off <= rules.right
    if rules.distances and piece.frame is None:
        assert torch.equal(off, keys[j][None] - queries[i][:, None]), "ALiBi has other distances"
    assert rules.counted <= (piece.frame is not None)
    return seen


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("gathered", (False, True))
def test_pieces_cover_what_is_seen_once(name, gathered):
    """A pair of query and key that is left out, computed twice, or seen against the window."""
    parts = 3
    layout = LAYOUTS[name](parts)
    every = [segment for r in range(parts) for segment in layout.segments(r)]
    whole = [type(every[0])(d, 0, n) for d, n in enumerate(layout.lengths) if n]
    for rules, rank, owner in itertools.product(RULES, range(parts), range(parts)):
        of_q, of_k = layout.segments(rank), whole if gathered else layout.segments(owner)
        queries, keys = (
            torch.tensor([p for s in x for p in range(s.first, s.last)], dtype=torch.long)
            for x in (of_q, of_k)
        )
        documents = [
            torch.tensor([s.document for s in x for _ in range(s.length)], dtype=torch.long)
            for x in (of_q, of_k)
        ]
        want = documents[0][:, None] == documents[1][None]
        off = keys[None] - queries[:, None]
        want &= (off >= -rules.left) if rules.left >= 0 else True
        want &= (off <= rules.right) if rules.right >= 0 else True
        found = torch.zeros(len(queries), len(keys), dtype=torch.int64)
        made = pieces(layout, of_q, of_k, rules)
        for piece in made:
            at = slice(*piece.q), slice(*piece.k)
            found[at] += _pairs_of(piece, layout, queries, keys, rules)
            if rules.scores:
                whole_at = torch.arange(*piece.columns)
                start = sum(layout.lengths[: piece.document])
                assert torch.equal(whole_at - start, keys[at[1]])
        assert torch.equal(found, want.long()), (rules, rank, owner)
        for group in rounds(made):
            for a, b in itertools.pairwise(group):
                assert a.q[1] <= b.q[0] and a.k[1] <= b.k[0]


def test_zigzag_makes_few_calls():
    """Segments that are not joined: one call a hop where positions do not count, else three."""
    layout = Layout.zigzag(4096, 4)
    for rank, owner in itertools.product(range(4), range(4)):
        of_q, of_k = layout.segments(rank), layout.segments(owner)
        plain = pieces(layout, of_q, of_k, Rules(right=0))
        assert len(plain) == 1
        assert len(pieces(layout, of_q, of_k, Rules(right=0, counted=True))) <= 3
        assert all(p.frame is None for p in plain)


def test_work_is_balanced():
    """A rank that has more causal work than the others."""
    layouts = [(0.02, Layout.zigzag(65536, 8)), (0.10, Layout.packed([0, 9000, 9100, 40000], 8))]
    torch.manual_seed(0)
    starts = torch.tensor([0, *torch.randint(1, 3000, (60,)).tolist()]).cumsum(0)
    layouts.append((0.10, Layout.packed(starts, 8)))
    for most, layout in layouts:
        work = [layout.causal_work(r) for r in range(8)]
        assert max(work) * 8 <= (1 + most) * sum(work)


def test_bad_layouts():
    """Arguments that would give a layout of something else."""
    for make, what in (
        (lambda: Layout.zigzag(-1, 2), "seqlen must be at least 0, got -1"),
        (lambda: Layout.zigzag(8, 0), "parts must be at least 1, got 0"),
        (lambda: Layout.zigzag(8, 1 << 40), "parts must be at most 1048576, got 1099511627776"),
        (lambda: Layout.contiguous(1 << 31, 2), "seqlen must be at most 2147483647, got"),
        (lambda: Layout.striped(1 << 40, 2), "seqlen must be at most 2147483647, got"),
        (lambda: Layout.striped(1 << 30, 2, 1), "block must be at least 1024 for 1073741824 pos"),
        (lambda: Layout.packed([0, 1 << 40], 2), "a document of cu_seqlens must be at most"),
        (lambda: Layout.packed([1, 4], 2), "cu_seqlens must begin at 0"),
        (lambda: Layout.packed([0, 4], 2, "striped"), "balance must be one of"),
        (lambda: Layout.zigzag(8, 2).segments(2), "rank must be between 0 and 1, got 2"),
        (lambda: Layout.zigzag(8, 2).shard(torch.ones(7), 0, 0), "x must have 8 positions"),
    ):
        with pytest.raises(ValueError, match=what):
            make()
    for starts in (None, 1.5, [0, 4.5], torch.tensor([0.0, 4.0]), torch.tensor(4)):
        with pytest.raises(TypeError, match="cu_seqlens"):
            Layout.packed(starts, 2)
    with pytest.raises(TypeError, match="seqlen must be an int"):
        Layout.zigzag(8.0, 2)


def test_explain_says_who_computes():
    """A GPU's calls with frames must not look like those of its kernels."""
    text = explain(Layout.zigzag(4096, 4), 32, 8, 128, causal=True, window=(512, None))
    assert "torch operations on tiles" in text and "chosen" in text
    assert "(frame): 0" in explain(Layout.zigzag(4096, 4), 32, 8, 128, causal=True)
