"""context_attention: attention over a sequence that lies on several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed import ProcessGroup

from attn_ext.backends import registry
from attn_ext.core import validate
from attn_ext.core.schema import Call
from attn_ext.distributed import agree, comm, model, operators, plan
from attn_ext.distributed.heads import Heads
from attn_ext.distributed.layout import Layout
from attn_ext.distributed.local import Scalars
from attn_ext.functional import common
from attn_ext.ops import parts, route

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Literal

    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

METHODS = ("auto", "ring", "ulysses", "allgather", "2d")


class _Groups(NamedTuple):
    """Where a rank stands.  ulysses, ring: groups, None where there is none."""

    method: str  # of the ring
    ring: object | None
    ulysses: object | None
    ring_rank: int
    ulysses_rank: int
    parts: int
    across: int  # ranks of the ulysses group

    @property
    def all(self) -> tuple:
        return tuple(g for g in (self.ulysses, self.ring) if g is not None)

    def lengths(self, layout: Layout) -> list[list[int]]:
        """Of the shards of each group of `all`."""
        first = self.ring_rank * self.across
        found = []
        if self.ulysses is not None:
            found.append([layout.length(first + i) for i in range(self.across)])
        if self.ring is not None:
            ranks = range(self.ulysses_rank, self.parts, self.across)
            found.append([layout.length(r) for r in ranks])
        return found


def groups_of(mesh, method: str) -> tuple:
    """The group of all ranks; for "2d" those of 'ulysses' and 'ring'."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if method != "2d":
        return (comm.one_group(mesh),)
    names = getattr(mesh, "mesh_dim_names", None)
    if names != ("ring", "ulysses"):
        raise ValueError(
            f"mesh must have the dimensions ('ring', 'ulysses') with method='2d', got {names}"
        )
    return mesh.get_group("ulysses"), mesh.get_group("ring")


def refuse(mesh, method: str) -> None:
    """Tells the other ranks of a mesh that this one's call is wrong, wherever that was found: in
    the mesh or the method, too."""
    try:
        every = groups_of(mesh, method)
    except (ValueError, TypeError):
        of_mesh = getattr(mesh, "get_all_groups", lambda: ())
        every = (mesh,) if isinstance(mesh, ProcessGroup) else tuple(of_mesh())
    agree.refuse(every)


def _placed(layout: Layout, groups, method: str, sizes) -> _Groups:
    """This rank's place in the groups of a method; ValueError where mesh, layout and heads do not
    go together."""
    if method == "2d":
        ulysses, ring = groups
        across = comm.size_of(ulysses)
        place = comm.rank_of(ring), comm.rank_of(ulysses)
        found = _Groups("ring", ring, ulysses, *place, comm.size_of(ring) * across, across)
    else:
        (group,) = groups
        parts, rank = comm.size_of(group), comm.rank_of(group)
        if method == "auto":
            method = model.choose(sizes._replace(parts=parts))
        if method == "ulysses":
            found = _Groups("alone", None, group, 0, rank, parts, parts)
        else:
            found = _Groups(method, group, None, rank, 0, parts, 1)
    if found.parts != layout.parts:
        raise ValueError(f"mesh must have the layout's {layout.parts} ranks, got {found.parts}")
    if not model.fits_heads(sizes.heads_q, sizes.heads_k, found.across):
        raise ValueError(
            f"heads must be multiples of the {found.across} ranks of 'ulysses', got "
            f"{sizes.heads_q} of q and {sizes.heads_k} of k: use method='2d' with fewer of them, "
            "and the other ranks as 'ring'"
        )
    return found


class Prepared(NamedTuple):
    """All of a call but its tensors; constants of a compiled graph."""

    plan: str  # of the ring
    exchange: str  # of rows and heads; "" without
    exchange_heads: tuple[int, int]  # first head of q and how many this rank has
    groups: tuple[str, ...]  # from whose first ranks a seed comes
    whole_lengths: tuple[int, ...] | None  # the ring is one rank: documents, all here
    align: int
    own_rows: tuple[bool, bool]  # whether mask and bias have a row for each query


