"""Triton kernels with one bug planted in their text."""

import importlib.util
import sys
from types import ModuleType

from repository import ROOT


def planted(kernels: str, before: str, after: str, folder) -> ModuleType:
    """The module triton_kernels/kernels/`kernels`.py with `after` in the one place of `before`."""
    text = (ROOT / "triton_kernels" / "kernels" / f"{kernels}.py").read_text()
    assert text.count(before) == 1, f"{kernels}.py has {text.count(before)} times {before!r}"
    return loaded(text.replace(before, after), folder)


def loaded(text: str, folder) -> ModuleType:
    """A module of kernels from its text."""
    path = folder / "planted.py"  # Triton reads the text of a kernel from its file
    path.write_text(text)
    spec = importlib.util.spec_from_file_location("planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def with_others(name: str, text: str, order, monkeypatch, folder) -> list[ModuleType]:
    """Kernels `name` from this text, and of those behind it in `order` from their own, which take
    its functions."""
    texts = {each: (ROOT / "triton_kernels" / "kernels" / f"{each}.py").read_text()
             for each in order[order.index(name) :]}  # fmt: skip
    modules = []
    for each, found in (texts | {name: text}).items():
        for other in texts:
            found = found.replace(f"attn_ext.triton_kernels.kernels.{other} ", f"planted_{other} ")
        (folder / each).mkdir()
        modules.append(loaded(found, folder / each))
        monkeypatch.setitem(sys.modules, f"planted_{each}", modules[-1])
    return modules
