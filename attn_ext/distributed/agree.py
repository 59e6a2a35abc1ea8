"""Before data moves the ranks tell each other what they are about to do: a rank that would send
another length, or another call, is named on every rank."""

from __future__ import annotations

import zlib
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.distributed as dist

from attn_ext.distributed import comm

NAMES = (
    "S_local", "batch", "q's heads", "k's heads", "head_dim", "v's head_dim", "dtype",
    "requires_grad of q, k, v, bias and sink", "options", "mask's rows", "bias's rows",
)  # fmt: skip
DTYPE, WANTED, OPTIONS, MASK = 6, 7, 8, 9  # places in NAMES
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FINE, _FAILED = 0, 1
# How a mask or bias [.., rows, S] lies: a rank with one token cannot tell one row from its own.
ABSENT, ONE, OWN, EITHER = range(4)
LIMIT = 512  # what a group remembers; the same on its ranks, which make the same calls
_agreed: dict[tuple, OrderedDict] = {}


def rows_of(scores, seqlen: int) -> int:
    """The rows of a rank's mask or bias."""
    if scores is None:
        return ABSENT
    one = len(scores) < 2 or scores[-2] == 1
    return EITHER if one and seqlen == 1 else ONE if one else OWN


def forget() -> None:
    """Ask again before the next call."""
    _agreed.clear()


def _remembered(names: tuple, key: tuple, ask: Callable):
    """What these groups have agreed on before, or what asking gives."""
    known = _agreed.setdefault(names, OrderedDict())
    if key not in known:
        known[key] = ask()
    known.move_to_end(key)
    if len(known) > LIMIT:
        known.popitem(last=False)
    return known[key]


def check(
    groups, shapes: tuple, dtype: torch.dtype, options: str, lengths, scores, wanted=()
) -> tuple:
    """ValueError on every rank of the groups, which together are the mesh, unless all are about to
    do the same.  Returns whether mask and bias have rows of their own for each query.

    lengths: of the shard of each rank of a group, for each group; options: a hash in hexadecimal;
    scores: the shapes of mask and bias, or None; wanted: which inputs want gradients.
    """
    q, k, v = shapes
    row = [q[2], q[0], q[1], k[1], q[3], v[3], DTYPES.index(dtype)]
    row += [int("1" + "".join(str(int(x)) for x in wanted)), int(options[:15], 16)]
    row += [rows_of(x, q[2]) for x in scores]
    key = (shapes, dtype, options, scores, wanted)
    names = tuple(g.group_name for g in groups)
    return _remembered(names, key, lambda: tuple(_exchange(groups, row, lengths)))


def alike(group, what: str, numbers: dict[str, int], dtype: torch.dtype, *also) -> None:
    """ValueError on every rank of a group unless all say the same numbers and dtype, once for these
    and for what else has the same memory."""
    row = [*numbers.values(), DTYPES.index(dtype) if dtype in DTYPES else len(DTYPES)]

    def ask():
        rows = comm.table([*row, zlib.crc32(what.encode())], group, f"the agreement on {what}")
        for at, column in enumerate(zip(*rows, strict=True)):
            want = max(column, key=column.count)
            for r, got in enumerate(column):
                if got != want:
                    name = [*numbers, "dtype", "function"][at]
                    rank = dist.get_global_rank(group, r)
                    raise ValueError(
                        f"ranks must make the same call of {what}: rank {rank} deviates, {name} "
                        f"must be {want}, got {got}"
                    )

    _remembered((group.group_name,), (what, *row, *also), ask)


def refuse(groups) -> None:
    """What a rank whose own call is wrong tells the others, who may wait for it.  It does not wait
    for them: they may be wrong, too."""
    for group in groups:
        comm.say([0, dist.get_rank(), _FAILED, *[0] * len(NAMES)], group)


def _exchange(groups, row, lengths) -> list[bool]:
    """One round in each group.  What a round finds goes along in the next one."""
    found, trouble = None, ""
    for group, expected in zip(groups, lengths, strict=True):
        said = [0, *found] if found else [1, 0, _FINE]
        rows = comm.table([*said, *row], group, "the agreement")
        found, trouble = _judge(rows, expected, group, found, trouble)
        known = [min(column) for column in list(zip(*rows, strict=True))[-2:]]
        row = row[:-2] + known
    if found:
        raise ValueError(f"ranks must make the same call: rank {found[0]} deviates, {trouble}")
    return [kind not in (ABSENT, ONE) for kind in row[-2:]]


def _judge(rows, expected, group, found, trouble) -> tuple:
    for fine, rank, _, *_rest in rows:
        if not fine and found is None:
            found, trouble = (rank, _FAILED), "its arguments are wrong, or its group deviates"
    if found is not None:
        return found, trouble
    columns = list(zip(*[r[3:] for r in rows], strict=True))
    # lengths after the options: a rank with another layout takes all others' lengths for wrong
    for at in (*range(1, MASK), 0, MASK, MASK + 1):
        name, column = NAMES[at], columns[at]
        wanted = list(expected) if at == 0 else [max(column, key=column.count)] * len(column)
        if at >= MASK:  # a rank with one token goes along with the others
            known = [x for x in column if x != EITHER]
            wanted = [x if x == EITHER else max(known, key=known.count) for x in column]
        for r, (got, want) in enumerate(zip(column, wanted, strict=True)):
            if got != want:
                rank = dist.get_global_rank(group, r)
                value = f"{name} must be {want}, got {got}"
                if at == DTYPE:
                    value = f"dtype must be {DTYPES[want]}, got {DTYPES[got]}"
                if at == WANTED:
                    value = f"{name} must be {str(want)[1:]}, got {str(got)[1:]}"
                if at == OPTIONS:
                    value = "its layout or options are others than most ranks'"
                return (rank, _FAILED), value
    return None, ""
