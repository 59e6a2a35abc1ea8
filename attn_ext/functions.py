"""The autograd.Functions around a call: a lean one for plain eager mode and a transformable one for
torch.func.

Both take the twelve tensors of `attn_ext.problem.Call` and one tuple with the rest of the flat op
arguments.  vmap folds the mapped dimension into the batch: [N, B, H, S, D] -> [N * B, H, S, D];
what does not fold (varlen, caches, a sink or slopes per example, dropout, whose mask is keyed on
the batch index) runs example by example.
"""

from __future__ import annotations

import torch

from attn_ext import backends, ops
from attn_ext.ops import GRADS, TENSORS

_BIAS, _SINK = 4, 6
_UNFOLDABLE = (8, 9, 10, 11)  # cu_seqlens_q, cu_seqlens_k, seqlens_k, block_table


def _batched(tensor) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) or jacobian(vectorize=True) gave it: many
    gradients at once, without memory of their own, outside of torch.func.
    """
    return tensor is not None and torch._C._functorch.is_legacy_batchedtensor(tensor)


def _scatter(needs, results) -> tuple:
    grads: list = [None] * (TENSORS + 1)
    for index, need, grad in zip(GRADS, needs, results, strict=True):
        if need:
            grads[index] = grad
    return tuple(grads)


class WithoutForwardMode(torch.autograd.Function):
    """A Function whose forward-mode derivative raises."""

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(ops.FORWARD_AD)


class Gradients(WithoutForwardMode):
    """Gradients as a Function of their own, whose derivative raises."""

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(ops.DOUBLE_BACKWARD)


class EagerAttention(torch.autograd.Function):
    """The plain eager way: forward(ctx, ...) without setup_context is the cheapest that torch
    offers in Python.
    """

    @staticmethod
    def forward(ctx, *inputs):
        tensors, rest = inputs[:TENSORS], inputs[TENSORS]
        out, lse, max_logit, entropy = ops.forward_eager((*tensors, *rest))
        ctx.save_for_backward(*tensors, out, lse)
        ctx.rest = rest
        ctx.set_materialize_grads(False)
        if max_logit is not None:
            ctx.mark_non_differentiable(max_logit, entropy)
        return out, lse, max_logit, entropy

    @staticmethod
    def backward(ctx, dout, dlse, dmax_logit, dentropy):
        if dout is None and dlse is None:
            return (None,) * (TENSORS + 1)
        *tensors, out, lse = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[i] for i in GRADS)
        return _scatter(needs, _gradients(dout, dlse, out, lse, tensors, ctx.rest, needs))


class RememberedAttention(torch.autograd.Function):
    """O alone of a plain call that has run before (`attn_ext.fast`)."""

    @staticmethod
    def forward(ctx, q, k, v, plan, rest):
        cpu = backends.get("cpu")
        lse = cpu.plain_lse(plan)
        out = cpu.run_plain(plan, q, k, v, lse)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = rest
        return out

    @staticmethod
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        tensors = (q, k, v, *(None,) * (TENSORS - 3))
        needs = (*ctx.needs_input_grad[:3], False, False)
        return (*_gradients(dout, None, out, lse, tensors, ctx.rest, needs)[:3], None, None)


def _gradients(dout, dlse, out, lse, tensors, rest, needs) -> tuple:
    if dout is None:
        dout = torch.zeros_like(out)
    if _batched(dout) or _batched(dlse):  # the dispatcher takes them apart, one by one
        return torch.ops.attn_ext.backward(dout, dlse, out, lse, *tensors, *rest, needs)
    if torch.is_grad_enabled():  # create_graph: gradients that refuse to be differentiated
        return EagerBackward.apply(needs, rest, dout, dlse, out, lse, *tensors)
    return ops.backward_eager(dout, dlse, out, lse, (*tensors, *rest), needs)


class EagerBackward(Gradients):
    """The backward under create_graph=True."""

    @staticmethod
    def forward(ctx, needs, rest, dout, dlse, out, lse, *tensors):
        return ops.backward_eager(dout, dlse, out, lse, (*tensors, *rest), needs)


def _slice(value, dim, n):
    return value if value is None or dim is None else value.select(dim, n)


def one_by_one(function, values, dims, rest, n: int) -> tuple:
    """The outputs of a Function for each of n examples, stacked: the vmap rule of what cannot be
    folded."""
    parts = [
        function.apply(*(_slice(x, d, i) for x, d in zip(values, dims, strict=True)), *rest)
        for i in range(n)
    ]
    return tuple(torch.stack(p) for p in zip(*parts, strict=True))


def _to_front(value, dim, n: int):
    """`value` with its mapped dimension first, expanded to n where it had none."""
    return value.unsqueeze(0).expand(n, *value.shape) if dim is None else value.movedim(dim, 0)


def _fold(value, dim, n: int):
    """[N, B, ...] -> [N * B, ...]."""
    return _to_front(value, dim, n).flatten(0, 1)


def _fold_scores(value, dim, n: int, batch: int, per_example: bool):
    """A mask or bias [b, h, sq, sk], b in {1, B}: stays broadcast over the batch where it can."""
    if value is None:
        return None
    if dim is None and value.shape[0] == 1 and not per_example:
        return value
    front = _to_front(value, dim, n)
    return front.expand(n, batch, *front.shape[2:]).flatten(0, 1)


def _foldable(dims, tensors, dropout_p, needs_sink: bool) -> bool:
    if dropout_p > 0 or needs_sink:
        return False
    shared = dims[5] is None and dims[_SINK] is None
    return all(tensors[i] is None for i in _UNFOLDABLE) and shared \
        and (tensors[5] is None or tensors[5].dim() == 1)  # fmt: skip


def _folded(dims, tensors, n: int, batch: int, per_example_bias: bool) -> tuple:
    q, k, v, mask, bias = tensors[:5]
    return (
        *(_fold(x, d, n) for x, d in zip((q, k, v), dims[:3], strict=True)),
        _fold_scores(mask, dims[3], n, batch, False),
        _fold_scores(bias, dims[4], n, batch, per_example_bias),
        *tensors[5:],
    )


def _batch_size(q, dim) -> int:
    return q.shape[0] if dim is None or dim > 0 else q.shape[1]


class TransformableAttention(WithoutForwardMode):
    """The way under torch.func: setup_context apart, a vmap rule, outputs all tensors (empty where
    absent).
    """

    @staticmethod
    def forward(*inputs):
        return torch.ops.attn_ext.forward(*inputs[:TENSORS], *inputs[TENSORS])

    @staticmethod
    def setup_context(ctx, inputs, output):
        out, lse, max_logit, entropy = output
        ctx.save_for_backward(*inputs[:TENSORS], out, lse)
        ctx.rest = inputs[TENSORS]
        ctx.mark_non_differentiable(max_logit, entropy)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, dout, dlse, dmax_logit, dentropy):
        if dout is None and dlse is None:
            return (None,) * (TENSORS + 1)
        *tensors, out, lse = ctx.saved_tensors
        needs = tuple(bool(ctx.needs_input_grad[i]) and tensors[i] is not None for i in GRADS)
        if dout is None:
            dout = torch.zeros_like(out)
        results = TransformableBackward.apply(dout, dlse, out, lse, *tensors, ctx.rest, needs)
        return _scatter(needs, results)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        tensors, rest, dims = inputs[:TENSORS], inputs[TENSORS], in_dims[:TENSORS]
        n, batch = info.batch_size, _batch_size(inputs[0], in_dims[0])
        if _foldable(dims, tensors, rest[4], False):
            outs = TransformableAttention.apply(*_folded(dims, tensors, n, batch, False), rest)
            outs = tuple(
                o.unflatten(0, (n, batch)) if o.dim() > 1 else o.expand(n, 0) for o in outs
            )
            return outs, (0,) * 4
        return one_by_one(TransformableAttention, tensors, dims, (rest,), n), (0,) * 4


class TransformableBackward(Gradients):
    """The gradients with a rule by which vmap(grad(f)) batches them."""

    @staticmethod
    def forward(dout, dlse, out, lse, *inputs):
        tensors, rest, needs = inputs[:TENSORS], inputs[TENSORS], inputs[TENSORS + 1]
        return torch.ops.attn_ext.backward(dout, dlse, out, lse, *tensors, *rest, list(needs))

    @staticmethod
    def setup_context(ctx, inputs, output):
        return None

    @staticmethod
    def vmap(info, in_dims, *inputs):
        n = info.batch_size
        rows, tensors, (rest, needs) = inputs[:4], inputs[4 : 4 + TENSORS], inputs[4 + TENSORS :]
        row_dims, dims = in_dims[:4], in_dims[4 : 4 + TENSORS]
        if not _foldable(dims, tensors, rest[4], needs[4]):
            every, every_dim = (*rows, *tensors), (*row_dims, *dims)
            found = one_by_one(TransformableBackward, every, every_dim, (rest, needs), n)
            return found, (0,) * 5
        batch = _batch_size(tensors[0], dims[0])
        folded_rows = [
            None if r is None else _fold(r, d, n) for r, d in zip(rows, row_dims, strict=True)
        ]
        folded = _folded(dims, tensors, n, batch, needs[3])
        dq, dk, dv, dbias, dsink = TransformableBackward.apply(*folded_rows, *folded, rest, needs)
        dq, dk, dv = (
            g.unflatten(0, (n, batch)) if g.dim() > 1 else g.expand(n, 0) for g in (dq, dk, dv)
        )
        if needs[3]:
            dbias = dbias.unflatten(0, (n, batch))
            shared = tensors[_BIAS].dim() == 4 + (dims[_BIAS] is not None) and batch > 1
            size = tensors[_BIAS].movedim(dims[_BIAS], 0).shape[1] if dims[_BIAS] is not None \
                else tensors[_BIAS].shape[0]  # fmt: skip
            if (
                shared and size == 1
            ):  # one bias for the whole batch of an example: its gradient is the sum
                dbias = dbias.sum(1, keepdim=True)
        else:
            dbias = dbias.expand(n, 0)
        return (dq, dk, dv, dbias, dsink.expand(n, 0)), (0,) * 5
