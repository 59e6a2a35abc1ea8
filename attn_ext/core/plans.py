"""The memory of calls that look alike: every plan that the package keeps is in a `Plans`."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T")
LIMIT = 4096  # plans; then all of them are forgotten, which costs each call the long way once


class Plans(dict, Generic[T]):
    """A dict of at most LIMIT plans, by what a call looks like.  Keys of calls are made of
    `attn_ext.backends.looks` and of whole slices of `attn_ext.core.schema.Call`, so that a field
    that is added belongs to them.
    """

    def keep(self, key: Hashable, plan: T) -> T:
        """`plan`, remembered under `key`."""
        if len(self) >= LIMIT:
            self.clear()
        self[key] = plan
        return plan
