"""From a `Call` with w to the launches of additive attention's kernels (additive.py)."""

from __future__ import annotations

import torch
import triton

from attn_ext.core.layout import score_strides, strides
from attn_ext.core.schema import Call, Grads, Needs
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels.additive import (
    additive_dkdv_kernel,
    additive_dq_kernel,
    additive_forward_kernel,
)
from attn_ext.triton_kernels.launch import attention, gradients
from attn_ext.triton_kernels.launch import backward as backward_launch


def tile(plan: attention.Plan) -> configs.Tile:
    """The tile of the kernels: exponentials, not memory, rule, so one table serves all GPUs."""
    architecture = attention.architecture(plan.q)
    if architecture == "interpreter":
        return configs.Tile(32, 32, 4, 1)
    # 4 warps of 32 lanes or 64 queries spill: O and S, or gradients [32, D | Dv], are in registers
    amd = architecture.startswith("gfx")
    block_m = 16 if plan.q.element_size() == 4 and not amd else 32  # 32 queries of float32 spill
    return configs.Tile(block_m, 32, 4 if amd else 8, 1)


def _tiles(plan: attention.Plan, found: configs.Tile) -> tuple:
    return (plan.dim, plan.dim_v, found.block_m, found.block_n, plan.block_d, plan.block_dv)


def _sizes(plan: attention.Plan, blocks: int) -> tuple:
    return (plan.heads_q, plan.heads_q // plan.heads_k, *plan.totals(), plan.seqlen_q,
            plan.seqlen_k, blocks, *plan.scalars())  # fmt: skip


def _shared(plan: attention.Plan, o: torch.Tensor) -> tuple:
    """Side inputs and strides; o is O or dO."""
    varlen = plan.varlen
    return (
        *plan.side(), plan.cu_seqlens_q, plan.cu_seqlens_k, plan.seqlens_k,
        *strides(plan.q, varlen), *strides(plan.k, varlen),
        *strides(plan.v, varlen), *strides(o, varlen), *plan.lse_strides(),
    )  # fmt: skip


def forward(call: Call) -> tuple:
    """(O, LSE, None, None)"""
    plan = attention.Plan(call)
    out, lse, _, _ = attention.outputs(plan)
    if lse.numel():
        found = tile(plan)
        blocks = triton.cdiv(plan.seqlen_q, found.block_m)
        with attention.on_device(plan.q):
            attention.run(
                additive_forward_kernel, blocks * plan.heads_q * plan.batch, found,
                plan.q, plan.k, plan.v, plan.w, out, lse, *_shared(plan, out),
                *_sizes(plan, blocks), *_tiles(plan, found), plan.flags,
            )  # fmt: skip
    return out, lse, None, None


def backward(call: Call, dout, out, lse, dlse, needs: Needs) -> Grads:
    """The gradients; all but that of the bias come together."""
    plan = attention.Plan(call)
    grads = [backward_launch.empty_gradient(x, plan) for x in (call.q, call.k, call.v)]
    if call.seqlens_k is not None:  # rows past a length have no program
        for g in grads:
            g.zero_()
    dbias = None
    if needs.bias:
        dbias = torch.zeros(call.bias.shape, dtype=torch.float32, device=call.q.device)
    dw = torch.zeros_like(plan.w)
    if call.q.numel() and call.k.numel() and call.v.numel():
        with attention.on_device(plan.q):
            dw = _gradients(plan, dout, out, lse, dlse, grads, dbias)
    dbias = None if dbias is None else dbias.to(call.bias.dtype)
    return Grads(*grads, bias=dbias, w=dw.to(call.w.dtype))


def _gradients(plan: attention.Plan, dout, out, lse, dlse, grads, dbias) -> torch.Tensor:
    """Fill dQ, dK, dV and dbias; returns dw [Hq, D]."""
    (dq, dk, dv), varlen = grads, plan.varlen
    rows = backward_launch.Backward(plan, dout, out, lse, dlse)
    rows.preprocess()
    inputs = (plan.q, plan.k, plan.v, plan.w, rows.dout, rows.lse, rows.delta)
    shared = _shared(plan, rows.dout)
    found = tile(plan)
    blocks = triton.cdiv(plan.seqlen_k, found.block_n)
    attention.run(
        additive_dkdv_kernel, blocks * plan.heads_k * plan.batch, found, *inputs, dk, dv, *shared,
        *strides(dk, varlen), *strides(dv, varlen), *_sizes(plan, blocks),
        *_tiles(plan, found), plan.flags,
    )  # fmt: skip
    found = tile(plan)
    blocks = triton.cdiv(plan.seqlen_q, found.block_m)
    parts = plan.w.new_zeros(plan.batch, plan.heads_q, blocks, plan.dim)
    flags = plan.flags + (0 if dbias is None else gradients.dbias_flags(plan, tuple(dbias.shape)))
    attention.run(
        additive_dq_kernel, blocks * plan.heads_q * plan.batch, found, *inputs, dq, parts, dbias,
        *shared, *strides(dq, varlen), *score_strides(dbias, plan.sizes),
        *_sizes(plan, blocks), *_tiles(plan, found), flags,
    )  # fmt: skip
    return parts.sum((0, 2))
