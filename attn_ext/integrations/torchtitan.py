"""Context parallelism of torchtitan by attn_ext: where a model's parallelize function calls
torchtitan's `apply_cp_to_forward`, call this one.

torchtitan cuts tokens, labels and positions itself ("headtail" is our zigzag).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

BALANCERS = ("headtail", None)  # of `parallelism.context_parallel_load_balancer`


def apply_cp_to_forward(
    attention_modules: Iterable[torch.nn.Module], cp_mesh, load_balancer: str | None = "headtail",
    method: str = "auto",
) -> None:  # fmt: skip
    """Each module's forward(q, k, v [B, S_local, H, D]) becomes `context_attention` on cp_mesh.

    load_balancer: how torchtitan has cut the sequence; "ptrr", which cuts by a mask, is refused.
    ValueError in the forward for a mask or any other option that would be lost.
    """
    if load_balancer not in BALANCERS:
        raise ValueError(f"load_balancer must be 'headtail' or None, got {load_balancer!r}")
    for module in attention_modules:
        module.forward = functools.partial(_forward, cp_mesh, load_balancer, method)


@functools.lru_cache(maxsize=64)
def _layout(seqlen: int, parts: int, load_balancer: str | None):
    from attn_ext.distributed import Layout

    return (Layout.contiguous if load_balancer is None else Layout.zigzag)(seqlen, parts)


def _forward(
    mesh, load_balancer, method, q, k, v, *, scale=None, enable_gqa=False, is_causal=True, **options
):  # fmt: skip
    """[B, S_local, Hq, D] -> the same, as that of torchtitan; grouped heads need no word."""
    from attn_ext.distributed import context_attention

    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} must be None with attn_ext's context parallelism of torchtitan, "
                f"got {type(value).__name__}: call context_attention with a packed layout"
            )
    layout = _layout(q.shape[1] * mesh.size(), mesh.size(), load_balancer)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = context_attention(
        q, k, v, layout=layout, mesh=mesh, method=method, causal=is_causal, scale=scale
    )
    return out.transpose(1, 2)
