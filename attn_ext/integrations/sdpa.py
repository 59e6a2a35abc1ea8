"""`replace_sdpa`: torch.nn.functional.scaled_dot_product_attention served by attn_ext.

Two ways lead to attn_ext, and what they serve is the same:

- Kernels registered for the operator itself, `aten::scaled_dot_product_attention`, see each call
  that reaches torch's dispatcher, whoever makes it: Python by whatever name, C++,
  nn.MultiheadAttention, torch.func, a script, a recomputation in backward(), a part of a graph
  that torch.compile did not look into.  They ask `sdpa_scopes.current()` to which block the call
  belongs, and hand calls of no block to torch's own implementation.
- In front of them a block puts a TorchFunctionMode, for what ends before the dispatcher (nested
  tensors and CausalBias have a __torch_function__ of their own) and for torch.compile: Dynamo
  guards on the modes of a thread, so a compiled function belongs to the block that it was compiled
  in, and its graph and the caches of it hold attn_ext's operator.

`report()` counts what went where.
"""

from __future__ import annotations

import functools
import sys
import threading

import torch
import torch.nn.functional as F
from torch._ops import HigherOrderOperator
from torch.overrides import TorchFunctionMode

from attn_ext.backends import registry
from attn_ext.core import validate
from attn_ext.functional import common
from attn_ext.integrations import sdpa_scopes as scopes
from attn_ext.integrations.sdpa_calls import (
    TORCH_SDPA,
    Report,
    call,
    not_served_in_hook,
    report,
    reset,
)

__all__ = ["Report", "replace_sdpa", "report", "reset"]

_TORCH_MHA = F.multi_head_attention_forward
_ATEN = torch.ops.aten.scaled_dot_product_attention.default
_lock = threading.Lock()
_library = None


