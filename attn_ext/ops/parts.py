"""The operators of a part of attention: some queries of a larger call with some of its keys.

attn_ext::forward_partial    (O, sums) of these keys alone, in the statistics' dtype
attn_ext::merge_             adds such a part to what other keys gave
attn_ext::backward_partial   what these keys add to the gradients, from sums and delta of whole rows

sums [..., S, 2]: (base, rest) of each row, LSE = base + rest, where base is a number near the
largest logit, and -inf in empty rows.  Beside logits of 1e9 or the smallest float LSE itself has
lost the logarithm of the sum, and with it by how much each part counts.

The first and the last take the fields of `attn_ext.core.schema.Call` flat and in its order.  A sink
belongs to no part: whoever merges adds it once.
"""

from __future__ import annotations

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

lib.define(f"forward_partial({PARAMETERS}) -> (Tensor out, Tensor sums)", tags=tuple(TAGS))
lib.define("merge_(Tensor(a!) out, Tensor(b!) sums, Tensor part, Tensor part_sums) -> ()")
lib.define(
    f"backward_partial(Tensor dout, Tensor delta, Tensor sums, {PARAMETERS}, bool[] needs) "
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
    for name in registry.ORDER:
        fits = name != "reference" and registry.automatic(name, problem)
        if fits and not registry.reasons(name, problem):
            return registry.get(name)
    return None


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
    """(O, sums) of these keys alone, in the statistics' dtype."""
    call = _checked(call)
    module = server(call)
    if module is None:
        return shards.forward_partial(call)
    if hasattr(module, "forward_partial"):
        return module.forward_partial(call)
    out, lse, *_ = module.forward(call._replace(need_stats=False))
    out, sums = out.to(lse.dtype), of_lse(lse)
    far = far_rows(lse)
    if bool(far.any()):  # their logits once more, for what LSE has lost
        exact, exact_sums = shards.forward_partial(call)
        out = torch.where(_like_out(far, call), exact, out)
        sums = torch.where(far[..., None], exact_sums, sums)
    return out, sums


FAR = 256.0  # as kFarLse of csrc/cpu: beyond it LSE has lost digits of a weight exp(S - LSE)


def far_rows(lse: torch.Tensor) -> torch.Tensor:
    """Which rows have an LSE so far from 0 that it has lost the sum."""
    return (lse.abs() > FAR) & (lse.abs() < torch.inf)


def of_lse(lse: torch.Tensor) -> torch.Tensor:
    """The sums of rows whose LSE has all digits."""
    return torch.stack([lse, torch.zeros_like(lse)], -1)


def _like_out(x: torch.Tensor, call: Call) -> torch.Tensor:
    """A tensor like LSE with the dimensions of O: packed rows have their heads behind them."""
    return (x.transpose(0, 1) if call.cu_seqlens_q is not None else x)[..., None]


def backward_partial(call: Call, dout, delta, sums, needs: Needs) -> Grads:
    """What these keys add to the gradients, in the statistics' dtype."""
    call = _checked(call)
    for name, value, want in (
        ("dout", dout, (*call.q.shape[:-1], call.v.shape[-1])),
        ("delta", delta, lse_shape(call)),
        ("sums", sums, (*lse_shape(call), 2)),
    ):
        if tuple(value.shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(value.shape)}")
    module = server(call)
    if module is None:
        return shards.backward_partial(call, dout, delta, sums, needs)
    if hasattr(module, "backward_partial"):
        return module.backward_partial(call, dout, delta, sums, needs)
    # Kernels that find delta themselves find rowsum(dO * 0) - dLSE, with dLSE = -delta.  Of far
    # rows they would take the sums from these keys alone, so they get LSE = inf for them: P = 0.
    lse = sums.sum(-1)
    far = far_rows(lse)
    dout, asked = dout.to(call.q.dtype), execute.as_torch_asks(call)
    near = lse.masked_fill(far, torch.inf)
    grads = module.backward(asked, dout, torch.zeros_like(dout), near, -delta, needs)[:4]
    grads = [g if g is None else g.to(lse.dtype) for g in grads]
    if bool(far.any()):
        only_far = torch.where(far[..., None], sums, of_lse(torch.full_like(lse, -torch.inf)))
        more = shards.backward_partial(call, dout, delta, only_far, needs)[:4]
        grads = [g if g is None else g + x for g, x in zip(grads, more, strict=True)]
    return Grads(*grads)


def merge(out, sums, part, part_sums) -> None:
    """Adds (part, part_sums) to (out, sums), in place: out [..., S, D], sums [..., S, 2].  Rows
    that have seen no key yet have a base of -inf, and keep it with a part that sees none."""
    (base, rest), (part_base, part_rest) = sums.unbind(-1), part_sums.unbind(-1)
    top = torch.maximum(base, part_base)
    usable = top.masked_fill(top == -torch.inf, 0.0)  # -inf - -inf would be NaN
    old, new = torch.exp(base - usable + rest), torch.exp(part_base - usable + part_rest)
    total = old + new
    total = total.masked_fill(total == 0, 1.0)
    inverse = 1 / total
    out.mul_((old * inverse)[..., None]).addcmul_(part, (new * inverse)[..., None])
    sums.copy_(torch.stack([top, torch.log(total)], -1))


def _forward_kernel(*fields):
    call = Call(*fields)
    return tuple(map(conform, forward_partial(call), _forward_outputs(call)))


def _forward_outputs(call: Call) -> tuple:
    dtype = statistics_dtype(call.q.dtype)
    out = empty_like_layout(call.q, call.v.shape[-1], dtype)
    return out, call.q.new_empty((*lse_shape(call), 2), dtype=dtype)


def _backward_kernel(dout, delta, sums, *rest):
    call, needs = Call(*rest[:-1]), Needs(*rest[-1])
    grads = backward_partial(call, dout, delta, sums, needs)[:4]
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
def _merge_fake(out, sums, part, part_sums):
    return None


@torch.library.register_fake("attn_ext::backward_partial", lib=lib)
def _backward_fake(dout, delta, sums, *rest):
    return _backward_outputs(Call(*rest[: len(FIELDS)]), Needs(*rest[-1]))
