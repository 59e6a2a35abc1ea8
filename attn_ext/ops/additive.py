"""The operators `attn_ext::additive` and `attn_ext::additive_backward`, and the choice of backend;
they work as those in `attn_ext.ops.execute`.

The flat arguments are ten tensors (q, k, v, w [Hq, D], mask, bias, rng_state, cu_seqlens_q,
cu_seqlens_k, lengths) and max_seqlen_q, max_seqlen_k, dropout_p, align, window_left, window_right,
backend.  Under torch.func an autograd.Function with a vmap rule goes around them.
"""

from __future__ import annotations

import torch

from attn_ext.backends import registry
from attn_ext.core import reference, validate
from attn_ext.core.call import Call, Problem
from attn_ext.core.layout import empty_like_layout
from attn_ext.ops import batching, execute, rules

BACKENDS = ("triton", "cpu", "reference")
TENSORS = 10
GRADS = (0, 1, 2, 3, 5)  # positions of q, k, v, w, bias
_BIAS = 5
_FIELDS = (
    "Tensor q, Tensor k, Tensor v, Tensor w, Tensor? mask, Tensor? bias, Tensor? rng_state, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? lengths, SymInt max_seqlen_q, "
    "SymInt max_seqlen_k, float dropout_p, int align, SymInt window_left, SymInt window_right, "
    "str backend"
)


def call_of(args: tuple) -> Call:
    """The call without its w: scale 1, everything else of softmax attention off."""
    q, k, v, _, mask, bias, rng, cu_q, cu_k, lengths = args[:TENSORS]
    longest_q, longest_k, dropout_p, align, left, right, _ = args[TENSORS:]
    return Call(
        q=q, k=k, v=v, mask=mask, bias=bias, rng_state=rng, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        seqlens_k=lengths, max_seqlen_q=longest_q, max_seqlen_k=longest_k, scale=1.0,
        dropout_p=dropout_p, align=align, window_left=left, window_right=right,
    )  # fmt: skip


def unsupported(name: str, call: Call) -> list[str]:
    """Why backend `name` cannot serve additive attention of `call`."""
    if name not in BACKENDS and registry.get(name):  # get: ValueError for an unknown name
        return [f"additive attention has no {name} kernel"]
    return registry.reasons(name, Problem.of(call))


def select(name: str, call: Call) -> str:
    """The backend that serves `call`; NotImplementedError with the reasons where there is none."""
    if name == "auto":
        problem = Problem.of(call)
        able = (n for n in BACKENDS if registry.automatic(n, problem) and not unsupported(n, call))
        return next(able)
    why = unsupported(name, call)
    if why:
        raise NotImplementedError(f"backend {name!r} cannot serve this call: {'; '.join(why)}")
    return name


def forward(*args) -> tuple:
    """(out, lse) of real tensors, below autograd."""
    call, w = call_of(args), args[3]
    name = select(args[-1], call)
    if name == "reference":
        registry.warn_of_reference(args[-1], name, Problem.of(call))
    validate.values(call, "lengths")
    if name == "cpu":
        return registry.get("cpu").family_forward(call, w.contiguous())
    if name == "triton":
        return registry.get("triton").additive_forward(call, w)
    out, lse, _, _ = reference.attend(call, w)
    return _conform(out, empty_like_layout(call.q, call.v.shape[-1])), lse.contiguous()


def backward(dout, dlse, out, lse, *rest) -> tuple:
    """(dq, dk, dv, dw, dbias) of real tensors; dbias is empty where it is not wanted."""
    args, bias_grad = rest[:-1], rest[-1]
    call, w = call_of(args), args[3]
    name = select(args[-1], call)
    if name == "cpu":
        needs = (True, True, True, bias_grad)
        dq, dk, dv, dbias, dw = registry.get("cpu").family_backward(
            call, w.contiguous(), dout, out, lse, dlse, needs
        )
    elif name == "triton":
        dq, dk, dv, dbias, dw = registry.get("triton").additive_backward(
            call, w, dout, out, lse, dlse, bias_grad
        )
    else:
        dq, dk, dv, dbias, dw = _reference_backward(call, w, dout, dlse, bias_grad)
    return dq, dk, dv, dw, call.q.new_empty((0,)) if dbias is None else dbias


def _reference_backward(call: Call, w, dout, dlse, bias_grad: bool) -> tuple:
    given = [call.q, call.k, call.v, *([call.bias] if bias_grad else []), w]
    leaves = [x.detach().requires_grad_() for x in given]
    with reference.recording():
        call.q, call.k, call.v = leaves[:3]
        call.bias = leaves[3] if bias_grad else call.bias
        outputs = reference.attend(call, leaves[-1])[:2]
    seeds = (dout, torch.zeros_like(outputs[1]) if dlse is None else dlse.to(outputs[1].dtype))
    pairs = [(o, g) for o, g in zip(outputs, seeds, strict=True) if o.requires_grad]
    found = [None] * len(leaves)
    if pairs:
        outs, grads = zip(*pairs, strict=True)
        found = torch.autograd.grad(outs, leaves, grads, allow_unused=True)
    grads = [
        torch.zeros_like(x) if g is None else _conform(g, empty_like_layout(x, x.shape[-1]))
        for x, g in zip(leaves, found, strict=True)
    ]
    return (*grads[:3], grads[3] if bias_grad else None, grads[-1])


def _conform(tensor, promised):
    return tensor if tensor.stride() == promised.stride() else promised.copy_(tensor)


def _outputs(args: tuple) -> tuple:
    q, v = args[0], args[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[1], q.shape[0]) if args[7] is not None else q.shape[:3]
    return empty_like_layout(q, v.shape[-1]), q.new_empty(shape, dtype=dtype)


