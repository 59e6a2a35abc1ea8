"""The operators of context attention, opaque to compilers: process groups and plans are known to
them by name.

attn_ext::context            O and sums (attn_ext.ops.parts) of this rank's queries, the keys of all
                             ranks of the group
attn_ext::context_backward   the gradients
attn_ext::rows_to_heads      [B, H, S_local, D] -> [B, heads of this rank, S of the group, D]
attn_ext::heads_to_rows      the way back
attn_ext::shared_seed        rank 0's seed
attn_ext::group_sum          the sum over the ranks
"""

from __future__ import annotations

import torch

from attn_ext.core.layout import empty_like_layout
from attn_ext.core.schema import statistics_dtype
from attn_ext.distributed import comm, local, plan
from attn_ext.distributed.heads import Heads
from attn_ext.distributed.pieces import pieces
from attn_ext.distributed.ring import Gathered, Ring
from attn_ext.ops.dispatch import TAGS, lib

_SIDES = "Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, Tensor? rng_state"
_INPUTS = f"Tensor q, Tensor k, Tensor v, {_SIDES}, str plan"
lib.define(f"context({_INPUTS}) -> (Tensor out, Tensor sums)", tags=tuple(TAGS))
lib.define(
    f"context_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor sums, {_INPUTS}, "
    "bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    tags=tuple(TAGS),
)
for _name in ("rows_to_heads", "heads_to_rows"):
    lib.define(f"{_name}(Tensor x, int heads, str layout) -> Tensor", tags=tuple(TAGS))
lib.define("shared_seed(Tensor state, str group) -> Tensor", tags=tuple(TAGS))
lib.define("group_sum(Tensor x, str group) -> Tensor", tags=tuple(TAGS))


class _Alone:
    """All keys are here."""

    def __init__(self, ours, q, k, v, sides):
        segments = ours.layout.segments(0)
        found = pieces(ours.layout, segments, segments, ours.rules(sides))
        self.blocks = local.blocks(found, q, k, v, sides, ours.scalars)
        self.k, self.v = k, v

    def forward(self, out, sums) -> None:
        local.forward(self.blocks, out, sums, fresh=True)

    def backward(self, dout, delta, sums, dq, dbias) -> tuple:
        dk, dv = (torch.zeros_like(x, dtype=sums.dtype) for x in (self.k, self.v))
        local.backward(self.blocks, dout, delta, sums, local.Gradients(dq, dk, dv, dbias))
        return dk, dv


def _worker(ours, q, k, v, sides):
    kind = _Alone if not ours.group else Gathered if ours.method == "allgather" else Ring
    return kind(ours, q, k, v, sides)


def _forward(q, k, v, mask, bias, alibi_slopes, sink, rng_state, name):
    ours, sides = plan.by_name(name), local.Sides(mask, bias, alibi_slopes, rng_state)
    with comm.announced(ours.groups()):
        out, sums = local.no_rows(q, v)
        _worker(ours, q, k, v, sides).forward(out, sums)
        if sink is not None:
            local.add_sink(out, sums, sink)
        return empty_like_layout(q, v.shape[-1]).copy_(out), sums


def _backward(
    dout, dlse, out, sums, q, k, v, mask, bias, alibi_slopes, sink, rng_state, name, bias_grad
):
    ours, sides = plan.by_name(name), local.Sides(mask, bias, alibi_slopes, rng_state)
    with comm.announced(ours.groups()):
        wide = sums.dtype
        delta = (dout.to(wide) * out.to(wide)).sum(-1)
        delta = delta if dlse is None else delta - dlse
        dq = torch.zeros_like(q, dtype=wide)
        dbias = torch.zeros_like(bias, dtype=wide) if bias_grad else None
        dk, dv = _worker(ours, q, k, v, sides).backward(dout, delta, sums, dq, dbias)
        dsink = None if sink is None else local.sink_gradient(sink, sums, delta)
        made = _gradients(q, k, v, bias, sink, bias_grad)
        for into, grad in zip(made, (dq, dk, dv, dbias, dsink), strict=True):
            if grad is not None:
                into.copy_(grad)
        return made


def _gradients(q, k, v, bias, sink, bias_grad) -> tuple:
    empty = q.new_empty((0,))
    return (
        *(empty_like_layout(x, x.shape[-1]) for x in (q, k, v)),
        torch.empty_like(bias) if bias_grad else empty,
        q.new_empty((0,)) if sink is None else torch.empty_like(sink),
    )


