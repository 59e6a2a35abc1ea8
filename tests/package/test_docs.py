"""Documents name only what exists, and their examples run."""

import pydoc
import re
from pathlib import Path

import pytest
import torch

import attn_ext

ROOT = Path(__file__).parents[2]
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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT)))
def test_python_names_exist(document):
    """A function that was renamed, or never was where a document says."""
    text = document.read_text()
    names = set(re.findall(r"(?<![\w/.:-])attn_ext(?:\.[A-Za-z]\w*)+(?![\w/])", text))
    for module, imported in re.findall(r"from (attn_ext[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.split(' as ')[0].strip()}" for name in imported.split(",")}
    for name in names - {"attn_ext.egg", "attn_ext._cuda"}:
        if "triton_kernels" in name:
            pytest.importorskip("triton", reason="this module imports Triton")
            assert (
                pydoc.locate("attn_ext.triton_kernels") is not None
            )  # imports it: attn_ext does not
        first = name.split(".")[1]
        assert hasattr(attn_ext, first) or f"from {name.rpartition('.')[0]}" in text, name
        assert pydoc.locate(name) is not None, name


def blocks(document: str) -> list[str]:
    """The indented blocks of a document."""
    text = (ROOT / "docs" / document).read_text()
    return [b.replace("\n    ", "\n").strip() for b in re.findall(r"(?:^ {4}.*\n)+", text, re.M)]


def test_inspect_examples_run(tmp_path, monkeypatch, capsys):
    """An option or a field that `attn_ext.inspect` no longer has."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    q = torch.randn(1, 2, 6, 8)
    names = {"attn_ext": attn_ext, "q": q, "k": q, "loss": 0.0, "model": model}
    names["x"] = torch.randn(1, 6, 16)
    for block in blocks("inspect.md")[:2]:
        exec(compile(block, "inspect.md", "exec"), names)
    assert names["best"].keys.shape == (1, 2, 6, 5) and names["loss"] < 0
    assert "entropy" in capsys.readouterr().out
    assert len(attn_ext.inspect.load("seen.pt")) == 1
