"""One process's streams: the open ones, counters of the ended ones, the stop.

A server that is told to stop does not tell its applications: streams would run until it
kills them. So while there are streams, the server's own flag is checked 12 times a
second. Once it is set, every check asks each stream to end: a stream whose client
reconnects ends at once, finite work continues until it is done or its time is over. At
the interpreter's exit all streams are told to end, and get one second; finite work
whose client has left a server that stops is waited for before, as servers wait for
theirs.
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
from functools import partial
from typing import Any, Protocol

from .clock import time
from .ending import is_cut_short
from .forks import process_key
from .journal import journal, report
from .sockets import native
from .waiting import say
from .watch import GRID, Watch, on_grid

__all__ = ["Process", "Served", "Stopping", "process", "stats"]

log = logging.getLogger("syncstream.process")

EXIT_WAIT = 1.0  # seconds
SOURCES_WAIT = 5.5  # seconds; a source that has not ended after 5 is named in the log
_MOST_KEPT = 200  # entries of each cache
_UNTOLD = "a stream could not be told that the server stops: it goes on"

Stopping = Callable[[], "float | None"]
"""Returns ``None`` until the server has been told to stop, then the time until which
finite work may continue (`time.monotonic`; in the past: not at all)."""

AT_ONCE = -math.inf
"""The result of a `Stopping` if no work may continue."""


def drain_of_environment() -> float | None:
    """Return ``SYNCSTREAM_DRAIN``: the seconds that finite work may take at a stop.

    ``None`` if it is unset or invalid; an invalid value is logged once.
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
    """A stream that its server still serves, as far as this module is concerned.

    Attributes:
        label: Method and path of its request.
    """

    @property
    def label(self) -> str: ...

    def shut_down(self, since: float, until: float) -> None:
        """End, or continue finite work for a while; called repeatedly.

        Args:
            since: When the server's stop was first noticed, `time.monotonic`.
            until: The result of a `Stopping`.
        """


class Parked(Protocol):
    """A client whose connection has left its server.

    Attributes:
        reason: Why its stream has ended, ``None`` while it lives.
        is_finishing: Whether it has ended, but its source has not yet.
        label: Method and path of its request.
    """

    label: str

    @property
    def reason(self) -> str | None: ...

    @property
    def is_finishing(self) -> bool: ...

    def shut_down(self, since: float, until: float) -> None:
        """Do as `Attached.shut_down`."""


class Total:
    """The sums over all streams that ended for one reason."""

    __slots__ = ("bytes", "events", "seconds", "streams")

    def __init__(self) -> None:
        self.streams = 0
        self.seconds = 0.0
        self.events = 0
        self.bytes = 0

    def stats(self) -> dict[str, float]:
        return {
            "streams": self.streams,
            "seconds": self.seconds,
            "events": self.events,
            "bytes": self.bytes,
        }


class Served:
    """The open streams of one server; a process may have several.

    Attributes:
        stopping: Tells whether the server has been told to stop; ``None`` if nothing
            shows it.
        since: When its stop was first noticed (`time.monotonic`), ``None`` before.
    """

    def __init__(self, stopping: Stopping | None) -> None:
        self.stopping = stopping
        self.since: float | None = None
        # Weak: a stream without other references ends.
        self.open: dict[int, weakref.ref[Attached]] = {}
        # Clients that have left the server, until their last callback has run.
        self.parked: set[Parked] = set()

    def until(self) -> float | None:
        """Return the result of its `stopping`."""
        return _asked(self.stopping)

    def stop(self, until: float = AT_ONCE) -> None:
        """Tell all its streams to end, and those with finite work to end by a time.

        A failure of one does not affect the others.
        """
        if self.since is None:
            self.since = time.monotonic()
        for reference in list(self.open.values()):
            stream = reference()
            if stream is not None:
                _try(partial(stream.shut_down, self.since, until), _UNTOLD)
        self.stop_parked(until)

    def stop_parked(self, until: float) -> None:
        """Do as `stop` for those that have left the server."""
        since = self.since = self.since or time.monotonic()
        for parked in tuple(self.parked):
            _try(partial(parked.shut_down, since, until), _UNTOLD)

    def count(self) -> int:
        """Return the number of its streams."""
        return len(self.open) + len(self.parked)


