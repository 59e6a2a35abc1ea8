"""Second derivatives and forward mode by the C++ SIMD kernels (csrc/cpu/kernels/tangent.h and
backward_tangent.h): dense and varlen calls of softmax attention that the cpu backend serves, in
float32, bfloat16 and float16.

Both functions give None where the kernels leave a call to `attn_ext.backends.blocked`: where an
input holds NaN or inf, or LSE is so large that its rounding shows.
"""

from __future__ import annotations

import torch

from attn_ext.backends import cpu
from attn_ext.backends.native import addresses
from attn_ext.core.layout import empty_like_layout, rows
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Call, Grads, Needs, Rows, Tangents, lse_shape, statistics_dtype


def unsupported(problem: Problem) -> list[str]:
    """Every reason why these kernels cannot serve `problem`, which the cpu backend serves."""
    if problem.dtype == torch.float64:
        return ["float64 has no C++ kernel of second derivatives"]
    return []


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


def _natives(call: Call, tangents: Tangents, given: Rows, tout) -> tuple:
    """The native calls of a call and of its tangents, and the tensors of both by name."""
    of_call, of_tangents = cpu.canonical_inputs(call), _canonical(call, tangents)
    like = {**of_call, **{n: x for n, x in of_tangents.items() if x is not None}}
    natives = (
        cpu.native_call(call, of_call, given.out, given.lse),
        cpu.native_call(call, like, tout, given.lse),
    )
    of_call |= {"o": given.out, "lse": given.lse}
    return natives, of_call, of_tangents


def _is_empty(call: Call) -> bool:
    return 0 in (call.q.numel(), call.k.numel(), call.v.numel())


def tangent(call: Call, tangents: Tangents, given: Rows) -> tuple | None:
    """(O', L'), of the O and LSE in `given`."""
    if _is_empty(call):
        return None
    given = Rows(out=rows(given.out), lse=given.lse.resolve_neg().contiguous())
    out = empty_like_layout(call.q, call.v.shape[-1])
    lse = call.q.new_empty(lse_shape(call), dtype=statistics_dtype(call.q.dtype))
    if call.cu_seqlens_q is not None:  # rows that belong to no sequence
        out.zero_(), lse.zero_()
    (native, moved), of_call, of_tangents = _natives(call, tangents, given, out)
    of_tangents |= {"o": out, "lse": lse}
    done = native.tangent(
        moved, torch.get_num_threads(), addresses(of_call), addresses(of_tangents)
    )
    return (out, lse) if done else None


def backward_tangent(
    call: Call, tangents: Tangents, given: Rows, needs: Needs, primal: Needs
) -> tuple[Grads, Grads] | None:
    """The tangents of the gradients that `needs` asks for, and the gradients that `primal` asks
    for."""
    if _is_empty(call):
        return None
    given = _canonical_rows(call, given)
    natives, of_call, of_tangents = _natives(call, tangents, given, given.tout)
    of_call |= {"dout": given.dout, "dlse": given.dlse}
    of_tangents |= {
        "o": given.tout, "lse": given.tlse, "dout": given.tdout, "dlse": given.tdlse
    }  # fmt: skip
    found = _blank(call, primal), _blank(call, needs)
    pairs = zip(natives, found, (given.dout, given.tdout), (of_call, of_tangents), strict=True)
    for native, grads, dout, tensors in pairs:
        dout = given.dout if dout is None else dout
        cpu.set_gradients(native, call, dout, grads[:3], grads.bias)
        tensors |= {f"d{name}": x for name, x in grads._asdict().items() if name != "w"}
    native, moved = natives
    done = native.backward_tangent(
        moved, torch.get_num_threads(), addresses(of_call), addresses(of_tangents)
    )
    if not done:
        return None
    first, second = (g._replace(bias=cpu.bias_gradient(call.bias, g.bias)) for g in found)
    return second, first


def _canonical_rows(call: Call, given: Rows) -> Rows:
    """The rows as the kernels take them."""
    dtype, statistics = call.q.dtype, statistics_dtype(call.q.dtype)

    def of(x, dtype, contiguous):
        if x is None:
            return None
        x = x.to(dtype)
        return x.resolve_neg().contiguous() if contiguous else rows(x)

    like_out = {n: of(getattr(given, n), dtype, False) for n in ("dout", "out", "tout", "tdout")}
    like_lse = {
        n: of(getattr(given, n), statistics, True) for n in ("dlse", "lse", "tlse", "tdlse")
    }
    return Rows(**like_out, **like_lse)


def _blank(call: Call, needs: Needs) -> Grads:
    """What the kernels write, and for the bias add to."""
    statistics = statistics_dtype(call.q.dtype)
    made = {}
    for name in ("q", "k", "v"):
        if getattr(needs, name):
            x = getattr(call, name)
            made[name] = empty_like_layout(x, x.shape[-1])
            if call.cu_seqlens_q is not None:  # rows that belong to no sequence
                made[name].zero_()
    if needs.bias:
        made["bias"] = cpu.bias_sums(call, statistics)
    if needs.sink:
        made["sink"] = call.sink.new_zeros(call.sink.shape, dtype=statistics)
    return Grads(**made)
