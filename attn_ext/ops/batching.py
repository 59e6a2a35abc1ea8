"""The vmap rules of the operators.

vmap folds the mapped dimension into the batch: [N, B, H, S, D] -> [N * B, H, S, D]; what does not
fold (varlen, caches, a sink, slopes or w per example, dropout, whose mask is keyed on the batch
index) runs example by example.
"""

from __future__ import annotations

import torch

from attn_ext.core.schema import FIELDS, GRADIENTS, TENSORS, Call, Needs, Rows, Tangents

_UNFOLDABLE = ("cu_seqlens_q", "cu_seqlens_k", "seqlens_k", "block_table", "frame")
_PER_HEAD = ("alibi_slopes", "sink", "w")  # folded only where all examples share them
_ROWS = 4  # dout, dlse, out, lse, before the fields of the call


def _dims(in_dims) -> Call:
    """Where the mapped dimension of each tensor is, under the tensors' names."""
    return Call(*in_dims[:TENSORS])


def _one_by_one(operator, inputs, in_dims, n: int) -> tuple:
    """The outputs of an operator for each of n examples, stacked."""

    def example(value, dim, i):
        mapped = isinstance(value, torch.Tensor) and dim is not None
        return value.select(dim, i) if mapped else value

    parts = [
        operator(*(example(x, d, i) for x, d in zip(inputs, in_dims, strict=True)))
        for i in range(n)
    ]
    return tuple(torch.stack(p) for p in zip(*parts, strict=True))


def _to_front(value, dim, n: int):
    """`value` with its mapped dimension first, expanded to n where it had none."""
    return value.unsqueeze(0).expand(n, *value.shape) if dim is None else value.movedim(dim, 0)


def _fold(value, dim, n: int):
    """[N, B, ...] -> [N * B, ...]."""
    return _to_front(value, dim, n).flatten(0, 1)


def _fold_all(values, dims, n: int) -> list:
    """Each of the values that are there, folded."""
    return [None if x is None else _fold(x, d, n) for x, d in zip(values, dims, strict=True)]


def _fold_scores(value, dim, n: int, batch: int, per_example: bool):
    """A mask or bias [b, h, sq, sk], b in {1, B}: stays broadcast over the batch where it can."""
    if value is None:
        return None
    if dim is None and value.shape[0] == 1 and not per_example:
        return value
    front = _to_front(value, dim, n)
    return front.expand(n, batch, *front.shape[2:]).flatten(0, 1)


def _foldable(call: Call, dims: Call) -> bool:
    return (
        call.dropout_p == 0
        and all(getattr(call, name) is None for name in _UNFOLDABLE)
        and all(getattr(dims, name) is None for name in _PER_HEAD)
        and (call.alibi_slopes is None or call.alibi_slopes.dim() == 1)
    )


def _folded(call: Call, dims: Call, n: int, batch: int, per_example_bias: bool) -> Call:
    return call._replace(
        q=_fold(call.q, dims.q, n),
        k=_fold(call.k, dims.k, n),
        v=_fold(call.v, dims.v, n),
        mask=_fold_scores(call.mask, dims.mask, n, batch, False),
        bias=_fold_scores(call.bias, dims.bias, n, batch, per_example_bias),
    )


def _batch_size(q, dim) -> int:
    """The batch size of one example's q."""
    return q.shape[0] if dim is None or dim > 0 else q.shape[1]


def _unfolded(tensor, n: int, batch: int):
    """[N * B, ...] -> [N, B, ...]; an absent output stays empty."""
    return tensor.unflatten(0, (n, batch)) if tensor.dim() > 1 else tensor.expand(n, 0)


def forward(info, in_dims, *fields):
    """The rule of `attn_ext::forward`."""
    operator, n = torch.ops.attn_ext.forward, info.batch_size
    call, dims = Call(*fields), _dims(in_dims)
    if not _foldable(call, dims):
        return _one_by_one(operator, fields, in_dims, n), (0,) * 4
    batch = _batch_size(call.q, dims.q)
    outs = operator(*_folded(call, dims, n, batch, False))
    return tuple(_unfolded(o, n, batch) for o in outs), (0,) * 4


