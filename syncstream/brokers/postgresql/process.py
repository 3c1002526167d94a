"""One process's share of a broker: its connection pool and its listener."""

from __future__ import annotations

import _thread
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from ...errors import Unavailable
from ...runtime import waiting
from ...runtime.clock import time
from ...runtime.sockets import native
from ..health import Health
from ..watched import Watched
from .listener import Listener
from .pool import Pool
from .schema import Schema

__all__ = ["Process"]

T = TypeVar("T")


class Process:
    """What one process has of a broker, which it does not keep."""

    def __init__(
        self, dsn: str, schema: Schema, health: Health, connections: int
    ) -> None:
        self.pool = Pool(dsn, schema, health, connections)
        self._dsn = dsn
        self._schema = schema
        self._health = health
        self._connections = connections
        self._lock = native(_thread, "allocate_lock")()
        self._listener: Listener | None = None
        self._stopper: Stopper | None = None
        self._is_closing = False
        self._threads: dict[Any, tuple[Any, Any]] = {}

    # What may block.

    def call(self, function: Callable[[], T], deadline: float) -> T:
        """Call it: in this thread, or for a greenlet in another one."""
        hub = waiting.gevent_hub()
        if hub is None:
            return function()
        threads, places = self._of_hub(hub)
        if not places.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise Unavailable(self.pool.busy)
        try:
            value, error = threads.apply(_outcome, (function,))
        finally:
            places.release()
        if error is not None:
            raise error
        result: T = value
        return result

    def _of_hub(self, hub: Any) -> tuple[Any, Any]:
        """Return the threads that work for the greenlets of a hub, and their places.

        Who waits for a place has a time limit; who waits within the pool has none.
        """
        found = self._threads.get(hub)
        if found is None:
            from gevent.lock import Semaphore
            from gevent.threadpool import ThreadPool

            count = self._connections
            found = ThreadPool(count, hub), Semaphore(count)
            found = self._threads.setdefault(hub, found)
        return found

    # To listen.

    def listen(self, dsn: str, watched: Watched, *, is_late: bool) -> Listener | None:
        """Return who listens in this process; ``None``: it is closed.

        Args:
            dsn: Where to.
            watched: What is told.
            is_late: Somebody counts on being told what has come before.
        """
        with self._lock:
            if self._listener is None and not self._is_closing:
                stop, stopper = os.pipe()
                self._stopper = Stopper(stopper)
                self._listener = Listener(
                    dsn,
                    self._schema,
                    self._health,
                    watched,
                    self.pool,
                    stop,
                    is_home=dsn == self._dsn,
                    is_late=is_late,
                )
                self._listener.start()
            return self._listener

    # Its end.

    def close(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        with self._lock:
            self._is_closing = True
            listener, self._listener = self._listener, None
            stopper, self._stopper = self._stopper, None
        if listener is not None and stopper is not None:
            stopper.stop()
            listener.await_end(deadline)
        self.pool.close()
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


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    # gevent prints the traceback of what a thread raises.
    try:
        return function(), None
    except BaseException as error:
        return None, error
