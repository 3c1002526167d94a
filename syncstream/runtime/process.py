"""One process's streams: the open ones, counters of the ended ones, the stop.

A server that is told to stop tells nobody: streams would go on until it kills them.
So while there are streams, the flag by which the server knows it is looked at 12
times a second, and from then on each stream is asked to end at every look: one whose
client comes back ends at once, finite work goes on until it is done or its time is
over. At the interpreter's exit all are told to end, and get a second.
"""

from __future__ import annotations

import _thread
import atexit
import logging
import math
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol

from .clock import time
from .journal import journal, report
from .sockets import native
from .waiting import say
from .watch import GRID, Watch, on_grid

__all__ = ["Process", "Served", "Stopping", "process", "stats"]

log = logging.getLogger("syncstream.process")

EXIT_WAIT = 1.0  # seconds
_MOST_KEPT = 200  # of what is kept for whoever asks again

Stopping = Callable[[], "float | None"]
"""Tells whether a server has been told to stop: until when (`time.monotonic`) finite
work may go on, which is in the past if it may not; ``None`` if it has not been told."""

AT_ONCE = -math.inf
"""What a `Stopping` returns when nothing may go on."""


def drain_of_environment() -> float | None:
    """Return ``SYNCSTREAM_DRAIN``: for how many seconds finite work goes on at a stop.

    ``None`` if it is not set, or is no such number, which is said once.
    """
    text = os.environ.get("SYNCSTREAM_DRAIN")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if 0 <= seconds < math.inf:
        return seconds
    message = "SYNCSTREAM_DRAIN must be seconds, 0 or more, got %r: ignored"
    process().say_once(log, logging.WARNING, message, text)
    return None


class Attached(Protocol):
    """A stream that its server has, as far as this module needs to know."""

    def shut_down(self, since: float, until: float) -> None:
        """End, or go on with finite work for a while; called again and again.

        Args:
            since: When the server's stop was first seen, `time.monotonic`.
            until: As a `Stopping` returns it.
        """


class Parked(Protocol):
    """A client that its server has let go."""

    def stop(self, reason: str = ...) -> None: ...


@dataclass(slots=True)
class Total:
    """What the streams that ended for one reason came to."""

    streams: int = 0
    seconds: float = 0.0
    events: int = 0
    bytes: int = 0


class Served:
    """The open streams of one server; a process may have several.

    Attributes:
        stopping: Tells whether the server has been told to stop, ``None`` if nothing
            does.
        since: When its stop was first seen (`time.monotonic`), ``None`` before.
    """

    def __init__(self, stopping: Stopping | None) -> None:
        self.stopping = stopping
        self.since: float | None = None
        # Weak: a stream that everybody has dropped ends.
        self.open: dict[int, weakref.ref[Attached]] = {}
        # Those that the server has let go; until the last callback of theirs has run.
        self.parked: set[Parked] = set()

    def until(self) -> float | None:
        """Return what its `stopping` tells."""
        return _asked(self.stopping)

    def stop(self, until: float = AT_ONCE) -> None:
        """Tell all its streams to end; those with finite work, at that time.

        One that fails keeps no other from it.
        """
        if self.since is None:
            self.since = time.monotonic()
        complaint = "a stream was not told to end"
        for reference in list(self.open.values()):
            stream = reference()
            if stream is not None:
                _try(partial(stream.shut_down, self.since, until), complaint)
        for parked in tuple(self.parked):
            _try(partial(parked.stop, "shutdown"), complaint)

    def count(self) -> int:
        """Return how many streams it has."""
        return len(self.open) + len(self.parked)