def backward(info, in_dims, *inputs):
    """The rule of `attn_ext::backward`, by which vmap(grad(f)) batches gradients."""
    operator, n = torch.ops.attn_ext.backward, info.batch_size
    call, dims = Call(*inputs[_ROWS:-1]), _dims(in_dims[_ROWS:])
    needs = Needs(*inputs[-1])
    if not _foldable(call, dims) or needs.sink or needs.w:  # sums over each example alone
        return _one_by_one(operator, inputs, in_dims, n), (0,) * len(GRADIENTS)
    batch = _batch_size(call.q, dims.q)
    rows = _fold_all(inputs[:_ROWS], in_dims[:_ROWS], n)
    folded = _folded(call, dims, n, batch, needs.bias)
    grads = operator(*rows, *folded, list(needs))
    found = _unfolded_gradients(call, dims, grads, needs, n, batch)
    return found, (0,) * len(GRADIENTS)


def _unfolded_gradients(call: Call, dims: Call, grads, needs: Needs, n: int, batch: int) -> tuple:
    """The gradients of a folded call, one for each example.  Those of sink and w are empty."""
    found = dict(zip(GRADIENTS, grads, strict=True))
    if needs.bias:
        found["bias"] = _unfolded_bias(call.bias, dims.bias, found["bias"], n, batch)
    else:
        found["bias"] = found["bias"].expand(n, 0)
    for name in ("q", "k", "v"):
        found[name] = _unfolded(found[name], n, batch)
    for name in ("sink", "w"):
        found[name] = found[name].expand(n, 0)
    return tuple(found.values())


def _unfolded_bias(bias, dim, dbias, n: int, batch: int):
    """The gradient of each example's bias [b, h, sq, sk], b in {1, B}."""
    dbias = dbias.unflatten(0, (n, batch))
    size = bias.shape[0] if dim is None else bias.movedim(dim, 0).shape[1]
    # one bias for the whole batch of an example: its gradient is the sum
    return dbias.sum(1, keepdim=True) if size == 1 and batch > 1 else dbias


def _of_tangents(values) -> Tangents:
    """The tangents, or their dimensions, among what begins with the fields of a call."""
    return Tangents(*values[len(FIELDS) : len(FIELDS) + len(GRADIENTS)])


def _folded_tangents(given: Tangents, dims: Tangents, n: int, batch: int) -> list:
    *rows, bias, _, _ = given
    of_rows = _fold_all(rows, dims[: len(rows)], n)
    return [*of_rows, _fold_scores(bias, dims.bias, n, batch, True), given.sink, given.w]


def tangent(info, in_dims, *inputs):
    """The rule of `attn_ext::tangent`, by which jacfwd batches tangents."""
    operator, n = torch.ops.attn_ext.tangent, info.batch_size
    call, dims = Call(*inputs[2 : 2 + len(FIELDS)]), _dims(in_dims[2:])
    given, of_given = _of_tangents(inputs[2:]), _of_tangents(in_dims[2:])
    if not _foldable(call, dims) or of_given.sink is not None:
        return _one_by_one(operator, inputs, in_dims, n), (0, 0)
    batch = _batch_size(call.q, dims.q)
    folded = _folded(call, dims, n, batch, given.bias is not None)
    rows = _fold_all(inputs[:2], in_dims[:2], n)
    outs = operator(*rows, *folded, *_folded_tangents(given, of_given, n, batch))
    return tuple(_unfolded(o, n, batch) for o in outs), (0, 0)


def backward_tangent(info, in_dims, *inputs):
    """The rule of `attn_ext::backward_tangent`, by which hessian batches tangents."""
    operator, n, begin = torch.ops.attn_ext.backward_tangent, info.batch_size, len(Rows._fields)
    rest, rest_dims = inputs[begin:], in_dims[begin:]
    call, dims = Call(*rest[: len(FIELDS)]), _dims(rest_dims)
    given, of_given = _of_tangents(rest), _of_tangents(rest_dims)
    needs, primal = Needs(*rest[-2]), Needs(*rest[-1])
    sums = needs.sink or primal.sink or of_given.sink is not None  # over each example alone
    if not _foldable(call, dims) or sums:
        return _one_by_one(operator, inputs, in_dims, n), (0,) * (2 * len(GRADIENTS))
    batch = _batch_size(call.q, dims.q)
    per_example_bias = needs.bias or primal.bias or given.bias is not None
    folded = _folded(call, dims, n, batch, per_example_bias)
    outs = operator(
        *_fold_all(inputs[:begin], in_dims[:begin], n), *folded,
        *_folded_tangents(given, of_given, n, batch), list(needs), list(primal),
    )  # fmt: skip
    found = []
    for grads, wanted in ((outs[: len(GRADIENTS)], needs), (outs[len(GRADIENTS) :], primal)):
        found += _unfolded_gradients(call, dims, grads, wanted, n, batch)
    return tuple(found), (0,) * len(found)
