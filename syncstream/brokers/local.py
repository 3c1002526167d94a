"""``local:``, the broker of one machine: its processes share a file, nothing else.

Events are rows of an SQLite database in WAL mode. Who has stored some wakes the
others by a datagram to the Unix socket of each process that listens; a wake that is
lost costs half a second, no event, because everybody looks that often unasked.

The rules:

- One writes at a time, of all processes, under a flock: so ids are in the order of the
  commits, and no reader sees a hole. What wears the log down, checkpoints, and opening
  and closing, too, happens under it: the WAL stays small (unlocked, with readers all
  the time, it grew to 958 MB in 7 s), and checkpoints never overlap a commit
  (https://sqlite.org/wal.html#walresetbug).
- Nothing waits for the disk or for a lock but native threads: a writer, a listener,
  and, for a gevent hub, a reader. What many publish at once is one transaction. (A
  thread that finds nobody else writing does it itself: to hand it over and to be
  woken would take as long again.)
- Nothing is open during a fork, and nobody is in SQLite: what it knows of a file, and
  its locks, a child would have, too, and believe (https://sqlite.org/howtocorrupt.html
  2.6). So a fork waits for the transactions that have begun, and closes; who needs the
  files after that opens them.
- A file that is removed, or replaced, is noticed before it is used: the log's state is
  in three, and a process has one set of them. Who finds another set closes all that it
  has without a checkpoint, which would undo what others have stored since, and says
  so; what it stored in the meantime is `Uncertain`. With a WAL, what was stored last is
  gone: whoever opens the log after that breaks the chains of all channels, once, so
  that nobody goes on over the gap. The files' times are kept fresh, so that what cleans
  temporary directories leaves them alone.
- Files have the folder's group if that has its setgid bit and is the group's (2770),
  and are then of all its members; else they are the owner's only.

Ids are ``<number>-<nonce>`` in hexadecimal digits: the number counts a channel's
events, the nonce is the event's own. A channel without events has the head
``0-<nonce>``, whose nonce is the log's.
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import logging
import os
import re
import select
import socket
import sqlite3
import stat
import sys
import tempfile
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from typing import Any, Literal, TypeVar
from urllib.parse import quote

from ..clock import time
from ..errors import BrokerError, PayloadTooLarge, Unavailable, Uncertain
from ..journal import report
from ..log import Entry, Page
from ..sockets import native
from ..waiting import LONGEST, Turn, hub, say
from . import Sink, check_bounds, is_pattern, matches, shown

__all__ = ["LocalBroker"]

log = logging.getLogger(__name__)

VERSION = 1  # of the tables
LOOK_EVERY = 0.5  # seconds, for what nobody has told of
MAX_CHANNELS = 100_000  # that are remembered when all their events are gone

_APPLICATION = 0x73796E63  # "sync": tells our databases from others
_GROUP = 1 << 20  # bytes of several publishers that one transaction takes
_PAGE = 8 << 20  # bytes that are read at once
_WAL, _WAL_MAX = 4 << 20, 16 << 20  # bytes, from which on it is checkpointed
_SEEN = 2000  # milliseconds, within which listeners have seen an event
_SWEEP = 64  # events between two looks for what is too old, or too much
_CHANNELS = 5000  # that are looked at in one go, whether they can be forgotten
_WAKES = 1000  # that are taken before it looks, be there more or not
_LOCK_TRY = 0.002  # seconds between two tries
_FRESHEN = 60.0  # seconds between two updates of the files' times
_SAFE = os.O_CLOEXEC | os.O_NOFOLLOW  # the folder may be a group's
_SHARED = stat.S_ISGID | stat.S_IRWXG  # a folder that a group shares
_CLOSE = 1.0  # seconds, to have the lock when files are closed
_MAX_PATH = 80  # bytes: sun_path takes 104 (macOS), with /wake/<pid>-<random>
_MOUNTS = "/proc/self/mounts"
# flock or shared memory do not reach what others of these have, or not reliably.
_NETWORK = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "fuse", "glusterfs", "gpfs"),
    *("gfs2", "lustre", "ncpfs", "nfs", "nfs4", "ocfs2", "orangefs", "prl_fs"),
    *("smb3", "smbfs", "vboxsf", "virtiofs"),
)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,39}")
_RANDOM = re.compile(r"[0-9a-f]{8}")
_ID = re.compile(r"([0-9a-f]{1,15})-[0-9a-f]{8}")

_TABLES = """
CREATE TABLE life(empty INTEGER NOT NULL);
CREATE TABLE channel(
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    last INTEGER NOT NULL, nonce INTEGER NOT NULL);
CREATE TABLE event(
    seq INTEGER PRIMARY KEY AUTOINCREMENT, channel INTEGER NOT NULL,
    number INTEGER NOT NULL, nonce INTEGER NOT NULL, prev INTEGER NOT NULL,
    time INTEGER NOT NULL, payload BLOB NOT NULL);
