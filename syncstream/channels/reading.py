"""`Reading`: a subscription's position in all its channels, and reading from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence

from ..brokers.log import JOIN, UNKNOWN, Entry
from ..errors import Unavailable
from ..protocol.sse import Event
from ..runtime.waiter import Wakeable
from . import limits
from .cursor import FOUND, Cursor, Item, Mark, Since
from .ids import composite, is_id, parts_of
from .options import Failed, Options
from .pages import Pages
from .patterns import Patterns, overheard_item
from .payloads import Payloads, decoder_of
from .places import InWindow
from .windows import Channel, Windows

__all__ = ["Reading"]


class Reading:
    """A position: a cursor for each named channel, and for each pattern's channel.

    One thread or greenlet reads; announcements come from any thread.

    Args:
        windows, payloads: The hub's windows and encoder.
        options, tags: The subscription's options and tags.
        patterns: The subscription's patterns, if it has any.

    Attributes:
        windows: As given.
        cursors: The cursors of the named channels, in their order; empty before it has
            begun.
        patterns: As given.
    """

    __slots__ = (
        *("_options", "_payloads", "_tags", "_turn", "cursors", "patterns"),
        "windows",
    )

    def __init__(
        self,
        windows: Windows,
        payloads: Payloads,
        options: Options,
        tags: frozenset[str],
        patterns: Patterns | None = None,
    ) -> None:
        self.windows = windows
        self._payloads = payloads
        self._options = options
        self._tags = tags
        self._turn = 0  # the cursor that is read first
        self.cursors: tuple[Cursor, ...] = ()
        self.patterns = patterns

    # Its position.

    def begin(
        self,
        channels: tuple[str, ...],
        given: str | None,
        watch: Callable[[str], Channel | None],
    ) -> None:
        """Fix the position.

        Args:
            channels: Names and patterns.
            given: The client's Last-Event-ID; ``None`` for a first connection, which
                begins where the options say.
            watch: Has the broker announce a name or pattern, as `Windows.watch`.

        Raises:
            Closed, Denied, BrokerError: As from `Windows.read`, and from ``watch``.
        """
        after = self._options.after
        is_place = isinstance(after, str) and after not in ("now", "start")
        id = str(after) if given is None and is_place else given
        ids = None if id is None else parts_of(id, channels)
        cursors: list[Cursor] = []
        for name in channels:
            record = watch(name)
            if record is not None:
                since = record.log.end
                cursor = self._cursor(name, record, ids)
                cursor.since = since
                cursors.append(cursor)
            elif given is not None and self.patterns is not None:
                # No broker knows which channels had events since then.
                with self.windows.lock:
                    self.patterns.lose(name)
        self.cursors = tuple(cursors)

    def _cursor(self, name: str, record: Channel, ids: dict[str, str] | None) -> Cursor:
        if ids is not None:
            # The client chooses it: it may be any text.
            id = ids.get(name, "")
            return Cursor(record, id if is_id(id) else None)
        after = self._options.after
        if after == "now":
            head = self.windows.read(name, None).head
            return Cursor(record, head, FOUND)
        count = after if isinstance(after, int) else None
        last, head = self._pages().oldest(name, count)
        return Cursor(record, last, Since(head))

    def copy(self, options: Options, tags: frozenset[str]) -> Reading:
        """Return a reading at the same place for another subscription; no patterns."""
        copy = Reading(self.windows, self._payloads, options, tags)
        copy.cursors = tuple(cursor.copy() for cursor in self.cursors)
        return copy

    def is_where(self, other: Reading) -> bool:
        """Tell whether both are at the same place for certain; each has one channel.

        Call it under the hub's lock, or while nothing reads either of them.
        """
        (mine,), (theirs,) = self.cursors, other.cursors
        here, there = mine.place, theirs.place
        return (
            mine.record is theirs.record
            and isinstance(here, InWindow)
            and isinstance(there, InWindow)
            and here.position == there.position
            and not (mine.is_late(here.position) or theirs.is_late(here.position))
        )

    def id_at(self, cursor: Cursor, id: str) -> str:
        """Return the id for a client that has received a channel's event.

        For the other channels it contains the ids that the client has received, not
        those that were read. Patterns have no id: a reconnecting client gets a reset.
        """
        cursor.sent = id
        return self.sent_id() or id

    def last_id(self) -> str | None:
        """Return the id after which it goes on, ``None`` if there is none."""
        cursors = self.cursors
        if len(cursors) == 1 and self.patterns is None:
            return cursors[0].last or ""
        if not cursors:
            return None
        return composite([c.name for c in cursors], [c.last for c in cursors])

    def sent_id(self) -> str | None:
        """Return the id of what the client has received of several channels."""
        cursors = self.cursors
        return composite([c.name for c in cursors], [c.sent for c in cursors])

    # Waiters.

    def register(self, waiter: Wakeable) -> bool:
        """Have new events wake a waiter; ``False`` if some are waiting already.

        Call it under the hub's lock.
        """
        if self.patterns is not None and not self.patterns.is_at_end():
            return False
        if not all(cursor.is_at_end() for cursor in self.cursors):
            return False
        for cursor in self.cursors:
            cursor.record.waiters[waiter] = None
        return True

    def withdraw(self, waiter: Wakeable) -> None:
        """Stop new events from waking a waiter."""
        with self.windows.lock:
            for cursor in self.cursors:
                cursor.record.waiters.pop(waiter, None)

    # Reading on.

    def poll(
        self, waiter: Wakeable, *, is_eager: bool = False, is_delivery: bool = False
    ) -> tuple[bytes, int, bool] | None:
        """Return new events of a single named channel without asking the broker.

        This is the fast path for readers that need only the bytes.

        Args:
            waiter: The waiter that new events wake if there are none now.
            is_eager: Register the waiter also if all events are returned, which saves a
                call for each event.
            is_delivery: Count the events as delivered, once: under the lock that this
                holds anyway.

        Returns:
            Bytes, which others at this place share; the number of their events; and
            whether the waiter is registered, which it always is without bytes.
            ``None``: the broker must be asked, see `take`.
        """
        if not self.cursors:
            return None
        (cursor,) = self.cursors
        record = cursor.record
        window = record.log
        windows = self.windows
        with windows.lock:
            position: int | None
            place = cursor.place
            if type(place) is InWindow and place.position >= window.first:
                position = place.position
            else:
                position = cursor.find()
                if position is None:
                    return None
            while position < window.end:
                if record.tagged >= position or (
                    record.aside >= position and cursor.is_late(position)
                ):
                    entries, end = cursor.read(position, limits.READ)
                    ours = [e.wire for e in entries if self._is_for_us(e)]
                    chunk, count = b"".join(ours), len(ours)
                else:
                    end, chunk = window.joined(position)
                    count = end - position
                cursor.advance(end)
                if count:
                    is_last = is_eager and end == window.end and not record.is_doubtful
                    if is_last:
                        record.waiters[waiter] = None
                    if is_delivery:
                        windows.delivered += count
                    return chunk, count, is_last
                position = end
            if record.is_doubtful:
                return None
            record.waiters[waiter] = None
            return b"", 0, True

    def take(self) -> list[Item]:
        """Return the waiting items, or a part of them: entries, and gaps.

        Raises:
            Unavailable: The broker must be asked but does not answer, and no other item
                is waiting.
            Closed: The hub is closed.
            Denied: The engine denies access to one of the channels.
            Failed: ``conflate`` or ``on_gap`` has raised `Unavailable`.
        """
        items: list[Item] = []
        patterns, lock = self.patterns, self.windows.lock
        lost: list[str] = []
        overheard: list[tuple[str, bytes]] = []
        marks: list[tuple[Cursor, Mark]] = []
        try:
            if patterns is not None:
                with lock:
                    lost, overheard = patterns.take_lost(), patterns.take_overheard()
                for name in lost:
                    items += self._pages().lost(name)
                items += [overheard_item(*told) for told in overheard]
            size = 0
            for cursor in self._turns():
                marks.append((cursor, cursor.mark()))
                try:
                    if self._options.conflate is not None:
                        items += self._conflated(cursor)
                        continue
                    found = self._take_from(cursor)
                except Unavailable:
                    if not items:
                        raise
                    cursor.go_back(marks.pop()[1])
                    break  # give out the others' items first
                for item in found:
                    entry = item[1]
                    if isinstance(entry, Entry):
                        size += len(entry.payload)
                        if entry.payload[:1] == b"\0" and not self._is_for_us(entry):
                            continue
                    items.append(item)
                if size >= JOIN:
                    break
        except BaseException:
            # From `conflate`, `on_gap`, the broker, or a time-out. Nothing was given
            # out, so the next read begins at the same place, with the next cursor.
            with lock:
                if patterns is not None:
                    patterns.give_back(lost, overheard)
                for cursor, mark in marks:
                    cursor.go_back(mark)
            raise
        finally:
            self._end_turns([cursor for cursor, _ in marks])
        return items

    def _turns(self) -> Sequence[Cursor]:
        """Return the cursors that may have new events, in the order of reading.

        Cursors not reached the last time come first, so that a busy channel does not
        delay the others.
        """
        cursors, turn = self.cursors, self._turn
        if self.patterns is None:
            return cursors if not turn else (*cursors[turn:], *cursors[:turn])
        with self.windows.lock:
            behind = self.patterns.turns(self.windows)
        return [*cursors[turn:], *behind, *cursors[:turn]]

    def _end_turns(self, had: Sequence[Cursor]) -> None:
        """Remember which cursor comes after the last one that was read."""
        if not had or (self.patterns is None and len(self.cursors) == 1):
            return
        last = had[-1]
        self._turn = next((n for n, c in enumerate(self.cursors, 1) if c is last), 0)
        if self.patterns is not None:
            with self.windows.lock:
                self.patterns.end_turns(had)

    def _take_from(self, cursor: Cursor) -> list[Item]:
        """Return the items after a cursor: entries for any tags, and resets."""
        record = cursor.record
        with self.windows.lock:
            position = cursor.find()
            if position is not None:
                entries, end = cursor.read(position, limits.READ)
                if end > position:
                    cursor.advance(end)
                cursor.origin = FOUND
                if entries or not record.is_doubtful:
                    return [(cursor, entry) for entry in entries]
            end, limit = record.log.end, record.limit
        return self._pages().after(cursor, end, limit)

    def _pages(self) -> Pages:
        """Return the reader of the broker; it is made anew, as it is rarely needed."""
        return Pages(self.windows, self._payloads, self._options)

    def _is_for_us(self, entry: Entry) -> bool:
        if entry.payload[:1] != b"\0":
            return True
        tags = json.loads(entry.tags)
        only, exclude = tags.get("only"), tags.get("exclude")
        if only is not None and self._tags.isdisjoint(only):
            return False
        return exclude is None or self._tags.isdisjoint(exclude)

    def _conflated(self, cursor: Cursor) -> list[Item]:
        """Return the newest waiting item of each key, and gaps.

        Items that come meanwhile are left: they may come as fast as they are read.
        """
        assert self._options.conflate is not None
        record = cursor.record
        # Without the lock: an end or a head of a moment ago ends the loop as well.
        end, head = record.log.end, record.log.head
        is_known = head != UNKNOWN and not record.is_doubtful
        if not is_known:
            head = self.windows.read(cursor.name, None).head
        kept: dict[Hashable, Item] = {}
        while True:
            found = self._take_from(cursor)
            is_gap = False
            for item in found:
                entry = item[1]
                if isinstance(entry, Event):  # of a reset
                    kept[object()], is_gap = item, True
                    continue
                if not self._is_for_us(entry):
                    continue
                # Decoded with its own id: it is not given out yet.
                (event,) = decoder_of().feed(entry.wire)
                try:
                    key = self._options.conflate(event)
                except Unavailable as error:
                    raise Failed(error) from error
                kept.pop(key, None)
                kept[key] = item
            place = cursor.place
            if (
                is_gap
                or not found
                or (isinstance(place, InWindow) and place.position >= end)
                or any(entry.id == head for _, entry in found)
            ):
                return [*kept.values()]
