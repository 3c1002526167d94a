"""`LocalBroker`: the methods that a hub calls."""

from __future__ import annotations

import _thread
import logging
import os
from typing import Any, Literal, TypeVar

from ...errors import PayloadTooLarge, Unavailable
from ...runtime.sockets import native
from ...runtime.waiting import LONGEST
from ..contract import Sink, check_bounds, refuse_connection
from ..health import Health
from ..log import Page
from ..process import PerProcess
from ..watched import Watched
from .database import Bounds, Items
from .files import path_of
from .process import Process, paused, processes, spoilt

__all__ = ["LocalBroker"]

log = logging.getLogger("syncstream.brokers.local")
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
        self.path, self._is_private = path_of(url)
        self._bounds: Bounds = capacity, max_age, max_size
        self._timeout = (
            None if publish_timeout is None else min(publish_timeout, LONGEST)
        )
        self.health = Health(log)
        self.watched = Watched()
        self._is_closed = False
        self._is_heir = False
        self._is_spoilt = False
        # Reentrant, as all that a garbage collection may enter.
        self._lock = native(_thread, "RLock")()
        self._parts = PerProcess(self, Process.drop, LocalBroker._leave_to_parent)

    def _leave_to_parent(self, parents: Process | None) -> None:
        """Let go of what is the parent's; in the child, where no thread goes on."""
        self._is_heir = bool(self.watched)
        self._lock = native(_thread, "RLock")()
        if parents is None:
            return
        parents.let_go()
        if parents.has_files:
            self._is_spoilt = True
            spoilt.append(parents)  # a garbage collection would close them

    def _own(self) -> Process:
        """Return this process's part; begun by its first use."""
        with self._lock:
            if self._is_closed:
                raise Unavailable("local: is closed")
            process = self._parts.get()
            if self._is_spoilt:
                raise Unavailable(
                    f"{self.path} was in use when this process was forked by what does"
                    " not say so: use it only after that (uWSGI: lazy-apps, or"
                    " @postfork)"
                )
            if process is None:
                with _forking:  # not between a fork's beginning and the fork
                    process = self._parts.begin(Process(self))
            return process

    @property
    def process(self) -> Process | None:
        """This process's part, if it has begun."""
        return self._parts.get()

    def publish(self, items: Items, *, connection: Any = None) -> list[str | None]:
        refuse_connection("local", connection)
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
        self.health.sink = sink

    def watch(self, channel: str) -> None:
        # First: what is stored from now on is looked at with this in mind.
        self.watched.add(channel)
        if self._is_closed:
            return  # and there will be nothing to tell
        try:
            self._own().listen()
        except BaseException:
            self.unwatch(channel)
            if not self._is_closed:
                raise

    def unwatch(self, channel: str) -> None:
        self.watched.discard(channel)

    def _go_on(self, process: Process) -> None:
        """Listen in a forked child, too, if its parent did."""
        if self.watched and not process.is_listening:
            process.listen()

    def close(self, timeout: float = 5.0) -> None:
        with self._lock:
            process = self._parts.end()
            self._is_closed = True
            self.health.sink = None
        if process is not None:
            process.close(timeout)

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


_forking = native(_thread, "RLock")()  # one at a time


def _forks() -> None:
    _forking.acquire()
    for process in list(processes):  # of brokers that were dropped, too
        if process.pid == os.getpid():
            paused.append(process)
            process.pause()


def _has_forked() -> None:
    while paused:
        paused.pop().resume()
    _forking.release()


def _forked() -> None:
    global _forking
    _forking = native(_thread, "RLock")()
    paused.clear()
    for process in list(processes):  # of brokers that were just being dropped, too
        if process.pid != os.getpid():
            process.let_go()
            if process.has_files:
                spoilt.append(process)


# In the child at once, not at the next use: who has a lock's or a socket's descriptor,
# too, keeps it held, or open, when its parent is killed.
os.register_at_fork(before=_forks, after_in_parent=_has_forked, after_in_child=_forked)
