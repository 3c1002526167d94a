"""A cursor's place in a channel: in the window, or in the store."""

from __future__ import annotations

from typing import Final

__all__ = ["UNREAD", "InStore", "InWindow"]


class InWindow:
    """What comes next is at a position of the window; not to be changed.

    It may have been trimmed since.
    """

    __slots__ = ("position",)

    def __init__(self, position: int) -> None:
        self.position = position


class InStore:
    """What comes next is read from the broker; not to be changed.

    Attributes:
        end: The window's end before the broker was asked, and had nothing more: while
            it is that, nothing is new. ``None``: the broker may have more.
    """

    __slots__ = ("end",)

    def __init__(self, end: int | None) -> None:
        self.end = end


UNREAD: Final = InStore(None)
