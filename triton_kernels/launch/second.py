"""From a `Call`, its tangents and its rows to the launches of the kernels of second derivatives
(tangent.py, backward_tangent.py).  The gradients themselves come from those of the backward.
"""

from __future__ import annotations

import torch

from attn_ext.core.layout import empty_like_layout, rows, score_strides, strides
from attn_ext.core.schema import Call, Grads, Needs, Rows, Tangents
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import primitives
from attn_ext.triton_kernels.kernels import tangent as kernels
from attn_ext.triton_kernels.kernels.backward_tangent import (
    delta_tangent_kernel,
    dkdv_tangent_kernel,
    dq_tangent_kernel,
)
from attn_ext.triton_kernels.launch import attention
from attn_ext.triton_kernels.launch import backward as backward_launch
from attn_ext.triton_kernels.launch.gradients import dbias_flags

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

# (pass, width of the head) -> tile of plain and rich calls alike: for 16-bit elements, and for
# float32.  One table for all GPUs: what decides is registers, of which all have as many.  Narrower
# heads take the rows of 64.  Wider ones, and float32 at 128, spill hundreds of registers in their
# loops even in the smallest tiles, and are left to torch operations.
_TILES = {
    2: {
        ("tangent", 64): configs.Tile(32, 32, 8, 1),  # 64 queries spill with fp16 and all features
        ("tangent", 128): configs.Tile(32, 32, 8, 1),
        ("dkdv", 64): configs.Tile(16, 32, 8, 1),
        ("dkdv", 128): configs.Tile(16, 32, 8, 1),
        ("dq", 64): configs.Tile(16, 32, 8, 1),  # 32 queries spill with all features
        ("dq", 128): configs.Tile(16, 16, 8, 1),  # 32 keys spill on sm_90
    },
    4: {
        ("tangent", 64): configs.Tile(16, 16, 8, 1),
        ("dkdv", 64): configs.Tile(16, 16, 8, 1),
        ("dq", 64): configs.Tile(16, 16, 8, 1),
    },
}


def widest(element_size: int) -> int:
    """The widest head that the kernels serve."""
    return max(width for _, width in _TILES[element_size])


def tile(plan: attention.Plan, name: str) -> configs.Tile:
    """The tile of a pass."""
    if attention.architecture(plan.q) == "interpreter":
        return configs.INTERPRETED
    return _TILES[plan.q.element_size()][name, max(64, plan.block_d, plan.block_dv)]


