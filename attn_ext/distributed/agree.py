"""Before data moves the ranks tell each other what they are about to do: a rank that would send
another length, or another call, is named on every rank."""

from __future__ import annotations

import torch
import torch.distributed as dist

from attn_ext.distributed import comm

NAMES = (
    "S_local", "batch", "q's heads", "k's heads", "head_dim", "v's head_dim", "dtype", "options",
    "mask's rows", "bias's rows",
)  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FINE, _FAILED = 0, 1
# How a mask or bias [.., rows, S] lies: a rank with one token cannot tell one row from its own.
ABSENT, ONE, OWN, EITHER = range(4)
_agreed: dict[tuple, tuple] = {}


def rows_of(scores, seqlen: int) -> int:
    """The rows of a rank's mask or bias."""
    if scores is None:
        return ABSENT
    one = len(scores) < 2 or scores[-2] == 1
    return EITHER if one and seqlen == 1 else ONE if one else OWN


def forget() -> None:
    """Ask again before the next call."""
    _agreed.clear()


def check(groups, shapes: tuple, dtype: torch.dtype, options: str, lengths, scores) -> tuple:
    """ValueError on every rank of the groups, which together are the mesh, unless all are about to
    do the same.  Returns whether mask and bias have rows of their own for each query.

    lengths: of the shard of each rank of a group, for each group; options: a hash in hexadecimal;
    scores: the shapes of mask and bias, or None.
    """
    names = tuple(g.group_name for g in groups)
    key = (names, shapes, dtype, options, scores)
    if key in _agreed:
        return _agreed[key]
    q, k, v = shapes
    row = [q[2], q[0], q[1], k[1], q[3], v[3], DTYPES.index(dtype), int(options[:15], 16)]
    row += [rows_of(x, q[2]) for x in scores]
    _agreed[key] = tuple(_exchange(groups, row, lengths))
    return _agreed[key]


def refuse(groups, lengths) -> None:
    """What a rank whose own call is wrong tells the others, who wait for it: only where they do,
    which is before they have agreed on anything."""
    names = tuple(g.group_name for g in groups)
    if not any(key[0] == names for key in _agreed):
        _exchange(groups, None, lengths, quiet=True)


def _exchange(groups, row, lengths, quiet: bool = False) -> list[bool]:
    """One round in each group.  What a round finds goes along in the next one."""
    trouble = "" if row is not None else "its own arguments are wrong"
    found = (dist.get_rank(), _FAILED) if trouble else None
    row = row or [0] * len(NAMES)
    for group, expected in zip(groups, lengths, strict=True):
        said = [0, *found] if found else [1, 0, _FINE]
        rows = comm.table([*said, *row], group, "the agreement")
        found, trouble = _judge(rows, expected, group, found, trouble)
        known = [min(column) for column in list(zip(*rows, strict=True))[-2:]]
        row = row[:-2] + known
    if found and not quiet:
        raise ValueError(f"ranks must make the same call: rank {found[0]} deviates, {trouble}")
    return [kind not in (ABSENT, ONE) for kind in row[-2:]]


def _judge(rows, expected, group, found, trouble) -> tuple:
    for fine, rank, _, *_rest in rows:
        if not fine and found is None:
            found, trouble = (rank, _FAILED), "its arguments are wrong, or its group deviates"
    if found is not None:
        return found, trouble
    columns = list(zip(*[r[3:] for r in rows], strict=True))
    # the options first: a rank with another layout takes all others' lengths for wrong
    for at in sorted(range(len(NAMES)), key=lambda at: NAMES[at] != "options"):
        name, column = NAMES[at], columns[at]
        wanted = list(expected) if at == 0 else [max(column, key=column.count)] * len(column)
        if at >= 8:  # a rank with one token goes along with the others
            known = [x for x in column if x != EITHER]
            wanted = [x if x == EITHER else max(known, key=known.count) for x in column]
        for r, (got, want) in enumerate(zip(column, wanted, strict=True)):
            if got != want:
                rank = dist.get_global_rank(group, r)
                value = f"{name} must be {want}, got {got}"
                if at == 6:
                    value = f"dtype must be {DTYPES[want]}, got {DTYPES[got]}"
                if at == 7:
                    value = "its layout or options are others than most ranks'"
                return (rank, _FAILED), value
    return None, ""
