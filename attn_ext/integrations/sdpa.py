"""`replace_sdpa`: torch.nn.functional.scaled_dot_product_attention served by attn_ext.

Scoped use is a TorchFunctionMode: it sees each call of the running thread, also those by a name
imported earlier, and torch.compile traces through it.  The switch `enable()` covers every thread.
A call that attn_ext cannot serve goes to torch with one warning that says why, or raises with
strict=True.  `report()` counts what went where.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
import threading
import types
import warnings
from collections import Counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from attn_ext import backends, jagged, validate
from attn_ext.api import autocasting
from attn_ext.problem import TOP_LEFT, Problem
from attn_ext.torch_sdpa import as_mask, is_causal_bias, serve

_TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
_TORCH_MHA = F.multi_head_attention_forward

_lock = threading.Lock()
_served: Counter = Counter()
_to_torch: Counter = Counter()
_compiled: Counter = Counter()
_warned: set = set()


class Report(NamedTuple):
    """Calls since the last `reset`."""

    served: dict  # backend -> eager calls that it served
    torch: dict  # reason -> eager calls that torch served
    compiled: dict  # "attn_ext" or a reason -> calls traced into compiled graphs, once a trace

    def __str__(self) -> str:
        lines = [f"served by {name}: {count}" for name, count in self.served.items()]
        lines += [f"left to torch: {count} ({reason})" for reason, count in self.torch.items()]
        lines += [f"traced by torch.compile: {n} ({what})" for what, n in self.compiled.items()]
        return "\n".join(lines) or "no calls"


def report() -> Report:
    """How many calls each backend served, how many torch served and why, in all threads."""
    with _lock:
        return Report(dict(_served), dict(_to_torch), dict(_compiled))


def reset() -> None:
    """Set the counts of `report` to zero and let each warning appear once more."""
    with _lock:
        for counter in (_served, _to_torch, _compiled):
            counter.clear()
        _warned.clear()


def _left_to_torch(reason: str, counter: Counter) -> None:
    """Count a call that torch serves and warn the first time that this reason is met."""
    rule = re.sub(r"(?<![=\w])\d+", "N", reason)  # one entry a rule, not one a shape
    with _lock:
        counter[rule] += 1
        new = rule not in _warned
        _warned.add(rule)
    if new:
        warnings.warn(
            f"replace_sdpa leaves scaled_dot_product_attention to torch: {reason}", stacklevel=4
        )


@functools.lru_cache(maxsize=4096)
def _serving(backend, device, index, dtype, seqlen_q, seqlen_k, dim, dim_v, grad, flags) -> str:
    """The name of the backend that serves such a call; NotImplementedError where none does."""
    causal, mask, bias, bias_grad, dropout = flags
    problem = Problem(
        "dense", device, dtype, 1, 1, 1, seqlen_q, seqlen_k, dim, dim_v, causal=causal,
        align=TOP_LEFT, mask=mask, bias=bias, bias_grad=bias_grad, dropout=dropout, grad=grad,
        device_index=index,
    )  # fmt: skip
    name = backends.select(backend, problem)
    if name == "reference" != backend:
        why = "; ".join(
            f"{c}: {', '.join(backends.reasons(c, problem))}"
            for c in backends.ORDER
            if c != "reference"
        )
        raise NotImplementedError(f"no kernel can serve this call: {why}")
    return name


def _only_math() -> bool:
    """Whether sdpa_kernel(SDPBackend.MATH) is in force: the caller asks for torch's own math."""
    cuda = torch.backends.cuda
    return cuda.math_sdp_enabled() and not (
        cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled()
    )


MATH_ONLY = "sdpa_kernel(SDPBackend.MATH) asks for torch's math"


def _foreign(tensor) -> bool:
    """Whether a tensor subclass has operations of its own that a kernel would go around."""
    kind = type(tensor)
    if kind in (torch.Tensor, torch.nn.Parameter):
        return False
    home = kind.__module__
    return not home.startswith(("torch._subclasses", "torch.distributed.tensor", "torch.nn"))


