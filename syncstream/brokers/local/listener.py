"""Waking the listeners of all processes, and this process's own listener."""

from __future__ import annotations

import logging
import os
import select
import sqlite3
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from ...errors import Unavailable
from ...runtime.clock import time
from ...runtime.sockets import native
from ..contract import Sink
from ..process import start_thread
from ..tail import Stopped, Tail
from ..watched import Watched
from .database import Database
from .files import file_mode, make_wake, said, settle
from .peers import datagrams
from .read import Row, newest, tail

if TYPE_CHECKING:
    from .process import Process

__all__ = ["Listener", "drain"]

log = logging.getLogger("syncstream.brokers.local")
LOOK_EVERY = 0.5  # seconds between two looks without a wake
_WAKES = 1000  # wakes taken at once, before looking for events


def drain(sock: Any) -> None:
    """Take the wakes so far, before their events are looked for.

    The number is limited: peers may send wakes as fast as this takes them.
    """
    with suppress(OSError):
        for _ in range(_WAKES):
            sock.recv(16)


class Listener:
    """The thread that announces new events to the sink, and the socket that wakes it.

    Args:
        process: The process's part of the broker.
        watched: The watched names.
        is_late: Events may have been stored unannounced since names are watched.
    """

    def __init__(self, process: Process, watched: Watched, is_late: bool) -> None:
        self._process = process
        self._health = process.health
        self._watched = watched
        self._path = process.path
        self._folder = f"{process.path}/wake"
        self._name = ""
        self._socket: Any = None
        self._position = 0  # all events up to this place were announced
        self._is_doubtful = is_late  # except perhaps some
        self._is_closed = False
        self._tail = Tail(process.path, process.health, log)

    def start(self, database: Database) -> None:
        """Announce the events stored from now on; with the guard.

        Raises:
            Unavailable: No thread can be started.
            OSError, sqlite3.Error: Its socket or its database fails.
        """
        self._bind()
        try:
            # After binding: every event stored from now on wakes this listener.
            self._position = newest(database.connection)
            start_thread("local:", partial(self._tail.run, self))
        except BaseException:
            self._unbind()
            raise

    def _bind(self) -> None:
        """Replace the socket; with the guard. If that fails, the old one stays."""
        path = self._path
        make_wake(path)
        before = self._socket, self._name
        self._socket = datagrams()
        try:
            self._name = f"{self._folder}/{os.getpid():x}-{os.urandom(4).hex()}"
            self._socket.bind(self._name)
            # Peers must be able to write to it.
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
            self._process.times.freshen(self._name)
            self._wait(LOOK_EVERY)

    def lose(self) -> None:
        """Do nothing: files are reopened when needed, and the position stays."""

    def rest(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self._wait(left)

    def _wait(self, seconds: float) -> None:
        """Wait for a wake or the time-out."""
        poll = native(select, "poll")()
        poll.register(self._socket, select.POLLIN)
        poll.poll(seconds * 1000)
        drain(self._socket)
        if self._is_closed:
            raise Stopped

    def _tell(self) -> None:
        """Announce the events since the last time."""
        while not self._is_closed:
            began = self._health.moment()
            rows, place = self._look()
            sink = self._health.sink
            if sink is not None:
                self._pass_on(rows, place, sink)
            if sink is None or not rows:
                self._tail.serves("read", since=began)
                return

    def _pass_on(self, rows: list[Row], place: int, sink: Sink) -> None:
        """Announce the events found, and advance the position."""
        if self._is_doubtful:
            sink.resync(None)
            self._is_doubtful = False
        if not rows:
            # Events were deleted before they were read, or an operator has restored an
            # older copy, where numbers begin lower.
            if place != self._position:
                self._position = place
                sink.resync(None)
            return
        last = rows[-1][0]
        if last - self._position != len(rows):
            # Some were trimmed before they were read here, perhaps the last ones of
            # their channels.
            sink.resync(None)
        self._position = last
        self._is_doubtful = True  # if the sink fails
        for _, channel, entry in rows:
            if channel in self._watched:
                sink.deliver(channel, entry)
        self._is_doubtful = False

    def _look(self) -> tuple[list[Row], int]:
        """Return the events after our position, and the place of the newest one.

        It notices replaced files.
        """
        with self._process.news() as (database, is_new):
            if not os.path.exists(self._name):
                self._bind()
            if is_new:
                self._position = newest(database.connection)
                self._is_doubtful = True
            if not self._watched:
                place = newest(database.connection)
                # Look again, after the place was read: events stored after a `watch`
                # are behind it.
                if not self._watched:
                    self._position = place
            # Before the events: those that come in between are found by the next look.
            place = newest(database.connection)
            self._process.try_to_store(database)
            return tail(database.connection, self._position), place

    def leave(self) -> None:
        self._unbind()
        self._process.finish_news()

    # From any thread.

    def end(self) -> None:
        """Tell the listener to end, without waiting."""
        self._is_closed = True
        with suppress(OSError):  # it has ended, or ends at its next look
            sender = datagrams()
            try:
                sender.sendto(b"\0", self._name)
            finally:
                sender.close()

    def close(self, deadline: float) -> bool:
        """Tell the listener to end, and wait; ``False``: it did not end in time."""
        self.end()
        return self._tail.await_end(deadline)

    def let_go(self) -> None:
        if self._socket is not None:
            self._socket.close()
