"""Second derivatives and forward mode by the C++ SIMD kernels (csrc/cpu/kernels/tangent.h and
backward_tangent.h): dense and varlen calls of softmax attention that the cpu backend serves, in
float32, bfloat16 and float16.

Both functions give None where the kernels leave a call to `attn_ext.backends.blocked`: where an
input holds NaN or inf.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from attn_ext.backends import cpu
from attn_ext.backends.looks import looks
from attn_ext.backends.native import addresses
from attn_ext.core.layout import empty_like_layout, prototype, rows
from attn_ext.core.plans import Plans
from attn_ext.core.problem import Problem
from attn_ext.core.schema import (
    TENSORS,
    Call,
    Grads,
    Needs,
    Rows,
    Tangents,
    lse_shape,
    statistics_dtype,
)

try:
    from attn_ext import _C
except ImportError:  # attn_ext.backends.cpu says why
    _C = None


def unsupported(problem: Problem) -> list[str]:
    """Every reason why these kernels cannot serve `problem`, which the cpu backend serves."""
    if problem.dtype == torch.float64:
        return ["float64 has no C++ kernel of second derivatives"]
    return []


class _Plan(NamedTuple):
    """The native calls of a call and of its tangents: sizes, strides and scalars."""

    native: object
    moved: object
    made: tuple = ()  # prototypes of (O', L', tangents of the gradients): of double_backward alone


_plans: Plans[_Plan] = Plans()  # of dense calls, by how their tensors look


def forget() -> None:
    """Drop every plan."""
    _plans.clear()


class _Inputs(NamedTuple):
    """The tensors of a call, of its tangents and of its rows, as the kernels take them, the first
    two by the names of csrc/params.h; `key` is what a plan is remembered by, None where it is not.
    """

    of_call: dict
    of_tangents: dict
    rows: Rows
    key: tuple | None


_PLANNED = ("q", "k", "v", "mask", "bias")


def plan_key(call: Call, tangents: Tangents, given: Rows, *wanted) -> tuple | None:
    """What a plan is remembered by; None where the call has other inputs than q, k, v, mask and
    bias, or a tensor that no plan can hold."""
    if any(x is not None for x in call[cpu.PLANNED : TENSORS]):
        return None
    seen = looks(*call[: cpu.PLANNED]), looks(*tangents), looks(*given)
    return None if None in seen else (seen, call[TENSORS:], wanted)


def _inputs(call: Call, tangents: Tangents, given: Rows, *wanted) -> _Inputs:
    key = plan_key(call, tangents, given, *wanted)
    if key in _plans:  # whose tensors needed no copies
        named = dict(zip(_PLANNED, call, strict=False))
        return _Inputs(named, tangents._asdict(), given, key)
    of_call, of_tangents = cpu.canonical_inputs(call), _canonical(call, tangents)
    rows_of = _canonical_rows(call, given)
    pairs = ((call, of_call), (tangents, of_tangents), (given, rows_of._asdict()))
    copied = any(x is not getattr(a, name) for a, b in pairs for name, x in b.items())
    return _Inputs(of_call, of_tangents, rows_of, None if copied else key)


def _canonical(call: Call, tangents: Tangents) -> dict:
    """The tangents as the kernels take them, by the names of their inputs."""
    statistics = statistics_dtype(call.q.dtype)
    found = {name: None if x is None else rows(x) for name, x in tangents._asdict().items()}
    bias, sink = tangents.bias, tangents.sink
    if bias is not None:
        bias = bias.resolve_neg()
        found["bias"] = bias if bias.dtype in cpu.DTYPES else bias.to(statistics)
    if sink is not None:
        found["sink"] = sink.to(statistics).resolve_neg().contiguous()
    return found


def _new_plan(call: Call, inputs: _Inputs, out, tout, lse) -> _Plan:
    """The plan of a call whose O, O' and LSE lie so."""
    moved = {n: x for n, x in inputs.of_tangents.items() if x is not None}
    return _Plan(
        cpu.native_call(call, inputs.of_call, out, lse),
        cpu.native_call(call, {**inputs.of_call, **moved}, tout, lse),
    )


