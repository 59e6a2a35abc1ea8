"""Ranks that die, fall silent or give up, in groups of their own: what the others are told, for
tests/distributed.
"""

import contextlib
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from context_cases import WIDTH, instead, mesh_of

from attn_ext.distributed import ContextParallelError, Layout, context_attention
from attn_ext.functional import common
from attn_ext.ops import parts as operators

SILENT = timedelta(seconds=40)


def _ready(rank, world):
    layout = Layout.zigzag(4096, world)
    q, k, v = (torch.randn(1, 2, layout.length(rank), WIDTH) for _ in range(3))
    call = lambda: context_attention(q, k, v, layout=layout, mesh=dist.group.WORLD, causal=True)  # noqa: E731
    call()
    dist.barrier()
    return call


def _outcome(call) -> tuple:
    begun = time.monotonic()
    try:
        for _ in range(3):
            call()
    except ContextParallelError as error:
        return time.monotonic() - begun, error.peer, error.hop
    return 0.0, None, "no error"


def killed(rank, world) -> tuple:
    """(seconds, peer, hop) of the error when the last rank is killed."""
    call = _ready(rank, world)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return _outcome(call)


def stopped(rank, world) -> tuple:
    """The same when the last rank stops without a word."""
    call = _ready(rank, world)
    if rank == world - 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    return _outcome(call)


GIVES_UP = (  # direction, method: where the last rank's kernels raise
    ("forward", "ring"),
    ("backward", "ring"),
    ("forward", "allgather"),
    ("forward", "ulysses"),
    ("backward", "2d"),
    ("drawing", "ring"),
)


def _out_of_memory(*arguments):
    raise MemoryError("no room for this rank's part")


def gives_up(rank, world) -> list:
    """[(seconds, peer, text of the error, that of the next call)] for each of GIVES_UP: the last
    rank's second kernel raises, or, drawing, what comes before the ranks agree."""
    groups = [dist.new_group(list(range(world)), timeout=SILENT) for _ in GIVES_UP]
    layout, found = Layout.zigzag(64, world), []
    for group, (direction, method) in zip(groups, GIVES_UP, strict=True):
        mesh = mesh_of(group, world, method)
        inputs = [
            torch.randn(1, 4, layout.length(rank), WIDTH, requires_grad=True) for _ in range(3)
        ]

        def call(mesh=mesh, method=method, inputs=inputs):
            more = dict(causal=True, dropout_p=0.1)  # with which "ulysses" calls parts, too
            out = context_attention(*inputs, layout=layout, mesh=mesh, method=method, **more)
            torch.autograd.grad(out.sum(), inputs)

        call()
        dist.barrier()
        with contextlib.ExitStack() as stack:
            if rank == world - 1:
                place, name = {
                    "forward": (operators, "forward_partial"),
                    "backward": (operators, "backward_partial"),
                    "drawing": (common, "autocast"),
                }[direction]
                stack.enter_context(instead(place, name, _out_of_memory))
            begun = time.monotonic()
            texts = []
            for _ in range(2):
                try:
                    call()
                    texts.append((None, "no error"))
                except (ContextParallelError, ValueError, MemoryError) as error:
                    texts.append((getattr(error, "peer", None), f"{type(error).__name__}: {error}"))
                if not texts[1:]:
                    waited = time.monotonic() - begun
        found.append((waited, texts[0][0], texts[0][1], texts[1][1]))
    dist.barrier()  # the store lives on the first rank
    return found
