"""Which pages each sequence of a KV cache has: numbers only, no tensors.

A page holds the keys and values of `page_size` positions and may belong to several sequences, which
then have the same beginning.  It is written only while one sequence has it: `append` first gives a
sequence a copy of its own (copy on write).  Every change is checked whole before any of it is made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple


class CacheFullError(RuntimeError):
    """A cache has no room for what was to be appended; nothing was written."""


class Copy(NamedTuple):
    """The first `count` positions of page `source` are to be written to page `target`."""

    source: int
    target: int
    count: int


class Piece(NamedTuple):
    """New rows of one sequence that go into one page: `count` rows from its row `first` on, to the
    page's position `slot` on.
    """

    row: int  # index within the rows of this append
    first: int
    page: int
    slot: int
    count: int


class Pages:
    """Page lists of the sequences 0 .. batch - 1, with counts of how many have each page."""

    def __init__(self, batch: int, count: int, page_size: int, width: int, window: int | None):
        self.page_size, self.width, self.window = page_size, width, window
        self.lists: list[list[int]] = [[] for _ in range(batch)]
        self.lengths = [0] * batch  # positions that were appended and not truncated
        self.starts = [0] * batch  # the first position that is still held
        self.owners = [0] * count  # how many sequences have a page
        self.free = list(range(count))[::-1]
        self.changed: set[int] = set()  # whose lists nobody has published yet
        self.room = 0  # what `extend` may add at most, by the last `measure`

    def copy(self) -> Pages:
        """The same numbers, for `restore`."""
        return deepcopy(self)

    def restore(self, earlier: Pages) -> None:
        """Undo what has been done since `earlier` was copied; no page was written in between."""
        self.__dict__.update(earlier.__dict__)

    def held(self, b: int) -> int:
        """How many positions of sequence b are there."""
        return self.lengths[b] - self.starts[b]

    def measure(self) -> None:
        """Look how many positions go into the last page of every sequence, before any page is
        taken, copied or let go."""
        self.room = min(map(self._room, range(len(self.lists))), default=0)

    def _room(self, b: int) -> int:
        used = self.held(b) % self.page_size
        if not used or self.owners[self.lists[b][-1]] > 1:
            return 0
        room = self.page_size - used
        if self.window is not None:  # the last append lets no page go that begins below this
            room = min(room, self.page_size - self.held(b) + self.window)
        return room

    def extend(self, count: int) -> None:
        """`append` of `count` positions, at most `room`, to all sequences; nothing to copy."""
        self.room -= count
        self.lengths = [length + count for length in self.lengths]

    def append(self, rows: Sequence[int], counts: Sequence[int]) -> tuple[list[Copy], list[Piece]]:
        """Make room for counts[i] positions behind those of sequence rows[i]; what to copy and
        then to write.  CacheFullError, and no change, where there is none.
        """
        out_of_window = [
            self._out_of_window(b) if count else 0 for b, count in zip(rows, counts, strict=True)
        ]
        self._check_room(rows, counts, out_of_window)
        self.room = 0
        for b, gone in zip(rows, out_of_window, strict=True):
            if gone:
                self._release(self.lists[b][:gone])
                del self.lists[b][:gone]
                self.starts[b] += gone * self.page_size
                self.changed.add(b)
        copies, pieces = [], []
        for index, (b, count) in enumerate(zip(rows, counts, strict=True)):
            if count:
                copies += self._own_last_page(b)
                pieces += self._pieces(index, b, count)
                self.lengths[b] += count
        return copies, pieces

    def _out_of_window(self, b: int) -> int:
        """How many of the first pages of sequence b no later query sees."""
        if self.window is None:
            return 0
        return max(0, self.lengths[b] - self.window - self.starts[b]) // self.page_size

    def _check_room(self, rows, counts, out_of_window) -> None:
        given_up: Counter = Counter()
        for b, gone in zip(rows, out_of_window, strict=True):
            given_up.update(self.lists[b][:gone])
        room = len(self.free) + sum(self.owners[page] == n for page, n in given_up.items())
        needed = 0
        for b, count, gone in zip(rows, counts, out_of_window, strict=True):
            held = self.held(b) - gone * self.page_size
            pages = -(-(held + count) // self.page_size)
            if pages > self.width:
                raise CacheFullError(
                    f"append: sequence {b} would hold {held + count} positions, at most "
                    f"{self.width * self.page_size} fit (max_length); nothing was written"
                )
            needed += pages - (len(self.lists[b]) - gone)
            if count and held % self.page_size:  # its last page gets some of the new rows
                last = self.lists[b][-1]
                if self.owners[last] - given_up[last] > 1:
                    given_up[last] += 1
                    needed += 1
        if needed > room:
            raise CacheFullError(
                f"append needs {needed} free pages of {self.page_size} positions, and {room} of "
                f"{len(self.owners)} are free: truncate sequences, or resize the cache; nothing "
                "was written"
            )

    def _own_last_page(self, b: int) -> list[Copy]:
        """The copy that gives sequence b the page alone in which its next position is."""
        used = self.held(b) % self.page_size
        if not used or self.owners[self.lists[b][-1]] == 1:
            return []
        source, target = self.lists[b][-1], self._take()
        self.owners[source] -= 1
        self.lists[b][-1] = target
        self.changed.add(b)
        return [Copy(source, target, used)]

    def _pieces(self, index: int, b: int, count: int) -> list[Piece]:
        found, first = [], 0
        while first < count:
            slot = (self.held(b) + first) % self.page_size
            if slot == 0:
                self.lists[b].append(self._take())
                self.changed.add(b)
            size = min(count - first, self.page_size - slot)
            found.append(Piece(index, first, self.lists[b][-1], slot, size))
            first += size
        return found

    def assign(self, targets: Sequence[int], sources: Sequence[int]) -> None:
        """Sequence targets[i] becomes what sources[i] was, all at once; pages are shared."""
        self.room = 0
        taken = [(list(self.lists[b]), self.lengths[b], self.starts[b]) for b in sources]
        for pages, _, _ in taken:
            for page in pages:
                self.owners[page] += 1
        for b, (pages, length, start) in zip(targets, taken, strict=True):
            self._release(self.lists[b])
            self.lists[b], self.lengths[b], self.starts[b] = pages, length, start
        self.changed.update(targets)

    def replace(self, sources: Sequence[int]) -> None:
        """A batch whose sequence b is what sources[b] was; pages are shared."""
        batch = len(sources)
        more = max(0, batch - len(self.lists))
        self.lists += [[] for _ in range(more)]
        self.lengths += [0] * more
        self.starts += [0] * more
        self.assign(range(batch), sources)
        for pages in self.lists[batch:]:
            self._release(pages)
        del self.lists[batch:], self.lengths[batch:], self.starts[batch:]
        self.changed = set(range(batch))

    def truncate(self, rows: Sequence[int], lengths: Sequence[int]) -> None:
        """Sequence rows[i] keeps its first lengths[i] positions; ValueError, and no change, where
        a length is larger than now, or needs positions that a window has let go.
        """
        for b, length in zip(rows, lengths, strict=True):
            if not 0 <= length <= self.lengths[b]:
                raise ValueError(
                    f"lengths must be between 0 and what the sequence has, {self.lengths[b]}, got "
                    f"{length} for sequence {b}"
                )
            needed = 0 if self.window is None else max(0, length - self.window)
            if length > 0 and needed < self.starts[b]:
                raise ValueError(
                    f"lengths must be 0 or at least {self.starts[b] + self.window} for sequence "
                    f"{b}, whose positions before {self.starts[b]} have left the window of "
                    f"{self.window}, got {length}"
                )
        self.room = 0
        for b, length in zip(rows, lengths, strict=True):
            if length == 0:
                self.starts[b] = 0
            kept = -(-(length - self.starts[b]) // self.page_size)
            self._release(self.lists[b][kept:])
            del self.lists[b][kept:]
            self.lengths[b] = length

    def grow(self, count: int, width: int, page_size: int) -> None:
        """`count` pages in all, at most `width` a sequence; another page size where that is 1."""
        self.free = list(range(len(self.owners), count))[::-1] + self.free
        self.owners += [0] * (count - len(self.owners))
        self.width, self.page_size = width, page_size

    def _take(self) -> int:
        page = self.free.pop()
        self.owners[page] = 1
        return page

    def _release(self, pages: Sequence[int]) -> None:
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                self.free.append(page)
