"""DTensor: sharding over batch and heads keeps shards apart and sums shared gradients.

Two processes over gloo.
"""

import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).with_name("dtensor_worker.py")
LIMIT_SECONDS = 300  # two interpreters that import torch, on a busy machine


def test_two_processes(tmp_path):
    """A shard that sees other heads, or a gradient of a shared bias or sink that is not summed."""
    assert torch.distributed.is_gloo_available()
    store = str(tmp_path / "store")
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(rank), "2", store],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        results = [(w.communicate(timeout=LIMIT_SECONDS)[0], w.returncode) for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    for text, code in results:
        assert code == 0, text
