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

import functools
from types import ModuleType

import torch

from attn_ext.backends import registry, shards
from attn_ext.backends import sums as sums_of
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
    """(O, sums) of these keys alone, in the statistics' dtype."""
    return execute.in_their_dtypes(_forward, _checked(call))


def _forward(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    module = server(call)
    if module is None:
        return shards.forward_partial(call)
    if hasattr(module, "forward_partial"):
        return module.forward_partial(call)
    return sums_of.forward(call, *module.forward(call._replace(need_stats=False))[:2])


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
    return execute.in_their_dtypes(_backward, call, dout, delta, sums, needs)


def _backward(call: Call, dout, delta, sums, needs: Needs) -> Grads:
    module = server(call)
    if module is None:
        return shards.backward_partial(call, dout, delta, sums, needs)
    asked, rounded = execute.as_torch_asks(call), dout.to(call.q.dtype)
    if hasattr(module, "backward_partial"):
        return module.backward_partial(asked, dout, delta, sums, needs)
    # Kernels that find delta themselves find rowsum(dO * 0) - dLSE, with dLSE = -delta.
    zero = torch.zeros_like(rounded)
    return sums_of.backward(
        call, rounded, delta, sums, needs,
        lambda lse: module.backward(asked, rounded, zero, lse, -delta, needs),
    )  # fmt: skip


def delta_of_rows(call: Call, dout, out) -> torch.Tensor:
    """rowsum(dO * O) in the shape of LSE and the statistics' dtype."""
    statistics = statistics_dtype(call.q.dtype)
    delta = (dout.to(statistics) * out.to(statistics)).sum(-1)
    return delta if call.cu_seqlens_q is None else delta.transpose(0, 1)


def backward_of_rows(call: Call, dout, out, lse, needs: Needs, delta=None) -> Grads:
    """The gradients of q, k, v and the bias, in their dtypes, from O and LSE of rows that may have
    seen the keys of other calls, too: ring attention of other libraries asks for the share of some
    keys by them.  delta: `delta_of_rows`, where the caller has it.

    On GPUs by the kernels of a whole call, which take LSE as it is given where it is within 256 of
    0; nothing is read back, which a CUDA graph could not.  Those of CPUs may divide each row by its
    own sum, so that the kernels of parts serve there.  A row further from 0, whose LSE has lost the
    sum, is taken for this call's own, and its sum found again, where its own LSE is the same up to
    rounding.  Beside huge logits (-1e9) the LSE of one shard is that of all of them: they cannot be
    told apart by it, and each is divided by its own sum.
    """
    if call.q.device.type != "cpu":
        return execute.backward(dout, None, out, lse.contiguous(), call, needs)
    delta = delta_of_rows(call, dout, out) if delta is None else delta
    sums = sums_of.of_lse(lse)
    far = sums_of.is_far(lse)
    if bool(far.any()):
        own = forward_partial(call)[1]
        rounding = 4 * torch.finfo(lse.dtype).eps * lse.abs()
        same = (own.sum(-1) - lse).abs() <= rounding
        sums = torch.where((far & same)[..., None], own, sums)
    grads = backward_partial(call, dout, delta, sums, needs)[:4]
    inputs = zip(grads, (call.q, call.k, call.v, call.bias), strict=True)
    return Grads(*(g if g is None else g.to(x.dtype) for g, x in inputs))


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
