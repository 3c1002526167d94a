"""A reader's position in a channel, and the ids that stand for several positions."""

from __future__ import annotations

import hashlib
import re
from collections import deque
from collections.abc import (
    Iterable,
)
from dataclasses import dataclass
from typing import Any

from ..brokers.log import Entry
from ..protocol.sse import Event
from . import limits
from .windows import Channel

__all__ = [
    "Brought",
    "Cursor",
    "MAX_ID",
    "NOWHERE",
    "OUTSIDE",
    "composite",
    "hash_of",
    "is_id",
    "overheard_item",
]
MAX_ID = 4096  # characters of an id that are looked at
_ID = re.compile(r"[0-9a-f]+(-[0-9a-f]+)?")
NOWHERE = "-"  # an id that no broker has
OUTSIDE = -1  # a position that no window has


def is_id(id: str) -> bool:
    return len(id) <= 40 and _ID.fullmatch(id) is not None


@dataclass(slots=True)
class Cursor:
    """A subscription's place in one channel.

    Attributes:
        last: The id after which it goes on.
        sent: The id of what was given out last; it may be behind.
        position: The same in the window, or `OUTSIDE`: it is read from the broker.
        seen: The window's end before the broker was asked, and had nothing more, or
            `OUTSIDE` if it may have. While the window's end is that, nothing is new.
        is_begun: It was found once, so that a gap is one of a lag.
        since: The window's end when it began: what was set aside before that is not
            for it. A pattern's gets none of it there, see `Subscription.overhear`.
        start: The head when it began, if it began before that, with entries that it
            was not promised; ``""`` otherwise, and later.
    """

    name: str
    record: Channel
    last: str
    position: int = OUTSIDE
    seen: int = OUTSIDE
    is_begun: bool = False
    sent: str = ""
    start: str = ""
    since: int = 0

    def __post_init__(self) -> None:
        self.sent = self.last

    def is_at_end(self) -> bool:
        """Tell whether there is nothing new; under the hub's lock."""
        # Outside of the window it is read from the broker, to its end.
        is_outside = self.position < 0 or self.record.is_doubtful
        return self.record.log.end == (self.seen if is_outside else self.position)

    def is_late(self) -> bool:
        """Tell whether there may be what is not for it; under the hub's lock."""
        return self.position < self.since and self.record.aside >= self.position

    def find(self) -> bool:
        """Tell whether its place is in the window; under the hub's lock."""
        window = self.record.log
        if self.position < window.first:  # it was trimmed, or begun anew
            place = window.after(self.last) if self.last else None
            self.position = OUTSIDE if place is None else place
        return self.position >= 0

    def advance(self, end: int) -> None:
        """Go on to a position in the window; under the hub's lock."""
        window = self.record.log
        self.position = end
        self.last = window.head if end == window.end else window.entry(end - 1).id
        self.is_begun, self.start = True, ""

    def read(self, limit: int) -> tuple[list[Entry], int]:
        """Return what there is for it in the window, and the position after that."""
        position, window = self.position, self.record.log
        entries = window.read(position, limit)
        end = position + len(entries)
        if self.is_late():
            entries = [
                entry
                for place, entry in enumerate(entries, position)
                if place >= self.since or not entry.is_aside
            ]
        return entries, end

    def place(self) -> tuple[Any, ...]:
        """Return what reading changes, for `go_back`."""
        place = self.last, self.position, self.seen
        return *place, self.is_begun, self.sent, self.start

    def go_back(self, place: tuple[Any, ...]) -> None:
        """Undo all reading since that place."""
        self.last, self.position, self.seen = place[:3]
        self.is_begun, self.sent, self.start = place[3:]


class Brought:
    """What a subscription's patterns have brought; all of it under the hub's lock.

    Attributes:
        cursors: Of each channel, as long as it has a window.
        news: Channels with something new, and the id before that.
        behind: Cursors that may not be at their ends, whose turn is next first.
        overheard: Channels, and fields of who came or went there.
        room: So many cursors are kept before those without windows are looked for.
    """

    __slots__ = ("behind", "cursors", "news", "overheard", "room")

    def __init__(self) -> None:
        self.cursors: dict[str, Cursor] = {}
        self.news: dict[str, str] = {}
        self.behind: dict[str, Cursor] = {}
        self.overheard: deque[tuple[str, bytes]] = deque(maxlen=limits.WINDOW)
        self.room = 64


Item = tuple["Cursor", "Entry | Event"]


def overheard_item(channel: str, fields: bytes) -> Item:
    """Return who came to a pattern's channel, or went; it has no place there."""
    cursor = Cursor(channel, Channel(), NOWHERE)
    return cursor, Entry(NOWHERE, NOWHERE, fields)


def composite(names: Iterable[str], ids: Iterable[str]) -> str:
    """Return one id for several channels; `Subscription._places` takes it apart."""
    pairs = zip(names, ids, strict=True)
    return ",".join(f"{hash_of(name)}.{id}" for name, id in pairs)


def hash_of(name: str) -> str:
    # So long that no two names have the same, not even of who looks for such.
    return hashlib.blake2b(name.encode(), digest_size=10).hexdigest()
