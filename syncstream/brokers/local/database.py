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

VERSION = 1  # of the tables
MAX_CHANNELS = 100_000  # that are remembered when all their events are gone

APPLICATION = 0x73796E63  # "sync": tells our databases from others
_PAGE = 8 << 20  # bytes that are read at once
_WAL, _WAL_MAX = 4 << 20, 16 << 20  # bytes, from which on it is checkpointed
_SEEN = 2000  # milliseconds, within which listeners have seen an event
_SWEEP = 64  # events between two looks for what is too old, or too much
_CHANNELS = 5000  # that are looked at in one go, whether they can be forgotten

_TABLES = files(__package__).joinpath("tables.sql").read_text("utf-8")
# secure_delete, Debian's default, overwrites with zeros what is trimmed.
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


# What is in them.

_Identity = tuple[tuple[int, int], ...]  # device and inode of each file
SUFFIXES = "", "-wal", "-shm"
_ASIDE = "-aside"
_databases: weakref.WeakSet[Database] = weakref.WeakSet()


def _close_all(known: _Identity | None) -> None:
    """Close this process's connections to a database; by who has the lock."""
    for database in list(_databases):
        identity = database.identity
        if known is None or identity is None or identity[0] != known[0]:
            continue
        with database.guard:
            database.close()


