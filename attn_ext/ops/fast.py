"""The short way of small eager calls: a dense call that has run before runs again from one lookup.

What a call looks like (its tensors, but for their values, and its scalars) decides its validation,
its backend and the native problem; all that is left are the pointers.  A look is remembered only
after the whole way has accepted it, so nothing is validated twice and nothing unchecked is run.
"""

from __future__ import annotations

import torch

from attn_ext.backends import cpu_cache
from attn_ext.backends.looks import looks
from attn_ext.core.plans import Plans
from attn_ext.core.schema import TENSORS, Call
from attn_ext.ops import execute, route
from attn_ext.ops.autograd import Remembered, remembered_attention

_known: Plans[Remembered] = Plans()
_decodes: Plans[cpu_cache.DecodePlan] = Plans()
_dispatch_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_jit_tracing = torch._C._is_tracing
_forward_ad = torch.autograd.forward_ad


def _is_eager() -> bool:
    """Whether nothing but the kernel needs to see a call."""
    return not (
        torch.compiler.is_compiling()
        or route.observers
        or route.through_dispatcher
        or _jit_tracing()
        or _dispatch_modes()
        or _transforms() is not None
        or _forward_ad._current_level >= 0
        or torch.is_autocast_enabled("cpu")
    )


def key_of(
    q, k, v, mask, bias, causal, window, softcap, scale, deterministic, backend
) -> tuple | None:
    """What the call looks like; None when it cannot take this way."""
    if type(window) is not tuple or not _is_eager():
        return None
    seen = looks(q, k, v, mask, bias)
    if seen is None or q is None or k is None or v is None:
        return None
    recorded = torch.is_grad_enabled()
    try:
        return (
            seen,
            # with the types, so that 1 and True are not taken for each other
            causal, type(causal), softcap, type(softcap), scale, type(scale),
            deterministic, type(deterministic), backend,
            None if window == (None, None) else (window, *map(type, window)),
            recorded and bias is not None and bias.requires_grad,
            recorded and (
                q.requires_grad or k.requires_grad or v.requires_grad
                or (bias is not None and bias.requires_grad)
            ),
        )  # fmt: skip
    except ValueError:  # an array of numpy in the window, which has no truth
        return None


def run(key: tuple | None, q, k, v, mask, bias):
    """The output of a call that looks like `key`; None when none has been remembered."""
    try:
        known = _known.get(key)
    except TypeError:  # a list or a tensor among the arguments
        return None
    if known is None:
        return None
    if key[-1]:
        return remembered_attention(q, k, v, mask, bias, known)
    return known.plan.forward(q, k, v, mask, bias, None)


def forget() -> None:
    """Drop every plan."""
    _known.clear()
    _decodes.clear()


def attempt(*call) -> tuple:
    """(key, output) of the arguments of `key_of`; each is None where there is none."""
    key = key_of(*call)
    return key, None if key is None else run(key, *call[:5])


def _by_identity(key: tuple) -> bool:
    """Whether a tensor was given for a number: it is found by what it is, whatever it holds by
    then."""
    _, *scalars = key  # behind the looks of the tensors
    flat = (x for part in scalars for x in (part if isinstance(part, tuple) else (part,)))
    return any(isinstance(x, type) and issubclass(x, torch.Tensor) for x in flat)


def remember(key: tuple | None, call: Call) -> None:
    """Keep the plan of a call that went the whole way."""
    if key is None or _by_identity(key):
        return
    plan = execute.plan_of(call)
    if plan is None:
        return
    saved = (key[0], looks(plan.out, plan.lse))
    try:
        _known.keep(key, Remembered(plan, call[TENSORS:], saved))
    except TypeError:
        return


def decode_attempt(tensors, causal, window, softcap, scale, num_splits, backend, with_lse) -> tuple:
    """(key, (out, lse)) of a decode call of these tensors, `DecodePlan.forward`'s; each is None
    where there is none.  New rows are appended where there is a result, and only there."""
    if type(window) is not tuple or not _is_eager():
        return None, None
    seen = looks(*tensors)
    if seen is None or _wants_grad(tensors):
        return None, None
    key = (
        seen, causal, type(causal), softcap, type(softcap), scale, type(scale),
        num_splits, type(num_splits), backend, (window, *map(type, window)),
    )  # fmt: skip
    try:
        plan = _decodes.get(key)
    except (TypeError, ValueError):  # a list or a tensor among the arguments
        return None, None
    return key, None if plan is None else plan.forward(*tensors, with_lse)


def _wants_grad(tensors) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in tensors:  # noqa: SIM110  `any` makes a call of each
        if x is not None and x.requires_grad:
            return True
    return False


def remember_decode(key: tuple, call: Call, tensors) -> None:
    """Keep the plan of a decode call that went the whole way with `tensors`, those of
    `decode_attempt`."""
    if _by_identity(key) or not execute.serves_on_cpu(call):
        return
    plan = cpu_cache.decode_plan(execute.prepared(call), tensors)
    if plan is not None:
        _decodes.keep(key, plan)
