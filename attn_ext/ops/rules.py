"""How an operator of this package tells torch its derivative.

torch.library.register_autograd serves plain autograd only: within torch.func.grad, vjp or jacrev
the torch.autograd.Function that it makes raises, and torch.compile traces those transforms by
running the operator within them; and it has no forward mode.  The derivatives registered here hold
in all of these.
"""

from __future__ import annotations

import contextlib

import torch
from torch._functorch.utils import enable_single_level_autograd_function

from attn_ext.core.schema import Call, is_decode

MATH = (
    "use torch's attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which can be "
    "differentiated any number of times"
)
THIRD = (
    "attn_ext has no third derivative of attention (nor a tangent of a tangent; "
    "torch.autograd.functional.hvp asks for one, its vhp and torch.func.jvp of grad do not): "
    f"{MATH}"
)
FORWARD_MODE, DOUBLE_BACKWARD = "forward-mode AD", "double backward"


def not_twice(kind: str, normalizer: str, score: str) -> tuple[str, str] | None:
    """(name, what to use) of a kind of attention that is differentiated once; None for others."""
    formula = "write its formula in torch operations, as attn_ext.core.reference does"
    if score != "dot":
        return f"{score} attention", formula
    if normalizer != "softmax":
        return f"{normalizer} attention", formula
    if kind == "decode":
        return "attention_decode", "use attention or attention_varlen"
    if kind == "shard":
        return "a shard of a larger call", "differentiate the whole call"
    return None


def refuse_once_only(call: Call, what: str) -> None:
    """NotImplementedError where this kind of call has no derivative of second order; `what` the
    caller asked for."""
    kind = "decode" if is_decode(call) else "shard" if call.frame is not None else ""
    found = not_twice(kind, call.normalizer, "dot" if call.w is None else "additive")
    if found is not None:
        raise NotImplementedError(f"attn_ext has no {what} of {found[0]}: {found[1]}")


_unpack_dual = torch._VF._unpack_dual


def primal_of(x: torch.Tensor | None) -> torch.Tensor | None:
    """x without its tangent at this level of forward-mode AD; those of outer levels stay."""
    return x if x is None else _unpack_dual(x, level=0)[0]


def _may_be_dual() -> bool:
    """Whether forward-mode AD may be on: torch.autograd.forward_ad does not know of the levels of
    torch.func, nor of those in a graph that is being traced, which a dispatch mode tells."""
    return (
        torch.autograd.forward_ad._current_level >= 0
        or _transformed()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _is_dual(inputs) -> bool:
    """Whether one of the inputs is a dual number of forward-mode AD."""
    return _may_be_dual() and any(
        isinstance(x, torch.Tensor) and _unpack_dual(x, level=0)[1] is not None for x in inputs
    )


def derivative(lib, name: str, context, backward, jvp, recorded=lambda inputs: inputs) -> None:
    """Register the derivatives of the operator attn_ext::name.

    context(ctx, inputs, output), backward(ctx, *grads) and jvp(ctx, *tangents) are as those of a
    torch.autograd.Function; recorded(inputs) are the inputs of a call that is differentiated.
    """
    operator = getattr(torch.ops.attn_ext, name).default

    def below(keyset, inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs_and_keyset):
            *inputs, keyset = inputs_and_keyset
            with _outer_levels_record():
                output = below(keyset, inputs)
            context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return (*backward(ctx, *grads), None)

        @staticmethod
        def jvp(ctx, *tangents_and_none):
            with _outer_levels_record():
                return jvp(ctx, *tangents_and_none[:-1])

    # Function.apply would hand the whole Function to the innermost transform.  Here the dispatcher
    # has come to this operator's derivative at one level of the transforms, as it comes to the
    # derivatives of torch's own operators, and the Function belongs to this level alone.
    record = super(torch.autograd.Function, Recorded).apply

    def implementation(keyset, *inputs):
        recording = torch.is_grad_enabled() and _requires_grad(inputs)
        if not (recording or _is_dual(inputs)):
            return below(keyset, inputs)
        with _one_level():
            return record(*recorded(inputs), keyset)

    Recorded.__name__ = f"{name}Derivative"
    lib.impl(name, implementation, "Autograd", with_keyset=True)


def _requires_grad(inputs) -> bool:
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _one_level():
    """torch's permission to run a Function at one level of the transforms, where there are any."""
    return enable_single_level_autograd_function() if _transformed() else contextlib.nullcontext()


@contextlib.contextmanager
def _outer_levels_record():
    """Undo within transforms what a Function's forward and jvp switch off: derivatives of outer
    levels, to which the dispatcher goes from here."""
    if not _transformed():
        yield
        return
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield
