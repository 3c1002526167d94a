"""Waking the other processes, and the thread that reads when it is woken."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
import sqlite3
import stat
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import Unavailable
from ...runtime.clock import time
from ...runtime.sockets import native
from ...runtime.waiting import say
from ..contract import Sink
from ..tail import Stopped, Tail
from ..watched import Watched
from .database import Database, Row
from .files import file_mode, make_wake, said, settle
from .threads import start_thread

if TYPE_CHECKING:
    from .process import Process

__all__ = ["Listener", "Others", "drain"]

log = logging.getLogger("syncstream.brokers.local")
LOOK_EVERY = 0.5  # seconds, for what nobody has told of
_WAKES = 1000  # that are taken before it looks, be there more or not


class Others:
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


def drain(sock: Any) -> None:
    """Take the wakes that have come by now: what they tell of will be seen.

    Not for ever: some may send them as fast.
    """
    with suppress(OSError):
        for _ in range(_WAKES):
            sock.recv(16)


def _datagrams() -> Any:
    return native(socket, "socket")(socket.AF_UNIX, socket.SOCK_DGRAM)


class Listener:
    """What is told to the sink, by a thread, and the socket that wakes it.

    Args:
        is_late: Something may have been stored since somebody counts on being told.
    """

    def __init__(self, process: Process, watched: Watched, is_late: bool) -> None:
        self._process = process
        self._health = process.health
        self._watched = watched
        self._path = process.path
        self._folder = f"{process.path}/wake"
        self._name = ""
        self._socket: Any = None
        self._position = 0  # up to this place all was told
        self._is_doubtful = is_late  # some may not have been
        self._is_closed = False
        self._tail = Tail(process.path, process.health, log)

    def start(self, database: Database) -> None:
        """Tell what is stored from now on; with the guard.

        Raises:
            Unavailable: No thread is left.
            OSError, sqlite3.Error: It cannot be woken, or cannot read.
        """
        self._bind()
        try:
            # After it: what is stored from now on is looked for.
            self._position = database.newest()
            start_thread(partial(self._tail.run, self))
        except BaseException:
            self._unbind()
            raise

    def _bind(self) -> None:
        """Make a socket in place of the one before; with the guard.

        Without a new one there is still the old one to wait by.
        """
        path = self._path
        make_wake(path)
        before = self._socket, self._name
        self._socket = _datagrams()
        try:
            self._name = f"{self._folder}/{os.getpid():x}-{os.urandom(4).hex()}"
            self._socket.bind(self._name)
            # Who may wake it must be able to write to it.
            settle(self._name, file_mode(path), os.stat(path).st_gid)
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

    # Its thread.

    def listen(self) -> None:
        while True:
            try:
                self._tell()
            except (sqlite3.Error, OSError) as error:
                raise Unavailable(said(self._path, error)) from error
            self._process.freshen(self._name)
            self._wait(LOOK_EVERY)

    def lose(self) -> None:
        """Nothing: the files are opened anew if need be, and the position is known."""

    def rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._wait(left)

    def _wait(self, seconds: float) -> None:
        """Wait to be woken, or for the time to look anyhow."""
        poll = native(select, "poll")()
        poll.register(self._socket, select.POLLIN)
        poll.poll(seconds * 1000)
        drain(self._socket)
        if self._is_closed:
            raise Stopped

    def _tell(self) -> None:
        """Tell what has come since the last time."""
        while not self._is_closed:
            began = self._health.moment()
            rows, newest = self._look()
            sink = self._health.sink
            if sink is not None:
                self._pass_on(rows, newest, sink)
            if sink is None or not rows:
                self._health.works("read", since=began)
                self._tail.serves(since=began)
                return

    def _pass_on(self, rows: list[Row], newest: int, sink: Sink) -> None:
        """Tell what was found, and go on from there."""
        if self._is_doubtful:
            sink.resync(None)
            self._is_doubtful = False
        if not rows:
            # They were deleted before they were read; or an operator has put an older
            # copy in this one's place, and numbers begin anew.
            if newest != self._position:
                self._position = newest
                sink.resync(None)
            return
        last = rows[-1][0]
        if last - self._position != len(rows):
            # Some were trimmed before they were read here, maybe the last ones of
            # their channels.
            sink.resync(None)
        self._position = last
        self._is_doubtful = True  # if the sink fails
        for _, channel, entry in rows:
            if channel in self._watched:
                sink.deliver(channel, entry)
        self._is_doubtful = False

    def _look(self) -> tuple[list[Row], int]:
        """Return what follows our position, and the newest's place.

        Notices that files were replaced.
        """
        with self._process.news() as (database, is_new):
            if not os.path.exists(self._name):
                self._bind()
            if is_new:
                self._position = database.newest()
                self._is_doubtful = True
            # In this order: what is stored once somebody watches is behind it.
            newest = database.newest()
            if not self._watched:
                self._position = newest
            # First: what comes between the two is there for the next look.
            newest = database.newest()
            self._process.try_to_store(database)
            return database.tail(self._position), newest

    def leave(self) -> None:
        self._unbind()
        self._process.finish_news()

    # From any thread.

    def end(self) -> None:
        """Have it end; some time soon."""
        self._is_closed = True
        with suppress(OSError):  # it has ended, or will within half a second
            sender = _datagrams()
            try:
                sender.sendto(b"\0", self._name)
            finally:
                sender.close()

    def close(self, deadline: float) -> bool:
        """Have it end, and wait for that; ``False``: not in time."""
        self.end()
        return self._tail.await_end(deadline)

    def let_go(self) -> None:
        if self._socket is not None:
            self._socket.close()
