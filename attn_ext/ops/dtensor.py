"""DTensor: attention sharded over batch (Shard(0)) or heads (Shard(1)) needs no communication;
this says so to torch.

q [B, Hq, Sq, D], k, v [B, Hk, Sk, D].  Sequence sharding, dropout (its mask is keyed on the global
batch and head) and varlen fall back to replication.  `register` is called by `route` when
the first DTensor may have arrived.
"""

from __future__ import annotations

import functools

import torch

from attn_ext.core.schema import FIELDS, GRADIENTS, Call, Needs


def _broadcastable(tensor, dim: int, whole, shard):
    """`shard` for a mask or bias unless it is broadcast along `dim`; None where absent."""
    if tensor is None:
        return None
    return shard if tensor.shape[dim] > 1 else whole


def _input_placements(call: Call, dim: int, whole, make_shard) -> list:
    """Placements of the fields when batch (dim 0) or heads (dim 1) are sharded; None for those that
    are absent, or no tensors.
    """
    shard = make_shard(dim)
    per_head = whole if dim == 0 else make_shard(0)
    slopes = None
    if call.alibi_slopes is not None:
        per_batch = len(call.alibi_slopes.shape) == 2
        slopes = (shard if per_batch else whole) if dim == 0 else make_shard(1 if per_batch else 0)
    placed = {
        "q": shard, "k": shard, "v": shard,
        "mask": _broadcastable(call.mask, dim, whole, shard),
        "bias": _broadcastable(call.bias, dim, whole, shard),
        "alibi_slopes": slopes,
        "sink": None if call.sink is None else per_head,
        "w": None if call.w is None else per_head,
        "seqlens_k": None if call.seqlens_k is None else (shard if dim == 0 else whole),
        "block_table": None if call.block_table is None else whole,
    }  # fmt: skip
    return [placed.get(name) for name in FIELDS]


def _shardable_dims(call: Call) -> list[int]:
    """Which of batch (0) and heads (1) may be sharded for these arguments."""
    if len(call.q.shape) == 3 or call.rng_state is not None:  # varlen, dropout
        return []
    parts = call.q.mesh.size()
    dims = []
    if call.block_table is None:  # pages belong to no batch entry
        dims.append(0)
    # query heads stay with their key head
    if call.q.shape[1] % parts == 0 and call.k.shape[1] % parts == 0:
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
    def _forward(*fields):
        call = Call(*fields)
        found = [([whole] * 4, replicated(fields))]
        for dim in _shardable_dims(call):
            shard = Shard(dim)
            rows = shard if call.need_stats else whole  # absent statistics are empty tensors
            found.append(([shard, shard, rows, rows], _input_placements(call, dim, whole, Shard)))
        return found

    @register_sharding(torch.ops.attn_ext.backward.default)
    def _backward(dout, dlse, out, lse, *rest):
        call, needs = Call(*rest[:-1]), Needs(*rest[-1])
        found = [([whole] * len(GRADIENTS), replicated((dout, dlse, out, lse, *rest)))]
        for dim in _shardable_dims(call):
            shard = Shard(dim)
            # what was not sharded with the batch or the heads sums over the devices
            per_head = Partial() if dim == 0 else Shard(0)
            bias = shard if needs.bias and call.bias.shape[dim] > 1 else Partial()
            wanted = {
                "q": shard, "k": shard, "v": shard, "bias": bias, "sink": per_head, "w": per_head,
            }  # fmt: skip
            outputs = [wanted[name] if getattr(needs, name) else whole for name in GRADIENTS]
            inputs = [shard, None if dlse is None else shard, shard, shard]
            inputs += [*_input_placements(call, dim, whole, Shard), None]
            found.append((outputs, inputs))
        return found
