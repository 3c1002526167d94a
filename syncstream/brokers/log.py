"""One channel's events in order: a bounded window, and positions in it.

History and live events are the same log. A reader is a position in it, a number that
only grows. To resume is to begin after an id; a reader that fell off the tail is told.
An entry is encoded once for all its readers, including its id line, and the chunk that
follows a position is joined once for all readers there.

**The chain**: each entry carries its own id and its predecessor's. Nothing is missing
between an id and an entry if and only if the entry names that id as its predecessor.
(Counters with an epoch would not show a failover that loses the newest events and then
stores others under the same numbers; the chain does.)

Nothing here locks, waits or reads a clock: `Hub` does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

__all__ = ["JOIN", "START", "UNKNOWN", "Entry", "Log", "Page", "first_part", "flaw"]

START = "0"
"""The id that asks for the oldest kept entry. Brokers that outlive a restart use it as
the id before a channel's first entry, too; for others it names no position."""

UNKNOWN = ""
"""The head of a log of whose channel nothing is known: its first entry says what it
follows."""

JOIN = 128 * 1024
"""Bytes that are read or joined at once; the last entry may exceed it."""


class Entry:
    """One event of one channel, as it is stored; do not change it.

    Attributes:
        id: The event's id, `[0-9a-f]+-[0-9a-f]+`; an entry that is set aside has the id
            of the event before it, see `Log.set_aside`.
        prev: The id of the event before it in its channel, `START` for the first.
        payload: The encoded fields without the id line, perhaps after a line of tags.
        time: The time of its arrival, `time.monotonic`.
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
        """The JSON of the tags that select its subscribers, ``b""`` for all."""
        if self.payload[:1] != b"\0":
            return b""
        return self.payload[1 : self.payload.index(b"\n")]

    @property
    def wire(self) -> bytes:
        """The event as it is sent, including the id line; encoded once."""
        wire = self._wire
        if wire is None:
            wire = self._wire = b"id: %b\n%b" % (self.id.encode(), self.fields)
        return wire

    @property
    def is_aside(self) -> bool:
        """Whether it is for present readers only and no part of the history."""
        return self.id == self.prev

    @property
    def size(self) -> int:
        """The bytes of memory that it occupies, roughly."""
        return 2 * len(self.payload) + 250

    def __repr__(self) -> str:
        return f"Entry({self.id!r}, after {self.prev!r}, {len(self.payload)} bytes)"


class Page:
    """The events that a broker has read from a channel.

    Attributes:
        entries: Oldest first, may be empty.
        complete: Whether nothing is missing between the requested id and the first
            entry or, without entries, the head.
        head: The id of the channel's newest entry. A channel that never had one has
            `START` or another id of its broker's choice.
    """

    __slots__ = ("complete", "entries", "head")

    def __init__(self, entries: Sequence[Entry], complete: bool, head: str) -> None:
        self.entries = entries
        self.complete = complete
        self.head = head


class Log:
    """A window on a channel: its newest entries.

    Attributes:
        first: The position of the oldest kept entry.
        end: The position of the next entry to come.
        head: The id of the newest entry, kept or not.
        base: The id before the oldest kept entry.
        size: The sum of the entries' `Entry.size`, in bytes.
        counted: The part of ``size`` that its owner has added to a sum of several logs.
    """

    __slots__ = (
        *("_entries", "_joined", "_skip", "base", "counted", "end", "first"),
        *("head", "size"),
    )

    def __init__(self, head: str = START) -> None:
        self._entries: list[Entry] = []
        self._skip = 0  # trimmed entries at the list's beginning
        self._joined: tuple[int, int, bytes] | None = None
        self.first = self.end = 0
        self.head = self.base = head
        self.size = self.counted = 0

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
        """Add an entry for present readers only; readers that come later skip it.

        It has the newest event's id: a client that reconnects with that id has missed
        nothing of the channel's history.
        """
        self.append(Entry(self.head, self.head, payload, time))

    def restart(self, head: str) -> None:
        """Forget all entries, because the events after this id do not follow them.

        All earlier positions become invalid, even that of a reader at the end.
        """
        self.end += 1
        self.first = self.end
        self._entries, self._skip, self.size = [], 0, 0
        self._joined = None
        self.head = self.base = head

    def trim(self, count: int, since: float, size: float) -> None:
        """Drop the oldest entries until these bounds hold.

        Args:
            count: The maximum of entries.
            since: Drop entries that came before this `time.monotonic`.
            size: The maximum of bytes; one entry stays even if it is larger.
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
        # In batches: to delete its first entries, a list moves all others.
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
        """Return the position after an event's id, ``None`` if the window lacks it.

        Entries that were set aside after the event come after that position, too.
        """
        if id == self.base:
            return self.first
        entries = self._entries
        # From the end: most readers resume after a short absence.
        for place in range(len(entries) - 1, self._skip - 1, -1):
            if entries[place].id == id and not entries[place].is_aside:
                return self.first + place - self._skip + 1
        return None

    def entry(self, position: int) -> Entry:
        """Return the entry at a position, which must be kept."""
        return self._entries[position - self.first + self._skip]

    def read(self, position: int, limit: int) -> list[Entry]:
        """Return entries from a position on, oldest first, up to `JOIN` bytes.

        Args:
            position: The position of the first entry, which must be kept, or `end`.
            limit: The maximum of entries.
        """
        place = position - self.first + self._skip
        return first_part(self._entries[place : place + limit])

    def joined(self, position: int) -> tuple[int, bytes]:
        """Return the position after the next chunk, and the chunk.

        All readers at one position get the same object.

        Args:
            position: The position of the chunk's first entry, which must be kept.
        """
        joined = self._joined
        end = self.end
        # A full chunk stays the same when new entries come.
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
        # One assignment: other threads may read it meanwhile.
        self._joined = position, end, chunk
        return end, chunk


