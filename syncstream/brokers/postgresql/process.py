"""One process's part of a broker: its connection pool and its listener."""

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
    """One process's part of a broker; it keeps no reference to the broker.

    Attributes:
        is_heir: The process has inherited watched names by a fork, and no listener has
            begun since: events have been stored unannounced.
    """

    def __init__(
        self,
        dsn: str,
        schema: Schema,
        health: Health,
        connections: int,
        *,
        is_heir: bool,
    ) -> None:
        self.is_heir = is_heir
        self.pool = Pool(dsn, schema, health, connections)
        self._schema = schema
        self._health = health
        self._connections = connections
        self._lock = native(_thread, "allocate_lock")()
        self._listener: Listener | None = None
        self._stopper: Stopper | None = None
        self._is_closing = False
        self._threads: dict[Any, tuple[Any, Any]] = {}

    # Calls that may block.

    def call(self, function: Callable[[], T], deadline: float) -> T:
        """Make a call in this thread; for a greenlet, in a thread of its hub's pool."""
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
        """Return the thread pool of a hub, and a semaphore with as many places.

        Waiting for a place can time out; waiting within the pool cannot.
        """
        found = self._threads.get(hub)
        if found is None:
            from gevent.lock import Semaphore
            from gevent.threadpool import ThreadPool

            count = self._connections
            found = ThreadPool(count, hub), Semaphore(count)
            found = self._threads.setdefault(hub, found)
        return found

    # Listening.

    def listen(self, dsn: str, watched: Watched) -> Listener | None:
        """Return this process's listener, ``None`` if this part is closed.

        Args:
            dsn: The connection string to listen at.
            watched: The watched names.

        Raises:
            Unavailable: No thread can be started, or no pipe be made.
        """
        with self._lock:
            if self._listener is None and not self._is_closing:
                try:
                    stop, stopper = os.pipe()
                except OSError as error:  # too many are open
                    reason = f"postgresql: cannot listen: {error}"
                    raise Unavailable(reason) from error
                owner = Stopper(stopper)
                listener = Listener(
                    dsn,
                    self._schema,
                    self._health,
                    watched,
                    self.pool,
                    stop,
                    is_late=self.is_heir,
                )
                listener.start()
                self._listener, self._stopper = listener, owner
                self.is_heir = False
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
        """End the threads of a dropped broker, without waiting."""
        if self._stopper is not None:
            self._stopper.stop()
        if not sys.is_finalizing():  # gevent would keep them for ever
            self._end_threads(None)

    def _end_threads(self, here: Any) -> None:
        while self._threads:
            hub, (threads, _) = self._threads.popitem()
            if hub is here:
                threads.kill()
            elif hub.loop is not None:  # another thread's hub does it at its next turn
                hub.loop.run_callback_threadsafe(threads.kill)


class Stopper:
    """The end of a pipe that ends a listener, by `stop` or when it is dropped."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def stop(self) -> None:
        """Tell the listener to end, without waiting."""
        # Closing is not enough: a forked process may have the pipe open, too.
        with suppress(BrokenPipeError):  # the listener has ended already
            os.write(self._fd, b"x")

    def __del__(self) -> None:
        os.close(self._fd)


def _outcome(function: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    # gevent prints the traceback of an exception that a thread raises: return it.
    try:
        return function(), None
    except BaseException as error:
        return None, error
