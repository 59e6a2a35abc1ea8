"""The demo learns and writes its pictures; bad arguments are one line and exit code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEMO = [sys.executable, str(ROOT / "examples" / "text_classifier.py")]


def test_text_classifier(tmp_path):
    """Losses that drift from torch's (the demo asserts the tolerance rule), empty pictures."""
    pytest.importorskip("matplotlib")
    command = [*DEMO, "--short", "--out", str(tmp_path), "--text", "a wonderful film"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "losses agree with float64" in done.stdout
    assert "a wonderful film" in done.stdout
    for name in ("loss_curves.png", "attention_map.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_text_without_words():
    """A traceback, or a guess about nothing."""
    done = subprocess.run([*DEMO, "--text", "..."], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "--text must hold at least one word, got '...'" in done.stderr
    assert "Traceback" not in done.stderr


def run_example(name: str, *options: str) -> subprocess.CompletedProcess:
    """An example in a process of its own."""
    pytest.importorskip("transformers", reason="extra `integrations` is not installed")
    command = [sys.executable, str(ROOT / "examples" / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_replace_sdpa():
    """A model whose calls are left to torch, or whose loss or gradients change."""
    done = run_example("replace_sdpa.py", "--short", "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "all attention calls were served by attn_ext; losses and gradients agree" in done.stdout
    rows = re.findall(r"(torch|replace_sdpa|attn_ext) +│ +([\d.]+)", done.stdout)
    assert [name for name, _ in rows] == ["torch", "replace_sdpa", "attn_ext"]
    assert all(float(milliseconds) > 0 for _, milliseconds in rows)


def test_finetune(tmp_path):
    """A loss curve that leaves float64's by more than torch's own, or no picture."""
    done = run_example("finetune.py", "--short", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "loss curves agree with float64" in done.stdout
    assert (tmp_path / "finetune.png").stat().st_size > 5000


def test_finetune_bad_arguments():
    """A traceback about an empty run."""
    done = run_example("finetune.py", "--steps", "0")
    assert done.returncode == 2
    assert "--steps must be at least 2, got 0" in done.stderr and "Traceback" not in done.stderr