class Process:
    """The streams of one process. Get it from `process`.

    Attributes:
        said: The keys of the lines that are logged once and have been.
        is_looking: Whether a watch calls `look`: while there are streams.
        left_calls: The number of calls that go on without their streams.
        lock: Held while ends are added up, and calls are counted.
        on_open: Called with each stream that begins, in its thread or greenlet; for
            tests, ``None`` otherwise.
    """

    def __init__(self) -> None:
        self.said: dict[str, object] = {}
        self._memo: dict[Hashable, Any] = {}
        self._labels: dict[str, str] = {}
        # Reentrant: a garbage collection in here may end a stream, whose callback
        # asks for these numbers; so may a signal's.
        self.lock = native(_thread, "RLock")()
        self._served: dict[Hashable, Served] = {}  # by server, the one that is now
        self._all: dict[int, Served] = {}  # all that have streams
        self._totals: dict[str, Total] = {}
        # Not counted yet: a garbage collection may close streams anywhere, in the
        # middle of counting, too.
        self._news: deque[tuple[str, float, int, int]] = deque()
        self._stopping: Stopping | None = None
        self.is_looking = False
        self.on_open: Callable[[Attached], object] | None = None
        self.left_calls = 0
        self._has_exit = False
        self._last: list[Callable[[], object]] = []

    def warn_once(self, log: logging.Logger, text: str, key: str = "") -> None:
        """Log a warning unless this process has logged it before.

        Args:
            log: The logger.
            text: The line.
            key: Distinguishes warnings, if texts of one warning differ.
        """
        token = object()
        if self.said.setdefault(key or text, token) is token:
            report(log, logging.WARNING, text)

    def say_once(
        self, log: logging.Logger, level: int, message: str, *args: object
    ) -> None:
        """Log a line soon, unless this process has logged its message before."""
        token = object()
        if self.said.setdefault(message, token) is token:
            say(log, level, message, *args)

    def memo(self, key: Hashable, find: Callable[[], Any]) -> Any:
        """Return the cached value of a key; compute it the first time.

        Args:
            key: Made of the server's data or ours, never of a client's: the cache is
                cleared when it is full.
            find: Returns the value.
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
        """Return the same object for equal labels, as there are often many.

        `sys.intern` would keep every label that a client invents, on Python 3.12
        forever.
        """
        if len(self._labels) >= _MOST_KEPT:
            self._labels.clear()
        return self._labels.setdefault(label, label)

    @property
    def open_streams(self) -> int:
        return sum(served.count() for served in list(self._all.values()))

    @property
    def attached_streams(self) -> int:
        """The number of streams that occupy a thread or greenlet of their server."""
        return sum(len(served.open) for served in list(self._all.values()))

    def attached(self) -> list[Attached]:
        """Return the streams that their servers still serve."""
        served = list(self._all.values())
        found = [reference() for one in served for reference in list(one.open.values())]
        return [stream for stream in found if stream is not None]

    def parked(self) -> list[Parked]:
        """Return the clients that have left their servers."""
        return [one for served in list(self._all.values()) for one in served.parked]

    @property
    def parked_streams(self) -> int:
        """The number of streams that have left their server."""
        return sum(len(served.parked) for served in list(self._all.values()))

    def opened(
        self,
        stream: Attached,
        watch: Watch | None,
        server: Hashable,
        find: Callable[[], Stopping | None],
    ) -> Served:
        """Add a stream, and check with its watch whether its server stops.

        Args:
            stream: The stream, which is referenced weakly.
            watch: Its watch.
            server: A key that distinguishes its server from others of this process.
            find: Returns the server's `Stopping`.
        """
        served = self._served.get(server)
        if served is None or served.until() is not None:
            # A new server may have replaced one that has stopped.
            served = self._served[server] = Served(find())
        self.have_exit()
        key = id(stream)
        served.open[key] = weakref.ref(stream, partial(served.open.pop, key))
        self._all[id(served)] = served
        if self.on_open is not None:
            self.on_open(stream)
        is_told = served.stopping is not None or self._stopping is not None
        if watch is not None and is_told and not self.is_looking:
            self.is_looking = True
            try:
                watch.call_at(on_grid(time.monotonic()), self.look)
            except BaseException:
                self.is_looking = False  # the next stream tries again
                served.open.pop(key, None)
                raise
        return served

    def have_exit(self) -> None:
        """Have the interpreter's exit end the streams."""
        if not self._has_exit:
            atexit.register(_at_exit)
            self._has_exit = True

    def at_exit(self, callback: Callable[[], object]) -> None:
        """Register a call for the interpreter's exit, after the streams have ended."""
        self._last.append(callback)
        self.have_exit()

    def closed(self, stream: Attached, served: Served) -> None:
        """Remove a stream."""
        served.open.pop(id(stream), None)

    def count(
        self, reason: str, seconds: float = 0.0, events: int = 0, bytes: int = 0
    ) -> None:
        """Count the end of a stream, even of one that never began."""
        self._news.append((reason, seconds, events, bytes))
        if len(self._news) > 100 and self.lock.acquire(False):
            try:
                self._add_up()
            finally:
                self.lock.release()

    def _add_up(self) -> None:
        while self._news:
            try:
                reason, seconds, events, bytes = self._news.popleft()
            except IndexError:  # a call during a garbage collection took it
                return
            total = self._totals.get(reason)
            if total is None:
                total = self._totals.setdefault(reason, Total())
            total.streams += 1
            total.seconds += seconds
            total.events += events
            total.bytes += bytes

    def stop_when(self, stopping: Stopping) -> None:
        """Set the `Stopping` of the whole process."""
        self._stopping = stopping

    def until(self, served: Served) -> float | None:
        """Return the earlier result of the server's `Stopping` and the process's.

        The first result that is not ``None`` sets the server's `since`.
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

    def look(self) -> float | None:
        """Tell the streams of servers that stop; return when to look again.

        ``None`` for not again: there are no streams.
        """
        for key, served in list(self._all.items()):
            if served.count():
                until = self.until(served)
                if until is not None:
                    served.stop(until)
                continue
            # The server may be gone: forget it; the next stream finds it again.
            del self._all[key]
            for name in [n for n, known in self._served.items() if known is served]:
                del self._served[name]
            if served.count():  # a stream was added meanwhile
                self._all[key] = served
        if not self._all:
            self.is_looking = False
            if not self._all:
                return None
            self.is_looking = True
        return on_grid(time.monotonic() + GRID / 2)

    def drain(self) -> None:
        """Wait for finite work whose client has left a server that stops.

        Its server does not wait for it, as it does for what is attached. Then its time
        is over, and sources have theirs to end.
        """
        stopping = []
        for served in list(self._all.values()):
            until = self.until(served)
            if until is not None:
                served.stop(until)
                stopping.append(served)
        while time.monotonic() < self._drained_at():
            _sleep(0.01)
        for served in stopping:
            served.stop_parked(AT_ONCE)
        deadline = time.monotonic() + SOURCES_WAIT
        while time.monotonic() < deadline and any(
            parked.reason is None or parked.is_finishing
            for served in stopping
            for parked in tuple(served.parked)
        ):
            _sleep(0.01)

    def _drained_at(self) -> float:
        """Return when work whose client has left must end; in the past for none."""
        times = [AT_ONCE]
        for served in list(self._all.values()):
            if any(parked.reason is None for parked in tuple(served.parked)):
                until = self.until(served)
                times.append(AT_ONCE if until is None else until)
        return max(times)

    def end(self, limit: float) -> None:
        """Tell all streams to end, and wait for them, at most ``limit`` seconds."""
        self.stop()
        deadline = time.monotonic() + limit
        while self.open_streams and time.monotonic() < deadline:
            _sleep(0.01)

    def leave(self) -> None:
        """Make the calls registered by `at_exit`."""
        while self._last:
            _try(self._last.pop(), "a clean-up at the interpreter's exit failed")

    def stats(self) -> dict[str, Any]:
        with self.lock:
            self._add_up()
            totals = self._totals.copy()
            ended = {reason: total.stats() for reason, total in totals.items()}
        return {"open": self.open_streams, "ended": ended}


processes: dict[object, Process] = {}  # a forked child also has its parents'


def process() -> Process:
    """Return this process's record; a forked child begins with an empty one."""
    key = process_key()
    found = processes.get(key)
    # setdefault: all threads get the same one.
    return found if found is not None else processes.setdefault(key, Process())