CREATE UNIQUE INDEX event_number ON event(channel, number);
"""
# secure_delete, Debian's default, overwrites with zeros what is trimmed.
_SETTINGS = (
    "synchronous=NORMAL",
    "wal_autocheckpoint=0",
    f"journal_size_limit={_WAL // 2}",
    "mmap_size=0",
    "secure_delete=OFF",
)

Items = Sequence[tuple[str, bytes]]
Bounds = tuple[int, "float | None", int]  # capacity, max_age, max_size
T = TypeVar("T")


class LocalBroker:
    """Events in a file, for all processes of this machine.

    Nothing is opened and no thread started before it is used. Durable as SQLite's
    ``synchronous=NORMAL`` is: what was published survives any process that is
    killed; a power cut may take the last moments.

    Args:
        url: ``local:``, or ``local:NAME`` to keep applications apart: a folder of
            this user's own in the temporary directory. ``local:/PATH``: that folder;
            it is made, but not the one it is in. What it may be read by is its
            owner's care.
        capacity: So many events of each channel are kept.
        max_age: Events are kept for so many seconds; ``None`` for no limit.
        max_size: So many bytes the file may have, roughly; beyond that the oldest
            events of all channels go.
        publish_timeout: Seconds until a publish gives up, and a read; ``None`` for
            no limit.

    Raises:
        ValueError: The URL is not one of these, or the path is too long, or a bound
            is none.
    """

    scope: Literal["machine"] = "machine"

    def __init__(
        self,
        url: str = "local:",
        capacity: int = 1000,
        max_age: float | None = 3600.0,
        max_size: int = 256 << 20,
        publish_timeout: float | None = 5.0,
    ) -> None:
        if publish_timeout is not None and not publish_timeout > 0:
            raise ValueError(
                f"publish_timeout must be above 0, or None, got {publish_timeout!r}"
            )
        check_bounds(capacity, max_age)
        if not isinstance(max_size, int) or max_size < 4:  # bytes: a quarter is one
            raise ValueError(f"max_size must be 4 bytes or more, got {max_size!r}")
        self.path, self._is_private = _path(url)
        self._bounds: Bounds = capacity, max_age, max_size
        self._timeout = (
            None if publish_timeout is None else min(publish_timeout, LONGEST)
        )
        self._sink: Sink | None = None
        self._watched: set[str] = set()
        self._patterns: set[str] = set()
        self._is_closed = False
        self._is_up = True  # as the sink was told, here or in the parent of a fork
        self._is_heir = False
        self._is_spoilt = False
        self._forget()
        _brokers.add(self)

    def _forget(self) -> None:
        # Reentrant, as all that a garbage collection may enter.
        self._lock = native(_thread, "RLock")()
        self._process: _Process | None = None

    def _forked(self) -> None:
        """Let go of what is the parent's; in the child, where no thread goes on."""
        parents = self._process
        self._is_heir = self.is_watching()
        self._forget()
        if parents is None:
            return
        parents.let_go()
        if parents.has_files:
            self._is_spoilt = True
            _spoilt.append(parents)  # a garbage collection would close them

    def _own(self) -> _Process:
        """Return this process's part; begun by its first use."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("local: is closed")
            self._look_for_a_fork()
            if self._is_spoilt:
                raise Unavailable(
                    f"{self.path} was in use when this process was forked by what does"
                    " not say so: use it only after that (uWSGI: lazy-apps, or"
                    " @postfork)"
                )
            if self._process is None:
                with _forking:  # not between a fork's beginning and the fork
                    self._process = _Process(self)
            return self._process

    def _look_for_a_fork(self) -> None:
        """Notice one that Python was not told of, such as uWSGI's."""
        if self._process is not None and self._process.pid != os.getpid():
            self._forked()

    @property
    def process(self) -> _Process | None:
        """This process's part, if it has begun."""
        return self._process

    def publish(self, items: Items, *, connection: Any = None) -> list[str | None]:
        if connection is not None:
            raise ValueError("connection must be None: local: has no transactions")
        _, _, max_size = self._bounds
        for channel, payload in items:
            channel.encode()  # what SQLite does not take is the caller's error
            if len(payload) > max_size // 4:
                raise PayloadTooLarge(
                    f"an event must have {max_size // 4} bytes at most, a quarter of"
                    f" max_size, got {len(payload)}"
                )
        if not items:
            return []
        process = self._own()
        self._go_on(process)
        ids: list[str | None] = [*process.publish(items)]
        return ids

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        process = self._own()
        self._go_on(process)
        return process.read(channel, after, limit)

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Return the id before the newest events of a channel, and its head's.

        Args:
            channel: Its name.
            count: Of so many of them, or all that are kept. None of them is read.

        Raises:
            Unavailable: As from `read`.
        """
        process = self._own()
        self._go_on(process)
        return process.edge(channel, count)

    def attach(self, sink: Sink) -> None:
        self._sink = sink

    def watch(self, channel: str) -> None:
        # First: what is stored from now on is looked at with this in mind.
        with self._lock:
            (self._patterns if is_pattern(channel) else self._watched).add(channel)
        if self._is_closed:
            return  # and there will be nothing to tell
        try:
            self._own().listen()
        except BaseException:
            self.unwatch(channel)
            if not self._is_closed:
                raise

    def unwatch(self, channel: str) -> None:
        with self._lock:
            self._patterns.discard(channel)
            self._watched.discard(channel)

    def _go_on(self, process: _Process) -> None:
        """Listen in a forked child, too, if its parent did."""
        if self.is_watching() and not process.is_listening:
            process.listen()

    def close(self, timeout: float = 5.0) -> None:
        with self._lock:
            self._look_for_a_fork()
            process, self._process = self._process, None
            self._is_closed = True
            self._sink = None
        if process is not None:
            process.close(timeout)

    def __del__(self) -> None:
        # Of one that nobody has closed. (Or its construction has failed.)
        process = getattr(self, "_process", None)
        if process is not None and process.pid == os.getpid():
            process.drop()

    # For the listener.

    @property
    def sink(self) -> Sink | None:
        return self._sink

    def state(self, is_up: bool, reason: str) -> None:
        """Tell the sink, if it has not been told so."""
        if is_up == self._is_up or self._sink is None:
            return
        self._is_up = is_up
        try:
            self._sink.state(is_up, reason)
        except Exception as error:  # ours goes on, whoever is told
            text = "%s: the sink has failed"
            say(log, logging.ERROR, text, self.path, error=error)

    def is_watching(self) -> bool:
        return bool(self._watched or self._patterns)

    def is_watched(self, channel: str) -> bool:
        with self._lock:
            return channel in self._watched or any(
                matches(pattern, channel) for pattern in self._patterns
            )

    def unless_watching(self, act: Callable[[], None]) -> None:
        """Do something while nobody can begin to watch; it must not wait."""
        with self._lock:
            if not self.is_watching():
                act()

    # For the process's part.

    @property
    def bounds(self) -> Bounds:
        return self._bounds

    @property
    def timeout(self) -> float | None:
        return self._timeout

    @property
    def is_private(self) -> bool:
        return self._is_private

    @property
    def is_heir(self) -> bool:
        """Its parent has listened, too: what came since the fork was not told."""
        return self._is_heir


_brokers: weakref.WeakSet[LocalBroker] = weakref.WeakSet()
_processes: weakref.WeakSet[_Process] = weakref.WeakSet()
_spoilt: list[_Process] = []
_paused: list[_Process] = []
_forking = native(_thread, "RLock")()  # one at a time


def _forks() -> None:
    _forking.acquire()
    for process in list(_processes):  # of brokers that were dropped, too
        if process.pid == os.getpid():
            _paused.append(process)
            process.pause()


def _has_forked() -> None:
    while _paused:
        _paused.pop().resume()
    _forking.release()


def _forked() -> None:
    global _forking
    _forking = native(_thread, "RLock")()
    _paused.clear()
    for broker in list(_brokers):
        broker._forked()
    for process in list(_processes):  # of brokers that were just being dropped
        if process.pid != os.getpid():
            process.let_go()
            if process.has_files:
                _spoilt.append(process)


# In the child at once, not at the next use: who has a lock's or a socket's descriptor,
# too, keeps it held, or open, when its parent is killed.
os.register_at_fork(before=_forks, after_in_parent=_has_forked, after_in_child=_forked)


# Where the files are.


def _path(url: str) -> tuple[str, bool]:
    """Return the folder that a URL names, and whether it is in a private one."""
    scheme, _, rest = url.partition(":")
    if scheme != "local" or rest.startswith("//"):
        raise ValueError(
            f"url must be local:, local:NAME or local:/PATH, got {shown(url)}"
        )
    if rest.startswith("/"):
        path = os.path.normpath(rest)
        if path == "/" or "\0" in path:
            raise ValueError(
                f"url's path must name a folder of its own, got {path!r}: use"
                " local:/PATH"
            )
    elif not rest or _NAME.fullmatch(rest):
        # Not XDG_RUNTIME_DIR: what logins have, services and cron have not, and
        # they would not meet.
        name = f"syncstream-{os.geteuid()}"
        path = os.path.join(tempfile.gettempdir(), name, rest or "default")
    else:
        raise ValueError(
            "url must be local:NAME, of 40 letters, digits and . _ - at most, or"
            f" local:/PATH, got {shown(url)} with something else"
        )
    if len(os.fsencode(path)) > _MAX_PATH:
        raise ValueError(
            f"url's path must have {_MAX_PATH} bytes at most, so that sockets can be"
            f" in it, got {path!r}"
        )
    return path, not rest.startswith("/")


def _make(path: str, is_private: bool) -> None:
    """Make a folder if it is not there; refuse what is not safe."""
    if is_private:
        parent = os.path.dirname(path)
        with suppress(FileExistsError):
            os.mkdir(parent, 0o700)
        found = os.lstat(parent)  # not of what a link leads to
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise Unavailable(
                f"{parent} must be a directory of user {os.geteuid()}: use"
                " local:/PATH, another one"
            )
        if found.st_mode & 0o077:
            raise Unavailable(
                f"{parent} must be its owner's only: chmod 700 {parent}, or use"
                " local:/PATH, another one"
            )
    with suppress(FileExistsError):
        os.mkdir(path, 0o700)
    _refuse_others(path)
    kind = _network_kind(path)
    if kind is not None:
        raise Unavailable(
            f"{path} is on a network file system ({kind}), whose locks do not hold"
            " between machines: use local:/PATH on a disk of this machine, or redis:"
            " for several"
        )
    _make_wake(path)


def _refuse_others(path: str) -> None:
    """Refuse a folder in which users that nobody has named could read and forge."""
    user = os.geteuid()
    link, found = os.lstat(path), os.stat(path)
    if not stat.S_ISDIR(found.st_mode):
        raise Unavailable(f"{path} must be a directory, and is not one")
    if found.st_mode & stat.S_IWOTH:
        raise Unavailable(
            f"{path} can be written to by every user: chmod o-w {path}, or use"
            " local:/PATH, another one"
        )
    is_ours = not user or found.st_gid in {os.getegid(), *os.getgroups()}
    is_shared = found.st_mode & _SHARED == _SHARED and is_ours
    for owner in {link.st_uid, found.st_uid} - {0, user}:
        if not is_shared:
            raise Unavailable(
                f"{path} belongs to user {owner}, this is user {user}: run as that"
                f" user, or share it by a group that both are in (chgrp GROUP {path};"
                f" chmod 2770 {path})"
            )


def _file_mode(path: str) -> int:
    """Return the mode of the files in a folder."""
    return 0o660 if os.stat(path).st_mode & _SHARED == _SHARED else 0o600


def _make_wake(path: str) -> None:
    """Make the folder of the sockets, with the rights of the one it is in."""
    wake = f"{path}/wake"
    with suppress(FileExistsError):
        os.mkdir(wake, 0o700)
    is_shared = _file_mode(path) == 0o660
    _settle(wake, 0o2770 if is_shared else 0o700, os.stat(path).st_gid)


def _settle(path: str, mode: int, group: int) -> None:
    """Give a file of ours its mode, and the folder's group where that shares it."""
    found = os.lstat(path)
    if os.geteuid() not in (0, found.st_uid) or stat.S_ISLNK(found.st_mode):
        return
    if mode & stat.S_IRWXG and found.st_gid != group:
        os.chown(path, -1, group, follow_symlinks=False)
    if found.st_mode & 0o7777 != mode:
        _change_mode(path, mode)


