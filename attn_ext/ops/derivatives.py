"""The derivatives of the four operators, closed under one further derivative:

                     reverse mode                        forward mode
    forward          backward                            tangent
    backward         tangent and backward_tangent        backward_tangent
    tangent          backward_tangent                    raises
    backward_tangent raises                              raises

since <cotangents, VJP(G)> = <G, JVP(cotangents)>: the cotangents of the gradients are tangents of
the inputs.  O and LSE are inputs of three operators, so that these need not compute them again; a
derivative with respect to them is none, since each operator's derivatives with respect to the call
are those of the whole function of it.
"""

from __future__ import annotations

import torch

from attn_ext.core.schema import (
    FIELDS,
    GRADIENTS,
    TENSORS,
    Call,
    Tangents,
    at_inputs,
    is_decode,
    of_gradients,
)
from attn_ext.ops import execute, rules, second
from attn_ext.ops.dispatch import backward_kernel, checked_backward, forward_kernel, lib
from attn_ext.ops.second import backward_tangent_kernel, call_and_tangents, tangent_kernel

_GIVEN = 4  # dout, dlse, out, lse, before the fields of the call of a backward
_NOTHING = [False] * len(GRADIENTS)


def _save(ctx, *tensors) -> None:
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)
    ctx.set_materialize_grads(False)


def _forward_context(ctx, inputs, output):
    out, lse, max_logit, entropy = output
    ctx.mark_non_differentiable(max_logit, entropy)
    ctx.rest = inputs[TENSORS:]
    _save(ctx, *inputs[:TENSORS], out, lse)


def _forward_backward(ctx, dout, dlse, dmax_logit, dentropy):
    *tensors, out, lse = ctx.saved_tensors
    needs = of_gradients(ctx.needs_input_grad)
    if dout is None and dlse is None:
        return [None] * len(FIELDS)
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.attn_ext.backward(dout, dlse, out, lse, *tensors, *ctx.rest, needs)
    return at_inputs(grads, needs, len(FIELDS))


def _forward_jvp(ctx, *tangents):
    *tensors, out, lse = map(rules.primal_of, ctx.saved_tensors)
    call = Call(*tensors, *ctx.rest)
    rules.refuse_once_only(call, rules.FORWARD_MODE)
    rules.refuse_alibi(tangents)
    found = torch.ops.attn_ext.tangent(out, lse, *call, *of_gradients(tangents))
    return *found, None, None


def _backward_context(ctx, inputs, output):
    *given, needs = inputs
    ctx.rest, ctx.needs = given[_GIVEN + TENSORS :], needs
    _save(ctx, *given[: _GIVEN + TENSORS])


def _backward_backward(ctx, *cotangents):
    return differentiate_backward(ctx, cotangents, _by_operators)


def _by_operators(dout, dlse, out, lse, call, given, needs, rows_too) -> tuple:
    """`second.double_backward` by the two operators, which transforms and compilers see."""
    tout = tlse = None
    if rows_too:
        tout, tlse = torch.ops.attn_ext.tangent(out, lse, *call, *given)
    found = [None] * len(GRADIENTS)
    if any(needs):
        found = torch.ops.attn_ext.backward_tangent(
            dout, dlse, out, lse, tout, tlse, None, None, *call, *given, needs, _NOTHING
        )
    return tout, tlse, found[: len(GRADIENTS)]


def differentiate_backward(ctx, cotangents, double_backward) -> list:
    """Double backward: the gradients of the inputs of a backward, by this function.  ctx: of a
    Function whose inputs are those of attn_ext::backward and one more, which has saved them as
    `_backward_context` does."""
    dout, dlse, out, lse, *tensors = ctx.saved_tensors
    call = Call(*tensors, *ctx.rest)
    given = [c if need else None for c, need in zip(cotangents, ctx.needs, strict=True)]
    grads: list = [None] * (_GIVEN + len(FIELDS) + 1)
    if all(x is None for x in given):
        return grads
    rules.refuse_once_only(call, rules.DOUBLE_BACKWARD)
    of_dout, of_dlse, _, _, *of_fields, _, _ = ctx.needs_input_grad
    needs = of_gradients(of_fields)
    tout, tlse, found = double_backward(
        dout, dlse, out, lse, call, given, needs, of_dout or of_dlse
    )
    grads[0], grads[1] = tout if of_dout else None, tlse if of_dlse else None
    if any(needs):
        grads[_GIVEN:-1] = at_inputs(found, needs, len(FIELDS))
    return grads


