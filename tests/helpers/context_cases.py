"""What ranks compute in tests/distributed, each function on every rank of a group: shards against
one process, which each rank is for itself.
"""

import contextlib
import inspect
import time

import torch
import torch.distributed as dist
from closeness import relative

import attn_ext
from attn_ext.backends import cpu
from attn_ext.core.schema import lse_shape
from attn_ext.distributed import (
    Layout,
    agree,
    comm,
    context_attention,
    context_decode,
    mean_loss,
    ring,
)
from attn_ext.ops import parts as operators

HEADS, WIDTH, BATCH = 12, 16, 2
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"causal": True, "window": (20, None)},
    "both sides": {"window": (13, 9), "alibi_slopes": "each"},
    "alibi": {"causal": True, "window": (30, None), "alibi_slopes": "heads"},
    "mask": {"causal": True, "mask": True},
    "bias": {"bias": True},
    "softcap and sink": {"causal": True, "softcap": 3.0, "sink": True},
    "dropout": {"causal": True, "dropout_p": 0.3},
}


def layout_of(kind: str, lengths, parts: int) -> Layout:
    """A layout of one sequence or of packed documents."""
    if kind.startswith("packed"):
        starts = torch.tensor([0, *lengths]).cumsum(0)
        return Layout.packed(starts, parts, kind.removeprefix("packed "))
    more = (8,) if kind == "striped" else ()
    return getattr(Layout, kind)(lengths[0], parts, *more)


