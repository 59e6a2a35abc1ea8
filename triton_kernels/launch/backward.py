"""From a `Call` and dO to the launches of the backward kernels: delta, dK and dV, dQ, dbias, and
the same of far rows; or dK, dV and sums of dQ in one kernel."""

from __future__ import annotations

import math

import torch

from attn_ext.core.layout import empty_like_layout, rows, score_strides, strides
from attn_ext.core.problem import Problem
from attn_ext.core.schema import TENSORS, Call, Grads, Needs
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels.dbias import dbias_kernel
from attn_ext.triton_kernels.kernels.delta import delta_kernel
from attn_ext.triton_kernels.kernels.dkdv import dkdv_kernel
from attn_ext.triton_kernels.kernels.dq import dq_kernel
from attn_ext.triton_kernels.kernels.far import far_keys_kernel, far_queries_kernel
from attn_ext.triton_kernels.kernels.fused import dq_from_sums_kernel, fused_kernel
from attn_ext.triton_kernels.kernels.primitives import SUM_ROWS
from attn_ext.triton_kernels.launch import attention, replay
from attn_ext.triton_kernels.launch.attention import Plan, ceil_div
from attn_ext.triton_kernels.launch.gradients import dbias_flags, sink_gradient


def empty_gradient(x: torch.Tensor, plan: Plan) -> torch.Tensor:
    """An uninitialised gradient of x; zero where rows may have no program that writes them."""
    gaps = plan.varlen or plan.seqlen_q == 0 or plan.seqlen_k == 0
    dtype = torch.float32 if plan.partial else x.dtype
    return plan.own(empty_like_layout(x, x.shape[-1], dtype), 0.0 if gaps else None)


def fused_tile(plan: Plan, needs: Needs) -> configs.Tile | None:
    """The tile of the kernel that computes dK, dV and dQ at once; None where two kernels serve: for
    results that are the same from run to run, for the gradient of a bias, which the kernel of dQ
    writes, and where the table says so."""
    wanted = needs.q and (needs.k or needs.v) and not needs.bias
    if plan.call.deterministic or not wanted or plan.q.element_size() != 2:
        return None
    found = plan.tile("fused")
    return None if found == configs.PAIR else found


def kernels_of(problem: Problem) -> str:
    """The kernels of a backward that wants the gradients of q, k and v, and of a bias that has
    one."""
    fused = not (problem.deterministic or problem.bias_grad) and problem.dtype.itemsize == 2
    if fused:
        gpu = problem.device == "cuda"
        name = attention.architecture_of(problem.device_index) if gpu else "interpreter"
        widths = map(attention.width, (problem.head_dim, problem.head_dim_v))
        rich = configs.several(x for x in configs.RICH_FEATURES if getattr(problem, x))
        fused = configs.tile(name, "fused", max(widths), 2, rich) != configs.PAIR
    if fused:
        return "fused_kernel, which adds dQ up by atomic additions, and dq_from_sums_kernel"
    return "dkdv_kernel and dq_kernel"


