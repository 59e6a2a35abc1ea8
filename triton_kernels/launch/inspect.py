"""From a dense `Call` and its LSE to the launches of inspect.py's kernels."""

from __future__ import annotations

import torch
import triton

from attn_ext.core.layout import strides
from attn_ext.core.schema import Call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels.inspect import (
    column_mass_kernel,
    mean_top_k_kernel,
    pooled_map_kernel,
    top_k_kernel,
)
from attn_ext.triton_kernels.launch import attention

CELLS = 16  # pooled rows and columns of one program


def tile(plan: attention.Plan) -> configs.Tile:
    """The tile of the kernels; for all GPUs, since a call of these is rare."""
    if attention.architecture(plan.q) == "interpreter":
        return configs.Tile(32, 32, 4, 1)
    large = plan.block_d > 128 or plan.q.element_size() == 4
    return configs.Tile(32, 32, 4, 1) if large else configs.Tile(64, 64, 8, 1)


def _arguments(plan: attention.Plan, blocks: int, lse_strides: bool) -> tuple:
    """Side inputs, strides, sizes and scalars."""
    return (
        plan.terms, *strides(plan.q, False), *strides(plan.k, False),
        *(plan.lse_strides() if lse_strides else ()), plan.heads_q, plan.heads_q // plan.heads_k,
        plan.seqlen_q, plan.seqlen_k, blocks, plan.scale, plan.left, plan.right,
    )  # fmt: skip


def _rows(lse: torch.Tensor) -> torch.Tensor:
    return lse.detach().float().contiguous()


def column_mass(call: Call, lse: torch.Tensor) -> torch.Tensor:
    """sum_i P_ij, float32 [B, Hq, Sk]"""
    plan = attention.Plan(call)
    f32 = {"dtype": torch.float32, "device": plan.q.device}
    mass = torch.zeros(plan.batch, plan.heads_q, plan.seqlen_k, **f32)
    if mass.numel() and plan.seqlen_q:
        found = tile(plan)
        blocks = triton.cdiv(plan.seqlen_k, found.block_n)
        with attention.on_device(plan.q):
            attention.run(
                column_mass_kernel, blocks * plan.heads_q * plan.batch, found,
                plan.q, plan.k, _rows(lse), mass, *_arguments(plan, blocks, True),
                plan.dim, found.block_m, found.block_n, plan.block_d, plan.flags,
            )  # fmt: skip
    return mass


def _empty_places(plan: attention.Plan, n: int, *shape: int) -> torch.Tensor:
    """int64 [*shape, BEST] of what is less than any packed number, BEST a power of two >= n."""
    size = (*shape, triton.next_power_of_2(max(n, 2)))
    least = torch.iinfo(torch.int64).min
    return torch.full(size, least, dtype=torch.int64, device=plan.q.device)


def _unpacked(found: torch.Tensor, n: int) -> tuple:
    """(whether a key is there, its float32, the key) [..., n], largest first, of packed numbers
    [..., BEST]."""
    found = found.sort(-1, descending=True).values[..., :n]
    there = found >= -0x7F800000 << 32  # the least finite float
    order = (found >> 32).to(torch.int32)
    value = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return there, value, torch.where(there, 0x7FFFFFFF - (found & 0xFFFFFFFF), -1)


def top_k(call: Call, n: int, lse: torch.Tensor) -> tuple:
    """(weights float32, keys int64) [B, Hq, Sq, n], largest first; 0 and -1 where there is none."""
    plan = attention.Plan(call)
    found = _empty_places(plan, n, plan.batch, plan.heads_q, plan.seqlen_q)
    if found.numel() and plan.seqlen_k:
        chosen = tile(plan)
        blocks = triton.cdiv(plan.seqlen_q, chosen.block_m)
        with attention.on_device(plan.q):
            attention.run(
                top_k_kernel, blocks * plan.heads_q * plan.batch, chosen,
                plan.q, plan.k, found, *_arguments(plan, blocks, False),
                plan.dim, chosen.block_m, chosen.block_n, plan.block_d, found.shape[-1],
                plan.flags,
            )  # fmt: skip
    there, s2, keys = _unpacked(found, n)
    # -inf: no key is there
    row_lse = lse.detach().float().clamp(attention.LEAST, -attention.LEAST).unsqueeze(-1)
    weights = torch.exp2(s2 - row_lse * attention.LOG2E)
    return torch.where(there, weights, 0.0), keys


def mean_top_k(call: Call, n: int, lse: torch.Tensor) -> tuple:
    """(weights float32, keys int64) [B, Sq, n] of the mean over heads, as top_k; (keys that a row
    sees int64 [B, Hq, Sq], that some head sees [B, Sq], sum_j P_ij float32 [B, Hq, Sq])."""
    plan = attention.Plan(call)
    device, rows = plan.q.device, (plan.batch, plan.heads_q, plan.seqlen_q)
    found = _empty_places(plan, n, plan.batch, plan.seqlen_q)
    total = torch.zeros(rows, dtype=torch.float32, device=device)
    seen = torch.zeros(rows, dtype=torch.int32, device=device)
    by_any = torch.zeros(rows[::2], dtype=torch.int32, device=device)
    if total.numel() and plan.seqlen_k:
        chosen = tile(plan)
        blocks = triton.cdiv(plan.seqlen_q, chosen.block_m)
        with attention.on_device(plan.q):
            attention.run(
                mean_top_k_kernel, blocks * plan.batch, chosen,
                plan.q, plan.k, _rows(lse), found, total, seen, by_any,
                *_arguments(plan, blocks, True),
                plan.dim, chosen.block_m, chosen.block_n, plan.block_d, found.shape[-1],
                plan.flags,
            )  # fmt: skip
    there, mean, keys = _unpacked(found, n)
    return torch.where(there, mean, 0.0), keys, seen.long(), by_any.long(), total


def pooled_map(call: Call, rows: int, cols: int, lse: torch.Tensor) -> torch.Tensor:
    """P averaged down to float32 [B, Hq, rows, cols]"""
    plan = attention.Plan(call)
    f32 = {"dtype": torch.float32, "device": plan.q.device}
    out = torch.zeros(plan.batch, plan.heads_q, rows, cols, **f32)
    if out.numel() and plan.seqlen_q and plan.seqlen_k:
        queries = 16 if attention.architecture(plan.q).startswith("gfx") else 32
        found = tile(plan)._replace(block_m=queries, block_n=32, warps=8)  # larger ones spill
        row_blocks = triton.cdiv(rows, CELLS)
        blocks = row_blocks * triton.cdiv(cols, CELLS)
        with attention.on_device(plan.q):
            attention.run(
                pooled_map_kernel, blocks * plan.heads_q * plan.batch, found,
                plan.q, plan.k, _rows(lse), out, *_arguments(plan, blocks, True),
                rows, cols, row_blocks,
                plan.dim, found.block_m, found.block_n, plan.block_d, CELLS, plan.flags,
            )  # fmt: skip
    return out
