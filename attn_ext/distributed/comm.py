"""What travels between ranks, and what happens when it does not arrive.

A hop is a permutation: every rank sends one buffer to `dest` and gets one from `source`, of a
length that both know.  On gloo that is an uneven all_to_all, which is quicker than its
point-to-point operations; on NCCL a batch of these.

A rank whose call raises says so in the group's store.  The others, who wait for what it will never
send, look there while they wait, and end by an error that names it.  Afterwards its group is of no
use: ranks are at different places, and what one sends another would take for something else.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class ContextParallelError(RuntimeError):
    """A rank waited for a peer in vain.  rank and peer: global ranks, peer None where any of the
    group may be meant; hop: what was waited for; seconds: for how long."""

    def __init__(self, rank: int, peer: int | None, hop: str, seconds: float, why: str = ""):
        self.rank, self.peer, self.hop, self.seconds = rank, peer, hop, seconds
        of = "its group" if peer is None else f"rank {peer}"
        super().__init__(
            f"rank {rank} waited {seconds:.1f} s for {of} in {hop} in vain"
            + (f": {why}" if why else "")
        )


def rank_of(group) -> int:
    """This process's rank within the group."""
    return dist.get_rank(group)


def size_of(group) -> int:
    """How many ranks the group has."""
    return dist.get_world_size(group)


def by_name(name: str):
    """The process group that torch calls so."""
    return dist.distributed_c10d._resolve_process_group(name)


def one_group(mesh, name: str = "mesh") -> dist.ProcessGroup:
    """The group of a mesh of one dimension, or the group itself."""
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if not hasattr(mesh, "mesh_dim_names"):
        raise TypeError(
            f"{name} must be a DeviceMesh or a process group of this rank, got "
            f"{type(mesh).__name__} {mesh!r}"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"{name} must have one dimension here; for two say method='2d' with dimensions named "
            f"'ring' and 'ulysses', got {mesh.ndim} named {mesh.mesh_dim_names}"
        )
    return mesh.get_group()


LOOK = timedelta(seconds=0.2)  # after so long a wait a rank looks whether another has given up
# and after so long a wait whether one refused its next call: this one may yet come to its end
PATIENCE = 4.0
_GIVEN_UP = "attn_ext/given up"  # a key of a group's store: the first rank that has, and why
# The groups that have ended here: (group, rank, why).  A name may come again, for another group.
_broken: dict[str, tuple[weakref.ref, int, str]] = {}


class _GivenUp(RuntimeError):
    """Another rank has left a call that this one is in."""

    def __init__(self, rank: int, why: str):
        self.rank = rank
        super().__init__(why)


def _store(group):
    return dist.distributed_c10d._get_process_group_store(group)


@contextlib.contextmanager
def announced(groups: Sequence) -> Iterator[None]:
    """Work of a call that the other ranks of these groups take part in: where it raises, they are
    told."""
    try:
        yield
    except BaseException as error:
        text = (str(error).strip().splitlines() or [""])[0]
        why = f"rank {dist.get_rank()} gave up, {type(error).__name__}: {text[:300]}"
        for group in groups:
            _broken[group.group_name] = (weakref.ref(group), dist.get_rank(), why)
            with contextlib.suppress(RuntimeError):  # the store is gone, and with it whoever waits
                _store(group).compare_set(_GIVEN_UP, "", f"{dist.get_rank()} {why}")
        raise


def _look(group, begun: float) -> None:
    """_GivenUp where a rank has told this group that it left a call, or refused the one that this
    rank has waited in since `begun`."""
    store, number = _store(group), _rounds.get(group.group_name, 0)
    if store.check([_GIVEN_UP]):
        rank, why = store.get(_GIVEN_UP).decode().split(" ", 1)
        raise _GivenUp(int(rank), why)
    if time.monotonic() - begun < PATIENCE:
        return
    for rank in range(size_of(group)):
        key = _key(number, rank)
        if rank != rank_of(group) and store.check([key]) and store.get(key).endswith(_REFUSED):
            why = "it refused its own call, and its error says why"
            raise _GivenUp(dist.get_global_rank(group, rank), why)


def _begin(group, hop: str) -> None:
    """ContextParallelError where the group has ended here before."""
    of, rank, why = _broken.get(group.group_name, (lambda: None, 0, ""))
    if of() is group:
        why = f"its process group ended with a call before ({why}); make another one"
        raise ContextParallelError(dist.get_rank(), rank, hop, 0.0, why)


class Waiting:
    """Operations that have begun."""

    def __init__(self, works, group, source: int | None, hop: str, keep=()):
        self.works, self.group, self.source, self.hop = works, group, source, hop
        self.keep = keep  # buffers that must live until the end
        self.begun = time.monotonic()

    def wait(self) -> None:
        """Until all have ended; ContextParallelError where one does not."""
        try:
            for work in self.works:
                _finish(work, self.group)
        except RuntimeError as error:
            raise _lost(self.group, self.source, self.hop, self.begun, error) from error
        self.works, self.keep = (), ()


def _finish(work, group) -> None:
    """Waits for an operation.  On gloo it is the host that waits, and can look around."""
    if dist.get_backend(group) != "gloo":
        work.wait()
        return
    begun = time.monotonic()
    while True:
        try:
            work.wait(LOOK)
            return
        except RuntimeError:  # it lasts longer, or has failed
            if work.is_completed():
                work.wait()  # raises what it failed with, if it did
                return
            _look(group, begun)


