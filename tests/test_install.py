"""What an installation meets: no compiler, no torch, an old one, a source tree that is not built;
and what the archive of the sources holds."""

import os
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SITE = Path(torch.__file__).parent.parent


@pytest.fixture
def setup_py(monkeypatch):
    """The names of setup.py, which builds nothing here."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def test_no_compiler(setup_py, monkeypatch):
    """ninja's page of errors, which does not say what to install."""
    monkeypatch.setenv("CXX", "no-such-compiler -O3")
    with pytest.raises(SystemExit, match=r"CXX='no-such-compiler -O3' .*apt install g\+\+"):
        setup_py["check_tools"]()
    monkeypatch.setenv("CXX", f"{sys.executable} -O3")  # an option after a program that is there
    setup_py["check_tools"]()


def test_no_python_headers(setup_py, monkeypatch, tmp_path):
    """The same for Python.h, which Debian keeps in a package of its own."""
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    with pytest.raises(SystemExit, match=r"Python's headers.*apt install python3-dev"):
        setup_py["check_tools"]()


def python(code: str, *paths) -> subprocess.CompletedProcess:
    """Run code with these paths alone, no installed attn_ext among them."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    command = [sys.executable, "-S", "-c", code]
    return subprocess.run(command, env=env, cwd=paths[0], capture_output=True, text=True)


def test_without_torch_and_with_an_old_one(tmp_path):
    """An error about a name inside torch that a version lacks."""
    done = python("import attn_ext", ROOT)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: attn_ext needs torch >= 2.6, which is not installed: pip install torch"
    )
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("__version__ = '2.5.1+cpu'")
    done = python("import attn_ext", ROOT, tmp_path)
    assert done.stderr.splitlines()[-1] == (
        "ImportError: attn_ext needs torch >= 2.6, got 2.5.1+cpu: pip install -U torch"
    )


def test_a_source_tree_that_is_not_built(tmp_path):
    """Python started in the clone takes its attn_ext, not the installed one, and is slow without
    a word."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "attn_ext", tmp_path / "attn_ext", ignore=ignored)
    code = (
        "import torch, attn_ext; q = torch.ones(1, 1, 4, 8); print(attn_ext.attention(q, q, q)[0])"
    )
    done = python(code, tmp_path, SITE)
    assert done.returncode == 0, done.stderr
    message = f"_C is not built in {tmp_path}: run `pip install -e .` in the source tree"
    assert "RuntimeWarning" in done.stderr and message in done.stderr


def test_sdist_holds_what_a_build_needs(tmp_path):
    """Headers and GPU sources, which setuptools does not find by itself."""
    tree = tmp_path / "tree"
    tree.mkdir()
    folders = ("csrc", "attn_ext", "triton_kernels", "tests", "examples", "docs", "bench")
    for name in folders:
        ignored = shutil.ignore_patterns("*.so", "__pycache__", ".*")
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "Makefile"):
        shutil.copy(ROOT / name, tree)
    code = "from setuptools import build_meta as b; print(b.build_sdist('..'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(tmp_path / done.stdout.splitlines()[-1]) as archive:
        held = {name.split("/", 1)[-1] for name in archive.getnames()}
    for folder in folders:
        files = {str(f.relative_to(tree)) for f in (tree / folder).rglob("*") if f.is_file()}
        assert files and files <= held, files - held
