"""The short way of small eager calls: a dense call without side inputs that has run before runs
again from one lookup.

What a call looks like (shapes, strides, dtypes, scalars) decides its validation, its backend and
the native problem; all that is left are the pointers.  A look is remembered only after the whole
way has accepted it, so nothing is validated twice and nothing unchecked is run.
"""

from __future__ import annotations

import torch

from attn_ext import backends, ops
from attn_ext.functions import RememberedAttention
from attn_ext.ops import TENSORS

LIMIT = 4096
_plans: dict[tuple, tuple] = {}
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_jit_tracing = torch._C._is_tracing


def key_of(q, k, v, causal, window, softcap, scale, deterministic, backend) -> tuple | None:
    """What the call looks like; None when it cannot take this way."""
    if (
        torch.compiler.is_compiling()
        or not (type(q) is type(k) is type(v) is torch.Tensor)
        or type(window) is not tuple
        or not (q.is_cpu and k.is_cpu and v.is_cpu)
        or ops.observers
        or ops.through_dispatcher
        or _jit_tracing()
        or _dispatch_modes()
        or _transforms() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
        or q.is_neg() or k.is_neg() or v.is_neg()
    ):  # fmt: skip
        return None
    try:
        return (
            q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(),
            q.dtype, k.dtype, v.dtype,
            causal, type(causal), window, *map(type, window), softcap, type(softcap),
            scale, type(scale), deterministic, type(deterministic), backend,
            torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
        )  # fmt: skip
    except RuntimeError:  # of a nested tensor, which has no shape
        return None


def run(key: tuple | None, q, k, v):
    """The output of a call that looks like `key`; None when none has been remembered."""
    try:
        plan = _plans.get(key)
    except TypeError:  # a list or a tensor among the arguments
        return None
    if plan is None:
        return None
    if key[-1]:
        return RememberedAttention.apply(q, k, v, *plan)
    return backends.get("cpu").run_plain(plan[0], q, k, v)


def remember(key: tuple | None, args: tuple) -> None:
    """Keep the plan of a call that went the whole way with the flat op arguments `args`."""
    if key is None or any(isinstance(x, type) and issubclass(x, torch.Tensor) for x in key):
        return  # a tensor given for a number is found by identity, whatever it holds by then
    plan = ops.plain_plan(args)
    if plan is None:
        return
    if len(_plans) >= LIMIT:
        _plans.clear()
    try:
        _plans[key] = (plan, args[TENSORS:])
    except TypeError:
        return
