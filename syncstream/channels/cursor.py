"""`Cursor`: a reader's place in one channel.

A place has one of two forms (see `places`): `InWindow`, at a position of the channel's
window, or `InStore`, after the cursor's id in the broker's store. `Cursor.find` moves a
cursor from the store to the window as soon as the window has its id; trimming or
restarting a window moves it back to the store.

The meaning of a gap depends on the cursor's *origin*: `FROM_OUTSIDE`, it began with an
id that a client has presented, or of ``after``; `Since`, it began with the entries kept
at that time; `FOUND`, its id has been found in the channel's history.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from ..brokers.log import Entry
from ..protocol.sse import Event
from .places import UNREAD, InStore, InWindow
from .windows import Channel

__all__ = [
    "FOUND",
    "FROM_OUTSIDE",
    "Cursor",
    "Item",
    "Origin",
    "Since",
]


class _Origin(Enum):
    FROM_OUTSIDE = "its id, a client's or of `after`, has not been found yet"
    FOUND = "its id was found before, so a later gap means that the reader lagged"


FROM_OUTSIDE: Final = _Origin.FROM_OUTSIDE
FOUND: Final = _Origin.FOUND


class Since:
    """The cursor began before this head, with kept entries that were not promised.

    If these are trimmed before they are read, that is not a gap.
    """

    __slots__ = ("head",)

    def __init__(self, head: str) -> None:
        self.head = head


Origin = _Origin | Since


class Cursor:
    """A subscription's place in one channel.

    Attributes:
        record: The channel, with its window.
        last: The id after which it goes on; ``None``: an id that no broker can have.
        place: The same place, in the window or in the store.
        origin: The cursor's origin, which decides the meaning of a gap.
        since: The window's end when it began: entries set aside before are not for it.
            (A pattern's cursor gets none from the window, see `Patterns.overhear`.)
        sent: The id of the last event given out, which may be behind `last`.
    """

    # Not a dataclass: to make one takes as long as to import seven small modules.
    __slots__ = ("last", "origin", "place", "record", "sent", "since")

    def __init__(
        self,
        record: Channel,
        last: str | None,
        origin: Origin = FROM_OUTSIDE,
        since: int = 0,
    ) -> None:
        self.record = record
        self.last = last
        self.origin = origin
        self.since = since
        self.place: InWindow | InStore = UNREAD
        self.sent = last

    def copy(self) -> Cursor:
        """Return a cursor at the same place, with no event of its own given out."""
        copy = Cursor(self.record, self.last, self.origin, self.since)
        copy.place = self.place
        return copy

    @property
    def name(self) -> str:
        """The channel's name."""
        return self.record.name

    # Only the reader changes it. What looks at the window needs the hub's lock: all
    # methods but `mark` and `go_back`.

    def is_at_end(self) -> bool:
        """Tell whether there is nothing new."""
        place, record = self.place, self.record
        if isinstance(place, InStore):
            return place.end == record.log.end
        return place.position == record.log.end and not record.is_doubtful

    def find(self) -> int | None:
        """Move it to the window if that has its id, else to the store.

        Returns:
            The position in the window; ``None``: the store must be read.
        """
        window, place = self.record.log, self.place
        if isinstance(place, InWindow):
            if place.position >= window.first:
                return place.position
            self.place = UNREAD  # the window was trimmed or restarted
        position = None if self.last is None else window.after(self.last)
        if position is not None:
            self.place = InWindow(position)
        return position

    def is_late(self, position: int) -> bool:
        """Tell whether entries from a position on may include some not for it."""
        return position < self.since and self.record.aside >= position

    def read(self, position: int, limit: int) -> tuple[list[Entry], int]:
        """Return the entries for it from a position on, and the position after them."""
        entries = self.record.log.read(position, limit)
        end = position + len(entries)
        if self.is_late(position):
            entries = [
                entry
                for at, entry in enumerate(entries, position)
                if at >= self.since or not entry.is_aside
            ]
        return entries, end

    def advance(self, end: int) -> None:
        """Go on to a position in the window."""
        record, window = self.record, self.record.log
        # The readers at a window's end share one object.
        if record.place.position != end:
            record.place = InWindow(end)
        self.place = record.place
        self.last = window.head if end == window.end else window.entry(end - 1).id
        self.origin = FOUND

    def mark(self) -> Mark:
        """Return the state that reading changes, for `go_back`."""
        return self.last, self.place, self.origin, self.sent

    def go_back(self, mark: Mark) -> None:
        """Undo all reading since that mark."""
        self.last, self.place, self.origin, self.sent = mark


Mark = tuple[str | None, InWindow | InStore, Origin, str | None]
Item = tuple[Cursor, Entry | Event]