class Database:
    """A connection to the log, of one thread at a time.

    Attributes:
        guard: Held by who uses it, and by who forks, who has closed it. Who wants the
            right to write, too, has that before.
    """

    def __init__(self, path: str) -> None:
        # Reentrant: a signal's handler may fork.
        self.guard = native(_thread, "RLock")()
        self._path = path
        self._file = f"{path}/log.db"
        self.identity: _Identity | None = None
        self._connection: sqlite3.Connection | None = None
        self._swept = 0  # events since old ones were looked for
        self._swept_to = 0  # the channel that was looked at last
        self._added = 0  # since channels were looked for
        self._commits = 0  # since the last checkpoint
        self._stored = 0  # bytes since then
        _databases.add(self)

    @property
    def connection(self) -> sqlite3.Connection:
        if self._connection is None:  # the handler of a signal has forked
            raise sqlite3.ProgrammingError("closed by a fork")
        return self._connection

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def is_current(self) -> bool:
        """Tell whether it is open, and all its files where they were."""
        return self.identity is not None and self._find() == self.identity

    def _find(self) -> _Identity | None:
        """Return what the files are now, if all are there."""
        try:
            found = [os.stat(self._file + suffix) for suffix in SUFFIXES]
        except OSError:  # to open it again will say what it is
            return None
        return tuple((file.st_dev, file.st_ino) for file in found)

    def _is_split(self) -> bool:
        """Tell whether this process has another set of these files open.

        What SQLite has of the index (-shm) it shares among a process's connections: a
        new one would have that, too, wherever the name leads by now.
        """
        found = [other.identity for other in list(_databases)]
        return any(
            other[0] == self.identity[0] and other != self.identity
            for other in found
            if other is not None and self.identity is not None
        )

    def _has_stray_index(self) -> bool:
        """Tell whether the index is of a WAL that was removed.

        SQLite makes it after the WAL, and removes it before.
        """
        try:
            found = os.stat(f"{self._file}-shm")
            is_stray = not os.path.exists(f"{self._file}-wal")
            return is_stray and os.path.samestat(found, os.stat(f"{self._file}-shm"))
        except FileNotFoundError:
            return False

    def open_to_read(self) -> bool:
        """Open the files if all are there; without the lock.

        Raises:
            Unavailable: It is not a log of this version.
        """
        if self.is_open:  # to close it takes the lock
            return False
        # Who makes some of them has the lock: others cannot use them until they have
        # their rights.
        before = self._find()
        if before is None:
            return False
        try:
            self._connect()
        except (FileNotFoundError, sqlite3.OperationalError):
            return False  # or it is just being made, or removed
        if before == self.identity and not self._is_split():
            return True
        self.close()
        return False

    def open(self) -> None:
        """Open the files, or make them; by who has the lock, and not the guard.

        Raises:
            Unavailable: It is not a log of this version.
        """
        if not os.path.exists(self._file):
            with suppress(FileNotFoundError):  # who was to move it back was killed
                os.rename(f"{self._file}{_ASIDE}", self._file)
        known = self.identity
        if known is not None:
            self._leave_files(known)
        if not os.path.exists(self._file):
            # Of a database that was removed, and maybe still is used.
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
        """Break all chains if a WAL was removed: what was stored last is not there.

        Else those who had not got it yet would go on with what is stored now. Which
        WAL is in use (its inode) stands in the lock's file, so that this is done
        once, by any process; nothing stands there when the last one has closed it.

        Args:
            known: What this process had until now.
            is_made: This WAL is new; the number may have been another's.
        """
        assert self.identity is not None
        mine = str(self.identity[1][1]).encode()
        noted = self._noted()
        if noted == mine and not is_made:
            return
        if noted or (known is not None and (is_made or known[1] != self.identity[1])):
            execute = self.connection.execute
            execute("BEGIN IMMEDIATE")
            # As if each channel's newest event had been stored, and deleted.
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
        """Close what this process has of files that are not where they were."""
        text = (
            "%s: its files were removed or replaced while they were used; what was"
            " stored meanwhile may be lost, and subscribers are told (a cleaner of"
            " temporary files? use local:/PATH)"
        )
        say(log, logging.WARNING, text, self._path)
        try:
            found = os.stat(self._file)
        except FileNotFoundError:
            _close_all(known)
            return
        here = found.st_dev, found.st_ino
        if known is not None and here != known[0]:
            # SQLite sees that it was moved; but the WAL is not that of a new one.
            for suffix, one in zip(SUFFIXES[1:], known[1:], strict=True):
                with suppress(FileNotFoundError):
                    other = os.stat(self._file + suffix)
                    if (other.st_dev, other.st_ino) == one:
                        os.unlink(self._file + suffix)
            _close_all(known)
            return
        # To close the last connection is a checkpoint, and removes the WAL by its name:
        # that of others, by now. Not so if the database has moved.
        os.rename(self._file, f"{self._file}{_ASIDE}")
        try:
            _close_all((here,))
        finally:
            os.rename(f"{self._file}{_ASIDE}", self._file)

    def _connect(self, may_make: bool = False) -> None:
        if os.stat(self._file).st_nlink > 1:
            raise Unavailable(
                f"{self._file} has another name (a hard link), where SQLite would keep"
                " another log: remove that name, or stop all processes and copy the"
                " file (cp, and mv it back)"
            )
        connection = sqlite3.connect(  # never makes the file: wherever a link leads
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
                raise sqlite3.OperationalError("its files are just being removed")
            folder = os.path.dirname(self._file)
            rights = file_mode(folder), os.stat(folder).st_gid
            for suffix in SUFFIXES:  # what earlier releases have made
                settle(self._file + suffix, *rights)
        except BaseException:
            connection.close()
            raise
        self.identity = identity
        self._connection = connection

    def _check(self, connection: sqlite3.Connection, may_make: bool) -> None:
        execute = connection.execute
        execute("BEGIN")  # somebody may just be making it
        (version,) = execute("PRAGMA user_version").fetchone()
        (application,) = execute("PRAGMA application_id").fetchone()
        (tables,) = execute("SELECT count(*) FROM sqlite_master").fetchone()
        execute("COMMIT")
        if application != APPLICATION and (tables or application):
            raise Unavailable(f"{self._file} is another application's database")
        if version not in (0, VERSION):
            raise Unavailable(
                f"{self._file} has tables of version {version}, this syncstream has"
                f" {VERSION}: run one version of it, or give them a name each"
                " (local:NAME), or stop them all and remove the folder"
            )
        if version:
            return
        if not may_make:
            raise sqlite3.OperationalError("it is just being made")
        (mode,) = execute("PRAGMA journal_mode=WAL").fetchone()
        if mode != "wal":
            raise Unavailable(f"{self._path} cannot have an SQLite log, mode {mode!r}")
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
            # Even so: the last one's close, a checkpoint, needs all others closed.
            with self.guard:
                self.close()
        finally:
            if is_held:
                lock.release()
            lock.close()

    def close(self) -> None:
        """Close it; by who has the lock: the last one's close is a checkpoint."""
        connection, self._connection = self._connection, None
        is_current, self.identity = self.is_current(), None
        if connection is not None:
            connection.close()
            if is_current and not os.path.exists(f"{self._file}-wal"):
                with suppress(OSError):  # then chains are broken that were whole
                    self._note(b"")

    # To write.

    def store(self, items: Items, bounds: Bounds) -> list[str]:
        """Add events, within a transaction; return their ids."""
        execute = self.connection.execute
        now = int(time.time() * 1000)
        capacity, _, _ = bounds
        # Number and nonce of the newest, and its number when it was found.
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
            # Not one by one: readers do not look at what is beyond. Nothing that has
            # come just now: listeners, on a busy machine, are still to see it.
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
        # There may be a row that is none of ours beyond the head: it is passed.
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
        """Delete what is too old or too much: more than came since the last time."""
        execute = self.connection.execute
        _, max_age, max_size = bounds
        count, self._swept = 2 * self._swept, 0
        if max_age is not None:
            execute(
                "DELETE FROM event WHERE seq <= (SELECT max(seq) FROM"
                " (SELECT seq, time FROM event ORDER BY seq LIMIT ?) WHERE time < ?)",
                (count, now - int(max_age * 1000)),
            )
        # What was stored by a clock that has since been put back ages from now on.
        execute(
            "UPDATE event SET time = ?1 WHERE time > ?1 AND seq <= (SELECT max(seq)"
            " FROM (SELECT seq FROM event ORDER BY seq LIMIT ?2))",
            (now, count),
        )
        (page_size,) = execute("PRAGMA page_size").fetchone()
        (pages,) = execute("PRAGMA page_count").fetchone()
        (free,) = execute("PRAGMA freelist_count").fetchone()
        # What is deleted makes room in the file; it does not shrink.
        if (pages - free) * page_size > max_size:
            self._shrink(max_size // 16)
        if self._added > 1000:
            self._added = 0
            self._forget_channels()

    def _shrink(self, size: int) -> None:
        """Delete the oldest events of so many bytes."""
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
        """Forget channels of which nothing is left, if they are very many.

        Who has such a channel's empty head cannot be told any more whether it has
        had events since: nobody's will be known.
        """
        execute = self.connection.execute
        (channels,) = execute("SELECT count(*) FROM channel").fetchone()
        if channels <= MAX_CHANNELS:
            return
        rows = execute(
            "SELECT id FROM channel WHERE id > ? ORDER BY id LIMIT ?",
            (self._swept_to, _CHANNELS),
        ).fetchall()
        # At the end it begins again.
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
        """Move what was written to where it belongs, if it is much; with the lock."""
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
        # Readers are to be waited for, that it may begin anew; but not for long.
        execute("PRAGMA busy_timeout=20")
        execute("PRAGMA wal_checkpoint(RESTART)").fetchone()
        execute("PRAGMA busy_timeout=250")

    # To read.

    def page(self, name: str, after: str | None, limit: int, bounds: Bounds) -> Page:
        """Read of a channel; see `Broker.read`."""
        connection = self.connection
        connection.execute("BEGIN")
        try:
            return self._page(name, after, limit, bounds)
        finally:
            # A snapshot that is kept keeps the WAL from beginning anew.
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
        oldest = max(0, last - capacity)  # the number before the oldest one
        number, _ = parse_id(after) or (-1, 0)
        if oldest <= number < last:
            entries = self._entries(channel, number, last, limit, since)
            if entries and entries[0].prev == after:
                return Page(entries, True, head)
            # The event itself is kept, the one after it is not: what follows that.
            row = execute(
                "SELECT nonce, (SELECT min(number) FROM event WHERE channel = ?1 AND"
                " number > ?2) FROM event WHERE channel = ?1 AND number = ?2",
                (channel, number),
            ).fetchone()
            if row and spell_id(number, row[0]) == after and row[1] != number + 1:
                oldest = number
        # A clock that is put back does not tear holes: from the first one on that
        # is new enough all are kept.
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
        """Return the id before so many of the newest events, and the head's."""
        since = 0 if max_age is None else int((time.time() - max_age) * 1000)
        # Of one statement: of one moment.
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
        """Return what follows a number up to the head's, unless that is too old."""
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
        """Return the place of the newest event of all."""
        row = self.connection.execute(
            "SELECT seq FROM sqlite_sequence WHERE name = 'event'"
        ).fetchone()
        return row[0] if row else 0

    def tail(self, after: int) -> list[Row]:
        """Return what follows a place: place, channel, entry each."""
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
    """Return a row's event; for a row that is none of ours, one that `flaw` refuses.

    SQLite takes any type in any column.
    """
    try:
        ids = spell_id(number, nonce), spell_id(number - 1, prev)
    except (TypeError, ValueError):
        return Entry("", "", b"", now)
    return Entry(*ids, payload if isinstance(payload, bytes) else b"", now)


def text_of(data: bytes) -> str:
    return data.decode(errors="replace")  # SQLite takes any bytes, too