def _backward_jvp(ctx, tdout, tdlse, tout, tlse, *rest):
    dout, dlse, out, lse, *tensors = map(rules.primal_of, ctx.saved_tensors)
    call = Call(*tensors, *ctx.rest)
    rules.refuse_once_only(call, rules.FORWARD_MODE)
    rules.refuse_alibi(rest)
    found = torch.ops.attn_ext.backward_tangent(
        dout, dlse, out, lse, tout, tlse, tdout, tdlse, *call, *of_gradients(rest), ctx.needs,
        _NOTHING,
    )  # fmt: skip
    return found[: len(GRADIENTS)]


def _tangent_context(ctx, inputs, output):
    out, lse, *rest = inputs
    call, tangents = call_and_tangents(rest)
    ctx.rest = call[TENSORS:]
    _save(ctx, out, lse, *output, *call[:TENSORS], *tangents)


def _tangent_backward(ctx, dtout, dtlse):
    out, lse, tout, tlse, *tensors = ctx.saved_tensors
    call, tangents = Call(*tensors[:TENSORS], *ctx.rest), Tangents(*tensors[TENSORS:])
    if dtout is None and dtlse is None:
        return [None] * (2 + len(FIELDS) + len(GRADIENTS))
    dtout = torch.zeros_like(out) if dtout is None else dtout
    of_fields = ctx.needs_input_grad[2 : 2 + len(FIELDS)]
    needs, primal = of_gradients(of_fields), list(ctx.needs_input_grad[2 + len(FIELDS) : -1])
    found = torch.ops.attn_ext.backward_tangent(
        dtout, dtlse, out, lse, tout, tlse, None, None, *call, *tangents, needs, primal
    )
    second, first = found[: len(GRADIENTS)], found[len(GRADIENTS) :]
    of_tangents = [x if need else None for x, need in zip(first, primal, strict=True)]
    return [None, None, *at_inputs(second, needs, len(FIELDS)), *of_tangents]


class EagerGradients(torch.autograd.Function):
    """The gradients of a call in plain eager mode, for create_graph: `backward` as a Function of
    its own, which spares the dispatcher's way and, where nothing is recorded any more, that of the
    two passes.  Inputs: those of attn_ext::backward, and None."""

    @staticmethod
    def forward(ctx, *inputs):
        dout, dlse, out, lse, *fields, needs, _ = inputs
        call = checked_backward(dout, dlse, out, lse, Call(*fields))
        grads = execute.backward(dout, dlse, out, lse, call, needs)
        _backward_context(ctx, inputs[:-1], grads)
        return tuple(grads)

    @staticmethod
    def backward(ctx, *cotangents):
        direct = not torch.is_grad_enabled() and rules.are_eager((*cotangents, *ctx.saved_tensors))
        way = second.double_backward if direct else _by_operators
        return (*differentiate_backward(ctx, cotangents, way), None)


# Without what Function.apply adds for transforms, under which nothing comes this way.
eager_gradients = super(torch.autograd.Function, EagerGradients).apply


def _no_context(ctx, inputs, output):
    """Nothing is saved for a derivative that raises."""


def _third(ctx, *values):
    """A derivative of third order."""
    raise NotImplementedError(rules.THIRD)


def _recorded(fields: tuple) -> tuple:
    """The fields of a call that is differentiated: while torch.compile traces a transform, no
    tensor says so in time.
    """
    call = Call(*fields)
    if is_decode(call) and call.w is None:
        return fields
    bias_grad = call.bias is not None and call.bias.requires_grad
    return call._replace(grad=True, bias_grad=call.bias_grad or bias_grad)


for _name, _kernel, _rules in (
    ("forward", forward_kernel, (_forward_context, _forward_backward, _forward_jvp, _recorded)),
    ("backward", backward_kernel, (_backward_context, _backward_backward, _backward_jvp)),
    ("tangent", tangent_kernel, (_tangent_context, _tangent_backward, _third)),
    ("backward_tangent", backward_tangent_kernel, (_no_context, _third, _third)),
):
    rules.derivative(lib, _name, _kernel, rules.Rules(*_rules))
