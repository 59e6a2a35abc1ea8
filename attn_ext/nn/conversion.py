"""convert and revert: torch's MultiheadAttention modules as attn_ext's, in place, and what stays.

A module changes its class and nothing else.  Where torch gave a module a class of its own (a
parametrization) or the user did (a subclass that leaves the computation alone), a class that
inherits from both takes its place.
"""

from __future__ import annotations

import functools
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from attn_ext.functional import common
from attn_ext.nn.multihead import MultiheadAttention

_ORIGIN = "_attn_ext_origin"  # on a class made here: the user's class
_SHOWN = 8  # modules that a warning names
# What decides the result of a call: torch's methods, and those of attn_ext's that they give way to.
_COMPUTING = {
    "forward", "merge_masks", "__call__", "_call_impl", "__getattr__", "__getattribute__",
    *(name for name, value in vars(MultiheadAttention).items()
      if callable(value) and not name.startswith("__")),
}  # fmt: skip


class Conversion(NamedTuple):
    """What `converted` found, by the names of `model.named_modules()`."""

    converted: tuple[str, ...]  # computed by attn_ext
    left: dict[str, str]  # of torch's kind, and why convert leaves it alone


def _fused_layers(model: nn.Module):
    """Encoder layers and encoders whose fused path goes around their attention module."""
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerEncoder)):
            yield module


_FLAGS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def _plain_class(module: nn.Module) -> type:
    """The class of a module without the one that a parametrization puts in front of it."""
    return parametrize.type_before_parametrizations(module)


def _obstacle(module: nn.Module) -> str:
    """Why a module of torch's kind must not be converted; "" where it may be."""
    if isinstance(module, torch.jit.ScriptModule):
        return "torch.jit.script has compiled it"
    if "forward" in vars(module):
        return "its forward was replaced on the module itself"
    for kind in _plain_class(module).__mro__:
        if kind is nn.MultiheadAttention:
            break
        own = sorted(_COMPUTING & vars(kind).keys())
        if own:
            return f"{kind.__name__} has code of its own: {', '.join(own)}"
    last = module.out_proj
    if "forward" in vars(last) or _plain_class(last).forward is not nn.Linear.forward:
        return (
            f"its out_proj, a {type(last).__name__}, has a forward of its own, which torch's "
            "attention never calls"
        )
    return ""


def _of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's attention modules, or of their kind."""
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") == "MultiheadAttention"
    return isinstance(module, nn.MultiheadAttention) and not isinstance(module, MultiheadAttention)


def _make(origin: type):
    """An empty instance of what stands for the class `origin`, for pickle and copy."""
    kind = _standing_for(origin)
    return kind.__new__(kind)


def _reduce(self, protocol):
    return _make, (getattr(type(self), _ORIGIN),), self.__dict__


@functools.cache
def _standing_for(kind: type) -> type:
    """attn_ext's class for torch's, or for a subclass of it."""
    if kind is nn.MultiheadAttention:
        return MultiheadAttention
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    names |= {_ORIGIN: kind, "__reduce_ex__": _reduce}
    return type(kind)(kind.__name__, (kind, MultiheadAttention), names)


def _origin(kind: type) -> type | None:
    """What `_standing_for` was given; None where the class was not made by it."""
    return nn.MultiheadAttention if kind is MultiheadAttention else vars(kind).get(_ORIGIN)


def _set_class(module: nn.Module, kind: type) -> None:
    """Make `kind` the class of a module, below what a parametrization puts in front of it."""
    front = type(module)
    if front is not _plain_class(module):
        names = {k: v for k, v in vars(front).items() if k not in ("__dict__", "__weakref__")}
        kind = type(front)(front.__name__, (kind,), names)
    module.__class__ = kind


def _warn(function: str, left: dict[str, str]) -> None:
    if not left:
        return
    shown = [f"{name or 'the model itself'} ({why})" for name, why in [*left.items()][:_SHOWN]]
    if len(left) > _SHOWN:
        shown.append(f"and {len(left) - _SHOWN} more")
    warnings.warn(
        f"{function} leaves {len(left)} attention module(s) as they are: {'; '.join(shown)}",
        stacklevel=3,
    )


def converted(model: nn.Module) -> Conversion:
    """Which attention modules in `model` attn_ext computes, and which of torch's kind are left to
    torch, with the reason where `convert` would not change them ("" where it would).
    """
    validate_module(model)
    own, left = [], {}
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            own.append(name)
        elif _of_torch(module):
            left[name] = _obstacle(module)
    return Conversion(tuple(own), left)


def convert(model: nn.Module, prefer: str = "fastest") -> nn.Module:
    """Make every torch.nn.MultiheadAttention in `model` (itself included) an
    attn_ext.nn.MultiheadAttention.  In place: parameters, parametrizations, buffers, hooks,
    optimizers, sharing, modes and state_dict keys stay.  Returns `model`; `revert(model)` undoes
    it, `converted(model)` lists what it did.

    Subclasses are converted where they leave the computation to torch (isinstance, pickle and
    their other methods still work).  What computes by code of its own is left alone, and one
    warning names it: an overridden or replaced forward, an out_proj of another kind (LoRA), a
    scripted module.  In nn.TransformerEncoder(-Layer), and so nn.Transformer, torch's fused
    evaluation path, which goes around the attention module, is turned off.  out_proj is called, so
    that its hooks run; torch only reads its weight.  prefer: "fastest" or "attn_ext", what becomes
    the modules' attribute of that name; TypeError or ValueError for another one.
    """
    common.preferred(prefer)
    _warn("convert", {k: why for k, why in converted(model).left.items() if why})
    for module in model.modules():
        if _of_torch(module) and not _obstacle(module):
            _set_class(module, _standing_for(_plain_class(module)))
            if prefer != MultiheadAttention.prefer:
                module.prefer = prefer
    for module in _fused_layers(model):
        if not any(isinstance(m, MultiheadAttention) for m in module.modules()):
            continue
        for kind, flag, off in _FLAGS:
            if isinstance(module, kind) and hasattr(module, flag):
                if not hasattr(module, f"_attn_ext_{flag}"):
                    setattr(module, f"_attn_ext_{flag}", getattr(module, flag))
                setattr(module, flag, off)
    return model


def revert(model: nn.Module) -> nn.Module:
    """Undo `convert(model)`, in place; returns `model`.  One warning names the modules that were
    written as subclasses of attn_ext's class, which have nothing to go back to.
    """
    validate_module(model)
    left = {}
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            kind = _plain_class(module)
            origin = _origin(kind)
            if origin is None:
                left[name] = f"{kind.__name__} is a subclass of attn_ext.nn.MultiheadAttention"
            else:
                _set_class(module, origin)
                vars(module).pop("prefer", None)
    _warn("revert", left)
    for module in _fused_layers(model):
        for _, flag, _ in _FLAGS:
            kept = f"_attn_ext_{flag}"
            if hasattr(module, kept):
                setattr(module, flag, getattr(module, kept))
                delattr(module, kept)
    return model


def validate_module(model) -> None:
    """TypeError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
