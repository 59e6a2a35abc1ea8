"""The autograd.Functions of plain eager mode, where they are cheaper than the dispatcher's way.

They take the tensors of `attn_ext.core.schema.Call` and one tuple of all its other fields.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_ext.backends.looks import looks
from attn_ext.core.layout import four
from attn_ext.core.schema import TENSORS, Call, Grads, Needs, at_inputs, call_of, of_gradients
from attn_ext.ops import derivatives, dispatch, execute, rules

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_forward_ad = torch.autograd.forward_ad


def _batched(tensor) -> bool:
    """Whether torch.autograd.grad(is_grads_batched=True) or jacobian(vectorize=True) gave it: many
    gradients at once, without memory of their own, outside of torch.func.
    """
    return tensor is not None and _is_batched(tensor)


class EagerAttention(torch.autograd.Function):
    """The plain eager way: forward(ctx, ...) without setup_context is the cheapest that torch
    offers in Python.
    """

    @staticmethod
    def forward(ctx, *inputs):
        tensors, rest = inputs[:TENSORS], inputs[TENSORS]
        out, lse, max_logit, entropy = execute.forward(Call(*tensors, *rest))
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
        needs = of_gradients(ctx.needs_input_grad)
        grads = _gradients(dout, dlse, out, lse, Call(*tensors, *ctx.rest), needs)
        return at_inputs(grads, needs, TENSORS + 1)


class Remembered(NamedTuple):
    """What `attn_ext.ops.fast` keeps of a call."""

    plan: object  # of the cpu backend
    rest: tuple  # the fields of the call that are no tensors
    saved: tuple  # the looks of the inputs, and those of out and lse


class RememberedAttention(torch.autograd.Function):
    """O alone of a dense call that has run before (`attn_ext.ops.fast`)."""

    @staticmethod
    def forward(ctx, q, k, v, mask, bias, known):
        plan = known.plan
        lse = torch.empty_like(plan.lse)
        out = plan.forward(q, k, v, mask, bias, lse)
        ctx.save_for_backward(q, k, v, mask, bias, out, lse)
        ctx.known = known
        return out

    @staticmethod
    def backward(ctx, dout):
        saved, known = ctx.saved_tensors, ctx.known
        of_q, of_k, of_v, _, of_bias, _ = ctx.needs_input_grad
        needs = (of_q, of_k, of_v, of_bias)
        if type(dout) is torch.Tensor and _is_eager():
            grads = known.plan.backward_again(*saved, dout, needs)
            if grads is None and _as_before(saved, known, dout):
                grads = known.plan.backward(*saved, dout, needs)
            if grads is not None:
                return grads
        q, k, v, mask, bias, out, lse = saved
        call = call_of(known.rest, q=q, k=k, v=v, mask=four(mask), bias=four(bias))
        wanted = Needs(q=of_q, k=of_k, v=of_v, bias=of_bias)
        grads = Grads(*_gradients(dout, None, out, lse, call, wanted))
        dbias = grads.bias.view(bias.shape) if of_bias else None
        return grads.q, grads.k, grads.v, None, dbias, None


def _is_eager() -> bool:
    """Whether neither a mode nor a transform of torch is at work, nor create_graph or forward
    mode."""
    return (
        not torch.is_grad_enabled()
        and _forward_ad._current_level < 0
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _as_before(saved, known, dout) -> bool:
    """Whether the saved tensors look as they did and the gradient as it must.

    Hooks of saved tensors may put others in their place, and hooks of the output another gradient.
    """
    *inputs, out, lse = saved
    return (
        (looks(*inputs), looks(out, lse)) == known.saved
        and dout.shape == out.shape
        and dout.dtype == out.dtype
        and dout.is_cpu
        and not _is_batched(dout)
    )


# Without what Function.apply adds for torch.func's transforms, under which no call is remembered.
remembered_attention = super(torch.autograd.Function, RememberedAttention).apply


def _gradients(dout, dlse, out, lse, call: Call, needs) -> tuple:
    if dout is None:
        dout = torch.zeros_like(out)
    # The dispatcher takes batched gradients apart, one by one, and knows the derivatives that
    # create_graph and forward mode ask for.
    if (
        torch.is_grad_enabled()
        or _forward_ad._current_level >= 0
        or _batched(dout)
        or _batched(dlse)
    ):
        # nothing flows back through O and LSE: their node must not run again for zeros
        out, lse = out.detach(), lse.detach()
        if rules.are_eager((dout, dlse, out, lse, *call[:TENSORS])):
            return derivatives.eager_gradients(dout, dlse, out, lse, *call, needs, None)
        return torch.ops.attn_ext.backward(dout, dlse, out, lse, *call, needs)
    call = dispatch.checked_backward(dout, dlse, out, lse, call)
    return execute.backward(dout, dlse, out, lse, call, needs)
