"""How an operator of this package tells torch its derivative.

torch.library.register_autograd serves plain autograd only: within torch.func.grad, vjp or jacrev
the torch.autograd.Function that it makes raises, and torch.compile traces those transforms by
running the operator within them; and it has no forward mode.  The derivatives registered here hold
in all of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch._functorch.utils import enable_single_level_autograd_function

from attn_ext.core.schema import FIELDS, Call, is_decode

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


def refuse_alibi(tangents) -> None:
    """NotImplementedError where the slopes of ALiBi have a tangent, which would be lost; tangents:
    those of a call's tensors, in the order of its fields."""
    if tangents[FIELDS.index("alibi_slopes")] is not None:
        raise NotImplementedError(
            "attn_ext has no forward-mode AD of alibi_slopes: use bias, which has it"
        )


unpack_dual = torch._VF._unpack_dual


def primal_of(x: torch.Tensor | None) -> torch.Tensor | None:
    """x without its tangent at this level of forward-mode AD; those of outer levels stay."""
    return x if x is None else unpack_dual(x, level=0)[0]


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
        isinstance(x, torch.Tensor)
        and x.is_floating_point()
        and unpack_dual(x, level=0)[1] is not None
        for x in inputs
    )


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_PLAIN = (torch.Tensor, torch.nn.Parameter)


_keysets: dict[int, bool] = {}  # whether tensors of these dispatch keys are plain


def _has_memory(x: torch.Tensor) -> bool:
    keys = torch._C._dispatch_keys(x).raw_repr()
    found = _keysets.get(keys)
    if found is None:  # all of this is in the keys, which one call reads
        wrapped = _is_wrapped(x) or _is_batched(x) or x._is_zerotensor()
        strided = (x.is_cpu or x.is_cuda) and x.layout is torch.strided
        found = _keysets[keys] = strided and not wrapped
    return found


def are_plain_tensors(tensors) -> bool:
    """Whether all of them are plain tensors with memory of their own."""
    return all(type(x) in _PLAIN and _has_memory(x) for x in tensors)


def are_plain(inputs) -> bool:
    """Whether the dispatcher would hand the inputs to the operator's kernel as they are: no
    transform, no dispatch mode, and tensors with memory of their own."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and not _transformed()
        and are_plain_tensors(x for x in inputs if isinstance(x, torch.Tensor))
    )


def are_eager(inputs) -> bool:
    """`are_plain`, and forward-mode AD is off."""
    return torch.autograd.forward_ad._current_level < 0 and are_plain(inputs)


class Rules(NamedTuple):
    """context(ctx, inputs, output), backward(ctx, *grads) and jvp(ctx, *tangents) are as those of a
    torch.autograd.Function; recorded(inputs) are the inputs of a call that is differentiated."""

    context: Callable
    backward: Callable
    jvp: Callable
    recorded: Callable = lambda inputs: inputs


def derivative(lib, name: str, kernel, rules: Rules) -> None:
    """Register the derivatives of the operator attn_ext::name, whose implementation is `kernel`."""
    operator = getattr(torch.ops.attn_ext, name).default

    def below(keyset, inputs):
        with torch._C._AutoDispatchBelowAutograd():
            if are_plain(inputs):  # spares converting some thirty arguments forth and back
                return kernel(*inputs)
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs_and_keyset):
            *inputs, keyset = inputs_and_keyset
            with _OuterLevelsRecord():
                output = below(keyset, inputs)
            rules.context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return (*rules.backward(ctx, *grads), None)

        @staticmethod
        def jvp(ctx, *tangents_and_none):
            with _OuterLevelsRecord():
                return rules.jvp(ctx, *tangents_and_none[:-1])

    # Function.apply would hand the whole Function to the innermost transform.  Here the dispatcher
    # has come to this operator's derivative at one level of the transforms, as it comes to the
    # derivatives of torch's own operators, and the Function belongs to this level alone.
    record = super(torch.autograd.Function, Recorded).apply

    def implementation(keyset, *inputs):
        recording = torch.is_grad_enabled() and _requires_grad(inputs)
        if not (recording or _is_dual(inputs)):
            return below(keyset, inputs)
        with _one_level():
            return record(*rules.recorded(inputs), keyset)

    Recorded.__name__ = f"{name}Derivative"
    lib.impl(name, implementation, "Autograd", with_keyset=True)


def _requires_grad(inputs) -> bool:
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs)


def _transformed() -> bool:
    return torch._C._functorch.peek_interpreter_stack() is not None


def _one_level():
    """torch's permission to run a Function at one level of the transforms, where there are any."""
    return enable_single_level_autograd_function() if _transformed() else contextlib.nullcontext()


class _OuterLevelsRecord:
    """Undo within transforms what a Function's forward and jvp switch off: derivatives of outer
    levels, to which the dispatcher goes from here.  (torch's own context managers take longer than
    a small kernel.)"""

    __slots__ = ("before",)

    def __enter__(self):
        self.before = None
        if _transformed():
            self.before = torch.is_grad_enabled(), torch._C._is_fwd_grad_enabled()
            torch._C._set_grad_enabled(True)
            torch._C._set_fwd_grad_enabled(True)

    def __exit__(self, *error):
        if self.before is not None:
            torch._C._set_grad_enabled(self.before[0])
            torch._C._set_fwd_grad_enabled(self.before[1])
