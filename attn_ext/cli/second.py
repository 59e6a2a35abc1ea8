"""Triton's second derivatives as a subject of `attn-ext verify`: the tangents of O, LSE and the
gradients of each call of the matrix, against autograd on the reference.
"""

from __future__ import annotations

import torch

from attn_ext.backends import registry, tuned
from attn_ext.cli.conform import Measure, Prepared, compare, one_thread
from attn_ext.core import reference
from attn_ext.core.problem import Problem
from attn_ext.core.schema import GRADIENTS, Call, Needs, Rows, Tangents, given, statistics_dtype
from attn_ext.testing import differentiated, needs_of, poisoned_memory, to_float64

LONGEST = 512  # rows: what they are compared with is N x N, and kept for a second derivative


class Second:
    """The two passes of attn_ext.backends.triton_second."""

    ours = True
    name = tuned.SECOND

    def __init__(self, device: str):
        self.device = device
        self.module = registry.part("triton_second")

    def unsupported(self, call: Call, grad: bool) -> list[str]:
        """Why the kernels have nothing to do with a call"""
        if not grad:
            return ["decode has no second derivatives"]
        if max(call.max_seqlen_q, call.max_seqlen_k) > LONGEST:
            return [f"second derivatives are compared up to {LONGEST} rows"]
        return self.module.limits(Problem.of(differentiated(call, grad)))

    def measures(self, prepared: Prepared) -> list[Measure] | None:
        """The tangents' errors; None where the kernels leave the call to torch operations"""
        call = prepared.call
        seeds = _seeds(call)
        with one_thread():
            exact = {name: x.double() for name, x in seeds.items()}
            truth, naive = _autograd(to_float64(call), exact), _autograd(call, seeds)
        found = self._passes(call, seeds)
        if found is None:
            return None
        return [compare(name, found[name], truth[name], naive[name], "out", call.q.dtype)
                for name in truth]  # fmt: skip

    def _passes(self, call: Call, seeds: dict) -> dict | None:
        tangents = Tangents(**{name: seeds[name] for name in given(call)})
        out, lse = (x.detach() for x in reference.attend(call._replace(need_stats=False))[:2])
        rows = Rows(out=out, lse=lse, dout=seeds["dout"], dlse=seeds["dlse"])
        with poisoned_memory():
            first = self.module.tangent(call, tangents, rows)
            if first is None:
                return None
            tout, tlse = first
            more = {"tout": tout, "tlse": tlse, "tdout": seeds["tdout"], "tdlse": seeds["tdlse"]}
            rows = rows._replace(**more)
            found = self.module.backward_tangent(call, tangents, rows, needs_of(call), Needs())
        if found is None:
            return None
        moved = {f"moved {name}": x for name, x in zip(GRADIENTS, found[0], strict=True)}
        return {"tangent out": tout, "tangent lse": tlse, **moved}


def _seeds(call: Call) -> dict[str, torch.Tensor]:
    """Normal tangents of the inputs by name, cotangents of O and LSE, and tangents of these."""
    generator = torch.Generator("cpu").manual_seed(7)
    out, lse = reference.attend(call._replace(need_stats=False))[:2]
    like = dict(given(call))
    for name in ("dout", "tdout"):
        like[name] = out
    for name in ("dlse", "tdlse"):
        like[name] = lse.to(statistics_dtype(call.q.dtype))
    return {
        name: torch.randn(x.shape, generator=generator, dtype=torch.float32, device="cpu").to(x)
        for name, x in like.items()
    }


def _autograd(call: Call, seeds: dict) -> dict[str, torch.Tensor]:
    """The same tangents, by reverse mode twice: those of the gradients are the second gradients,
    and the gradients with the tangents of the cotangents in their place."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in given(call).items()}
    again = call._replace(**leaves, grad=True, bias_grad=call.bias is not None, need_stats=False)
    outputs = reference.attend(again)[:2]
    rows = [seeds[name].clone().requires_grad_() for name in ("dout", "dlse")]
    inputs = list(leaves.values())
    first = torch.autograd.grad(outputs, inputs, rows, create_graph=True)
    second = torch.autograd.grad(
        first, [*inputs, *rows], [seeds[name] for name in leaves], retain_graph=True,
        materialize_grads=True,
    )  # fmt: skip
    moved = torch.autograd.grad(
        outputs, inputs, [seeds["tdout"], seeds["tdlse"]], materialize_grads=True
    )
    found = {"tangent out": second[-2], "tangent lse": second[-1]}
    for name, a, b in zip(leaves, second, moved, strict=False):
        found[f"moved {name}"] = a + b
    return found
