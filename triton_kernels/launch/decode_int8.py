"""From a decode `Call` of float32 queries against pages of int8 to the launches of decode_int8.py's
kernel and decode.py's `combine_kernel`."""

from __future__ import annotations

import torch

from attn_ext.core.layout import strides
from attn_ext.core.schema import Call
from attn_ext.triton_kernels import configs
from attn_ext.triton_kernels.kernels import primitives
from attn_ext.triton_kernels.kernels.decode import combine_kernel
from attn_ext.triton_kernels.kernels.decode_int8 import decode_int8_kernel
from attn_ext.triton_kernels.launch import attention

# How many bfloat16 numbers hold a query of each dtype, and a weight times V's factor: 8 bits each
PARTS = {torch.bfloat16: (1, 2), torch.float16: (2, 2), torch.float32: (3, 3)}


def tile(plan: attention.Plan) -> configs.Tile:
    """That of decode's 16-bit rows, as which the products take them."""
    wide = max(plan.block_d, plan.block_dv)
    rich = bool(plan.mask is not None or plan.bias is not None)
    return configs.tile(attention.architecture(plan.q), "decode", wide, 2, rich)


def forward(call: Call, k_factors, v_factors, dtype: torch.dtype) -> tuple:
    """(O, LSE), float32, of a paged call whose k and v are int8 and stand for their numbers times
    the factors [pages, Hk, page_size, 1]; dtype: that of the queries before they were float32."""
    plan = attention.Plan(call)
    out, lse, _, _ = attention.outputs(plan)
    if lse.numel() == 0:
        return out, lse
    chosen = tile(plan)
    group = plan.heads_q // plan.heads_k
    rows = group * plan.seqlen_q
    block_m = min(chosen.block_m, max(16, attention.power_of_2(rows)))
    m_blocks = attention.ceil_div(rows, block_m)
    programs = m_blocks * plan.heads_k * plan.batch
    tiles = attention.ceil_div(plan.seqlen_k, chosen.block_n)
    splits = min(call.num_splits, tiles, 128) or attention.split_count(
        programs, tiles, attention.multiprocessors(plan.q)
    )
    part = sums = None
    flags = plan.flags & ~primitives.STREAM.value  # rows of int8 are never too wide to be held
    if splits > 1:
        count, device = splits * lse.numel(), out.device
        part = torch.empty(count, plan.dim_v, dtype=torch.float32, device=device)
        sums = torch.empty(4, count, dtype=torch.float32, device=device)
    table = plan.block_table
    with attention.on_device(plan.q):
        attention.run(
            decode_int8_kernel, programs * splits, chosen,
            plan.q, plan.k, plan.v, k_factors, v_factors, out, lse, part, sums,
            plan.terms, plan.sink, plan.seqlens_k, table,
            *(n for x in (plan.q, plan.k, plan.v, k_factors, v_factors, out)
              for n in strides(x, False)),
            *plan.lse_strides(), table.stride(0), plan.k.shape[2], plan.k.shape[0],
            plan.heads_q, group, plan.seqlen_q, plan.seqlen_k, m_blocks, splits,
            plan.scale, plan.left, plan.right,
            plan.dim, plan.dim_v, block_m, chosen.block_n, plan.block_d, plan.block_dv,
            *PARTS[dtype], flags + (primitives.SPLIT.value if splits > 1 else 0),
        )  # fmt: skip
        if splits > 1:
            block = configs.Tile(16, 0, 4, 1)
            attention.run(
                combine_kernel, attention.ceil_div(lse.numel(), block.block_m), block,
                part, sums, out, lse, None, None, plan.sink,
                *strides(out, False), plan.heads_q, plan.seqlen_q, lse.numel(), splits,
                plan.inverse_keep, plan.dim_v, block.block_m, plan.block_dv, plan.flags,
            )  # fmt: skip
    return out, lse
