"""The operators by which attention is differentiated twice and in forward mode:

attn_ext::tangent            the tangents of O and LSE
attn_ext::backward_tangent   the tangents of the gradients, and the gradients themselves

Both take the fields of `attn_ext.core.schema.Call` flat and in its order, then a tangent for each
input that has a gradient.  `attn_ext.backends.blocked` has the formulas.
"""

from __future__ import annotations

import torch

from attn_ext.backends import cpu_second
from attn_ext.core.layout import empty_like_layout
from attn_ext.core.schema import (
    FIELDS,
    GRADIENT_RESULTS,
    GRADIENTS,
    PARAMETERS,
    ROW_PARAMETERS,
    TANGENT_PARAMETERS,
    TANGENT_RESULTS,
    Call,
    Needs,
    Rows,
    Tangents,
    lse_shape,
    statistics_dtype,
)
from attn_ext.ops import batching, checks, dispatch, execute
from attn_ext.ops.dispatch import TAGS, lib

ROWS = len(Rows._fields)
_AT = len(FIELDS), len(FIELDS) + len(GRADIENTS)  # where the tangents begin and end

lib.define(
    f"tangent(Tensor out, Tensor lse, {PARAMETERS}, {TANGENT_PARAMETERS}) "
    "-> (Tensor tout, Tensor tlse)",
    tags=tuple(TAGS),
)
lib.define(
    f"backward_tangent({ROW_PARAMETERS}, {PARAMETERS}, {TANGENT_PARAMETERS}, bool[] needs, "
    f"bool[] primal) -> ({TANGENT_RESULTS}, {GRADIENT_RESULTS})",
    tags=tuple(TAGS),
)


def call_and_tangents(inputs) -> tuple[Call, Tangents]:
    """The call and the tangents of a flat list that begins with them."""
    return Call(*inputs[: _AT[0]]), Tangents(*inputs[_AT[0] : _AT[1]])


def _tangent_outputs(call: Call) -> tuple:
    lse = call.q.new_empty(lse_shape(call), dtype=statistics_dtype(call.q.dtype))
    return empty_like_layout(call.q, call.v.shape[-1]), lse


def tangent(out, lse, *rest) -> tuple:
    """The tangents of O and LSE of a call on real tensors."""
    call, tangents = call_and_tangents(rest)
    call = dispatch.checked_backward(None, None, out, lse, call)
    checks.tangents(call, tangents)
    return execute.tangent(call, tangents, Rows(out=out, lse=lse))


def backward_tangent(*inputs) -> tuple:
    """The tangents of the gradients and the gradients of a call on real tensors; None for those
    that are not asked for."""
    rows, rest = Rows(*inputs[:ROWS]), inputs[ROWS:]
    call, tangents = call_and_tangents(rest)
    call = dispatch.checked_backward(rows.dout, rows.dlse, rows.out, rows.lse, call)
    checks.results(rows.tdout, rows.tdlse, rows.tout, rows.tlse, call)
    checks.tangents(call, tangents)
    needs, primal = Needs(*rest[-2]), Needs(*rest[-1])
    second, first = execute.backward_tangent(call, tangents, rows, needs, primal)
    return (*second, *first)


def double_backward(dout, dlse, out, lse, call: Call, tangents, needs, rows_too: bool) -> tuple:
    """(O', L', the tangents of the gradients) on real tensors; O' and L' None unless `rows_too`,
    each gradient None unless asked for."""
    tangents, needs = Tangents(*tangents), Needs(*needs)
    rows = Rows(dout=dout, dlse=dlse, out=out, lse=lse)
    ready = execute.prepared(call)
    found = cpu_second.double_backward_again(ready, tangents, rows, needs, rows_too)
    if found is None:  # all that looks like what has been checked needs no checks
        call = dispatch.checked_backward(dout, dlse, out, lse, call)
        checks.tangents(call, tangents)
        found = execute.double_backward(call, tangents, rows, needs, rows_too)
    return found


def tangent_kernel(out, lse, *rest):
    """The implementation of attn_ext::tangent."""
    found, call = tangent(out, lse, *rest), Call(*rest[: len(FIELDS)])
    if call.q.stride(-1) == 1:  # computed on q itself, so that it lies as the fake promises
        return found
    return tuple(map(dispatch.conform, found, _tangent_outputs(call)))


def backward_tangent_kernel(*inputs):
    """The implementation of attn_ext::backward_tangent."""
    call, found = Call(*inputs[ROWS : ROWS + len(FIELDS)]), backward_tangent(*inputs)
    if call.q.stride(-1) == call.k.stride(-1) == call.v.stride(-1) == 1:
        return tuple(call.q.new_empty((0,)) if x is None else x for x in found)
    return tuple(map(dispatch.conform, found, _backward_tangent_outputs(inputs)))


def _backward_tangent_outputs(inputs) -> list:
    call, _ = call_and_tangents(inputs[ROWS:])
    needs, primal = Needs(*inputs[-2]), Needs(*inputs[-1])
    return dispatch.backward_outputs(call, needs) + dispatch.backward_outputs(call, primal)


for _device in ("CPU", "CUDA"):
    lib.impl("tangent", tangent_kernel, _device)
    lib.impl("backward_tangent", backward_tangent_kernel, _device)


@torch.library.register_fake("attn_ext::tangent", lib=lib)
def _tangent_fake(out, lse, *rest):
    return _tangent_outputs(call_and_tangents(rest)[0])


@torch.library.register_fake("attn_ext::backward_tangent", lib=lib)
def _backward_tangent_fake(*inputs):
    return tuple(_backward_tangent_outputs(inputs))


torch.library.register_vmap("attn_ext::tangent", batching.tangent, lib=lib)
torch.library.register_vmap("attn_ext::backward_tangent", batching.backward_tangent, lib=lib)
