"""DTensor: attention sharded over batch (Shard(0)) or heads (Shard(1)) needs no communication;
this says so to torch.

q [B, Hq, Sq, D], k, v [B, Hk, Sk, D].  Sequence sharding, dropout (its mask is keyed on the global
batch and head) and varlen fall back to replication.  `register` is called by `route` when
the first DTensor may have arrived.
"""

from __future__ import annotations

import functools

import torch

from attn_ext.core.schema import FIELDS, GRADIENT_AT, GRADIENTS, Call, Needs, Rows
from attn_ext.ops.second import call_and_tangents


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
    """Tell DTensor the shardings of the operators; once per process."""
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

    def gradients(call, needs, dim: int) -> list:
        """Placements of gradients, or of their tangents."""
        shard = Shard(dim)
        # what was not sharded with the batch or the heads sums over the devices
        per_head = Partial() if dim == 0 else Shard(0)
        bias = shard if needs.bias and call.bias.shape[dim] > 1 else Partial()
        wanted = {
            "q": shard, "k": shard, "v": shard, "bias": bias, "sink": per_head, "w": per_head,
        }  # fmt: skip
        return [wanted[name] if getattr(needs, name) else whole for name in GRADIENTS]

    def moved(placements: list, tangents) -> list:
        """Placements of tangents, which are those of their inputs."""
        pairs = zip(GRADIENT_AT, tangents, strict=True)
        return [None if x is None else placements[at] for at, x in pairs]

    def rows(given, shard) -> list:
        return [None if x is None else shard for x in given]

    @register_sharding(torch.ops.attn_ext.backward.default)
    def _backward(*inputs):
        given, call, needs = inputs[:4], Call(*inputs[4:-1]), Needs(*inputs[-1])
        found = [([whole] * len(GRADIENTS), replicated(inputs))]
        for dim in _shardable_dims(call):
            placed = _input_placements(call, dim, whole, Shard)
            found.append((gradients(call, needs, dim), [*rows(given, Shard(dim)), *placed, None]))
        return found

    @register_sharding(torch.ops.attn_ext.tangent.default)
    def _tangent(*inputs):
        call, tangents = call_and_tangents(inputs[2:])
        found = [([whole] * 2, replicated(inputs))]
        for dim in _shardable_dims(call):
            shard, placed = Shard(dim), _input_placements(call, dim, whole, Shard)
            found.append(([shard] * 2, [shard, shard, *placed, *moved(placed, tangents)]))
        return found

    @register_sharding(torch.ops.attn_ext.backward_tangent.default)
    def _backward_tangent(*inputs):
        count = len(Rows._fields)
        call, tangents = call_and_tangents(inputs[count:])
        needs, primal = Needs(*inputs[-2]), Needs(*inputs[-1])
        found = [([whole] * (2 * len(GRADIENTS)), replicated(inputs))]
        for dim in _shardable_dims(call):
            outputs = gradients(call, needs, dim) + gradients(call, primal, dim)
            placed = _input_placements(call, dim, whole, Shard)
            given = [*rows(inputs[:count], Shard(dim)), *placed, *moved(placed, tangents)]
            found.append((outputs, [*given, None, None]))
        return found
