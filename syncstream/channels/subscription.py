"""`Subscription`: reads channels for one client, from its options to its end."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
import weakref
from collections.abc import (
    Awaitable,
    Callable,
    Coroutine,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from ..brokers.log import JOIN, Entry
from ..brokers.names import is_pattern, matches
from ..errors import (
    Closed,
    Denied,
    Unavailable,
)
from ..protocol import sse
from ..protocol.json import Dumps
from ..protocol.sse import Event
from ..runtime.clock import time
from ..runtime.waiter import Waiter, Wakeable, wake_all
from ..runtime.waiting import Scope, current_scope, say
from ..runtime.watch import Watch, elsewhere, watch
from . import limits
from .cursor import (
    MAX_ID,
    OUTSIDE,
    Brought,
    Cursor,
    Item,
    composite,
    hash_of,
    is_id,
    overheard_item,
)
from .gap import Gap
from .options import Options, check_channels
from .pages import Pages
from .subscribers import Subscribers
from .tags import NO_TAGS, check_tags
from .windows import Channel

__all__ = ["Subscription", "decoder_of"]

log = logging.getLogger("syncstream.hub")


class Subscription:
    """The events of one channel or several, from a position on; from `Hub.subscribe`.

    Iterate it; or `read` what is there; or give it to a response. Its position is
    fixed, and it counts as present, when it is first read. In a response, and as the
    first that a stream's generator reads, it begins after the client's Last-Event-ID,
    if there is one; a second one in a generator begins where ``after`` says. One
    thread or greenlet reads it.

    More than 25 methods, for it has three sides on one state: what its reader calls,
    what `fanout` calls in place of a reader, and what the windows tell it.

    Attributes:
        who: As given to `Hub.subscribe`.
        tags: As given to `Hub.subscribe`.
    """

    # There may be many thousands, idle: nothing empty is kept where `None` does.
    __slots__ = (
        *("__weakref__", "_asked", "_brought", "_delivered", "_given", "_is_begun"),
        *("_is_listed", "_is_simple", "_items", "_lost", "_named", "_options"),
        *("_reason", "_turn", "_waiter", "_watched", "announcement", "channels"),
        *("has_patterns", "subscribers", "tags", "who", "windows"),
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
        self.subscribers = subscribers
        self.windows = subscribers.windows
        is_one = len(channels) == 1
        self.channels = channels if is_one else tuple(dict.fromkeys(channels))
        self.tags = frozenset(check_tags("tags", tags)) or NO_TAGS
        self.who = who
        self._options = options
        self.announcement: str | None = None
        if announce:
            self.announcement = subscribers.payloads.announcement(who)
        self._asked = 0.0
        self._delivered = 0.0
        self._named: tuple[Cursor, ...] = ()  # of the channels, in their order
        self._turn = 0  # which of them comes first, when there is much
        self._brought: Brought | None = None  # of patterns
        self._waiter: Wakeable | None = None
        # Read, and not given out; the next is the last.
        self._items: list[Item] | None = None
        self._is_begun = False
        self._is_listed = False  # kicks are listened for, for its sake
        self._watched = 0  # so many of its channels, the first ones
        self._lost: list[str] | None = None  # patterns: what of them, nobody knows
        self._reason: str | None = None
        self._given: str | None = None  # the request's Last-Event-ID
        self.has_patterns = any(map(is_pattern, self.channels))
        self._is_simple = len(self.channels) == 1 and not self.has_patterns

    # To read.

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        items = self._rest() or self._wait(None)[::-1]
        item = items.pop()
        self._items = items or None
        return self._decoded(item)

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
        items = self._rest()
        items = items[::-1] if items else self._wait(timeout)
        self._items = None
        return [self._decoded(item) for item in items]

    def _rest(self) -> list[Item] | None:
        """Return what was read before and not given out, the next at its end."""
        if self._items:
            self.check_allowed()
        return self._kept()

    def _kept(self) -> list[Item] | None:
        if self._items and self._reason is not None:
            self._items = None
        return self._items

    def frames(self, is_events: bool, dumps: Dumps, scope: Scope | None) -> Frames:
        """Return its chunks for a response, whose stream is the scope."""
        is_shared = (
            is_events
            and self._is_simple
            and self._options.is_shareable
            and self._options.recheck is None
        )
        encode = self._frame if is_events else self._line(dumps)
        return Frames(self, encode, is_shared, scope)

    def _own_waiter(self) -> Waiter:
        waiter = self._waiter
        if not isinstance(waiter, Waiter) or not waiter.is_ours():
            self._check_attached()
            self.withdraw()
            waiter = self._waiter = Waiter()
        return waiter

    def withdraw(self) -> None:
        """Have the waiter woken by nothing more."""
        waiter = self._waiter
        if waiter is None:
            return
        with self.windows.lock:
            for cursor in self._named:
                cursor.record.waiters.pop(waiter, None)

    def close(self, reason: str = "closed") -> None:
        """End it; whoever reads it gets `Closed`. From any thread.

        Args:
            reason: The ``reason`` of that, and of the response's end.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be str, got {reason!r}")
        if not reason:
            raise ValueError("reason must not be empty")
        with self.windows.lock:
            if self._reason is None:
                self._reason = reason
            was_begun, self._is_begun = self._is_begun, False
            waiter = self._waiter
        if waiter is not None:
            wake_all([waiter])
        if was_begun:
            self._leave()

    def end(self, reason: str) -> dict[Wakeable, None]:
        """End it; return whom to wake. By the hub, under its lock: it waits for nobody.

        Whoever reads it finds that, and closes it.
        """
        if self._reason is None:
            self._reason = reason
        return {} if self._waiter is None else {self._waiter: None}

    def _end_if_denied(self, error: BaseException) -> None:
        # All of it: to go on without one of its channels is to be silent about that.
        if isinstance(error, Denied):
            self.close("denied")
            raise Closed("denied") from error

    def _check_open(self) -> None:
        if self._reason is not None:
            self.close()  # who has ended it may not have waited for that: see `end`
            raise Closed(self._reason)

    def forget(self) -> None:
        """Begin anew where it is: it is a forked child's copy."""
        named = self._named
        if self._is_simple and named:
            self._given = named[0].last
        elif named:
            self._given = composite([c.name for c in named], [c.last for c in named])
        self._is_begun = self._is_listed = False
        self._named, self._brought, self._waiter, self._watched = (), None, None, 0

    def __del__(self) -> None:
        # Maybe in the midst of anything: see `Subscribers.drop`.
        if getattr(self, "_is_begun", False):
            self._is_begun = False
            watched = self.channels[: self._watched]
            self.subscribers.drop(self, watched, self._announced(), self._is_listed)

    @property
    def is_nameable(self) -> bool:
        """A kick may name it."""
        return self.who is not None or bool(self.tags)

    @property
    def is_closed(self) -> bool:
        return self._reason is not None

    @property
    def reason(self) -> str | None:
        """Why it has ended, ``None`` while it lives."""
        return self._reason

    # Without a thread of its own: for `fanout`.

    @property
    def is_plain(self) -> bool:
        """What it gets are the bytes that others at its place get."""
        return self._is_simple and self._options.is_shareable

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What plain ones have in common that may be sent the same bytes."""
        (cursor,) = self._named
        return cursor.record, self.tags, self._options.kind

    @property
    def has_user_code(self) -> bool:
        """To read it may call what the application has given."""
        return self._options.has_user_code

    @property
    def begins_with_user_code(self) -> bool:
        """To begin it may call what the application has given."""
        return self.has_user_code or self._options.authorize is not None

    @property
    def ask_again_at(self) -> float:
        """When `authorize` is to be asked again, `time.monotonic`; maybe never."""
        if self._options.recheck is None:
            return math.inf
        return self._asked + self._options.recheck

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
        self._waiter = waiter

    def _check_attached(self) -> None:
        if self._waiter is not None and not isinstance(self._waiter, Waiter):
            raise RuntimeError(
                "a subscription is one reader's: make one for each response"
            )

    def twin(self) -> Subscription:
        """Return one at the same place that nobody counts, of a plain one."""
        twin = Subscription(
            self.subscribers,
            self.channels,
            self._options.of_a_twin(),
            tags=self.tags,
            who=None,
            announce=False,
        )
        twin.go_where(self)
        twin._is_begun = True
        return twin

    def go_where(self, other: Subscription) -> None:
        """Take the place of another; of plain ones."""
        (cursor,) = other._named
        self._named = (replace(cursor),)

    def lean_on(self, other: Subscription) -> None:
        """Have no place of its own, nor be woken, until it is told to `go_where`."""
        self.withdraw()
        self._named, self.channels = (), other.channels  # one object for all

    def is_where(self, other: Subscription) -> bool:
        """Tell whether both are at one place for certain; of plain ones."""
        (mine,), (theirs,) = self._named, other._named
        return (
            mine.record is theirs.record
            and OUTSIDE != mine.position == theirs.position
            and not (mine.is_late() or theirs.is_late())
        )

    def awaits(self, waiter: Wakeable) -> bool:
        """Have the waiter woken by what is new, of a plain one; tell whether it will.

        ``False``: something is there, or it has to be asked for by `step`.
        """
        return self.is_plain and self._is_begun and self._register(waiter)

    def poll(self) -> tuple[bytes, int] | None:
        """Return what is new, without waiting, of a plain one.

        Returns:
            Bytes, which others share, and how many events they are. No bytes: there
            is nothing, and its waiter will be woken. ``None``: ask `step`.
        """
        if not self._is_begun:
            return None
        (cursor,) = self._named
        record = cursor.record
        window = record.log
        with self.windows.lock:
            if not cursor.find() or self._reason is not None:
                return None
            while cursor.position < window.end:
                position = cursor.position
                if record.tagged >= position or cursor.is_late():
                    entries, end = cursor.read(limits.READ)
                    ours = [e.wire for e in entries if self._is_for_us(e)]
                    chunk, count = b"".join(ours), len(ours)
                else:
                    end, chunk = window.joined(position)
                    count = end - position
                cursor.advance(end)
                if count:
                    return chunk, count
            if record.is_doubtful:
                return None
            assert self._waiter is not None
            record.waiters[self._waiter] = None
            return b"", 0

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
            items = [*reversed(self._kept() or ())] or self._take()
            self._items = None
            if items and self._reason is None:
                self._delivered = time.monotonic()
                return b"".join(map(self._frame, items)), len(items), None
            waiter = self._waiter  # at its end it has none, at any time
            if waiter is None or self._register(waiter):
                return b"", 0, None

    def count(self, events: int) -> None:
        """Count what was sent to those who are at its place."""
        self.windows.delivered += events

    def hears(self, channel: str) -> bool:
        """Tell whether it is subscribed to a channel."""
        return any(
            matches(name, channel) if is_pattern(name) else name == channel
            for name in self.channels
        )

    def discover(self, channel: str, prev: str) -> dict[Wakeable, None]:
        """Take note that a pattern's channel has something new; return whom to wake.

        By the hub, under its lock.
        """
        brought = self._brought
        if brought is None or channel in self.channels:
            return {}
        is_first = not brought.news
        brought.news.setdefault(channel, prev)
        return {self._waiter: None} if is_first and self._waiter is not None else {}

    def overhear(self, channel: str, fields: bytes) -> dict[Wakeable, None]:
        """Take note of who came to a pattern's channel, or went; return whom to wake.

        By the hub, under its lock.
        """
        brought = self._brought
        if brought is None or channel in self.channels:
            return {}
        brought.overheard.append((channel, fields))
        return {} if self._waiter is None else {self._waiter: None}

    def lose(self, channel: str | None) -> dict[Wakeable, None]:
        """Take note that a channel may have had events; return whom to wake.

        By the hub, under its lock.

        Args:
            channel: Its name, or a pattern for all of its channels; ``None`` for some
                that nobody has heard of.
        """
        brought = self._brought
        is_named = channel is not None and not is_pattern(channel)
        if brought is None or (is_named and channel in self.channels):
            return {}
        if channel is not None and is_named:
            cursor = brought.cursors.get(channel)
            if cursor is not None:
                return self.discover(channel, cursor.last)
            if channel in brought.news:
                return {}
        lost = [
            name
            for name in self.channels
            if is_pattern(name)
            and (channel in (None, name) or (is_named and matches(name, str(channel))))
        ]
        known = self._lost = self._lost or []
        known += [name for name in lost if name not in known]
        return {} if self._waiter is None else {self._waiter: None}

    # Its position.

    def begin(self) -> None:
        """Fix the position and count as present now, before it is read.

        Raises:
            Closed: The subscription has ended.
            BrokerError: Its position cannot be read.
        """
        self._check_attached()
        if not self._is_begun:
            self._begin(is_owned=True)

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
        if scope is not None and scope.is_multiprocess:
            self.subscribers.warn_of_processes()
        self._named, self._turn, self._lost = (), 0, None
        self._brought = Brought() if self.has_patterns else None
        self.subscribers.enter(self)
        try:
            if self.is_nameable:
                self._is_listed = True
                self.subscribers.control.enter(self)
            # From here on a kick finds it: what changes after a yes does not escape.
            self.check_allowed()
            self._check_open()
            self.subscribers.hear_presence()
            self._begin_channels(self._given)
        except BaseException as error:
            self._leave(has_joined=False)
            self._end_if_denied(error)
            raise
        if scope is not None:
            scope.has_resumed = True
        with self.windows.lock:
            if self.windows.is_closed and self._reason is None:
                self._reason = "closed"
            self._is_begun = self._reason is None
        if self._reason is not None:
            self._leave(has_joined=False)
            raise Closed(self._reason)
        # A generator that ends may be long in letting go of us.
        if not is_owned and scope is not None:
            scope.on_close(partial(_close, weakref.ref(self)))
        self.subscribers.announce(self._announced(), self.announcement, "join")

    def _begin_channels(self, given: str | None) -> None:
        places = self._places(given)
        after = self._options.after
        if places is None and isinstance(after, str) and after not in ("now", "start"):
            places = self._places(after)
        named: list[Cursor] = []
        for name in self.channels:
            self._watched += 1
            record = self.windows.watch(name)
            if record is not None:
                since = record.log.end
                cursor = self._cursor(name, record, places)
                cursor.since = since
                named.append(cursor)
            elif given is not None:
                # No broker can tell which channels there have been since.
                self._lost = [*(self._lost or ()), name]
        self._named = tuple(named)

    def _places(self, given: str | None) -> dict[str, str] | None:
        """Return the id of each channel in a Last-Event-ID; ``None`` without one."""
        if given is None:
            return None
        if self._is_simple and "." not in given:
            return {self.channels[0]: given}
        hashes = {hash_of(name): name for name in self.channels}
        places = {}
        for part in given[:MAX_ID].split(","):
            short, _, id = part.partition(".")
            if short in hashes:
                places[hashes[short]] = id
        return places

    def _cursor(
        self, name: str, record: Channel, places: dict[str, str] | None
    ) -> Cursor:
        if places is not None:
            # Whatever it says, it comes from outside.
            id = places.get(name, "")
            return Cursor(name, record, id if is_id(id) else "")
        if self._options.after == "now":
            head = self.windows.read(name, None).head
            return Cursor(name, record, head, is_begun=True)
        count = self._options.after if isinstance(self._options.after, int) else None
        last, head = self._pages().oldest(name, count)
        return Cursor(name, record, last, start=head)

    # To take what is there.

    def _wait(self, timeout: float | None, once: bool = False) -> list[Item]:
        """Return what is there, or wait for it.

        Args:
            timeout: As for `read`.
            once: Return nothing rather than wait a second time.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        waiter = self._own_waiter()
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
                    self.windows.delivered += len(items)
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

    def _pause(self) -> float:
        """Return for how long `throttle` holds it back."""
        if self._options.throttle is None:
            return 0.0
        return max(0.0, self._delivered + self._options.throttle - time.monotonic())

    def _left(self, deadline: float | None, pause: float) -> float | None:
        ends = []
        now = time.monotonic()
        if deadline is not None:
            ends.append(deadline - now)
        if pause:
            ends.append(pause)
        if self._options.recheck is not None:
            ends.append(self.ask_again_at - now)
        return max(0.0, min(ends)) if ends else None

    def _register(self, waiter: Wakeable) -> bool:
        """Have the waiter woken by what is new; ``False`` if something is there."""
        with self.windows.lock:
            if self._lost or self._reason is not None:
                return False
            if self._brought is not None and (
                self._brought.news or self._brought.behind or self._brought.overheard
            ):
                return False
            if not all(cursor.is_at_end() for cursor in self._named):
                return False
            for cursor in self._named:
                cursor.record.waiters[waiter] = None
        return True

    def _take(self) -> list[Item]:
        """Return what is there, or a part of it: entries, and gaps.

        Raises:
            Unavailable: The broker has to be asked, does not answer, and nothing else
                is there.
            Closed: The engine refuses one of its channels.
        """
        items: list[Item] = []
        lost: list[str] = []
        overheard: list[tuple[str, bytes]] = []
        places: list[tuple[Cursor, tuple[Any, ...]]] = []
        try:
            while self._lost:
                lost.append(self._lost.pop(0))
                items += self._pages().lost(lost[-1])
            while self._brought is not None and self._brought.overheard:
                overheard.append(self._brought.overheard.popleft())
                items.append(overheard_item(*overheard[-1]))
            size = 0
            for cursor in self._turns():
                places.append((cursor, cursor.place()))
                try:
                    if self._options.conflate is not None:
                        items += self._conflated(cursor)
                        continue
                    found = self._take_from(cursor)
                except Unavailable:
                    if not items:
                        raise
                    cursor.go_back(places.pop()[1])
                    break  # the others' are given out first
                for item in found:
                    entry = item[1]
                    if isinstance(entry, Entry):
                        size += len(entry.payload)
                        if not self._is_for_us(entry):
                            continue
                    items.append(item)
                if size >= JOIN:
                    break
        except BaseException as error:
            # Of `conflate`, `on_gap`, the broker, or from outside. Nothing was given
            # out: the next read begins where this one did, with the one after this.
            with self.windows.lock:
                self._lost = [*lost, *(self._lost or ())] or None
                if self._brought is not None:
                    self._brought.overheard.extendleft(reversed(overheard))
                for cursor, place in places:
                    cursor.go_back(place)
            self._end_if_denied(error)
            raise
        finally:
            self._end_turns([cursor for cursor, _ in places])
        return items

    def _turns(self) -> Sequence[Cursor]:
        """Return the cursors that may have something new, in their order.

        Who was not reached the last time comes first: a busy channel holds up none.
        """
        brought, named, turn = self._brought, self._named, self._turn
        if brought is None:
            return named if not turn else (*named[turn:], *named[:turn])
        windows = self.windows
        with windows.lock:
            news, brought.news = brought.news, {}
            for channel, prev in news.items():
                cursor = brought.cursors.get(channel)
                record = windows.record(channel)
                if cursor is None:
                    cursor = Cursor(channel, record, prev, is_begun=True)
                    cursor.since = sys.maxsize
                    brought.cursors[channel] = cursor
                elif cursor.record is not record:
                    cursor.record = record
                    cursor.position = cursor.seen = OUTSIDE
                brought.behind[channel] = cursor
            if len(brought.cursors) > brought.room:
                # Of a channel that is idle the next event is a first one again.
                brought.cursors = {
                    name: cursor
                    for name, cursor in brought.cursors.items()
                    if name in brought.behind
                    or windows.channels.get(name) is cursor.record
                }
                brought.room = 2 * len(brought.cursors) + 64
            behind = islice(brought.behind.values(), limits.READ)
            return [*named[turn:], *behind, *named[:turn]]

    def _end_turns(self, had: Sequence[Cursor]) -> None:
        """Take note of who had a turn: the next is whoever comes after the last."""
        if self._is_simple or not had:
            return
        brought, last = self._brought, had[-1]
        self._turn = next((n for n, c in enumerate(self._named, 1) if c is last), 0)
        if brought is None:
            return
        with self.windows.lock:
            for cursor in had:
                is_behind = brought.behind.pop(cursor.name, None) is not None
                if is_behind and not cursor.is_at_end():
                    brought.behind[cursor.name] = cursor

    def _take_from(self, cursor: Cursor) -> list[Item]:
        """Return what follows a cursor: entries of anybody's, and resets."""
        window = cursor.record.log
        with self.windows.lock:
            if cursor.find():
                entries, end = cursor.read(limits.READ)
                if end > cursor.position:
                    cursor.advance(end)
                cursor.is_begun, cursor.start = True, ""
                if entries or not cursor.record.is_doubtful:
                    return [(cursor, entry) for entry in entries]
            end, limit = window.end, cursor.record.limit
        return self._pages().after(cursor, end, limit)

    def _pages(self) -> Pages:
        """Return what reads the broker for it: made anew, for that is rare."""
        payloads = self.subscribers.payloads
        return Pages(self.windows, payloads, self._options)

    def _is_for_us(self, entry: Entry) -> bool:
        if entry.payload[:1] != b"\0":
            return True
        tags = json.loads(entry.tags)
        only, exclude = tags.get("only"), tags.get("exclude")
        if only is not None and self.tags.isdisjoint(only):
            return False
        return exclude is None or self.tags.isdisjoint(exclude)

    def _conflated(self, cursor: Cursor) -> list[Item]:
        """Return the newest of each key, and gaps, of all that is there by now.

        Not of what comes meanwhile: it may come as fast as it is read.
        """
        assert self._options.conflate is not None
        with self.windows.lock:
            end, head = cursor.record.log.end, cursor.record.log.head
            is_known = head and not cursor.record.is_doubtful
        if not is_known:
            head = self.windows.read(cursor.name, None).head
        kept: dict[Hashable, Item] = {}
        while True:
            found = self._take_from(cursor)
            is_gap = False
            for item in found:
                entry = item[1]
                if isinstance(entry, Event):  # of a reset
                    kept[object()], is_gap = item, True
                    continue
                if not self._is_for_us(entry):
                    continue
                # Not `_decoded`: it is not given out yet.
                (event,) = decoder_of().feed(entry.wire)
                key = self._options.conflate(event)
                kept.pop(key, None)
                kept[key] = item
            if (
                is_gap
                or not found
                or cursor.position >= end
                or any(entry.id == head for _, entry in found)
            ):
                return [*kept.values()]

    # What is sent.

    def _id(self, cursor: Cursor, id: str) -> str:
        """Return the id under which a client comes back that has got this one.

        The other channels' are what it has got of them, not what was read. Patterns
        have none: who comes back to one gets a reset.
        """
        if self._is_simple:
            return id
        cursor.sent = id
        named = self._named
        return composite([c.name for c in named], [c.sent for c in named]) or id

    def _frame(self, item: Item) -> bytes:
        cursor, entry = item
        if isinstance(entry, Event):
            return self._decoded(item).encode()
        if self._is_simple:
            return entry.wire
        return b"id: %b\n%b" % (self._id(cursor, entry.id).encode(), entry.fields)

    def _decoded(self, item: Item) -> Event:
        cursor, entry = item
        if isinstance(entry, Event):  # a gap, or a snapshot's
            if self._is_simple or entry.id is None:
                return entry
            kind = Gap if isinstance(entry, Gap) else Event
            id = self._id(cursor, str(entry.id))
            return kind(entry.data, event=entry.event, retry=entry.retry, id=id)
        decoder = decoder_of()
        (event,) = decoder.feed(self._frame(item))
        if decoder.retry is None:
            return event
        return Event(event.data, event=event.event, id=event.id, retry=decoder.retry)

    def _line(self, dumps: Dumps) -> Callable[[Item], bytes]:
        def line(item: Item) -> bytes:
            event = self._decoded(item)
            fields: Mapping[str, Any] = {
                **({} if self._is_simple else {"channel": item[0].name}),
                "id": event.id,
                **({"event": event.event} if event.event else {}),
                "data": event.data,
            }
            text = dumps(fields)
            return (text.encode() if isinstance(text, str) else text) + b"\n"

        return line

    # Its end.

    def check_allowed(self) -> None:
        """Ask `authorize` here if it is time; end where it does not answer in time."""
        if self._options.authorize is None or time.monotonic() < self._ask_at:
            return
        watcher = watch()
        denied = partial(_unanswered, weakref.ref(self), current_scope(), watcher)
        timer = watcher.call_at(time.monotonic() + limits.ANSWER, denied)
        try:
            self.ask()
        finally:
            watcher.cancel(timer)

    @property
    def _ask_at(self) -> float:
        return self.ask_again_at if self._asked else 0.0

    def ask(self) -> None:
        """Ask `authorize` whether it may go on.

        If that raises, who asks may not read, and it is asked again.
        """
        assert self._options.authorize is not None
        now = time.monotonic()
        is_allowed: Any = self._options.authorize(self)
        # Those are true, whatever would come of them: what is to be awaited, a
        # generator, a method that was not called.
        if isinstance(is_allowed, (Awaitable, Iterator)) or callable(is_allowed):
            if isinstance(is_allowed, Coroutine):
                is_allowed.close()
            raise TypeError(
                f"authorize must be a plain function that returns bool, got"
                f" {self._options.authorize!r}, which has returned"
                f" {type(is_allowed).__name__}"
            )
        self._asked = now
        if not is_allowed:
            self.close("denied")

    def _leave(self, has_joined: bool = True) -> None:
        self.windows.leave(self)
        self.withdraw()
        watched, self._watched = self.channels[: self._watched], 0
        for name in watched:
            self.windows.unwatch(name)
        was_listed, self._is_listed = self._is_listed, False
        if was_listed:
            self.subscribers.control.leave()
        if has_joined:
            self.subscribers.announce(self._announced(), self.announcement, "leave")

    def _announced(self) -> list[str]:
        """Return the channels that are told who comes and goes."""
        names = () if self.announcement is None else self.channels
        return [name for name in names if not is_pattern(name)]