class Process:
    """The streams of one process. Get it from `process`."""

    def __init__(self) -> None:
        self._warned: dict[str, object] = {}
        self._memo: dict[Hashable, Any] = {}
        self._labels: dict[str, str] = {}
        # Reentrant: a garbage collection in here may end a stream, whose callback
        # asks for these numbers; so may a signal's.
        self._lock = native(_thread, "RLock")()
        self._served: dict[Hashable, Served] = {}  # by server, the one that is now
        self._all: dict[int, Served] = {}  # all that have streams
        self._totals: dict[str, Total] = {}
        # Not counted yet: a garbage collection may close streams anywhere, in the
        # middle of counting, too.
        self._news: deque[tuple[str, float, int, int]] = deque()
        self._stopping: Stopping | None = None
        self._is_looking = False
        self._has_exit = False
        self._last: list[Callable[[], object]] = []

    def warn_once(self, log: logging.Logger, text: str, key: str = "") -> None:
        """Log a warning unless this process has done so before."""
        token = object()
        if self._warned.setdefault(key or text, token) is token:
            report(log, logging.WARNING, text)

    def say_once(
        self, log: logging.Logger, level: int, message: str, *args: object
    ) -> None:
        """Log a line, soon, unless this process has done so before."""
        token = object()
        if self._warned.setdefault(message, token) is token:
            say(log, level, message, *args)

    def memo(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """Return what was found for a key; find it the first time.

        Args:
            key: Of the server's or ours. What clients send makes no key: when there
                are too many, all are forgotten.
            find: Returns it.
        """
        missing = object()
        found = self._memo.get(key, missing)
        if found is missing:
            found = find()
            if len(self._memo) >= _MOST_KEPT:
                self._memo.clear()
            self._memo[key] = found
        return found

    def shared_label(self, label: str) -> str:
        """Return the same object for equal labels, of which there are often many.

        `sys.intern` would keep each one that a client makes up, on Python 3.12 for
        ever.
        """
        if len(self._labels) >= _MOST_KEPT:
            self._labels.clear()
        return self._labels.setdefault(label, label)

    @property
    def open_streams(self) -> int:
        return sum(served.count() for served in list(self._all.values()))

    @property
    def attached_streams(self) -> int:
        """How many hold a thread or greenlet of their server."""
        return sum(len(served.open) for served in list(self._all.values()))

    @property
    def parked_streams(self) -> int:
        """How many have left their server."""
        return sum(len(served.parked) for served in list(self._all.values()))

    def opened(
        self,
        stream: Attached,
        watch: Watch | None,
        server: Hashable,
        find: Callable[[], Stopping | None],
    ) -> Served:
        """Take a stream on; look by its watch whether its server stops.

        Args:
            stream: It is held weakly.
            watch: Its watch.
            server: Tells its server from others of this process.
            find: Returns what tells whether that has been told to stop.
        """
        served = self._served.get(server)
        if served is None or served.until() is not None:
            # Another one may have taken the place of one that has stopped.
            served = self._served[server] = Served(find())
        self._have_exit()
        key = id(stream)
        served.open[key] = weakref.ref(stream, partial(served.open.pop, key))
        self._all[id(served)] = served
        is_told = served.stopping is not None or self._stopping is not None
        if watch is not None and is_told and not self._is_looking:
            self._is_looking = True
            try:
                watch.call_at(on_grid(time.monotonic()), self._look)
            except BaseException:
                self._is_looking = False  # the next one tries again
                served.open.pop(key, None)
                raise
        return served

    def _have_exit(self) -> None:
        if not self._has_exit:
            atexit.register(_at_exit)
            self._has_exit = True

    def at_exit(self, callback: Callable[[], object]) -> None:
        """Call this at the interpreter's exit, after the streams have ended."""
        self._last.append(callback)
        self._have_exit()

    def closed(self, stream: Attached, served: Served) -> None:
        """Let a stream go."""
        served.open.pop(id(stream), None)

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

    def stop_when(self, stopping: Stopping) -> None:
        """Say how to learn that the whole process has been told to stop."""
        self._stopping = stopping

    def until(self, served: Served) -> float | None:
        """Return what a server's `Stopping` tells, or the process's, if that is less.

        From the first time on that it is not ``None``, the server has a `since`.
        """
        until = served.until()
        ours = _asked(self._stopping)
        if ours is not None:
            until = ours if until is None else min(until, ours)
        if until is not None and served.since is None:
            served.since = time.monotonic()
        return until

    def stop(self) -> None:
        """Tell all open streams to end at once."""
        for served in list(self._all.values()):
            served.stop()

    def _look(self) -> float | None:
        for key, served in list(self._all.items()):
            if served.count():
                until = self.until(served)
                if until is not None:
                    served.stop(until)
                continue
            # A server that may have gone is forgotten, and asked for again.
            del self._all[key]
            for name in [n for n, known in self._served.items() if known is served]:
                del self._served[name]
            if served.count():  # one came in between
                self._all[key] = served
        if not self._all:
            self._is_looking = False
            if not self._all:
                return None
            self._is_looking = True
        return on_grid(time.monotonic() + GRID / 2)

    def end(self, limit: float) -> None:
        """Tell all streams to end, and wait for that, at most so many seconds."""
        self.stop()
        deadline = time.monotonic() + limit
        gevent: Any = sys.modules.get("gevent")
        while self.open_streams and time.monotonic() < deadline:
            (gevent or time).sleep(0.01)

    def leave(self) -> None:
        """Do what is to be done last."""
        while self._last:
            _try(self._last.pop(), "what was to be done at the exit failed")

    def stats(self) -> dict[str, Any]:
        with self._lock:
            self._add_up()
            totals = self._totals.copy()
            ended = {reason: asdict(total) for reason, total in totals.items()}
        return {"open": self.open_streams, "ended": ended}


_processes: dict[int, Process] = {}  # this one's, and its parents' if it was forked


def process() -> Process:
    """Return this process's record; a forked child begins with an empty one."""
    pid = os.getpid()
    found = _processes.get(pid)
    # One for all threads, whichever asks first.
    return found if found is not None else _processes.setdefault(pid, Process())


def _try(function: Callable[[], object], complaint: str) -> None:
    """Call; the others go on if that fails."""
    try:
        function()
    except Exception as error:
        # In the thread or the hub of a watch, for which everybody waits.
        say(log, logging.ERROR, complaint, error=error)


def _asked(stopping: Stopping | None) -> float | None:
    """Return what something tells of its stop; of what cannot be asked, nothing."""
    if stopping is None:
        return None
    try:
        return stopping()
    except Exception as error:
        text = "whether the server stops cannot be asked: %r"
        process().say_once(log, logging.ERROR, text, error)
        return None


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
    record = process()
    record.end(EXIT_WAIT)
    record.leave()
    journal().flush()  # what these ends have to say