class Second:
    """What the kernels of one call share: its plan, and the tangents as they take them."""

    def __init__(self, call: Call, tangents: Tangents, given: Rows):
        self.plan = plan = attention.Plan(call._replace(need_stats=False))
        like = plan.q.dtype
        self.dout, self.tdout, self.out, self.tout = (
            None if x is None else rows(x.detach().to(like))
            for x in (given.dout, given.tdout, given.out, given.tout)
        )
        self.lse, self.tlse, self.dlse, self.tdlse = map(
            _statistics, (given.lse, given.tlse, given.dlse, given.tdlse)
        )
        self.tq, self.tk, self.tv = (
            None if x is None else rows(x.detach()) for x in (tangents.q, tangents.k, tangents.v)
        )
        self.tbias = None if tangents.bias is None else tangents.bias.detach().resolve_neg()
        if self.tbias is not None and self.tbias.dtype not in _FLOATS:
            self.tbias = self.tbias.float()
        self.tsink = _statistics(tangents.sink)
        self.moves = self._moves()
        self.flags = plan.flags | (primitives.WIDE.value if self._is_wide() else 0)

    def _moves(self) -> int:
        present = (
            (kernels.MOVED_Q, self.tq), (kernels.MOVED_K, self.tk), (kernels.MOVED_V, self.tv),
            (kernels.MOVED_DOUT, self.tdout), (kernels.MOVED_BIAS, self.tbias),
            (kernels.MOVED_SINK, self.tsink),
        )  # fmt: skip
        return sum(flag.value for flag, x in present if x is not None)

    def _is_wide(self) -> bool:
        """Whether a row stride of what a plan does not know needs offsets of 64 bits."""
        like_q = (self.tq, self.tk, self.tv, self.dout, self.tdout, self.out, self.tout)
        found = [strides(x, self.plan.varlen)[2] for x in like_q if x is not None]
        found += score_strides(self.tbias, self.plan.sizes)[2:]
        return max(found) * 256 >= 1 << 31

    def heads(self, x: torch.Tensor | None) -> kernels.Heads:
        """A tensor like q, k, v or O as a kernel's argument."""
        if x is None:
            return kernels.Heads(None, 0, 0, 0)
        return kernels.Heads(x, *strides(x, self.plan.varlen))

    def scores(self, x: torch.Tensor | None) -> kernels.Scores:
        """A tensor like the bias as a kernel's argument."""
        return kernels.Scores(x, *score_strides(x, self.plan.sizes))

    def sizes(self, blocks: int) -> tuple:
        """heads_q ... softmax_scale, in the order of the kernels' arguments."""
        plan = self.plan
        return (
            *plan.lse_strides(), plan.heads_q, plan.heads_q // plan.heads_k, *plan.totals(),
            plan.seqlen_q, plan.seqlen_k, blocks, *plan.scalars(), plan.call.scale,
        )  # fmt: skip

    def constants(self, chosen: configs.Tile) -> tuple:
        """The compile-time arguments but for the flags."""
        plan = self.plan
        return (plan.dim, plan.dim_v, chosen.block_m, chosen.block_n, plan.block_d, plan.block_dv)

    def tangent(self, tout: torch.Tensor, tlse: torch.Tensor) -> None:
        """O' and L'."""
        plan, chosen = self.plan, tile(self.plan, "tangent")
        blocks = attention.ceil_div(plan.seqlen_q, chosen.block_m)
        like_q = map(self.heads, (plan.q, plan.k, plan.v, self.out, self.tq, self.tk, self.tv))
        attention.run(
            kernels.tangent_kernel, blocks * plan.heads_q * plan.batch, chosen,
            *like_q, self.heads(tout), self.scores(self.tbias), self.lse, tlse,
            plan.terms, plan.sink, self.tsink, plan.rng_state, plan.cu_seqlens_q,
            plan.cu_seqlens_k, *self.sizes(blocks), *self.constants(chosen), self.flags,
            self.moves,
        )  # fmt: skip

    def row_numbers(self) -> tuple:
        """(LSE in base 2, L', D, D') of each row, in the layout of LSE."""
        plan, chosen = self.plan, configs.Tile(32, 0, 4, 1)
        lse2, delta, tdelta = (torch.zeros_like(self.lse) for _ in range(3))
        blocks = attention.ceil_div(plan.seqlen_q, chosen.block_m)
        attention.run(
            delta_tangent_kernel, blocks * plan.heads_q * plan.batch, chosen,
            *map(self.heads, (self.out, self.dout, self.tout, self.tdout)), self.lse, self.dlse,
            self.tdlse, delta, tdelta, lse2, plan.cu_seqlens_q, *plan.lse_strides(), plan.heads_q,
            plan.totals()[0], plan.seqlen_q, blocks, plan.dim_v, chosen.block_m, plan.block_dv,
            self.dlse is not None, self.tdlse is not None, self.flags, self.moves,
        )  # fmt: skip
        return lse2, self.tlse, delta, tdelta

    def _gradient(self, kernel, name: str, programs: int, blocks: int, numbers, found, flags):
        """One launch of a kernel of T2; found: what it writes."""
        plan, chosen = self.plan, tile(self.plan, name)
        of_call = (plan.q, plan.k, plan.v, self.dout, self.tq, self.tk, self.tv, self.tdout)
        attention.run(
            kernel, programs, chosen, *map(self.heads, of_call), self.scores(self.tbias), *numbers,
            *found, plan.terms, plan.rng_state, plan.cu_seqlens_q, plan.cu_seqlens_k,
            *self.sizes(blocks), *self.constants(chosen), flags, self.moves,
        )  # fmt: skip

    def keys(self, numbers: tuple, tdk: torch.Tensor, tdv: torch.Tensor) -> None:
        """dK' and dV'."""
        plan = self.plan
        blocks = attention.ceil_div(plan.seqlen_k, tile(plan, "dkdv").block_n)
        programs = blocks * plan.heads_k * plan.batch
        found = self.heads(tdk), self.heads(tdv)
        self._gradient(dkdv_tangent_kernel, "dkdv", programs, blocks, numbers, found, self.flags)

    def queries(self, numbers: tuple, tdq: torch.Tensor, tdbias: torch.Tensor | None) -> None:
        """dQ', and dbias' where it is given."""
        plan = self.plan
        blocks = attention.ceil_div(plan.seqlen_q, tile(plan, "dq").block_m)
        programs = blocks * plan.heads_q * plan.batch
        found = self.heads(tdq), self.scores(tdbias)
        flags = self.flags | (0 if tdbias is None else dbias_flags(plan, tuple(tdbias.shape)))
        self._gradient(dq_tangent_kernel, "dq", programs, blocks, numbers, found, flags)


