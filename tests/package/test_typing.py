"""What type checkers see of the public functions: overloads in the modules themselves, whose
parameters are those of the function, and what a call returns by return_lse and return_stats.
"""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import attn_ext

ROOT = Path(attn_ext.__file__).parent
SOURCES = [ROOT / "functional" / f"{n}.py" for n in ("common", "dense", "varlen", "decode",
                                                     "additive")]  # fmt: skip
NODES = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
OPTIONS = {n.name: n for n in NODES if isinstance(n, ast.ClassDef)}


def overloads(name: str) -> list[ast.FunctionDef]:
    """The overloads of a function."""
    functions = [n for n in NODES if isinstance(n, ast.FunctionDef) and n.name == name]
    return [f for f in functions if any(ast.unparse(d) == "overload" for d in f.decorator_list)]


FUNCTIONS = {name: forms for name in attn_ext.__all__ if (forms := overloads(name))}


def fields(name: str) -> list[str]:
    """The options of a TypedDict, those of its bases first."""
    node = OPTIONS[name]
    own = [f.target.id for f in node.body if isinstance(f, ast.AnnAssign)]
    bases = [ast.unparse(base).rpartition(".")[2] for base in node.bases]
    return [f for base in bases if base in OPTIONS for f in fields(base)] + own


def test_the_functions_whose_results_vary_have_overloads():
    """A function that a type checker says returns anything; a stub beside the code."""
    varying = [name for name in attn_ext.__all__ if "return_lse" in str(signature_of(name))]
    assert sorted(FUNCTIONS) == sorted(varying) and len(varying) == 5
    assert (ROOT / "py.typed").exists() and not list(ROOT.rglob("*.pyi"))


def signature_of(name: str) -> inspect.Signature | None:
    value = getattr(attn_ext, name)
    return inspect.signature(value) if inspect.isfunction(value) else None


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_parameters_are_those_of_the_function(name):
    """An argument that was added, renamed or moved on one side only."""
    parameters = signature_of(name).parameters.values()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    positional, named = ([p.name for p in parameters if p.kind is kind] for kind in kinds)
    for form in FUNCTIONS[name]:
        assert [a.arg for a in form.args.args] == positional
        found = [a.arg for a in form.args.kwonlyargs]
        found += fields(form.args.kwarg.annotation.slice.id)
        assert sorted(found) == sorted(named)
        required = len(form.args.args) - len(form.args.defaults)
        assert required == sum(
            p.default is inspect.Parameter.empty and p.kind is kinds[0] for p in parameters
        )


def public(module: str):
    """(name, function) of the functions and methods that a module's __all__ names."""
    found = importlib.import_module(module)
    for name in found.__all__:
        value = getattr(found, name)
        if inspect.isfunction(value) and name not in FUNCTIONS:
            yield name, value
        elif inspect.isclass(value) and value.__module__.startswith("attn_ext"):
            for each, method in vars(value).items():
                if inspect.isfunction(method) and (each == "__init__" or each[0] != "_"):
                    yield f"{name}.{each}", method


@pytest.mark.parametrize("module", ["", ".distributed", ".inspect", ".nn"])
def test_every_parameter_has_a_type(module):
    """An editor that shows nothing of what a function takes."""
    missing = [
        f"{name}: {parameter.name}"
        for name, function in public(f"attn_ext{module}")
        for parameter in list(inspect.signature(function).parameters.values())
        if parameter.annotation is inspect.Parameter.empty and parameter.name != "self"
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]  # fmt: skip
    assert missing == []
