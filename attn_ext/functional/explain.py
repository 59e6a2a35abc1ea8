"""explain: which backend would serve a call, and why the others would not."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch

from attn_ext.backends import registry, tuned
from attn_ext.core import validate
from attn_ext.core.problem import Problem
from attn_ext.functional.common import NO_LSE
from attn_ext.functional.decode import attention_decode, decode_call
from attn_ext.functional.dense import attention, dense_call
from attn_ext.functional.varlen import attention_varlen, varlen_call
from attn_ext.ops import rules

SECOND = {  # by the module that computes them
    "blocked": "torch operations on tiles, in O(N) memory",
    "cpu_second": "C++ kernels; torch operations on tiles where an input is not finite",
    "triton_second": "Triton kernels; torch operations on tiles where an input is not finite",
}


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; str() gives a table."""

    problem: Problem
    reasons: dict[str, list[str]]  # backend -> why it cannot serve the call; empty when it can
    chosen: str | None  # None when no backend can
    decided: str = ""  # by what it was chosen
    int8: str = ""  # of a KVCache of int8: how its keys and values are read

    def __str__(self) -> str:
        p = self.problem
        dtype = str(p.dtype).removeprefix("torch.")
        lines = [
            f"{p.kind} attention on {p.device}, {dtype}: B={p.batch} Hq={p.heads_q} Hk={p.heads_k} "
            f"Sq={p.seqlen_q} Sk={p.seqlen_k} D={p.head_dim} Dv={p.head_dim_v}"
        ]
        for name, why in self.reasons.items():
            verdict = "chosen" if name == self.chosen else "; ".join(why) or "able"
            lines.append(f"  {name:<10} {verdict}")
        lines.append(f"  decided by {self.decided}")
        if self.backward:
            lines.append(f"  backward by {self.backward}")
        if self.int8:
            lines.append(f"  keys and values of int8: {self.int8}")
        lines.append(f"  second derivatives and forward mode: {self.second}")
        return "\n".join(lines)

    @property
    def backward(self) -> str:
        """Which kernels compute the gradients, where the backend has several ways; "" where it has
        one, and for calls without gradients."""
        named = (
            getattr(registry.get(self.chosen), "backward_kernels", None) if self.chosen else None
        )
        return named(self.problem) if named and self.problem.grad else ""

    @property
    def second(self) -> str:
        """Who computes second derivatives and forward mode, or what to use in place of them."""
        p = self.problem
        missing = rules.not_twice(p.kind, p.normalizer, p.score)
        if missing is not None:
            return f"none; {missing[1]}"
        chosen = self.chosen or ""
        why = registry.second_reasons(chosen, p) if chosen in registry.SECOND else []
        left = f" (of their kernels: {'; '.join(why)})" if why else ""
        return SECOND[registry.second(chosen, p)] + left


def of(problem: Problem, backend: str = "auto") -> Explanation:
    """What `explain` says of a problem."""
    known = (*registry.ORDER, registry.TORCH)
    reasons = {name: registry.reasons(name, problem) for name in known}
    if backend not in registry.CHOICES:
        registry.get(backend)  # an unknown name is an error here too
        chosen = None if reasons[backend] else backend
        return Explanation(problem, reasons, chosen, "its name")
    try:
        chosen = registry.select(backend, problem)
    except NotImplementedError:
        return Explanation(problem, reasons, None, "nothing: no backend can")
    return Explanation(problem, reasons, chosen, _decided(problem, chosen))


def _decided(problem: Problem, chosen: str) -> str:
    """What made "auto" choose: a row of the table that was measured here, or the order."""
    row = tuned.row_of(problem)
    engine = tuned.fastest(problem, (chosen,))
    if row is None or engine is None:
        state = tuned.state(problem.device, problem.device_index)
        why = registry.stands_back(problem)
        first = f", triton before cuda since {why}" if why else ""
        return f"the order of backends{first}; {state}"
    times = sorted(row.seconds.items(), key=lambda item: item[1])
    shown = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in times)
    return f"attn-ext tune, {row}: {shown}"


def explain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args, **kwargs) -> Explanation:
    """Say which backend would serve the call, and each other backend's reasons; nothing is
    computed.

    The arguments are those of `attention`; with cu_seqlens_q= those of `attention_varlen`, and with
    block_table=, k_new= or cache_seqlens= those of `attention_decode`.  Raises what the call itself
    would raise for bad arguments.
    """
    if args or {"cu_seqlens_q", "cu_seqlens_k"} & kwargs.keys():
        function, checked = attention_varlen, varlen_call
    elif {"block_table", "cache_seqlens", "k_new", "v_new"} & kwargs.keys():
        function, checked = attention_decode, decode_call
    else:
        function, checked = attention, dense_call
    try:
        inspect.signature(function).bind(q, k, v, *args, **kwargs)
    except TypeError as error:
        raise TypeError(f"explain, with the arguments of {function.__name__}: {error}") from None
    return_lse = kwargs.pop("return_lse", False)
    validate.boolean("return_lse", return_lse)
    if function is attention_decode:
        kwargs["append"] = False
    else:
        kwargs["need_stats"] = kwargs.pop("return_stats", False)
        validate.boolean("return_stats", kwargs["need_stats"])
    call = checked(q, k, v, *args, **kwargs)
    if return_lse and kwargs.get("normalizer") == "sigmoid":
        raise ValueError(NO_LSE)
    return of(Problem.of(call), call.backend)