def _backend(backend: str, query, key, value, attn_mask, dropout_p, is_causal) -> str:
    """The name of the backend that serves this eager call.

    NotImplementedError says why torch must; ValueError and TypeError what torch will refuse too.
    """
    if not type(query) is type(key) is type(value) is torch.Tensor or query.layout != torch.strided:
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            validate.tensor(name, tensor)
            if _foreign(tensor):
                raise NotImplementedError(f"{name} is a tensor subclass, {type(tensor).__name__}")
    if query.is_nested or key.is_nested or value.is_nested:
        raise NotImplementedError("nested tensors must be of the jagged layout, all three")
    if _only_math():
        raise NotImplementedError(MATH_ONLY)
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise ValueError("query, key and value must have at least 2 dimensions")
    device, dtype = query.device, query.dtype
    if dtype != torch.float64 and autocasting(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    if isinstance(attn_mask, torch.Tensor) and _foreign(attn_mask):
        raise NotImplementedError(f"attn_mask is a tensor subclass, {type(attn_mask).__name__}")
    described = is_causal_bias(attn_mask)  # torch 2.6: even its dtype raises
    is_causal = is_causal or described
    mask = isinstance(attn_mask, torch.Tensor) and not described and attn_mask.dtype == torch.bool
    bias = not (attn_mask is None or mask or described)
    grads = torch.is_grad_enabled()
    bias_grad = bias and grads and attn_mask.requires_grad
    grad = grads and (query.requires_grad or key.requires_grad or value.requires_grad)
    return _serving(
        backend, device.type, device.index or 0, dtype, query.shape[-2], key.shape[-2],
        query.shape[-1], value.shape[-1], grad or bias_grad,
        (bool(is_causal), mask, bias, bias_grad, dropout_p > 0),
    )  # fmt: skip


def _traced_reason(backend: str, device: str, dtype: torch.dtype) -> str:
    """Runs while torch.compile traces: why this call stays torch's, "" if attn_ext takes it."""
    why = MATH_ONLY if _only_math() else ""
    try:
        if dtype != torch.float64 and autocasting(device):
            dtype = torch.get_autocast_dtype(device)
        if not why:
            _serving(backend, device, 0, dtype, 64, 64, 64, 64, False, (False,) * 5)
    except NotImplementedError as error:
        why = str(error)
    if why:
        _left_to_torch(why, _compiled)
    else:
        with _lock:
            _compiled["attn_ext"] += 1
    return why


# torch.compiler.assume_constant_result by hand: it imports the compiler, a second of every import.
_traced_reason._dynamo_marked_constant = True


def _call(
    strict, backend, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """One call of scaled_dot_product_attention, here or by torch."""
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if torch.compiler.is_compiling():
        why = _traced_reason(backend, query.device.type, query.dtype)
        if not why:
            return serve(query, key, value, *options, backend)
        if strict:
            raise NotImplementedError(why)
    elif not (isinstance(query, torch.Tensor) and query.is_meta):  # nothing is computed on meta
        try:
            return _eager(backend, query, key, value, *options)
        except (NotImplementedError, ValueError, TypeError) as error:
            if strict or (is_causal_bias(attn_mask) and is_causal):  # torch's error too
                raise
            reason = str(error)
        _left_to_torch(reason, _to_torch)
    if is_causal_bias(attn_mask) and not is_causal:
        # it knows itself by F.scaled_dot_product_attention, a name that enable() takes
        attn_mask = as_mask(attn_mask, query.device)
    return _TORCH_SDPA(
        query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
        scale=scale, enable_gqa=enable_gqa,
    )  # fmt: skip


def _eager(backend, query, key, value, *options):
    probe = (query, key, value)
    if jagged.is_jagged(*probe):
        probe = jagged.values(*probe)
    name = _backend(backend, *probe, *options[:3])
    out = serve(query, key, value, *options, backend)
    with _lock:
        _served[name] += 1
    return out


def _attention_forward_with(strict: bool, backend: str):
    """F.multi_head_attention_forward that calls `_call`.

    It asks has_torch_function and hands itself to the mode, inside which no mode is on: a mode
    never sees the attention call in it.  The same code with two other globals does.  They stand in
    a module of their own, because torch.compile looks globals up by their module's name.
    """

    def sdpa(*args, **kwargs):
        return _call(strict, backend, *args, **kwargs)

    name = f"{__name__}.{'strict' if strict else 'lenient'}_{backend}"
    scope = types.ModuleType(name)
    own = {"scaled_dot_product_attention": sdpa, "has_torch_function": _never, "__name__": name}
    scope.__dict__.update({**F.__dict__, **own})
    sys.modules[name] = scope
    function = types.FunctionType(
        _TORCH_MHA.__code__, scope.__dict__, _TORCH_MHA.__name__, _TORCH_MHA.__defaults__
    )
    function.__kwdefaults__ = _TORCH_MHA.__kwdefaults__
    return function


def _never(tensors) -> bool:
    return False


# Made at import, because torch.compile cannot trace the making of a function from code.
_MHA = {
    (strict, backend): _attention_forward_with(strict, backend)
    for strict in (False, True)
    for backend in ("auto", *backends.ORDER)
}


class replace_sdpa(TorchFunctionMode):
    """Serve torch's scaled_dot_product_attention by attn_ext: context manager, decorator, switch.

        with attn_ext.replace_sdpa():               # this thread, this block
            model(x)

        @attn_ext.replace_sdpa(strict=True)         # this function
        def step(...): ...

        switch = attn_ext.replace_sdpa().enable()   # every thread, until switch.undo()

    strict: raise (NotImplementedError, ValueError or TypeError, with the reason) instead of
    leaving a call to torch with a warning.  backend: "auto", or a name of `attn_ext.backends()`.

    Arguments and result are torch's: any number of leading dimensions, bool masks with True =
    attend, is_causal top-left, fully masked rows 0, autocast, gradients of a float mask, jagged
    nested tensors.  Dropout draws another mask than torch from the same seed.  Second derivatives
    raise: run such a part under sdpa_kernel(SDPBackend.MATH), which leaves it to torch, as do
    forward-mode AD and tensor subclasses unknown here.

    nn.MultiheadAttention (need_weights=False) and nn.TransformerEncoder in evaluation go around
    scaled_dot_product_attention by a fused path of their own; it is off where this mode is on.
    Code already compiled by torch.compile is compiled again under it, in the thread of `enable()`.
    """

    def __init__(self, strict: bool = False, backend: str = "auto"):
        super().__init__()
        if callable(strict):
            raise TypeError(
                "strict must be a bool, got a function: the decorator is written @replace_sdpa()"
            )
        validate.boolean("strict", strict)
        if not isinstance(backend, str):
            raise TypeError(f"backend must be a str, got {type(backend).__name__} {backend!r}")
        if backend != "auto":
            backends.get(backend)
            if (strict, backend) not in _MHA:
                _MHA[strict, backend] = _attention_forward_with(strict, backend)
        self.strict = strict
        self.backend = backend
        self._switch = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is _TORCH_SDPA:
            return _call(self.strict, self.backend, *args, **kwargs)
        if func is _TORCH_MHA:
            return _MHA[self.strict, self.backend](*args, **kwargs)
        return func(*args, **kwargs)

    def __call__(self, function):
        """Decorate `function`: it runs under this mode."""

        @functools.wraps(function)
        def wrapped(*args, **kwargs):
            with self:
                return function(*args, **kwargs)

        return wrapped

    def enable(self) -> replace_sdpa:
        """Switch this on in every thread until `undo()`; returns self.

        The calling thread gets the mode; in other threads the name F.scaled_dot_product_attention
        is served, and torch's fused encoder path is off.  RuntimeError if it is on already.
        """
        _know_torchs_functions()
        with _lock:
            if self._switch is not None:
                raise RuntimeError("enable: this replace_sdpa is on already, undo() it first")
            fastpath = torch.backends.mha.get_fastpath_enabled()
            self._switch = (threading.get_ident(), fastpath)
            _switches.append(self)
            F.scaled_dot_product_attention = _everywhere
        torch.backends.mha.set_fastpath_enabled(False)
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
            _switches.remove(self)
            if not _switches:
                F.scaled_dot_product_attention = _TORCH_SDPA
        torch.backends.mha.set_fastpath_enabled(fastpath)
        _remove_mode(self)


_switches: list[replace_sdpa] = []


def _know_torchs_functions() -> None:
    """Let torch.overrides, torch.compile and torch.jit.script note which function
    F.scaled_dot_product_attention is.

    They look it up by name once and for all: done while the switch is on, torch.compile would take
    the stand-in for torch's own function, then and after undo().
    """
    torch.overrides.get_overridable_functions()
    with contextlib.suppress(ImportError, AttributeError):  # private: a torch without them is fine
        from torch._dynamo import trace_rules

        trace_rules.get_torch_obj_rule_map()
        trace_rules.get_tensor_method()
    with contextlib.suppress(ImportError, AttributeError):  # scripts keep torch's own operator
        torch.jit._builtins._register_builtin(_everywhere, "aten::scaled_dot_product_attention")


def _everywhere(*args, **kwargs):
    """F.scaled_dot_product_attention while a switch is on, in threads without a mode of their own
    too.
    """
    for switch in _switches[-1:]:
        if torch.compiler.is_compiling() or not any(
            isinstance(mode, replace_sdpa) for mode in _modes()
        ):
            return _call(switch.strict, switch.backend, *args, **kwargs)
    return _TORCH_SDPA(*args, **kwargs)  # a mode of this thread sees it


def _modes() -> list:
    """The TorchFunctionModes of this thread, innermost last."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)]


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
