"""Many Python threads, forked processes and thread counts, through the public API on CPU tensors.

A process that forked after a call has the parent's thread pool in its memory but none of its
threads: a kernel that waits for them hangs, so each child is given a time limit.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from emulator_build import compiler
from repository import ROOT

import attn_ext

LIMIT_SECONDS = 60


def inputs(seed=0, seqlen=130):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(2, 4, seqlen, 32, generator=generator, requires_grad=True) for _ in range(3)
    ]


def work(seed=0, deterministic=True):
    """Output and gradients of one call, as plain tensors."""
    tensors = inputs(seed)
    out = attn_ext.attention(*tensors, causal=True, deterministic=deterministic)
    grads = torch.autograd.grad(out.square().sum(), tensors)
    return [out.detach(), *grads]


def in_child(function) -> int:
    """Exit status of `function` run in an os.fork child: 0 when it returned true, 14 when it
    hung.
    """
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT_SECONDS)
        status = 1
        try:
            status = 0 if function() else 1
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_fork_after_a_call():
    """A child of a process with a warm thread pool hangs or computes something else."""
    with torch.no_grad():
        q, k, v = inputs()
        # compared as bytes: torch.equal itself hangs in a child whose parent has used OpenMP
        want = attn_ext.attention(q, k, v, causal=True).numpy().tobytes()

        def same():
            return attn_ext.attention(q, k, v, causal=True).numpy().tobytes() == want

        assert in_child(same) == 0
        assert in_child(lambda: in_child(same) == 0) == 0  # a grandchild
        assert same()  # and the parent still works


class AttendedItems(torch.utils.data.Dataset):
    """Items computed with attention in the loader's workers."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        torch.manual_seed(index)
        q = torch.randn(1, 2, 40, 16)
        return attn_ext.attention(q, q, q)[0]


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system has no fork"
)
def test_data_loader_workers():
    """A DataLoader with workers hangs once the parent has called attention."""
    items = AttendedItems()
    want = [items[i] for i in range(len(items))]
    loader = torch.utils.data.DataLoader(
        items, batch_size=None, num_workers=2, timeout=LIMIT_SECONDS, multiprocessing_context="fork"
    )
    for got, expected in zip(loader, want, strict=True):
        torch.testing.assert_close(got, expected)


def test_many_python_threads():
    """Scratch memory shared between calls that run at once."""
    want = {seed: work(seed) for seed in range(4)}
    wrong = []

    def repeat(seed):
        try:
            for _ in range(3):
                got = work(seed)
                if not all(torch.equal(a, b) for a, b in zip(got, want[seed], strict=True)):
                    wrong.append(seed)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=repeat, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_SECONDS)
        assert not thread.is_alive()
    assert wrong == []


def test_results_do_not_depend_on_the_number_of_threads():
    """A reduction whose order follows the number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(work())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_the_interpreter_runs_during_a_call():
    """A kernel that holds the GIL stops every other Python thread."""
    q = torch.randn(1, 4, 1536, 64)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    done = threading.Event()

    def call():
        attn_ext.attention(q, q, q)
        done.set()

    try:
        attn_ext.attention(q[:, :, :8], q[:, :, :8], q[:, :, :8])
        thread = threading.Thread(target=call)
        thread.start()
        turns = 0
        while not done.is_set():
            turns += 1
            time.sleep(0)  # give the thread its turn
        thread.join()
    finally:
        torch.set_num_threads(before)
    assert turns > 3


def test_backward_in_another_thread():
    """State of a call kept by thread: autograd may run backward elsewhere than forward."""
    want = work()
    tensors = inputs()
    out = attn_ext.attention(*tensors, causal=True, deterministic=True)
    found = []
    thread = threading.Thread(
        target=lambda: found.extend(torch.autograd.grad(out.square().sum(), tensors))
    )
    thread.start()
    thread.join(LIMIT_SECONDS)
    for a, b in zip(found, want[1:], strict=True):
        assert torch.equal(a, b)


# Two threads that spin on one core, which libgomp believes to be two; prints how many calls of
# some 0.2 ms took more than 2 ms.
ONE_CORE = """
import os, time, torch, attn_ext
torch.set_num_threads(2)
q, k = torch.randn(1, 8, 1, 64), torch.randn(1, 8, 512, 64)
want = attn_ext.attention_decode(q, k, k)
for task in os.listdir("/proc/self/task"):
    os.sched_setaffinity(int(task), {min(os.sched_getaffinity(0))})
slow = 0
for _ in range(200):
    begin = time.perf_counter()
    out = attn_ext.attention_decode(q, k, k)
    slow += time.perf_counter() - begin > 2e-3
    assert torch.equal(out, want)
print(slow)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pins threads as Linux does")
def test_short_calls_do_not_wait_for_threads_without_a_core():
    """Every call waits for a slice of the scheduler (200 of 200 did), or its bits change where it
    does not.  (At most half, since other programs may want that core, too.)"""
    command = [sys.executable, "-c", ONE_CORE]
    found = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) < 100


def test_when_calls_begin_alone(tmp_path):
    """Short calls that use one core of an idle machine since a thread once came late, or that wait
    for threads whose cores other processes have."""
    program = tmp_path / "alone"
    compiler(
        "-std=c++17", "-O1", f"-I{ROOT / 'csrc'}", ROOT / "csrc/tests/alone.cpp", "-o", program
    )
    assert subprocess.run([program], capture_output=True, text=True).stdout == "ok\n"
