"""The way of a call: straight to the backend in plain eager mode, an autograd.Function when a
gradient or a transform of torch.func asks for one, else the dispatcher.  `run` takes the cheapest
that is right.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import torch
from torch._functorch.utils import unwrap_dead_wrappers

from attn_ext.core.schema import TENSORS, Call, Rows, Tangents, is_decode, of_gradients
from attn_ext.ops import derivatives, execute, rules  # noqa: F401  derivatives of the operators
from attn_ext.ops.autograd import EagerAttention

# functions of a Call that see each eager call (inspect.record); what they return, if not None, is
# a function that is given the call's results and returns those that the caller gets
observers: list = []
# gives the results of a call of DTensors, or None where the operators' own sharding serves it;
# attn_ext sets it, since it needs torch.distributed
of_dtensors: Callable[[Call], tuple | None] = lambda call: None  # noqa: E731
through_dispatcher = False  # every call, for torch's profiler to see it (attn_ext.profile)

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_jit_tracing = torch._C._is_tracing


def is_plain(q, k, v) -> bool:
    """Whether nothing (compiler, torch.jit.trace, dispatch mode, transform, subclass, meta) needs
    to see this call.
    """
    return (
        type(q) in _PLAIN
        and type(k) in _PLAIN
        and type(v) in _PLAIN
        and not _jit_tracing()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and not q.is_meta
    )


def _sides_are_plain(call: Call) -> bool:
    """Whether mask, bias, slopes, sink, ... are plain too: a subclass may have no memory."""
    return all(x is None or type(x) in _PLAIN for x in call[3:TENSORS])


def wants_grad(*tensors) -> bool:
    """Whether autograd will ask for a gradient of one of these tensors (or None)."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _differentiable(call: Call) -> Call:
    """The call as one that may be differentiated, whatever its tensors say now; a decode call never
    is.
    """
    grad = not is_decode(call) or call.w is not None
    return call._replace(grad=grad, bias_grad=grad and call.bias is not None)


def _is_one_jvp() -> bool:
    """Whether torch.func.jvp is all that is at work, once."""
    level = torch._C._functorch.peek_interpreter_stack()
    return (
        level.level() == 1
        and level.key() == torch._C._functorch.TransformType.Jvp
        and torch._C._is_fwd_grad_enabled()
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _value(x: torch.Tensor | None) -> torch.Tensor | None:
    """What a transform has wrapped."""
    wrapped = x is not None and torch._C._functorch.is_functorch_wrapped_tensor(x)
    return torch._C._functorch.get_unwrapped(x) if wrapped else x


def _jvp_at_once(call: Call) -> tuple | None:
    """`run` within one torch.func.jvp of plain tensors of which nobody wants gradients: both passes
    without the dispatcher, which would come by each of the transform's levels with all fields of
    the call.  None where it is another case, with nothing done."""
    unpacked = [x if x is None else rules.unpack_dual(x, level=0) for x in call[:TENSORS]]
    values = [x if x is None else _value(x[0]) for x in unpacked]
    moved = [x if x is None else _value(x[1]) for x in unpacked]
    rules.refuse_alibi(moved)
    tangents = of_gradients(moved)
    present = [x for x in (*values, *tangents) if x is not None]
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in present)
    if recorded or call.need_stats or not any(x is not None for x in tangents):
        return None
    with torch._C._DisableFuncTorch():
        if not rules.are_plain_tensors(present):
            return None
        plain = _differentiable(Call(*values, *call[TENSORS:]))
        rules.refuse_once_only(plain, rules.FORWARD_MODE)
        out, lse, _, _ = execute.forward(plain)
        found = execute.tangent(plain, Tangents(*tangents), Rows(out=out, lse=lse))
    wrapped = [torch._C._functorch._wrap_for_grad(x, 1) for x in (out, lse)]
    pairs = zip(wrapped, found, strict=True)
    return *(torch.autograd.forward_ad.make_dual(x, t, level=0) for x, t in pairs), None, None


def observed(call: Call, way) -> tuple:
    """way(call) with the observers: they see the call, as it runs, before it runs."""
    if not observers:
        return way(call)
    call = execute.prepared(call)
    edits = [observe(call) for observe in observers]
    found = way(call)
    for edit in edits:
        found = found if edit is None else edit(found)
    return found


def _tell_torch_of_shards() -> None:
    """How the operators may be sharded."""
    from attn_ext.ops import dtensor

    dtensor.register()


# What torch.compiler.assume_constant_result sets, which would import the compiler: four seconds.
_tell_torch_of_shards._dynamo_marked_constant = True


def _of_dtensors(call: Call) -> tuple | None:
    """The results of a call that may be of DTensors, where the operators cannot be sharded."""
    _tell_torch_of_shards()
    return of_dtensors(call) if hasattr(call.q, "placements") else None


def run(call: Call, unseen: bool = True) -> tuple:
    """(out, lse, max_logit, entropy); statistics are None or empty where not asked for.  unseen:
    the observers are still to see the call.
    """
    if torch.compiler.is_compiling():
        found = _of_dtensors(call) if hasattr(call.q, "placements") else None
        return torch.ops.attn_ext.forward(*call) if found is None else found
    if _jit_tracing():
        return torch.ops.attn_ext.forward(*_differentiable(call))
    if observers and unseen:
        return observed(call, functools.partial(run, unseen=False))
    if torch._C._functorch.peek_interpreter_stack() is not None:
        if _is_one_jvp():
            found = _jvp_at_once(call)
            if found is not None:
                return found
        return torch.ops.attn_ext.forward(*_differentiable(call))
    call = Call(*unwrap_dead_wrappers(call[:TENSORS]), *call[TENSORS:])  # leaked by a transform
    if (
        through_dispatcher
        or torch.autograd.forward_ad._current_level >= 0  # only its derivatives have a forward mode
        or not (is_plain(*call[:3]) and _sides_are_plain(call))
    ):
        if "torch.distributed.tensor" in sys.modules:  # a DTensor may be among them
            found = _of_dtensors(call)
            if found is not None:
                return found
        return torch.ops.attn_ext.forward(*call)
    if call.grad:
        return EagerAttention.apply(*call[:TENSORS], call[TENSORS:])
    return execute.forward(call)
