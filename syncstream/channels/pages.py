"""What follows a cursor in the store: pages, and a reset where something is missing.

Where that is, the `chain` tells. Whether it is a gap depends on the options, and on
where the cursor began: what was trimmed may be what nobody has promised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from ..brokers.log import START, Entry, Page, first_part, flaw
from ..errors import Unavailable
from ..protocol.sse import Event
from . import limits
from .chain import follows
from .cursor import FOUND, FROM_OUTSIDE, Cursor, Item, Since
from .gap import gap
from .ids import NOWHERE, is_id
from .options import Failed, Options
from .payloads import Payloads
from .places import UNREAD, InStore
from .windows import Channel, Windows

__all__ = ["Pages"]


class Pages:
    """Reads the broker for a subscription.

    Args:
        windows, payloads: The hub's.
        options: The subscription's.
    """

    __slots__ = ("_options", "_payloads", "_windows")

    def __init__(
        self,
        windows: Windows,
        payloads: Payloads,
        options: Options,
    ) -> None:
        self._windows = windows
        self._payloads = payloads
        self._options = options

    def after(self, cursor: Cursor, end: int, limit: int) -> list[Item]:
        """Return what follows a cursor: entries of anybody's, and resets.

        Args:
            cursor: It goes on.
            end: The window's, before this.
            limit: So many entries at most.

        Raises:
            Closed, Denied, BrokerError: As from `Windows.read`.
            Failed: ``on_gap`` has raised `Unavailable`; its other errors are raised.
        """
        page = self._windows.read(cursor.name, cursor.last or NOWHERE, limit)
        entries = first_part(page.entries)
        if len(entries) < len(page.entries):
            cursor.record.limit = len(entries)
        elif len(entries) == limit < limits.READ:
            cursor.record.limit = min(2 * limit, limits.READ)
        last = entries[-1].id if entries else page.head
        if cursor.record.is_doubtful:
            self._windows.settle(cursor.record, page.head, end)
        is_moved = bool(entries) or not page.complete
        if is_moved or isinstance(cursor.place, InStore):
            cursor.place = InStore(end) if last == page.head else UNREAD
        items = self._chained(cursor, page, entries)
        cursor.origin = FOUND
        return items

    def oldest(self, name: str, count: int | None) -> tuple[str, str]:
        """Return the id before the oldest of a channel's entries, and its head's.

        Args:
            count: Of so many of its newest; ``None`` for all that are kept.
        """
        read = self._windows.read
        if count is None:
            page = read(name, START, 1)
            return page.entries[0].prev if page.entries else page.head, page.head
        count = min(count, limits.MOST_KEPT)
        newest = self._windows.newest(name, count)
        if newest is not None:
            return newest
        page = read(name, START, limits.READ)
        head = page.head
        oldest = page.entries[0].prev if page.entries else head
        before: deque[str] = deque(maxlen=count)  # each of the newest
        # More may come faster than they are read: only up to the head of now.
        while page.entries:
            for entry in page.entries:
                before.append(entry.prev)
                if entry.id == head:
                    return before[0], head
            last = page.entries[-1].id
            page = read(name, last, limits.READ)
            if page.complete:
                continue
            is_anew = page.entries and page.entries[0].prev == oldest
            # Those were dropped meanwhile, and maybe all; or one of them was removed.
            if is_anew or not self._is_kept(name, last):
                before.clear()
                if is_anew or not read(name, head, 1).complete:
                    break
                oldest = page.entries[0].prev if page.entries else head
        return before[0] if before else head, head

    def _chained(
        self, cursor: Cursor, page: Page, entries: Sequence[Entry]
    ) -> list[Item]:
        """Return a page's entries, and a reset wherever the chain is broken.

        What was removed, or is no event, shows there; the cursor goes past it.
        """
        is_replay = self._options.on_gap == "replay"
        reason = "unknown"
        # What the next entry must name; `None` where something is missing for certain.
        last = cursor.last
        if not page.complete:
            following = self._following(cursor, page, entries)
            if following is not None:
                entries = following
            elif self._is_only_older(cursor):
                last = cursor.sent = entries[0].prev if entries else page.head
            else:
                last = None
                is_known = cursor.origin is not FROM_OUTSIDE
                if is_known and not self._is_kept(cursor.name, cursor.last):
                    reason = "lagged"
        items: list[Item] = []
        for entry in entries:
            problem = flaw(entry)
            if problem is not None:
                self._windows.say_malformed(cursor.name, problem)
                last = None
                continue
            if not follows(entry, last):
                if not is_replay:
                    last = None
                    break
                items += self._reset(cursor, reason, entry.prev)
                reason = "unknown"
            items.append((cursor, entry))
            last = entry.id
        if last is None:  # what follows is not to be given out, or has not come yet
            is_past = is_replay and bool(entries) and is_id(entries[-1].id)
            last = entries[-1].id if is_past else page.head
            if not is_replay:
                cursor.place = UNREAD  # more may have come
            items += self._reset(cursor, reason, last)
        cursor.last = last
        return items

    def _following(
        self, cursor: Cursor, page: Page, entries: Sequence[Entry]
    ) -> Sequence[Entry] | None:
        """Return what follows an id that was removed, if something names it."""
        if cursor.last in (None, START):
            return None
        while entries:
            for place, entry in enumerate(entries):
                if follows(entry, cursor.last):
                    return entries[place:]
            # Of so many of the newest the first may come after the first page.
            is_newest = isinstance(self._options.after, int)
            if not (is_newest and isinstance(cursor.origin, Since)):
                break
            last = entries[-1].id
            if last == page.head:
                break
            page = self._windows.read(cursor.name, last, limits.READ)
            if not page.complete and not self._is_kept(cursor.name, last):
                break  # it has been trimmed meanwhile, and is read from the oldest on
            entries = first_part(page.entries)
            cursor.place = UNREAD  # more may have come
        return None

    def _is_kept(self, name: str, last: str | None) -> bool:
        """Tell whether an event is kept, though its next is not.

        Then that was removed, and nobody was too slow: only the oldest are trimmed.
        What follows an id that is not kept begins with the oldest.
        """
        for _ in range(3):  # what is trimmed meanwhile proves nothing
            oldest, after, still = (
                [entry.id for entry in self._windows.read(name, id, 1).entries]
                for id in (START, last or NOWHERE, START)
            )
            if not oldest or after == oldest:
                return False
            if oldest == still:
                return True
        return False

    def _is_only_older(self, cursor: Cursor) -> bool:
        """Tell whether what was trimmed had come before the cursor began.

        "All that is kept" and "the newest" are less on a busy channel by the time
        when they are read. That is no gap, as long as nothing newer is missing.
        """
        origin = cursor.origin
        if not isinstance(origin, Since):
            return False
        return self._windows.read(cursor.name, origin.head, 1).complete

    def lost(self, name: str) -> list[Item]:
        """Return the reset of a pattern; its cursor stands for all its channels."""
        cursor = Cursor(Channel(name), NOWHERE)
        return self._reset(cursor, "unknown", NOWHERE)

    def _reset(self, cursor: Cursor, reason: str, before: str) -> list[Item]:
        """Return a reset and a snapshot, after which what follows an id follows."""
        snapshot: list[Event] = []
        if callable(self._options.on_gap):
            event = self._payloads.snapshot
            try:
                snapshot = [event(item) for item in self._options.on_gap()]
            except Unavailable as error:
                raise Failed(error) from error
        # Who is cut off within a snapshot needs all of it.
        id = NOWHERE if snapshot else before
        items: list[Item] = [(cursor, gap(cursor.name, reason, id))]
        if snapshot:
            *most, last = snapshot
            items += [(cursor, event) for event in most]
            last = Event(last.data, event=last.event, retry=last.retry, id=before)
            items.append((cursor, last))
        return items
