"""Documents name only what exists: files, links and their anchors, make targets, Python names.
Their examples run, and comments in the code point at documents that are there.
"""

import ast
import pydoc
import re
from pathlib import Path

import pytest
import torch

import attn_ext

ROOT = next(p for p in Path(__file__).resolve().parents if (p / "pyproject.toml").exists())
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"),
     *(ROOT / "bench").rglob("*.md"), *(ROOT / ".github").rglob("*.md")]
)  # fmt: skip
FOLDERS = ("csrc", "attn_ext", "tests", "bench", "docs", "examples", "triton_kernels")
PATHS = re.compile(r"`((?:csrc|attn_ext|tests|bench|docs|examples|triton_kernels|\.ci)/[\w./-]*)`")
NAMES = re.compile(r"`((?:\w+/)*[\w-]+\.(?:h|cuh|cu|cpp|py|sh|json|md))`")  # without a folder
WRITTEN = {  # what commands write or read, and the tree does not hold
    "bench.json", "bench.md", "summary.md", "summary.json", "tuned.json", "trace.json",
    "profile.json", "case.py", "train.py", "words.json", "triton_tiles.json",
}  # fmt: skip
each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda d: str(d.relative_to(ROOT))
)


def prose(text: str) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def fenced(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub and its kin make them."""
    headings = re.findall(r"^#+ (.*)$", prose(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


def test_anchors_by_hand():
    """A slug that no renderer makes: every link to it would look right here and be dead."""
    assert "torch-scaled_dot_product_attention" in anchors(ROOT / "docs/guide/migrate.md")
    assert "torchs-own-switch" in anchors(ROOT / "docs/guide/migrate.md")


@each_document
def test_links_lead_somewhere(document):
    """A file that moved, or a heading that was renamed."""
    links = re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text()))
    for link in links:
        if re.match(r"(?:https?|mailto):", link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), link
        assert target.is_relative_to(ROOT), f"{link} leaves the tree"
        if anchor:
            assert anchor in anchors(target), link


@each_document
def test_paths_and_targets_exist(document):
    """A renamed file or make target that a document still names."""
    text = document.read_text()
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in PATHS.findall(text):
        assert (ROOT / path).exists(), path
    for block in re.findall(r"^ *```(?:\n)(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for path in re.findall(r"(?<![\w/.])(?:tests|bench|docs|examples|csrc)/[\w./-]*\w", block):
            assert (ROOT / path).exists(), f"{path} in a command"
    for target in re.findall(r"(?:^ {0,4}|`)make ([a-z0-9-]+)", text, re.MULTILINE):
        assert target in targets, target
    for name in NAMES.findall(prose(text)):
        if name in WRITTEN or (ROOT / name).exists():
            continue
        assert any(next((ROOT / folder).rglob(name), None) for folder in FOLDERS), name


def test_no_document_is_lost():
    """A page that no other page leads to."""
    linked = set()
    for document in DOCUMENTS:
        for link in re.findall(r"\]\(([^)\s#]+)", document.read_text()):
            linked.add((document.parent / link).resolve())
    pages = [d for d in DOCUMENTS if "docs" in d.relative_to(ROOT).parts]
    assert [str(d.relative_to(ROOT)) for d in pages if d.resolve() not in linked] == []


def test_comments_point_at_documents():
    """A comment that sends its reader to a page which moved."""
    files = [f for folder in FOLDERS for f in (ROOT / folder).rglob("*")]
    files = [f for f in files if f.suffix in (".py", ".h", ".cuh", ".cu", ".cpp", ".sh")]
    named = 0
    for file in [*files, ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "Makefile"]:
        for path in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text()):
            named += 1
            assert (ROOT / path).exists(), f"{file}: {path}"
        assert (
            not re.search(r"DESIGN(?:\.md| section)", file.read_text()) or "test_docs" in file.name
        ), file
    assert named >= 4


def test_readme_example_runs(capsys):
    """An example that a change of the API left behind."""
    example = fenced((ROOT / "README.md").read_text(), "python")[0]
    assert len(example.strip().splitlines()) <= 7
    exec(compile(example, "README.md", "exec"), {})
    assert "chosen" in capsys.readouterr().out


@each_document
def test_python_examples_are_python(document):
    """A bracket that was lost while an example was shortened."""
    for block in fenced(document.read_text(), "python"):
        ast.parse(block)


@each_document
def test_python_names_exist(document):
    """A function that was renamed, or never was where a document says."""
    text = document.read_text()
    names = set(re.findall(r"(?<![\w/.:-])attn_ext(?:\.[A-Za-z]\w*)+(?![\w/])", text))
    for module, imported in re.findall(r"from (attn_ext[\w.]*) import ([\w, ]+)", text):
        names |= {f"{module}.{name.split(' as ')[0].strip()}" for name in imported.split(",")}
    for name in names - {"attn_ext.egg"}:
        if "triton_kernels" in name:
            pytest.importorskip("triton", reason="this module imports Triton")
            # imports it: attn_ext does not
            assert pydoc.locate("attn_ext.triton_kernels") is not None
        first = name.split(".")[1]
        loads = (f"from {name.rpartition('.')[0]}", f"import {name.rpartition('.')[0]}")
        assert hasattr(attn_ext, first) or any(load in text for load in loads), name
        assert pydoc.locate(name) is not None, name


def test_inspect_examples_run(tmp_path, monkeypatch, capsys):
    """An option or a field that `attn_ext.inspect` no longer has."""
    monkeypatch.chdir(tmp_path)
    model = torch.nn.TransformerEncoderLayer(16, 2, batch_first=True).eval()
    q = torch.randn(1, 2, 6, 8)
    names = {"attn_ext": attn_ext, "q": q, "k": q, "loss": 0.0, "model": model}
    names |= {"x": torch.randn(1, 6, 16), "y": torch.randn(1, 6, 16), "torch": torch}
    names["criterion"] = torch.nn.functional.mse_loss
    for block in fenced((ROOT / "docs" / "guide" / "inspect.md").read_text(), "python"):
        exec(compile(block, "inspect.md", "exec"), names)
    assert names["best"].keys.shape == (1, 2, 6, 5) and names["loss"].requires_grad
    assert "entropy" in capsys.readouterr().out
    assert len(attn_ext.inspect.load("seen.pt")) == 1


def test_decode_examples_run(capsys):
    """An argument of KVCache that its guide has wrong, or a loop that does not do what it says."""
    names = {}
    for block in fenced((ROOT / "docs" / "guide" / "decode.md").read_text(), "python"):
        exec(compile(block, "decode.md", "exec"), names)
        if "drafts" in block:
            assert names["written"] == greedy(names, len(names["written"]))
    assert names["written"] == greedy(names, len(names["written"])), "the tree"
    shown = capsys.readouterr().out
    assert "append needs 4 free pages of 16 positions, and 3 of 3 are free" in shown
    assert "lengths=[20, 20], 8 pages of 16, 4 free" in shown
    loop = fenced((ROOT / "docs" / "guide" / "decode.md").read_text(), "python")[0]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 34


def greedy(names: dict, count: int) -> list[int]:
    """What the model of decode.md writes, one token at a time."""
    cache = attn_ext.KVCache(1, names["kv_heads"], names["dim"], max_length=256)
    tokens, written = torch.tensor([[5, 17, 3, 80]]), []
    while len(written) < count:
        written.append(names["model"](cache, tokens)[0, -1].argmax().item())
        tokens = torch.tensor([written[-1:]])
    return written


def test_examples_write_below_out():
    """An example that litters the folder that it was started in."""
    for file in (ROOT / "examples").glob("*.py"):
        for default in re.findall(r'"--out".*?default=(.*)', file.read_text()):
            assert 'Path("out' in default, f"{file.name}: --out is {default}"
