"""What the cpu and the cuda backend share: how a tensor is told to a native kernel."""

from __future__ import annotations

import torch

from attn_ext.core.layout import rows, score_strides, strides
from attn_ext.core.problem import Problem
from attn_ext.core.schema import KERNEL_SCALARS, Call


def alibi_stride_b(slopes: torch.Tensor | None) -> int:
    """The batch stride of slopes [Hq] or [B, Hq]; 0 where all sequences share them."""
    per_batch = slopes is not None and slopes.dim() == 2 and slopes.shape[0] > 1
    return slopes.stride(0) if per_batch else 0


def addresses(tensors: dict[str, torch.Tensor | None]) -> dict[str, int]:
    """The addresses of the tensors that are there."""
    return {name: x.data_ptr() for name, x in tensors.items() if x is not None}


def point(native, **tensors: torch.Tensor | None) -> None:
    """Tell a native call the addresses of tensors by the names of csrc/params.h."""
    native.set_addresses(addresses(tensors))


def fields(call: Call, t: dict, out: torch.Tensor, lse: torch.Tensor, dtypes: dict) -> dict:
    """The native call's sizes, strides and scalars, of the canonical tensors `t`; dtypes: the
    numbers of csrc/params.h."""
    problem = Problem.of(call)
    varlen = problem.kind == "varlen"
    sizes = (problem.batch, problem.heads_q, problem.seqlen_q, problem.seqlen_k)
    paged = t["block_table"] is not None
    return dict(
        dtype=dtypes[call.q.dtype],
        bias_dtype=0 if t["bias"] is None else dtypes[t["bias"].dtype],
        sizes=(
            problem.batch,
            problem.heads_q,
            problem.heads_k,
            problem.seqlen_q,
            problem.seqlen_k,
            problem.head_dim,
            problem.head_dim_v,
        ),
        q=strides(t["q"], varlen),
        k=strides(t["k"], varlen),
        v=strides(t["v"], varlen),
        o=strides(out, varlen),
        mask=score_strides(t["mask"], sizes),
        bias=score_strides(t["bias"], sizes),
        lse=(0, lse.stride(0)) if varlen else (lse.stride(0), lse.stride(1)),
        pages=(t["block_table"].stride(0), t["k"].shape[2]) if paged else (0, 0),
        bottom_right=call.align,
        alibi_stride_b=alibi_stride_b(t["alibi_slopes"]),
        scalars={name: getattr(call, name) for name in KERNEL_SCALARS},
    )


# Side inputs of one dtype, which the kernels read contiguously; "statistics" is float32 on a GPU,
# and float64 for float64 inputs on a CPU.
SIDE_DTYPES = {
    "alibi_slopes": torch.float32,
    "sink": "statistics",
    "w": "statistics",
    "rng_state": torch.int64,
    "cu_seqlens_q": torch.int32,
    "cu_seqlens_k": torch.int32,
    "seqlens_k": torch.int32,
    "block_table": torch.int32,
    "frame": torch.int32,
}


def canonical(call: Call, statistics: torch.dtype, dtypes: dict) -> dict[str, torch.Tensor | None]:
    """The tensors as the kernels take them, by name: last dimension contiguous, side inputs
    contiguous in their fixed dtypes, all on q's device.  dtypes: those that a bias may have."""
    tensors = {"q": rows(call.q), "k": rows(call.k), "v": rows(call.v), "mask": call.mask}
    bias = None if call.bias is None else call.bias.resolve_neg()
    tensors["bias"] = bias if bias is None or bias.dtype in dtypes else bias.to(statistics)
    for name, dtype in SIDE_DTYPES.items():
        x = getattr(call, name)
        if x is not None:
            x = x.detach().to(statistics if dtype == "statistics" else dtype)
            x = x.resolve_neg().contiguous()
        tensors[name] = x
    for name, x in tensors.items():
        if x is not None and x.device != call.q.device:
            raise ValueError(f"{name} must be on q's device {call.q.device}, got {x.device}")
    return tensors
