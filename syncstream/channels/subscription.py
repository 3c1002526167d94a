"""`Subscription`: reads channels for one client, from its options to its end."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from typing import Any

from ..brokers.names import includes, is_pattern
from ..errors import Closed, Denied, Unavailable
from ..protocol.json import Dumps
from ..protocol.sse import Event
from ..runtime.clock import time
from ..runtime.waiter import Waiter, Wakeable, wake_all
from ..runtime.waiting import Scope, current_scope
from . import limits
from .authorization import Authorization
from .cursor import Cursor, Item
from .frames import Frames
from .options import ONE_READER, Failed, Options, check_channels
from .patterns import Patterns
from .reading import Reading
from .subscribers import Attendance, Subscribers
from .tags import NO_TAGS, check_tags
from .wire import Ids, decoded, framed, lined

__all__ = ["Subscription"]


class Subscription:
    """The events of one or more channels from a position on; made by `Hub.subscribe`.

    Iterate it, call `read`, or pass it to a response. Its position is fixed, and it
    counts as present, when it is first read. In a response, and as the first one that a
    stream's generator reads, it begins after the client's Last-Event-ID, if there is
    one; a second one in a generator begins where ``after`` says. One thread or greenlet
    reads it.

    Many methods: it has three callers, its reader, the windows, and the loop of
    `fanout`, which reads it without a thread. Each method is short.

    Attributes:
        who: As given to `Hub.subscribe`.
        tags: As given to `Hub.subscribe`.
        reason: The reason of its end, ``None`` while it lives.
        announcement: The data of its "join" and "leave" events; ``None`` without them.
        reading: Its position, ``None`` before it has begun.
        waiter: The waiter that new events wake, ``None`` before the first wait.
        kept: Items read and not given out, in reverse order; ``None`` for none.
    """

    # Thousands may be idle: use `None` instead of empty containers.
    __slots__ = (
        *("__weakref__", "_attendance", "_authorization", "_delivered", "_given"),
        *("_options", "_subscribers", "announcement"),
        *("channels", "has_patterns", "kept", "reader", "reading", "reason", "tags"),
        *("waiter", "who"),
    )

    def __init__(
        self,
        subscribers: Subscribers,
        channels: tuple[str, ...],
        options: Options,
        *,
        tags: Iterable[str],
        who: Any,
        announce: bool,
    ) -> None:
        check_channels(channels)
        options.check_fit(channels)
        self._subscribers = subscribers
        self.channels = channels if len(channels) == 1 else (*dict.fromkeys(channels),)
        self.tags = frozenset(check_tags("tags", tags)) or NO_TAGS
        self.who = who
        self._options = options
        self.announcement: str | None = None
        if announce:
            self.announcement = subscribers.payloads.announcement(who)
        self._authorization: Authorization | None = None
        if options.authorize is not None:
            self._authorization = Authorization(options.authorize, options.recheck)
        self.has_patterns = any(map(is_pattern, self.channels))
        self._given: str | None = None  # the request's Last-Event-ID
        self._attendance: Attendance | None = None  # not begun, or left
        self.reading: Reading | None = None
        self._delivered = 0.0  # the last delivery's time, for ``throttle``
        self.waiter: Wakeable | None = None
        self.kept: list[Item] | None = None
        self.reason: str | None = None
        self.reader: Callable[[], object] | None = None  # the stream that sends it

    # Reading.

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        items = self._rest() or self.await_items(None)[::-1]
        item = items.pop()
        self.kept = items or None
        return decoded(item, self._ids)

    def read(self, timeout: float | None = None) -> list[Event]:
        """Return the waiting events, oldest first; if there are none, wait for some.

        If there are many, it returns a part of them, and the next call continues. If an
        exception interrupts the wait, the subscription stays open.

        Args:
            timeout: The maximum of seconds to wait, ``None`` for no limit; 0 does not
                wait.

        Returns:
            A list of `Event` and `Gap`; empty after a time-out.

        Raises:
            Closed: The subscription has ended.
            ClientDisconnected, GeneratorExit: As from `sleep`, in a stream.
        """
        items = (self.kept and self.take_kept()) or self.await_items(timeout)
        ids = self._ids
        return [decoded(item, ids) for item in items]

    def frames(self, is_events: bool, dumps: Dumps, scope: Scope | None) -> Frames:
        """Return its chunks for a response.

        Args:
            is_events: Encode an event stream; otherwise NDJSON.
            dumps: The JSON encoder for NDJSON.
            scope: The response's stream.
        """
        ids = self._ids
        encode: partial[bytes]
        if is_events:
            encode = partial(framed, ids=ids)
        else:
            encode = partial(lined, ids=ids, dumps=dumps)
        is_shared = is_events and self.is_plain and self._options.recheck is None
        return Frames(self, encode, is_shared, scope)

    @property
    def _is_simple(self) -> bool:
        return len(self.channels) == 1 and not self.has_patterns

    @property
    def _ids(self) -> Ids:
        return None if self._is_simple else self._id_at

    def _id_at(self, cursor: Cursor, id: str) -> str:
        assert self.reading is not None
        return self.reading.id_at(cursor, id)

    def _rest(self) -> list[Item] | None:
        """Return the items read before and not given out, in reverse order."""
        if self.kept:
            self.check_allowed()
        return self.kept if self.reason is None else None

    def take_kept(self) -> list[Item]:
        """Return the items read before and not given out, oldest first."""
        items, self.kept = self._rest(), None
        return [*reversed(items or ())]

    def await_items(self, timeout: float | None, *, once: bool = False) -> list[Item]:
        """Return the waiting items, or wait for some.

        Args:
            timeout: As for `read`.
            once: After one wait, return an empty list instead of waiting again.

        Raises: As `read`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter = self.own_waiter()
        while True:
            # Tested here, not by the methods: this loop runs for every event.
            is_begun = self._attendance is not None
            if is_begun and self._authorization is not None:
                self.check_allowed()
            if self.reason is not None:
                self._check_open()
            pause = 0.0 if self._options.throttle is None else self._pause()
            if not pause:
                try:
                    if not is_begun:
                        self._begin()
                    items = self._take()
                    if self.reason is not None:  # the user's code may have closed it
                        self._check_open()
                except Failed as failed:
                    raise failed.error from None
                except Unavailable:  # it stays, and asks again after a pause
                    items, pause = [], random.uniform(0.5, 1.5) * limits.RETRY
                if items:
                    if self._options.throttle is not None:
                        self._delivered = time.monotonic()
                    windows = self._subscribers.windows
                    with windows.lock:
                        windows.delivered += len(items)
                    return items
                if not pause and not self._register(waiter):
                    continue
            left = self._left(deadline, pause)
            if deadline is not None and time.monotonic() >= deadline:
                self.withdraw()
                return []
            try:
                waiter.wait(left)
            except BaseException:  # such as a time-out: it may be read again
                self.withdraw()
                raise
            if not self._is_simple or left is not None:
                self.withdraw()  # from the channels that did not wake it
            if once:
                return []

    def _take(self) -> list[Item]:
        assert self.reading is not None
        try:
            return self.reading.take()
        except Denied as error:
            # End it: continuing without one of its channels would hide the denial.
            self.close("denied")
            raise Closed("denied") from error

    def _register(self, waiter: Wakeable) -> bool:
        """Have new events wake a waiter; ``False`` if some are waiting already."""
        assert self.reading is not None
        with self._subscribers.windows.lock:
            return self.reason is None and self.reading.register(waiter)

    def _pause(self) -> float:
        """Return the seconds for which ``throttle`` delays the next delivery."""
        if self._options.throttle is None:
            return 0.0
        return max(0.0, self._delivered + self._options.throttle - time.monotonic())

    def _left(self, deadline: float | None, pause: float) -> float | None:
        """Return the seconds until a wait must end, ``None`` for no limit."""
        end = min(self.ask_again_at, math.inf if deadline is None else deadline)
        left = min(end - time.monotonic(), pause or math.inf)
        return None if left == math.inf else max(0.0, left)

    def own_waiter(self) -> Waiter:
        """Return the waiter of this thread or greenlet.

        Raises:
            RuntimeError: A response reads the subscription.
        """
        waiter = self.waiter
        if not isinstance(waiter, Waiter) or not waiter.is_ours():
            self._check_free()
            self.withdraw()
            waiter = self.waiter = Waiter()
        return waiter

    def withdraw(self) -> None:
        """Stop new events from waking the waiter."""
        if self.waiter is not None and self.reading is not None:
            self.reading.withdraw(self.waiter)

    # Its beginning and its end.

    def begin(self) -> None:
        """Fix the position and count as present now, before it is read.

        Raises:
            Closed: The subscription has ended.
            BrokerError: Its position cannot be read.
        """
        self._check_free()
        if not self._is_begun:
            try:
                self._begin(is_owned=True)
            except Failed as failed:
                raise failed.error from None

    @property
    def _is_begun(self) -> bool:
        return self._attendance is not None

    def _begin(self, is_owned: bool = False) -> None:
        """Fix the position; count as present.

        Args:
            is_owned: The caller closes it; otherwise the end of the stream does.
        """
        self._check_open()
        scope = current_scope()
        # Last-Event-ID belongs to the stream's first subscription only.
        if scope is not None and not scope.has_resumed:
            # Kept for later tries if the broker is down, perhaps from other code.
            # An empty id is that of a first connection.
            self._given = scope.last_event_id or None
        subscribers = self._subscribers
        if scope is not None and scope.is_multiprocess:
            subscribers.warn_of_processes()
        reading = self.reading = Reading(
            subscribers.windows,
            subscribers.payloads,
            self._options,
            self.tags,
            Patterns(self.channels) if self.has_patterns else None,
        )
        attendance = subscribers.enter(self)
        try:
            if self.is_nameable:
                attendance.is_listed = True
                subscribers.control.enter(self)
            # Kicks find it from here on: ask after that, to miss no revocation.
            try:
                self.check_allowed()
            except Unavailable as error:
                raise Failed(error) from error
            self._check_open()
            subscribers.hear_presence()
            watch = partial(subscribers.watch, attendance)
            reading.begin(self.channels, self._given, watch)
        except BaseException as error:
            self._leave(attendance)
            if isinstance(error, Denied):
                self.close("denied")
                raise Closed("denied") from error
            raise
        if scope is not None:
            scope.has_resumed = True
        with subscribers.windows.lock:
            if subscribers.windows.is_closed and self.reason is None:
                self.reason = "closed"
            is_open = self.reason is None
            if is_open:  # from here on `close` has it leave
                self._attendance = attendance
        if not is_open:
            self._leave(attendance)
        if self.reason is not None:
            raise Closed(self.reason)
        # A generator that has ended may keep us for long.
        if not is_owned and scope is not None:
            scope.on_close(partial(_close, weakref.ref(self)))
        subscribers.join(self, attendance)

    def _leave(self, attendance: Attendance) -> None:
        self.withdraw()
        self._subscribers.leave(self, attendance)

    def close(self, reason: str = "closed") -> None:
        """End the subscription: its reader gets `Closed`. From any thread.

        Args:
            reason: The ``reason`` of `Closed`, and of the response's end.

        Raises:
            TypeError, ValueError: ``reason`` is not a ``str``, or empty.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be str, got {reason!r}")
        if not reason:
            raise ValueError("reason must be a word, got ''")
        rest = self.part(reason)
        if rest is not None:
            rest()

    def part(self, reason: str) -> Callable[[], None] | None:
        """Do as `close`, without the broker: return its part, ``None`` for nothing."""
        with self._subscribers.windows.lock:
            if self.reason is None:
                self.reason = reason
            attendance, self._attendance = self._attendance, None
            waiter = self.waiter
        if waiter is not None:
            wake_all([waiter])
        if attendance is None:
            return None
        self.withdraw()
        return self._subscribers.part(self, attendance)

    def _check_open(self) -> None:
        if self.reason is not None:
            self.close()  # `end` does not, as it must not wait
            raise Closed(self.reason)

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self.reason is not None

    def __del__(self) -> None:
        # This may run at any moment, under any lock: see `Subscribers.drop`.
        attendance = getattr(self, "_attendance", None)
        if attendance is not None:
            self._attendance = None
            self._subscribers.drop(self, attendance)

    # Authorization.

    def check_allowed(self) -> None:
        """Call ``authorize`` if it is time, and end if it does not answer in time."""
        if self._authorization is not None:
            self._authorization.check(self)

    def ask(self) -> None:
        """Call ``authorize`` now, and end unless it returns true.

        If it raises, the subscription must not be read until another call succeeds.
        """
        assert self._authorization is not None
        self._authorization.ask(self)

    @property
    def ask_again_at(self) -> float:
        """The time of the next call of ``authorize``, `time.monotonic`, or infinity."""
        if self._authorization is None:
            return math.inf
        return self._authorization.ask_again_at

    # A `Subscriber`: called by the hub under its lock, or in a forked child.

    @property
    def is_nameable(self) -> bool:
        """Whether a kick may name it."""
        return self.who is not None or bool(self.tags)

    def hears(self, channel: str) -> bool:
        """Tell whether it is subscribed to a channel."""
        return any(includes(name, channel) for name in self.channels)

    def end(self, reason: str) -> dict[Wakeable, None]:
        """End it without waiting; return the waiters to wake.

        Its reader notices the end, and closes it.
        """
        if self.reason is None:
            self.reason = reason
        return self._woken(True)

    def discover(self, channel: str, prev: str) -> dict[Wakeable, None]:
        """Record new events of a pattern's channel; return the waiters to wake."""
        patterns = self._patterns
        return self._woken(patterns is not None and patterns.discover(channel, prev))

    def overhear(self, channel: str, fields: bytes) -> dict[Wakeable, None]:
        """Record a join or leave of a pattern's channel; return the waiters to wake."""
        patterns = self._patterns
        return self._woken(patterns is not None and patterns.overhear(channel, fields))

    def lose(self, channel: str | None) -> dict[Wakeable, None]:
        """Record that announcements may have been lost; see `Reader.lose`."""
        patterns = self._patterns
        return self._woken(patterns is not None and patterns.lose(channel))

    @property
    def _patterns(self) -> Patterns | None:
        return None if self.reading is None else self.reading.patterns

    def _woken(self, is_news: bool) -> dict[Wakeable, None]:
        return {self.waiter: None} if is_news and self.waiter is not None else {}

    def forget(self) -> None:
        """Begin anew at the present position, in a forked child."""
        if self.reading is not None:
            if self.kept and not self._is_simple:  # their ids need this reading
                last, self.kept = self.reading.sent_id(), None
            else:
                last = self.reading.last_id()
            self._given = self._given if last is None else last
        self.reading = self._attendance = self.waiter = None

    # For `fanout`, which reads it without a thread.

    @property
    def is_plain(self) -> bool:
        """Whether it gets the same bytes as others at its place."""
        return self._is_simple and self._options.is_shareable

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """The key that plain subscriptions share if they may get the same bytes."""
        assert self.reading is not None
        (cursor,) = self.reading.cursors
        return cursor.record, self.tags, self._options.kind

    @property
    def has_user_code(self) -> bool:
        """Whether reading may call a function of the application."""
        return self._options.has_user_code

    @property
    def begins_with_user_code(self) -> bool:
        """Whether beginning may call a function of the application."""
        return self.has_user_code or self._authorization is not None

    def detach(self, waiter: Wakeable | None) -> None:
        """Detach it from the thread that has read it: new events wake this waiter.

        Args:
            waiter: The waiter; ``None`` when it stops reading.

        Raises:
            RuntimeError: Another response reads the subscription.
        """
        if waiter is not None:
            self._check_free()
        self.withdraw()
        self.waiter = waiter

    def _check_free(self) -> None:
        if self.waiter is not None and not isinstance(self.waiter, Waiter):
            raise RuntimeError(ONE_READER)

    def twin(self) -> Subscription:
        """Return a plain subscription at the same place, which does not count."""
        place = self._subscribers, self.channels, self._options.for_group()
        twin = Subscription(*place, tags=self.tags, who=None, announce=False)
        twin.go_where(self)
        twin._attendance = Attendance()  # its end has nothing to undo
        return twin

    def go_where(self, other: Subscription) -> None:
        """Move to the place of another subscription; both are plain."""
        assert other.reading is not None
        self.reading = other.reading.copy(self._options, self.tags)

    def lean_on(self, other: Subscription) -> None:
        """Share another one's place, and names to save memory, until `go_where`."""
        self.withdraw()
        self.reading, self.channels = other.reading, other.channels

    def is_where(self, other: Subscription) -> bool:
        """Tell whether both are at the same place for certain; both are plain."""
        assert self.reading is not None
        assert other.reading is not None
        return self.reading.is_where(other.reading)

    def awaits(self, waiter: Wakeable) -> bool:
        """Have new events wake a waiter; return whether they will.

        It returns ``False`` if events are waiting, or if `step` must be called.
        """
        return self.is_plain and self._is_begun and self._register(waiter)

    def poll(self) -> tuple[bytes, int, bool] | None:
        """Return new events of a plain subscription, without waiting.

        Returns:
            As `Reading.poll`; ``None``: call `step`.
        """
        if self.reading is None or self.reason is not None:
            return None
        assert self.waiter is not None
        return self.reading.poll(self.waiter)

    def step(self) -> tuple[bytes, int, float | None]:
        """Return the waiting events, without waiting for more.

        It may ask the broker, and call the application's functions. It calls
        ``authorize`` only when it begins; later calls are made by `ask`.

        Returns:
            Bytes, the number of their events, and a time. Without bytes, the time says
            when to call again (`time.monotonic`); ``None``: new events wake the waiter.

        Raises:
            Closed: The subscription has ended.
            BrokerError: The broker does not answer.
            Failed: The application has raised `Unavailable`.
        """
        while True:
            self._check_open()
            pause = self._pause()
            if pause:
                return b"", 0, time.monotonic() + pause
            if not self._is_begun:
                self._begin(is_owned=True)
            # Items that were read and not given out come first.
            items = [*reversed(self.kept or ())] or self._take()
            self.kept = None
            if items and self.reason is None:
                if self._options.throttle is not None:
                    self._delivered = time.monotonic()
                ids = self._ids
                return b"".join([framed(item, ids) for item in items]), len(items), None
            waiter = self.waiter  # its end may remove it at any time
            if waiter is None or self._register(waiter):
                return b"", 0, None

    def count(self, events: int) -> None:
        """Count events that were sent to clients at its place."""
        windows = self._subscribers.windows
        with windows.lock:
            windows.delivered += events


def _close(reference: weakref.ref[Subscription]) -> None:
    subscription = reference()
    if subscription is not None:
        subscription.close()
