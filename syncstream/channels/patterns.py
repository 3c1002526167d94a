"""`Patterns`: the channels that match a subscription's patterns."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from itertools import islice

from ..brokers.log import Entry
from ..brokers.names import is_pattern, matches
from . import limits
from .cursor import FOUND, Cursor, Item
from .ids import NOWHERE
from .places import UNREAD
from .windows import Channel, Windows

__all__ = ["Patterns", "overheard_item"]


class Patterns:
    """The matching channels, and their news; all of it under the hub's lock.

    A channel gets a cursor with its first event, and keeps it as long as it has a
    window. The channels that the subscription names are not among these.

    Args:
        channels: The subscription's names and patterns.
    """

    __slots__ = (
        *("_behind", "_channels", "_cursors", "_lost", "_news", "_overheard"),
        "_room",
    )

    def __init__(self, channels: tuple[str, ...]) -> None:
        self._channels = channels
        self._lost: list[str] = []  # patterns whose channels may have lost events
        self._cursors: dict[str, Cursor] = {}
        # Channels with new events, and the id before those.
        self._news: dict[str, str] = {}
        # Cursors that may not be at their ends; the next turn is the first one's.
        self._behind: dict[str, Cursor] = {}
        # Channels, and the fields of their joins and leaves.
        self._overheard: deque[tuple[str, bytes]] = deque(maxlen=limits.WINDOW)
        # The number of cursors at which those without windows are removed.
        self._room = 64

    def is_at_end(self) -> bool:
        """Tell whether there is nothing to read."""
        return not (self._lost or self._news or self._behind or self._overheard)

    # Announcements.

    def discover(self, channel: str, prev: str) -> bool:
        """Record that a channel has new events after an id.

        Returns:
            Whether the reader must be woken.
        """
        if channel in self._channels:
            return False
        is_first = not self._news
        self._news.setdefault(channel, prev)
        return is_first

    def overhear(self, channel: str, fields: bytes) -> bool:
        """Record a join or leave of a channel.

        Returns:
            Whether the reader must be woken.
        """
        if channel in self._channels:
            return False
        self._overheard.append((channel, fields))
        return True

    def lose(self, channel: str | None) -> bool:
        """Record that announcements of a channel may have been lost.

        Args:
            channel: The channel's name, or a pattern for all of its channels; ``None``
                for any channels.

        Returns:
            Whether the reader must be woken.
        """
        is_named = channel is not None and not is_pattern(channel)
        if channel is not None and is_named:
            if channel in self._channels:
                return False
            cursor = self._cursors.get(channel)
            if cursor is not None:
                return self.discover(channel, cursor.last or NOWHERE)
            if channel in self._news:
                return False
        lost = [
            name
            for name in self._channels
            if is_pattern(name)
            and (channel in (None, name) or (is_named and matches(name, str(channel))))
        ]
        self._lost += [name for name in lost if name not in self._lost]
        return True

    # Reading.

    def take_lost(self) -> list[str]:
        """Return the patterns that need a reset, and forget them."""
        lost, self._lost = self._lost, []
        return lost

    def take_overheard(self) -> list[tuple[str, bytes]]:
        """Return channels, each with the fields of a join or leave, and forget them."""
        overheard = [*self._overheard]
        self._overheard.clear()
        return overheard

    def give_back(self, lost: list[str], overheard: list[tuple[str, bytes]]) -> None:
        """Put back what was taken and not given out."""
        self._lost = [*lost, *self._lost]
        self._overheard.extendleft(reversed(overheard))

    def turns(self, windows: Windows) -> list[Cursor]:
        """Return the cursors to read now, as many as are read at once."""
        news, self._news = self._news, {}
        for channel, prev in news.items():
            cursor = self._cursors.get(channel)
            record = windows.record(channel)
            if cursor is None:
                cursor = Cursor(record, prev, FOUND, since=sys.maxsize)
                self._cursors[channel] = cursor
            elif cursor.record is not record:
                cursor.record, cursor.place = record, UNREAD
            self._behind[channel] = cursor
        if len(self._cursors) > self._room:
            # The next event of an idle channel counts as its first one again.
            self._cursors = {
                name: cursor
                for name, cursor in self._cursors.items()
                if name in self._behind or windows.channels.get(name) is cursor.record
            }
            self._room = 2 * len(self._cursors) + 64
        return [*islice(self._behind.values(), limits.READ)]

    def end_turns(self, had: Sequence[Cursor]) -> None:
        """Move the cursors that were read and are still behind to the end."""
        for cursor in had:
            is_behind = self._behind.pop(cursor.name, None) is not None
            if is_behind and not cursor.is_at_end():
                self._behind[cursor.name] = cursor


def overheard_item(channel: str, fields: bytes) -> Item:
    """Return an item for a join or leave of a pattern's channel."""
    cursor = Cursor(Channel(channel), NOWHERE)
    return cursor, Entry(NOWHERE, NOWHERE, fields)
