"""A call on real tensors, below autograd: its backend, forward and backward."""

from __future__ import annotations

from types import ModuleType

import torch

from attn_ext.backends import blocked, registry
from attn_ext.core import values
from attn_ext.core.plans import Plans
from attn_ext.core.problem import Problem
from attn_ext.core.schema import TENSORS, Call, Grads, Needs, Rows, Tangents


def prepared(call: Call) -> Call:
    """The call as backends take it: a scale, and q, k, v whose last dimension is contiguous (their
    other strides are free).
    """
    q, k, v = call.q, call.k, call.v
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        call = call._replace(q=_rows(q), k=_rows(k), v=_rows(v))
    return call if call.scale is not None else call._replace(scale=q.shape[-1] ** -0.5)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def backend_of(call: Call) -> ModuleType:
    """The backend module that serves `call`."""
    problem = Problem.of(call)
    chosen = registry.select(call.backend, problem)
    registry.warn_of_reference(call.backend, chosen, problem)
    return registry.get(chosen)


_serving: Plans[ModuleType] = Plans()  # by all that `backend_of` depends on


def serving_key(call: Call) -> tuple:
    """All that `backend_of` depends on."""
    q, cu_seqlens_q = call.q, call.cu_seqlens_q
    return (
        q.shape, call.k.shape, call.v.shape, q.dtype, q.device,
        None if cu_seqlens_q is None else cu_seqlens_q.shape,
        *[x is None for x in call[3:TENSORS]], call[TENSORS:],
    )  # fmt: skip


def forget() -> None:
    """Choose backends again."""
    _serving.clear()
    _second.clear()


def _serving_backend(call: Call) -> ModuleType:
    """`backend_of`, remembered: a lookup is cheaper than a Problem."""
    key = serving_key(call)
    module = _serving.get(key)
    return _serving.keep(key, backend_of(call)) if module is None else module


def in_their_dtypes(function, call: Call, *others):
    """function(call, ...), whose operations autocast leaves in the dtypes that they have."""
    device = call.q.device.type
    if not torch.is_autocast_enabled(device):
        return function(call, *others)
    with torch.autocast(device, enabled=False):
        return function(call, *others)


def forward(call: Call) -> tuple:
    """(out, lse, max_logit | None, entropy | None)."""
    call = prepared(call)
    if call.cu_seqlens_q is not None or call.seqlens_k is not None:
        values.check(call)
    module = _serving_backend(call)
    return in_their_dtypes(module.forward, call)


def plan_of(call: Call):
    """What `attn_ext.ops.fast` keeps of a call that has run: the cpu backend's plan, else None."""
    ready = prepared(call)
    if ready.q is not call.q or ready.k is not call.k or ready.v is not call.v:
        return None  # a copy was made
    module = _serving_backend(ready)
    return module.plan_of(ready) if module is registry.get("cpu") else None


def serves_on_cpu(call: Call) -> bool:
    """Whether the cpu backend serves the call."""
    return _serving_backend(prepared(call)) is registry.get("cpu")


def as_torch_asks(call: Call) -> Call:
    """The call, deterministic where torch.use_deterministic_algorithms is in force.

    Backends do not ask torch themselves: poisoned memory, in which tests and `attn-ext verify` call
    them, switches this on in torch, and they must meet the kernels that training meets.
    """
    if torch.are_deterministic_algorithms_enabled():
        return call._replace(deterministic=True)
    return call


def backward(dout, dlse, out, lse, call: Call, needs) -> Grads:
    """The gradients that `needs` asks for; None for all others."""
    call, needs = prepared(call), Needs(*needs)
    module = _serving_backend(call)
    call = as_torch_asks(call)
    grads = in_their_dtypes(module.backward, call, dout, out, lse, dlse, needs)
    return Grads(*[g if need else None for g, need in zip(grads, needs, strict=True)])


_second: Plans[ModuleType] = Plans()  # by all that `second_of` depends on


def second_of(call: Call) -> ModuleType:
    """The module that computes second derivatives and tangents of `call`."""
    key = serving_key(call)
    module = _second.get(key)
    if module is not None:
        return module
    problem = Problem.of(call)
    chosen = registry.select(call.backend, problem)
    return _second.keep(key, registry.part(registry.second(chosen, problem)))


def tangent(call: Call, tangents: Tangents, rows: Rows) -> tuple:
    """The tangents of O and LSE, which are in `rows`."""
    return _by_second("tangent", call, tangents, rows)


def backward_tangent(
    call: Call, tangents: Tangents, rows: Rows, needs: Needs, primal: Needs
) -> tuple[Grads, Grads]:
    """The tangents of the gradients that `needs` asks for, and the gradients that `primal` asks
    for."""
    return _by_second("backward_tangent", call, tangents, rows, needs, primal)


def double_backward(
    call: Call, tangents: Tangents, rows: Rows, needs: Needs, rows_too: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, Grads]:
    """The tangents of O and LSE where they are wanted, too, and those of the gradients that `needs`
    asks for."""
    module = second_of(prepared(call))
    if hasattr(module, "double_backward") and any(needs):  # in one pass
        found = _alone(module.double_backward, prepared(call), tangents, rows, needs, rows_too)
        if found is not None:
            return found
    tout, tlse = tangent(call, tangents, rows) if rows_too else (None, None)
    if not any(needs):
        return tout, tlse, Grads()
    moved = rows._replace(tout=tout, tlse=tlse)
    return tout, tlse, backward_tangent(call, tangents, moved, needs, Needs())[0]


def _by_second(name: str, call: Call, *others):
    """What the function called `name` of the module that serves the call gives, or that of
    `blocked` where it gives nothing."""
    call = prepared(call)
    found = _alone(getattr(second_of(call), name), call, *others)
    return found or _alone(getattr(blocked, name), call, *others)


def _alone(function, call: Call, *others):
    """function(call, ...), whose operations autograd, autocast and forward mode leave as they
    are."""
    if call.cu_seqlens_q is not None:
        values.check(call)
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(False):
        return in_their_dtypes(function, call, *others)
