"""Serving and counting the calls of torch's scaled_dot_product_attention that `replace_sdpa` takes.

`call` serves a call, or leaves it to torch with one warning that says why, or raises with
strict=True.
"""

from __future__ import annotations

import functools
import math
import re
import threading
import warnings
from collections import Counter
from typing import NamedTuple

import torch

from attn_ext.backends import registry
from attn_ext.core import validate
from attn_ext.core.problem import Problem
from attn_ext.core.schema import TOP_LEFT
from attn_ext.functional import jagged
from attn_ext.functional.common import autocasting
from attn_ext.functional.sdpa import as_mask, is_causal_bias, serve
from attn_ext.integrations import sdpa_scopes as scopes

TORCH_SDPA = torch._C._nn.scaled_dot_product_attention

_lock = threading.Lock()
_served: Counter = Counter()
_to_torch: Counter = Counter()
_compiled: Counter = Counter()
_warned: set = set()


class Report(NamedTuple):
    """Calls since the last `reset`."""

    served: dict  # backend -> eager calls that it served; "torch": where that is the fastest
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


def not_served_in_hook(strict: bool) -> None:
    """What a block does about a hook that may be its own, where that cannot be told."""
    why = (
        "it is called by a hook, and backward() runs in another thread than a replace_sdpa block "
        "in which the graph may have been built, or thousands of blocks after it: call backward() "
        "in that thread and earlier, or attention in a replace_sdpa block within the hook"
    )
    if strict:
        raise NotImplementedError(why)
    _left_to_torch(why, _to_torch)


@functools.lru_cache(maxsize=4096)
def _serving(
    backend, device, index, dtype, heads, grouped, seqlen_q, seqlen_k, dim, dim_v, grad, flags
) -> str:  # fmt: skip
    """The name of the backend that serves such a call; NotImplementedError where none does."""
    causal, mask, bias, bias_grad, dropout = flags
    problem = Problem(
        "dense", device, dtype, 1, heads, 1 if grouped else heads, seqlen_q, seqlen_k, dim, dim_v,
        causal=causal, align=TOP_LEFT, mask=mask, bias=bias, bias_grad=bias_grad, dropout=dropout,
        grad=grad, device_index=index,
    )  # fmt: skip
    name = registry.select(backend, problem)
    if name == "reference" != backend:
        why = "; ".join(
            f"{c}: {', '.join(registry.reasons(c, problem))}"
            for c in registry.ORDER
            if c != "reference"
        )
        raise NotImplementedError(f"no kernel can serve this call: {why}")
    return name


def forget() -> None:
    """Choose backends again."""
    _serving.cache_clear()


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
        backend, device.type, device.index or 0, dtype, math.prod(query.shape[:-2]),
        query.dim() > 2 and key.dim() > 2 and query.shape[-3] != key.shape[-3],
        query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1], grad or bias_grad,
        (bool(is_causal), mask, bias, bias_grad, dropout_p > 0),
    )  # fmt: skip


def _traced_reason(backend: str, device: str, dtype: torch.dtype, count: bool = True) -> str:
    """Runs while torch.compile traces: why this call stays torch's, "" if attn_ext takes it."""
    why = MATH_ONLY if _only_math() else ""
    try:
        if dtype != torch.float64 and autocasting(device):
            dtype = torch.get_autocast_dtype(device)
        if not why:
            _serving(backend, device, 0, dtype, 1, False, 64, 64, 64, 64, False, (False,) * 5)
    except NotImplementedError as error:
        why = str(error)
    if not count:
        return why
    if why:
        _left_to_torch(why, _compiled)
    else:
        with _lock:
            _compiled["attn_ext"] += 1
    return why


# torch.compiler.assume_constant_result by hand: it imports the compiler, a second of every import.
_traced_reason._dynamo_marked_constant = True


def _in_compiler(query) -> bool:
    """Whether torch.compile traces this call: Dynamo, or what traces Dynamo's graph later."""
    if torch.compiler.is_compiling():
        return True
    if type(query) is torch.Tensor or not type(query).__module__.startswith("torch._subclasses"):
        return False
    return torch._guards.TracingContext.try_get() is not None


def _first_look() -> bool:
    """Whether a compiler at work only looks at shapes, and will trace the call later: Dynamo at
    nodes that it does not look into, and what gathers facts of a graph before it is traced.
    """
    if torch.compiler.is_dynamo_compiling():
        return False
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None


def call(
    strict, backend, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    enable_gqa=False,
):  # fmt: skip
    """One call of scaled_dot_product_attention, here or by torch."""
    options = (attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if _in_compiler(query):
        count = not _first_look()
        why = _traced_reason(backend, query.device.type, query.dtype, count)
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
        attn_mask = as_mask(attn_mask, query.device)  # torch's own may read uninitialised elements
    if torch.compiler.is_dynamo_compiling():
        return TORCH_SDPA(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip
    with scopes.within(None):
        return TORCH_SDPA(
            query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal,
            scale=scale, enable_gqa=enable_gqa,
        )  # fmt: skip


def _eager(backend, query, key, value, *options):
    probe = (query, key, value)
    if query.__class__ is not torch.Tensor and jagged.is_jagged(*probe):
        probe = jagged.values(*probe)
    name = _backend(backend, *probe, *options[:3])
    with _lock:  # before the call: a checkpoint's recomputation leaves it by an exception
        _served[name] += 1
    try:
        return serve(query, key, value, *options, backend)
    except (NotImplementedError, ValueError, TypeError):
        with _lock:
            _served[name] -= 1
            if not _served[name]:
                del _served[name]
        raise
