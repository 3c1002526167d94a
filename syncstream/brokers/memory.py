"""``memory:``, the broker for one process: nothing to install, nothing persistent.

Ids are ``<number>-<nonce>`` in hexadecimal digits; the nonce is one of this broker's
life and the entry's own, so that the ids of an earlier run are not taken for ours.
"""

from __future__ import annotations

import _thread
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Literal

from ..runtime.clock import time
from ..runtime.process import process
from ..runtime.sockets import native
from .contract import Sink, check_bounds
from .ids import make_id
from .log import Entry, Log, Page
from .watched import Watched

__all__ = ["MemoryBroker"]

log = logging.getLogger("syncstream.hub")

_SWEEP = 1000  # publishes between two looks for what is idle
_HEADS = 10_000  # heads of forgotten channels that are kept, and those of watched ones
_UNSEEN = (
    "memory: cannot see when a transaction ends, unless it is Django's: events that are"
    " published with another connection are sent at once, even if that rolls back"
    " (postgresql: waits for every commit)"
)


class MemoryBroker:
    """Events in this process's memory.

    Args:
        capacity: So many events of each channel are kept.
        max_age: Events are kept for so many seconds, and a channel without any is
            forgotten; ``None`` for no limit.
        max_size: So many bytes of memory are kept of all channels together (an event
            takes twice its bytes, and 250), and an eighth of that of each: beyond
            that the channels that were not written to for longest are emptied.

    Raises:
        ValueError: One of them is not above 0, or more than engines can count.
    """

    scope: Literal["process"] = "process"

    def __init__(
        self,
        capacity: int = 1000,
        max_age: float | None = 3600.0,
        max_size: int = 256 << 20,
    ) -> None:
        check_bounds(capacity, max_age)
        if not max_size >= 1:
            raise ValueError(f"max_size must be 1 or more, got {max_size!r}")
        self._capacity = capacity
        self._max_age = max_age
        self._max_size = max_size
        # Reentrant, as all that a garbage collection may enter.
        self._lock = native(_thread, "RLock")()
        # The one first that was not written to for longest.
        self._logs: OrderedDict[str, Log] = OrderedDict()
        self._size = 0
        self._published = 0
        self._pid = os.getpid()
        # Of all channels: one that was forgotten has no id a second time.
        self._next = 1
        # The heads of channels that were forgotten, and that of all that never had an
        # event: who has it has missed nothing. Another one in each life, and when
        # heads are dropped.
        self._heads: dict[str, str] = {}
        self._room = _HEADS
        self._empty = _empty()
        self._sink: Sink | None = None
        self.watched = Watched()

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """See `syncstream.brokers.Broker.publish`.

        Args:
            items: Channel and payload of each.
            connection: Any that `PostgreSQLBroker.publish` takes, to any database.
                With Django's they are stored when its transaction commits, and only
                then (`transaction.on_commit`). Others do not tell when they commit:
                with them events are stored at once, and stay after a rollback, which
                is logged as a warning, once.
        """
        if connection is not None:
            _at_commit(connection, partial(self.publish, list(items)))
            return [None] * len(items)
        ids: list[str | None] = []
        now = time.monotonic()
        # The sink is told under the lock: what it gets is in order.
        with self._lock:
            self._live_here()
            for channel, payload in items:
                log = self._logs.get(channel)
                if log is None:
                    head = self._heads.pop(channel, self._empty)
                    log = self._logs[channel] = Log(head)
                entry = Entry(self._id(), log.head, payload, now)
                before = log.size
                log.append(entry)
                self._size += log.size - before
                # Each has a bound of its own, or a noisy one would be all there is.
                self._trim(log, now, self._max_size / 8)
                self._logs.move_to_end(channel)
                while self._size > self._max_size:
                    self._empty_oldest()
                ids.append(entry.id)
                if self._sink is not None and self.is_watched(channel):
                    self._sink.deliver(channel, entry)
            self._published += len(items)
            if self._published >= _SWEEP:
                self._published = 0
                self._sweep(now)
        return ids

    def _id(self) -> str:
        id = make_id(self._next)
        self._next += 1
        return id

    def _live_here(self) -> None:
        """Begin another life in a process that was forked, with the same events.

        Its siblings have them, too, and go on otherwise: under the same ids one of
        them would take another's for its own, and miss what came there.
        """
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._heads, self._empty = {}, _empty()
        for channel, old in self._logs.items():
            log = self._logs[channel] = Log(self._empty)
            for position in range(old.first, old.end):
                entry = old.entry(position)
                log.append(Entry(self._id(), log.head, entry.payload, entry.time))
        self._size = sum(log.size for log in self._logs.values())

    def is_watched(self, channel: str) -> bool:
        """Tell whether the sink is told of a channel."""
        return channel in self.watched

    def _since(self, now: float) -> float:
        return now - self._max_age if self._max_age is not None else float("-inf")

    def _trim(self, log: Log, now: float, size: float) -> None:
        before = log.size
        log.trim(self._capacity, self._since(now), size)
        self._size += log.size - before

    def _empty_oldest(self) -> None:
        """Drop the events of the channel that was not written to for longest."""
        channel, log = self._logs.popitem(last=False)
        self._size -= log.size
        self._heads[channel] = log.head
        if len(self._heads) > self._room:
            # Who listens knows the head: it must go on from there.
            watched = self.watched.names.difference(self._logs)
            self._heads = {name: self._head(name) for name in watched}
            self._room = _HEADS + 2 * len(self._heads)
            self._empty = _empty()

    def _head(self, channel: str) -> str:
        """Return the head of a channel without events."""
        return self._heads.get(channel, self._empty)

    def _sweep(self, now: float) -> None:
        """Forget channels of which all is too old: those that come first."""
        since = self._since(now)
        for _ in range(len(self._logs)):
            log = next(iter(self._logs.values()))
            if len(log) and log.entry(log.end - 1).time >= since:
                return
            self._empty_oldest()

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        with self._lock:
            self._live_here()
            log = self._logs.get(channel)
            if log is None:
                head = self._head(channel)
                return Page((), after in (None, head), head)
            self._trim(log, time.monotonic(), float("inf"))
            if after is None:
                return Page((), True, log.head)
            position = log.after(after)
            start = position if position is not None else log.first
            entries = log.read(start, limit)
            follows = entries[0].prev if entries else log.head
            return Page(entries, position is not None and follows == after, log.head)

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Return the id before the newest events of a channel, and its head's.

        Args:
            channel: Its name.
            count: Of so many of them, or all that are kept.
        """
        with self._lock:
            self._live_here()
            log = self._logs.get(channel)
            if log is None:
                head = self._head(channel)
                return head, head
            self._trim(log, time.monotonic(), float("inf"))
            if not len(log):
                return log.head, log.head
            return log.entry(max(log.first, log.end - count)).prev, log.head

    def attach(self, sink: Sink) -> None:
        self._sink = sink

    def watch(self, channel: str) -> None:
        # Not while somebody publishes: after it, all is told.
        with self._lock:
            self.watched.add(channel)

    def unwatch(self, channel: str) -> None:
        with self._lock:
            self.watched.discard(channel)

    def close(self, timeout: float = 5.0) -> None:
        with self._lock:
            self._sink = None
            self._logs.clear()
            self._heads.clear()
            self._size = 0


def _at_commit(connection: Any, publish: Callable[[], object]) -> None:
    """Publish when a connection's transaction commits, if it tells that; else now."""
    if not callable(getattr(connection, "cursor", None)):
        raise TypeError(
            f"connection must be a database's connection, got {type(connection)!r}"
        )
    if iscoroutinefunction(getattr(connection, "commit", None)):
        raise TypeError(f"connection must not be async, got {type(connection)!r}")
    if callable(getattr(connection, "on_commit", None)):  # Django's
        connection.on_commit(publish)
        return
    process().warn_once(log, _UNSEEN)
    publish()


def _empty() -> str:
    return make_id(0)
