"""DTensor: attention sharded over batch (Shard(0)) or heads (Shard(1)) needs no communication;
this says so to torch.

q [B, Hq, Sq, D], k, v [B, Hk, Sk, D].  Sequence sharding, dropout (its mask is keyed on the global
batch and head) and varlen fall back to replication.  `register` is called by `execute` when
the first DTensor may have arrived.
"""

from __future__ import annotations

import functools

import torch


def _broadcastable(tensor, dim: int, whole, shard):
    """`shard` for a mask or bias unless it is broadcast along `dim`; None where absent."""
    if tensor is None:
        return None
    return shard if tensor.shape[dim] > 1 else whole


def _input_placements(tensors, dim: int, whole, make_shard) -> list:
    """Placements of the twelve tensors when batch (dim 0) or heads (dim 1) are sharded."""
    shard = make_shard(dim)
    _, _, _, mask, bias, alibi, sink, _rng_state, _cu_q, _cu_k, seqlens_k, block_table = tensors
    per_head = None if sink is None else (whole if dim == 0 else make_shard(0))
    slopes = None
    if alibi is not None:
        per_batch = len(alibi.shape) == 2
        slopes = (shard if per_batch else whole) if dim == 0 else make_shard(1 if per_batch else 0)
    lengths = None if seqlens_k is None else (shard if dim == 0 else whole)
    pages = None if block_table is None else whole
    return [
        shard, shard, shard, _broadcastable(mask, dim, whole, shard),
        _broadcastable(bias, dim, whole, shard), slopes, per_head, None, None, None, lengths, pages,
    ]  # fmt: skip


def _shardable_dims(tensors) -> list[int]:
    """Which of batch (0) and heads (1) may be sharded for these arguments."""
    q, k = tensors[0], tensors[1]
    if len(q.shape) == 3 or tensors[7] is not None:  # varlen, dropout
        return []
    parts = q.mesh.size()
    dims = []
    if tensors[11] is None:  # pages belong to no batch entry
        dims.append(0)
    if q.shape[1] % parts == 0 and k.shape[1] % parts == 0:  # query heads stay with their key head
        dims.append(1)
    return dims


@functools.cache
def register() -> None:
    """Tell DTensor the shardings of both ops; once per process."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole = Replicate()

    def replicated(arguments) -> list:
        return [whole if hasattr(a, "placements") else None for a in arguments]

    @register_sharding(torch.ops.attn_ext.forward.default)
    def _forward(*arguments):
        tensors, need_stats = arguments[:12], arguments[20]
        found = [([whole] * 4, replicated(arguments))]
        for dim in _shardable_dims(tensors):
            shard = Shard(dim)
            rows = shard if need_stats else whole  # absent statistics are empty tensors
            inputs = _input_placements(tensors, dim, whole, Shard)
            found.append(([shard, shard, rows, rows], inputs + [None] * (len(arguments) - 12)))
        return found

    @register_sharding(torch.ops.attn_ext.backward.default)
    def _backward(*arguments):
        dlse, tensors, needs = arguments[1], arguments[4:16], arguments[-1]
        bias, sink = tensors[4], tensors[6]
        found = [([whole] * 5, replicated(arguments))]
        for dim in _shardable_dims(tensors):
            shard = Shard(dim)
            dq, dk, dv = (shard if need else whole for need in needs[:3])
            # what was not sharded with the batch or the heads sums over the devices
            dbias = dsink = whole
            if needs[3]:
                dbias = shard if bias.shape[dim] > 1 else Partial()
            if needs[4] and sink is not None:
                dsink = Partial() if dim == 0 else Shard(0)
            inputs = [shard, None if dlse is None else shard, shard, shard]
            inputs += _input_placements(tensors, dim, whole, Shard)
            found.append(([dq, dk, dv, dbias, dsink], inputs + [None] * (len(arguments) - 16)))
        return found
