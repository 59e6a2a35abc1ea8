"""Processes that are the ranks of a group, started once and given many cases.

One fork server imports torch; its children are ranks.  A case is a function of `context_cases` that
every rank of a group of P runs; groups of 2, 3 and 4 share the same four processes.  A hard limit
ends all of them, so that no test can hang.
"""

import importlib
import multiprocessing
import os
import socket
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

RANKS = 4
LIMIT = 400.0  # seconds for all cases, beside other work on two cores
SILENCE = timedelta(seconds=60)


def _port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _join_world(rank: int, world: int, port: int, timeout: timedelta) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"
    )
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timeout)


def _serve(rank: int, port: int, module: str, cases, results) -> None:
    """A rank's life: all cases in order, each on the group of its size."""
    _join_world(rank, RANKS, port, SILENCE)
    functions = importlib.import_module(module)
    groups = {p: dist.new_group(list(range(p)), timeout=SILENCE) for p in (2, 3, 4)}
    for name, parts, arguments in cases:
        if rank >= parts:
            continue
        try:
            found = getattr(functions, name)(groups[parts], rank, parts, *arguments)
        except Exception:  # told to the test, which fails with it
            found = traceback.format_exc()
        results.put(((name, parts, arguments), rank, found))
    results.put((None, rank, None))
    dist.barrier()
    dist.destroy_process_group()


def _alone(rank, world, port, module, name, seconds, results) -> None:
    """A rank of a group of its own, whose peers may die."""
    _join_world(rank, world, port, timedelta(seconds=seconds))
    results.put((rank, getattr(importlib.import_module(module), name)(rank, world)))
    results.close()
    results.join_thread()  # what was put is on its way
    os._exit(0)  # no farewell to peers that are gone


def _server():
    context = multiprocessing.get_context("forkserver")
    modules = [
        "context_cases",
        "context_dtensors",
        "context_losses",
        "context_models",
        "context_strangers",
        "context_training",
    ]
    context.set_forkserver_preload(["torch", "attn_ext.distributed", *modules])
    return context


def run(module: str, cases) -> dict:
    """{case: [what each rank returned]} of cases (function, parts, arguments)."""
    context, port = _server(), _port()
    results = context.Queue()
    processes = [
        context.Process(target=_serve, args=(rank, port, module, cases, results), daemon=True)
        for rank in range(RANKS)
    ]
    for process in processes:
        process.start()
    found: dict = {}
    end, left = time.monotonic() + LIMIT, RANKS
    try:
        while left:
            case, rank, value = results.get(timeout=max(end - time.monotonic(), 0.1))
            if case is None:
                left -= 1
            else:
                found.setdefault(case, {})[rank] = value
    finally:
        _end(processes)
    return {case: [by_rank[r] for r in sorted(by_rank)] for case, by_rank in found.items()}


def of(found, name: str, parts: int, arguments=()) -> list:
    """What each rank returned of a case; AssertionError where one raised."""
    values = found[(name, parts, arguments)]
    assert len(values) == parts
    for value in values:
        assert not (isinstance(value, str) and value.startswith("Traceback")), value
    return values


def run_alone(
    module: str, name: str, world: int, seconds: float, limit: float, lost: int = 1
) -> dict:
    """{rank: what it returned} of the ranks that lived, all but `lost`, of a group with this
    timeout."""
    context, port = _server(), _port()
    results = context.Queue()
    processes = [
        context.Process(
            target=_alone, args=(rank, world, port, module, name, seconds, results), daemon=True
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        end = time.monotonic() + limit
        return dict(
            results.get(timeout=max(end - time.monotonic(), 0.1)) for _ in range(world - lost)
        )
    finally:
        _end(processes)


def _end(processes) -> None:
    for process in processes:
        process.join(5)
        if process.is_alive():
            process.kill()
