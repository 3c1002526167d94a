"""The SQLite database: its files, which others may remove, and its tables."""

from __future__ import annotations

import _thread
import logging
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.resources import files
from urllib.parse import quote

from ...errors import BrokerError, Unavailable
from ...runtime.living import Living
from ...runtime.sockets import native
from ...runtime.waiting import say
from ..health import Health
from ..ids import make_nonce
from .files import SAFE, SUFFIXES, Lock, file_mode, make_file, said, settle

__all__ = [
    "APPLICATION",
    "Bounds",
    "Database",
    "Items",
    "WAL",
    "judged",
]

log = logging.getLogger("syncstream.brokers.local")

VERSION = 1  # the version of the tables

APPLICATION = 0x73796E63  # "sync": distinguishes our databases from others
WAL = 4 << 20  # bytes of the WAL for a passive checkpoint

_TABLES = files(__package__).joinpath("tables.sql").read_text("utf-8")
# secure_delete, Debian's default, overwrites trimmed events with zeros.
_SETTINGS = (
    "synchronous=NORMAL",
    "wal_autocheckpoint=0",
    f"journal_size_limit={WAL // 2}",
    "mmap_size=0",
    "secure_delete=OFF",
)

Items = Sequence[tuple[str, bytes]]
Bounds = tuple[int, "float | None", int]  # capacity, max_age, max_size


_Identity = tuple[tuple[int, int], ...]  # device and inode of each file
_ASIDE = "-aside"
_databases: Living[Database] = Living()


def _close_all(known: _Identity | None) -> None:
    """Close this process's connections to a database; with the lock."""
    for database in _databases.all():
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
        _databases.add(self)

    @property
    def connection(self) -> sqlite3.Connection:
        if self._connection is None:  # a signal handler has forked
            raise sqlite3.ProgrammingError("closed by a fork")
        return self._connection

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def wal_size(self) -> int:
        """Return the bytes that are not where they belong yet."""
        return os.stat(f"{self._file}-wal").st_size

    def is_current(self) -> bool:
        """Tell whether it is open and all its files are in place."""
        return self.identity is not None and self._find() == self.identity

    def _find(self) -> _Identity | None:
        """Return the identity of the present files, ``None`` unless all are there."""
        found = []
        try:
            for suffix in SUFFIXES:
                file = os.stat(self._file + suffix)
                found.append((file.st_dev, file.st_ino))
        except OSError:  # opening them again will raise the error
            return None
        return tuple(found)

    def _is_split(self) -> bool:
        """Tell whether this process has an older set of these files open.

        SQLite shares its index (-shm) among a process's connections: a new connection
        would use the old index, whatever file has its name now.
        """
        found = [other.identity for other in _databases.all()]
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
        connection.text_factory = _text
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


@contextmanager
def judged(health: Health, way: str, path: str) -> Iterator[None]:
    """Record whether a block succeeds; raise its errors as `BrokerError`.

    Args:
        way: As for `Health`.
        path: The folder.

    Raises:
        Unavailable: For an error of SQLite's, or the system's.
    """
    began = health.moment()
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        failed = Unavailable(said(path, error))
        health.fails(way, str(failed))
        raise failed from error
    except BrokerError as error:
        health.fails(way, str(error))
        raise
    health.works(way, since=began)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")  # SQLite accepts any bytes as text