class Problem:
    """The whole tensors of a call, the same on every rank."""

    def __init__(self, layout: Layout, parts: int, feature: str, dtype=torch.float32):
        torch.manual_seed(5)
        self.layout, seqlen = layout, layout.seqlen
        batch = 1 if layout.is_packed else BATCH
        documents = len(layout.lengths) if layout.is_packed else batch
        heads_k = HEADS if parts == 3 else 4
        make = lambda heads, width=WIDTH: torch.randn(batch, heads, seqlen, width, dtype=dtype)  # noqa: E731
        self.q, self.k, self.v, self.dout = make(HEADS), make(heads_k), make(heads_k), make(HEADS)
        self.dlse = make(HEADS)[..., 0].float().to(torch.promote_types(dtype, torch.float32))
        self.options = dict(FEATURES[feature])
        take = self.options.pop
        slopes = take("alibi_slopes", None)
        if slopes is not None:
            shape = (documents, HEADS) if slopes == "each" else (HEADS,)
            self.options["alibi_slopes"] = torch.rand(shape)
        self.mask = self.bias = self.sink = None
        if take("mask", False):
            self.mask = torch.rand(1, HEADS, seqlen, seqlen) < 0.3
            self.mask[:, :, seqlen // 2] = False  # a row that sees nothing on any hop
        if take("bias", False):
            self.bias = torch.randn(batch, 1, seqlen, seqlen, dtype=dtype)
        if take("sink", False):
            self.sink = torch.randn(HEADS, dtype=self.dlse.dtype)

    def gradients(self, function, q, k, v, dout, dlse, bias) -> list:
        """out, lse and the gradients of q, k, v, bias and sink."""
        leaves = [
            None if x is None else x.clone().requires_grad_() for x in (q, k, v, bias, self.sink)
        ]
        out, lse = function(*leaves)
        torch.autograd.backward([out, lse], [dout, torch.where(torch.isfinite(lse), dlse, 0.0)])
        return [out.detach(), lse.detach(), *[None if x is None else x.grad for x in leaves]]

    def one_process(self) -> list:
        """What one process computes of the whole."""

        def whole(q, k, v, bias, sink):
            torch.manual_seed(11)
            more = dict(self.options, sink=sink, return_lse=True)
            if not self.layout.is_packed:
                return attn_ext.attention(q, k, v, mask=self.mask, bias=bias, **more)
            if self.mask is not None or bias is not None:
                return attn_ext.attention(q, k, v, mask=self.documents(), bias=bias, **more)
            starts = torch.tensor([0, *self.layout.lengths]).cumsum(0).to(torch.int32)
            rows = (x[0].transpose(0, 1) for x in (q, k, v))
            out, lse = attn_ext.attention_varlen(*rows, starts, starts, **more)
            return out.transpose(0, 1)[None], lse[None]

        inputs = (self.q, self.k, self.v, self.dout, self.dlse, self.bias)
        return self.gradients(whole, *inputs)

    def documents(self) -> torch.Tensor:
        """The mask of pairs within one document, as varlen has no mask over the whole row."""
        lengths = torch.tensor(self.layout.lengths)
        of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        same = (of[:, None] == of[None, :])[None, None]
        return same if self.mask is None else same & self.mask

    def shards(self, rank: int, **more) -> list:
        """What a rank computes of its shard."""
        own = lambda x: None if x is None else self.layout.shard(x, 2, rank)  # noqa: E731

        def part(q, k, v, bias, sink):
            torch.manual_seed(11 + rank)
            return context_attention(
                q, k, v, bias=bias, sink=sink, mask=own(self.mask), layout=self.layout,
                return_lse=True, **self.options, **more,
            )  # fmt: skip

        return self.gradients(
            part, *map(own, (self.q, self.k, self.v, self.dout, self.dlse, self.bias))
        )

    def errors(self, rank: int, group, **more) -> list[float]:
        """Of out, lse and each gradient."""
        want, got = self.one_process(), self.shards(rank, **more)
        found = [
            relative(a, self.layout.shard(b, 2, rank))
            for a, b in zip(got[:6], want[:6], strict=True)
            if a is not None
        ]
        if self.sink is not None:
            total = got[6].clone()
            dist.all_reduce(total, group=group)
            found.append(relative(total, want[6]))
        return found


def mesh_of(group, parts: int, method: str):
    """The group; for "2d" a mesh of 2 x 2."""
    if method != "2d":
        return group
    if "mesh" not in _meshes:
        names = ("ring", "ulysses")
        _meshes["mesh"] = dist.init_device_mesh("cpu", (2, parts // 2), mesh_dim_names=names)
    return _meshes["mesh"]


_meshes: dict = {}


def agrees(group, rank, parts, method, kind, lengths, features, dtype="float32") -> float:
    """The largest error of some features."""
    layout = layout_of(kind, lengths, parts)
    worst = 0.0
    for feature in features:
        problem = Problem(layout, parts, feature, getattr(torch, dtype))
        more = dict(method=method, mesh=mesh_of(group, parts, method))
        worst = max(worst, *problem.errors(rank, group, **more))
    return worst


def bf16(group, rank, parts) -> list:
    """[(error of shards, error of one call)] in bfloat16 of out, dq, dk and dv, against float64."""
    layout = Layout.zigzag(512, parts)
    problem = Problem(layout, parts, "causal", torch.bfloat16)
    one, got = problem.one_process(), problem.shards(rank, mesh=group, method="ring")
    for name in ("q", "k", "v", "dout", "dlse"):
        setattr(problem, name, getattr(problem, name).double())
    truth = problem.one_process()
    found = []
    for at in (0, 2, 3, 4):
        squares = []
        for mine in (got[at], layout.shard(one[at], 2, rank)):
            off = (mine.double() - layout.shard(truth[at], 2, rank)).square().sum()
            dist.all_reduce(off, group=group)
            squares.append(float(off.sqrt()))
        found.append(tuple(squares))
    return found


def dropout_bits(group, rank, parts, kind, method) -> bool:
    """With V the identity O is the weights: those that are kept are the same as one process's."""
    layout = layout_of(kind, (61,), parts)
    torch.manual_seed(3)
    heads = HEADS
    q, k = (torch.randn(BATCH, heads, 61, WIDTH) for _ in range(2))
    v = torch.eye(61).expand(BATCH, heads, 61, 61).contiguous()
    torch.manual_seed(11)
    want = attn_ext.attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(11 + rank)
    own = (layout.shard(x, 2, rank) for x in (q, k, v))
    got = context_attention(*own, layout=layout, mesh=group, method=method, dropout_p=0.4)
    return torch.equal(got != 0, layout.shard(want, 2, rank) != 0)


def invisible_nan(group, rank, parts) -> bool:
    """NaN in keys and values that a mask hides reaches nothing."""
    layout = Layout.zigzag(67, parts)
    problem = Problem(layout, parts, "mask")
    problem.mask[..., 9:14] = False
    clean = problem.shards(rank, mesh=group, method="ring")
    problem.k[:, :, 9:14] = torch.nan
    problem.v[:, :, 9:14] = torch.inf
    got = problem.shards(rank, mesh=group, method="ring")
    return all(torch.equal(a, b) for a, b in zip(got[:5], clean[:5], strict=True))


def repeated(group, rank, parts, method) -> bool:
    """deterministic: the same bits again; Ulysses' forward has those of one process."""
    layout = Layout.zigzag(512, parts)
    problem = Problem(layout, parts, "causal")
    more = dict(mesh=group, method=method, deterministic=True)
    first, again = (problem.shards(rank, **more) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first[:5], again[:5], strict=True))
    if method == "ulysses":
        same = same and torch.equal(first[0], layout.shard(problem.one_process()[0], 2, rank))
    return same


def wrong_call(group, rank, parts, what) -> str:
    """The error of a call in which the last rank deviates."""
    agree.forget()
    last = rank == parts - 1
    layout = Layout.zigzag(40 + 8 * (last and what == "layout"), parts)
    n = layout.length(rank) + (3 if last and what == "length" else 0)
    width = WIDTH + 1 if last and what == "arguments" else WIDTH
    q, k, v = (torch.randn(1, HEADS, n, w) for w in (WIDTH, width, WIDTH))
    more = dict(window=(-3, None)) if last and what == "window" else {}
    try:
        context_attention(q, k, v, layout=layout, mesh=group, causal=True, **more)
    except ValueError as error:
        return str(error)
    return "no error"


def wrong_mesh(group, rank, parts) -> str:
    """The error of a layout for another number of ranks, and of heads that do not divide."""
    found = []
    for layout, method, heads in (
        (Layout.zigzag(40, parts + 1), "ring", HEADS),
        (Layout.zigzag(40, parts), "ulysses", parts + 1),
        (Layout.zigzag(40, parts), "2d", HEADS),
    ):
        n = layout.length(rank)
        q, k, v = (torch.randn(1, heads, n, WIDTH) for _ in range(3))
        try:
            context_attention(q, k, v, layout=layout, mesh=group, method=method)
            found.append("no error")
        except ValueError as error:
            found.append(str(error))
    return "\n".join(found)


def unsharded(group, rank, parts) -> bool:
    """unshard is the inverse of shard, and labels are shifted in the whole."""
    layout = layout_of("packed zigzag", (4, 3, 0, 1, 53), parts)
    x = torch.arange(2 * layout.seqlen * 3).view(2, layout.seqlen, 3)
    whole = layout.unshard(layout.shard(x, 1, rank), 1, group)
    labels = torch.arange(100, 100 + layout.seqlen)[None]
    shifted = layout.unshard(layout.shift_labels(labels, rank), 1, group)
    want = labels.roll(-1, 1)
    for end in (4, 7, 8, 61):
        want[:, end - 1] = -100
    return torch.equal(whole, x) and torch.equal(shifted, want)


def loss(group, rank, parts) -> float:
    """mean_loss and its gradient against one process."""
    torch.manual_seed(2)
    x = torch.randn(10)
    own = x[rank::parts].clone().requires_grad_()
    got = mean_loss(own.square().sum(), own.numel(), group)
    got.backward()
    return max(
        relative(got.detach(), x.detach().square().mean()),
        relative(own.grad / parts, own.detach() / 5),
    )


def decode(group, rank, parts) -> float:
    """A cache that is cut over the ranks against one cache."""
    torch.manual_seed(4)
    batch, capacity, heads_k = 3, 50, 4
    k, v = (torch.randn(batch, heads_k, capacity, WIDTH) for _ in range(2))
    lengths = torch.tensor([50, 7, 0], dtype=torch.int32)
    for b, n in enumerate(lengths.tolist()):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
    ends = [capacity * r // parts for r in range(parts + 1)]
    own = slice(ends[rank], ends[rank + 1])
    worst = 0.0
    for new in (1, 3):
        q = torch.randn(batch, HEADS, new, WIDTH)
        for options in ({}, {"window": (9, None)}, {"alibi_slopes": torch.rand(HEADS)}):
            options = dict(options, sink=torch.randn(HEADS), softcap=4.0)
            want = attn_ext.attention_decode(q, k, v, cache_seqlens=lengths, causal=True, **options)
            got = context_decode(
                q, k[:, :, own], v[:, :, own], k_first=ends[rank], whole_lengths=lengths,
                group=group, causal=True, **options,
            )  # fmt: skip
            worst = max(worst, relative(got, want))
    return worst


# Planted bugs: each is put in, and what it does to a result is returned.


@contextlib.contextmanager
def instead(place, name, value):
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)


def as_on_nccl(group, rank, parts, kind, lengths) -> float:
    """The largest error of a ring whose hops are batches of point-to-point operations, which the
    host waits for without looking around: all that NCCL's way has of its own."""
    batches = []

    def counted(*arguments):
        batches.append(arguments)
        return point_to_point(*arguments)

    point_to_point = comm._point_to_point
    with (
        instead(comm, "_on_gloo", lambda x, group: False),
        instead(comm, "_finish", lambda work, group: work.wait()),
        instead(comm, "_point_to_point", counted),
    ):
        error = agrees(group, rank, parts, "ring", kind, lengths, ("causal", "dropout"))
    return error if batches else float("inf")


def _with_shortcut(call, dout, delta, sums, needs):
    """The shard's backward by the kernel for whole rows, which finds delta by itself."""
    out, lse = torch.zeros_like(dout), sums.sum(-1)
    assert lse.shape == lse_shape(call)
    grads = cpu.backward(call, dout, out, lse, -delta, needs)
    return type(grads)(*[x if x is None else x.to(lse.dtype) for x in grads])


def _unguarded(out, sums, part, part_sums):
    lse, part_lse = sums.sum(-1), part_sums.sum(-1)
    top = torch.maximum(lse, part_lse)
    old, new = torch.exp(lse - top), torch.exp(part_lse - top)
    total = old + new
    out.mul_((old / total)[..., None]).addcmul_(part, (new / total)[..., None])
    sums.copy_(torch.stack([top, torch.log(total)], -1))


def _source_with(function, old: str, new: str):
    """The function with other text."""
    source = inspect.cleandoc("\n" + inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times"
    space = dict(vars(inspect.getmodule(function)))
    exec(source.replace(old, new), space)
    return space[function.__name__]


def _late_and_without_wait(rank):
    """hops() that does not wait, with a sender that is late: what is there then is not the keys."""
    hops = _source_with(ring.Ring.hops, "moving.wait()", "pass")

    def permute(send, recv, *rest):
        recv.fill_(torch.nan)
        if rank == 0:
            time.sleep(0.3)  # without it the right keys may have come by luck
        return comm.permute(send, recv, *rest)

    return hops, permute


def planted(group, rank, parts, bug) -> float:
    """The largest error with a bug: more than the tests allow."""
    feature = {"guard": "mask", "seed": "dropout"}.get(bug, "causal")
    layout = Layout.zigzag(67, parts)
    problem = Problem(layout, parts, feature)
    if bug == "guard":  # rows that see no key of a hop
        problem.mask[..., : 67 // 3] = False
    with contextlib.ExitStack() as stack:
        put = lambda *x: stack.enter_context(instead(*x))  # noqa: E731
        if bug == "shortcut":
            put(cpu, "backward_partial", _with_shortcut)
        elif bug == "guard":
            put(operators, "merge", _unguarded)
        elif bug == "seed":
            put(comm, "broadcast", lambda x, *rest: x)
        elif bug == "early":
            old = "own += coming"
            put(ring.Ring, "backward", _source_with(ring.Ring.backward, old, "pass"))
        elif bug == "wait":
            hops, permute = _late_and_without_wait(rank)
            put(ring.Ring, "hops", hops)
            module = type(comm)("late")
            vars(module).update(vars(comm), permute=permute)
            put(ring, "comm", module)
        found = max(problem.errors(rank, group, mesh=group, method="ring"))
    dist.barrier(group=group)  # what a bug left on its way has come before the next case
    return found


def eight(rank, world) -> float:
    """The largest error on more ranks than there are heads of K and V."""
    features = ("causal", "both sides", "dropout")
    of_ring = agrees(dist.group.WORLD, rank, world, "ring", "zigzag", (67,), features)
    packed = ("ring", "packed zigzag", (4, 3, 0, 1, 53), ("causal", "bias"))
    return max(of_ring, agrees(dist.group.WORLD, rank, world, *packed))