def _gradients(args: tuple, bias_grad: bool) -> tuple:
    w, bias = args[3], args[_BIAS]
    return (
        *(empty_like_layout(x, x.shape[-1]) for x in args[:3]),
        w.new_empty(w.shape),
        bias.new_empty(bias.shape) if bias_grad else args[0].new_empty((0,)),
    )


_tags = tuple(execute._TAGS)
execute.lib.define(f"additive({_FIELDS}) -> (Tensor out, Tensor lse)", tags=_tags)
execute.lib.define(
    f"additive_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, {_FIELDS}, "
    "bool bias_grad) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dw, Tensor dbias)",
    tags=_tags,
)


def _checked(args: tuple) -> tuple:
    """The flat arguments of a call by the dispatcher with their true lengths: see
    `ops.checked_lengths`.
    """
    q, k, v, w, mask, bias, rng_state, cu_seqlens_q, cu_seqlens_k, lengths = args[:TENSORS]
    true = execute.checked_lengths(
        q, k, v, mask, bias, rng_state, cu_seqlens_q, cu_seqlens_k, lengths, None, *args[10:13]
    )
    want = (q.shape[1], q.shape[-1])
    if tuple(w.shape) != want:
        raise ValueError(f"w must have shape {want}, got {tuple(w.shape)}")
    return (*args[:10], *true, *args[12:])


def _forward_kernel(*args):
    args = _checked(args)
    return tuple(_conform(t, p) for t, p in zip(forward(*args), _outputs(args), strict=True))


def _backward_kernel(dout, dlse, out, lse, *rest):
    args, bias_grad = _checked(rest[:-1]), rest[-1]
    execute.check_results(args[0], args[2], dout, dlse, out, lse, args[7])
    promised = _gradients(args, bias_grad)
    found = backward(dout, dlse, out, lse, *args, bias_grad)
    return tuple(_conform(t, p) for t, p in zip(found, promised, strict=True))


for _device in ("CPU", "CUDA"):
    execute.lib.impl("additive", _forward_kernel, _device)
    execute.lib.impl("additive_backward", _backward_kernel, _device)


@torch.library.register_fake("attn_ext::additive", lib=execute.lib)
def _fake(*args):
    return _outputs(args)


@torch.library.register_fake("attn_ext::additive_backward", lib=execute.lib)
def _backward_fake(dout, dlse, out, lse, *rest):
    return _gradients(rest[:-1], rest[-1])


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.rest = inputs[TENSORS:]
    ctx.set_materialize_grads(False)


def _scatter(needs, found, count: int) -> tuple:
    grads: list = [None] * count
    for index, grad in zip(GRADS, found, strict=True):
        if needs[index]:
            grads[index] = grad
    return tuple(grads)


def _autograd(ctx, dout, dlse):
    *tensors, out, lse = ctx.saved_tensors
    count = TENSORS + len(ctx.rest)
    if dout is None and dlse is None:
        return (None,) * count
    dout = torch.zeros_like(out) if dout is None else dout
    bias_grad = bool(ctx.needs_input_grad[_BIAS])
    found = torch.ops.attn_ext.additive_backward(
        dout, dlse, out, lse, *tensors, *ctx.rest, bias_grad
    )
    return _scatter(ctx.needs_input_grad, found, count)


rules.derivative(execute.lib, "additive", _setup_context, _autograd)
rules.derivative(execute.lib, "additive_backward", execute.no_context, execute.no_double_backward)


def run(args: tuple) -> tuple:
    """(out, lse) of flat op arguments."""
    if torch.compiler.is_compiling():
        return torch.ops.attn_ext.additive(*args)
    for observe in execute.observers:
        observe(call_of(args), args[3])
    return torch.ops.attn_ext.additive(*args)


def _foldable(dims, tensors, rest) -> bool:
    """Whether the mapped dimension can join the batch: w shared, no packing, lengths or dropout."""
    return dims[3] is None and rest[2] == 0 and all(x is None for x in tensors[6:])


def _folded(dims, tensors, n: int) -> tuple:
    batch = batching.batch_size(tensors[0], dims[0])
    q, k, v, w, mask, bias = tensors[:6]
    return (
        *(batching.fold(x, d, n) for x, d in zip((q, k, v), dims[:3], strict=True)), w,
        batching.fold_scores(mask, dims[4], n, batch, False),
        batching.fold_scores(bias, dims[5], n, batch, False),
        *tensors[6:],
    )  # fmt: skip


def _vmap_forward(info, in_dims, *inputs):
    """The vmap rule of `attn_ext::additive`."""
    n, tensors, rest, dims = info.batch_size, inputs[:TENSORS], inputs[TENSORS:], in_dims[:TENSORS]
    operator = torch.ops.attn_ext.additive
    if not _foldable(dims, tensors, rest):
        return batching.one_by_one(operator, tensors, dims, rest, n), (0, 0)
    outs = operator(*_folded(dims, tensors, n), *rest)
    return tuple(o.unflatten(0, (n, o.shape[0] // n)) for o in outs), (0, 0)


def _vmap_backward(info, in_dims, *inputs):
    """The vmap rule of `attn_ext::additive_backward`: example by example, since each has a
    gradient of w of its own.
    """
    count, operator = 4 + TENSORS, torch.ops.attn_ext.additive_backward
    found = batching.one_by_one(
        operator, inputs[:count], in_dims[:count], inputs[count:], info.batch_size
    )
    return found, (0,) * 5


torch.library.register_vmap("attn_ext::additive", _vmap_forward, lib=execute.lib)
torch.library.register_vmap("attn_ext::additive_backward", _vmap_backward, lib=execute.lib)