def prepare(
    layout, mesh, method, shapes, dtype, device, causal, window, scalars, grad_comm_dtype, sides,
    scores, wanted, keep, firsts=(0, 0),
) -> Prepared:  # fmt: skip
    """Checks the call, agrees with the other ranks, and names what it does.  shapes, dtype, device:
    each of q, k and v; sides: which of mask, bias, slopes and sink there are; scores: the
    shapes of mask and bias, or None; wanted: which of q, k, v, bias and sink want gradients;
    keep: a compiled graph will hold the names; firsts: batch element and head of the larger call
    that these are of."""
    q, k, _ = shapes
    try:
        every = groups_of(mesh, method)
        sizes = model.Sizes(
            q[0], q[1], k[1], layout.seqlen, q[3], dtype[0].itemsize, layout.parts, bool(causal),
            device[0].type,
        )  # fmt: skip
        groups = _placed(layout, every, method, sizes)
        softcap, dropout_p, scale, deterministic, backend = scalars
        align, left, right = validate.dense(
            *shapes, *dtype, *device, causal, *window, softcap, dropout_p, scale, deterministic,
            backend,
        )  # fmt: skip
        if layout.is_packed and q[0] != 1:
            raise ValueError(f"q must have batch size 1 with a packed layout, got {q[0]}")
        if grad_comm_dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"grad_comm_dtype must be a 16 or 32 bit float, got {grad_comm_dtype}")
    except Exception:
        refuse(mesh, method)
        raise
    lengths = groups.lengths(layout)
    heads = q[1] // groups.across
    first_h = groups.ulysses_rank * heads
    numbers = Scalars(
        scale, softcap, dropout_p, left, right, deterministic, backend, layout.is_packed,
        firsts[0], firsts[1] + first_h,
    )  # fmt: skip
    inner = layout.grouped(groups.across)
    ring = "" if groups.ring is None else groups.ring.group_name
    names = tuple(g.group_name for g in groups.all)
    ours = plan.Plan(inner, ring, groups.method, numbers, grad_comm_dtype, names)
    signature = plan.Plan(layout, "", groups.method, numbers, grad_comm_dtype).signature()
    options = agree_on(signature, sides)
    own_rows = agree.check(groups.all, shapes, dtype[0], options, lengths, scores, wanted)
    exchange = ""
    if groups.across > 1:
        first = groups.ring_rank * groups.across
        exchange = Heads(layout, groups.ulysses.group_name, first).name(keep)
    alone = layout.lengths if groups.ring is None else None
    place = (first_h, heads)
    return Prepared(plan.name_of(ours, keep), exchange, place, names, alone, align, own_rows)


# What torch.compiler.assume_constant_result sets, which would import the compiler: four seconds.
prepare._dynamo_marked_constant = True


def agree_on(signature: str, sides) -> str:
    """The hash of all that ranks must have in common beside shapes."""
    import hashlib

    return hashlib.sha256(f"{signature} {sides}".encode()).hexdigest()


