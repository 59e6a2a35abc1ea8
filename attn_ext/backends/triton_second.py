"""Second derivatives and forward mode by the Triton kernels (triton_kernels/kernels/tangent.py and
backward_tangent.py): dense and varlen calls of softmax attention on the devices of the triton
backend, whether that or the cuda backend serves the call itself.

Both functions give None where the kernels leave a call to `attn_ext.backends.blocked`: where an
input holds NaN or inf, or a row's LSE is so far from 0 that float32 has lost the sum in it, as
beside a bias of -1e9 over the whole row.  They look at the inputs for it, and wait for the answer.
While a CUDA graph is captured, which allows no waiting, the kernels serve every call, and the graph
looks at its inputs at each replay: where they may not have them, all results are NaN.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from attn_ext.backends import triton, tuned
from attn_ext.core import tiles
from attn_ext.core.problem import FAR_LSE, Problem
from attn_ext.core.schema import Call, Grads, Needs, Rows, Tangents

# head dimension by dtype: kernels of wider ones would spill
WIDEST = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64}


def unsupported(problem: Problem) -> list[str]:
    """Every reason why these kernels do not serve `problem`, which the triton or the cuda backend
    serves: they cannot, or nobody knows yet whether they are right on this GPU."""
    why = limits(problem)
    if problem.device == "cuda" and not tuned.verified(tuned.SECOND, problem.device_index):
        why.append("`attn-ext verify` has not passed for them on this GPU")
    return why


def limits(problem: Problem) -> list[str]:
    """Every reason why these kernels cannot serve `problem`."""
    missing = triton.available()
    if missing:
        return [missing]
    why = triton.unsupported(problem)
    widest = WIDEST.get(problem.dtype)
    if widest is not None and max(problem.head_dim, problem.head_dim_v) > widest:
        why.append(f"head_dim must be at most {widest} for {problem.dtype} in second derivatives")
    if problem.deterministic and problem.bias:
        why.append("the second gradient of a broadcast bias is summed in no fixed order")
    return why


def _is_empty(call: Call) -> bool:
    return 0 in (call.q.numel(), call.k.numel(), call.v.numel())


def _capturing(call: Call) -> bool:
    return call.q.is_cuda and torch.cuda.is_current_stream_capturing()


def _near(call: Call, lse: torch.Tensor, *others) -> torch.Tensor:
    """Whether the kernels may have the call, as a tensor: no input holds NaN or an infinity, and no
    LSE is far from 0."""
    far = (lse.abs() > FAR_LSE) & (lse != -torch.inf)
    return tiles.finite(call, *others) & ~far.any()


def _nan_unless(near: torch.Tensor, results: Iterable[torch.Tensor | None]) -> None:
    """Results become NaN where the kernels may not have the call."""
    for x in results:
        if x is not None:
            x.masked_fill_(~near, torch.nan)


def tangent(call: Call, tangents: Tangents, given: Rows) -> tuple | None:
    """(O', L'), of the O and LSE in `given`."""
    if _is_empty(call):
        return None
    near, capturing = _near(call, given.lse, *tangents), _capturing(call)
    if not capturing and not near:
        return None
    from attn_ext.triton_kernels.launch import second

    found = second.tangent(call, tangents, given)
    if capturing:
        _nan_unless(near, found)
    return found


def backward_tangent(
    call: Call, tangents: Tangents, given: Rows, needs: Needs, primal: Needs
) -> tuple[Grads, Grads] | None:
    """The tangents of the gradients that `needs` asks for, and the gradients that `primal` asks
    for."""
    rows = given.dout, given.dlse, given.tdout, given.tdlse
    if _is_empty(call):
        return None
    near, capturing = _near(call, given.lse, *tangents, *rows), _capturing(call)
    if not capturing and not near:
        return None
    from attn_ext.triton_kernels.launch import second

    found = second.backward_tangent(call, tangents, given, needs, primal)
    if capturing:
        for grads in found:
            _nan_unless(near, grads)
    return found
