"""torchvision's names while timm is imported where there is none (no CPU build fits every torch).

timm uses torchvision for data loading and for one frozen batch norm; its models run without it.  A
name of the stub is an empty class: whoever computes with one fails at once.
"""

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types


class _Enumeration(type):
    """Classes whose members are their own names (InterpolationMode.NEAREST ...)."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Stub(types.ModuleType):
    """A module of which every public name is an empty class."""

    __path__: list = []  # noqa: RUF012  (a package, so that submodules are looked for)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Enumeration(name, (), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        """Spec of torchvision and everything below it."""
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        """An empty module."""
        return _Stub(spec.name)

    def exec_module(self, module):
        """Nothing to run."""


@contextlib.contextmanager
def torchvision_stub():
    """Within it `import torchvision` works; afterwards it is gone again, so that other libraries
    do not take it for the real one.
    """
    finder = _Finder()
    sys.meta_path.append(finder)  # after the others: a real torchvision wins
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n, m in sys.modules.items() if isinstance(m, _Stub)]:
            del sys.modules[name]