def _change_mode(path: str, mode: int) -> None:
    """Change a file's mode, and not that of what a link in its place leads to."""
    if not hasattr(os, "O_PATH"):  # macOS, which has lchmod
        os.chmod(path, mode, follow_symlinks=False)
        return
    # Without opening it: to close a file of SQLite's drops its locks.
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not stat.S_ISLNK(os.fstat(fd).st_mode):
            os.chmod(f"/proc/self/fd/{fd}", mode)
    finally:
        os.close(fd)


def _make_file(folder: str, name: str) -> None:
    """Make an empty file if it is not there; whoever sees it sees its final mode."""
    path = f"{folder}/{name}"
    mode, group = _file_mode(folder), os.stat(folder).st_gid
    if not os.path.lexists(path):
        new = f"{path}-{os.urandom(4).hex()}"
        os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode))
        try:
            _settle(new, mode, group)
            with suppress(FileExistsError):
                os.link(new, path)
        finally:
            with suppress(FileNotFoundError):  # see `_remove_first_names`
                os.unlink(new)
    with suppress(FileNotFoundError):
        found = os.lstat(path)
        if not stat.S_ISREG(found.st_mode):  # a link leads anywhere
            raise Unavailable(f"{path} must be a plain file, and is not one")
        if found.st_nlink > 1:
            _remove_first_names(path, found)
        _settle(path, mode, group)


def _remove_first_names(path: str, found: os.stat_result) -> None:
    """Remove the name by which a file was made, if who made it was killed."""
    prefix = f"{os.path.basename(path)}-"
    for name in os.listdir(os.path.dirname(path)):
        first = f"{os.path.dirname(path)}/{name}"
        if _RANDOM.fullmatch(name.removeprefix(prefix)):
            with suppress(FileNotFoundError):
                if os.path.samestat(found, os.lstat(first)):
                    os.unlink(first)


