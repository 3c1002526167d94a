"""A cursor's place in a channel: in the window, or in the store."""

from __future__ import annotations

from typing import Final

__all__ = ["UNREAD", "InStore", "InWindow"]


class InWindow:
    """A place in the window: the position of the next entry; do not change it.

    The position may have been trimmed since.
    """

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position


class InStore:
    """A place in the store: the broker has the next entries; do not change it.

    Attributes:
        end: The window's end before the last read, which found no more entries: while
            it stays the same, nothing is new. ``None``: the broker may have more.
    """

    __slots__ = ("end",)

    def __init__(self, end: int | None) -> None:
        self.end = end


UNREAD: Final = InStore(None)
