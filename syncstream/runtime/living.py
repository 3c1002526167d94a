"""`Living`: all objects of a kind, as long as they are used elsewhere."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar

__all__ = ["Living"]

T = TypeVar("T")


class Living(Generic[T]):
    """Objects that it does not keep alive; all methods from any thread.

    It replaces `weakref.WeakSet`, whose iteration runs Python code for each object and
    raises RuntimeError if another thread adds one meanwhile.
    """

    def __init__(self) -> None:
        self._all: weakref.WeakValueDictionary[int, T] = weakref.WeakValueDictionary()

    def add(self, one: T) -> None:
        self._all[id(one)] = one

    def all(self) -> list[T]:
        """Return those that are alive; one that is being added may be missing."""
        # `valuerefs` copies them in one step; the other iterators do not.
        found = [reference() for reference in self._all.valuerefs()]
        return [one for one in found if one is not None]
