"""The SQLite database: its tables, reads and writes."""

from __future__ import annotations

import _thread
import logging
import os
import sqlite3
import weakref
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from ...errors import Unavailable
from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiting import say
from ..ids import make_nonce, parse_id, spell_id
from ..log import Entry, Page
from .files import SAFE, Lock, file_mode, make_file, settle

__all__ = [
    "APPLICATION",
    "Database",
    "Row",
    "SUFFIXES",
    "entry_of",
    "text_of",
]

log = logging.getLogger("syncstream.brokers.local")

VERSION = 1  # the version of the tables
MAX_CHANNELS = 100_000  # the maximum of remembered channels, with or without events

APPLICATION = 0x73796E63  # "sync": distinguishes our databases from others
_PAGE = 8 << 20  # bytes read at once
_WAL, _WAL_MAX = (
    4 << 20,
    16 << 20,
)  # bytes of the WAL for a passive checkpoint, and full
_SEEN = 2000  # milliseconds after which all listeners have seen an event
_SWEEP = 64  # events between two searches for old events
_CHANNELS = 5000  # channels checked in one search for empty ones

_TABLES = files(__package__).joinpath("tables.sql").read_text("utf-8")
# secure_delete, Debian's default, overwrites trimmed events with zeros.
_SETTINGS = (
    "synchronous=NORMAL",
    "wal_autocheckpoint=0",
    f"journal_size_limit={_WAL // 2}",
    "mmap_size=0",
    "secure_delete=OFF",
)

Items = Sequence[tuple[str, bytes]]
Row = tuple[int, str, Entry]  # place, channel, event
Bounds = tuple[int, "float | None", int]  # capacity, max_age, max_size


_Identity = tuple[tuple[int, int], ...]  # device and inode of each file
SUFFIXES = "", "-wal", "-shm"
_ASIDE = "-aside"
_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _close_all(known: _Identity | None) -> None:
    """Close this process's connections to a database; with the lock."""
    for database in list(_databases):
        identity = database.identity
        if known is None or identity is None or identity[0] != known[0]:
            continue
        with database.guard:
            database.close()


