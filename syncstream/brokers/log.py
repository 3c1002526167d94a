"""One channel's events in order: a bounded window, and positions in it.

History and live are the same log. A reader is a position in it, a number that only
grows; to resume is to begin after an id; who fell off the tail is told. An entry is
encoded once for all its readers, its id line included, and what several readers at
one position are behind is joined once.

**The chain**: each entry carries its own id and its predecessor's. Nothing is missing
between an id and an entry if and only if the entry names that id. (Better than
counters with an epoch: a failover that loses the newest events, and then stores
others under the same numbers, shows.)

Nothing here locks, waits or knows a clock: `Hub` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

__all__ = ["JOIN", "START", "Entry", "Log", "Page", "first_part", "flaw"]

START = "0"
"""Asks for the oldest entry that is kept. Brokers that outlive a restart have it as the
id before a channel's first entry, too; for others it is the id of no place."""

JOIN = 128 * 1024
"""Bytes that are read or joined at once, but for the last entry among them."""


class Entry:
    """One event of one channel, as it is stored; not to be changed.

    Attributes:
        id: Its id, `[0-9a-f]+-[0-9a-f]+`; what is set aside has that of the event
            before it, see `Log.set_aside`.
        prev: The id before it in its channel, `START` for the first.
        payload: Its encoded fields without the id line; see `hub.Payload`.
        time: When it came, seconds of `time.monotonic`.
    """

    __slots__ = ("_wire", "id", "payload", "prev", "time")

    def __init__(self, id: str, prev: str, payload: bytes, time: float = 0.0) -> None:
        self.id = id
        self.prev = prev
        self.payload = payload
        self.time = time
        self._wire: bytes | None = None

    @property
    def fields(self) -> bytes:
        """The event's fields as they are sent, without the id line."""
        if self.payload[:1] != b"\0":
            return self.payload
        return self.payload.partition(b"\n")[2]

    @property
    def tags(self) -> bytes:
        """What limits who gets it, ``b""`` for nothing."""
        if self.payload[:1] != b"\0":
            return b""
        return self.payload[1 : self.payload.index(b"\n")]

    @property
    def wire(self) -> bytes:
        """The event as it is sent, id line and all; encoded once."""
        wire = self._wire
        if wire is None:
            wire = self._wire = b"id: %b\n%b" % (self.id.encode(), self.fields)
        return wire

    @property
    def is_aside(self) -> bool:
        """It is told where it stands, and is no part of the channel's history."""
        return self.id == self.prev

    @property
    def size(self) -> int:
        """Bytes that it counts for: what it holds, and Python's share, roughly."""
        return 2 * len(self.payload) + 250

    def __repr__(self) -> str:
        return f"Entry({self.id!r}, after {self.prev!r}, {len(self.payload)} bytes)"


class Page:
    """What a broker has read of a channel.

    Attributes:
        entries: Oldest first, may be empty.
        complete: Nothing is missing between the id asked for and the first of
            them, or, where there are none, the head.
        head: The id of the channel's newest entry, `START` if it never had one.
    """

    __slots__ = ("complete", "entries", "head")

    def __init__(self, entries: Sequence[Entry], complete: bool, head: str) -> None:
        self.entries = entries
        self.complete = complete
        self.head = head


