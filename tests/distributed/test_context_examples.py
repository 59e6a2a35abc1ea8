"""The examples of context parallelism in their short modes, each with two processes of its own."""

import os
import re
import signal
import subprocess
import sys

import pytest
from repository import ROOT

LIMIT = 200  # seconds; then the whole group of processes is killed


def run_alone(name: str, *options: str) -> str:
    """What the example printed; it may not leave a process behind."""
    process = subprocess.Popen(
        [sys.executable, ROOT / "examples" / name, *options],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env={**os.environ, "COLUMNS": "120", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        text = process.communicate(timeout=LIMIT)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0, text
    return text


def test_context_lm(tmp_path):
    """A loss curve that leaves one process's, a model that does not learn, an empty picture."""
    pytest.importorskip("matplotlib")
    text = run_alone("context_lm.py", "--short", "--out", str(tmp_path))
    apart = re.search(r"2 processes against one: losses differ by (\S+)", text)
    assert float(apart[1]) <= 1e-4 and "learned" in text
    assert (tmp_path / "context_lm.png").stat().st_size > 3000


def test_context_decode(tmp_path):
    """A token that a rank of a sharded cache sees otherwise."""
    pytest.importorskip("matplotlib")
    text = run_alone("context_decode.py", "--short", "--out", str(tmp_path))
    assert "17 tokens on 2 processes: identical to one process" in text
    assert (tmp_path / "context_decode.png").stat().st_size > 3000
