"""Each example of the attention family in its short mode: it exits with 0 only when its held-out
figure beats its baseline.
"""

import subprocess
import sys

import pytest
from repository import ROOT, run_script

NEEDS = {
    "pipeline": "sklearn", "digits_vit": "sklearn", "cross_modal": "sklearn",
    "numbers_to_words": "num2words",
}  # fmt: skip
NAMES = [
    "worked_example", "pipeline", "digits_vit", "numbers_to_words", "regression", "text_attention",
    "long_context", "cross_modal", "spoken_digits",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_example_learns(name, tmp_path, capsys, monkeypatch):
    """An example that no longer runs, or whose model no longer learns; an empty picture."""
    pytest.importorskip("matplotlib")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.setenv("COLUMNS", "120")
    options = ("--short", "--out", str(tmp_path))
    if name == "long_context":  # limits the memory of its process
        command = [sys.executable, ROOT / "examples" / "long_context.py", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        code, out = done.returncode, done.stdout + done.stderr
    else:
        code, out = run_script(f"examples/{name}.py", *options), capsys.readouterr().out
    assert code == 0, out
    assert "learned" in out or name == "worked_example"
    assert (tmp_path / f"{name}.png").stat().st_size > 3000


def test_examples_are_short():
    """An example that grew past what one reads in one go."""
    for name in NAMES:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < 150, name
