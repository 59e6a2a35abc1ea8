"""The Triton backend where it cannot run: reasons with a remedy, and nothing else breaks."""

import subprocess
import sys

import pytest
import torch

import attn_ext
from attn_ext.backends import triton


def run(program: str) -> str:
    """The output of a Python process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: the backend can run")
def test_cpu_tensors_are_refused_with_the_remedy():
    """An error from inside Triton, or a silent fallback."""
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        attn_ext.attention(q, q, q, backend="triton")


def test_importing_attn_ext_does_not_import_the_kernels():
    """A second of import time for users who never call them, and an error without triton."""
    program = """
import sys, attn_ext
attn_ext.backends()
print([name for name in sys.modules if name.startswith("attn_ext.triton_kernels")])
"""
    assert run(program).strip() == "[]"


def test_without_triton_all_else_works():
    """A hard dependency on an optional package."""
    program = """
import importlib.util, torch
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "triton" else find(name, *a)
import attn_ext
assert "pip install triton" in attn_ext.backends()["triton"]
q = torch.randn(1, 1, 4, 8)
attn_ext.attention(q, q, q)
try:
    attn_ext.attention(q, q, q, backend="triton")
except NotImplementedError as error:
    print(error)
"""
    assert "triton is not installed; run `pip install triton`" in run(program)


def test_an_old_triton_is_refused(monkeypatch):
    """Kernels that fail to compile on a Triton that they do not know."""
    monkeypatch.setattr(triton.importlib.metadata, "version", lambda name: "3.1.0")
    triton._installed.cache_clear()
    try:
        assert "3.6 or newer, got 3.1.0" in triton._installed()
    finally:
        triton._installed.cache_clear()


def test_the_kernels_are_never_a_top_level_module():
    """OpenAI's package triton_kernels shadowed by ours."""
    program = """
import runpy, pathlib, attn_ext.triton_kernels as ours
try:
    runpy.run_path(str(pathlib.Path(ours.__file__)), run_name="triton_kernels")
except ImportError as error:
    print(error)
"""
    assert "attn_ext.triton_kernels" in run(program)
