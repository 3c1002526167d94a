"""The newest events of each channel that has subscribers, and the lock over them.

A broker tells the windows what is new (through `sink.Sink`), subscriptions read
them. All of it under one lock, `Windows.lock`, which is never held while the broker is
called: brokers call the hub under locks of their own. Waiters are woken after it.
"""

from __future__ import annotations

import _thread
import logging
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Protocol

from ..brokers.contract import Broker
from ..brokers.log import UNKNOWN, Entry, Log, Page
from ..brokers.names import is_name, is_pattern, patterns_of
from ..errors import BrokerError, Closed, Denied
from ..runtime.clock import time
from ..runtime.sockets import native
from ..runtime.waiter import Wakeable, wake_all
from ..runtime.waiting import say
from . import limits
from .chain import follows
from .places import InWindow
from .presence import PRESENCE
from .presence import decoded as decoded_presence
from .said import Said

__all__ = ["Channel", "Reader", "Windows"]

log = logging.getLogger("syncstream.hub")


class Channel:
    """A channel that has, or had a moment ago, subscribers."""

    __slots__ = (
        *("_place", "aside", "counted", "held", "idle_since", "is_doubtful"),
        *("is_watched", "limit", "log", "subscriptions", "tagged", "waiters"),
    )

    def __init__(self) -> None:
        self.log = Log(UNKNOWN)
        self.counted = 0  # bytes of it that are in `Budget.size`
        # Fields of who came and went, until it is known after which event.
        self.held: tuple[bytes, ...] = ()
        self.subscriptions = 0
        self.is_watched = False  # by its name: the broker tells of it
        # Its head may be older than the channel's, or not known at all: the first to
        # come to its end asks the broker.
        self.is_doubtful = True
        self.limit = limits.READ  # what to ask the broker for: fewer, if they are large
        self.waiters: dict[Wakeable, None] = {}  # in the order in which they came
        self.tagged = -1  # the last position whose entry is not for everybody
        self.aside = -1  # the last one whose entry is set aside
        self.idle_since = time.monotonic()
        self._place = InWindow(0)  # where the last reader has come to

    def place_at(self, position: int) -> InWindow:
        """Return a place in the window; all who come to its end have the same one."""
        place = self._place
        if place.position != position:
            place = self._place = InWindow(position)
        return place

    def begin(self, head: str) -> None:
        """Let the window begin anew after an id, or `UNKNOWN`."""
        self.log.restart(head)
        if head != UNKNOWN:
            held, self.held = self.held, ()
            for fields in held:
                self.set_aside(fields, time.monotonic())

    def set_aside(self, fields: bytes, now: float) -> None:
        """Add what is told to those who are here, and to nobody who comes later."""
        self.aside = self.log.end
        self.log.set_aside(fields, now)


class Budget:
    """What the windows of a hub hold together, and its bounds; under their lock.

    Args:
        max_age: Seconds that an entry is kept; maybe infinite.

    Attributes:
        filled: Those that hold something, the one first that was not written to for
            longest.
        size: Bytes that they count for.
    """

    __slots__ = ("_max_age", "filled", "size")

    def __init__(self, max_age: float) -> None:
        self._max_age = max_age
        self.filled: OrderedDict[Channel, None] = OrderedDict()
        self.size = 0

    def count(self, record: Channel) -> None:
        """Take note of a window's size, after any change of it."""
        size = record.log.size
        if size and not record.counted:
            self.filled[record] = None
        elif record.counted and not size:
            del self.filled[record]
        self.size += size - record.counted
        record.counted = size

    def trim(self, record: Channel, now: float) -> None:
        """Keep a window within its bounds."""
        record.log.trim(limits.WINDOW, now - self._max_age, limits.WINDOW_SIZE)
        self.count(record)

    def spend(self, record: Channel, now: float) -> None:
        """Keep a window that was just written to within its bounds, and all of them."""
        record.log.trim(limits.WINDOW, now - self._max_age, limits.WINDOW_SIZE)
        self.count(record)
        self.filled.move_to_end(record)
        while self.size > limits.BUDGET:
            self.empty(next(iter(self.filled)))

    def empty(self, record: Channel) -> None:
        """Drop a window's entries; who is behind reads them from the broker."""
        record.log.trim(0, float("-inf"), float("inf"))
        self.count(record)