class Log:
    """A window on a channel: its newest entries.

    Attributes:
        first: The position of the oldest entry that is kept.
        end: The position that the next entry will have.
        head: The id of the newest entry, kept or not.
        base: The id before the oldest entry that is kept.
        size: Bytes that the entries count for.
    """

    __slots__ = ("_entries", "_joined", "_skip", "base", "end", "first", "head", "size")

    def __init__(self, head: str = START) -> None:
        self._entries: list[Entry] = []
        self._skip = 0  # entries at the list's beginning that are trimmed already
        self._joined: tuple[int, int, bytes] | None = None
        self.first = self.end = 0
        self.head = self.base = head
        self.size = 0

    def __len__(self) -> int:
        return len(self._entries) - self._skip

    def append(self, entry: Entry) -> None:
        """Add the newest entry, the one after `head`."""
        if not len(self):
            self.base = entry.prev
        self._entries.append(entry)
        self.end += 1
        self.head = entry.id
        self.size += entry.size

    def set_aside(self, payload: bytes, time: float) -> None:
        """Add what is told to those who are here, and to nobody who comes later.

        It carries the newest event's id: whoever comes back with that has missed
        nothing of the channel's history.
        """
        self.append(Entry(self.head, self.head, payload, time))

    def restart(self, head: str) -> None:
        """Forget all entries: what follows this id is not what followed them.

        No position of before is one of after: who was at the end is outside, too.
        """
        self.end += 1
        self.first = self.end
        self._entries, self._skip, self.size = [], 0, 0
        self._joined = None
        self.head = self.base = head

    def trim(self, count: int, since: float, size: float) -> None:
        """Drop the oldest until these bounds hold.

        Args:
            count: Keep so many at most.
            since: Keep none that is older than this time.
            size: Keep so many bytes at most, and one entry.
        """
        entries, skip = self._entries, self._skip
        drop = skip
        while drop < len(entries) and (
            len(entries) - drop > count
            or entries[drop].time < since
            or (self.size > size and len(entries) - drop > 1)
        ):
            self.size -= entries[drop].size
            drop += 1
        if drop == skip:
            return
        self.base = entries[drop - 1].id
        self.first += drop - skip
        # Not one by one: a list moves all its entries to drop the first.
        if drop > 64 and drop > len(entries) // 4:
            del entries[:drop]
            drop = 0
        elif drop == len(entries):
            entries.clear()
            drop = 0
        else:
            for place in range(skip, drop):
                entries[place] = _TRIMMED
        self._skip = drop

    def after(self, id: str) -> int | None:
        """Return the position after an id, ``None`` if it is not in this window.

        Of an event: what was set aside after it follows.
        """
        if id == self.base:
            return self.first
        entries = self._entries
        # From the end: who resumes has not been away for long.
        for place in range(len(entries) - 1, self._skip - 1, -1):
            if entries[place].id == id and not entries[place].is_aside:
                return self.first + place - self._skip + 1
        return None

    def entry(self, position: int) -> Entry:
        """Return the entry at a position that is kept."""
        return self._entries[position - self.first + self._skip]

    def read(self, position: int, limit: int) -> list[Entry]:
        """Return entries from a position on that is kept, oldest first.

        Args:
            position: Where to begin.
            limit: So many at most, and as many as have `JOIN` bytes.
        """
        place = position - self.first + self._skip
        return first_part(self._entries[place : place + limit])

    def joined(self, position: int) -> tuple[int, bytes]:
        """Return what follows a position as one chunk, and the position after it.

        For all who are at one position it is the same object.
        """
        joined = self._joined
        end = self.end
        # A chunk that is full is the same, whatever has come since.
        if (
            joined is not None
            and joined[0] == position
            and (joined[1] == end or len(joined[2]) >= JOIN)
        ):
            return joined[1:]
        place = position - self.first + self._skip
        entries = self._entries
        if place == len(entries) - 1:
            chunk = entries[place].wire
            self._joined = position, end, chunk
            return end, chunk
        parts, size = [], 0
        for entry in entries[place:]:
            parts.append(entry.wire)
            size += len(parts[-1])
            if size >= JOIN:
                break
        chunk = b"".join(parts)
        end = position + len(parts)
        # One assignment: others may read while this one writes.
        self._joined = position, end, chunk
        return end, chunk


def first_part(entries: Sequence[Entry]) -> list[Entry]:
    """Return the first of these entries, up to the one by which they have `JOIN` bytes.

    Who reads holds that much, however many large ones there are.
    """
    size = 0
    for count, entry in enumerate(entries, 1):
        size += len(entry.payload)
        if size >= JOIN:
            return list(entries[:count])
    return list(entries)


def flaw(entry: Entry) -> str | None:
    """Return why an entry is none that a hub has stored; ``None`` if it is one.

    Whoever may write to the engine may tell anything. What is not an event can be
    decoded by nobody; what has an id or a "reset" of its own deceives its readers.
    """
    id, prev, fields = entry.id, entry.prev, entry.payload
    if len(id) > _LONGEST_ID or not _ID.fullmatch(id):
        return "its id is none"
    if prev != START and (len(prev) > _LONGEST_ID or not _ID.fullmatch(prev)):
        return "the id before it is none"
    if prev == id:
        return "it follows itself"
    if fields[:1] == b"\0":
        tags, _, fields = fields[1:].partition(b"\n")
        if not _are_tags(tags):
            return "its tags are none"
    if fields.find(b"\n\n") != len(fields) - 2 or b"\r" in fields:
        return "it is not one event"
    if not (fields.startswith(b"data: ") or b"\ndata: " in fields):
        return "it has no data"
    if fields.startswith(b"id") or b"\nid" in fields:
        return "it has a second id"
    if b"event" in fields and _RESET.search(fields):
        return "it says that events are missing"
    if b"\0" in fields and _NUL_NAME.search(fields):
        return "its name is none"
    if not fields.isascii():
        try:
            fields.decode()
        except UnicodeDecodeError:
            return "it is not UTF-8"
    return None


def _are_tags(tags: bytes) -> bool:
    try:
        found = json.loads(tags)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(
        isinstance(names, list) and all(isinstance(name, str) for name in names)
        for names in found.values()
    )


# What a client may come back with: see `hub.Subscription`.
_LONGEST_ID = 40
_ID = re.compile(r"[0-9a-f]+-[0-9a-f]+")
_RESET = re.compile(rb"^event: ?reset$", re.MULTILINE)
_NUL_NAME = re.compile(rb"^event:.*\0", re.MULTILINE)
_TRIMMED = Entry("", "", b"")
