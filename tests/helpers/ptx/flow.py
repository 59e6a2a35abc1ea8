"""Which registers may hold an accumulator of a wgmma that is in flight, before each instruction.

Such registers come from wgmma and from moves; a wait that leaves nothing in flight ends it.  Sets
of registers are bits of Python integers, over the control flow of one kernel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Effect:
    """What one instruction does to registers: those read and those written, as bits; `kills` those
    that hold nothing of before; flies: the written ones are in flight; moves: they are if what is
    read may be; lands: a wait, of everything (2) or of all but some groups (1)."""

    reads: int = 0
    writes: int = 0
    kills: int = 0
    flies: bool = False
    moves: bool = False
    lands: int = 0


def successors(targets: list[int | None], falls: list[bool]) -> list[list[int]]:
    """Of each instruction: where it may jump, and the next one unless it ends the way."""
    found = []
    for i, target in enumerate(targets):
        following = [i + 1] if falls[i] and i + 1 < len(targets) else []
        found.append(following + ([target] if target is not None and target < len(targets) else []))
    return found


def in_flight(effects: list[Effect], after: list[list[int]]) -> list[int]:
    """The registers that may be in flight before each instruction."""
    before = [0] * len(effects)
    work, queued = list(range(len(effects))), [True] * len(effects)
    while work:
        i = work.pop()
        queued[i] = False
        out = _through(effects[i], before[i])
        for j in after[i]:
            if out & ~before[j]:
                before[j] |= out
                if not queued[j]:
                    queued[j] = True
                    work.append(j)
    return before


def _through(effect: Effect, flying: int) -> int:
    if effect.lands == 2:
        return 0
    moved = effect.moves and effect.reads & flying
    out = flying & ~effect.kills
    return out | effect.writes if effect.flies or moved else out


def live(effects: list[Effect], after: list[list[int]]) -> list[int]:
    """The registers whose value is read at some time after each instruction."""
    behind = [0] * len(effects)
    into: list[list[int]] = [[] for _ in effects]
    for i, following in enumerate(after):
        for j in following:
            into[j].append(i)
    work, queued = list(range(len(effects))), [True] * len(effects)
    while work:
        j = work.pop()
        queued[j] = False
        needed = effects[j].reads | (behind[j] & ~effects[j].kills)
        for i in into[j]:
            if needed & ~behind[i]:
                behind[i] |= needed
                if not queued[i]:
                    queued[i] = True
                    work.append(i)
    return behind
