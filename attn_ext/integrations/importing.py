"""Lets `import NAME` resolve to attn_ext's own modules where the real package is absent.

A finder at the end of sys.meta_path answers importlib.util.find_spec, import and
importlib.metadata; the path based finders come first, so an installed package always wins.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType


class _Distribution(importlib.metadata.Distribution):
    """What importlib.metadata reads of the stand-in."""

    def __init__(self, name: str, package: str, version: str):
        self._texts = {
            "METADATA": (
                f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
                "Summary: served by attn_ext\n"
            ),
            "top_level.txt": f"{package}\n",
        }

    def read_text(self, filename):
        return self._texts.get(filename)

    def locate_file(self, path):
        return importlib.util.find_spec("attn_ext").submodule_search_locations[0] / path


class StandIn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Package `package` (distribution `name`), whose modules are filled by functions.

    modules: full module name -> function that returns the module's contents as a dict.
    """

    def __init__(self, package: str, name: str, version: str, modules: dict[str, Callable]):
        self.package = package
        self.name = name
        self.version = version
        self.modules = modules

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.modules:
            return None
        inner = any(other.startswith(f"{fullname}.") for other in self.modules)
        return importlib.machinery.ModuleSpec(
            fullname, self, origin=f"attn_ext stand-in for {self.package}", is_package=inner
        )

    def create_module(self, spec):
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__.update(self.modules[module.__name__]())

    def find_distributions(self, context=None):
        wanted = getattr(context, "name", None)
        names = {self.name, self.package, self.name.replace("-", "_")}
        if wanted is None or wanted.lower() in names:
            yield _Distribution(self.name, self.package, self.version)

    def install(self) -> bool:
        """Put the stand-in in place unless the real package is there.  True if it is in place."""
        if self in sys.meta_path:
            return True
        if self.package in sys.modules or importlib.util.find_spec(self.package) is not None:
            return False
        sys.meta_path.append(self)
        importlib.invalidate_caches()
        return True

    def uninstall(self) -> None:
        """Take the stand-in and its modules away again."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            for module in self.modules:
                sys.modules.pop(module, None)
