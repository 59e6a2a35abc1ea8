"""Attention of DTensors that the operators' own rules (`attn_ext.ops.dtensor`) cannot shard: over
the sequence, where keys go round the ring, and with dropout, whose counter is that of the whole.

Each rank computes with its shards and says where they stand: the ring by its layout, dropout by the
batch and head offsets of `attn_ext.core.schema.Frame`.
"""

from __future__ import annotations

import torch

from attn_ext.core.schema import FIELDS, GRADIENTS, TENSORS, UNBOUNDED, Call, Frame
from attn_ext.distributed.attention import placed_attention
from attn_ext.distributed.layout import Layout, Segment
from attn_ext.ops import route

BATCH, HEADS, ROWS = range(3)  # dimensions of q, k, v, mask and bias
# Which dimension of a field the batch, the heads and the rows of q are; those left out are whole.
DIMENSIONS = {
    "q": (0, 1, 2), "k": (0, 1, 2), "v": (0, 1, 2), "mask": (0, 1, 2), "bias": (0, 1, 2),
    "sink": (None, 0, None), "w": (None, 0, None),
}  # fmt: skip


def run(call: Call) -> tuple | None:
    """(out, lse, max_logit, entropy) of a call of DTensors, as `attn_ext.ops.route.run` gives them;
    None where the operators' own rules do as well."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    if not isinstance(call.q, DTensor) or call.q.dim() != 4 or call.seqlens_k is not None:
        return None
    mesh, whole = call.q.device_mesh, Replicate()
    targets = [p if type(p) is Shard and p.dim <= ROWS else whole for p in call.q.placements]
    over_rows = [m for m, p in enumerate(targets) if p.is_shard(ROWS)]
    if not _heads_divide(call, mesh, targets):
        targets = [whole if p.is_shard(HEADS) else p for p in targets]
    if len(over_rows) != 1 or not _can_go_round(call):
        targets = [whole if p.is_shard(ROWS) else p for p in targets]
        over_rows = []
    if not over_rows and call.rng_state is None:
        return None
    _refuse_plain_tensors(call, mesh)
    shards = [_local(name, getattr(call, name), mesh, targets) for name in FIELDS[:TENSORS]]
    own = Call(*shards, *call[TENSORS:])._replace(rng_state=_shared(call.rng_state, mesh))
    first_b = _range(call.q.shape[0], BATCH, mesh, targets)[0]
    first_h = _range(call.q.shape[1], HEADS, mesh, targets)[0]
    if over_rows:
        found = _ring(own, mesh, over_rows[0], call, first_b, first_h)
    else:
        found = _with_offsets(own, first_b, first_h)
    return tuple(_as_dtensor(x, call, mesh, targets) for x in found)


def _heads_divide(call: Call, mesh, targets) -> bool:
    """Whether query heads stay with their key head on every rank."""
    parts = 1
    for m, placement in enumerate(targets):
        parts *= mesh.size(m) if placement.is_shard(HEADS) else 1
    return call.q.shape[1] % parts == 0 and call.k.shape[1] % parts == 0


def _can_go_round(call: Call) -> bool:
    """Whether context attention has all that the call asks for."""
    plain = call.normalizer == "softmax" and call.w is None and not call.need_stats
    plain = plain and not torch.compiler.is_compiling()  # a graph cannot hold the layout made here
    return plain and call.frame is None and call.q.shape[2] == call.k.shape[2]


def _refuse_plain_tensors(call: Call, mesh) -> None:
    for name in FIELDS[:TENSORS]:
        x = getattr(call, name)
        if x is None or name == "rng_state":
            continue
        if not hasattr(x, "placements"):
            raise TypeError(f"{name} must be a DTensor where q is one, got {type(x).__name__}")
        if x.device_mesh != mesh:
            raise ValueError(f"{name} must be on q's mesh {mesh}, got {x.device_mesh}")


def _dimensions(name: str, x) -> tuple:
    """Which dimension of a field the batch, the heads and the rows of q are; None: it has none, or
    it is the same for all of them."""
    if name == "alibi_slopes":
        return (0, 1, None) if x.dim() == 2 else (None, 0, None)
    found = DIMENSIONS[name]
    if name in ("mask", "bias"):
        return tuple(d if x.shape[d] > 1 else None for d in found)
    return found


def _local(name: str, x, mesh, targets):
    """This rank's part of a field; its gradient is a part of the whole's where ranks share it."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    if x is None or name == "rng_state":
        return x
    places, gradients = [], []
    for placement in targets:
        at = _dimensions(name, x)[placement.dim] if placement.is_shard() else None
        places.append(Replicate() if at is None else Shard(at))
        shared = at is None and placement.is_shard() and name in GRADIENTS
        gradients.append(Partial() if shared else places[-1])
    return x.redistribute(mesh, places).to_local(grad_placements=gradients)