def decoder_of() -> sse.Decoder:
    """Return one for an event of the broker's, which may be as large as it takes."""
    return sse.Decoder(max_line=None, max_event=None)


def _unanswered(
    reference: weakref.ref[Subscription], scope: Scope | None, watcher: Watch
) -> None:
    """End one whose `authorize` has not answered in time; in its watch."""
    subscription = reference()
    if subscription is None:
        return
    text = "authorize of %r has not answered in %g seconds: it is denied"
    say(log, logging.WARNING, text, subscription.channels, limits.ANSWER)
    # Elsewhere: who waits for the watch is not to wait for a broker.
    elsewhere(watcher, partial(subscription.close, "denied"))
    if scope is not None:
        scope.abandon("denied")


def _close(reference: weakref.ref[Subscription]) -> None:
    subscription = reference()
    if subscription is not None:
        subscription.close()


class Frames:
    """A subscription's chunks for a response: all that is there makes one.

    Not a generator, and none around it: each would be a piece of the C stack, which
    greenlets copy twice for every event.

    Attributes:
        events: So many have been in its chunks.
    """

    __slots__ = (
        *("_encode", "_is_registered", "_is_shared", "_scope", "_subscription"),
        "events",
    )

    def __init__(
        self,
        subscription: Subscription,
        encode: Callable[[Item], bytes],
        is_shared: bool,
        scope: Scope | None,
    ) -> None:
        self._subscription = subscription
        self._scope = scope
        self._is_registered = False  # its waiter, where it was at the end
        self._encode = encode
        self._is_shared = is_shared
        self.events = 0

    def __iter__(self) -> Frames:
        return self

    def __next__(self) -> bytes:
        subscription = self._subscription
        while True:
            if subscription._items:
                items = [*reversed(subscription._rest() or ())]
                subscription._items = None
                if items:
                    self.events += len(items)
                    return b"".join(map(self._encode, items))
            if self._is_shared and subscription._is_begun:
                chunk = self._shared(subscription)
                if chunk is not None:
                    return chunk
            items = subscription._wait(None, once=self._is_shared)
            if items:
                self.events += len(items)
                return b"".join(map(self._encode, items))

    def _shared(self, subscription: Subscription) -> bytes | None:
        """Wait for what is new; return it as bytes that others share.

        The path of each event: ``None`` where it takes more than that.
        """
        (cursor,) = subscription._named
        record, windows = cursor.record, subscription.windows
        window = record.log
        waiter: Any = subscription._waiter
        scope = self._scope
        if (
            waiter is None
            or scope is None
            or waiter.scope is not scope
            or waiter.runner != scope.runner
        ):
            waiter = subscription._own_waiter()
        while True:
            if not self._is_registered:
                with windows.lock:
                    position, end = cursor.position, window.end
                    if (
                        position < window.first
                        or record.tagged >= position
                        or cursor.is_late()
                        or subscription._reason is not None
                    ):
                        return None
                    if position < end:
                        end, chunk = window.joined(position)
                        cursor.position = end
                        cursor.is_begun = True
                        if end == window.end:
                            cursor.last = window.head
                            if waiter.gevent_hub is not None and not record.is_doubtful:
                                # Now: it takes the lock once for each event. (Threads
                                # may run before all of a batch has come.)
                                record.waiters[waiter] = None
                                self._is_registered = True
                        else:
                            cursor.last = window.entry(end - 1).id
                        count = end - position
                        self.events += count
                        windows.delivered += count
                        return chunk
                    if record.is_doubtful:
                        return None
                    record.waiters[waiter] = None
            self._is_registered = False
            try:
                waiter.wait(None)
            except BaseException:  # a time-out's, say: it may be read again
                subscription.withdraw()
                raise
