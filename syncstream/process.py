"""What this process has of streams: the open ones, how others ended, its own stop.

A server that is told to stop tells nobody: streams would go on until it kills them.
So while there are streams, the flag by which the server knows it is looked at 12
times a second (gunicorn's SIGQUIT leaves 0.1 s), and then they are told to end. At
the interpreter's exit they are told, too, and get a second.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import os
import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from .sockets import native
from .watch import GRID, Watch, on_grid

__all__ = ["Process", "process", "stats"]

EXIT_WAIT = 1.0  # seconds

Stopping = Callable[[], bool]


class Stoppable(Protocol):
    """A stream, as far as this module needs to know."""

    def stop(self, reason: str = ...) -> None: ...


@dataclass(slots=True)
class Total:
    """What the streams that ended for one reason came to."""

    streams: int = 0
    seconds: float = 0.0
    events: int = 0
    bytes: int = 0


class Process:
    """The streams of one process. Get it from `process`."""

    def __init__(self) -> None:
        self._warned: dict[str, object] = {}
        self._memo: dict[Hashable, Any] = {}
        # Reentrant: a garbage collection in here may end a stream, whose callback
        # asks for these numbers; so may a signal's.
        self._lock = native(_thread, "RLock")()
        # Weak: a stream that everybody has dropped ends.
        self._open: dict[int, weakref.ref[Stoppable]] = {}
        self._totals: dict[str, Total] = {}
        # Not counted yet: a garbage collection may close streams anywhere, in the
        # middle of counting, too.
        self._news: deque[tuple[str, float, int, int]] = deque()
        self._stopping: Stopping | None = None
        self._is_looking = False
        self._has_exit = False

    def warn_once(self, log: logging.Logger, text: str, key: str = "") -> None:
        """Log a warning unless this process has done so before."""
        token = object()
        if self._warned.setdefault(key or text, token) is token:
            log.warning(text)

    def memo(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """Return what was found for a key; find it the first time."""
        if key not in self._memo:
            self._memo[key] = find()
        return self._memo[key]

    @property
    def open_streams(self) -> int:
        return len(self._open)

    def opened(self, stream: Stoppable, watch: Watch | None) -> None:
        """Take a stream on; look by its watch whether the server stops."""
        key = id(stream)
        self._open[key] = weakref.ref(stream, partial(self._open.pop, key))
        if not self._has_exit:
            self._has_exit = True
            atexit.register(_at_exit)
        if watch is not None and self._stopping is not None and not self._is_looking:
            self._is_looking = True
            watch.call_at(on_grid(time.monotonic()), self._look)

    def closed(
        self, stream: Stoppable, reason: str, seconds: float, events: int, bytes: int
    ) -> None:
        """Let a stream go, and count it."""
        self._open.pop(id(stream), None)
        self.count(reason, seconds, events, bytes)

    def count(
        self, reason: str, seconds: float = 0.0, events: int = 0, bytes: int = 0
    ) -> None:
        """Count the end of a stream, also of one that never came to be."""
        self._news.append((reason, seconds, events, bytes))
        if len(self._news) > 100 and self._lock.acquire(False):
            try:
                self._add_up()
            finally:
                self._lock.release()

    def _add_up(self) -> None:
        while self._news:
            try:
                reason, seconds, events, bytes = self._news.popleft()
            except IndexError:  # a garbage collection's call was faster
                return
            total = self._totals.setdefault(reason, Total())
            total.streams += 1
            total.seconds += seconds
            total.events += events
            total.bytes += bytes

    @property
    def knows_stopping(self) -> bool:
        return self._stopping is not None

    def stop_when(self, stopping: Stopping) -> None:
        """Say how to learn that the server has been told to stop."""
        self._stopping = stopping

    @property
    def is_stopping(self) -> bool:
        return self._stopping is not None and self._stopping()

    def stop(self) -> None:
        """Tell all open streams to end."""
        for reference in list(self._open.values()):
            stream = reference()
            if stream is not None:
                stream.stop("shutdown")

    def _look(self) -> float | None:
        if not self._open:
            self._is_looking = False
            if not self._open:  # none came in between
                return None
            self._is_looking = True
        if self.is_stopping:
            self.stop()
        return on_grid(time.monotonic() + GRID / 2)

    def end(self, limit: float) -> None:
        """Tell all streams to end, and wait for that, at most so many seconds."""
        self.stop()
        deadline = time.monotonic() + limit
        gevent: Any = sys.modules.get("gevent")
        while self._open and time.monotonic() < deadline:
            (gevent or time).sleep(0.01)

    def stats(self) -> dict[str, Any]:
        with self._lock:
            self._add_up()
            totals = self._totals.copy()
            ended = {reason: asdict(total) for reason, total in totals.items()}
        return {"open": len(self._open), "ended": ended}


_processes: dict[int, Process] = {}  # this one's, and its parents' if it was forked


def process() -> Process:
    """Return this process's record; a forked child begins with an empty one."""
    pid = os.getpid()
    found = _processes.get(pid)
    # One for all threads, whichever asks first.
    return found if found is not None else _processes.setdefault(pid, Process())


def stats() -> dict[str, Any]:
    """Return what has become of the streams of this process.

    Returns:
        ``{"open": 3, "ended": {"disconnected": {"streams": 40, "seconds": 512.3,
        "events": 9120, "bytes": 801344}, …}}``: how many are open now; and for each
        reason for which some have ended, how many those were, and the sums of how
        long they lived, the events (chunks) that were yielded, and the bytes sent.
    """
    return process().stats()


def _at_exit() -> None:
    process().end(EXIT_WAIT)
