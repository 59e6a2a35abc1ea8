"""The demo learns and writes its pictures; bad arguments are one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
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
