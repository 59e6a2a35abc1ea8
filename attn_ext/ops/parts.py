"""The operators of a part of attention: some queries of a larger call with some of its keys.

attn_ext::forward_partial    (O, LSE) of these keys alone, in the statistics' dtype
attn_ext::merge_             adds such a part to what other keys gave
attn_ext::backward_partial   what these keys add to the gradients, from LSE and delta of whole rows

The first and the last take the fields of `attn_ext.core.schema.Call` flat and in its order.  A sink
belongs to no part: whoever merges adds it once.
"""

from __future__ import annotations

import functools
from types import ModuleType

import torch

from attn_ext.backends import registry, shards
from attn_ext.core.layout import conform, empty_like_layout
from attn_ext.core.problem import Problem
from attn_ext.core.schema import (
    FIELDS,
    PARAMETERS,
    Call,
    Grads,
    Needs,
    lse_shape,
    statistics_dtype,
)
from attn_ext.ops import checks, execute
from attn_ext.ops.dispatch import TAGS, lib

lib.define(f"forward_partial({PARAMETERS}) -> (Tensor out, Tensor lse)", tags=tuple(TAGS))
lib.define("merge_(Tensor(a!) out, Tensor(b!) lse, Tensor part, Tensor part_lse) -> ()")
lib.define(
    f"backward_partial(Tensor dout, Tensor delta, Tensor lse, {PARAMETERS}, bool[] needs) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    tags=tuple(TAGS),
)


def server(call: Call) -> ModuleType | None:
    """The backend whose kernels serve a part; None: torch operations on tiles do."""
    problem = Problem.of(call._replace(need_stats=False))
    if call.backend == "reference":
        return None
    if call.backend not in registry.CHOICES:
        return registry.get(registry.select(call.backend, problem))
    for name in by_exactness():
        fits = name != "reference" and registry.automatic(name, problem)
        if fits and not registry.reasons(name, problem):
            return registry.get(name)
    return None


@functools.cache
def by_exactness() -> tuple[str, ...]:
    """The backends in their order, but those first whose parts come in float32: parts that are
    rounded to 16 bits before they are merged have more error than one call."""
    exact = [hasattr(registry.get(name), "forward_partial") for name in registry.ORDER]
    ranked = sorted(zip(exact, registry.ORDER, strict=True), key=lambda pair: not pair[0])
    return tuple(name for _, name in ranked)


def served_by(call: Call) -> str:
    """Who serves a part, in words."""
    module = server(call)
    return "torch operations on tiles" if module is None else module.__name__.rpartition(".")[2]


def _checked(call: Call) -> Call:
    for name in ("sink", "w"):
        if getattr(call, name) is not None:
            raise ValueError(f"{name} must be None in a part of a call, got one")
    if call.normalizer != "softmax":
        raise ValueError(f"normalizer must be 'softmax' in a part, got {call.normalizer!r}")
    return execute.prepared(checks.call(call))


def forward_partial(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """(O, LSE) of these keys alone, in the statistics' dtype."""
    call = _checked(call)
    module = server(call)
    if module is None:
        return shards.forward_partial(call)
    if hasattr(module, "forward_partial"):
        return module.forward_partial(call)
    out, lse, *_ = module.forward(call._replace(need_stats=False))
    return out.to(lse.dtype), lse


def backward_partial(call: Call, dout, delta, lse, needs: Needs) -> Grads:
    """What these keys add to the gradients, in the statistics' dtype."""
    call = _checked(call)
    for name, value, want in (
        ("dout", dout, (*call.q.shape[:-1], call.v.shape[-1])),
        ("delta", delta, lse_shape(call)),
        ("lse", lse, lse_shape(call)),
    ):
        if tuple(value.shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(value.shape)}")
    module = server(call)
    if module is None:
        return shards.backward_partial(call, dout, delta, lse, needs)
    if hasattr(module, "backward_partial"):
        return module.backward_partial(call, dout, delta, lse, needs)
    # Kernels that find delta themselves find rowsum(dO * 0) - dLSE, with dLSE = -delta.
    dout, call = dout.to(call.q.dtype), execute.as_torch_asks(call)
    grads = module.backward(call, dout, torch.zeros_like(dout), lse, -delta, needs)
    return Grads(*[g if g is None else g.to(lse.dtype) for g in grads])


def merge(out, lse, part, part_lse) -> None:
    """Adds (part, part_lse) to (out, lse), in place: out [..., S, D], lse [..., S].  Rows that have
    seen no key yet have LSE -inf, and stay so with a part that sees none."""
    top = torch.maximum(lse, part_lse)
    base = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN
    old, new = torch.exp(lse - base), torch.exp(part_lse - base)
    total = old + new
    inverse = 1 / total.masked_fill(total == 0, 1.0)
    out.mul_((old * inverse)[..., None]).addcmul_(part, (new * inverse)[..., None])
    lse.copy_(base + torch.log(total))


def _forward_kernel(*fields):
    call = Call(*fields)
    return tuple(map(conform, forward_partial(call), _forward_outputs(call)))


def _forward_outputs(call: Call) -> tuple:
    dtype = statistics_dtype(call.q.dtype)
    out = empty_like_layout(call.q, call.v.shape[-1], dtype)
    return out, call.q.new_empty(lse_shape(call), dtype=dtype)


def _backward_kernel(dout, delta, lse, *rest):
    call, needs = Call(*rest[:-1]), Needs(*rest[-1])
    grads = backward_partial(call, dout, delta, lse, needs)[:4]
    return tuple(map(conform, grads, _backward_outputs(call, needs)))


def _backward_outputs(call: Call, needs: Needs) -> tuple:
    dtype = statistics_dtype(call.q.dtype)
    rows = [
        empty_like_layout(x, x.shape[-1], dtype) if need else call.q.new_empty((0,), dtype=dtype)
        for x, need in zip((call.q, call.k, call.v), needs, strict=False)
    ]
    shape = call.bias.shape if needs.bias else (0,)
    return *rows, call.q.new_empty(shape, dtype=dtype)


for _device in ("CPU", "CUDA"):
    lib.impl("forward_partial", _forward_kernel, _device)
    lib.impl("merge_", merge, _device)
    lib.impl("backward_partial", _backward_kernel, _device)


@torch.library.register_fake("attn_ext::forward_partial", lib=lib)
def _forward_fake(*fields):
    return _forward_outputs(Call(*fields))


@torch.library.register_fake("attn_ext::merge_", lib=lib)
def _merge_fake(out, lse, part, part_lse):
    return None


@torch.library.register_fake("attn_ext::backward_partial", lib=lib)
def _backward_fake(dout, delta, lse, *rest):
    return _backward_outputs(Call(*rest[: len(FIELDS)]), Needs(*rest[-1]))
