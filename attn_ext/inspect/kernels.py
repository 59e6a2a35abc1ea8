"""Each map of a dense call by the kernel that the registry chooses: the CPU's (inspect.h),
Triton's (inspect.py) or blocked torch code (`attn_ext.inspect.blocked`), the reference, which
serves every device.

Calls are dense and without autograd.  lse [B, Hq, Sq] is ignored by sigmoid weights.
"""

from __future__ import annotations

import torch

from attn_ext.backends import registry
from attn_ext.core.problem import Problem
from attn_ext.core.schema import Call
from attn_ext.inspect import blocked, logits


def problem_of(call: Call, name: str, lse=None, top_k: int = 0) -> Problem:
    """The problem that the map called `name` poses."""
    far = 0.0
    if lse is not None and bool(logits.too_large(lse).any()):
        far = float(torch.where(lse.isfinite(), lse.abs(), 0.0).max())
    return Problem.of(call, map=name, top_k=top_k, far_lse=far)


def select(backend: str, call: Call, name: str, lse=None, top_k: int = 0) -> str:
    """The backend whose kernel makes the map of `call`, as the registry chooses it."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got {type(backend).__name__} {backend!r}")
    return registry.select(backend, problem_of(call, name, lse, top_k))


def row_stats(call: Call, backend: str = "auto") -> tuple:
    """(LSE, largest logit, entropy), [B, Hq, Sq] each.  Dot products: one pass of the attention
    kernel.  Of sigmoid weights: those of P / sum_j P_ij, with LSE = ln sum_j P_ij.
    """
    if call.w is None and call.normalizer == "softmax" and backend == "auto":
        return logits.forward(call._replace(need_stats=True))[1:]
    dtype = logits.statistics_dtype(call)
    if select(backend, call, "row_stats") != "cpu":
        return blocked.row_stats(call)
    lse = torch.full(call.q.shape[:3], -torch.inf, dtype=dtype, device=call.q.device)
    largest, entropy = lse.clone(), torch.zeros_like(lse)
    cpu = registry.get("cpu")
    cpu.inspect(call, cpu.ROW_STATS, lse, largest, entropy)
    return lse, largest, entropy


def top_k(call: Call, n: int, lse, backend: str = "auto") -> tuple:
    """(weights, keys) [B, Hq, Sq, n], largest first; 0 and -1 where a row sees fewer keys."""
    name = select(backend, call, "top_k", lse, n)
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


def mean_top_k(call: Call, n: int, lse, backend: str = "auto") -> blocked.MeanTopK:
    """The n largest of the mean over heads, from whole rows."""
    name = select(backend, call, "mean_top_k", lse, n)
    if name == "reference":
        return blocked.mean_top_k(call, n)
    if name == "triton":
        return blocked.MeanTopK(*registry.get("triton").inspect_mean_top_k(call, n, lse))
    (batch, heads, seqlen_q), device = call.q.shape[:3], call.q.device
    dtype, rows = logits.statistics_dtype(call), batch * seqlen_q
    weights = torch.zeros(batch, seqlen_q, n, dtype=dtype, device=device)
    total = torch.zeros(batch, heads, seqlen_q, dtype=dtype, device=device)
    # keys, keys that each head sees, keys that any head sees: one buffer, as the kernel fills it
    found = torch.zeros(rows * (n + heads + 1), dtype=torch.int64, device=device)
    keys, seen, any_seen = found.split((rows * n, rows * heads, rows))
    cpu = registry.get("cpu")
    if call.k.shape[2]:
        cpu.inspect(call, cpu.MEAN_TOP_K, _rows(call, lse), weights, total, found, (n, 0, 0))
    return blocked.MeanTopK(
        weights, keys.view(batch, seqlen_q, n), seen.view(batch, heads, seqlen_q),
        any_seen.view(batch, seqlen_q), total,
    )  # fmt: skip


def column_mass(call: Call, lse, backend: str = "auto") -> torch.Tensor:
    """sum_i P_ij, [B, Hq, Sk]"""
    name = select(backend, call, "column_mass", lse)
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
    name = select(backend, call, "pooled_map", lse)
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
