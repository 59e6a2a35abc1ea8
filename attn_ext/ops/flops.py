"""FLOP formulas for torch.utils.flop_counter, as it counts torch's own attention: matmuls only,
masks not subtracted.  q [B, Hq, Sq, D], k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]; varlen by its longest
sequences.

torch.utils.flop_counter loads Triton, a fifth of a second of an import that seldom needs it: the
formulas are handed over when somebody imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys

import torch

from attn_ext.core.schema import FIELDS, Call
from attn_ext.ops import second

COUNTER = "torch.utils.flop_counter"


def _matmul_pair(fields) -> tuple[int, int]:
    """(Q K^T, P V) in FLOPs: 2 * B * Hq * Sq * Sk * D, and the same with Dv."""
    call = Call(*fields[: len(FIELDS)])  # of shapes in place of tensors; a backward has needs
    q, v, cu_seqlens_q = call.q, call.v, call.cu_seqlens_q
    batch = q[0] if cu_seqlens_q is None else cu_seqlens_q[0] - 1
    scores = 2 * batch * q[1] * call.max_seqlen_q * call.max_seqlen_k
    return scores * q[-1], scores * v[-1]


def _forward_flops(*fields, out_shape=None, **unused) -> int:
    return sum(_matmul_pair(fields))


def _backward_flops(dout, dlse, out, lse, *fields, out_shape=None, **unused) -> int:
    # S = Q K^T again, dQ and dK of D columns; dP and dV of Dv columns
    scores, values = _matmul_pair(fields)
    return 3 * scores + 2 * values


def _tangent_flops(out, lse, *fields, out_shape=None, **unused) -> int:
    # S, q' K^T, Q k'^T; (P t') V and P V'
    scores, values = _matmul_pair(fields)
    return 3 * scores + 2 * values


def _backward_tangent_flops(*inputs, out_shape=None, **unused) -> int:
    # the same S and its tangent, two products each for dQ' and dK'; dP, two for dP' and for dV'.
    # Gradients that are asked for beside cost one product each.
    scores, values = _matmul_pair(inputs[second.ROWS :])
    primal = inputs[-1]
    return (7 + sum(primal[:2])) * scores + (5 + primal[2]) * values


def _register(counter) -> None:
    """Hand the formulas to the module torch.utils.flop_counter."""
    counter.register_flop_formula(torch.ops.attn_ext.forward)(_forward_flops)
    counter.register_flop_formula(torch.ops.attn_ext.backward)(_backward_flops)
    counter.register_flop_formula(torch.ops.attn_ext.tangent)(_tangent_flops)
    counter.register_flop_formula(torch.ops.attn_ext.backward_tangent)(_backward_tangent_flops)


class _WhenImported(importlib.abc.MetaPathFinder):
    """Finds torch.utils.flop_counter where it is and registers the formulas behind its code."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != COUNTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_register(module) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = then_register
        return spec


if COUNTER in sys.modules:
    _register(sys.modules[COUNTER])
else:
    sys.meta_path.insert(0, _WhenImported())
