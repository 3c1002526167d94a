"""``memory:``, the broker for one process: nothing to install, nothing persistent.

Ids are ``<number>-<nonce>`` (see `ids`): the random nonce keeps this broker from taking
the ids of an earlier run for its own.

A finalizer or a signal handler may call it in the middle of a call by the same thread,
whose lock is reentrant. What would change the events then waits until that call is
through, so that each sees whole logs, and ids are stored and told in their order.
"""

from __future__ import annotations

import _thread
import logging
import os
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Literal, TypeVar

from ..errors import Unavailable
from ..runtime.clock import time
from ..runtime.forks import process_key
from ..runtime.living import Living
from ..runtime.process import process
from ..runtime.sockets import native
from .contract import Sink, check_bounds
from .ids import make_id
from .log import Entry, Log, Page
from .watched import Watched

__all__ = ["MemoryBroker"]

log = logging.getLogger("syncstream.hub")

T = TypeVar("T")

# What a broker does while its lock is held: nothing; something during which its logs
# are whole, and remain so; or it changes them.
_IDLE, _STEADY, _CHANGING = range(3)

_SWEEP = 1000  # events published between two searches for outdated channels
_HEADS = 10_000  # the maximum of kept heads of forgotten channels that nobody watches
_UNSEEN = (
    "memory: cannot see the commit of a connection that is not Django's: its events are"
    " sent at once, even if the transaction rolls back (postgresql: waits for every"
    " commit)"
)


