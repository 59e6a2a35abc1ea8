"""The torch.library operators `attn_ext::forward` and `attn_ext::backward`.

Both take the fields of `attn_ext.core.schema.Call` flat and in its order.  An absent output is an
empty tensor.
"""

from __future__ import annotations

import torch

from attn_ext.core.layout import conform, empty_like_layout
from attn_ext.core.schema import (
    FIELDS,
    GRADIENT_AT,
    GRADIENT_RESULTS,
    GRADIENTS,
    PARAMETERS,
    TENSORS,
    Call,
    Needs,
    is_decode,
    lse_shape,
    statistics_dtype,
)
from attn_ext.ops import batching, checks, execute, rules

_TAGS = [torch.Tag.pt2_compliant_tag]
# Inductor must not change strides: the fakes promise outputs in q's memory order.
_TAGS.append(getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))

lib = torch.library.Library("attn_ext", "DEF")
lib.define(
    f"forward({PARAMETERS}) -> (Tensor out, Tensor lse, Tensor max_logit, Tensor entropy)",
    tags=tuple(_TAGS),
)
lib.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {PARAMETERS}, bool[] needs) "
    f"-> ({GRADIENT_RESULTS})",
    tags=tuple(_TAGS),
)


def _forward_outputs(call: Call) -> tuple:
    shape, dtype = lse_shape(call), statistics_dtype(call.q.dtype)
    out = empty_like_layout(call.q, call.v.shape[-1])
    rows = [
        call.q.new_empty(shape if wanted else (0,), dtype=dtype)
        for wanted in (True, call.need_stats, call.need_stats)
    ]
    return (out, *rows)


def _backward_outputs(call: Call, needs: Needs) -> list:
    rows = ("q", "k", "v")
    return [
        call.q.new_empty((0,)) if not getattr(needs, name)
        else empty_like_layout(x, x.shape[-1]) if name in rows else x.new_empty(x.shape)
        for name, x in zip(GRADIENTS, (call[at] for at in GRADIENT_AT), strict=True)
    ]  # fmt: skip


def _forward_kernel(*fields):
    call = checks.call(Call(*fields))
    promised = _forward_outputs(call)
    return tuple(conform(t, p) for t, p in zip(execute.forward(call), promised, strict=True))


def checked_backward(dout, dlse, out, lse, call: Call) -> Call:
    """The call of a backward with its true lengths, checked with what its forward gave."""
    call = checks.call(call)
    checks.results(dout, dlse, out, lse, call)
    return call


def _backward_kernel(dout, dlse, out, lse, *rest):
    call, needs = Call(*rest[:-1]), Needs(*rest[-1])
    call = checked_backward(dout, dlse, out, lse, call)
    promised = _backward_outputs(call, needs)
    grads = execute.backward(dout, dlse, out, lse, call, needs)
    return tuple(conform(t, p) for t, p in zip(grads, promised, strict=True))


for _device in ("CPU", "CUDA"):
    lib.impl("forward", _forward_kernel, _device)
    lib.impl("backward", _backward_kernel, _device)


@torch.library.register_fake("attn_ext::forward", lib=lib)
def _forward_fake(*fields):
    return _forward_outputs(Call(*fields))


@torch.library.register_fake("attn_ext::backward", lib=lib)
def _backward_fake(dout, dlse, out, lse, *rest):
    return tuple(_backward_outputs(Call(*rest[:-1]), Needs(*rest[-1])))


def _setup_context(ctx, inputs, output):
    out, lse, max_logit, entropy = output
    ctx.save_for_backward(*inputs[:TENSORS], out, lse)
    ctx.rest = inputs[TENSORS:]
    ctx.mark_non_differentiable(max_logit, entropy)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, dmax_logit, dentropy):
    *tensors, out, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in GRADIENT_AT]
    grads: list = [None] * len(FIELDS)
    if dout is None and dlse is None:
        return tuple(grads)
    if dout is None:
        dout = torch.zeros_like(out)
    results = torch.ops.attn_ext.backward(dout, dlse, out, lse, *tensors, *ctx.rest, needs)
    for index, need, grad in zip(GRADIENT_AT, needs, results, strict=True):
        if need:
            grads[index] = grad
    return tuple(grads)


def _no_context(ctx, inputs, output):
    """Nothing is saved for a derivative that raises."""


def _no_double_backward(ctx, *grads):
    """The derivative of a backward."""
    raise NotImplementedError(rules.DOUBLE_BACKWARD)


def _recorded(fields: tuple) -> tuple:
    """The fields of a call that is differentiated: while torch.compile traces a transform, no
    tensor says so in time.
    """
    call = Call(*fields)
    if is_decode(call) and call.w is None:
        return fields
    bias_grad = call.bias is not None and call.bias.requires_grad
    return call._replace(grad=True, bias_grad=call.bias_grad or bias_grad)


rules.derivative(lib, "forward", _setup_context, _backward, _recorded)
rules.derivative(lib, "backward", _no_context, _no_double_backward)
torch.library.register_vmap("attn_ext::forward", batching.forward, lib=lib)
torch.library.register_vmap("attn_ext::backward", batching.backward, lib=lib)
