"""Which kernel computes a map of a dense call: the CPU's (inspect.h), Triton's (inspect.py) or
blocked torch code (`attn_ext.inspect.blocked`), the reference, which serves every device.

Calls are dense and without autograd.  lse [B, Hq, Sq] is ignored by sigmoid weights.
"""

from __future__ import annotations

import torch

from attn_ext.backends import registry
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Call
from attn_ext.inspect import blocked, logits

BACKENDS = ("triton", "cpu", "reference")
TRITON_TOP_K = 64  # keys a query that the Triton kernel keeps in registers


def reasons(name: str, call: Call, n: int = 0, lse=None) -> list[str]:
    """Why backend `name` has no kernel for `call`; empty where it has."""
    if name == "reference":
        return []
    if name not in BACKENDS and registry.get(name):  # get: ValueError for an unknown name
        return [f"attn_ext.inspect has no {name} kernel"]
    why = list(registry.reasons(name, Problem.of(call)))
    if name == "triton" and (call.w is not None or call.normalizer != "softmax"):
        why.append("its inspect kernels know softmax over dot products only")
    if name == "triton" and n > TRITON_TOP_K:
        why.append(f"n must be at most {TRITON_TOP_K} on triton, got {n}")
    if lse is not None and bool(logits.too_large(lse).any()):
        most = float(torch.where(lse.isfinite(), lse.abs(), 0.0).max())
        why.append(f"lse must be within {logits.LARGEST_LSE:g} of 0 in its kernels, got {most:g}")
    return why


def select(name: str, call: Call, n: int = 0, lse=None) -> str:
    """The backend whose kernel serves `call`: the first able one for "auto", else `name` itself;
    NotImplementedError with the reasons where it cannot.
    """
    if name == "auto":
        problem = Problem.of(call)
        return next(
            b for b in BACKENDS if registry.automatic(b, problem) and not reasons(b, call, n, lse)
        )
    if not isinstance(name, str):
        raise TypeError(f"backend must be a str, got {type(name).__name__} {name!r}")
    why = reasons(name, call, n, lse)
    if why:
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {'; '.join(why)}")
    return name


def row_stats(call: Call, backend: str = "auto") -> tuple:
    """(LSE, largest logit, entropy), [B, Hq, Sq] each.  Dot products: one pass of the attention
    kernel.  Of sigmoid weights: those of P / sum_j P_ij, with LSE = ln sum_j P_ij.
    """
    if call.w is None and call.normalizer == "softmax" and backend == "auto":
        return logits.forward(call._replace(need_stats=True))[1:]
    dtype = logits.statistics_dtype(call)
    if select(backend, call) != "cpu":
        return blocked.row_stats(call)
    lse = torch.full(call.q.shape[:3], -torch.inf, dtype=dtype, device=call.q.device)
    largest, entropy = lse.clone(), torch.zeros_like(lse)
    cpu = registry.get("cpu")
    cpu.inspect(call, cpu.ROW_STATS, lse, largest, entropy)
    return lse, largest, entropy


def lse_of(call: Call) -> torch.Tensor | None:
    """LSE [B, Hq, Sq] by a forward pass; None for sigmoid weights, which need none."""
    return None if call.normalizer == "sigmoid" else logits.forward(call)[1]


def top_k(call: Call, n: int, lse, backend: str = "auto") -> tuple:
    """(weights, keys) [B, Hq, Sq, n], largest first; 0 and -1 where a row sees fewer keys."""
    name = select(backend, call, n, lse)
    if name == "reference":
        return blocked.top_k(call, n, lse)
    if name == "triton":
        return registry.get("triton").inspect_top_k(call, n, lse)
    shape = (*call.q.shape[:3], n)
    device = call.q.device
    weights = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=device)
    keys = torch.full(shape, -1, dtype=torch.int64, device=device)
    cpu = registry.get("cpu")
    cpu.inspect(call, cpu.TOP_K, _rows(call, lse), weights, None, keys, (n, 0, 0))
    return weights, keys


def mean_top_k(call: Call, n: int, backend: str = "auto") -> blocked.MeanTopK:
    """The n largest of the mean over heads, from whole rows; blocked torch code on every device."""
    if backend not in ("auto", "reference"):
        select(backend, call, n)  # an unknown name, or one that cannot serve the call anyway
        raise NotImplementedError(
            f"backend {backend!r} cannot serve this call: it has no kernel for a mean over heads"
        )
    return blocked.mean_top_k(call, n)


def column_mass(call: Call, lse, backend: str = "auto") -> torch.Tensor:
    """sum_i P_ij, [B, Hq, Sk]"""
    name = select(backend, call, lse=lse)
    if name == "reference":
        return blocked.column_mass(call, lse)
    if name == "triton":
        return registry.get("triton").inspect_column_mass(call, lse)
    shape = (*call.q.shape[:2], call.k.shape[2])
    mass = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    cpu = registry.get("cpu")
    cpu.inspect(call, cpu.COLUMN_MASS, _rows(call, lse), mass)
    return mass


def pooled_map(call: Call, rows: int, cols: int, lse, backend: str = "auto"):
    """P averaged down to [B, Hq, rows, cols], rows <= Sq and cols <= Sk, as adaptive_avg_pool2d
    cuts it.
    """
    name = select(backend, call, lse=lse)
    if name == "reference":
        return blocked.pooled_map(call, rows, cols, lse)
    if name == "triton":
        return registry.get("triton").inspect_pooled_map(call, rows, cols, lse)
    shape = (*call.q.shape[:2], rows, cols)
    out = torch.zeros(shape, dtype=logits.statistics_dtype(call), device=call.q.device)
    cpu = registry.get("cpu")
    sizes = (0, rows, cols)
    cpu.inspect(call, cpu.POOLED_MAP, _rows(call, lse), out, None, None, sizes)
    return out


def _rows(call: Call, lse) -> torch.Tensor:
    """LSE as the kernel reads it; of sigmoid weights, where it is not read, anything."""
    dtype = logits.statistics_dtype(call)
    if lse is None:
        return torch.zeros(call.q.shape[:3], dtype=dtype, device=call.q.device)
    return lse.detach().to(dtype).contiguous()
