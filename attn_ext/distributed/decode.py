"""context_decode: few queries against a cache whose positions lie on several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from attn_ext.core import validate
from attn_ext.core.schema import Call
from attn_ext.distributed import agree, comm, local, operators
from attn_ext.functional import common
from attn_ext.ops import parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.distributed as dist


def _lengths(whole_lengths, k_first, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(int64 [B] position of the first key here, int32 [B] keys here)."""
    whole = whole_lengths.long()
    first = torch.as_tensor(k_first, dtype=torch.int64, device=whole.device).expand_as(whole)
    return first, (whole - first).clamp(0, capacity).to(torch.int32)


def context_decode(
    q: torch.Tensor, k_shard: torch.Tensor, v_shard: torch.Tensor, *,
    k_first: int | torch.Tensor, whole_lengths: int | torch.Tensor,
    group: dist.ProcessGroup | None, causal: bool = True,
    window: Sequence[int | None] | None = (None, None), softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None, sink: torch.Tensor | None = None,
    scale: float | None = None, return_lse: bool = False, backend: str = "auto",
) -> Any:  # fmt: skip
    """`attention_decode` with a cache that is cut over the ranks of a group: each attends to its
    own keys, and the parts are merged on all of them.  Inference only.

    q [B, Hq, Sq, D]: the newest Sq tokens, the same on every rank.   k_shard [B, Hk, capacity, D],
    v_shard alike: this rank's keys, which begin at position k_first (an int, or int [B]) of the
    whole.  whole_lengths: int32 [B], positions of the whole that are used, the new ones included.
    Returns out [B, Hq, Sq, Dv], with return_lse also lse, the same bits on every rank.
    """
    group = comm.one_group(group, "group")
    operators.refuse_forward_mode(q, k_shard, v_shard, alibi_slopes, sink)
    for name, x in (("q", q), ("k_shard", k_shard), ("v_shard", v_shard)):
        validate.tensor(name, x)
    dtype = common.autocast_of_cache(q, k_shard, v_shard) or q.dtype
    q, _ = common.asked_of_cache(q, None, k_shard, v_shard)
    validate.tensor("whole_lengths", whole_lengths)
    validate.decode_shapes(q, k_shard, v_shard, whole_lengths, None)
    _, left, right = validate.options(
        "bottom_right" if causal else False, *validate.window_pair(window), softcap, 0.0, scale,
        False, backend,
    )  # fmt: skip
    batch, heads, new, _ = q.shape
    _, _, slopes, sink = common.sides(
        q, None, None, alibi_slopes, sink, batch, heads, new, k_shard.shape[2]
    )
    agree.alike(
        group, "context_decode",
        {"batch": batch, "q's heads": heads, "Sq": new, "v's head_dim": v_shard.shape[3]}, q.dtype,
    )  # fmt: skip
    first, used = _lengths(whole_lengths, k_first, k_shard.shape[2])
    whole, zero = whole_lengths.long(), torch.zeros_like(first)
    number = torch.arange(batch, device=q.device)
    frame = torch.stack([number, zero, whole - new, first, whole, whole], 1).to(torch.int32)
    call = Call(
        q=q, k=k_shard, v=v_shard, alibi_slopes=slopes, seqlens_k=used, frame=frame,
        max_seqlen_q=new, max_seqlen_k=k_shard.shape[2], scale=scale, softcap=softcap,
        window_left=left, window_right=right, backend=backend,
    )  # fmt: skip
    with torch.no_grad(), comm.announced([group]):
        out, sums = _merged(*parts.forward_partial(call), group)
        if sink is not None:
            local.add_sink(out, sums, sink)
    out = out.to(dtype)
    return (out, sums.sum(-1)) if return_lse else out


def _merged(part, part_sums, group) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of all ranks, merged in their order."""
    rows = torch.cat([part, part_sums], -1).contiguous()
    lines = comm.gather_rows(
        rows.view(1, -1), [1] * comm.size_of(group), group, "the parts of a decode"
    )
    out, sums = torch.zeros_like(part), torch.zeros_like(part_sums)
    sums[..., 0] = -torch.inf
    for line in lines:
        found = line.view(rows.shape)
        parts.merge(out, sums, found[..., :-2], found[..., -2:])
    return out, sums