def _said(path: str, error: Exception) -> str:
    """Return what has failed, and what to do if it is a matter of rights."""
    text = f"{path}: {error}"
    rights = "unable to open database file", "readonly database", "read-only"
    if isinstance(error, PermissionError) or any(word in str(error) for word in rights):
        text += (
            " (several users share a folder by a group that all are in: chgrp -R GROUP"
            f" {path}; chmod 2770 {path}; its files are made again if you remove them)"
        )
    return text


def _network_kind(path: str) -> str | None:
    """Return the type of a path's file system if that is one of a network."""
    try:
        with open(_MOUNTS, "rb") as file:
            mounts = file.read()
    except FileNotFoundError:  # not Linux
        return None
    kind = _kind(os.path.realpath(path), os.fsdecode(mounts))
    # fuse-overlayfs is the root of rootless containers; its locks are this kernel's.
    is_network = kind.partition(".")[0] in _NETWORK and "overlay" not in kind
    return kind if is_network else None


def _kind(path: str, mounts: str) -> str:
    """Return the type of the file system that a path is on, of those in mounts."""
    found = best = ""
    # Whoever may mount chooses names: other ends of lines than this are not escaped.
    for line in mounts.removesuffix("\n").split("\n"):
        _, mount, kind, *_ = line.split(" ")
        mount = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), mount)
        is_in = path == mount or path.startswith(mount.rstrip("/") + "/")
        # Of two on one mount point the later one is seen.
        if is_in and len(mount) >= len(best):
            best, found = mount, kind
    return found


class _Lock:
    """The right to write; one thread of one process has it.

    Its file is its own: to close any descriptor of SQLite's files drops SQLite's
    locks. Nobody writes beside a lock whose file was removed: that is looked at.
    """

    def __init__(self, path: str, is_private: bool) -> None:
        self._path = path
        self._is_private = is_private
        self._fd = self._folder = -1

    def acquire(self, timeout: float | None = None) -> None:
        """Wait for it; blocks the thread.

        Raises:
            Unavailable: The time is over.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            self.open()
            self._wait(deadline)
            if self._is_current():
                return
            self.close()

    def try_acquire(self) -> bool:
        """Have it at once or not at all; not either if it is not open yet."""
        if self._fd < 0:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if self._is_current():
            return True
        self.close()
        return False

    def open(self) -> None:
        """Make the folder if it is not there, and the lock's file in it."""
        if self._fd >= 0:
            return
        _make(self._path, self._is_private)
        # systemd-tmpfiles leaves a directory alone whose lock is held.
        self._folder = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(BlockingIOError):  # it is just being looked at
                fcntl.flock(self._folder, fcntl.LOCK_SH | fcntl.LOCK_NB)
            _make_file(self._path, "lock")
            self._fd = os.open(f"{self._path}/lock", os.O_RDWR | _SAFE)
        except BaseException:
            self.close()
            raise

    def _wait(self, deadline: float | None) -> None:
        if deadline is None:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            return
        while True:
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    message = f"{self._path}/lock is held by another process"
                    raise Unavailable(message) from None
                native(time, "sleep")(_LOCK_TRY)
            else:
                return

    def _is_current(self) -> bool:
        try:
            found = os.stat(f"{self._path}/lock")
        except OSError:  # to open it again will say what it is
            return False
        return os.path.samestat(found, os.fstat(self._fd))

    def hold(self, timeout: float) -> bool:
        """Wait for it, or if its file is gone for that, to close what it opened."""
        if self._fd < 0:
            return False
        try:
            self._wait(time.monotonic() + timeout)
            if not self._is_current() and os.path.exists(f"{self._path}/lock"):
                self.close()  # others have the one that took its place
                self.acquire(timeout)
        except (BrokerError, OSError):
            return False
        return True

    def release(self) -> None:
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def close(self) -> None:
        for fd in (self._fd, self._folder):
            if fd >= 0:
                os.close(fd)
        self._fd = self._folder = -1


# What is in them.

_Identity = tuple[tuple[int, int], ...]  # device and inode of each file
_SUFFIXES = "", "-wal", "-shm"
_ASIDE = "-aside"
_databases: weakref.WeakSet[_Database] = weakref.WeakSet()


def _close_all(known: _Identity | None) -> None:
    """Close this process's connections to a database; by who has the lock."""
    for database in list(_databases):
        identity = database.identity
        if known is None or identity is None or identity[0] != known[0]:
            continue
        with database.guard:
            database.close()


class _Database:
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
            found = [os.stat(self._file + suffix) for suffix in _SUFFIXES]
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
            for suffix in _SUFFIXES[1:]:
                with suppress(FileNotFoundError):
                    os.unlink(self._file + suffix)
        elif self._has_stray_index():
            with suppress(FileNotFoundError):
                os.unlink(f"{self._file}-shm")
        _make_file(self._path, "log.db")
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
            execute("UPDATE life SET empty = ?", (_nonce(),))
            execute("COMMIT")
        self._note(mine)

    def _noted(self) -> bytes:
        fd = os.open(f"{self._path}/lock", os.O_RDONLY | _SAFE)
        try:
            return os.read(fd, 64)
        finally:
            os.close(fd)

    def _note(self, text: bytes) -> None:
        fd = os.open(f"{self._path}/lock", os.O_WRONLY | _SAFE)
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
            for suffix, one in zip(_SUFFIXES[1:], known[1:], strict=True):
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
        connection.text_factory = _text
        try:
            self._check(connection, may_make=may_make)
            for setting in _SETTINGS:
                connection.execute(f"PRAGMA {setting}")
            identity = self._find()
            if identity is None:
                raise sqlite3.OperationalError("its files are just being removed")
            folder = os.path.dirname(self._file)
            rights = _file_mode(folder), os.stat(folder).st_gid
            for suffix in _SUFFIXES:  # what earlier releases have made
                _settle(self._file + suffix, *rights)
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
        if application != _APPLICATION and (tables or application):
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
        execute("INSERT INTO life VALUES (?)", (_nonce(),))
        execute(f"PRAGMA application_id={_APPLICATION}")
        execute(f"PRAGMA user_version={VERSION}")
        execute("COMMIT")

    def finish(self, lock: _Lock, timeout: float) -> None:
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
            ids.append(_id(number, nonce))
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
            execute("UPDATE life SET empty = ?", (_nonce(),))

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
            head = _id(0, self._empty())
            return Page((), after in (None, head), head)
        channel, last, nonce = row
        head = _id(last, nonce)
        if after is None or after == head:
            return Page((), True, head)
        capacity, max_age, _ = bounds
        since = 0 if max_age is None else int((time.time() - max_age) * 1000)
        oldest = max(0, last - capacity)  # the number before the oldest one
        match = _ID.fullmatch(after)
        number = int(match[1], 16) if match else -1
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
            if row and _id(number, row[0]) == after and row[1] != number + 1:
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
            head = _id(0, self._empty())
            return head, head
        last, nonce, before, prev = row
        head = _id(last, nonce)
        return (head if before is None else _id(before, prev)), head

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
            entries.append(_entry(number, nonce, prev, payload, now))
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

    def tail(self, after: int) -> list[tuple[int, str, Entry]]:
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
            entry = _entry(number, nonce, prev, payload, now)
            found.append((seq, name if isinstance(name, str) else "", entry))
            size += len(entry.payload)
            if size > _PAGE:
                break
        rows.close()
        return found


