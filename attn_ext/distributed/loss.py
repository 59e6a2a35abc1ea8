"""The mean loss of all tokens, of which each rank has some."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from attn_ext.distributed import comm

if TYPE_CHECKING:
    import torch.distributed as dist


def mean_loss(
    loss_sum: torch.Tensor, tokens: int | torch.Tensor, group: dist.ProcessGroup | None,
    averaged: bool = True,
) -> torch.Tensor:  # fmt: skip
    """sum of `loss_sum` over the ranks of a group / sum of `tokens`, on every rank.

    A mean of each rank's mean is another number wherever ranks have unlike numbers of tokens.
    averaged: whether the gradients of parameters are averaged over the group afterwards, as DDP
    and FSDP do; else they must be added up.
    """
    if loss_sum.dim() != 0:
        raise ValueError(f"loss_sum must be a scalar, got shape {tuple(loss_sum.shape)}")
    group = comm.one_group(group, "group")
    count = torch.as_tensor(tokens, dtype=torch.float64, device=loss_sum.device)
    sums = torch.stack([loss_sum.detach().double(), count])
    sums = torch.ops.attn_ext.group_sum(sums, group.group_name)
    total = sums[1].clamp_min(1)
    factor = comm.size_of(group) if averaged else 1
    share = loss_sum * (factor / total).to(loss_sum.dtype)  # whose gradient the result has
    return (sums[0] / total).to(loss_sum.dtype) + (share - share.detach())