def _try(function: Callable[[], object], complaint: str) -> None:
    """Call a function; log its failure, so that others are called."""
    try:
        function()
    except Exception as error:
        # This may be the thread or hub of a watch, which must not wait for the log.
        say(log, logging.ERROR, complaint, error=error)


def _sleep(seconds: float) -> None:
    gevent: Any = sys.modules.get("gevent")
    (gevent or time).sleep(seconds)


def _asked(stopping: Stopping | None) -> float | None:
    """Return the result of a `Stopping`; ``None`` if there is none or it fails."""
    if stopping is None:
        return None
    try:
        return stopping()
    except Exception as error:
        text = "whether the server stops is unknown, so streams may outlive it: %r"
        process().say_once(log, logging.ERROR, text, error)
        return None


def stats() -> dict[str, Any]:
    """Return the counters of this process's streams.

    Returns:
        ``{"open": 3, "ended": {"disconnected": {"streams": 40, "seconds": 512.3,
        "events": 9120, "bytes": 801344}, …}}``: the number of open streams; and for
        each reason of an end, the number of streams, and the sums of their durations,
        of the events (chunks) that they yielded, and of the bytes sent.
    """
    return process().stats()


def _at_exit() -> None:
    record = process()
    if not is_cut_short(record.drain):
        is_cut_short(partial(record.end, EXIT_WAIT))
    record.leave()
    journal().flush()  # lines about these ends
