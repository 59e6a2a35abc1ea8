"""The vmap rules of `attn_ext::forward` and `attn_ext::backward`.

vmap folds the mapped dimension into the batch: [N, B, H, S, D] -> [N * B, H, S, D]; what does not
fold (varlen, caches, a sink or slopes per example, dropout, whose mask is keyed on the batch index)
runs example by example.
"""

from __future__ import annotations

import torch

TENSORS = 12  # the leading tensor fields of `attn_ext.core.call.Call`
_BIAS, _SINK = 4, 6
_UNFOLDABLE = (8, 9, 10, 11)  # cu_seqlens_q, cu_seqlens_k, seqlens_k, block_table
_DROPOUT_P = TENSORS + 4


def _slice(value, dim, n):
    return value if value is None or dim is None else value.select(dim, n)


def one_by_one(operator, values, dims, rest, n: int) -> tuple:
    """The outputs of an operator for each of n examples, stacked: the vmap rule of what cannot be
    folded."""
    parts = [
        operator(*(_slice(x, d, i) for x, d in zip(values, dims, strict=True)), *rest)
        for i in range(n)
    ]
    return tuple(torch.stack(p) for p in zip(*parts, strict=True))


def _to_front(value, dim, n: int):
    """`value` with its mapped dimension first, expanded to n where it had none."""
    return value.unsqueeze(0).expand(n, *value.shape) if dim is None else value.movedim(dim, 0)


def fold(value, dim, n: int):
    """[N, B, ...] -> [N * B, ...]."""
    return _to_front(value, dim, n).flatten(0, 1)


def fold_scores(value, dim, n: int, batch: int, per_example: bool):
    """A mask or bias [b, h, sq, sk], b in {1, B}: stays broadcast over the batch where it can."""
    if value is None:
        return None
    if dim is None and value.shape[0] == 1 and not per_example:
        return value
    front = _to_front(value, dim, n)
    return front.expand(n, batch, *front.shape[2:]).flatten(0, 1)


def _foldable(dims, tensors, dropout_p, needs_sink: bool) -> bool:
    if dropout_p > 0 or needs_sink:
        return False
    shared = dims[5] is None and dims[_SINK] is None
    return all(tensors[i] is None for i in _UNFOLDABLE) and shared \
        and (tensors[5] is None or tensors[5].dim() == 1)  # fmt: skip


def _folded(dims, tensors, n: int, batch: int, per_example_bias: bool) -> tuple:
    q, k, v, mask, bias = tensors[:5]
    return (
        *(fold(x, d, n) for x, d in zip((q, k, v), dims[:3], strict=True)),
        fold_scores(mask, dims[3], n, batch, False),
        fold_scores(bias, dims[4], n, batch, per_example_bias),
        *tensors[5:],
    )


def batch_size(q, dim) -> int:
    """The batch size of one example's q."""
    return q.shape[0] if dim is None or dim > 0 else q.shape[1]


def forward(info, in_dims, *inputs):
    """The rule of `attn_ext::forward`."""
    operator = torch.ops.attn_ext.forward
    tensors, rest, dims = inputs[:TENSORS], inputs[TENSORS:], in_dims[:TENSORS]
    n, batch = info.batch_size, batch_size(inputs[0], in_dims[0])
    if not _foldable(dims, tensors, inputs[_DROPOUT_P], False):
        return one_by_one(operator, tensors, dims, rest, n), (0,) * 4
    outs = operator(*_folded(dims, tensors, n, batch, False), *rest)
    return tuple(_unfolded(o, n, batch) for o in outs), (0,) * 4


def _unfolded(tensor, n: int, batch: int):
    """[N * B, ...] -> [N, B, ...]; an absent output stays empty."""
    return tensor.unflatten(0, (n, batch)) if tensor.dim() > 1 else tensor.expand(n, 0)


def backward(info, in_dims, *inputs):
    """The rule of `attn_ext::backward`, by which vmap(grad(f)) batches gradients."""
    operator = torch.ops.attn_ext.backward
    n, count = info.batch_size, 4 + TENSORS
    rows, tensors, rest, needs = inputs[:4], inputs[4:count], inputs[count:-1], inputs[-1]
    row_dims, dims = in_dims[:4], in_dims[4:count]
    if not _foldable(dims, tensors, inputs[4 + _DROPOUT_P], needs[4]):
        found = one_by_one(operator, inputs[:count], in_dims[:count], (*rest, needs), n)
        return found, (0,) * 5
    batch = batch_size(tensors[0], dims[0])
    folded_rows = [
        None if r is None else fold(r, d, n) for r, d in zip(rows, row_dims, strict=True)
    ]
    folded = _folded(dims, tensors, n, batch, needs[3])
    *grads, dbias, dsink = operator(*folded_rows, *folded, *rest, needs)
    dq, dk, dv = (_unfolded(g, n, batch) for g in grads)
    dbias = _unfolded_bias(tensors[_BIAS], dims[_BIAS], dbias, n, batch) if needs[3] \
        else dbias.expand(n, 0)  # fmt: skip
    return (dq, dk, dv, dbias, dsink.expand(n, 0)), (0,) * 5


def _unfolded_bias(bias, dim, dbias, n: int, batch: int):
    """The gradient of each example's bias [b, h, sq, sk], b in {1, B}."""
    dbias = dbias.unflatten(0, (n, batch))
    size = bias.shape[0] if dim is None else bias.movedim(dim, 0).shape[1]
    # one bias for the whole batch of an example: its gradient is the sum
    return dbias.sum(1, keepdim=True) if size == 1 and batch > 1 else dbias
