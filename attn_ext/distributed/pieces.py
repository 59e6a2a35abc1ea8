"""What a rank computes of one hop: which of its queries meet which of the keys that are there.

Segments of queries and keys come from one partition of the positions, or the keys are whole
documents.  A pair of segments is seen by all, seen in part (the diagonal, the edge of a window), or
not at all.  A piece is one call of a kernel, or a sequence of a packed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from attn_ext.core.schema import UNBOUNDED
from attn_ext.distributed.layout import Layout, Segment


class Piece(NamedTuple):
    """Rows [q0, q1) of the queries that are there against rows [k0, k1) of the keys."""

    document: int
    q: tuple[int, int]
    k: tuple[int, int]
    banded: bool = False  # the window hides some of the pairs
    frame: tuple[int, int, int] | None = None  # positions of the first query and key, whole length
    columns: tuple[int, int] = (0, 0)  # of the keys in the whole row of tokens, for mask and bias


@dataclass(frozen=True)
class Rules:
    """What decides about pieces.  left, right: the window, causal is right = 0; distances: whether
    ALiBi needs positions; counted: whether dropout does; scores: whether there is mask or bias.
    """

    left: int = UNBOUNDED
    right: int = UNBOUNDED
    distances: bool = False
    counted: bool = False
    scores: bool = False

    def seen(self, q: Segment, k: Segment) -> bool:
        """Whether some query of q sees some key of k."""
        return (
            q.document == k.document
            and (self.right < 0 or k.first <= q.last - 1 + self.right)
            and (self.left < 0 or k.last - 1 >= q.first - self.left)
        )

    def full(self, q: Segment, k: Segment) -> bool:
        """Whether every query of q sees every key of k."""
        return (self.right < 0 or k.last - 1 <= q.first + self.right) and (
            self.left < 0 or k.first >= q.last - 1 - self.left
        )


def pieces(layout: Layout, queries, keys, rules: Rules) -> list[Piece]:
    """The pieces of queries and keys, lists of segments that lie one after the other."""
    found, joinable, diagonals = [], [], []
    causal = rules.right == 0 and rules.left < 0 and not rules.scores and not rules.distances
    for q, q_at in _placed(queries):
        for k, k_at in _placed(keys):
            if not rules.seen(q, k):
                continue
            piece = _piece(layout, rules, q, q_at, k, k_at)
            free = piece.frame is None and not piece.banded and not rules.scores
            diagonal = piece.frame is None and piece.banded and causal
            (joinable if free else diagonals if diagonal else found).append(piece)
    joined = _joined(joinable)
    return found + (_along_diagonals(diagonals, joined) if diagonals else joined)


def _placed(segments):
    at = 0
    for segment in segments:
        yield segment, at
        at += segment.length


def _piece(layout: Layout, rules: Rules, q: Segment, q_at: int, k: Segment, k_at: int) -> Piece:
    """One pair.  Where it can be had by aligning the last query with the last key it needs no
    frame: what lies after the last query is hidden anyway."""
    banded = not rules.full(q, k)
    aligned = rules.right == 0 and k.first < q.last <= k.last
    if aligned:
        k = k._replace(last=q.last)
    if rules.left >= 0 and k.first < q.first - rules.left:  # keys before the window of all
        cut = min(q.first - rules.left, k.last) - k.first
        k, k_at = k._replace(first=k.first + cut), k_at + cut
    if k.last == q.last and k.first <= q.first:
        aligned = True
    needs_frame = rules.counted or (not aligned and (banded or rules.distances))
    frame = (q.first, k.first, layout.lengths[q.document]) if needs_frame else None
    where = (q_at, q_at + q.length), (k_at, k_at + k.length)
    return Piece(q.document, *where, banded, frame, layout.columns(k))


def _joined(pieces: list[Piece]) -> list[Piece]:
    """Pieces whose positions do not count, as few as can be: neighbours in the keys, then in the
    queries, become one."""
    by_keys: list[Piece] = []
    for piece in sorted(pieces, key=lambda p: (p.document, p.q, p.k)):
        last = by_keys[-1] if by_keys else None
        same = last is not None and (last.document, last.q) == (piece.document, piece.q)
        if same and last.k[1] == piece.k[0]:
            by_keys[-1] = last._replace(k=(last.k[0], piece.k[1]))
        else:
            by_keys.append(piece)
    found: list[Piece] = []
    for piece in sorted(by_keys, key=lambda p: (p.document, p.k, p.q)):
        last = found[-1] if found else None
        same = last is not None and (last.document, last.k) == (piece.document, piece.k)
        if same and last.q[1] == piece.q[0]:
            found[-1] = last._replace(q=(last.q[0], piece.q[1]))
        else:
            found.append(piece)
    return sorted(found, key=lambda p: (p.q, p.k))


def _along_diagonals(diagonals: list[Piece], full: list[Piece]) -> list[Piece]:
    """Causal pieces, as few as can be.  The keys before a diagonal's are seen by all of its rows,
    and come to it; a diagonal that goes on where another ends is one with it, since rows and keys
    that lie in ascending order hide from each other what positions would."""
    by_end = {(p.document, p.q, p.k[1]): p for p in full}
    for at, piece in enumerate(diagonals):
        before = by_end.pop((piece.document, piece.q, piece.k[0]), None)
        if before is not None:
            diagonals[at] = piece._replace(k=(before.k[0], piece.k[1]))
    found: list[Piece] = []
    for piece in sorted(diagonals, key=lambda p: (p.document, p.q)):
        last = found[-1] if found else None
        goes_on = last is not None and (
            (last.document, last.q[1], last.k[0]) == (piece.document, piece.q[0], piece.k[0])
            and piece.k[1] - last.k[1] == piece.q[1] - last.q[1]
        )
        if goes_on:
            found[-1] = last._replace(q=(last.q[0], piece.q[1]), k=piece.k)
        else:
            found.append(piece)
    return found + list(by_end.values())


def rounds(found: list[Piece]) -> list[list[Piece]]:
    """Pieces in as few groups as a simple rule finds, each of which one packed call can do: its
    rows ascend in queries and keys, and all are banded and framed, or none."""
    groups: list[list[Piece]] = []
    for piece in sorted(found, key=lambda p: (p.q, p.k)):
        for group in groups:
            last = group[-1]
            alike = (last.banded, last.frame is None) == (piece.banded, piece.frame is None)
            if alike and last.q[1] <= piece.q[0] and last.k[1] <= piece.k[0]:
                group.append(piece)
                break
        else:
            groups.append([piece])
    return groups