def first_part(entries: Sequence[Entry]) -> list[Entry]:
    """Return the first entries, up to the one with which they reach `JOIN` bytes.

    This bounds a reader's memory, however large the entries are.
    """
    size = 0
    for count, entry in enumerate(entries, 1):
        size += len(entry.payload)
        if size >= JOIN:
            return list(entries[:count])
    return list(entries)


def flaw(entry: Entry) -> str | None:
    """Return why no hub can have stored this entry; ``None`` for a valid one.

    Every program with access to the engine can write to it. An invalid event breaks its
    readers, and one with its own id or the name "reset" deceives them.
    """
    id, prev, fields = entry.id, entry.prev, entry.payload
    if len(id) > _LONGEST_ID or not _ID.fullmatch(id):
        return "its id is invalid"
    if prev != START and (len(prev) > _LONGEST_ID or not _ID.fullmatch(prev)):
        return "its predecessor's id is invalid"
    if prev == id:
        return "it names itself as its predecessor"
    if fields[:1] == b"\0":
        tags, _, fields = fields[1:].partition(b"\n")
        if not _are_tags(tags):
            return "its tags are invalid"
    if fields.find(b"\n\n") != len(fields) - 2 or b"\r" in fields:
        return "it is not exactly one event"
    if not (fields.startswith(b"data: ") or b"\ndata: " in fields):
        return "it has no data"
    if fields.startswith(b"id") or b"\nid" in fields:
        return "it has a second id"
    if b"event" in fields and _RESET.search(fields):
        return "its name is reset, which is reserved for gaps"
    if b"\0" in fields and _NUL_NAME.search(fields):
        return "its name contains NUL"
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


# A client may come back with such an id: see `channels.ids`.
_LONGEST_ID = 40
_ID = re.compile(r"[0-9a-f]+-[0-9a-f]+")
_RESET = re.compile(rb"^event: ?reset$", re.MULTILINE)
_NUL_NAME = re.compile(rb"^event:.*\0", re.MULTILINE)
_TRIMMED = Entry("", "", b"")
