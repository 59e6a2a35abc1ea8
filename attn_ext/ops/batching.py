"""The vmap rules of `attn_ext::forward` and `attn_ext::backward`.

vmap folds the mapped dimension into the batch: [N, B, H, S, D] -> [N * B, H, S, D]; what does not
fold (varlen, caches, a sink, slopes or w per example, dropout, whose mask is keyed on the batch
index) runs example by example.
"""

from __future__ import annotations

import torch

from attn_ext.core.schema import GRADIENTS, TENSORS, Call, Needs

_UNFOLDABLE = ("cu_seqlens_q", "cu_seqlens_k", "seqlens_k", "block_table")
_PER_HEAD = ("alibi_slopes", "sink", "w")  # folded only where all examples share them
_ROWS = 4  # dout, dlse, out, lse, before the fields of the call


def _dims(in_dims) -> Call:
    """Where the mapped dimension of each tensor is, under the tensors' names."""
    return Call(*in_dims[:TENSORS])


def _slice(value, dim, n):
    return value if value is None or dim is None else value.select(dim, n)


def _one_by_one(operator, values, dims, rest, n: int) -> tuple:
    """The outputs of an operator for each of n examples, stacked."""
    parts = [
        operator(*(_slice(x, d, i) for x, d in zip(values, dims, strict=True)), *rest)
        for i in range(n)
    ]
    return tuple(torch.stack(p) for p in zip(*parts, strict=True))


def _to_front(value, dim, n: int):
    """`value` with its mapped dimension first, expanded to n where it had none."""
    return value.unsqueeze(0).expand(n, *value.shape) if dim is None else value.movedim(dim, 0)


def _fold(value, dim, n: int):
    """[N, B, ...] -> [N * B, ...]."""
    return _to_front(value, dim, n).flatten(0, 1)


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
        found = _one_by_one(operator, fields[:TENSORS], in_dims[:TENSORS], fields[TENSORS:], n)
        return found, (0,) * 4
    batch = _batch_size(call.q, dims.q)
    outs = operator(*_folded(call, dims, n, batch, False))
    return tuple(_unfolded(o, n, batch) for o in outs), (0,) * 4


def backward(info, in_dims, *inputs):
    """The rule of `attn_ext::backward`, by which vmap(grad(f)) batches gradients."""
    operator, n = torch.ops.attn_ext.backward, info.batch_size
    call, dims = Call(*inputs[_ROWS:-1]), _dims(in_dims[_ROWS:])
    needs = Needs(*inputs[-1])
    if not _foldable(call, dims) or needs.sink or needs.w:  # sums over each example alone
        count = _ROWS + TENSORS
        found = _one_by_one(operator, inputs[:count], in_dims[:count], inputs[count:], n)
        return found, (0,) * len(GRADIENTS)
    batch = _batch_size(call.q, dims.q)
    rows = [
        None if r is None else _fold(r, d, n)
        for r, d in zip(inputs[:_ROWS], in_dims[:_ROWS], strict=True)
    ]
    folded = _folded(call, dims, n, batch, needs.bias)
    grads = dict(zip(GRADIENTS, operator(*rows, *folded, list(needs)), strict=True))
    if needs.bias:
        grads["bias"] = _unfolded_bias(call.bias, dims.bias, grads["bias"], n, batch)
    else:
        grads["bias"] = grads["bias"].expand(n, 0)
    for name in ("q", "k", "v"):
        grads[name] = _unfolded(grads[name], n, batch)
    for name in ("sink", "w"):
        grads[name] = grads[name].expand(n, 0)
    return tuple(grads.values()), (0,) * len(GRADIENTS)


def _unfolded_bias(bias, dim, dbias, n: int, batch: int):
    """The gradient of each example's bias [b, h, sq, sk], b in {1, B}."""
    dbias = dbias.unflatten(0, (n, batch))
    size = bias.shape[0] if dim is None else bias.movedim(dim, 0).shape[1]
    # one bias for the whole batch of an example: its gradient is the sum
    return dbias.sum(1, keepdim=True) if size == 1 and batch > 1 else dbias
