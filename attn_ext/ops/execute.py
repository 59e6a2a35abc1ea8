"""The torch.library operators `attn_ext::forward` and `attn_ext::backward`, and the choice of the
way to them.

Both take the fields of `attn_ext.core.call.Call` flat, then (grad, bias_grad, backend).
scale is None for 1/sqrt(D).  An absent output is an empty tensor.  `run` takes the cheapest way
that is right: straight to the backend in plain eager mode, an autograd.Function when a gradient or
a functorch transform asks for one, else the dispatcher.
"""

from __future__ import annotations

import sys

import torch
from torch._functorch.utils import unwrap_dead_wrappers

from attn_ext.backends import registry
from attn_ext.core import validate
from attn_ext.core.call import Call, Problem
from attn_ext.core.layout import empty_like_layout
from attn_ext.ops import batching, rules

CALL_FIELDS = 25  # of Call; `args` continues with grad, bias_grad, backend
TENSORS = batching.TENSORS
GRADS = (0, 1, 2, 4, 6)  # positions of q, k, v, bias, sink

_FIELDS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sink, "
    "Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? seqlens_k, "
    "Tensor? block_table, SymInt max_seqlen_q, SymInt max_seqlen_k, float? scale, float softcap, "
    "float dropout_p, int align, SymInt window_left, SymInt window_right, bool need_stats, "
    "bool deterministic, str normalizer, float? sigmoid_bias, SymInt num_splits, bool grad, "
    "bool bias_grad, str backend"
)
_TAGS = [torch.Tag.pt2_compliant_tag]
# Inductor must not change strides: the fakes promise outputs in q's memory order.
_TAGS.append(getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order))

lib = torch.library.Library("attn_ext", "DEF")
lib.define(
    f"forward({_FIELDS}) -> (Tensor out, Tensor lse, Tensor max_logit, Tensor entropy)",
    tags=tuple(_TAGS),
)
lib.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_FIELDS}, bool[] needs) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dsink)",
    tags=tuple(_TAGS),
)


def _call(args: tuple) -> Call:
    call = Call(*args[:CALL_FIELDS])
    if call.scale is None:
        call.scale = call.q.shape[-1] ** -0.5
    # Kernels want a contiguous last dimension; other strides are free.
    if call.q.stride(-1) != 1:
        call.q = call.q.contiguous()
    if call.k.stride(-1) != 1:
        call.k = call.k.contiguous()
    if call.v.stride(-1) != 1:
        call.v = call.v.contiguous()
    return call


def backend_of(call: Call, grad: bool, bias_grad: bool, name: str):
    """The backend module that serves `call`."""
    problem = Problem.of(call, grad, bias_grad)
    chosen = registry.select(name, problem)
    registry.warn_of_reference(name, chosen, problem)
    return registry.get(chosen)


_serving: dict = {}  # what a call looks like -> the backend module that serves it


def _serving_backend(call: Call, args: tuple):
    """`backend_of`, remembered by all that it depends on: a lookup is cheaper than a Problem."""
    q, cu_seqlens_q = call.q, call.cu_seqlens_q
    key = (
        q.shape, call.k.shape, call.v.shape, q.dtype, q.device, call.mask is None,
        call.alibi_slopes is None, call.sink is None, call.bias is None, call.seqlens_k is None,
        call.block_table is None, None if cu_seqlens_q is None else cu_seqlens_q.shape,
        args[TENSORS:],
    )  # fmt: skip
    module = _serving.get(key)
    if module is None:
        if len(_serving) >= 4096:
            _serving.clear()
        module = _serving[key] = backend_of(call, *args[CALL_FIELDS:])
    return module


def forward_eager(args: tuple) -> tuple:
    """(out, lse, max_logit | None, entropy | None) of real tensors, below autograd."""
    call = _call(args)
    if call.cu_seqlens_q is not None or call.seqlens_k is not None:
        validate.values(call)
    module = _serving_backend(call, args)
    device = call.q.device.type
    if torch.is_autocast_enabled(device):  # the backend's own operations keep their dtypes
        with torch.autocast(device, enabled=False):
            return module.forward(call)
    return module.forward(call)


def plan_of(args: tuple):
    """What `attn_ext.ops.fast` keeps of a call that has run: the cpu backend's plan, else None."""
    call = _call(args)
    if call.q is not args[0] or call.k is not args[1] or call.v is not args[2]:
        return None  # a copy was made
    module = _serving_backend(call, args)
    return module.plan_of(call) if module is registry.get("cpu") else None


def backward_eager(dout, dlse, out, lse, args: tuple, needs) -> tuple:
    """(dq, dk, dv, dbias, dsink), None where `needs` is False, of real tensors."""
    call = _call(args)
    module = _serving_backend(call, args)
    device = call.q.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            grads = module.backward(call, dout, out, lse, dlse, needs)
    else:
        grads = module.backward(call, dout, out, lse, dlse, needs)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def _conform(tensor, promised):
    """`tensor` with the strides and dtype that the fake promised; copies only where they differ."""
    if tensor is None:
        return promised
    if tensor.stride() == promised.stride() and tensor.dtype == promised.dtype:
        return tensor
    return promised.copy_(tensor)


