"""Who may import whom.  Every import is read, also those inside functions: a circle, an arrow that
runs back, or a private name of another module fails here.
"""

import ast
from pathlib import Path

import pytest
from repository import ROOT

# Each layer may import those before it in this order, and its own modules.
LAYERS = (
    "core", "triton_kernels", "backends", "testing", "ops", "functional",
    ("nn", "inspect", "distributed"), "integrations", "measure", "root", "cli",
)  # fmt: skip
# these do not import each other, but that integrations bring several ranks to other libraries
APART = ("nn", "inspect", "distributed", "integrations")
BACKENDS = ("cpu", "cuda", "triton", "reference")  # nor do these
# A measurement that lies beside the kernels whose tiles it chooses, as `python -m` says it.
LATE = {"attn_ext.triton_kernels.tune": "measure"}


def name_of(path: Path) -> str:
    """The module's name as Python imports it."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "triton_kernels":
        parts.insert(0, "attn_ext")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    name_of(path): path
    for top in ("attn_ext", "triton_kernels")
    for path in sorted((ROOT / top).rglob("*.py"))
    if "attn_ext/triton_kernels" not in path.as_posix()  # a link of an editable install
}


COMPILED = {"attn_ext._C", "attn_ext._emulated"}


def imports(name: str) -> set[str]:
    """The modules of attn_ext that a module imports: `from package import module` names the
    module, `from module import name` the module, too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            whole = {f"{node.module}.{alias.name}" for alias in node.names} - COMPILED
            found |= {x if x in FILES else node.module for x in whole}
    return {x for x in found if x in FILES and x != name}


def layer_of(name: str) -> str:
    parts = name.split(".")
    if name in LATE:
        return LATE[name]
    return "root" if len(parts) == 1 else parts[1].replace("__main__", "cli")


def rank(layer: str) -> int:
    for index, names in enumerate(LAYERS):
        if layer in names if isinstance(names, tuple) else layer == names:
            return index
    raise AssertionError(f"{layer} belongs to no layer of {Path(__file__).name}")


@pytest.mark.parametrize("name", FILES)
def test_arrows_run_one_way(name):
    """A lower layer that needs a higher one; two features or backends that need each other."""
    mine = layer_of(name)
    for other in imports(name):
        theirs = layer_of(other)
        assert rank(theirs) <= rank(mine), f"{name} imports {other}"
        if mine in APART and theirs in APART and (mine, theirs) != ("integrations", "distributed"):
            assert mine == theirs, f"{name} imports {other}"
        if name in {f"attn_ext.backends.{b}" for b in BACKENDS}:
            assert other not in {f"attn_ext.backends.{b}" for b in BACKENDS}, (name, other)


def test_no_circle():
    """Two modules that need each other, by whatever way round."""
    arrows = {name: imports(name) for name in FILES}
    while True:
        free = [name for name, needs in arrows.items() if not needs & arrows.keys()]
        if not free:
            break
        for name in free:
            del arrows[name]
    assert not arrows, "a circle runs through " + ", ".join(sorted(arrows))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("name", FILES)
def test_no_private_name_crosses_a_module(name):
    """`from module import _name`, `module._name`: a change that its module believes its own."""
    tree = ast.parse(FILES[name].read_text())
    modules, private = {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "attn_ext":
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if is_private(alias.name) and whole not in COMPILED:
                    private.append(whole)
                if whole in FILES:
                    modules[alias.asname or alias.name] = whole
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id in modules
            and is_private(node.attr)
        ):
            private.append(f"{modules[node.value.id]}.{node.attr}")
    assert private == []
