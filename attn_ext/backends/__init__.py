"""The backends: modules that run a call.  `registry` says what one is and chooses among them."""

from __future__ import annotations

import sys
from types import ModuleType

from attn_ext.backends import registry


class _Callable(ModuleType):
    """Makes `attn_ext.backends()` a call while `attn_ext.backends` stays the package."""

    def __call__(self) -> dict[str, str]:
        """Each backend's name, with "" where it runs on this machine, else reason and remedy."""
        return {name: registry.get(name).available() for name in registry.ORDER}


sys.modules[__name__].__class__ = _Callable