def _run(kernel: str, plan: _Plan, inputs: _Inputs, of_call: dict, of_tangents: dict) -> bool:
    """Whether the kernel served the call."""
    return getattr(plan.native, kernel)(
        plan.moved,
        torch.get_num_threads(),
        addresses({**inputs.of_call, **of_call}),
        addresses({**inputs.of_tangents, **of_tangents}),
    )


def _is_empty(call: Call) -> bool:
    return 0 in (call.q.numel(), call.k.numel(), call.v.numel())


def _is_short(call: Call) -> bool:
    """Whether one block of the kernel of T2 holds all keys of each row: it then needs no O' and
    L', and can find them beside the gradients."""
    return call.max_seqlen_k <= _C.SECOND_WHOLE


def _blank_rows(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """What O' and L' are written to."""
    out = empty_like_layout(call.q, call.v.shape[-1])
    lse = torch.empty(lse_shape(call), dtype=statistics_dtype(call.q.dtype), device="cpu")
    if call.cu_seqlens_q is not None:  # rows that belong to no sequence
        out.zero_()
        lse.zero_()
    return out, lse


def tangent(call: Call, tangents: Tangents, given: Rows) -> tuple | None:
    """(O', L'), of the O and LSE in `given`."""
    if _is_empty(call):
        return None
    out, lse = _blank_rows(call)
    inputs = _inputs(call, tangents, Rows(out=given.out, lse=given.lse))
    given = inputs.rows
    plan = _plans.get(inputs.key)
    if plan is None:
        plan = _new_plan(call, inputs, given.out, out, given.lse)
        if inputs.key is not None:
            _plans.keep(inputs.key, plan)
    of_call, of_tangents = {"o": given.out, "lse": given.lse}, {"o": out, "lse": lse}
    return (out, lse) if _run("tangent", plan, inputs, of_call, of_tangents) else None


def backward_tangent(
    call: Call, tangents: Tangents, given: Rows, needs: Needs, primal: Needs
) -> tuple[Grads, Grads] | None:
    """The tangents of the gradients that `needs` asks for, and the gradients that `primal` asks
    for."""
    if _is_empty(call):
        return None
    if _is_short(call):
        given = given._replace(tout=None, tlse=None)
    elif given.tout is None or given.tlse is None:
        found = tangent(call, tangents, given)
        if found is None:
            return None
        given = given._replace(tout=found[0], tlse=found[1])
    return _backward_tangent(call, tangents, given, needs, primal)


def double_backward(
    call: Call, tangents: Tangents, given: Rows, needs: Needs, rows_too: bool
) -> tuple | None:
    """(O', L', the tangents of the gradients that `needs` asks for) of short rows in one pass; O'
    and L' None unless `rows_too`."""
    if _is_empty(call) or not _is_short(call):
        return None
    tout, tlse = _blank_rows(call) if rows_too else (None, None)
    written = given._replace(tout=tout, tlse=tlse)
    found = _backward_tangent(call, tangents, written, needs, Needs())
    if found is None:
        return None
    plan = _plans.get(plan_key(call, tangents, written, needs, Needs()))
    key = plan_key(call, tangents, given, needs, rows_too)
    if plan is not None and key is not None:
        made = (*(_blank_rows(call) if rows_too else (None, None)), *_blank(call, needs)[:4])
        made = [x if x is None else prototype(x) for x in made]
        _plans.keep(key, plan._replace(made=tuple(made)))
    return tout, tlse, found[0]


def double_backward_again(
    call: Call, tangents: Tangents, given: Rows, needs: Needs, rows_too: bool
) -> tuple | None:
    """`double_backward` where tensors that look the same went that way; else None, with nothing
    done and nothing of the tensors assumed."""
    plan = _plans.get(plan_key(call, tangents, given, needs, rows_too))
    if plan is None:
        return None
    tout, tlse, dq, dk, dv, sums = [x if x is None else torch.empty_like(x) for x in plan.made]
    if sums is not None:
        sums.zero_()
    tq, tk, tv, tbias, *_ = tangents
    served = _C.second_pass(
        True, plan.native, plan.moved, torch.get_num_threads(), call.mask,
        call.q, call.k, call.v, call.bias, given.out, given.lse, given.dout, given.dlse,
        None, None, None, None,
        tq, tk, tv, tbias, tout, tlse, None, None, dq, dk, dv, sums,
    )  # fmt: skip
    if not served:
        return None
    return tout, tlse, Grads(dq, dk, dv, cpu.bias_gradient(call.bias, sums))


def _backward_tangent(
    call: Call, tangents: Tangents, given: Rows, needs: Needs, primal: Needs
) -> tuple[Grads, Grads] | None:
    """`backward_tangent`; where rows are short, O' and L' of `given` are written."""
    first, second = _blank(call, primal), _blank(call, needs)
    inputs = _inputs(call, tangents, given, needs, primal)
    given = inputs.rows
    plan = _plans.get(inputs.key)
    if plan is None:
        tout = given.out if given.tout is None else given.tout
        plan = _new_plan(call, inputs, given.out, tout, given.lse)
        tdout = given.dout if given.tdout is None else given.tdout
        for native, grads, dout in ((plan.native, first, given.dout), (plan.moved, second, tdout)):
            cpu.set_gradients(native, call, dout, grads[:3], grads.bias)
        if inputs.key is not None:
            _plans.keep(inputs.key, plan)
    of_call = {"o": given.out, "lse": given.lse, "dout": given.dout, "dlse": given.dlse}
    of_tangents = {"o": given.tout, "lse": given.tlse, "dout": given.tdout, "dlse": given.tdlse}
    for tensors, grads in ((of_call, first), (of_tangents, second)):
        tensors.update(dq=grads.q, dk=grads.k, dv=grads.v, dbias=grads.bias, dsink=grads.sink)
    if not _run("backward_tangent", plan, inputs, of_call, of_tangents):
        return None
    return tuple(
        g._replace(bias=cpu.bias_gradient(call.bias, g.bias)) if g.bias is not None else g
        for g in (second, first)
    )


def _canonical_rows(call: Call, given: Rows) -> Rows:
    """The rows as the kernels take them."""
    dtype, statistics = call.q.dtype, statistics_dtype(call.q.dtype)

    def like_out(x):
        return x if x is None else rows(x if x.dtype == dtype else x.to(dtype))

    def like_lse(x):
        return x if x is None else x.to(statistics).resolve_neg().contiguous()

    return Rows(
        dout=like_out(given.dout), dlse=like_lse(given.dlse),
        out=like_out(given.out), lse=like_lse(given.lse),
        tout=like_out(given.tout), tlse=like_lse(given.tlse),
        tdout=like_out(given.tdout), tdlse=like_lse(given.tdlse),
    )  # fmt: skip


def _blank(call: Call, needs: Needs) -> Grads:
    """What the kernels write, and for the bias add to."""
    found = [
        empty_like_layout(x, x.shape[-1]) if need else None
        for x, need in zip((call.q, call.k, call.v), needs[:3], strict=True)
    ]
    if call.cu_seqlens_q is not None:  # rows that belong to no sequence
        for x in found:
            if x is not None:
                x.zero_()
    statistics = statistics_dtype(call.q.dtype)
    bias = cpu.bias_sums(call, statistics) if needs.bias else None
    sink = call.sink.new_zeros(call.sink.shape, dtype=statistics) if needs.sink else None
    return Grads(*found, bias, sink)