class MemoryBroker:
    """Events in this process's memory.

    Args:
        capacity: The maximum of kept events of each channel.
        max_age: Seconds for which events are kept; a channel without events is
            forgotten. ``None`` for no limit.
        max_size: The maximum of bytes that all channels occupy together (an event
            counts as twice its size plus 250 bytes); one channel may occupy an eighth
            of it. Beyond the maximum, the channels with the oldest last event are
            emptied.

    Raises:
        TypeError: ``capacity`` is not an ``int``, or ``max_age`` is not a number.
        ValueError: An argument is not above 0, or is larger than engines can count.
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
        # Reentrant: a garbage collection while it is held may publish.
        self._lock = native(_thread, "RLock")()
        self._state = _IDLE
        self._interrupting: deque[Callable[[], object]] = deque()  # calls that wait
        # In the order of their last events, the oldest first.
        self._logs: OrderedDict[str, Log] = OrderedDict()
        self._size = 0
        self._published = 0
        self._process = process_key()
        # For all channels, so that a forgotten channel never repeats an id.
        self._next = 1
        # The heads of forgotten channels, and the common head of all channels that
        # never had an event: a client with that id has missed nothing. The common head
        # changes after a fork, and when kept heads are dropped.
        self._heads: dict[str, str] = {}
        self._room = _HEADS
        self._empty = _empty()
        self._sink: Sink | None = None
        self.watched = Watched()
        _all.add(self)

    def forked(self) -> None:
        """Begin without events in a forked child if a change may be half done.

        It is if another thread, which the child has not, was in the middle of one.
        """
        if self._lock.acquire(False):
            self._lock.release()
            return
        self._lock = native(_thread, "RLock")()
        self._state = _IDLE
        self._interrupting.clear()
        self._logs, self._size = OrderedDict(), 0

    def publish(
        self, items: Sequence[tuple[str, bytes]], *, connection: Any = None
    ) -> list[str | None]:
        """See `syncstream.brokers.Broker.publish`.

        Args:
            items: The channel and the payload of each event.
            connection: A connection as `PostgreSQLBroker.publish` takes it, to any
                database. With Django's, the events are stored when its transaction
                commits (`transaction.on_commit`), and dropped when it rolls back. Other
                connections do not report their commit: their events are stored at
                once and stay after a rollback. A warning says so, once a process.

        Returns:
            As there; ``None`` for each event, too, from a finalizer or a signal handler
            that interrupts another call: they are stored when that is through.
        """
        if connection is not None:
            _at_commit(connection, partial(self.publish, list(items)))
            return [None] * len(items)
        # The sink is told under the lock, so that it gets the entries in order.
        with self._lock:
            if self._state != _IDLE:
                self._interrupting.append(partial(self._store, tuple(items)))
                return [None] * len(items)
            try:
                return self._store(items)
            finally:
                if self._interrupting:
                    self._catch_up()

    def _store(self, items: Sequence[tuple[str, bytes]]) -> list[str | None]:
        ids: list[str | None] = []
        try:
            self._state = _CHANGING
            now = time.monotonic()
            since, most = self._since(now), self._max_size / 8
            watched, sink = self.watched, self._sink
            self._live_here()
            for channel, payload in items:
                log = self._logs.get(channel)
                if log is None:
                    head = self._heads.pop(channel, self._empty)
                    log = self._logs[channel] = Log(head)
                entry = Entry(self._id(), log.head, payload, now)
                log.append(entry)
                # Each channel has its own bound: a noisy one must not displace all.
                log.trim(self._capacity, since, most)
                self._count(log)
                self._logs.move_to_end(channel)
                while self._size > self._max_size:
                    self._empty_oldest()
                ids.append(entry.id)
                # The first two tests spare most events the call of the third.
                if sink is not None and (
                    channel in watched.names
                    or (watched.patterns and channel in watched)
                ):
                    self._state = _STEADY
                    sink.deliver(channel, entry)
                    self._state = _CHANGING
            self._published += len(items)
            if self._published >= _SWEEP:
                self._published = 0
                self._sweep(now)
        finally:
            self._state = _IDLE
        return ids

    def _catch_up(self) -> None:
        """Make the calls that have interrupted another one, which is through."""
        while self._interrupting:
            try:
                call = self._interrupting.popleft()
            except IndexError:  # one that has come only now has made it
                return
            call()

    def _id(self) -> str:
        id = make_id(self._next)
        self._next += 1
        return id

    def _live_here(self) -> None:
        """Give all events new ids if this process has been forked.

        Parent and children continue the same events differently. With the same ids, a
        client that moves from one process to another would miss events unnoticed.
        """
        if self._process is process_key():
            return
        self._process = process_key()
        self._heads, self._empty = {}, _empty()
        self._size = 0
        for channel, old in self._logs.items():
            log = self._logs[channel] = Log(self._empty)
            for position in range(old.first, old.end):
                entry = old.entry(position)
                log.append(Entry(self._id(), log.head, entry.payload, entry.time))
            self._count(log)

    @property
    def size(self) -> int:
        """The bytes that all events take, as ``max_size`` counts them."""
        return self._size

    @property
    def channels(self) -> set[str]:
        """The channels that have events, or have had some until a moment ago."""
        return set(self._logs)

    def _since(self, now: float) -> float:
        return now - self._max_age if self._max_age is not None else float("-inf")

    def _trim(self, log: Log, now: float, size: float) -> None:
        log.trim(self._capacity, self._since(now), size)
        self._count(log)

    def _count(self, log: Log) -> None:
        """Update the sum after a log's size has changed."""
        self._size += log.size - log.counted
        log.counted = log.size

    def _empty_oldest(self) -> None:
        """Drop the events of the channel whose last event is the oldest."""
        channel, log = self._logs.popitem(last=False)
        self._size -= log.counted
        log.counted = 0
        self._heads[channel] = log.head
        if len(self._heads) > self._room:
            # Keep the heads of watched channels: their subscribers go on from there.
            watched = self.watched.names.difference(self._logs)
            self._heads = {name: self._head(name) for name in watched}
            self._room = _HEADS + 2 * len(self._heads)
            self._empty = _empty()

    def _head(self, channel: str) -> str:
        """Return the head of a channel without events."""
        return self._heads.get(channel, self._empty)

    def _sweep(self, now: float) -> None:
        """Forget the channels, at the front, whose events are all too old."""
        since = self._since(now)
        for _ in range(len(self._logs)):
            log = next(iter(self._logs.values()))
            if len(log) and log.entry(log.end - 1).time >= since:
                return
            self._empty_oldest()

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """See `syncstream.brokers.Broker.read`.

        Raises:
            Unavailable: A finalizer or a signal handler reads, which has interrupted a
                change of the events.
        """

        def page(log: Log | None) -> Page:
            if log is None:
                head = self._head(channel)
                return Page((), after in (None, head), head)
            if after is None:
                return Page((), True, log.head)
            position = log.after(after)
            start = position if position is not None else log.first
            entries = log.read(start, limit)
            follows = entries[0].prev if entries else log.head
            return Page(entries, position is not None and follows == after, log.head)

        return self._look(channel, page)

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Return the id before a channel's newest events, and the head's id.

        Args:
            channel: The channel's name.
            count: The number of newest events; all kept ones if there are fewer.

        Raises:
            Unavailable: As from `read`.
        """

        def ids(log: Log | None) -> tuple[str, str]:
            if log is None or not len(log):
                head = self._head(channel) if log is None else log.head
                return head, head
            return log.entry(max(log.first, log.end - count)).prev, log.head

        return self._look(channel, ids)

    def _look(self, channel: str, find: Callable[[Log | None], T]) -> T:
        """Return what is found in a channel's log, after old events are dropped."""
        with self._lock:
            state = self._state
            if state == _CHANGING:
                raise Unavailable(
                    "memory: cannot be read by a finalizer or a signal handler that has"
                    " interrupted a change of it"
                )
            try:
                if state == _IDLE:
                    self._state = _CHANGING
                    self._live_here()
                    log = self._logs.get(channel)
                    if log is not None:
                        self._trim(log, time.monotonic(), float("inf"))
                    self._state = _STEADY
                return find(self._logs.get(channel))
            finally:
                self._state = state
                if self._interrupting and state == _IDLE:
                    self._catch_up()

    def attach(self, sink: Sink) -> None:
        self._sink = sink

    def watch(self, channel: str) -> None:
        # Under the lock, so that every event published after this is told.
        with self._lock:
            self.watched.add(channel)

    def unwatch(self, channel: str) -> None:
        with self._lock:
            self.watched.discard(channel)

    def close(self, timeout: float = 5.0) -> None:
        with self._lock:
            self._sink = None
            if self._state != _IDLE:
                self._interrupting.append(self._clear)
                return
            self._clear()

    def _clear(self) -> None:
        self._logs.clear()
        self._heads.clear()
        self._size = 0


def _at_commit(connection: Any, publish: Callable[[], object]) -> None:
    """Publish when a connection's transaction commits; now if it reports no commit."""
    if not callable(getattr(connection, "cursor", None)):
        raise TypeError(
            f"connection must be a database connection, got {type(connection)!r}"
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


_all: Living[MemoryBroker] = Living()


def _forked() -> None:
    for broker in _all.all():
        broker.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