def _statistics(x: torch.Tensor | None) -> torch.Tensor | None:
    """A tensor like LSE or sink as the kernels take it."""
    return None if x is None else x.detach().to(torch.float32).resolve_neg().contiguous()


def tangent(call: Call, tangents: Tangents, given: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """(O', L') of a call that has queries and keys."""
    second = Second(call, tangents, given)
    tout = empty_like_layout(call.q, call.v.shape[-1])
    tlse = torch.empty_like(second.lse)
    if second.plan.varlen:  # rows that belong to no sequence
        tout.zero_()
        tlse.zero_()
    with attention.on_device(second.plan.q):
        second.tangent(tout, tlse)
    return tout, tlse


def backward_tangent(
    call: Call, tangents: Tangents, given: Rows, needs: Needs, primal: Needs
) -> tuple[Grads, Grads]:
    """The tangents of the gradients that `needs` asks for, and the gradients that `primal` asks
    for."""
    second, of_call = Grads(), Grads()
    if any(needs):
        second = _tangents_of_gradients(Second(call, tangents, given), needs)
    if any(primal):
        of_call = backward_launch.backward(
            call, given.dout, given.out, given.lse, given.dlse, primal
        )
    return second, of_call


def _tangents_of_gradients(second: Second, needs: Needs) -> Grads:
    call, plan = second.plan.call, second.plan
    tdq, tdk, tdv = (empty_like_layout(x, x.shape[-1]) for x in (call.q, call.k, call.v))
    if plan.varlen:
        for x in (tdq, tdk, tdv):
            x.zero_()
    tdbias = None
    if needs.bias:
        tdbias = torch.zeros(call.bias.shape, dtype=torch.float32, device=call.q.device)
    with attention.on_device(plan.q):
        numbers = second.row_numbers()
        if needs.k or needs.v:
            second.keys(numbers, tdk, tdv)
        if needs.q or needs.bias:
            second.queries(numbers, tdq, tdbias)
    found = Grads(
        q=tdq, k=tdk, v=tdv, bias=None if tdbias is None else tdbias.to(call.bias.dtype),
        sink=_sink_gradient(second, numbers) if needs.sink else None,
    )  # fmt: skip
    return Grads(*[x if need else None for x, need in zip(found, needs, strict=True)])


def _sink_gradient(second: Second, numbers: tuple) -> torch.Tensor:
    """dSink' [Hq] = -sum over the rows that see a key of P_sink [(sink' - L') D + D']"""
    _, tlse, delta, tdelta = numbers
    head = 0 if second.plan.varlen else 1
    shape = [-1 if d == head else 1 for d in range(tlse.dim())]
    empty = second.lse == -torch.inf
    weight = torch.exp(second.plan.sink.view(shape) - second.lse.masked_fill(empty, 0.0))
    moved = -tlse if second.tsink is None else second.tsink.view(shape) - tlse
    terms = (weight * (moved * delta + tdelta)).masked_fill_(empty, 0.0)
    return -terms.sum([d for d in range(tlse.dim()) if d != head])