def _lse_shape(q, cu_seqlens_q) -> tuple:
    return (q.shape[1], q.shape[0]) if cu_seqlens_q is not None else tuple(q.shape[:3])


def _forward_outputs(args: tuple) -> tuple:
    q, v, need_stats = args[0], args[2], args[20]
    shape = _lse_shape(q, args[8])
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = empty_like_layout(q, v.shape[-1])
    rows = [
        q.new_empty(shape if wanted else (0,), dtype=dtype)
        for wanted in (True, need_stats, need_stats)
    ]
    return (out, *rows)


def _backward_outputs(args: tuple, needs) -> tuple:
    q, k, v, bias, sink = (args[i] for i in GRADS)
    dq, dk, dv = (
        empty_like_layout(x, x.shape[-1]) if need else q.new_empty((0,))
        for x, need in zip((q, k, v), needs[:3], strict=True)
    )
    dbias = bias.new_empty(bias.shape) if needs[3] else q.new_empty((0,))
    dsink = sink.new_empty(sink.shape) if needs[4] else q.new_empty((0,))
    return dq, dk, dv, dbias, dsink


def checked_lengths(
    q, k, v, mask, bias, rng_state, cu_seqlens_q, cu_seqlens_k, seqlens_k, block_table, seqlen_q,
    seqlen_k, dropout_p,
) -> tuple:  # fmt: skip
    """(Sq, Sk) as the tensors have them, and the tensors checked against each other.

    A call by the dispatcher may come from a program that was traced for other sizes, so that no
    check of `attn_ext.functional` has seen these; a kernel would read and write past their ends.
    """
    if cu_seqlens_q is not None:
        options = (False, None, None, 0.0, 0.0, None, False, "auto")
        validate.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
        batch = cu_seqlens_q.shape[0] - 1
    elif seqlens_k is not None or block_table is not None:
        validate.decode_shapes(q, k, v, seqlens_k, block_table)
        batch, seqlen_q = q.shape[0], q.shape[2]
        seqlen_k = k.shape[2] * (1 if block_table is None else block_table.shape[1])
    else:
        validate.dense_cached(
            q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, q.device, k.device, v.device,
            False, None, None, 0.0, 0.0, None, False, "auto",
        )  # fmt: skip
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[2], k.shape[2]
    for name, value in (("mask", mask), ("bias", bias)):
        if value is not None:
            is_mask = name == "mask"
            validate.scores(name, value, is_mask, q.device, batch, q.shape[1], seqlen_q, seqlen_k)
    if dropout_p > 0 and (rng_state is None or rng_state.shape != (2,)):
        raise ValueError("rng_state must have shape (2,) with dropout_p above 0")
    return seqlen_q, seqlen_k


def check_results(q, v, dout, dlse, out, lse, cu_seqlens_q) -> None:
    """ValueError or TypeError unless what goes into a backward is as its forward gave it."""
    rows = _lse_shape(q, cu_seqlens_q)
    want_out = (*q.shape[:-1], v.shape[-1])
    given = (
        ("out", out, want_out),
        ("dout", dout, want_out),
        ("lse", lse, rows),
        ("dlse", dlse, rows),
    )
    for name, value, want in given:
        if value is not None and tuple(value.shape) != want:
            raise ValueError(f"{name} must have shape {want}, got {tuple(value.shape)}")
        if value is not None and value.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {value.device}")
    statistics = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, value, dtype in (("out", out, q.dtype), ("lse", lse, statistics)):
        if value.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {value.dtype}")


def _checked(args: tuple) -> tuple:
    """The flat arguments of a call by the dispatcher with their true lengths."""
    q, k, v, mask, bias, alibi_slopes, sink, *rest = args[:TENSORS]
    lengths = checked_lengths(q, k, v, mask, bias, *rest, *args[12:14], args[16])
    heads, batches = q.shape[1], (q.shape[0] if rest[1] is None else rest[1].shape[0] - 1)
    for name, value, shapes in (
        ("alibi_slopes", alibi_slopes, ((heads,), (batches, heads))), ("sink", sink, ((heads,),)),
    ):  # fmt: skip
        if value is not None and tuple(value.shape) not in shapes:
            rule = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {rule}, got {tuple(value.shape)}")
    return (*args[:12], *lengths, *args[14:])


def checked_backward(dout, dlse, out, lse, args: tuple) -> tuple:
    """The flat arguments of a backward with their true lengths; hooks of saved tensors or of
    outputs may have put other tensors in the place of what the forward saved.
    """
    args = _checked(args)
    check_results(args[0], args[2], dout, dlse, out, lse, args[8])
    return args


