"""The demo learns and writes its pictures; bad arguments are one line and exit code 2.

The examples run in the test's process, which has torch and matplotlib already.
"""

import re

import pytest
from repository import run_script

DEMO = "examples/text_classifier.py"


def test_text_classifier(tmp_path, capsys):
    """Losses that drift from torch's (the demo asserts the tolerance rule), empty pictures."""
    pytest.importorskip("matplotlib")
    assert run_script(DEMO, "--short", "--out", tmp_path, "--text", "a wonderful film") == 0
    out = capsys.readouterr().out
    assert "losses agree with float64" in out
    assert "a wonderful film" in out
    for name in ("loss_curves.png", "attention_map.png"):
        assert (tmp_path / name).stat().st_size > 5000


def test_text_without_words(capsys):
    """A traceback, or a guess about nothing."""
    assert run_script(DEMO, "--text", "...") == 2
    assert "--text must hold at least one word, got '...'" in capsys.readouterr().err


def run_example(name, *options):
    """An example that needs a library of models."""
    pytest.importorskip("transformers", reason="extra `integrations` is not installed")
    return run_script(f"examples/{name}", *options)


def test_replace_sdpa(capsys):
    """A model whose calls are left to torch, or whose loss or gradients change."""
    assert run_example("replace_sdpa.py", "--short", "--threads", "1") == 0
    out = capsys.readouterr().out
    assert "all attention calls were served by attn_ext; losses and gradients agree" in out
    rows = re.findall(r"(torch|replace_sdpa|attn_ext) +│ +([\d.]+)", out)
    assert [name for name, _ in rows] == ["torch", "replace_sdpa", "attn_ext"]
    assert all(float(milliseconds) > 0 for _, milliseconds in rows)


def test_finetune(tmp_path, capsys):
    """A loss curve that leaves float64's by more than torch's own, or no picture."""
    assert run_example("finetune.py", "--short", "--out", tmp_path) == 0
    assert "loss curves agree with float64" in capsys.readouterr().out
    assert (tmp_path / "finetune.png").stat().st_size > 5000


def test_finetune_bad_arguments(capsys):
    """A traceback about an empty run."""
    assert run_example("finetune.py", "--steps", "0") == 2
    assert "--steps must be at least 2, got 0" in capsys.readouterr().err
