"""Objects that operators know by name, since a compiled graph can hold a string."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

LIMIT = 1024  # packed documents give each step of a training a layout of its own

Value = TypeVar("Value")


class Names(Generic[Value]):
    """The values that were named last.  Those that a compiled graph asked for stay."""

    def __init__(self, limit: int = LIMIT):
        self.limit = limit
        self._kept: dict[str, Value] = {}
        self._recent: OrderedDict[str, Value] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept) + len(self._recent)

    def put(self, name: str, value: Value, keep: bool) -> str:
        """Remembers a value; returns its name."""
        if name in self._kept:
            return name
        if keep:
            self._kept[name] = self._recent.pop(name, value)
            return name
        self._recent[name] = value
        self._recent.move_to_end(name)
        if len(self._recent) > self.limit:
            self._recent.popitem(last=False)
        return name

    def get(self, name: str) -> Value:
        """The value of a name; RuntimeError where it is forgotten."""
        if name in self._kept:
            return self._kept[name]
        if name not in self._recent:
            raise RuntimeError(
                f"a backward of context_attention must follow its forward within {self.limit} "
                f"other layouts or options, got one of an older call ({name[:16]})"
            )
        return self._recent[name]
