"""What an installation meets: no compiler, no torch, an old one, a source tree that is not built;
and what the archive of the sources holds."""

import importlib.metadata
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from repository import ROOT, load

check_wheel, constrain = load("tests/package/check_wheel.py"), load("tests/package/constrain.py")
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


def requirements(name: str) -> set[str]:
    """A distribution and all that pip installs with it, by their normalized names."""
    found, ask = set(), {name}
    while ask:
        name = re.sub(r"[-_.]+", "-", ask.pop()).lower()
        try:
            required = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:  # of another platform
            continue
        found.add(name)
        ask |= {re.split(r"[^\w.-]", x)[0] for x in required if "extra ==" not in x} - found
    return found


ONLY_REQUIRED = """
import importlib.machinery, sys
class Installed(importlib.machinery.PathFinder):
    def find_spec(name, path=None, target=None):
        found = importlib.machinery.PathFinder.find_spec(name, path, target)
        return None if name in {others} else found
sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Installed
import warnings
warnings.filterwarnings("ignore", "Failed to initialize NumPy")
import torch, attn_ext
from attn_ext import inspect, nn, testing, distributed
from attn_ext.cli import main
q = torch.randn(1, 2, 5, 8, device="cpu", requires_grad=True)
attn_ext.attention(q, q, q, causal=True).sum().backward()
layer = nn.MultiheadAttention(8, 2, batch_first=True)
with inspect.record() as record:
    x = torch.randn(1, 5, 8, device="cpu")
    layer(x, x, x, need_weights=False)
try:
    inspect.look(record, out="shown", tokens=list("abcde"))
except ImportError as error:
    assert "pip install matplotlib (shown has the page" in str(error), error
else:
    raise AssertionError("there is a picture")
assert main.main(["doctor"]) == 0
"""


def test_with_what_pip_installs_and_nothing_else(tmp_path):
    """A library that only an extra brings, imported by all: numpy, which torch does not require."""
    required = requirements("attn_ext")
    assert "torch" in required and "numpy" not in required
    others = {
        name
        for name, brought_by in importlib.metadata.packages_distributions().items()
        if not {re.sub(r"[-_.]+", "-", x).lower() for x in brought_by} & required
    }
    assert "numpy" in others and not others & {"torch", "rich", "typer", "attn_ext"}
    done = python(ONLY_REQUIRED.format(others=sorted(others)), tmp_path, ROOT, SITE)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "shown" / "attention.html").stat().st_size > 10_000


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


def test_the_extension_needs_nothing_of_torch():
    """A header or a call of torch in csrc, which would tie a build to one version of torch."""
    from attn_ext import _C

    check_wheel.check_extension(Path(_C.__file__))


def test_a_foreign_library_is_seen():
    """The check above passing on whatever it is given."""
    torch_python = SITE / "torch" / "lib" / "libtorch_python.so"
    with pytest.raises(AssertionError, match=r"libtorch_python.so needs \['libc10'"):
        check_wheel.check_extension(torch_python)
    assert check_wheel.symbols_of_torch(torch_python)


def test_every_package_that_tests_install_has_a_pin():
    """A new release of a package, direct or not, that turns yesterday's green red."""
    lines = [x for x in constrain.PINS.read_text().splitlines() if x and x[0] != "#"]
    pins = {constrain.name_of(line) for line in lines}
    assert all(re.match(r"[\w.-]+==[\w.]+(; python_version (<|>=) \"3\.11\")?$", x) for x in lines)
    project = (ROOT / "pyproject.toml").read_text()
    extras = re.findall(r"^(?:plot|peers|demo|test|dev|integrations) = \[(.*)\]$", project, re.M)
    assert len(extras) == 6
    direct = [r for line in extras for r in re.findall(r'"([^"]+)"', line)]
    todo, seen = {"setuptools", "pybind11", "ninja", "timm", "rich", "typer"}, {"torch"}
    todo |= {constrain.name_of(requirement) for requirement in direct}
    assert "torch" not in pins and todo <= pins, todo - pins
    without_dependencies = {"timm"}  # `make test` installs it so: they would bring torchvision
    while todo - seen:
        name = (todo - seen).pop()
        seen.add(name)
        try:
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed here
        if name not in without_dependencies:
            plain = [r for r in asked if ";" not in r]  # the others depend on extras or machines
            todo |= {constrain.name_of(r) for r in plain}
    assert seen - {"torch"} <= pins, seen - pins


def test_what_torch_pins_is_left_to_torch(monkeypatch):
    """A pin of Triton that cannot be installed beside a torch with CUDA, which pins its own."""
    asked = ['triton==3.2.0; platform_system == "Linux"', "sympy==1.13.1", "numpy; extra == 'x'"]
    monkeypatch.setattr(constrain.metadata, "requires", lambda name: asked)
    lines = constrain.constraints()
    assert lines[0] == f"torch=={importlib.metadata.version('torch')}"
    assert not any(line.startswith("triton==") for line in lines)
    assert any(line.startswith("numpy==") for line in lines)
