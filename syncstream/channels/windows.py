"""The newest events of each channel that has subscribers, and the lock over them.

A broker announces new events to the windows (through `sink.HubSink`), and subscriptions
read them. One lock, `Windows.lock`, protects everything. It is never held during a call
of the broker, because brokers call the hub under their own locks. Waiters are woken
after it is released.
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
from .places import InWindow
from .presence import PRESENCE
from .presence import decoded as decoded_presence
from .said import Said

__all__ = ["Channel", "Reader", "Windows"]

log = logging.getLogger("syncstream.hub")


class Channel:
    """A channel that has subscribers, or had some a moment ago.

    Args:
        name: The channel's name.
    """

    __slots__ = (
        *("aside", "counted", "held", "idle_since", "is_doubtful", "is_watched"),
        *("limit", "log", "name", "place", "subscriptions", "tagged", "waiters"),
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.log = Log(UNKNOWN)
        self.counted = 0  # its part of `Budget.size`, in bytes
        # Joins and leaves, until the event before them is known.
        self.held: tuple[bytes, ...] = ()
        self.subscriptions = 0
        self.is_watched = False  # by its name, not only through a pattern
        # The window may lack the channel's newest events, or its head may be unknown:
        # the first reader at its end asks the broker.
        self.is_doubtful = True
        self.limit = limits.READ  # entries to request: fewer if they are large
        self.waiters: dict[Wakeable, None] = {}  # in the order of their arrival
        self.tagged = -1  # the last position of an entry with tags
        self.aside = -1  # the last position of an entry that is set aside
        self.idle_since = time.monotonic()
        self.place = InWindow(0)  # the last reader's, for others at the same

    def begin(self, head: str) -> None:
        """Restart the window after an id, or after `UNKNOWN`."""
        self.log.restart(head)
        if head != UNKNOWN:
            held, self.held = self.held, ()
            for fields in held:
                self.set_aside(fields, time.monotonic())

    def set_aside(self, fields: bytes, now: float) -> None:
        """Add an entry for present subscribers only, see `Log.set_aside`."""
        self.aside = self.log.end
        self.log.set_aside(fields, now)


class Budget:
    """The memory of all windows of a hub, and its bounds; under their lock.

    Args:
        max_age: Seconds for which an entry is kept; may be infinite.

    Attributes:
        filled: The windows that have entries, in the order of their last writes.
        size: The bytes that all entries count for.
    """

    __slots__ = ("_max_age", "filled", "size")

    def __init__(self, max_age: float) -> None:
        self._max_age = max_age
        self.filled: OrderedDict[Channel, None] = OrderedDict()
        self.size = 0

    def count(self, record: Channel) -> None:
        """Update the sum after a window's size has changed."""
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
        """Keep a window that was written to, and all windows, within the bounds."""
        record.log.trim(limits.WINDOW, now - self._max_age, limits.WINDOW_SIZE)
        self.count(record)
        self.filled.move_to_end(record)
        while self.size > limits.BUDGET:
            self.empty(next(iter(self.filled)))

    def empty(self, record: Channel) -> None:
        """Drop a window's entries; readers that need them read the broker."""
        record.log.trim(0, float("-inf"), float("inf"))
        self.count(record)


class Reader(Protocol):
    """A subscription as the windows see it; all calls are made under their lock."""

    channels: tuple[str, ...]
    has_patterns: bool

    def end(self, reason: str) -> dict[Wakeable, None]: ...

    def discover(self, channel: str, prev: str) -> dict[Wakeable, None]: ...

    def overhear(self, channel: str, fields: bytes) -> dict[Wakeable, None]: ...

    def lose(self, channel: str | None) -> dict[Wakeable, None]:
        """Note that announcements may have been lost; return the waiters to wake.

        Args:
            channel: The channel's name, or a pattern for all of its channels; ``None``
                for any channels.
        """


