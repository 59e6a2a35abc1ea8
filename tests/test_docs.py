"""Documents name only what exists, and the example of the README runs."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
PATHS = re.compile(r"`((?:csrc|attn_ext|tests|bench|docs|examples|triton_kernels|\.ci)/[\w./-]*)`")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_paths_and_targets_exist(document):
    """A renamed file or make target that a document still names."""
    text = document.read_text()
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in PATHS.findall(text):
        assert (ROOT / path).exists(), path
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / link).exists(), link
    for target in re.findall(r"(?:^ {4}|`)make ([a-z0-9-]+)", text, re.MULTILINE):
        assert target in targets, target


def test_readme_example_runs(capsys):
    """An example that a change of the API left behind."""
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(compile(example, "README.md", "exec"), {})
    assert "chosen" in capsys.readouterr().out
