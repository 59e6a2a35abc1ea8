"""Keys and values kept as int8 with a factor a row and head, and attention to them.

    row = int8 row * factor,  factor = max |row| / 127

So no number is off by more than factor / 2, or 0.4 % of the largest of its row.  A row that holds
NaN or inf is NaN as a whole.  Queries and results are float32.  The kernels of two backends read
int8 as it is: the CPU's for few queries, and Triton's; what else is asked for is computed from
float32 copies of one sequence's pages at a time, by any backend.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from attn_ext.backends import cpu_cache, registry
from attn_ext.core import values
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Call
from attn_ext.functional import explain
from attn_ext.functional.decode import attention_decode, decode_call
from attn_ext.ops import execute, route

OPTIONS = frozenset(attention_decode.__kwdefaults__) - {"k_new", "v_new"}
GIVEN = (torch.float16, torch.bfloat16, torch.float32)
MOST = 127
# Factors that are normal numbers, and of which 127 are finite: rows of smaller and larger numbers
# (below 2**-120, or the very largest float) are kept in these steps
FACTORS = (torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max / 127.00002)


def check_dtype(name: str, x) -> None:
    """TypeError for what a cache of int8 is not given."""
    if x.dtype not in GIVEN:
        raise TypeError(
            f"{name} must be float16, bfloat16 or float32 for a cache of int8, got {x.dtype}"
        )


def refuse_recorded(name: str) -> None:
    """NotImplementedError where torch records or transforms what runs: which lengths and pages are
    there is read on the way."""
    compiling = torch.compiler.is_compiling()
    if (
        compiling or torch.jit.is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
    ):  # fmt: skip
        raise NotImplementedError(
            f"{name} of a KVCache of int8 cannot be {'compiled' if compiling else 'transformed'}: "
            "call it from a function under torch.compiler.disable, or take dtype=torch.bfloat16"
        )


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 like x [..., D], and the factors, float32 [..., 1]."""
    x = x.detach().float()
    largest = x.abs().amax(-1, keepdim=True)
    factors = (largest / MOST).clamp(*FACTORS)
    factors = torch.where(torch.isfinite(largest), factors, torch.nan)
    whole = (x / factors).round_()
    return torch.where(torch.isnan(whole), 0, whole).to(torch.int8), factors


def dequantise(kept: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """The rows in float32."""
    return kept.float() * factors


def decode(
    q, k, v, held, k_factors, v_factors, *, block_table, dtype=torch.float32, return_lse=False,
    backend="auto", **options
):  # fmt: skip
    """`attention_decode` with pages of int8 and their factors [pages, Hk, page_size, 1].

    dtype: that of the queries before they were float32.
    """
    call = _call(q, k, v, held, block_table, backend, options)
    if len(q) == 0:
        out, lse = q.new_empty(0, *q.shape[1:3], v.shape[-1]), q.new_empty(0, *q.shape[1:3])
        return (out, lse) if return_lse else out
    values.check(call)
    # observers see calls of float32
    if route.is_plain(q, k, v) and not route.observers:
        name, found = _as_they_are(call, (k, v, k_factors, v_factors), dtype)
        if name is not None:
            return found if return_lse else found[0]
    options |= dict(return_lse=True, backend=backend)
    outs, lses = zip(
        *(_of_sequence(b, call, k, v, k_factors, v_factors, options) for b in range(len(q))),
        strict=True,
    )
    out, lse = torch.cat(outs), torch.cat(lses)
    return (out, lse) if return_lse else out


def _call(q, k, v, held, block_table, backend, options) -> Call:
    """The checked call, with caches of float32 that are one row in place of those of int8."""
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"KVCache.attend() got an unexpected keyword argument {name!r}")
    stand_ins = [
        torch.empty(x.shape[-1:], dtype=torch.float32, device=x.device).expand(x.shape)
        for x in (k, v)
    ]
    paged = dict(block_table=block_table, backend=backend, **options)
    return execute.prepared(decode_call(q, *stand_ins, held, **paged))


@functools.lru_cache(maxsize=1024)
def _triton_reads(backend: str, problem: Problem) -> bool:
    """Whether Triton's kernel serves the call: the only one on GPUs that reads int8."""
    free = backend in registry.CHOICES and registry.automatic("triton", problem)
    return (free or backend == "triton") and not registry.reasons("triton", problem)


def _as_they_are(call: Call, kept: tuple, dtype) -> tuple:
    """(the backend whose kernel reads int8, its O and LSE), or (None, None) where none does; kept:
    k and v, and their factors."""
    k, v, k_factors, v_factors = kept
    of_int8 = call._replace(k=k, v=v)
    on_cpu = call.q.device.type == "cpu" and call.backend != "triton"
    if not on_cpu and _triton_reads(call.backend, Problem.of(call)):
        triton = registry.get("triton")
        return "triton", triton.decode_int8(of_int8, k_factors, v_factors, dtype)
    found = None
    if execute.serves_on_cpu(call):
        found = cpu_cache.of_int8(of_int8, k_factors, v_factors)
    return (None, None) if found is None else ("cpu", found)


def explained(q, k, v, held, k_factors, v_factors, *, block_table, dtype, backend, **options):
    """What `explain` says of such a call.  Whether a kernel takes it is found out by a try."""
    call = _call(q, k, v, held, block_table, backend, options)
    found = explain.of(Problem.of(call), call.backend)
    values.check(call)
    name, _ = _as_they_are(call, (k, v, k_factors, v_factors), dtype) if len(q) else (None, None)
    if name is None:
        return dataclasses.replace(found, int8="made float32, one sequence's pages at a time")
    decided = found.decided if name == found.chosen else "what reads int8 as it is"
    said = f"read as they are by the kernel of {name}"
    return dataclasses.replace(found, chosen=name, decided=decided, int8=said)


def _of_sequence(b: int, call, k, v, k_factors, v_factors, options):
    """(out, lse) of sequence b alone."""
    count = max(1, -(-int(call.seqlens_k[b]) // k.shape[2]))
    pages = call.block_table[b, :count].long()
    capacity = count * k.shape[2]
    rows = [
        dequantise(x[pages], factors[pages]).transpose(0, 1).flatten(1, 2)[None]
        for x, factors in ((k, k_factors), (v, v_factors))
    ]
    told = dict(options)
    for name, dims in (("mask", 4), ("bias", 4), ("alibi_slopes", 2)):
        x = getattr(call, name)
        if x is None:
            continue
        x = x[b : b + 1] if x.dim() == dims and x.shape[0] > 1 else x
        told[name] = x[..., :capacity] if dims == 4 and x.shape[-1] > 1 else x
    return attention_decode(call.q[b : b + 1], *rows, call.seqlens_k[b : b + 1], **told)
