"""attn_ext/__init__.pyi, which type checkers read, names what the functions take and return."""

import ast
import inspect
from pathlib import Path

import pytest

import attn_ext

STUB = Path(attn_ext.__file__).with_name("__init__.pyi")
TREE = ast.parse(STUB.read_text())
FUNCTIONS = {
    n.name: [f for f in TREE.body if isinstance(f, ast.FunctionDef) and f.name == n.name]
    for n in TREE.body
    if isinstance(n, ast.FunctionDef)
}
OPTIONS = {n.name: n for n in TREE.body if isinstance(n, ast.ClassDef)}


def fields(name: str) -> list[str]:
    """The options of a TypedDict, those of its bases first."""
    node = OPTIONS[name]
    own = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign)]
    return [f for base in node.bases if base.id in OPTIONS for f in fields(base.id)] + own


def test_every_public_name_is_there():
    """A function that a type checker says is not there."""
    imported = {
        alias.asname for n in TREE.body if isinstance(n, ast.ImportFrom) for alias in n.names
    }
    assert set(attn_ext.__all__) <= imported | set(FUNCTIONS)
    assert STUB.with_name("py.typed").exists()


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_parameters_are_those_of_the_function(name):
    """An argument that was added, renamed or moved on one side only."""
    if name == "backends":  # a module that can be called
        assert attn_ext.backends().keys() and FUNCTIONS[name][0].args.args == []
        return
    parameters = inspect.signature(getattr(attn_ext, name)).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional, named = ([p.name for p in parameters if p.kind is kind] for kind in kinds)
    for form in FUNCTIONS[name]:
        assert [a.arg for a in form.args.args] == positional
        found = [a.arg for a in form.args.kwonlyargs]
        if form.args.kwarg is not None and name != "explain":
            found += fields(form.args.kwarg.annotation.slice.id)
        assert sorted(found) == sorted(named)
        required = len(form.args.args) - len(form.args.defaults)
        assert required == sum(
            p.default is inspect.Parameter.empty and p.kind is kinds[0] for p in parameters
        )