def _id(number: int, nonce: int) -> str:
    return f"{number:x}-{nonce:08x}"


def _entry(number: Any, nonce: Any, prev: Any, payload: Any, now: float) -> Entry:
    """Return a row's event; for a row that is none of ours, one that `flaw` refuses.

    SQLite takes any type in any column.
    """
    try:
        ids = _id(number, nonce), _id(number - 1, prev)
    except (TypeError, ValueError):
        return Entry("", "", b"", now)
    return Entry(*ids, payload if isinstance(payload, bytes) else b"", now)


def _text(data: bytes) -> str:
    return data.decode(errors="replace")  # SQLite takes any bytes, too


def _nonce() -> int:
    # Not `random`, which applications may seed: it would be that of an earlier life.
    return int.from_bytes(os.urandom(4), "big")


# Who does it.


class _Job:
    """A call that waits to be made, or a publish; and what has come of it."""

    __slots__ = ("call", "error", "is_taken", "items", "result", "turn")

    def __init__(self, items: Items = (), call: Callable[[], Any] | None = None):
        self.items = items
        self.call = call
        self.turn: Turn | None = None  # of who waits, if somebody does
        self.is_taken = False
        self.result: Any = None
        self.error: Exception | None = None

    def end(self, result: Any = None, error: Exception | None = None) -> None:
        self.result, self.error = result, error
        if self.turn is None:
            return
        try:
            self.turn.end()
        except Exception as problem:  # its hub was destroyed: nobody waits there
            say(log, logging.DEBUG, "nobody waits for what was done", error=problem)


def _start_thread(run: Callable[[], None]) -> None:
    """Start a native thread.

    Raises:
        Unavailable: The system has none left.
    """
    try:
        native(_thread, "start_new_thread")(run, ())
    except (RuntimeError, MemoryError) as error:
        raise Unavailable(f"local: needs a thread: {error}") from error


class _Thread:
    """A native thread that is woken to do jobs.

    Args:
        serve: Does those that are there; it must not raise.
        leave: Is called at its end.
    """

    def __init__(
        self, serve: Callable[[], None], leave: Callable[[], None] | None = None
    ) -> None:
        self._serve = serve
        self._leave = leave
        self.lock = native(_thread, "RLock")()
        self.jobs: deque[_Job] = deque()
        self._bell = native(_thread, "allocate_lock")()
        self._bell.acquire()
        self._is_running = False
        self._is_closed = False
        self._ended: list[Turn] = []

    def add(self, job: _Job) -> Turn:
        turn = job.turn = Turn()
        with self.lock:
            if self._is_closed:
                raise Unavailable("local: is closed")
            self._start()
            self.jobs.append(job)
        self.ring()
        return turn

    def _start(self) -> None:
        if not self._is_running:
            _start_thread(self._run)
            self._is_running = True

    def ring(self) -> None:
        with suppress(RuntimeError):  # it is awake
            self._bell.release()

    def give_up(self, job: _Job) -> bool:
        """Take a job back; ``False``: it has been taken."""
        with self.lock:
            if job.is_taken:
                return False
            self.jobs.remove(job)
            return True

    def take(self) -> _Job | None:
        with self.lock:
            if not self.jobs:
                return None
            job = self.jobs.popleft()
            job.is_taken = True
            return job

    def _run(self) -> None:
        while True:
            self._bell.acquire()
            is_last = self._is_closed
            try:
                self._serve()
            except BaseException as error:  # others wait for this thread, from now on
                say(log, logging.ERROR, "work of local: failed", error=error)
            if is_last:
                break
        try:
            if self._leave is not None:
                self._leave()
        finally:
            with self.lock:
                self._is_running = False
                ended, self._ended = self._ended, []
            for turn in ended:
                turn.end()

    def close(self, deadline: float) -> bool:
        """Let it do what is there, and end; ``False``: not within this time."""
        turn = Turn()
        return not self.end(turn) or turn.wait(deadline)

    def end(self, *turns: Turn) -> bool:
        """Have it end, and end these turns then; ``False``: there is nothing to end."""
        with self.lock:
            self._is_closed = True
            if self._leave is not None:
                with suppress(Unavailable):
                    self._start()  # to leave as it should
            is_running = self._is_running
            if is_running:
                self._ended.extend(turns)
        if is_running:
            self.ring()
        elif self._leave is not None:  # no thread is left for it
            self._leave()
        return is_running