class Database:
    """A connection to the log, for one thread at a time.

    Attributes:
        guard: Held while a thread uses the connection, and during a fork, for which
            the connection is closed. Take the `Lock` before it if you need both.
    """

    def __init__(self, path: str) -> None:
        # Reentrant: a signal's handler may fork.
        self.guard = native(_thread, "RLock")()
        self._path = path
        self._file = f"{path}/log.db"
        self.identity: _Identity | None = None
        self._connection: sqlite3.Connection | None = None
        self._swept = 0  # events since the last search for old ones
        self._swept_to = 0  # the last channel of the last search for empty ones
        self._added = 0  # channels since that search
        self._commits = 0  # since the last checkpoint
        self._stored = 0  # bytes since the last checkpoint
        _databases.add(self)

    @property
    def connection(self) -> sqlite3.Connection:
        if self._connection is None:  # a signal handler has forked
            raise sqlite3.ProgrammingError("closed by a fork")
        return self._connection

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def is_current(self) -> bool:
        """Tell whether it is open and all its files are in place."""
        return self.identity is not None and self._find() == self.identity

    def _find(self) -> _Identity | None:
        """Return the identity of the present files, ``None`` unless all are there."""
        try:
            found = [os.stat(self._file + suffix) for suffix in SUFFIXES]
        except OSError:  # opening them again will raise the error
            return None
        return tuple((file.st_dev, file.st_ino) for file in found)

    def _is_split(self) -> bool:
        """Tell whether this process has an older set of these files open.

        SQLite shares its index (-shm) among a process's connections: a new connection
        would use the old index, whatever file has its name now.
        """
        found = [other.identity for other in list(_databases)]
        return any(
            other[0] == self.identity[0] and other != self.identity
            for other in found
            if other is not None and self.identity is not None
        )

    def _has_stray_index(self) -> bool:
        """Tell whether there is an index (-shm) whose WAL was removed.

        SQLite makes the index after the WAL, and removes it before the WAL.
        """
        try:
            found = os.stat(f"{self._file}-shm")
            is_stray = not os.path.exists(f"{self._file}-wal")
            return is_stray and os.path.samestat(found, os.stat(f"{self._file}-shm"))
        except FileNotFoundError:
            return False

    def open_to_read(self) -> bool:
        """Open the files if all are there, without the lock; return whether they were.

        Raises:
            Unavailable: It is not a log of this version.
        """
        if self.is_open:  # closing it needs the lock
            return False
        # A process that makes files holds the lock: they are unusable for others until
        # their rights are set.
        before = self._find()
        if before is None:
            return False
        try:
            self._connect()
        except (FileNotFoundError, sqlite3.OperationalError):
            return False  # perhaps it is being made or removed just now
        if before == self.identity and not self._is_split():
            return True
        self.close()
        return False

    def open(self) -> None:
        """Open the files, or make them; with the lock, and without the guard.

        Raises:
            Unavailable: It is not a log of this version.
        """
        if not os.path.exists(self._file):
            with suppress(FileNotFoundError):  # the process that moved it was killed
                os.rename(f"{self._file}{_ASIDE}", self._file)
        known = self.identity
        if known is not None:
            self._leave_files(known)
        if not os.path.exists(self._file):
            # They belong to a removed database, which may still be in use.
            for suffix in SUFFIXES[1:]:
                with suppress(FileNotFoundError):
                    os.unlink(self._file + suffix)
        elif self._has_stray_index():
            with suppress(FileNotFoundError):
                os.unlink(f"{self._file}-shm")
        make_file(self._path, "log.db")
        is_made = not os.path.exists(f"{self._file}-wal")
        with self.guard:
            self._connect(may_make=True)
            if self._is_split():
                self.close()
                self._leave_files(None)
                self._connect(may_make=True)
            self._compare(known, is_made)

    def _compare(self, known: _Identity | None, is_made: bool) -> None:
        """Break all chains if a WAL was removed, and the last events with it.

        Otherwise readers that lack those events would continue with the new ones. The
        lock's file contains the inode of the WAL in use, so that one process does this
        once; it is empty after the last process has closed the log.

        Args:
            known: The files that this process used until now.
            is_made: This WAL is new, even if it has the inode of an older one.
        """
        assert self.identity is not None
        mine = str(self.identity[1][1]).encode()
        noted = self._noted()
        if noted == mine and not is_made:
            return
        if noted or (known is not None and (is_made or known[1] != self.identity[1])):
            execute = self.connection.execute
            execute("BEGIN IMMEDIATE")
            # As if one more event of each channel had been stored and deleted.
            execute(
                "UPDATE channel SET last = last + 1, nonce = abs(random() % 4294967296)"
            )
            execute("UPDATE life SET empty = ?", (make_nonce(),))
            execute("COMMIT")
        self._note(mine)

    def _noted(self) -> bytes:
        fd = os.open(f"{self._path}/lock", os.O_RDONLY | SAFE)
        try:
            return os.read(fd, 64)
        finally:
            os.close(fd)

    def _note(self, text: bytes) -> None:
        fd = os.open(f"{self._path}/lock", os.O_WRONLY | SAFE)
        try:
            os.ftruncate(fd, 0)
            os.write(fd, text)
        finally:
            os.close(fd)

    def _leave_files(self, known: _Identity | None) -> None:
        """Close this process's connections to files that are not in place any more."""
        text = (
            "%s: its files were removed or replaced while in use, so recent events may"
            " be lost; subscribers get a reset. If a cleaner of temporary files did it,"
            " use local:/PATH"
        )
        say(log, logging.WARNING, text, self._path)
        try:
            found = os.stat(self._file)
        except FileNotFoundError:
            _close_all(known)
            return
        here = found.st_dev, found.st_ino
        if known is not None and here != known[0]:
            # SQLite notices the moved database, but its WAL must not stay for the new
            # one.
            for suffix, one in zip(SUFFIXES[1:], known[1:], strict=True):
                with suppress(FileNotFoundError):
                    other = os.stat(self._file + suffix)
                    if (other.st_dev, other.st_ino) == one:
                        os.unlink(self._file + suffix)
            _close_all(known)
            return
        # Closing the last connection makes a checkpoint and removes the WAL by name,
        # which is other processes' by now. SQLite does not if the database was moved.
        os.rename(self._file, f"{self._file}{_ASIDE}")
        try:
            _close_all((here,))
        finally:
            os.rename(f"{self._file}{_ASIDE}", self._file)

    def _connect(self, may_make: bool = False) -> None:
        if os.stat(self._file).st_nlink > 1:
            raise Unavailable(
                f"{self._file} has a second name (a hard link), under which SQLite"
                " would keep another log: remove that name, or stop all processes and"
                " replace the file by a copy (cp, then mv)"
            )
        connection = sqlite3.connect(  # mode=rw: a link must not make it create a file
            f"file:{quote(os.fsencode(self._file))}?mode=rw",
            uri=True,
            timeout=0.25,
            isolation_level=None,
            check_same_thread=False,
        )
        connection.text_factory = text_of
        try:
            self._check(connection, may_make=may_make)
            for setting in _SETTINGS:
                connection.execute(f"PRAGMA {setting}")
            identity = self._find()
            if identity is None:
                raise sqlite3.OperationalError("its files are being removed just now")
            folder = os.path.dirname(self._file)
            rights = file_mode(folder), os.stat(folder).st_gid
            for suffix in SUFFIXES:  # files of earlier releases
                settle(self._file + suffix, *rights)
        except BaseException:
            connection.close()
            raise
        self.identity = identity
        self._connection = connection

    def _check(self, connection: sqlite3.Connection, may_make: bool) -> None:
        execute = connection.execute
        execute("BEGIN")  # another process may be making the tables
        (version,) = execute("PRAGMA user_version").fetchone()
        (application,) = execute("PRAGMA application_id").fetchone()
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        execute("COMMIT")
        if application != APPLICATION and (tables or application):
            raise Unavailable(f"{self._file} is another application's database")
        if version not in (0, VERSION):
            raise Unavailable(
                f"{self._file} has tables of version {version}, but this syncstream"
                f" needs {VERSION}: use one release everywhere, or a local:NAME for"
                " each, or stop all processes and remove the folder"
            )
        if version:
            return
        if not may_make:
            raise sqlite3.OperationalError("its tables are being made just now")
        (mode,) = execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise Unavailable(
                f"{self._path} is on a file system without SQLite's WAL mode, got mode"
                f" {mode!r}: use another folder, with local:/PATH"
            )
        execute("BEGIN IMMEDIATE")
        for statement in _TABLES.strip().rstrip(";").split(";"):
            execute(statement)
        execute("INSERT INTO life VALUES (?)", (make_nonce(),))
        execute(f"PRAGMA application_id={APPLICATION}")
        execute(f"PRAGMA user_version={VERSION}")
        execute("COMMIT")

    def finish(self, lock: Lock, timeout: float) -> None:
        """Close it and its lock, for good."""
        is_held = self._connection is not None and lock.hold(timeout)
        try:
            if is_held and self.identity is not None and not self.is_current():
                self._leave_files(self.identity)
            # Even without the lock: a checkpoint at the last close needs all closed.
            with self.guard:
                self.close()
        finally:
            if is_held:
                lock.release()
            lock.close()

    def close(self) -> None:
        """Close it; with the lock, as the last connection's close is a checkpoint."""
        connection, self._connection = self._connection, None
        is_current, self.identity = self.is_current(), None
        if connection is not None:
            connection.close()
            if is_current and not os.path.exists(f"{self._file}-wal"):
                with suppress(OSError):  # then whole chains will be broken: harmless
                    self._note(b"")

    # Writing.

    def store(self, items: Items, bounds: Bounds) -> list[str]:
        """Add events, within a transaction; return their ids."""
        execute = self.connection.execute
        now = int(time.time() * 1000)
        capacity, _, _ = bounds
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
        self.connection.executemany(
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
            self._sweep(now, bounds)
        return ids

    def _head(self, name: str) -> list[int]:
        execute = self.connection.execute
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
        return [channel or 0, 0, self._empty(), 0]

    def _empty(self) -> int:
        (empty,) = self.connection.execute("SELECT empty FROM life").fetchone()
        found: int = empty
        return found

    def _sweep(self, now: int, bounds: Bounds) -> None:
        """Delete old or surplus events, more than have come since the last sweep."""
        execute = self.connection.execute
        _, max_age, max_size = bounds
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
        rows = self.connection.execute(
            "SELECT seq, length(payload) FROM event ORDER BY seq"
        )
        for seq, length in rows:
            last = seq
            size -= length + 100
            if size <= 0:
                break
        rows.close()
        self.connection.execute("DELETE FROM event WHERE seq <= ?", (last,))

    def _forget_channels(self) -> None:
        """Forget channels without events if there are very many channels.

        A client with such a channel's head cannot be told any more whether events came
        since, so the heads of all channels without events become unknown.
        """
        execute = self.connection.execute
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
        if self._commits < 64 and self._stored < _WAL:
            return
        self._commits = self._stored = 0
        size = os.stat(f"{self._file}-wal").st_size
        if size < _WAL:
            return
        execute = self.connection.execute
        if size < _WAL_MAX:
            execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            return
        # Wait for readers, so that the WAL can restart, but not for long.
        execute("PRAGMA busy_timeout=20")
        execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        execute("PRAGMA busy_timeout=250")

    # Reading.

    def page(self, name: str, after: str | None, limit: int, bounds: Bounds) -> Page:
        """Read a page of a channel; see `Broker.read`."""
        connection = self.connection
        connection.execute("BEGIN")
        try:
            return self._page(name, after, limit, bounds)
        finally:
            # An open snapshot would keep the WAL from restarting.
            connection.rollback()

    def _page(self, name: str, after: str | None, limit: int, bounds: Bounds) -> Page:
        execute = self.connection.execute
        row = execute(
            "SELECT id, last, nonce FROM channel WHERE name = ?", (name,)
        ).fetchone()
        if row is None:
            head = spell_id(0, self._empty())
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
            entries = self._entries(channel, number, last, limit, since)
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
            "SELECT min(number) FROM event WHERE channel = ? AND number > ?"
            " AND time >= ?",
            (channel, oldest, since),
        ).fetchone()
        if first is None:
            return Page((), False, head)
        entries = self._entries(channel, first - 1, last, limit, since)
        return Page(entries, False, head)

    def edge(
        self, name: str, count: int, capacity: int, max_age: float | None
    ) -> tuple[str, str]:
        """Return the id before the newest ``count`` events, and the head's id."""
        since = 0 if max_age is None else int((time.time() - max_age) * 1000)
        # One statement, for one consistent moment.
        row = self.connection.execute(
            "SELECT last, channel.nonce, number - 1, prev FROM channel"
            " LEFT JOIN (SELECT channel, number, prev FROM event WHERE time >= ?1 AND"
            " channel = (SELECT id FROM channel WHERE name = ?2)"
            " ORDER BY number DESC LIMIT ?3) AS e"
            " ON e.channel = channel.id AND number > last - ?4"
            " WHERE name = ?2 ORDER BY number LIMIT 1",
            (since, name, count, capacity),
        ).fetchone()
        if row is None:
            head = spell_id(0, self._empty())
            return head, head
        last, nonce, before, prev = row
        head = spell_id(last, nonce)
        return (head if before is None else spell_id(before, prev)), head

    def _entries(
        self, channel: int, number: int, last: int, limit: int, since: int
    ) -> list[Entry]:
        """Return the events after a number, unless the first one is too old."""
        rows = self.connection.execute(
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
            entries.append(entry_of(number, nonce, prev, payload, now))
            size += len(entries[-1].payload)
            if size > _PAGE:
                break
        rows.close()
        return entries

    def newest(self) -> int:
        """Return the place of the newest event of all channels."""
        row = self.connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'event'"
        ).fetchone()
        return row[0] if row else 0

    def tail(self, after: int) -> list[Row]:
        """Return the place, channel and entry of each event after a place."""
        rows = self.connection.execute(
            "SELECT seq, name, number, event.nonce, prev, payload"
            " FROM event JOIN channel ON channel.id = event.channel"
            " WHERE seq > ? ORDER BY seq LIMIT 500",
            (after,),
        )
        now = time.monotonic()
        found = []
        size = 0
        for seq, name, number, nonce, prev, payload in rows:
            entry = entry_of(number, nonce, prev, payload, now)
            found.append((seq, name if isinstance(name, str) else "", entry))
            size += len(entry.payload)
            if size > _PAGE:
                break
        rows.close()
        return found


def entry_of(number: Any, nonce: Any, prev: Any, payload: Any, now: float) -> Entry:
    """Return a row's event; for a foreign row, an event that `flaw` refuses.

    SQLite accepts any type in any column.
    """
    try:
        ids = spell_id(number, nonce), spell_id(number - 1, prev)
    except (TypeError, ValueError):
        return Entry("", "", b"", now)
    return Entry(*ids, payload if isinstance(payload, bytes) else b"", now)


def text_of(data: bytes) -> str:
    return data.decode(errors="replace")  # SQLite accepts any bytes as text
