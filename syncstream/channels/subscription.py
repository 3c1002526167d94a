"""`Subscription`: reads channels for one client, from its options to its end."""

from __future__ import annotations

import math
import random
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from ..brokers.names import is_pattern, matches
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
from .options import Options, check_channels
from .patterns import Patterns
from .reading import Reading
from .subscribers import Attendance, Subscribers
from .tags import NO_TAGS, check_tags
from .wire import Ids, decoded, framed, lined

__all__ = ["Subscription"]


class Subscription:
    """The events of one channel or several, from a position on; from `Hub.subscribe`.

    Iterate it; or `read` what is there; or give it to a response. Its position is
    fixed, and it counts as present, when it is first read. In a response, and as the
    first that a stream's generator reads, it begins after the client's Last-Event-ID,
    if there is one; a second one in a generator begins where ``after`` says. One
    thread or greenlet reads it.

    Many methods: three sides meet here, and each is passed on in a few lines: what its
    reader calls, what `fanout` calls in place of a reader (a `Reading` answers both),
    and what the windows tell it.

    Attributes:
        who: As given to `Hub.subscribe`.
        tags: As given to `Hub.subscribe`.
        reason: Why it has ended, ``None`` while it lives.
        announcement: The data of the events that tell who comes and goes; ``None``:
            nobody is told.
        reading: Its position; ``None`` before it has begun.
        waiter: What new events wake; ``None``: nobody has waited yet.
        kept: Read, and not given out; the next is the last. ``None``: nothing is.
    """

    # There may be many thousands, idle: nothing empty is kept where `None` does.
    __slots__ = (
        *("__weakref__", "_attendance", "_authorization", "_delivered", "_given"),
        *("_is_simple", "_options", "_subscribers", "_windows", "announcement"),
        *("channels", "has_patterns", "kept", "reading", "reason", "tags", "waiter"),
        "who",
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
        self._windows = subscribers.windows
        is_one = len(channels) == 1
        self.channels = channels if is_one else tuple(dict.fromkeys(channels))
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
        self._is_simple = len(self.channels) == 1 and not self.has_patterns
        self._given: str | None = None  # the request's Last-Event-ID
        # `None`: it is not present, for it has not begun, or has left.
        self._attendance: Attendance | None = None
        self.reading: Reading | None = None
        self._delivered = 0.0
        self.waiter: Wakeable | None = None
        self.kept: list[Item] | None = None
        self.reason: str | None = None

    # To read.

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        items = self._rest() or self.await_items(None)[::-1]
        item = items.pop()
        self.kept = items or None
        return decoded(item, self._ids)

    def read(self, timeout: float | None = None) -> list[Event]:
        """Return what is there, oldest first; wait for it if there is nothing.

        Or a part of it, if it is much: the next one goes on. What breaks a wait off
        leaves it open.

        Args:
            timeout: Seconds to wait, ``None`` for no limit; 0 not at all.

        Returns:
            Events, and `Gap`; empty when the time is over.

        Raises:
            Closed: The subscription has ended.
            ClientDisconnected, GeneratorExit: As from `sleep`, in a stream.
        """
        items = self.take_kept() or self.await_items(timeout)
        ids = self._ids
        return [decoded(item, ids) for item in items]

    def frames(self, is_events: bool, dumps: Dumps, scope: Scope | None) -> Frames:
        """Return its chunks for a response, whose stream is the scope.

        Args:
            is_events: As an event stream; else as NDJSON.
            dumps: Encodes the lines of NDJSON.
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
    def _ids(self) -> Ids:
        return None if self._is_simple else self._id_at

    def _id_at(self, cursor: Cursor, id: str) -> str:
        assert self.reading is not None
        return self.reading.id_at(cursor, id)

    def _rest(self) -> list[Item] | None:
        """Return what was read before and not given out; the next is the last."""
        if self.kept:
            self.check_allowed()
        return self.kept if self.reason is None else None

    def take_kept(self) -> list[Item]:
        """Return what was read before and not given out, oldest first."""
        items, self.kept = self._rest(), None
        return [*reversed(items or ())]

    def await_items(self, timeout: float | None, *, once: bool = False) -> list[Item]:
        """Return what is there, or wait for it.

        Args:
            timeout: As for `read`.
            once: Return nothing rather than wait a second time.

        Raises: As `read`.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter = self.own_waiter()
        while True:
            if self._is_begun:
                self.check_allowed()
            self._check_open()
            pause = self._pause()
            if not pause:
                try:
                    if not self._is_begun:
                        self._begin()
                    items = self._take()
                    self._check_open()  # while code of the user's ran
                except Unavailable:
                    # Who is there stays, and asks again.
                    items, pause = [], random.uniform(0.5, 1.5) * limits.RETRY
                if items:
                    self._delivered = time.monotonic()
                    self.count(len(items))
                    return items
                if not pause and not self._register(waiter):
                    continue
            left = self._left(deadline, pause)
            if deadline is not None and time.monotonic() >= deadline:
                self.withdraw()
                return []
            try:
                waiter.wait(left)
            except BaseException:  # a time-out's, say: it may be read again
                self.withdraw()
                raise
            if not self._is_simple or left is not None:
                self.withdraw()  # from those that did not wake it
            if once:
                return []

    def _take(self) -> list[Item]:
        assert self.reading is not None
        try:
            return self.reading.take()
        except Denied as error:
            # All of it ends: to go on without one of its channels is to be silent
            # about that.
            self.close("denied")
            raise Closed("denied") from error

    def _register(self, waiter: Wakeable) -> bool:
        """Have a waiter woken by what is new; ``False`` if something is there."""
        assert self.reading is not None
        with self._windows.lock:
            return self.reason is None and self.reading.register(waiter)

    def _pause(self) -> float:
        """Return for how long `throttle` holds it back."""
        if self._options.throttle is None:
            return 0.0
        return max(0.0, self._delivered + self._options.throttle - time.monotonic())

    def _left(self, deadline: float | None, pause: float) -> float | None:
        """Return the seconds after which a wait ends by itself, ``None`` for never."""
        now = time.monotonic()
        ends = [self.ask_again_at - now]
        if deadline is not None:
            ends.append(deadline - now)
        if pause:
            ends.append(pause)
        left = min(ends)
        return None if left == math.inf else max(0.0, left)

    def own_waiter(self) -> Waiter:
        """Return the waiter of the thread or greenlet that runs here.

        Raises:
            RuntimeError: Another reads it.
        """
        waiter = self.waiter
        if not isinstance(waiter, Waiter) or not waiter.is_ours():
            self._check_attached()
            self.withdraw()
            waiter = self.waiter = Waiter()
        return waiter

    def withdraw(self) -> None:
        """Have the waiter woken by nothing more."""
        if self.waiter is not None and self.reading is not None:
            self.reading.withdraw(self.waiter)

    # Its beginning and its end.

    def begin(self) -> None:
        """Fix the position and count as present now, before it is read.

        Raises:
            Closed: The subscription has ended.
            BrokerError: Its position cannot be read.
        """
        self._check_attached()
        if not self._is_begun:
            self._begin(is_owned=True)

    @property
    def _is_begun(self) -> bool:
        return self._attendance is not None

    def _begin(self, is_owned: bool = False) -> None:
        """Fix the position; count as present.

        Args:
            is_owned: Whoever has begun it closes it, too.
        """
        self._check_open()
        scope = current_scope()
        # It is what the first one in a stream has sent: of others it says nothing.
        if scope is not None and not scope.has_resumed:
            # Kept: where the broker is down, it is tried again, maybe elsewhere.
            # An empty one is a first connection's.
            self._given = scope.last_event_id or None
        subscribers = self._subscribers
        if scope is not None and scope.is_multiprocess:
            subscribers.warn_of_processes()
        reading = self.reading = Reading(
            self._windows,
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
            # From here on a kick finds it: what changes after a yes does not escape.
            self.check_allowed()
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
        with self._windows.lock:
            if self._windows.is_closed and self.reason is None:
                self.reason = "closed"
            if self.reason is None:
                attendance.announced = self._announced()
                self._attendance = attendance
        if self.reason is not None:
            self._leave(attendance)
            raise Closed(self.reason)
        # A generator that ends may be long in letting go of us.
        if not is_owned and scope is not None:
            scope.on_close(partial(_close, weakref.ref(self)))
        subscribers.announce(attendance.announced, self.announcement, "join")

    def _announced(self) -> Sequence[str]:
        """Return the channels that are told who comes and goes."""
        if self.announcement is None:
            return ()
        if not self.has_patterns:
            return self.channels
        return [name for name in self.channels if not is_pattern(name)]

    def _leave(self, attendance: Attendance) -> None:
        self.withdraw()
        self._subscribers.leave(self, attendance)

    def close(self, reason: str = "closed") -> None:
        """End it; whoever reads it gets `Closed`. From any thread.

        Args:
            reason: The ``reason`` of that, and of the response's end.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be str, got {reason!r}")
        if not reason:
            raise ValueError("reason must not be empty")
        with self._windows.lock:
            if self.reason is None:
                self.reason = reason
            attendance, self._attendance = self._attendance, None
            waiter = self.waiter
        if waiter is not None:
            wake_all([waiter])
        if attendance is not None:
            self._leave(attendance)

    def _check_open(self) -> None:
        if self.reason is not None:
            self.close()  # who has ended it may not have waited for that: see `end`
            raise Closed(self.reason)

    @property
    def is_closed(self) -> bool:
        """Whether it has ended."""
        return self.reason is not None

    def __del__(self) -> None:
        # Maybe in the midst of anything: see `Subscribers.drop`.
        attendance = getattr(self, "_attendance", None)
        if attendance is not None:
            self._attendance = None
            self._subscribers.drop(self, attendance)

    # Whether it may be read.

    def check_allowed(self) -> None:
        """Ask `authorize` here if it is time; end where it does not answer in time."""
        if self._authorization is not None:
            self._authorization.check(self)

    def ask(self) -> None:
        """Ask `authorize` whether it may go on.

        If that raises, who asks may not read, and it is asked again.
        """
        assert self._authorization is not None
        self._authorization.ask(self)

    @property
    def ask_again_at(self) -> float:
        """When `authorize` is to be asked again, `time.monotonic`; maybe never."""
        if self._authorization is None:
            return math.inf
        return self._authorization.ask_again_at

    # What the hub tells, under its lock, or in a forked child: a `Subscriber`.

    @property
    def is_nameable(self) -> bool:
        """A kick may name it."""
        return self.who is not None or bool(self.tags)

    def hears(self, channel: str) -> bool:
        """Tell whether it is subscribed to a channel."""
        return any(
            matches(name, channel) if is_pattern(name) else name == channel
            for name in self.channels
        )

    def end(self, reason: str) -> dict[Wakeable, None]:
        """End it, and wait for nobody; return whom to wake.

        Whoever reads it finds that, and closes it.
        """
        if self.reason is None:
            self.reason = reason
        return self._woken(True)

    def discover(self, channel: str, prev: str) -> dict[Wakeable, None]:
        """Take note that a pattern's channel has something new; return whom to wake."""
        patterns = self._patterns
        return self._woken(patterns is not None and patterns.discover(channel, prev))

    def overhear(self, channel: str, fields: bytes) -> dict[Wakeable, None]:
        """Take note of who came to a channel, or went; return whom to wake."""
        patterns = self._patterns
        return self._woken(patterns is not None and patterns.overhear(channel, fields))

    def lose(self, channel: str | None) -> dict[Wakeable, None]:
        """Take note that a channel may have had events; return whom to wake.

        Args:
            channel: Its name, or a pattern for all of its channels; ``None`` for some
                that nobody has heard of.
        """
        patterns = self._patterns
        return self._woken(patterns is not None and patterns.lose(channel))

    @property
    def _patterns(self) -> Patterns | None:
        return None if self.reading is None else self.reading.patterns

    def _woken(self, is_news: bool) -> dict[Wakeable, None]:
        return {self.waiter: None} if is_news and self.waiter is not None else {}

    def forget(self) -> None:
        """Begin anew where it is: it is a forked child's copy."""
        if self.reading is not None:
            last = self.reading.last_id()
            self._given = self._given if last is None else last
        self.reading = self._attendance = self.waiter = None

    # Without a thread of its own: for `fanout`.

    @property
    def is_plain(self) -> bool:
        """What it gets are the bytes that others at its place get."""
        return self._is_simple and self._options.is_shareable

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What plain ones have in common that may be sent the same bytes."""
        assert self.reading is not None
        (cursor,) = self.reading.cursors
        return cursor.record, self.tags, self._options.kind

    @property
    def has_user_code(self) -> bool:
        """To read it may call what the application has given."""
        return self._options.has_user_code

    @property
    def begins_with_user_code(self) -> bool:
        """To begin it may call what the application has given."""
        return self.has_user_code or self._authorization is not None

    def detach(self, waiter: Wakeable | None) -> None:
        """Have this woken by what is new, in place of the thread that has read it.

        Args:
            waiter: ``None``: that does not read it any more.

        Raises:
            RuntimeError: Another has it.
        """
        if waiter is not None:
            self._check_attached()
        self.withdraw()
        self.waiter = waiter

    def _check_attached(self) -> None:
        if self.waiter is not None and not isinstance(self.waiter, Waiter):
            raise RuntimeError(
                "a subscription is one reader's: make one for each response"
            )

    def twin(self) -> Subscription:
        """Return one at the same place that nobody counts, of a plain one."""
        twin = Subscription(
            self._subscribers,
            self.channels,
            self._options.for_group(),
            tags=self.tags,
            who=None,
            announce=False,
        )
        twin.go_where(self)
        twin._attendance = Attendance()  # nothing is to be undone
        return twin

    def go_where(self, other: Subscription) -> None:
        """Take the place of another; of plain ones."""
        assert other.reading is not None
        self.reading = other.reading.copy(self._options, self.tags)

    def lean_on(self, other: Subscription) -> None:
        """Be where another is, and not be woken, until it is told to `go_where`."""
        self.withdraw()
        self.reading, self.channels = other.reading, other.channels

    def is_where(self, other: Subscription) -> bool:
        """Tell whether both are at one place for certain; of plain ones."""
        assert self.reading is not None
        assert other.reading is not None
        return self.reading.is_where(other.reading)

    def awaits(self, waiter: Wakeable) -> bool:
        """Have the waiter woken by what is new, of a plain one; tell whether it will.

        ``False``: something is there, or it has to be asked for by `step`.
        """
        return self.is_plain and self._is_begun and self._register(waiter)

    def poll(self) -> tuple[bytes, int, bool] | None:
        """Return what is new, without waiting, of a plain one.

        Returns:
            As `Reading.poll`; ``None``: ask `step`.
        """
        if self.reading is None or self.reason is not None:
            return None
        assert self.waiter is not None
        return self.reading.poll(self.waiter)

    def step(self) -> tuple[bytes, int, float | None]:
        """Return what is there, without waiting for it.

        It may ask the broker, and call what `Hub.subscribe` was given, but for
        `authorize`: that is asked beside it, see `ask`.

        Returns:
            Bytes, and how many events they are. No bytes: when to come again
            (`time.monotonic`), or ``None``: its waiter will be woken, if it has one.

        Raises:
            Closed: The subscription has ended.
            BrokerError: The broker cannot be asked.
        """
        while True:
            self._check_open()
            pause = self._pause()
            if pause:
                return b"", 0, time.monotonic() + pause
            if not self._is_begun:
                self._begin(is_owned=True)
            # What was read and not given out, by whoever began with it, comes first.
            items = [*reversed(self.kept or ())] or self._take()
            self.kept = None
            if items and self.reason is None:
                self._delivered = time.monotonic()
                ids = self._ids
                return b"".join([framed(item, ids) for item in items]), len(items), None
            waiter = self.waiter  # at its end it has none, at any time
            if waiter is None or self._register(waiter):
                return b"", 0, None

    def count(self, events: int) -> None:
        """Count what was sent to those who are at its place."""
        self._windows.delivered += events


def _close(reference: weakref.ref[Subscription]) -> None:
    subscription = reference()
    if subscription is not None:
        subscription.close()