def _kernel(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """aten::scaled_dot_product_attention: attn_ext in a block, torch's own outside."""
    settings = scopes.current()
    if settings is not None:
        return call(
            *settings, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    if (lost := scopes.lost()) is not None:
        not_served_in_hook(lost.strict)
    return _ATEN._op_dk(
        torch._C.DispatchKey.CompositeImplicitAutograd, query, key, value, attn_mask, dropout_p,
        is_causal, scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip


def _register() -> None:
    """Register the kernels, at the first use.  They stay, because a backward() may come later than
    the end of the last block.
    """
    global _library
    with _lock:
        if _library is not None:
            return
        scopes.mark_contexts()
        _library = torch.library.Library("aten", "IMPL")
        devices = ("CPU", "CUDA") if torch.version.cuda or torch.version.hip else ("CPU",)
        # BackendSelect serves inference_mode and what runs below autograd.  A kernel of the key
        # CPU would too, but then a compiler that traces below autograd would take the operator for
        # one that it must not decompose.
        # FuncTorchDynamicLayerFrontMode is that of torch.func's transforms: at a lower key
        # attn_ext's Functions would meet a transform that is at work already.
        keys = [f"Autograd{device}" for device in devices]
        for key in (*keys, "BackendSelect", "FuncTorchDynamicLayerFrontMode"):
            _library.impl("scaled_dot_product_attention", _kernel, key)
        _ATEN.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(_kernel)  # decompose()
        _ATEN._dispatch_cache.clear()  # what a compiler looked up before


def _know_graph_nodes() -> None:
    """Let torch.compile put the two functions in graphs as they are.  Runs while it traces."""
    if _known:
        return
    _known.append(True)
    for function in (scopes.open_in_graph, scopes.close_in_graph):
        torch.compiler.allow_in_graph(function)
        torch.fx.node.has_side_effect(function)
    _register()


_known: list = []
# torch.compiler.assume_constant_result by hand: it imports the compiler, a second of every import.
_know_graph_nodes._dynamo_marked_constant = True


class replace_sdpa(TorchFunctionMode):
    """Serve torch's scaled_dot_product_attention by attn_ext: context manager, decorator, switch.

        with attn_ext.replace_sdpa():               # this thread, this block
            model(x)

        @attn_ext.replace_sdpa(strict=True)         # this function
        def step(...): ...

        switch = attn_ext.replace_sdpa().enable()   # every thread, until switch.undo()

    strict: raise (NotImplementedError, ValueError or TypeError, with the reason) instead of
    leaving a call to torch with a warning.  backend: "auto", or a name of `attn_ext.backends()`.
    prefer, with backend "auto": "fastest" lets torch's own flash attention compute plain calls of
    a class for which `attn-ext tune` measured it to be faster on this machine (none without a
    table); `report()` counts them as served by "torch".  "attn_ext" keeps every call.

    What runs in backward() belongs to the block in which its forward ran, wherever backward() is
    called: checkpoints of both forms, autograd.Functions that recompute, hooks of tensors.

    Arguments and result are torch's: any number of leading dimensions, bool masks with True =
    attend, is_causal top-left, fully masked rows 0, autocast, gradients of a float mask, jagged
    nested tensors, forward-mode AD and second derivatives.  Dropout draws another mask than torch
    from the same seed.  Third derivatives raise: run such a part under
    sdpa_kernel(SDPBackend.MATH), which leaves it to torch, as tensor subclasses unknown here are.

    nn.MultiheadAttention (need_weights=False) and nn.TransformerEncoder in evaluation go around
    scaled_dot_product_attention by a fused path of their own; it is off where this mode is on.
    Code already compiled by torch.compile is compiled again under it.
    """

    def __init__(self, strict: bool = False, backend: str = "auto", prefer: str = "fastest"):
        super().__init__()
        if callable(strict):
            raise TypeError(
                "strict must be a bool, got a function: the decorator is written @replace_sdpa()"
            )
        validate.boolean("strict", strict)
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a str, got {type(backend).__name__} {backend!r}")
        wanted = common.preferred(prefer)
        if backend == "auto":
            backend = wanted
        elif backend not in registry.CHOICES:
            registry.get(backend)
        self.strict = strict
        self.backend = backend
        self._settings = scopes.Settings(strict, backend)
        self._switch = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is TORCH_SDPA:
            return call(self.strict, self.backend, *args, **kwargs)
        if torch.compiler.is_dynamo_compiling() and (
            func is _TORCH_MHA or isinstance(func, HigherOrderOperator)
        ):
            # Dynamo looks into neither with a mode on: checkpoint's, cond's and other bodies
            _know_graph_nodes()
            scopes.open_in_graph(self.strict, self.backend)
            out = func(*args, **kwargs)
            scopes.close_in_graph()
            return out
        if func is torch.Tensor.unflatten and torch.compiler.is_dynamo_compiling():
            func = torch.unflatten  # whose graph Dynamo does not break under a mode
        return func(*args, **kwargs)

    def __enter__(self):
        if not torch.compiler.is_dynamo_compiling():
            _register()
            scopes.enter(self._settings)
        return super().__enter__()

    def __exit__(self, kind, error, traceback):
        super().__exit__(kind, error, traceback)
        if not torch.compiler.is_dynamo_compiling():
            scopes.leave(self._settings)

    def __call__(self, function):
        """Decorate `function`: it runs under this mode."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return wrapped

    def enable(self) -> replace_sdpa:
        """Switch this on in every thread until `undo()`; returns self.

        torch's fused encoder path is off, and code compiled before is compiled again.
        RuntimeError if it is on already.
        """
        with _lock:
            if self._switch is not None:
                raise RuntimeError("enable: this replace_sdpa is on already, undo() it first")
            fastpath = torch.backends.mha.get_fastpath_enabled()
            self._switch = (threading.get_ident(), fastpath)
            scopes.everywhere.append(self._settings)
        torch.backends.mha.set_fastpath_enabled(False)
        _compile_again()
        self.__enter__()
        return self

    def undo(self) -> None:
        """Switch off what `enable()` switched on; RuntimeError if it is not on, or from another
        thread than the one that enabled it."""
        with _lock:
            if self._switch is None:
                raise RuntimeError("undo: this replace_sdpa is not on, enable() it first")
            thread, fastpath = self._switch
            if thread != threading.get_ident():
                raise RuntimeError("undo must be called from the thread that called enable()")
            self._switch = None
            scopes.everywhere[:] = [s for s in scopes.everywhere if s is not self._settings]
        torch.backends.mha.set_fastpath_enabled(fastpath)
        _compile_again()
        _remove_mode(self)
        scopes.leave(self._settings)


def _compile_again() -> None:
    """Drop what torch.compile made before a switch was turned: threads without a mode have no
    guard that would.  While a switch is on, entries of the compiler's caches on disk carry its
    name, because a graph of such a thread does not tell which attention it became.
    """
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    _tag_caches(bool(scopes.everywhere))


def _tag_caches(on: bool) -> None:
    import torch.compiler.config as config  # light; torch._dynamo is not loaded by it

    tag = config.cache_key_tag.removesuffix("+attn_ext")
    config.cache_key_tag = f"{tag}+attn_ext" if on else tag


def _remove_mode(mode: TorchFunctionMode) -> None:
    """Take `mode` out of this thread's stack, wherever modes entered later left it."""
    above = []
    while torch._C._len_torch_function_stack():
        top = torch.overrides._pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        torch.overrides._push_mode(other)
