"""One of the processes of test_dtensor.py: `python dtensor_worker.py RANK SIZE STORE_FILE`.

Attention of DTensors sharded over batch or heads equals that of whole tensors, gradients included.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)

import attn_ext


def attend(q, k, v, bias, sink):
    out, lse = attn_ext.attention(q, k, v, causal=True, bias=bias, sink=sink, return_lse=True)
    return out, lse


def summed(x):
    """x with the parts of a sum added up: torch 2.6 squares each part of a gradient that is one."""
    partial = isinstance(x, DTensor) and any(p.is_partial() for p in x.placements)
    return x.redistribute(placements=[Replicate()]) if partial else x


def penalty(inputs):
    """The gradients of a function of the gradients, and how the latter are placed."""
    out, lse = attend(*inputs)
    loss = out.square().sum() + lse.sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    return first, torch.autograd.grad(sum(summed(g).square().sum() for g in first), inputs)


def check_second(parts, whole) -> None:
    """Double backward: shards stay apart, shared gradients are summed; what is refused says so."""
    first, twice = penalty(parts)
    assert [g.placements for g in first[:3]] == [x.placements for x in parts[:3]]
    for name, got, want in zip(("q", "k", "v", "bias", "sink"), twice, penalty(whole)[1],
                               strict=True):  # fmt: skip
        torch.testing.assert_close(
            got.full_tensor(), want, msg=lambda text, name=name: f"second d{name}: {text}"
        )
    refused = {
        "third derivative": lambda: thrice(parts),
        "double backward of sigmoid": lambda: sigmoid_twice(*parts[:3]),
    }
    for message, ask in refused.items():
        try:
            ask()
        except NotImplementedError as error:
            assert message in str(error), error
        else:
            raise AssertionError(f"{message} was not refused")


def thrice(inputs):
    out, _ = attend(*inputs)
    x = inputs[0]
    for _ in range(3):
        (out,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)


def sigmoid_twice(q, k, v):
    out = attn_ext.attention(q, k, v, normalizer="sigmoid")
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    torch.autograd.grad(first.square().sum(), q)


def main(rank: int, size: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    # bias is broadcast over the batch: sharding the batch must sum its gradient over the processes
    shapes = ((4, 8, 7, 8), (4, 4, 7, 8), (4, 4, 7, 6), (1, 8, 7, 7), (8,))
    whole = [torch.randn(s, requires_grad=True) for s in shapes]
    out, lse = attend(*whole)
    (out.square().sum() + lse.sum()).backward()
    for placements in (
        [Shard(0)] * 3 + [Replicate()] * 2,
        [Shard(1)] * 4 + [Shard(0)],
    ):
        parts = [
            distribute_tensor(x.detach(), mesh, [p]).requires_grad_()
            for x, p in zip(whole, placements, strict=True)
        ]
        got, got_lse = attend(*parts)
        assert got.placements == (placements[0],), got.placements  # no communication
        assert got.to_local().numel() * size == out.numel()
        torch.testing.assert_close(got.full_tensor(), out)
        torch.testing.assert_close(got_lse.full_tensor(), lse)
        (got.square().sum() + got_lse.sum()).backward()
        for name, part, x in zip(("q", "k", "v", "bias", "sink"), parts, whole, strict=True):
            torch.testing.assert_close(
                part.grad.full_tensor(), x.grad, msg=lambda text, name=name: f"d{name}: {text}"
            )
        check_second(parts, whole)
    # a sequence shard cannot be attended to alone: torch must gather it
    rows = [distribute_tensor(x.detach(), mesh, [Shard(2)]) for x in whole[:3]]
    want = attn_ext.attention(*whole[:3], causal=True)
    torch.testing.assert_close(attn_ext.attention(*rows, causal=True).full_tensor(), want)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
    sys.stdout.flush()
    # What follows is the end of torch's process groups and their threads, of which nothing is asked
    # here: once it aborted ("terminate called without an active exception").
    os._exit(0)