def _forward_kernel(*args):
    args = _checked(args)
    return tuple(
        _conform(t, p) for t, p in zip(forward_eager(args), _forward_outputs(args), strict=True)
    )


def _backward_kernel(dout, dlse, out, lse, *rest):
    args, needs = checked_backward(dout, dlse, out, lse, rest[:-1]), rest[-1]
    grads = backward_eager(dout, dlse, out, lse, args, needs)
    return tuple(_conform(t, p) for t, p in zip(grads, _backward_outputs(args, needs), strict=True))


for _device in ("CPU", "CUDA"):
    lib.impl("forward", _forward_kernel, _device)
    lib.impl("backward", _backward_kernel, _device)


@torch.library.register_fake("attn_ext::forward", lib=lib)
def _forward_fake(*args):
    return _forward_outputs(args)


@torch.library.register_fake("attn_ext::backward", lib=lib)
def _backward_fake(dout, dlse, out, lse, *rest):
    return _backward_outputs(rest[:-1], rest[-1])


def _setup_context(ctx, inputs, output):
    out, lse, max_logit, entropy = output
    ctx.save_for_backward(*inputs[:TENSORS], out, lse)
    ctx.rest = inputs[TENSORS:]
    ctx.mark_non_differentiable(max_logit, entropy)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse, dmax_logit, dentropy):
    *tensors, out, lse = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in GRADS]
    grads: list = [None] * (TENSORS + len(ctx.rest))
    if dout is None and dlse is None:
        return tuple(grads)
    if dout is None:
        dout = torch.zeros_like(out)
    results = torch.ops.attn_ext.backward(dout, dlse, out, lse, *tensors, *ctx.rest, needs)
    for index, need, grad in zip(GRADS, needs, results, strict=True):
        if need:
            grads[index] = grad
    return tuple(grads)


def no_context(ctx, inputs, output):
    """Nothing is saved for a derivative that raises."""


def no_double_backward(ctx, *grads):
    """The derivative of a backward."""
    raise NotImplementedError(rules.DOUBLE_BACKWARD)


def _recorded(args: tuple) -> tuple:
    """The arguments of a call that is differentiated: while torch.compile traces a transform, no
    tensor says so in time.
    """
    if args[10] is not None or args[11] is not None:  # decode
        return args
    bias_grad = args[4] is not None and args[4].requires_grad
    return (*args[:CALL_FIELDS], True, args[CALL_FIELDS + 1] or bias_grad, args[-1])


rules.derivative(lib, "forward", _setup_context, _backward, _recorded)
rules.derivative(lib, "backward", no_context, no_double_backward)
torch.library.register_vmap("attn_ext::forward", batching.forward, lib=lib)
torch.library.register_vmap("attn_ext::backward", batching.backward, lib=lib)

observers: list = []  # functions of (call, w or None) that see each eager call (inspect.record)
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


def _sides_are_plain(args: tuple) -> bool:
    """Whether mask, bias, slopes, sink, ... are plain too: a subclass may have no memory."""
    return all(x is None or type(x) in _PLAIN for x in args[3:TENSORS])


def wants_grad(q, k, v, bias, sink) -> bool:
    """Whether autograd will ask for a gradient of this call."""
    return torch.is_grad_enabled() and (
        q.requires_grad
        or k.requires_grad
        or v.requires_grad
        or (bias is not None and bias.requires_grad)
        or (sink is not None and sink.requires_grad)
    )


def _differentiable(args: tuple) -> tuple:
    """The arguments of a call that may be differentiated, whatever its tensors say now; a decode
    call never is.
    """
    decode = args[10] is not None or args[11] is not None
    return (*args[:CALL_FIELDS], not decode, not decode and args[4] is not None, args[-1])


def run(args: tuple) -> tuple:
    """(out, lse, max_logit, entropy) of flat op arguments; statistics are None or empty where not
    asked for.
    """
    if torch.compiler.is_compiling():
        return torch.ops.attn_ext.forward(*args)
    if _jit_tracing():
        return torch.ops.attn_ext.forward(*_differentiable(args))
    for observe in observers:
        observe(_call(args), None)
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return torch.ops.attn_ext.forward(*_differentiable(args))
    args = (*unwrap_dead_wrappers(args[:TENSORS]), *args[TENSORS:])  # leaked by a transform
    if torch.autograd.forward_ad._current_level >= 0:
        rules.refuse_tangents(args[index] for index in GRADS)
    if through_dispatcher or not (is_plain(*args[:3]) and _sides_are_plain(args)):
        if "torch.distributed.tensor" in sys.modules:  # a DTensor may be among them
            from attn_ext.ops import dtensor

            dtensor.register()
        return torch.ops.attn_ext.forward(*args)
    if args[CALL_FIELDS]:
        from attn_ext.ops.autograd import EagerAttention

        return EagerAttention.apply(*args[:TENSORS], args[TENSORS:])
    return forward_eager(args)