class Backward:
    """The backward kernels of one call; what all of them read is prepared here.  fused: whether dQ
    is summed up by the kernel of dK and dV."""

    def __init__(self, plan: Plan, dout, out, lse, dlse, fused: bool = False):
        self.plan, varlen = plan, plan.varlen
        self.dout = rows(dout.to(plan.q.dtype))
        self.out = None if out is None else rows(out)
        self.lse = lse.detach().resolve_neg().contiguous()
        self.delta = plan.own(torch.empty_like(self.lse))
        self.lse2 = plan.own(torch.empty_like(self.lse), 0.0 if plan.sigmoid else None)
        # Of far rows: base (inf in others) and inverse of each, and how many a block has
        self.base, self.inverse, self.marks = None, None, None
        if plan.sigmoid:
            self.lse, dlse = self.lse2, None
        else:
            self.base = plan.own(torch.empty_like(self.lse), math.inf if varlen else None)
            self.inverse = plan.own(torch.empty_like(self.lse))
            self.far_tile = configs.far_tile(
                max(plan.block_d, plan.block_dv), plan.q.element_size()
            )
            self.far_blocks = ceil_div(plan.seqlen_q, self.far_tile.block_m)
            marks = plan.batch * plan.heads_q * self.far_blocks
            self.marks = plan.own(torch.empty(marks, dtype=torch.int32, device=plan.q.device))
        self.dq = self.dk = self.dv = None
        self.dlse = None if dlse is None else dlse.to(torch.float32).resolve_neg().contiguous()
        self.shared = (
            *plan.side(), plan.cu_seqlens_q, plan.cu_seqlens_k,
            *strides(plan.q, varlen), *strides(plan.k, varlen), *strides(plan.v, varlen),
            *strides(self.dout, varlen), *plan.lse_strides(),
        )  # fmt: skip
        self.heads = (plan.heads_q, plan.heads_q // plan.heads_k)
        self.inputs = (plan.q, plan.k, plan.v, self.dout, self.lse2, self.delta)
        self.sums, self.sum_strides = None, (0, 0)
        if fused:
            # float32, `delta.sums_of`; the kernel of delta clears them, which sigmoid weights lack
            rows_taken, step = plan.seqlen_q, SUM_ROWS.value
            if varlen:
                rows_taken = plan.q.shape[0] + plan.batch * step
            per_head = ceil_div(rows_taken, step) * step * plan.block_d
            heads = plan.heads_q * (1 if varlen else plan.batch)
            sums = torch.empty(heads * per_head, dtype=torch.float32, device=plan.q.device)
            self.sums = plan.own(sums, 0.0 if plan.sigmoid else None)
            self.sum_strides = (0 if varlen else plan.heads_q * per_head, per_head)

    def _sizes(self, blocks: int) -> tuple:
        plan = self.plan
        return (*self.heads, *plan.totals(), plan.seqlen_q, plan.seqlen_k, blocks,
                *plan.scalars(), plan.call.scale)  # fmt: skip

    def _tiles(self, tile) -> tuple:
        plan = self.plan
        return (plan.dim, plan.dim_v, tile.block_m, tile.block_n, plan.block_d, plan.block_dv)

    def preprocess(self) -> None:
        """delta = rowsum(dO * O) - dLSE, or dlse for it where there is no O; and LSE in base 2."""
        plan, tile = self.plan, configs.Tile(32, 0, 4, 1)
        blocks = ceil_div(plan.seqlen_q, tile.block_m)
        plan.run(
            delta_kernel, blocks * plan.heads_q * plan.batch, tile,
            self.out, self.dout, self.lse, self.dlse, self.delta, self.lse2, self.sums,
            plan.cu_seqlens_q,
            *strides(self.dout if self.out is None else self.out, plan.varlen),
            *strides(self.dout, plan.varlen),
            *plan.lse_strides(), *self.sum_strides, plan.heads_q, plan.totals()[0], plan.seqlen_q,
            blocks,
            plan.dim_v, tile.block_m, plan.block_d, plan.block_dv, self.dlse is not None,
            plan.flags,
        )  # fmt: skip

    def keys(self, dk, dv) -> None:
        """dK and dV; the kernel makes both, so a gradient that is not needed (None) is dropped."""
        self._keys(dkdv_kernel, self.plan.tile("dkdv"), dk, dv, (), ())

    def _keys(self, kernel, tile, dk, dv, sums: tuple, sum_strides: tuple) -> None:
        plan = self.plan
        self.dk = dk = plan.own(torch.empty_like(plan.k)) if dk is None else dk
        self.dv = dv = plan.own(torch.empty_like(plan.v)) if dv is None else dv
        blocks = ceil_div(plan.seqlen_k, tile.block_n)
        plan.run(
            kernel, blocks * plan.heads_k * plan.batch, tile, *self.inputs, dk, dv, *sums,
            *self.shared, *strides(dk, plan.varlen), *strides(dv, plan.varlen), *sum_strides,
            *self._sizes(blocks), *self._tiles(tile),
            plan.flags_by(tile, plan.key_flags(tile)),
        )  # fmt: skip

    def all_at_once(self, tile: configs.Tile, dq, dk, dv) -> None:
        """dK, dV and dQ by one kernel, and one that rounds dQ."""
        plan, self.dq = self.plan, dq
        self._keys(fused_kernel, tile, dk, dv, (self.sums,), self.sum_strides)
        tile = configs.ROUNDING
        blocks = ceil_div(plan.seqlen_q, tile.block_m)
        plan.run(
            dq_from_sums_kernel, blocks * plan.heads_q * plan.batch, tile, *self.inputs, dq,
            self.sums, *self.shared, *strides(dq, plan.varlen), *self.sum_strides,
            *self._sizes(blocks), *self._tiles(tile), plan.flags,
        )  # fmt: skip

    def queries(self, dq, dbias) -> None:
        """dQ, and dbias where it is given, by plain stores or atomics."""
        plan, tile = self.plan, self.plan.tile("dq")
        self.dq = dq = plan.own(torch.empty_like(plan.q)) if dq is None else dq
        flags = plan.backward_flags()
        if dbias is not None:
            flags |= dbias_flags(plan, tuple(dbias.shape))
            flags |= plan.wide(score_strides(dbias, plan.sizes)[2:])
        blocks = ceil_div(plan.seqlen_q, tile.block_m)
        plan.run(
            dq_kernel, blocks * plan.heads_q * plan.batch, tile, *self.inputs, dq, dbias,
            *self.shared, *strides(dq, plan.varlen), *score_strides(dbias, plan.sizes),
            *self._sizes(blocks), *self._tiles(tile), plan.flags_by(tile, flags),
        )  # fmt: skip

    def far_rows(self, dbias) -> None:
        """The share of far rows in the gradients that the other kernels have written."""
        plan, tile, blocks = self.plan, self.far_tile, self.far_blocks
        flags = plan.flags + (0 if dbias is None else dbias_flags(plan, tuple(dbias.shape)))
        plan.run(
            far_queries_kernel, blocks * plan.heads_q * plan.batch, tile,
            *self.inputs[:4], self.lse, self.delta, self.base, self.inverse, self.marks, self.dq,
            dbias, *self.shared,
            *strides(plan.q if self.dq is None else self.dq, plan.varlen),
            *score_strides(dbias, plan.sizes), *self._sizes(blocks), *self._tiles(tile),
            self.dq is not None, flags,
        )  # fmt: skip
        if self.dk is None:
            return
        n_blocks = ceil_div(plan.seqlen_k, tile.block_n)
        plan.run(
            far_keys_kernel, n_blocks * plan.heads_k * plan.batch, tile,
            *self.inputs[:4], self.delta, self.base, self.inverse, self.marks, self.dk, self.dv,
            *self.shared, *strides(self.dk, plan.varlen), *strides(self.dv, plan.varlen),
            *self._sizes(n_blocks), blocks, *self._tiles(tile), plan.flags,
        )  # fmt: skip

    def shared_dbias(self, dbias, far_rows: bool = False) -> None:
        """dbias of a broadcast bias in a fixed order of additions; `far_rows` adds their share."""
        plan, tile = self.plan, self.far_tile if far_rows else self.plan.tile("dbias")
        lse2, delta = (self.base if far_rows else self.lse2), self.delta
        full = (*plan.sizes[:2], ceil_div(plan.seqlen_q, tile.block_m),
                ceil_div(plan.seqlen_k, tile.block_n))  # fmt: skip
        summed = [n == 1 for n in dbias.shape]
        own = [1 if one else n for one, n in zip(summed, full, strict=True)]
        sums = [n if one else 1 for one, n in zip(summed, full, strict=True)]
        plan.run(
            dbias_kernel, math.prod(own), tile,
            *self.inputs[:4], lse2, delta, self.inverse, dbias, *self.shared,
            *score_strides(dbias, plan.sizes), *own[1:], *sums, *self.heads, *plan.totals(),
            plan.seqlen_q, plan.seqlen_k, *plan.scalars(), *self._tiles(tile), summed[2],
            summed[3], far_rows, plan.flags,
        )  # fmt: skip


def backward(call: Call, dout, out, lse, dlse, needs: Needs) -> Grads:
    """The gradients; None where `needs` says so.  Without `out` those of a part of a larger call,
    in float32: lse and dlse are LSE and delta = rowsum(dO * O) - dLSE of whole rows."""
    known = key = None
    if not attention.INTERPRETED and replay.usable(call.q):
        tensors = (*call[:TENSORS], dout, out, lse, dlse)
        key = (needs, *replay.key_of(call, tensors))
        known = replay.find(key)
    owned = replay.replay(known, tensors) if known else None
    if owned is None:
        owned = backward_long(call, dout, out, lse, dlse, needs, None if known else key)
    owned = iter(owned)
    wanted = (needs.q, needs.k, needs.v, needs.bias)  # allocated in this order
    grads = [next(owned) if need else None for need in wanted]
    if needs.bias and out is not None:
        grads[3] = grads[3].to(call.bias.dtype)
    dsink = None
    if needs.sink:
        numbers = tuple(owned)[:4]  # delta, lse2, base, inverse; none without any pair
        dsink = torch.zeros_like(call.sink, dtype=torch.float32)
        if numbers:
            delta, _, base, inverse = numbers
            varlen = call.cu_seqlens_q is not None
            dsink = sink_gradient(call.sink, varlen, lse.detach(), delta, base, inverse)
    return Grads(*grads, dsink)


def backward_long(call: Call, dout, out, lse, dlse, needs, key) -> list[torch.Tensor]:
    """The gradients that are needed, delta if there is any pair, and what else was allocated."""
    plan = Plan(call, partial=out is None)
    dq, dk, dv = (
        empty_gradient(x, plan) if need else None
        for x, need in zip((call.q, call.k, call.v), needs, strict=False)
    )
    dbias = None
    if needs.bias:
        dbias = plan.own(call.q.new_empty(call.bias.shape, dtype=torch.float32), 0.0)
    if call.q.numel() and call.k.numel() and call.v.numel():
        fused = fused_tile(plan, needs)
        kernels = Backward(plan, dout, out, lse, dlse, fused is not None)
        with attention.on_device(plan.q):
            if not plan.sigmoid:
                kernels.preprocess()
            apart = needs.bias and call.deterministic and tuple(dbias.shape) != plan.sizes
            if fused is not None:
                kernels.all_at_once(fused, dq, dk, dv)
            else:
                if dk is not None or dv is not None:
                    kernels.keys(dk, dv)
                if dq is not None or (dbias is not None and not apart):
                    kernels.queries(dq, None if apart else dbias)
            if apart:
                kernels.shared_dbias(dbias)
            if not plan.sigmoid:
                kernels.far_rows(None if apart else dbias)
                if apart:
                    kernels.shared_dbias(dbias, far_rows=True)
        if key:
            rows_taken = (lse, dlse) if plan.sigmoid else (kernels.lse, kernels.dlse)
            taken = (*plan.taken(), kernels.dout, kernels.out, *rows_taken)
            given = (*call[:TENSORS], dout, out, lse, dlse)
            replay.remember(key, given, taken, plan.owned, plan.launched)
    return [x for x, _ in plan.owned]
