"""A call of context attention without its tensors, under a name that a compiled graph can hold."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch

from attn_ext.distributed import comm
from attn_ext.distributed.layout import Layout
from attn_ext.distributed.local import Scalars, Sides
from attn_ext.distributed.names import Names
from attn_ext.distributed.pieces import Rules


@dataclass(frozen=True)
class Plan:
    """What a rank does with its queries, keys and values."""

    layout: Layout
    group: str  # the process group's name; "" where all keys are here
    method: str  # "ring" or "allgather"
    scalars: Scalars
    grad_comm_dtype: torch.dtype
    told: tuple[str, ...] = ()  # the names of all groups of the call, beside `group`

    def groups(self) -> list:
        """All groups whose ranks wait for this one."""
        return [comm.by_name(name) for name in {self.group, *self.told} if name]

    def rules(self, sides: Sides) -> Rules:
        """What decides about pieces."""
        s = self.scalars
        scores = sides.mask is not None or sides.bias is not None
        return Rules(s.left, s.right, sides.alibi_slopes is not None, s.dropout_p > 0, scores)

    def travelling(self, wide: torch.dtype) -> torch.dtype:
        """The dtype in which gradients of keys travel."""
        return wide if self.grad_comm_dtype == torch.float32 else self.grad_comm_dtype

    def signature(self) -> str:
        """The same on all ranks that agree."""
        shared = (
            self.method, self.scalars._replace(first_b=0, first_h=0), self.grad_comm_dtype,
            self.layout.fingerprint,
        )  # fmt: skip
        return hashlib.sha256(repr(shared).encode()).hexdigest()


_plans: Names[Plan] = Names()
by_name = _plans.get


def name_of(plan: Plan, keep: bool = False) -> str:
    """The plan's name in this process, under which `by_name` finds it; keep: for ever."""
    text = f"{plan.signature()} {plan.group} {plan.scalars} {plan.told}"
    return _plans.put(hashlib.sha256(text.encode()).hexdigest()[:32], plan, keep)