def context_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: Layout,
    mesh: DeviceMesh | dist.ProcessGroup,
    method: Literal["auto", "ring", "ulysses", "allgather", "2d"] = "auto", causal: bool = False,
    window: Sequence[int | None] | None = (None, None), mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None, softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, sink: torch.Tensor | None = None,
    dropout_p: float = 0.0, scale: float | None = None, return_lse: bool = False,
    deterministic: bool = False, grad_comm_dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Any:  # fmt: skip
    """`attention` of a sequence whose positions lie on the ranks of a mesh: exact, differentiable,
    the same values and gradients as on one device.

    q [B, Hq, S_local, D], k [B, Hk, S_local, D], v [B, Hk, S_local, Dv]: this rank's shard of
    `layout`, in its order (`layout.shard`); packed documents, too, with B = 1.
    mesh: a DeviceMesh of one dimension, or a process group; for method="2d" a mesh of dimensions
    ("ring", "ulysses"), whose ranks are those of the layout in row-major order.
    method: "ring" (keys travel), "ulysses" (rows against heads), "allgather" (all keys at once),
    "2d" (ulysses within ring), or "auto", which `attn_ext.distributed.explain` explains.
    mask, bias: [B or 1, Hq or 1, S_local or 1, S or 1], this rank's rows and the whole's columns.
    alibi_slopes: [Hq], or [B, Hq]; packed: [documents, Hq].   dropout_p: one seed for all ranks.
    grad_comm_dtype: in which the gradients of keys travel.
    All ranks make the same call, and all run its backward.  The gradients of sink, and of a bias
    that is the same for all rows, are this rank's part: their sum over the ranks is the whole's, as
    with each parameter that all ranks have.
    All other arguments and errors: as `attention`.  ValueError on every rank where they do not
    make the same call; ContextParallelError where a rank is gone or silent.
    """
    return placed_attention(
        q, k, v, layout=layout, mesh=mesh, method=method, causal=causal, window=window, mask=mask,
        bias=bias, softcap=softcap, alibi_slopes=alibi_slopes, sink=sink, dropout_p=dropout_p,
        scale=scale, return_lse=return_lse, deterministic=deterministic,
        grad_comm_dtype=grad_comm_dtype, backend=backend,
    )  # fmt: skip


def placed_attention(
    q, k, v, *, layout, mesh, method, causal=False, window, mask, bias, softcap, alibi_slopes, sink,
    dropout_p, scale, return_lse, deterministic, grad_comm_dtype=torch.float32, backend,
    first_b=0, first_h=0, rng_state=None,
):  # fmt: skip
    """`context_attention` of a part of the batch and heads of a larger call, as which dropout
    counts them.  rng_state: its seed, the same on all ranks; None: one is drawn."""
    try:
        validate.boolean("return_lse", return_lse)
        q, k, v, bias = _rows(q, k, v, bias, layout)
        softcap, dropout_p, _ = validate.scalars(softcap, dropout_p, scale)
        window = validate.window_pair(window)
        sides = _sides(q, layout, mask, bias, alibi_slopes, sink)
        _refuse_backend(q, k, v, sides, softcap, dropout_p, deterministic, backend)
        operators.refuse_forward_mode(q, k, v, *sides)
    except Exception:
        refuse(mesh, method)
        raise
    prepared = prepare(
        layout, mesh, method, (_numbers(q), _numbers(k), _numbers(v)),
        (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device),
        causal, window, (softcap, dropout_p, scale, deterministic, backend), grad_comm_dtype,
        tuple(x is not None for x in sides),
        tuple(None if x is None else _numbers(x) for x in sides[:2]),
        tuple(route.wants_grad(x) for x in (q, k, v, sides[1], sides[3])),
        torch.compiler.is_compiling(), (first_b, first_h),
    )  # fmt: skip
    state = rng_state
    if dropout_p > 0 and state is None:
        state = common.draw_rng_state(q)
        for group in prepared.groups:
            state = torch.ops.attn_ext.shared_seed(state, group)
    if torch.compiler.is_compiling():  # in whose graph each operator tells the others by itself
        out, lse = _run(q, k, v, (*sides, state), prepared)
    else:
        with comm.announced([comm.by_name(name) for name in prepared.groups]):
            out, lse = _run(q, k, v, (*sides, state), prepared)
    return (out, lse) if return_lse else out


def _numbers(x) -> tuple[int, ...]:
    """The shape of a tensor, without symbols where a second layout is compiled: a plan is of one
    shape, and the length of a range is a number."""
    if torch.compiler.is_compiling():
        return tuple(len(range(n)) for n in x.shape)
    return tuple(x.shape)


def _rows(q, k, v, bias, layout) -> tuple:
    """q, k, v and bias as autocast wants them, where they are shards at all."""
    for name, value in (("q", q), ("k", k), ("v", v)):
        validate.tensor(name, value)
        validate.dimensions(name, value.shape, 4, "[B, H, S_local, D]")
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout, got {type(layout).__name__} {layout!r}")
    return common.autocast(q, k, v, bias)


