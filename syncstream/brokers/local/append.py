"""Storing events in the log, and making room for them."""

from __future__ import annotations

import os

from ...runtime.clock import time
from ..ids import make_nonce, spell_id
from .database import WAL, Bounds, Database, Items
from .read import empty_nonce

__all__ = ["Appender"]

MAX_CHANNELS = 100_000  # the maximum of remembered channels, with or without events
_WAL_MAX = 16 << 20  # bytes of the WAL for a full checkpoint
_SEEN = 2000  # milliseconds after which all listeners have seen an event
_SWEEP = 64  # events between two searches for old events
_CHANNELS = 5000  # channels checked in one search for empty ones


class Appender:
    """Used with the lock, which is the right to write, and the database's guard."""

    def __init__(self, database: Database, bounds: Bounds) -> None:
        self._database = database
        self._bounds = bounds
        self._swept = 0  # events since the last search for old ones
        self._swept_to = 0  # the last channel of the last search for empty ones
        self._added = 0  # channels since that search
        self._commits = 0  # since the last checkpoint
        self._stored = 0  # bytes since the last checkpoint

    def store(self, items: Items) -> list[str]:
        """Add events, within a transaction; return their ids."""
        execute = self._database.connection.execute
        now = int(time.time() * 1000)
        capacity, _, _ = self._bounds
        # For each channel: id, number and nonce of its head, and the number at first.
        heads: dict[str, list[int]] = {}
        rows = []
        ids = []
        nonces = os.urandom(4 * len(items))
        for place, (name, payload) in enumerate(items):
            head = heads.get(name)
            if head is None:
                head = heads[name] = self._head(name)
            channel, number, prev, _ = head
            number += 1
            nonce = int.from_bytes(nonces[4 * place : 4 * place + 4], "big")
            rows.append((channel, number, nonce, prev, now, payload))
            head[1:3] = number, nonce
            ids.append(spell_id(number, nonce))
        self._database.connection.executemany(
            "INSERT INTO event(channel, number, nonce, prev, time, payload)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )
        for channel, number, nonce, before in heads.values():
            execute(
                "UPDATE channel SET last = ?, nonce = ? WHERE id = ?",
                (number, nonce, channel),
            )
            # In batches: readers ignore events beyond the capacity. Recent events stay:
            # on a busy machine listeners may still have to see them.
            if number > capacity and number // 32 != before // 32:
                execute(
                    "DELETE FROM event WHERE channel = ? AND number <= ? AND time < ?",
                    (channel, number - capacity, now - _SEEN),
                )
        size = sum(len(row[5]) for row in rows)
        self._stored += size
        self._swept += len(rows) + size // 4096
        if self._swept >= _SWEEP:
            self._sweep(now)
        return ids

    def _head(self, name: str) -> list[int]:
        execute = self._database.connection.execute
        # A foreign row may be beyond the head: skip its number.
        row = execute(
            "SELECT id, max(last, ifnull((SELECT max(number) FROM event"
            " WHERE channel = channel.id AND number < 1 << 60), 0)), nonce"
            " FROM channel WHERE name = ?",
            (name,),
        ).fetchone()
        if row is not None:
            return [*row, row[1]]
        self._added += 1
        channel = execute(
            "INSERT INTO channel(name, last, nonce) VALUES (?, 0, 0)", (name,)
        ).lastrowid
        return [channel or 0, 0, empty_nonce(self._database.connection), 0]

    def _sweep(self, now: int) -> None:
        """Delete old or surplus events, more than have come since the last sweep."""
        execute = self._database.connection.execute
        _, max_age, max_size = self._bounds
        count, self._swept = 2 * self._swept, 0
        if max_age is not None:
            execute(
                "DELETE FROM event WHERE seq <= (SELECT max(seq) FROM"
                " (SELECT seq, time FROM event ORDER BY seq LIMIT ?) WHERE time < ?)",
                (count, now - int(max_age * 1000)),
            )
        # Events from the future (the clock was put back) age from now on.
        execute(
            "UPDATE event SET time = ?1 WHERE time > ?1 AND seq <= (SELECT max(seq)"
            " FROM (SELECT seq FROM event ORDER BY seq LIMIT ?2))",
            (now, count),
        )
        (page_size,) = execute("PRAGMA page_size").fetchone()
        (pages,) = execute("PRAGMA page_count").fetchone()
        (free,) = execute("PRAGMA freelist_count").fetchone()
        # Deleting frees pages; the file does not shrink.
        if (pages - free) * page_size > max_size:
            self._shrink(max_size // 16)
        if self._added > 1000:
            self._added = 0
            self._forget_channels()

    def _shrink(self, size: int) -> None:
        """Delete the oldest events, as many as have this many bytes."""
        last = 0
        rows = self._database.connection.execute(
            "SELECT seq, length(payload) FROM event ORDER BY seq"
        )
        for seq, length in rows:
            last = seq
            size -= length + 100
            if size <= 0:
                break
        rows.close()
        self._database.connection.execute("DELETE FROM event WHERE seq <= ?", (last,))

    def _forget_channels(self) -> None:
        """Forget channels without events if there are very many channels.

        A client with such a channel's head cannot be told any more whether events came
        since, so the heads of all channels without events become unknown.
        """
        execute = self._database.connection.execute
        (channels,) = execute("SELECT count(*) FROM channel").fetchone()
        if channels <= MAX_CHANNELS:
            return
        rows = execute(
            "SELECT id FROM channel WHERE id > ? ORDER BY id LIMIT ?",
            (self._swept_to, _CHANNELS),
        ).fetchall()
        # At the end, begin again.
        self._swept_to = rows[-1][0] if len(rows) == _CHANNELS else 0
        idle = (
            rows
            and execute(
                "DELETE FROM channel WHERE id BETWEEN ? AND ? AND NOT EXISTS"
                " (SELECT 1 FROM event WHERE event.channel = channel.id)",
                (rows[0][0], rows[-1][0]),
            ).rowcount
        )
        if idle:
            execute("UPDATE life SET empty = ?", (make_nonce(),))

    def checkpoint(self) -> None:
        """Make a checkpoint if the WAL is large; with the lock."""
        self._commits += 1
        if self._commits < 64 and self._stored < WAL:
            return
        self._commits = self._stored = 0
        size = self._database.wal_size()
        if size < WAL:
            return
        execute = self._database.connection.execute
        if size < _WAL_MAX:
            execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            return
        # Wait for readers, so that the WAL can restart, but not for long.
        execute("PRAGMA busy_timeout=20")
        execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        execute("PRAGMA busy_timeout=250")