class Windows:
    """The windows of a hub's channels in this process.

    All methods may be called from any thread. It has 25 methods, because one lock
    protects one state: announcements, watched names, and reading.

    Attributes:
        broker: The broker, which stores the events.
        lock: The lock that protects everything here.
        channels: The channels by name.
        patterns: The number of subscriptions to each pattern.
        listeners: The subscriptions to each pattern, by the id of the object.
        open: All subscriptions that count as present, by the id of the object.
        published, delivered: The counts of `Hub.stats`; change them under the lock.
        is_closed: Whether the hub is closed; then the broker's errors are not logged.
    """

    def __init__(self, broker: Broker, max_age: float) -> None:
        self.broker = broker
        self._max_age = max_age
        self.is_closed = False
        self.is_up = True
        self.begin_anew()

    def begin_anew(self) -> None:
        """Forget everything, in a forked child, which has no listener yet."""
        # Reentrant: a garbage collection while it is held may close a subscription.
        self.lock = native(_thread, "RLock")()
        self.channels: dict[str, Channel] = {}
        self.budget = Budget(self._max_age)
        self.patterns: dict[str, int] = {}
        self.listeners: dict[str, dict[int, weakref.ref[Reader]]] = {}
        self.open: dict[int, weakref.ref[Reader]] = {}
        self.published = self.delivered = 0
        self.said = Said()
        # The ids of the last joins and leaves, which are told only once.
        self._told_presence: deque[str] = deque(maxlen=limits.WINDOW)
        self._swept = time.monotonic()
        self._crowd = limits.CROWD  # the number of windows for an early search

    # Announcements.

    def deliver(self, channel: str, entry: Entry) -> None:
        """Take an announced entry, which `log.flaw` has passed."""
        with self.lock:
            record = self.channels.get(channel)
            if record is None:
                if not self._listening(channel):
                    return
                if not is_name(channel):
                    self.say_malformed(channel, "the channel's name is invalid")
                    return
                self._forget_idle(time.monotonic(), is_watched=False)
                record = self.channels[channel] = Channel(channel)
                record.is_doubtful = False  # its listeners begin with this entry
            window = record.log
            head = window.head
            # `chain.follows` inlined: this runs for every event.
            if head != UNKNOWN and entry.prev != head:
                if window.after(entry.id) is not None:
                    return  # announced twice
                window.restart(entry.prev)
                record.is_doubtful = True  # this entry may have come late
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
        """Give a join or leave to the present subscribers of its channel."""
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
                self.say_malformed(PRESENCE, "its channel's name is invalid")
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
        """Have these channels (``None``: all) read, because entries may be lost."""
        waiters: dict[Wakeable, None] = {}
        with self.lock:
            for name in list(self.channels if channels is None else channels):
                record = self.channels.get(name)
                if record is not None:
                    # Readers are outside of the window then, and ask the broker.
                    waiters.update(self._restart(record, UNKNOWN))
                    record.is_doubtful = True
                for reader in self._listening(name):
                    waiters |= reader.lose(name)
            if channels is None:  # perhaps also of channels that are unknown here
                for listeners in self.listeners.values():
                    for reader in _alive(listeners):
                        waiters |= reader.lose(None)
        wake_all(waiters)

    def state(self, is_up: bool, reason: str) -> None:
        """Log once that the broker went down, or is back."""
        if is_up != self.is_up:
            self.is_up = is_up
            state = "back" if is_up else "down"
            say(log, logging.WARNING, "the broker is %s: %s", state, reason)

    def deny(self, name: str, reason: str) -> None:
        """End the subscriptions to a name to which the engine denies access."""
        text = "the engine denies access to %r, so its subscribers are ended: %s"
        self.said.once(name, logging.ERROR, text, name, reason)
        self._end_named(name, "denied")

    def _end_named(self, name: str, reason: str) -> None:
        """End the subscriptions to a name, without waiting."""
        waiters: dict[Wakeable, None] = {}
        with self.lock:
            record = self.channels.get(name)
            if record is not None:  # the next subscription asks the broker again
                record.is_watched, record.is_doubtful = False, True
            for reader in _alive(self.open):
                if name in reader.channels:
                    waiters |= reader.end(reason)
        wake_all(waiters)

    def _listening(self, channel: str) -> list[Reader]:
        """Return the readers whose patterns match a channel, perhaps with repeats."""
        found: list[Reader] = []
        for pattern in patterns_of(channel):
            listeners = self.listeners.get(pattern)
            if listeners:
                found += _alive(listeners)
        return found

    def _restart(self, record: Channel, head: str) -> dict[Wakeable, None]:
        """Restart a window after an id, under the lock; return the waiters to wake."""
        record.begin(head)
        self.budget.count(record)
        waiters, record.waiters = record.waiters, {}
        return waiters

    def say_malformed(self, channel: str, problem: str) -> None:
        """Log that an announced or stored entry cannot be an event of a hub."""
        text = "an entry of %r is not an event of a hub, and is skipped: %s"
        self.said.once(channel, logging.ERROR, text, channel, problem)

    def say_unreadable(self, name: str, error: BrokerError) -> None:
        """Log that a name cannot be read although the broker is up."""
        if self.is_up and not self.is_closed:
            text = "%r cannot be read: %s"
            self.said.once(name, logging.ERROR, text, name, error)

    # Subscriptions.

    def enter(self, reader: Reader) -> None:
        """Count a subscription as present."""
        with self.lock:
            reference = self.open[id(reader)] = weakref.ref(reader)
            for name in reader.channels if reader.has_patterns else ():
                if is_pattern(name):
                    listeners = self.listeners.setdefault(name, {})
                    listeners[id(reader)] = reference

    def leave(self, reader: Reader) -> None:
        """Stop counting it; without the lock, as a garbage collection may call this."""
        self.open.pop(id(reader), None)
        if reader.has_patterns:
            for name in reader.channels:
                self.listeners.get(name, {}).pop(id(reader), None)

    def read(self, channel: str, after: str | None, limit: int = 1000) -> Page:
        """Read a page from the broker.

        Raises:
            Closed: The hub is closed, perhaps since the call.
            Denied: The engine denies access to this name; its subscriptions have ended.
            BrokerError: The broker does not answer.
        """
        try:
            page = self.broker.read(channel, after, limit)
        except BrokerError as error:
            self._ask_why(channel, error)
            raise
        if after == page.head:  # nothing follows the newest event, even a removed one
            return Page((), True, page.head)
        return page

    def newest(self, channel: str, count: int) -> tuple[str, str] | None:
        """Return the id before the newest ``count`` events, and the head's id.

        Returns:
            ``None`` if the broker has no such method, so that all events must be read.

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
        """Handle an error that a broker has raised about a name."""
        if self.is_closed:
            raise Closed("closed") from None
        if isinstance(error, Denied):
            self.deny(name, str(error))
        else:
            self.say_unreadable(name, error)

    def settle(self, record: Channel, head: str, end: int) -> None:
        """Compare a doubtful window with the channel, unless it has changed meanwhile.

        Args:
            record: The window.
            head: The channel's head, as read from the broker.
            end: The window's end before that read.
        """
        with self.lock:
            if record.log.end == end:
                record.is_doubtful = False
                if record.log.head != head:
                    wake_all(self._restart(record, head))

    def record(self, name: str) -> Channel:
        """Return a channel's window; make it if it is missing. Under the lock."""
        record = self.channels.get(name)
        if record is None:
            record = self.channels[name] = Channel(name)
        return record

    def watch(self, name: str) -> Channel | None:
        """Have the broker announce a channel, or the channels that match a pattern.

        Returns:
            The channel's window; ``None`` for a pattern.

        Raises:
            Unavailable: The broker does not answer.
            Denied: The engine denies access to this name; its subscriptions have ended.
        """
        record = None
        with self.lock:
            if is_pattern(name):
                self.patterns[name] = self.patterns.get(name, 0) + 1
            else:
                record = self.record(name)
                record.subscriptions += 1
                self.budget.trim(record, time.monotonic())
        # Another thread may be about to do the same: doing it twice does no harm.
        if record is None or not record.is_watched:
            try:
                self.broker.watch(name)
            except Denied as error:
                self.deny(name, str(error))
                raise
            if record is not None:
                with self.lock:
                    # The window may be old: filled through a pattern that has ended.
                    record.is_doubtful = record.is_watched = True
        return record

    def unwatch(self, name: str) -> None:
        """Undo one `watch`; the broker is told later, together with idle names."""
        self.tell_idle(self.release(name))

    def release(self, name: str) -> list[str]:
        """Undo one `watch` without the broker; return the names for `tell_idle`."""
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
                    record.held = ()  # no subscriber is left
            idle += self._forget_idle(now)
        return idle

    def tell_idle(self, names: Iterable[str]) -> None:
        """Tell the broker that no announcements of these names are needed."""
        for name in names:
            try:
                self.broker.unwatch(name)
            except BrokerError as error:  # unneeded announcements do no harm
                say(log, logging.WARNING, "%r could not be unwatched: %s", name, error)
            # A subscription may have come meanwhile; its watch was before this unwatch.
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
        except Exception as error:  # its subscriptions rely on the watch
            text = "%r cannot be watched, so its subscribers are ended and reconnect"
            say(log, logging.ERROR, text, name, error=error)
            self._end_named(name, "closed")
        self.resync([name])

    def _forget_idle(self, now: float, is_watched: bool = True) -> list[str]:
        """Drop idle windows, under the lock; return the names that were watched.

        These are windows without subscribers for a long time, and the oldest ones if
        there are many.

        Args:
            now: The present `time.monotonic`.
            is_watched: Also drop windows whose names are watched.
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
            self.budget.empty(record)  # a subscription to a pattern may still have it
        count = len(self.channels)
        self._crowd = count + max(limits.CROWD, count // 2)
        return [name for name, record in dropped if record.is_watched]


def _alive(readers: dict[int, weakref.ref[Reader]]) -> list[Reader]:
    found = [reference() for reference in list(readers.values())]
    return [reader for reader in found if reader is not None]