class _Process:
    """What one process has of a broker: threads, connections, sockets."""

    def __init__(self, broker: LocalBroker) -> None:
        self.pid = os.getpid()
        self._broker = weakref.ref(broker)  # it ends with that: see `drop`
        self._path = broker.path
        self._is_private = broker.is_private
        self._timeout = broker.timeout
        self._bounds = broker.bounds
        self._locks = [_Lock(broker.path, broker.is_private) for _ in range(3)]
        self._log, self._history, self._news = (
            _Database(broker.path) for _ in range(3)
        )
        self._others = _Others(broker.path)
        self._writing = native(_thread, "allocate_lock")()
        self._writer = _Thread(self._write, self._leave)
        self._reader = _Thread(self._answer)
        self._reading = native(_thread, "allocate_lock")()
        self._listener: _Listener | None = None
        self._begins = native(_thread, "allocate_lock")()
        self._is_closed = False
        # Reentrant: a garbage collection may enter it.
        self._judging = native(_thread, "RLock")()
        self._failing: set[str] = set()  # see `judge`
        self._freshened = -inf
        _processes.add(self)

    # To write.

    def publish(self, items: Items) -> list[str]:
        with self._judged("publish"):
            return self._publish(items)

    def _publish(self, items: Items) -> list[str]:
        job = _Job(items)
        if not self._write_here(job):
            self._await(job, self._writer)
        if job.error is not None:
            # Several may have got this one: each raises its own.
            raise type(job.error)(*job.error.args) from job.error.__cause__
        ids: list[str] = job.result
        return ids

    def try_to_store(self, database: _Database) -> None:
        """If publishing has failed, see whether it would again; with the guard."""
        if "publish" not in self._failing:
            return
        lock = self._locks[2]
        lock.open()
        if not lock.try_acquire():
            return
        try:
            disk = os.statvfs(self._path)
            if disk.f_bavail * disk.f_frsize < _GROUP or not database.is_current():
                return
            execute = database.connection.execute
            execute("BEGIN IMMEDIATE")
            try:
                # Not an UPDATE to what is there: SQLite would write nothing.
                execute(f"PRAGMA application_id={_APPLICATION}")
                execute("COMMIT")
            finally:
                database.connection.rollback()
        except (sqlite3.Error, OSError):
            return  # as before
        finally:
            lock.release()
        self.judge("publish")

    def freshen(self, *others: str) -> None:
        """Keep the files' times from ageing: by those, cleaners judge what is used."""
        now = time.monotonic()
        if now - self._freshened < _FRESHEN:
            return
        self._freshened = now
        files = [f"log.db{suffix}" for suffix in _SUFFIXES]
        paths = [f"{self._path}/{name}" for name in (*files, "lock", "wake")]
        if self._is_private:
            paths.append(os.path.dirname(self._path))
        # "/.": the folder's own name may be a link; in it a member may have put one.
        for path in (f"{self._path}/.", *paths, *others):
            with suppress(OSError):  # another user's; or it is missed when it is used
                os.utime(path, follow_symlinks=False)

    def _write_here(self, job: _Job) -> bool:
        """Store it in this thread, if it is one and nobody else writes."""
        # Who waits goes first.
        if self._writer.jobs or hub() is not None or self._is_closed:
            return False
        if not self._writing.acquire(False):
            return False
        lock, database = self._locks[0], self._log
        try:
            if not lock.try_acquire():
                return False
            try:
                with database.guard:
                    if not database.is_current():
                        return False
                    database.connection.execute("BEGIN IMMEDIATE")
                    self._store([job])
            finally:
                lock.release()
        except (sqlite3.Error, OSError):
            return False  # nothing is stored: the writer will see what it is
        finally:
            self._writing.release()
        return True

    def _await(self, job: _Job, thread: _Thread) -> None:
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        turn = thread.add(job)
        try:
            is_done = turn.wait(deadline)
        except BaseException:  # a gevent.Timeout, say
            thread.give_up(job)
            raise
        if is_done:
            return
        message = f"{self._path} was not to be had within {self._timeout} s"
        if thread.give_up(job) or job.call is not None:
            raise Unavailable(message)
        raise Uncertain(f"{message}: the events may be stored")

    def _write(self) -> None:
        """Store what is there to be stored; in the writer's thread."""
        while self._writer.jobs:
            try:
                self._write_some()
            except Exception as error:
                if _is_busy(error):
                    # Those who do not want to wait any longer go.
                    native(time, "sleep")(_LOCK_TRY)
                    continue
                failed = Unavailable(_said(self._path, error))
                failed.__cause__ = error
                while (job := self._writer.take()) is not None:
                    job.end(error=error if isinstance(error, BrokerError) else failed)

    def _write_some(self) -> None:
        """Store some, in one transaction.

        Raises:
            Exception: None was taken.
        """
        lock, database = self._locks[0], self._log
        with self._writing:
            lock.acquire()
            try:
                if not database.is_current():
                    database.open()
                with database.guard:
                    database.connection.execute("BEGIN IMMEDIATE")
                    jobs: list[_Job] = []
                    size = 0
                    while size < _GROUP and (job := self._writer.take()) is not None:
                        jobs.append(job)
                        size += sum(1000 + len(payload) for _, payload in job.items)
                    self._store(jobs)
            finally:
                lock.release()

    def _store(self, jobs: list[_Job]) -> None:
        """Store and commit, and tell of it; if that fails, tell these."""
        database = self._log
        has_ended = False
        try:
            ids = database.store([i for job in jobs for i in job.items], self._bounds)
            has_ended = True
            database.connection.execute("COMMIT")
            if not database.is_current():
                raise OSError("its files were removed or replaced meanwhile")
        except Exception as error:
            # Of a disk that is full the last frame, which is the commit, is not
            # whole. Of other errors it may be.
            is_stored = has_ended and "is full" not in str(error)
            kind = Uncertain if is_stored else Unavailable
            failed = kind(_said(self._path, error))
            failed.__cause__ = error
            for job in jobs:
                job.end(error=failed)
            return
        finally:
            # An interrupt's, too.
            self._roll_back()
        self._others.wake()
        self.freshen()
        for job in jobs:
            job.end(ids[: len(job.items)])
            ids = ids[len(job.items) :]
        try:
            database.checkpoint()
        except (sqlite3.Error, OSError) as error:
            # Of what is stored nothing is lost; the next one tries again.
            say(log, logging.WARNING, "%s: no checkpoint: %s", self._path, error)

    def _roll_back(self) -> None:
        database = self._log
        if not database.connection.in_transaction:
            return
        try:
            database.connection.rollback()
        except sqlite3.Error:
            database.close()

    # To read.

    def _call(self, call: Callable[[], T]) -> T:
        """Do what may block; in a thread that a hub does not wait for."""
        if hub() is None:
            return call()
        job = _Job(call=call)
        self._await(job, self._reader)
        if job.error is not None:
            raise job.error
        result: T = job.result
        return result

    def _answer(self) -> None:
        while (job := self._reader.take()) is not None:
            assert job.call is not None
            try:
                result = job.call()
            except Exception as error:
                job.end(error=error)
            else:
                job.end(result)

    def read(self, channel: str, after: str | None, limit: int) -> Page:
        def page(database: _Database) -> Page:
            return database.page(channel, after, limit, self._bounds)

        return self._call(lambda: self._ask(page))

    def edge(self, channel: str, count: int) -> tuple[str, str]:
        capacity, max_age, _ = self._bounds
        read = partial(_Database.edge, name=channel, count=count)
        read = partial(read, capacity=capacity, max_age=max_age)
        return self._call(lambda: self._ask(read))

    def _ask(self, read: Callable[[_Database], T]) -> T:
        self._acquire(self._reading, self._timeout)
        try:
            if self._is_closed:
                raise Unavailable("local: is closed")
            with self._judged("read"), self._opened(self._history, self._locks[1]):
                try:
                    return read(self._history)
                except (TypeError, ValueError) as error:
                    failure = error  # one channel's: others can be read
            raise Unavailable(
                f"{self._path}: a row has other types than ours: {failure}"
            ) from failure
        finally:
            self._reading.release()

    @contextmanager
    def _judged(self, way: str) -> Iterator[None]:
        """Take note whether what is done here works; raise what fails as ours."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            failed = Unavailable(_said(self._path, error))
            self.judge(way, reason=str(failed))
            raise failed from error
        except BrokerError as error:
            self.judge(way, reason=str(error))
            raise
        self.judge(way)

    def judge(self, *ways: str, reason: str = "") -> None:
        """Take note of what works, or by a reason does not; tell of a change.

        Args:
            ways: "publish", "read", "listen".
        """
        if not reason and self._failing.isdisjoint(ways):
            return
        with self._judging:
            if reason:
                self._failing.update(ways)
            else:
                self._failing.difference_update(ways)
            broker = self._broker()
            if broker is not None:
                broker.state(not self._failing, reason or "it can be used")

    @contextmanager
    def _opened(self, database: _Database, lock: _Lock) -> Iterator[bool]:
        """Open what is not open, or not there any more; yield whether it was so."""
        is_new = False
        while True:
            with database.guard:
                is_there = database.is_current()
                if not is_there:
                    is_new = True
                    lock.open()
                    is_there = database.open_to_read()
                if is_there:
                    yield is_new
                    return
            lock.acquire(self._timeout)
            try:
                # It may have been moved for a moment.
                if not database.is_current():
                    database.open()
            finally:
                lock.release()

    # To listen.

    @property
    def is_listening(self) -> bool:
        return self._listener is not None

    def listen(self) -> None:
        """Begin to tell what is stored from now on, unless that is done already."""
        if self._listener is None:
            self._call(self._listen)

    def _listen(self) -> None:
        with self._begins:
            if self._is_closed:
                raise Unavailable("local: is closed")
            if self._listener is not None:
                return
            broker = self._broker()
            if broker is None:
                return
            with self._judged("listen"), self.news() as (news, _):
                listener = _Listener(self, broker)
                listener.start(news)
            self._listener = listener

    @contextmanager
    def news(self) -> Iterator[tuple[_Database, bool]]:
        """Open what the listener reads; yield it, and whether that was necessary."""
        with self._opened(self._news, self._locks[2]) as is_new:
            yield self._news, is_new

    def finish_news(self) -> None:
        """Close it; in the listener's thread, its end."""
        self._news.finish(self._locks[2], _CLOSE)

    # Its end.

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        self._is_closed = True
        try:
            listener = self._call(lambda: self._stop(timeout))
        except Unavailable:
            listener, is_done = None, False
        else:
            is_done = listener is None or listener.close(deadline)
        is_done = self._reader.close(deadline) and is_done
        if not (self._writer.close(deadline) and is_done):
            text = "%s: not closed within %s s"
            report(log, logging.WARNING, text, self._path, timeout)

    def drop(self) -> None:
        """Have all end and be closed, some time soon; waits for nothing."""
        self._is_closed = True
        if sys.is_finalizing():
            return
        # Not here, where a garbage collection may be in the midst of anything. If no
        # thread can be had the process is at its end, as far as we know.
        with suppress(RuntimeError):
            native(_thread, "start_new_thread")(self._drop, ())

    def _drop(self) -> None:
        with self._begins:
            listener = self._listener
            if listener is None:
                self._news.finish(self._locks[2], _CLOSE)
        with self._reading:
            self._history.finish(self._locks[1], _CLOSE)
        if listener is not None:
            listener.end()
        self._reader.end()
        self._writer.end()

    def _stop(self, timeout: float) -> _Listener | None:
        """Close what is read; return the listener: there will be no other."""
        self._acquire(self._begins, timeout)
        try:
            listener = self._listener
            if listener is None:
                self._news.finish(self._locks[2], _CLOSE)
        finally:
            self._begins.release()
        self._acquire(self._reading, timeout)
        try:
            self._history.finish(self._locks[1], _CLOSE)
        finally:
            self._reading.release()
        return listener

    def _acquire(self, lock: Any, timeout: float | None) -> None:
        if not lock.acquire(True, -1.0 if timeout is None else timeout):
            raise Unavailable(f"{self._path} was not to be had within {timeout} s")

    def _leave(self) -> None:
        with self._writing:
            self._log.finish(self._locks[0], _CLOSE)
            self._others.close()

    # Forks.

    def pause(self) -> None:
        """Close the files, once nobody is using them; nobody opens them any more."""
        databases = self._log, self._history, self._news
        # Another one than those that our own threads may be waiting for just now.
        lock = _Lock(self._path, self._is_private)
        is_held = False
        if self.has_files:
            with suppress(OSError, Unavailable):  # without it, as in `finish`
                lock.open()
                is_held = lock.hold(_CLOSE)
        try:
            for database in databases:
                database.guard.acquire()
                try:
                    database.close()
                except sqlite3.Error as error:
                    text = "%s: not closed before a fork"
                    report(log, logging.ERROR, text, self._path, error=error)
        finally:
            if is_held:
                lock.release()
            lock.close()

    def resume(self) -> None:
        """Let them be opened again, by the thread that has paused it."""
        for database in (self._log, self._history, self._news):
            with suppress(RuntimeError):  # it was interrupted before it had this one
                database.guard.release()

    @property
    def has_files(self) -> bool:
        """SQLite has some of them open."""
        return any(d.is_open for d in (self._log, self._history, self._news))

    def let_go(self) -> None:
        """Close all descriptors but SQLite's."""
        for lock in self._locks:
            lock.close()
        self._others.close()
        if self._listener is not None:
            self._listener.let_go()