def _rows_to_heads(x, heads, name):
    ours = Heads.of(name)
    with comm.announced([comm.by_name(ours.group)]):
        return ours.to_heads(x)


def _heads_to_rows(x, heads, name):
    ours = Heads.of(name)
    with comm.announced([comm.by_name(ours.group)]):
        return ours.to_rows(x, heads)


def _shared_seed(state, group):
    group = comm.by_name(group)
    with comm.announced([group]):
        return comm.broadcast(state.clone(), group, "dropout's seed")


def _group_sum(x, group):
    group = comm.by_name(group)
    with comm.announced([group]):
        return comm.add_up(x.clone(), group, "the sum of losses")


for _device in ("CPU", "CUDA"):
    lib.impl("context", _forward, _device)
    lib.impl("context_backward", _backward, _device)
    lib.impl("rows_to_heads", _rows_to_heads, _device)
    lib.impl("heads_to_rows", _heads_to_rows, _device)
    lib.impl("shared_seed", _shared_seed, _device)
    lib.impl("group_sum", _group_sum, _device)


@torch.library.register_fake("attn_ext::context", lib=lib)
def _forward_fake(q, k, v, *rest):
    dtype = statistics_dtype(q.dtype)
    return empty_like_layout(q, v.shape[-1]), q.new_empty((*q.shape[:-1], 2), dtype=dtype)


@torch.library.register_fake("attn_ext::context_backward", lib=lib)
def _backward_fake(dout, dlse, out, sums, q, k, v, mask, bias, slopes, sink, rng, name, bias_grad):
    return _gradients(q, k, v, bias, sink, bias_grad)


@torch.library.register_fake("attn_ext::rows_to_heads", lib=lib)
def _to_heads_fake(x, heads, name):
    return x.new_empty(Heads.of(name).shape_of_heads(x))


@torch.library.register_fake("attn_ext::heads_to_rows", lib=lib)
def _to_rows_fake(x, heads, name):
    return x.new_empty(Heads.of(name).shape_of_rows(x, heads))


@torch.library.register_fake("attn_ext::shared_seed", lib=lib)
@torch.library.register_fake("attn_ext::group_sum", lib=lib)
def _like_fake(x, group):
    return torch.empty_like(x)


def _context_saves(ctx, inputs, output):
    *tensors, name = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.name = name
    ctx.set_materialize_grads(False)


def _context_gradients(ctx, dout, dsums):
    *tensors, out, sums = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dlse = None if dsums is None else dsums[..., 0]  # LSE, their sum, is all that is made of them
    bias_grad = tensors[4] is not None and ctx.needs_input_grad[4]
    dq, dk, dv, dbias, dsink = torch.ops.attn_ext.context_backward(
        dout, dlse, out, sums, *tensors, ctx.name, bias_grad
    )
    sink = tensors[6] is not None and ctx.needs_input_grad[6]
    return (
        dq, dk, dv, None, dbias if bias_grad else None, None, dsink if sink else None, None, None,
    )  # fmt: skip


def _no_context(ctx, inputs, output):
    """Nothing is saved for a derivative that raises."""


def _second_order(ctx, *grads):
    raise NotImplementedError(
        "context_attention has no double backward across ranks: use method='ulysses' with a layout "
        "that is not packed and without dropout, or attention on one process"
    )


def refuse_forward_mode(*tensors) -> None:
    """NotImplementedError where one of the tensors (or None) has a tangent, which would be lost."""
    forward_ad = torch.autograd.forward_ad
    if forward_ad._current_level < 0:
        return
    if any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(
            "attn_ext.distributed has no forward mode: use attention on one process"
        )


def _exchange_saves(ctx, inputs, output):
    x, _heads, ctx.name = inputs
    ctx.heads = x.shape[1]


def _of_to_heads(ctx, grad):
    return torch.ops.attn_ext.heads_to_rows(grad.contiguous(), ctx.heads, ctx.name), None, None


def _of_to_rows(ctx, grad):
    return torch.ops.attn_ext.rows_to_heads(grad.contiguous(), ctx.heads, ctx.name), None, None


for _name, _saves, _gives in (
    ("context", _context_saves, _context_gradients),
    ("context_backward", _no_context, _second_order),
    ("rows_to_heads", _exchange_saves, _of_to_heads),
    ("heads_to_rows", _exchange_saves, _of_to_rows),
):
    torch.library.register_autograd(f"attn_ext::{_name}", _gives, setup_context=_saves, lib=lib)