class Reader(Protocol):
    """A subscription, as far as the windows know it; all calls under their lock."""

    channels: tuple[str, ...]
    has_patterns: bool

    def end(self, reason: str) -> dict[Wakeable, None]: ...

    def discover(self, channel: str, prev: str) -> dict[Wakeable, None]: ...

    def overhear(self, channel: str, fields: bytes) -> dict[Wakeable, None]: ...

    def lose(self, channel: str | None) -> dict[Wakeable, None]: ...


class Windows:
    """A hub's channels, as far as this process knows them.

    Its methods may be called from any thread. 24 methods, for it is one state under
    one lock: what the broker tells, what is watched for whom, and what was read.

    Attributes:
        broker: What stores the events.
        lock: Over all of it.
        channels: By name.
        patterns: How many subscriptions have each.
        listeners: Subscriptions by their patterns, by the number of the object.
        open: All subscriptions that count as present, by the same.
        published, delivered: Events since the process began, for `Hub.stats`.
        is_closed: Nothing is to be said of the broker any more.
    """

    def __init__(self, broker: Broker, max_age: float) -> None:
        self.broker = broker
        self._max_age = max_age
        self.is_closed = False
        self.is_up = True
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget all; in a forked child, where nobody listens for it any more."""
        # Reentrant: a garbage collection in here may close a subscription.
        self.lock = native(_thread, "RLock")()
        self.channels: dict[str, Channel] = {}
        self.budget = Budget(self._max_age)
        self.patterns: dict[str, int] = {}
        self.listeners: dict[str, dict[int, weakref.ref[Reader]]] = {}
        self.open: dict[int, weakref.ref[Reader]] = {}
        self.published = self.delivered = 0
        self.said = Said()
        self._told_presence: deque[str] = deque(maxlen=limits.WINDOW)  # ids: not twice
        self._swept = time.monotonic()
        self._crowd = limits.CROWD  # so many windows are looked through at once

    # What the broker tells.

    def deliver(self, channel: str, entry: Entry) -> None:
        """Take an entry of a channel, in which `log.flaw` has found none."""
        with self.lock:
            record = self.channels.get(channel)
            if record is None:
                if not self._listening(channel):
                    return
                if not is_name(channel):
                    self.say_malformed(channel, "it is in no channel of ours")
                    return
                self._forget_idle(time.monotonic(), is_watched=False)
                record = self.channels[channel] = Channel()
                record.is_doubtful = False  # to who listens from now on
            window = record.log
            if window.head != UNKNOWN and not follows(entry, window.head):
                if window.after(entry.id) is not None:
                    return  # told twice
                window.restart(entry.prev)
                record.is_doubtful = True  # it may have come late
            if record.held:
                record.begin(entry.prev)
            window.append(entry)
            if entry.payload[:1] == b"\0":
                record.tagged = window.end - 1
            self.budget.spend(record, entry.time)
            waiters, record.waiters = record.waiters, {}
            if self.listeners:
                if not record.is_watched:
                    record.idle_since = time.monotonic()
                for reader in self._listening(channel):
                    waiters |= reader.discover(channel, entry.prev)
        if waiters:
            wake_all(waiters)

    def tell_presence(self, entry: Entry) -> None:
        """Give who came or went to those who are there."""
        waiters: dict[Wakeable, None] = {}
        with self.lock:
            if entry.id in self._told_presence:
                return
            self._told_presence.append(entry.id)
            try:
                channel, fields = decoded_presence(entry)
            except ValueError as error:
                self.say_malformed(PRESENCE, str(error))
                return
            if not is_name(channel):
                self.say_malformed(PRESENCE, "it tells of no channel of ours")
                return
            record = self.channels.get(channel)
            if record is not None and record.subscriptions:
                if record.log.head != UNKNOWN:
                    record.set_aside(fields, entry.time)
                    self.budget.spend(record, entry.time)
                else:
                    record.held = (*record.held, fields)[-limits.WINDOW :]
                waiters, record.waiters = record.waiters, {}
            for reader in dict.fromkeys(self._listening(channel)):
                waiters |= reader.overhear(channel, fields)
        wake_all(waiters)

    def resync(self, channels: Iterable[str] | None) -> None:
        """Have these channels read again (``None``: all): some may be lost."""
        waiters: dict[Wakeable, None] = {}
        with self.lock:
            for name in list(self.channels if channels is None else channels):
                record = self.channels.get(name)
                if record is not None:
                    # Readers find themselves outside of it, and ask the broker.
                    waiters.update(self._restart(record, UNKNOWN))
                    record.is_doubtful = True
                for reader in self._listening(name):
                    waiters |= reader.lose(name)
            if channels is None:  # maybe of channels that nobody has heard of
                for listeners in self.listeners.values():
                    for reader in _alive(listeners):
                        waiters |= reader.lose(None)
        wake_all(waiters)

    def state(self, is_up: bool, reason: str) -> None:
        """Take note that the broker can be reached, or cannot."""
        if is_up != self.is_up:
            self.is_up = is_up
            state = "back" if is_up else "down"
            say(log, logging.WARNING, "the broker is %s: %s", state, reason)

    def deny(self, name: str, reason: str) -> None:
        """End those who subscribe to a name that the engine refuses."""
        text = "the engine refuses %r, whose subscribers are denied: %s"
        self.said.once(name, logging.ERROR, text, name, reason)
        self._end_named(name, "denied")

    def _end_named(self, name: str, reason: str) -> None:
        """End those who subscribe to a name, without waiting for anybody."""
        waiters: dict[Wakeable, None] = {}
        with self.lock:
            record = self.channels.get(name)
            if record is not None:  # who comes now has the broker asked again
                record.is_watched, record.is_doubtful = False, True
            for reader in _alive(self.open):
                if name in reader.channels:
                    waiters |= reader.end(reason)
        wake_all(waiters)

    def _listening(self, channel: str) -> list[Reader]:
        """Return those that have patterns of a channel; maybe one several times."""
        found: list[Reader] = []
        for pattern in patterns_of(channel):
            listeners = self.listeners.get(pattern)
            if listeners:
                found += _alive(listeners)
        return found

    def _restart(self, record: Channel, head: str) -> dict[Wakeable, None]:
        """Let a window begin anew after an id, under the lock; return whom to wake."""
        record.begin(head)
        self.budget.count(record)
        waiters, record.waiters = record.waiters, {}
        return waiters

    def say_malformed(self, channel: str, problem: str) -> None:
        """Say that what the broker has told, or read, is none of ours."""
        text = "something in %r is no event, and dropped: %s"
        self.said.once(channel, logging.ERROR, text, channel, problem)

    def say_unreadable(self, name: str, error: BrokerError) -> None:
        """Say that a name cannot be read where others can: nobody else would."""
        if self.is_up and not self.is_closed:
            text = "%r cannot be read: %s"
            self.said.once(name, logging.ERROR, text, name, error)

    # For subscriptions.

    def enter(self, reader: Reader) -> None:
        """Count a subscription as present."""
        with self.lock:
            reference = self.open[id(reader)] = weakref.ref(reader)
            for name in reader.channels if reader.has_patterns else ():
                if is_pattern(name):
                    listeners = self.listeners.setdefault(name, {})
                    listeners[id(reader)] = reference

    def leave(self, reader: Reader) -> None:
        """Count it no more. Takes no lock: a garbage collection may call it."""
        self.open.pop(id(reader), None)
        if reader.has_patterns:
            for name in reader.channels:
                self.listeners.get(name, {}).pop(id(reader), None)

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """Read from the broker, unless the hub is closed.

        Raises:
            Closed: It is, maybe since the broker was asked.
            Denied: The engine refuses this name; all who subscribe to it have ended.
            BrokerError: The broker does not answer.
        """
        try:
            page = self.broker.read(channel, after, limit)
        except BrokerError as error:
            self._ask_why(channel, error)
            raise
        if after == page.head:  # nothing follows the newest, though it was removed
            return Page((), True, page.head)
        return page

    def newest(self, channel: str, count: int) -> tuple[str, str] | None:
        """Return the ids before so many of the newest events, and of the head.

        Returns:
            ``None`` from a broker that cannot tell: all is to be read.

        Raises:
            Closed, Denied, BrokerError: As from `read`.
        """
        newest = getattr(self.broker, "newest", None)
        if not callable(newest):
            return None
        try:
            found: tuple[str, str] = newest(channel, count)
            return found
        except BrokerError as error:
            self._ask_why(channel, error)
            raise

    def _ask_why(self, name: str, error: BrokerError) -> None:
        """Take note of what a broker has raised of a name."""
        if self.is_closed:
            raise Closed("closed") from None
        if isinstance(error, Denied):
            self.deny(name, str(error))
        else:
            self.say_unreadable(name, error)

    def settle(self, record: Channel, head: str, end: int) -> None:
        """Put an end to a window's doubts, if it is as it was.

        Args:
            head: The channel's, as the broker has read it.
            end: The window's, before the broker was asked.
        """
        with self.lock:
            if record.log.end == end:
                record.is_doubtful = False
                if record.log.head != head:
                    wake_all(self._restart(record, head))

    def record(self, name: str) -> Channel:
        """Return a channel's window, maybe a new one."""
        with self.lock:
            return self.channels.setdefault(name, Channel())

    def watch(self, name: str) -> Channel | None:
        """Have the broker tell of a channel, or of those that match a pattern.

        Returns:
            The channel's window; ``None`` for a pattern.

        Raises:
            Unavailable: The broker does not answer.
            Denied: The engine refuses this name; all who subscribe to it have ended.
        """
        record = None
        with self.lock:
            if is_pattern(name):
                self.patterns[name] = self.patterns.get(name, 0) + 1
            else:
                record = self.channels.setdefault(name, Channel())
                record.subscriptions += 1
                self.budget.trim(record, time.monotonic())
        # Others may have come first, and not be done: it is done twice, then.
        if record is None or not record.is_watched:
            try:
                self.broker.watch(name)
            except Denied as error:
                self.deny(name, str(error))
                raise
            if record is not None:
                with self.lock:
                    # A pattern may have brought it, and have gone since.
                    record.is_doubtful = record.is_watched = True
        return record

    def unwatch(self, name: str) -> None:
        """Take back one `watch`; the broker is told later, with what is idle."""
        now = time.monotonic()
        idle: list[str] = []
        with self.lock:
            if is_pattern(name):
                self.patterns[name] -= 1
                if not self.patterns[name]:
                    del self.patterns[name]
                    if not self.listeners.get(name, True):
                        del self.listeners[name]
                    idle.append(name)
            else:
                record = self.channels[name]
                record.subscriptions -= 1
                record.idle_since = now
                if not record.subscriptions:
                    record.held = ()  # nobody is there any more
            idle += self._forget_idle(now)
        for name in idle:
            try:
                self.broker.unwatch(name)
            except BrokerError as error:  # it goes on to tell what nobody wants
                say(log, logging.WARNING, "%r could not be unwatched: %s", name, error)
            # Somebody may have come in between, and have it watched before this.
            with self.lock:
                found = self.channels.get(name)
                is_back = name in self.patterns or (
                    found is not None and found.subscriptions > 0
                )
            if is_back:
                self._watch_again(name)

    def _watch_again(self, name: str) -> None:
        try:
            self.broker.watch(name)
        except Exception as error:  # they have it watched, as they believe
            text = "%r cannot be watched, and its subscribers are ended"
            say(log, logging.ERROR, text, name, error=error)
            self._end_named(name, "closed")
        self.resync([name])

    def _forget_idle(self, now: float, is_watched: bool = True) -> list[str]:
        """Drop windows that nobody wants, under the lock; return the watched ones'.

        Those that nobody has wanted for long, and the oldest where they are many.

        Args:
            is_watched: Those that the broker tells of by their names, too.
        """
        if now - self._swept < limits.IDLE / 4 and len(self.channels) < self._crowd:
            return []
        self._swept = now
        idle = [
            (name, record)
            for name, record in self.channels.items()
            if not record.subscriptions and (is_watched or not record.is_watched)
        ]
        idle.sort(key=lambda pair: pair[1].idle_since)
        surplus = len(idle) - limits.MOST_IDLE
        dropped = [
            (name, record)
            for place, (name, record) in enumerate(idle)
            if place < surplus or now - record.idle_since > limits.IDLE
        ]
        for name, record in dropped:
            del self.channels[name]
            self.budget.empty(record)  # a pattern's subscription may hold it
        count = len(self.channels)
        self._crowd = count + max(limits.CROWD, count // 2)
        return [name for name, record in dropped if record.is_watched]


def _alive(readers: dict[int, weakref.ref[Reader]]) -> list[Reader]:
    found = [reference() for reference in list(readers.values())]
    return [reader for reader in found if reader is not None]