def _is_busy(error: Exception) -> bool:
    # `sqlite_errorcode` came with Python 3.11.
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


class _Others:
    """The processes that listen: a socket each in one folder, their own among them."""

    def __init__(self, path: str) -> None:
        self._folder = f"{path}/wake"
        self._socket: Any = None  # from its first use on
        self._names: list[str] = []
        self._changed: int | None = None
        self._identity: tuple[int, int] | None = None  # of the folder

    def wake(self) -> None:
        """Wake them all; blocks for nothing."""
        try:
            self._look()
            if self._socket is None:
                self._socket = _datagrams()
                self._socket.setblocking(False)
        except OSError:  # the folder was removed, or no descriptor is left
            return
        for name in self._names:
            try:
                self._socket.sendto(b"\0", name)
            except BlockingIOError:
                pass  # its queue is full: it has been woken
            except ConnectionRefusedError:
                # Nobody has it open any more: it was killed.
                with suppress(OSError):
                    self._remove(os.path.basename(name))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENOBUFS):
                    say(log, logging.DEBUG, "%s: not woken: %s", name, error)

    def _remove(self, name: str) -> None:
        """Remove a socket, and nothing else, wherever the folder's name leads.

        Whoever shares the folder may have put a link in its place, or a file into it.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        folder = os.open(self._folder, flags)
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISSOCK(found.st_mode):
                os.unlink(name, dir_fd=folder)
        finally:
            os.close(folder)

    def _look(self) -> None:
        found = os.lstat(self._folder)  # not of what a link leads to
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(f"{self._folder} must be a directory")
        changed, folder = found.st_mtime_ns, (found.st_dev, found.st_ino)
        if (changed, folder) == (self._changed, self._identity):
            return
        self._identity = folder
        with os.scandir(self._folder) as entries:
            self._names = [entry.path for entry in entries if _is_socket(entry)]
        # One that comes in the same tick of the clock will not change it. Some file
        # systems have whole seconds (ext4 with inodes of 128 bytes).
        is_settled = abs(time.time_ns() - changed) > 1_500_000_000
        self._changed = changed if is_settled else None

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()


def _is_socket(entry: os.DirEntry[str]) -> bool:
    try:
        return stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _datagrams() -> Any:
    return native(socket, "socket")(socket.AF_UNIX, socket.SOCK_DGRAM)


class _Listener:
    """The thread that tells the sink what is new, and the socket that wakes it."""

    def __init__(self, process: _Process, broker: LocalBroker) -> None:
        self._process = process
        self._broker = weakref.ref(broker)
        self._path = broker.path
        self._folder = f"{broker.path}/wake"
        self._name = ""
        self._socket: Any = None
        self._position = 0  # up to this place all was told
        self._is_doubtful = broker.is_heir  # some may not have been told
        self._is_closed = False
        self._ended: list[Turn] = []
        self._lock = native(_thread, "RLock")()

    def start(self, database: _Database) -> None:
        """Tell what is stored from now on; with the guard.

        Raises:
            Unavailable: No thread is left.
            OSError, sqlite3.Error: It cannot be woken, or cannot read.
        """
        self._bind()
        try:
            # After it: what is stored from now on is looked for.
            self._position = database.newest()
            _start_thread(self._run)
        except BaseException:
            self._unbind()
            raise

    def _bind(self) -> None:
        """Make a socket in place of the one before; with the guard.

        Without a new one there is still the old one to wait by.
        """
        path = self._path
        _make_wake(path)
        before = self._socket, self._name
        self._socket = _datagrams()
        try:
            self._name = f"{self._folder}/{os.getpid():x}-{os.urandom(4).hex()}"
            self._socket.bind(self._name)
            # Who may wake it must be able to write to it.
            _settle(self._name, _file_mode(path), os.stat(path).st_gid)
            self._socket.setblocking(False)
        except BaseException:
            self._unbind()
            self._socket, self._name = before
            raise
        if before[0] is not None:
            before[0].close()

    def _unbind(self) -> None:
        with suppress(OSError):
            os.unlink(self._name)
        self._socket.close()

    def _run(self) -> None:
        while not self._is_closed:
            try:
                self._tell()
            except Exception as error:
                self._process.judge("listen", reason=_said(self._path, error))
                if not isinstance(error, (BrokerError, sqlite3.Error, OSError)):
                    self._is_doubtful = True
                    text = "%s: the sink has failed"
                    say(log, logging.ERROR, text, self._path, error=error)
                native(time, "sleep")(LOOK_EVERY / 5)
            else:
                self._process.judge("listen", "read")
                self._process.freshen(self._name)
            self._wait()
        self._unbind()
        try:
            self._process.finish_news()
        finally:
            with self._lock:
                ended, self._ended = self._ended, []
                self._socket = None
            for turn in ended:
                turn.end()

    def _wait(self) -> None:
        """Wait to be woken, or for the time to look anyhow."""
        poll = native(select, "poll")()
        poll.register(self._socket, select.POLLIN)
        poll.poll(LOOK_EVERY * 1000)
        # All that have come by now: what they tell of will be seen. Not for ever: some
        # may send them as fast.
        with suppress(OSError):
            for _ in range(_WAKES):
                self._socket.recv(16)

    def _tell(self) -> None:
        """Tell what has come since the last time."""
        broker = self._broker()
        while broker is not None and not self._is_closed:
            rows, newest = self._look(broker)
            sink = broker.sink
            if sink is None:
                return
            if self._is_doubtful:
                self._is_doubtful = False
                sink.resync(None)
            if not rows:
                # They were deleted before they were read; or an operator has put
                # an older copy in this one's place, and numbers begin anew.
                if newest != self._position:
                    self._position = newest
                    sink.resync(None)
                return
            last = rows[-1][0]
            if last - self._position != len(rows):
                # Some were trimmed before they were read here, maybe the last ones
                # of their channels.
                sink.resync(None)
            self._position = last
            for _, channel, entry in rows:
                if broker.is_watched(channel):
                    sink.deliver(channel, entry)

    def _look(self, broker: LocalBroker) -> tuple[list[tuple[int, str, Entry]], int]:
        """Return what follows our position, and the newest's place.

        Notices that files were replaced.
        """
        with self._process.news() as (database, is_new):
            if not os.path.exists(self._name):
                self._bind()
            if is_new:
                self._position = database.newest()
                self._is_doubtful = True
            if not broker.is_watching():
                newest = database.newest()

                def skip() -> None:
                    self._position = newest

                broker.unless_watching(skip)
            # First: what comes between the two is there for the next look.
            newest = database.newest()
            self._process.try_to_store(database)
            return database.tail(self._position), newest

    def close(self, deadline: float) -> bool:
        turn = Turn()
        return not self.end(turn) or turn.wait(deadline)

    def end(self, *turns: Turn) -> bool:
        """Have it end, and end these turns then; ``False``: it has ended."""
        with self._lock:
            self._is_closed = True
            if self._socket is None:
                return False
            self._ended.extend(turns)
        with suppress(OSError):  # it ends within half a second anyhow
            sender = _datagrams()
            try:
                sender.sendto(b"\0", self._name)
            finally:
                sender.close()
        return True

    def let_go(self) -> None:
        if self._socket is not None:
            self._socket.close()