def _sides(q, layout, mask, bias, alibi_slopes, sink) -> tuple:
    """The tensors beside q, k and v, checked."""
    batch, heads, rows, _ = q.shape
    documents = len(layout.lengths) if layout.is_packed else batch
    mask, bias = common.scores(q, mask, bias, batch, heads, rows, layout.seqlen)
    if alibi_slopes is not None:
        alibi_slopes = validate.alibi(alibi_slopes, q.device, documents, heads)
    if sink is not None:
        sink = validate.sink_logits(sink, q.device, q.dtype, heads)
    return mask, bias, alibi_slopes, sink


def _refuse_backend(q, k, v, sides, softcap, dropout_p, deterministic, backend) -> None:
    """NotImplementedError where the backend that was named cannot serve such a call; found before
    data moves, it leaves the ranks in step."""
    named = isinstance(backend, str) and backend not in registry.CHOICES
    if not named or torch.compiler.is_compiling():
        return
    mask, bias, slopes, _ = sides
    parts.server(
        Call(
            q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=slopes, softcap=softcap,
            dropout_p=dropout_p, deterministic=deterministic, backend=backend,
            max_seqlen_q=q.shape[2], max_seqlen_k=k.shape[2], grad=route.wants_grad(q, k, v, bias),
        )
    )  # fmt: skip


def _context(q, k, v, sides, plan_name: str) -> tuple:
    """(out, lse) of the operator."""
    out, sums = torch.ops.attn_ext.context(q, k, v, *sides, plan_name)
    return out, sums.sum(-1)


def _run(q, k, v, sides, prepared: Prepared) -> tuple:
    """(out, lse) of this rank's rows."""
    if not prepared.exchange:
        return _context(q, k, v, sides, prepared.plan)
    heads = q.shape[1]
    mask, bias, slopes, sink, state = sides
    first, count = prepared.exchange_heads

    def swapped(x):
        return torch.ops.attn_ext.rows_to_heads(x.contiguous(), x.shape[1], prepared.exchange)

    def scores(x, own_rows):
        """Rows of the group, heads of this rank."""
        if x is None or not own_rows:
            return x if x is None or x.shape[1] == 1 else x[:, first : first + count]
        return swapped(x)

    if mask is not None:
        mask = scores(mask.to(torch.uint8), prepared.own_rows[0]).to(torch.bool)
    slopes = slopes if slopes is None else slopes[..., first : first + count].contiguous()
    sink = sink if sink is None else sink[first : first + count].contiguous()
    sides = (mask, scores(bias, prepared.own_rows[1]), slopes, sink, state)
    out, lse = _inner(swapped(q), swapped(k), swapped(v), sides, prepared)

    def back(x):
        return torch.ops.attn_ext.heads_to_rows(x.contiguous(), heads, prepared.exchange)

    return back(out), back(lse.unsqueeze(-1)).squeeze(-1)


def _inner(q, k, v, sides, prepared: Prepared) -> tuple:
    """(out, lse) of the rows and heads that this rank has after the exchange.  Where these are all
    rows of one dense sequence, it is `attention`."""
    mask, bias, slopes, sink, state = sides
    ours = plan.by_name(prepared.plan)
    s = ours.scalars
    if prepared.whole_lengths is None or s.packed or state is not None:
        return _context(q, k, v, sides, prepared.plan)
    call = Call(
        q=q, k=k, v=v, mask=mask, bias=bias, alibi_slopes=slopes, sink=sink,
        max_seqlen_q=q.shape[2], max_seqlen_k=k.shape[2],
        scale=q.shape[-1] ** -0.5 if s.scale is None else s.scale, softcap=s.softcap,
        align=prepared.align, window_left=s.left, window_right=s.right,
        deterministic=s.deterministic, grad=route.wants_grad(q, k, v, bias, sink),
        bias_grad=route.wants_grad(bias), backend=s.backend,
    )  # fmt: skip
    out, lse, *_ = route.run(call)
    return out, lse