def _range(size: int, dim: int, mesh, targets) -> tuple[int, int]:
    """(first, last) of what this rank has of a dimension, cut as torch.chunk does."""
    first, last = 0, size
    for m, placement in enumerate(targets):
        if placement.is_shard(dim):
            share = -(-(last - first) // mesh.size(m))
            start = min(first + mesh.get_local_rank(m) * share, last)
            first, last = start, min(start + share, last)
    return first, last


def _shared(state, mesh):
    """The seed of the mesh's first rank."""
    for m in range(mesh.ndim if state is not None else 0):
        state = torch.ops.attn_ext.shared_seed(state, mesh.get_group(m).group_name)
    return state


def _ring(own: Call, mesh, over: int, call: Call, first_b: int, first_h: int) -> tuple:
    """The call whose rows are sharded over one dimension of the mesh."""
    parts, seqlen = mesh.size(over), call.q.shape[2]
    share = -(-seqlen // parts)
    cuts = [(min(r * share, seqlen), min((r + 1) * share, seqlen)) for r in range(parts)]
    layout = Layout((seqlen,), tuple((Segment(0, *c),) if c[0] < c[1] else () for c in cuts))
    left, right = (None if w == UNBOUNDED else w for w in (own.window_left, own.window_right))
    out, lse = placed_attention(
        own.q, own.k, own.v, layout=layout, mesh=mesh.get_group(over), method="ring",
        window=(left, right), mask=own.mask, bias=own.bias, softcap=own.softcap,
        alibi_slopes=own.alibi_slopes, sink=own.sink, dropout_p=own.dropout_p, scale=own.scale,
        return_lse=True, deterministic=own.deterministic, backend=own.backend,
        first_b=first_b, first_h=first_h, rng_state=own.rng_state,
    )  # fmt: skip
    return out, lse, None, None


def _with_offsets(own: Call, first_b: int, first_h: int) -> tuple:
    """The call of some of the batch and heads, whose dropout counts them as the whole does."""
    batch, _, seqlen_q, _ = own.q.shape
    place = [Frame(first_b + b, first_h, 0, 0, seqlen_q, own.k.shape[2]) for b in range(batch)]
    place = torch.tensor(place, dtype=torch.int32, device=own.q.device)
    return route.run(own._replace(frame=place.view(batch, len(Frame._fields))))


def _as_dtensor(x, call: Call, mesh, targets):
    """A result [B, Hq, Sq(, Dv)] of the shards as that of the whole."""
    from torch.distributed.tensor import DTensor

    if x is None or (x.dim() < 3 and x.numel() == 0):  # statistics that were not asked for
        return x
    shape = torch.Size((*call.q.shape[:3], *x.shape[3:]))
    if torch.compiler.is_compiling():  # whose sizes may be symbols, which cannot be sorted
        x, order = x.contiguous(), range(x.dim())
    else:
        order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    stride, step = [0] * x.dim(), 1
    for d in reversed(order):
        stride[d], step = step, step * shape[d]
    return DTensor.from_local(x, mesh, targets, run_check=False, shape=shape, stride=tuple(stride))
