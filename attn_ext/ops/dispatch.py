"""The torch.library operators `attn_ext::forward` and `attn_ext::backward`.

Both take the fields of `attn_ext.core.schema.Call` flat and in its order.  An absent output is an
empty tensor.  Their derivatives are in `attn_ext.ops.derivatives`.
"""

from __future__ import annotations

import torch

from attn_ext.core.layout import conform, empty_like_layout
from attn_ext.core.schema import (
    GRADIENT_AT,
    GRADIENT_RESULTS,
    GRADIENTS,
    PARAMETERS,
    Call,
    Needs,
    lse_shape,
    statistics_dtype,
)
from attn_ext.ops import batching, checks, execute

TAGS = [torch.Tag.pt2_compliant_tag]
# Inductor must not change strides: the fakes promise outputs in q's memory order.
TAGS.append(getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))

lib = torch.library.Library("attn_ext", "DEF")
lib.define(
    f"forward({PARAMETERS}) -> (Tensor out, Tensor lse, Tensor max_logit, Tensor entropy)",
    tags=tuple(TAGS),
)
lib.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {PARAMETERS}, bool[] needs) "
    f"-> ({GRADIENT_RESULTS})",
    tags=tuple(TAGS),
)


def _forward_outputs(call: Call) -> tuple:
    shape, dtype = lse_shape(call), statistics_dtype(call.q.dtype)
    out = empty_like_layout(call.q, call.v.shape[-1])
    rows = [
        call.q.new_empty(shape if wanted else (0,), dtype=dtype)
        for wanted in (True, call.need_stats, call.need_stats)
    ]
    return (out, *rows)


def backward_outputs(call: Call, needs: Needs) -> list:
    """Uninitialised gradients; those that are not needed are empty."""
    rows = ("q", "k", "v")
    return [
        call.q.new_empty((0,)) if not getattr(needs, name)
        else empty_like_layout(x, x.shape[-1]) if name in rows else x.new_empty(x.shape)
        for name, x in zip(GRADIENTS, (call[at] for at in GRADIENT_AT), strict=True)
    ]  # fmt: skip


def forward_kernel(*fields):
    call = checks.call(Call(*fields))
    promised = _forward_outputs(call)
    return tuple(conform(t, p) for t, p in zip(execute.forward(call), promised, strict=True))


def checked_backward(dout, dlse, out, lse, call: Call) -> Call:
    """The call of a backward with its true lengths, checked with what its forward gave."""
    call = checks.call(call)
    checks.results(dout, dlse, out, lse, call)
    return call


def backward_kernel(dout, dlse, out, lse, *rest):
    call, needs = Call(*rest[:-1]), Needs(*rest[-1])
    call = checked_backward(dout, dlse, out, lse, call)
    promised = backward_outputs(call, needs)
    grads = execute.backward(dout, dlse, out, lse, call, needs)
    return tuple(conform(t, p) for t, p in zip(grads, promised, strict=True))


for _device in ("CPU", "CUDA"):
    lib.impl("forward", forward_kernel, _device)
    lib.impl("backward", backward_kernel, _device)


@torch.library.register_fake("attn_ext::forward", lib=lib)
def _forward_fake(*fields):
    return _forward_outputs(Call(*fields))


@torch.library.register_fake("attn_ext::backward", lib=lib)
def _backward_fake(dout, dlse, out, lse, *rest):
    return tuple(backward_outputs(Call(*rest[:-1]), Needs(*rest[-1])))


torch.library.register_vmap("attn_ext::forward", batching.forward, lib=lib)
torch.library.register_vmap("attn_ext::backward", batching.backward, lib=lib)
