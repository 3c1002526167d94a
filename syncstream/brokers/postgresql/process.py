"""One process's share of a broker: its connection pool and its listener."""

from __future__ import annotations

import _queue
import _thread
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...runtime import waiting
from ...runtime.clock import time
from ...runtime.sockets import native
from .connection import Connection, Lost, Refused

if TYPE_CHECKING:
    from .listener import Listener

__all__ = ["Own", "Stopper", "living"]
IDLE = 30.0  # seconds after which a connection that nobody has used is closed
FRESH = 1.0  # seconds for which a connection that was used is not asked if it lives


class Own:
    """What one process has of a broker."""

    def __init__(self, connections: int) -> None:
        self.lock = native(_thread, "allocate_lock")()
        self.listener: Listener | None = None
        self.stopper: Stopper | None = None
        self.idle: list[Connection] = []  # the one last that was used last
        # The C one: gevent patches the name in `queue`, not this.
        self.permits: _queue.SimpleQueue[None] = _queue.SimpleQueue()
        for _ in range(connections):
            self.permits.put(None)
        self.is_installed = False
        self.identity = ""
        self._connections = connections
        self._threads: dict[Any, tuple[Any, Any]] = {}

    def threads(self, hub: Any) -> tuple[Any, Any]:
        """Return the threads that work for the greenlets of a hub, and their places.

        Who waits for a place has a time limit; who waits within the pool has none.
        """
        found = self._threads.get(hub)
        if found is None:
            from gevent.lock import Semaphore
            from gevent.threadpool import ThreadPool

            # One more than work at once: someone waits for the listener.
            count = self._connections + 1
            found = ThreadPool(count, hub), Semaphore(count)
            found = self._threads.setdefault(hub, found)
        return found

    def keep(self, connection: Connection) -> None:
        """Keep a connection for whoever comes next."""
        connection.used = time.monotonic()
        with self.lock:
            self.idle.append(connection)
        self.release()

    def take(self) -> Connection | None:
        with self.lock:
            return self.idle.pop() if self.idle else None

    def release(self, seconds: float = IDLE) -> None:
        """Close the connections that nobody has used for so long."""
        since = time.monotonic() - seconds
        while True:
            with self.lock:
                if not self.idle or self.idle[0].used > since:
                    return
                connection = self.idle.pop(0)
            connection.close()

    def close(self) -> None:
        self.release(0)
        self._end_threads(waiting.gevent_hub())

    def drop(self) -> None:
        """End what gevent would keep for ever: threads, of a broker not closed."""
        if not sys.is_finalizing():
            self._end_threads(None)

    def _end_threads(self, here: Any) -> None:
        while self._threads:
            hub, (threads, _) = self._threads.popitem()
            if hub is here:
                threads.kill()
            elif hub.loop is not None:  # another thread's, when it next turns
                hub.loop.run_callback_threadsafe(threads.kill)


class Stopper:
    """The end of a pipe that ends a listener, when it is closed, or forgotten."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def stop(self) -> None:
        """Have it end, without waiting for that."""
        # A process that was forked has the pipe open, too: closing would not do.
        with suppress(BrokenPipeError):  # it has ended by itself
            os.write(self._fd, b"x")

    def __del__(self) -> None:
        os.close(self._fd)


def living(own: Own, deadline: float) -> Connection | None:
    """Return a connection that was kept and still lives."""
    while (connection := own.take()) is not None:
        if connection.is_readable():  # nobody asked it: it has ended
            connection.close()
            continue
        now = time.monotonic()
        if now - connection.used < FRESH:
            return connection
        # It may have died without a word; while nothing is sent that is no harm.
        try:
            connection.run("", deadline=now + (deadline - now) / 2)
        except (Lost, Refused):
            connection.close()
            own.release(0)  # as old as this one
            break
        return connection
    return None