def _lost(group, source, hop, begun, error) -> ContextParallelError:
    peer = None if source is None else dist.get_global_rank(group, source)
    peer = error.rank if isinstance(error, _GivenUp) else peer
    why = str(error).strip().splitlines()
    seconds = time.monotonic() - begun
    return ContextParallelError(dist.get_rank(), peer, hop, seconds, why[0] if why else "")


def _on_gloo(x: torch.Tensor, group) -> bool:
    return x.device.type == "cpu" or dist.get_backend(group) == "gloo"


def permute(send, recv, dest: int, source: int, group, hop: str) -> Waiting:
    """Begins to send one flat buffer to rank `dest` of the group and to fill another from rank
    `source`."""
    _begin(group, hop)
    begun = time.monotonic()
    try:
        if _on_gloo(send, group):
            to, of = [0] * size_of(group), [0] * size_of(group)
            to[dest], of[source] = send.numel(), recv.numel()
            works = [dist.all_to_all_single(recv, send, of, to, group=group, async_op=True)]
        else:
            works = _point_to_point(send, recv, dest, source, group)
    except RuntimeError as error:
        raise _lost(group, source, hop, begun, error) from error
    return Waiting(works, group, source, hop, (send, recv))


def _point_to_point(send, recv, dest: int, source: int, group) -> list:
    ops = []
    if send.numel():
        ops.append(dist.P2POp(dist.isend, send, dist.get_global_rank(group, dest), group))
    if recv.numel():
        ops.append(dist.P2POp(dist.irecv, recv, dist.get_global_rank(group, source), group))
    return dist.batch_isend_irecv(ops) if ops else []


def all_to_all(send, lengths_out: Sequence[int], lengths_in: Sequence[int], group, hop: str):
    """A flat buffer whose parts go to the ranks in turn; returns what came, in the ranks' order."""
    recv = send.new_empty(sum(lengths_in))
    lengths = list(lengths_in), list(lengths_out)
    _collective(
        lambda: dist.all_to_all_single(recv, send, *lengths, group=group, async_op=True),
        group, None, hop,
    )  # fmt: skip
    return recv


def _collective(begin, group, source: int | None, hop: str) -> None:
    """An operation of all ranks of the group that `begin` begins, to its end."""
    _begin(group, hop)
    begun = time.monotonic()
    try:
        works = [begin()]
    except RuntimeError as error:
        raise _lost(group, source, hop, begun, error) from error
    Waiting(works, group, source, hop).wait()


def gather_rows(rows: torch.Tensor, lengths: Sequence[int], group, hop: str = "a gather"):
    """The rows [n, width] of all ranks, one rank after the other; `lengths` says each rank's n."""
    parts, width = size_of(group), rows.shape[1]
    send = rows.contiguous().view(-1).repeat(parts)  # an uneven all_gather does not exist on gloo
    out = [rows.numel()] * parts
    found = all_to_all(send, out, [n * width for n in lengths], group, hop)
    return found.view(sum(lengths), width)


def broadcast(x: torch.Tensor, group, hop: str) -> torch.Tensor:
    """x of the group's rank 0, in place."""
    first = dist.get_global_rank(group, 0)
    _collective(lambda: dist.broadcast(x, first, group=group, async_op=True), group, 0, hop)
    return x


def add_up(x: torch.Tensor, group, hop: str) -> torch.Tensor:
    """The sum of x over the ranks, in place."""
    _collective(lambda: dist.all_reduce(x, group=group, async_op=True), group, None, hop)
    return x


_rounds: dict[str, int] = {}  # how many rows a rank has written in a group
_REFUSED = b" refused"  # after the row of a rank that reads none


def _write(row: Sequence[int], group, refused: bytes = b"") -> tuple:
    """(store, number of the round) in which this rank's row now stands."""
    store = _store(group)
    number = _rounds.get(group.group_name, 0)
    _rounds[group.group_name] = number + 1
    store.set(_key(number, rank_of(group)), " ".join(map(str, row)) + refused.decode())
    return store, number


def say(row: Sequence[int], group) -> None:
    """A row for those who make a table now; this rank reads none."""
    try:
        _write(row, group, _REFUSED)
    except RuntimeError:
        return  # the store is gone, and with it whoever waits; the caller raises what went wrong


def table(row: Sequence[int], group, hop: str) -> list[list[int]]:
    """The row of integers of every rank of the group, by the group's store: what a rank that is out
    of step writes there can never be taken for data, and a rank that is missing has a name."""
    _begin(group, hop)
    own = rank_of(group)
    begun, peer = time.monotonic(), own
    found = []
    try:
        store, number = _write(row, group)
        for peer in range(size_of(group)):
            text = _read(store, _key(number, peer), group).removesuffix(_REFUSED)
            found.append(list(map(int, text.split())))
        if number > 1:  # all have written in this round, so none reads that one any more
            store.delete_key(_key(number - 2, own))
    except RuntimeError as error:
        raise _lost(group, peer, hop, begun, error) from error
    return found


def _read(store, key: str, group) -> bytes:
    """What stands there, once it does; the store's timeout is the longest wait."""
    begun, pause = time.monotonic(), 1e-4
    while not store.check([key]):  # its own wait with a time limit logs each as a warning
        waited = time.monotonic() - begun
        if waited > store.timeout.total_seconds():
            raise RuntimeError(f"nothing was said within {waited:.0f} s")
        if waited > LOOK.total_seconds():
            _look(group, begun)
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    return store.get(key)


def _key(number: int, rank: int) -> str:
    return f"attn_ext/{number}/{rank}"
