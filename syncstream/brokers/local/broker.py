"""`LocalBroker`: the methods that a hub calls."""

from __future__ import annotations

import _thread
import logging
import os
from typing import Any, Literal, TypeVar

from ...errors import PayloadTooLarge, Unavailable
from ...runtime.forks import process_key
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

    It opens no file and starts no thread before its first use. It is as durable as
    SQLite's ``synchronous=NORMAL``: published events survive killed processes; a power
    cut may lose the last moments.

    Args:
        url: ``local:``, or ``local:NAME`` to separate applications: a folder of this
            user in the temporary directory. ``local:/PATH``: that folder, which is
            made, but not its parent. Its rights are its owner's responsibility.
        capacity: The maximum of kept events of each channel.
        max_age: Seconds for which events are kept; ``None`` for no limit.
        max_size: The maximum size of the file in bytes, roughly; beyond it the oldest
            events of all channels are removed.
        publish_timeout: Seconds after which a publish or read gives up; ``None`` for no
            limit.

    Raises:
        TypeError, ValueError: The URL, its path or another argument is wrong.
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
        # Reentrant: a garbage collection while it is held may take it.
        self._lock = native(_thread, "RLock")()
        self._parts = PerProcess(self, Process.drop, LocalBroker._leave_to_parent)

    def _leave_to_parent(self, parents: Process | None) -> None:
        """Release the parent's part, in a forked child, which has no threads of it."""
        self._is_heir = bool(self.watched)
        self._lock = native(_thread, "RLock")()
        if parents is None:
            return
        parents.let_go()
        if parents.has_files:
            self._is_spoilt = True
            spoilt.append(parents)  # keep it: a garbage collection would close files

    def _own(self) -> Process:
        """Return this process's part, and make it at its first use.

        Raises:
            Unavailable: The broker is closed, or unusable after a fork.
        """
        with self._lock:
            if self._is_closed:
                raise Unavailable("local: is closed")
            process = self._parts.get()
            if self._is_spoilt:
                raise Unavailable(
                    f"{self.path} was in use when this process was forked without"
                    " Python's knowledge: use the hub only after the fork (uWSGI:"
                    " lazy-apps, or @postfork)"
                )
            if process is None:
                with _forking:  # not while a fork is being prepared
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
            channel.encode()  # raise here for names that SQLite does not accept
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
        """Return the id before a channel's newest events, and the head's id.

        The events themselves are not read.

        Args:
            channel: The channel's name.
            count: The number of newest events; all kept ones if there are fewer.

        Raises:
            Unavailable: As from `read`.
        """
        process = self._own()
        self._go_on(process)
        return process.edge(channel, count)

    def attach(self, sink: Sink) -> None:
        self.health.sink = sink

    def watch(self, channel: str) -> None:
        # First, so that every event stored from now on is announced.
        self.watched.add(channel)
        if self._is_closed:
            return  # nothing will be announced any more
        try:
            self._own().listen()
        except BaseException:
            self.unwatch(channel)
            if not self._is_closed:
                raise

    def unwatch(self, channel: str) -> None:
        self.watched.discard(channel)

    def _go_on(self, process: Process) -> None:
        """Listen in a forked child if its parent did."""
        if self.watched and not process.is_listening:
            process.listen()

    def close(self, timeout: float = 5.0) -> None:
        with self._lock:
            process = self._parts.end()
            self._is_closed = True
            self.health.sink = None
        if process is not None:
            process.close(timeout)

    # For this process's part.

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
        """Whether the parent has listened: events since the fork were not announced."""
        return self._is_heir


_forking = native(_thread, "RLock")()  # held from a fork's preparation to its end


def _forks() -> None:
    _forking.acquire()
    for process in processes.all():  # including those of dropped brokers
        if process.key is process_key():
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
    for process in processes.all():  # including those of dropped brokers
        if process.key is not process_key():
            process.let_go()
            if process.has_files:
                spoilt.append(process)


# In the child at once, not at its next use: a child with copies of descriptors would
# keep locks held and sockets open after its parent was killed.
os.register_at_fork(before=_forks, after_in_parent=_has_forked, after_in_child=_forked)
