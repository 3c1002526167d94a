"""Reading the log by a connection: pages, the edge, and new events of all channels."""

from __future__ import annotations

import sqlite3
from typing import Any

from ...runtime.clock import time
from ..ids import parse_id, spell_id
from ..log import Entry, Page
from .database import Bounds

__all__ = ["Row", "edge", "empty_nonce", "newest", "page", "tail"]

_PAGE = 8 << 20  # bytes read at once

Row = tuple[int, str, Entry]  # place, channel, event


def page(
    connection: sqlite3.Connection,
    name: str,
    after: str | None,
    limit: int,
    bounds: Bounds,
) -> Page:
    """Read a page of a channel; see `Broker.read`."""
    connection.execute("BEGIN")
    try:
        return _page(connection, name, after, limit, bounds)
    finally:
        # An open snapshot would keep the WAL from restarting.
        connection.rollback()


def _page(
    connection: sqlite3.Connection,
    name: str,
    after: str | None,
    limit: int,
    bounds: Bounds,
) -> Page:
    execute = connection.execute
    row = execute(
        "SELECT id, last, nonce FROM channel WHERE name = ?", (name,)
    ).fetchone()
    if row is None:
        head = spell_id(0, empty_nonce(connection))
        return Page((), after in (None, head), head)
    channel, last, nonce = row
    head = spell_id(last, nonce)
    if after is None or after == head:
        return Page((), True, head)
    capacity, max_age, _ = bounds
    since = 0 if max_age is None else int((time.time() - max_age) * 1000)
    oldest = max(0, last - capacity)  # the number before the oldest event
    number, _ = parse_id(after) or (-1, 0)
    if oldest <= number < last:
        entries = _entries(connection, channel, number, last, limit, since)
        if entries and entries[0].prev == after:
            return Page(entries, True, head)
        # The event is kept but the next one was removed: return the later events.
        row = execute(
            "SELECT nonce, (SELECT min(number) FROM event WHERE channel = ?1 AND"
            " number > ?2) FROM event WHERE channel = ?1 AND number = ?2",
            (channel, number),
        ).fetchone()
        if row and spell_id(number, row[0]) == after and row[1] != number + 1:
            oldest = number
    # From the first event that is new enough, all count as kept: a clock that was
    # put back makes no holes.
    (first,) = execute(
        "SELECT min(number) FROM event WHERE channel = ? AND number > ? AND time >= ?",
        (channel, oldest, since),
    ).fetchone()
    if first is None:
        return Page((), False, head)
    entries = _entries(connection, channel, first - 1, last, limit, since)
    return Page(entries, False, head)


def edge(
    connection: sqlite3.Connection, name: str, count: int, bounds: Bounds
) -> tuple[str, str]:
    """Return the id before the newest ``count`` events, and the head's id."""
    capacity, max_age, _ = bounds
    since = 0 if max_age is None else int((time.time() - max_age) * 1000)
    # One statement, for one consistent moment.
    row = connection.execute(
        "SELECT last, channel.nonce, number - 1, prev FROM channel"
        " LEFT JOIN (SELECT channel, number, prev FROM event WHERE time >= ?1 AND"
        " channel = (SELECT id FROM channel WHERE name = ?2)"
        " ORDER BY number DESC LIMIT ?3) AS e"
        " ON e.channel = channel.id AND number > last - ?4"
        " WHERE name = ?2 ORDER BY number LIMIT 1",
        (since, name, count, capacity),
    ).fetchone()
    if row is None:
        head = spell_id(0, empty_nonce(connection))
        return head, head
    last, nonce, before, prev = row
    head = spell_id(last, nonce)
    return (head if before is None else spell_id(before, prev)), head


def _entries(
    connection: sqlite3.Connection,
    channel: int,
    number: int,
    last: int,
    limit: int,
    since: int,
) -> list[Entry]:
    """Return the events after a number, unless the first one is too old."""
    rows = connection.execute(
        "SELECT number, nonce, prev, time, payload FROM event"
        " WHERE channel = ? AND number > ? AND number <= ?"
        " ORDER BY number LIMIT ?",
        (channel, number, last, limit),
    )
    now = time.monotonic()
    entries: list[Entry] = []
    size = 0
    for number, nonce, prev, at, payload in rows:
        if not entries and at < since:
            break
        entries.append(_entry(number, nonce, prev, payload, now))
        size += len(entries[-1].payload)
        if size > _PAGE:
            break
    rows.close()
    return entries


def newest(connection: sqlite3.Connection) -> int:
    """Return the place of the newest event of all channels."""
    row = connection.execute(
        "SELECT seq FROM sqlite_sequence WHERE name = 'event'"
    ).fetchone()
    return row[0] if row else 0


def tail(connection: sqlite3.Connection, after: int) -> list[Row]:
    """Return the place, channel and entry of each event after a place."""
    rows = connection.execute(
        "SELECT seq, name, number, event.nonce, prev, payload"
        " FROM event JOIN channel ON channel.id = event.channel"
        " WHERE seq > ? ORDER BY seq LIMIT 500",
        (after,),
    )
    now = time.monotonic()
    found = []
    size = 0
    for seq, name, number, nonce, prev, payload in rows:
        entry = _entry(number, nonce, prev, payload, now)
        found.append((seq, name if isinstance(name, str) else "", entry))
        size += len(entry.payload)
        if size > _PAGE:
            break
    rows.close()
    return found


def empty_nonce(connection: sqlite3.Connection) -> int:
    """Return the nonce of all channels that never had an event."""
    (empty,) = connection.execute("SELECT empty FROM life").fetchone()
    found: int = empty
    return found


def _entry(number: Any, nonce: Any, prev: Any, payload: Any, now: float) -> Entry:
    """Return a row's event; for a foreign row, an event that `flaw` refuses.

    SQLite accepts any type in any column.
    """
    try:
        ids = spell_id(number, nonce), spell_id(number - 1, prev)
    except (TypeError, ValueError):
        return Entry("", "", b"", now)
    return Entry(*ids, payload if isinstance(payload, bytes) else b"", now)
