"""Each example of the attention family in its short mode: it exits with 0 only when its held-out
figure beats its baseline.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {
    "pipeline": "sklearn", "digits_vit": "sklearn", "cross_modal": "sklearn",
    "numbers_to_words": "num2words",
}  # fmt: skip
NAMES = [
    "worked_example", "pipeline", "digits_vit", "numbers_to_words", "regression", "text_attention",
    "long_context", "cross_modal", "spoken_digits",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_example_learns(name, tmp_path):
    """An example that no longer runs, or whose model no longer learns; an empty picture."""
    pytest.importorskip("matplotlib")
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--short", "--out", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "learned" in done.stdout or name == "worked_example"
    assert (tmp_path / f"{name}.png").stat().st_size > 3000


def test_examples_are_short():
    """An example that grew past what one reads in one go."""
    for name in NAMES:
        assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 150, name
