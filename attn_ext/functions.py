"""The autograd.Functions of plain eager mode, where they are cheaper than the dispatcher's way.

They take the twelve tensors of `attn_ext.problem.Call` and one tuple with the rest of the flat op
arguments.
"""

from __future__ import annotations

import torch

from attn_ext import backends, ops, rules
from attn_ext.ops import GRADS, TENSORS


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


class Gradients(rules.WithoutForwardMode):
    """Gradients as a Function of their own, whose derivative raises."""

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(rules.DOUBLE_BACKWARD)


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
