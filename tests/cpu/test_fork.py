"""fork() in every order with torch's OpenMP and with attn_ext, each in a process of its own.

A child has a copy of its parent's thread pools, and none of their threads: what waits for them
hangs.  Each process ends at a hard limit, and a hang is its exit status.
"""

import os
import signal
import subprocess
import sys

import pytest

LIMIT_SECONDS = 240  # of the parent, on a machine with other work; children get half

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

COMMON = f"""
import os, signal, sys, threading
import multiprocessing
import torch
signal.alarm({LIMIT_SECONDS})

def openmp():  # torch's threads have run: the pool of this thread exists
    torch.set_num_threads(2)
    torch.randn(1 << 20).exp()

def call():  # on two threads; checked without an operation that torch itself would run on two
    import attn_ext
    q = torch.ones(1, 8, 64, 16, requires_grad=True)
    out = attn_ext.attention(q, q, q)
    with torch.no_grad():
        again = attn_ext.attention(q, q, q)
    return out.detach().numpy().min() == 1 == again.numpy().max()

def in_child(function=call):
    child = os.fork()
    if child == 0:
        signal.alarm({LIMIT_SECONDS // 2})
        status = 1
        try:
            status = 0 if function() else 1
        finally:
            os._exit(status)
    status = os.waitpid(child, 0)[1]
    assert status == 0, f"the child ended with {{status}}; 14 is a hang"
    return True

def in_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found == [True]
"""

ORDERS = {
    "openmp, import, fork": "openmp(); import attn_ext; in_child()",
    "import, openmp, fork": "import attn_ext; openmp(); in_child()",
    "import, fork": "import attn_ext; torch.set_num_threads(2); in_child()",
    "openmp, call, fork, and the parent goes on": "openmp(); call(); in_child(); openmp(); call()",
    "openmp, fork, import in the child": "openmp(); in_child()",
    "fork, then openmp and import in the child": "in_child(lambda: openmp() or call())",
    "openmp, import, fork in a thread": "openmp(); import attn_ext; assert in_thread(in_child)",
    "a thread has called, fork in the main thread": "openmp(); assert in_thread(call); in_child()",
    "a thread has called, fork in another": """
openmp()
assert in_thread(call)
assert in_thread(in_child)
""",
    "nested forks": """
openmp()
import attn_ext
in_child(lambda: in_child() and call() and in_child())
""",
    "nested forks, import in the grandchild": "openmp(); in_child(lambda: in_child(call))",
    "a thread of the child": "openmp(); call(); in_child(lambda: in_thread(call))",
    "a pool of multiprocessing": """
openmp()
import attn_ext
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.apply(call) and all(pool.starmap(call, [()] * 4))
""",
    "a DataLoader": """
openmp()
import attn_ext
class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        torch.set_num_threads(2)  # a worker begins with one
        assert call()
        return index
loader = torch.utils.data.DataLoader(Items(), batch_size=None, num_workers=2,
                                     multiprocessing_context="fork")
assert sorted(int(i) for i in loader) == [0, 1, 2, 3]
""",
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_child_computes(order):
    """The first call of a child waits for threads that only its parent has."""
    script = COMMON + "\n" + ORDERS[order]
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=2 * LIMIT_SECONDS
    )
    hung = done.returncode == -signal.SIGALRM
    assert done.returncode == 0, "hung" if hung else done.stderr[-2000:]
