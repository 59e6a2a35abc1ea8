"""How an operator of this package tells torch its derivative.

torch.library.register_autograd serves plain autograd only: within torch.func.grad, vjp or jacrev
the torch.autograd.Function that it makes raises, and torch.compile traces those transforms by
running the operator within them.  The derivative registered here holds in all of these.
"""

from __future__ import annotations

import contextlib

import torch
from torch._functorch.utils import enable_single_level_autograd_function

FORWARD_AD = (
    "attn_ext has no forward-mode AD: use reverse mode (torch.func.vjp, jacrev) or "
    "torch's attention under torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
)
DOUBLE_BACKWARD = (
    "attn_ext has no double backward: use torch's attention under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), which can be differentiated twice"
)


class WithoutForwardMode(torch.autograd.Function):
    """A Function whose forward-mode derivative raises."""

    @staticmethod
    def jvp(ctx, *tangents):
        raise NotImplementedError(FORWARD_AD)


def refuse_tangents(tensors) -> None:
    """NotImplementedError where one of the tensors is a dual number of forward-mode AD."""
    for tensor in tensors:
        if tensor is not None and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(FORWARD_AD)


def derivative(lib, name: str, setup_context, backward, recorded=lambda inputs: inputs) -> None:
    """Register the derivative of the operator attn_ext::name.

    setup_context(ctx, inputs, output) and backward(ctx, *grads) are as torch.library has them;
    recorded(inputs) are the inputs of a call that is differentiated.
    """
    operator = getattr(torch.ops.attn_ext, name).default

    def below(keyset, inputs):
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Recorded(WithoutForwardMode):
        @staticmethod
        def forward(ctx, *inputs_and_keyset):
            *inputs, keyset = inputs_and_keyset
            with _outer_levels_record():
                output = below(keyset, inputs)
            setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return (*backward(ctx, *grads), None)

    # Function.apply would hand the whole Function to the innermost transform.  Here the dispatcher
    # has come to this operator's derivative at one level of the transforms, as it comes to the
    # derivatives of torch's own operators, and the Function belongs to this level alone.
    record = super(torch.autograd.Function, Recorded).apply

    def implementation(keyset, *inputs):
        if torch.autograd.forward_ad._current_level >= 0:
            refuse_tangents(x for x in inputs if isinstance(x, torch.Tensor))
        if not (torch.is_grad_enabled() and _requires_grad(inputs)):
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
    """Undo within transforms what a Function's forward switches off: derivatives of outer levels,
    to which the dispatcher goes from here."""
    if not _transformed():
        yield
        return
    with torch.enable_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield
