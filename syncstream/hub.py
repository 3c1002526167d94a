"""Channels: publish, subscribe, resume.

A `Hub` keeps a window of each channel that has subscribers, a `Log`; a broker stores
events and tells of new ones. A `Subscription` is a position in one log or several: to
be behind is to have a lower one, to resume is to begin after an id. What is no more in
the window is read from the broker; what is no more there either is announced by a
`Gap`, never passed over.

The one promise: after the id that a client presents it gets every later event, once
and in order, or a reset first.
"""

from __future__ import annotations

import _thread
import hashlib
import json
import logging
import math
import os
import random
import re
import sys
import weakref
from collections import OrderedDict, deque
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
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from .brokers import Broker, is_pattern, matches, open_broker, patterns_of, shown
from .clock import time
from .control import CONTROL, Control, Kick, attempt
from .errors import BrokerError, Closed, Denied, PayloadTooLarge, Unavailable, Uncertain
from .log import JOIN, START, Entry, Log, Page, first_part, flaw
from .presence import PRESENCE
from .presence import decoded as decoded_presence
from .presence import encoded as encoded_presence
from .process import process
from .protocol import sse
from .protocol.json import Dumps, dumps_or_default
from .protocol.sse import Event
from .sockets import native
from .waiting import Scope, Waiter, Wakeable, current_scope, say, wake_all
from .watch import Watch, elsewhere, watch

__all__ = ["Gap", "Hub", "Subscription"]

log = logging.getLogger(__name__)

READ = 500  # entries that are read at once
WINDOW = 256  # entries of a channel that are kept for its subscribers
WINDOW_SIZE = 1 << 20  # bytes of them, but for a single one
BUDGET = 64 << 20  # bytes of all windows of a hub
IDLE = 60.0  # seconds that a window without subscribers is kept
MOST_IDLE = 10_000  # how many of them, roughly: names of channels may come from clients
MANY = 24  # hubs of one URL that are alive: one is enough
CROWD = 1000  # new ones after which they are counted
ANSWER = 5.0  # seconds in which an `authorize` must have answered
SAID = 3600.0  # seconds for which what was said of a name is not said again
MOST_SAID = 100  # names of which something is said in that time: clients choose names
RETRY = 1.0  # seconds, roughly, until a broker that did not answer is asked again
MAX_CHANNELS = 32  # of one subscription, by name: their ids fit into one
_MOST_KEPT = 1_000_000_000  # events of a channel: what any broker can count
_MOST_PAYLOAD = 512 << 20  # bytes: what Redis has for one value
_LONGEST = 1e9  # seconds, thirty years
_DEFAULT: Any = object()  # an argument that was not given
_MAX_ID = 4096  # characters of an id that are looked at
_MAX_NAME = 200  # characters of a channel's name
_ID = re.compile(r"[0-9a-f]+(-[0-9a-f]+)?")
_NAME = re.compile(r"[^\s\x00-\x1f\x7f*#\ud800-\udfff]+")  # surrogates: no UTF-8

GAP_EVENT = "reset"
_ANYBODY: Any = object()  # `who` was not given
_NOWHERE = "-"  # an id that no broker has


class Gap(Event):
    """Events are missing: what a client has, it should fetch anew.

    An event as others: ``event`` is "reset", ``data`` is JSON with the ``channel``
    and the ``reason`` ("lagged": the reader was too slow; "unknown": the id is not one
    that is kept, or what followed was removed), and ``id`` the one before what follows,
    so that nothing is lost if the connection ends in between.
    """

    __slots__ = ()


def _gap(channel: str, reason: str, id: str) -> Gap:
    fields = {"channel": channel, "reason": reason}
    data = json.dumps(fields, separators=(",", ":"), ensure_ascii=False)
    return Gap(data, event=GAP_EVENT, id=id)


class _Channel:
    """A channel that has, or had a moment ago, subscribers."""

    __slots__ = (
        *("aside", "counted", "held", "idle_since", "is_doubtful", "is_watched"),
        *("limit", "log", "subscriptions", "tagged", "waiters"),
    )

    def __init__(self) -> None:
        # The head is unknown: the first entry says what it follows.
        self.log = Log("")
        self.counted = 0  # bytes of it that are in `Hub._size`
        # Fields of who came and went, until it is known after which event.
        self.held: tuple[bytes, ...] = ()
        self.subscriptions = 0
        self.is_watched = False  # by its name: the broker tells of it
        # Its head may be older than the channel's, or not known at all: the first to
        # come to its end asks the broker.
        self.is_doubtful = True
        self.limit = READ  # what to ask the broker for: fewer, if they are large
        self.waiters: dict[Wakeable, None] = {}  # in the order in which they came
        self.tagged = -1  # the last position whose entry is not for everybody
        self.aside = -1  # the last one whose entry is set aside
        self.idle_since = time.monotonic()


class _Ear:
    """What a broker holds of a hub: it tells it, and does not keep it alive."""

    __slots__ = ("_hub",)

    def __init__(self, hub: Hub) -> None:
        self._hub = weakref.ref(hub)

    def deliver(self, channel: str, entry: Entry) -> None:
        hub = self._hub()
        if hub is not None:
            hub.deliver(channel, entry)

    def resync(self, channels: Iterable[str] | None) -> None:
        hub = self._hub()
        if hub is not None:
            hub.resync(channels)

    def state(self, is_up: bool, reason: str) -> None:
        hub = self._hub()
        if hub is not None:
            hub.state(is_up, reason)

    def deny(self, name: str, reason: str) -> None:
        hub = self._hub()
        if hub is not None:
            hub.deny(name, reason)


class Hub:
    """Channels, and those who subscribe to them.

    One of it in an application is enough; it is started by its first use. All
    methods may be called from any thread or greenlet. One that is dropped, not closed,
    is freed with what its URL has made.

    Args:
        url: Where events are kept: ``memory:``, this process; ``local:``,
            ``local:NAME`` or ``local:/PATH``, the processes of this machine;
            ``redis://HOST`` or ``postgresql://USER@HOST/DATABASE``, all who reach it.
            See `brokers.open_broker`, and docs/brokers.md.
        broker: A broker, in place of ``url``, ``capacity`` and ``max_age``, which are
            its own; see `syncstream.brokers`.
        capacity: So many events of each channel are kept, for those who resume,
            1000 by default: fewer, if they are large (``memory:`` has 256 MiB for all
            channels, an eighth of it for one, see `brokers.memory.MemoryBroker`).
        max_age: Events are kept for so many seconds, an hour by default, ``None`` for
            no limit.
        max_payload: So many bytes an event may have, encoded.
        dumps: Encodes what is not text, as in `SSEResponse`.

    Raises:
        TypeError, ValueError: An argument is not what it should be.
    """

    def __init__(
        self,
        url: str = _DEFAULT,
        *,
        broker: Broker | None = None,
        capacity: int = _DEFAULT,
        max_age: float | None = _DEFAULT,
        max_payload: int = 1 << 20,
        dumps: Dumps | None = None,
    ) -> None:
        if broker is not None:
            for name, given in (("url", url), ("capacity", capacity)):
                if given is not _DEFAULT:
                    raise ValueError(f"{name} must not be given with broker: it has it")
            if max_age is not _DEFAULT:
                raise ValueError("max_age must not be given with broker: it has it")
        url = "memory:" if url is _DEFAULT else url
        capacity = 1000 if capacity is _DEFAULT else capacity
        max_age = 3600.0 if max_age is _DEFAULT else max_age
        for name, number, most in (
            ("capacity", capacity, _MOST_KEPT),
            ("max_payload", max_payload, _MOST_PAYLOAD),
        ):
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name} must be int, got {number!r}")
            if not 1 <= number <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {number!r}")
        if max_age is not None:
            if not isinstance(max_age, (int, float)) or isinstance(max_age, bool):
                raise TypeError(f"max_age must be seconds or None, got {max_age!r}")
            if not 0 < max_age <= _LONGEST:
                raise ValueError(
                    f"max_age must be above 0, and {_LONGEST:.0f} seconds at most, or"
                    f" None for no limit, got {max_age!r}"
                )
        if not isinstance(url, str):
            raise TypeError(f"url must be str, got {type(url).__name__}")
        if broker is not None and not callable(getattr(broker, "attach", None)):
            # Not itself: it may be a URL, which is the other argument.
            raise TypeError(f"broker must be a Broker, got {type(broker).__name__}")
        self._url = url if broker is None else None
        if broker is None:
            broker = open_broker(url, capacity=capacity, max_age=max_age)
        self.broker = broker
        self._max_age = float("inf") if max_age is None else max_age
        self._max_payload = max_payload
        self._dumps = dumps_or_default(dumps)
        # Reentrant: a garbage collection in here may close a subscription. Never
        # held while the broker is called: brokers call us under their own.
        self._lock = native(_thread, "RLock")()
        self._channels: dict[str, _Channel] = {}
        # Those whose windows hold something, the one first that was not written to
        # for longest; and what they hold together.
        self._filled: OrderedDict[_Channel, None] = OrderedDict()
        self._size = 0
        self._patterns: dict[str, int] = {}  # how many subscriptions have each
        self._listeners: dict[str, dict[int, weakref.ref[Subscription]]] = {}
        self._open: dict[int, weakref.ref[Subscription]] = {}
        # What was dropped, not closed. Maybe by a garbage collection, anywhere, under
        # any lock: to call the broker there is to wait for oneself.
        self._dropped: deque[tuple[Sequence[str], Sequence[str], str | None, bool]]
        self._dropped = deque()
        self._published = self._delivered = 0
        self._is_up = True
        self._hears_presence = False
        self._told_presence: deque[str] = deque(maxlen=WINDOW)  # ids: not twice
        self._is_closed = False
        self._said: dict[tuple[str, str], float] = {}
        self._swept = time.monotonic()
        self._control = Control(self)
        self._crowd = CROWD  # so many windows are looked through at once
        _hubs.add(self)
        self._warn_of_many()
        broker.attach(_Ear(self))

    def _warn_of_many(self) -> None:
        """Say, once, that hubs are made by the dozen: for each call, maybe."""
        if self._url is None:
            return
        if sum(hub._url == self._url for hub in list(_hubs)) > MANY:
            process().warn_once(
                log,
                f"more than {MANY} hubs of one {shown(self._url)} are in use: make one"
                " for the whole application, each has connections and threads",
            )

    # To publish.

    def publish(
        self,
        channel: str,
        data: Any = None,
        *,
        event: str | None = None,
        retry: int | None = None,
        only: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        connection: Any = None,
    ) -> str | None:
        """Send an event to all who subscribe to a channel, now or later.

        Args:
            channel: Its name: levels with ``:`` between them, no white space.
            data: Text, or what becomes JSON; or an `Event` without an id.
            event: Its name, as in `Event`; not "reset".
            retry: As in `Event`.
            only: Tags: it is for subscriptions that have one of them, and an empty
                list for nobody; ``None``, the default, for everybody.
            exclude: Tags: it is not for subscriptions that have one of them.
            connection: A database's, in whose transaction it is stored, for
                brokers that have such.

        Returns:
            Its id; ``None`` within a transaction.

        Raises:
            Unavailable: Nothing was stored.
            Uncertain: It may have been stored.
            PayloadTooLarge: It is larger than ``max_payload``.
            TypeError, ValueError: An argument is not what it should be.
        """
        if isinstance(data, Event):
            if event is not None or retry is not None:
                raise ValueError("event and retry must be the Event's own")
            item = data
        else:
            item = self._event(data, event, retry)
        return self.publish_many(
            channel, [item], only=only, exclude=exclude, connection=connection
        )[0]

    def publish_many(
        self,
        channel: str,
        items: Iterable[Any],
        *,
        only: Iterable[str] | None = None,
        exclude: Iterable[str] = (),
        connection: Any = None,
    ) -> list[str | None]:
        """Send events to a channel, in one go and in this order.

        Args:
            channel, only, exclude, connection: As for `publish`.
            items: What `publish` takes as data, `Event` included.

        Returns:
            Their ids.

        Raises:
            Unavailable, Uncertain, PayloadTooLarge, TypeError, ValueError: As from
                `publish`; then it holds for all of them.
        """
        self.check_open("publish")
        _check_name(channel)
        prefix = _prefix(only, exclude)
        batch = [(channel, prefix + self._payload(item)) for item in items]
        for _, payload in batch:
            self.check_size(payload)
        self._clear()
        ids = self.broker.publish(batch, connection=connection) if batch else []
        self._published += len(ids)
        return ids

    def check_size(self, payload: bytes) -> None:
        """Refuse what is larger than an event may be, encoded."""
        if len(payload) > self._max_payload:
            raise PayloadTooLarge(
                f"an event must have {self._max_payload} bytes at most, encoded,"
                f" got {len(payload)}"
            )

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._is_closed

    def check_open(self, what: str) -> None:
        if self._is_closed:
            raise ValueError(f"{what} after close()")

    def announcement(self, who: Any) -> str:
        """Return the data of the events that tell who comes and goes.

        Made once, by whoever subscribes: an error is theirs, and not that of whoever
        kicks them, or finds that they have gone.
        """
        event = self._event({"who": who}, "leave", None)
        self.check_size(event.encode())
        return str(event.data)

    def _event(self, data: Any, event: str | None, retry: int | None) -> Event:
        if data is not None and not isinstance(data, (str, bytes, bytearray)):
            text = self._dumps(data)
            data = text if isinstance(text, str) else text.decode()
        return Event(data, event=event, retry=retry)

    def _payload(self, item: Any) -> bytes:
        event = item if isinstance(item, Event) else self._event(item, None, None)
        if event.id is not None:
            raise ValueError(f"id must be the broker's own, got {event.id!r}")
        if event.event == GAP_EVENT:
            raise ValueError(
                f"event must not be {GAP_EVENT!r}: it says that events are missing"
            )
        if event.data is None:
            # Readers would never see it: nothing is dispatched without data.
            raise ValueError("data must be given: an event without is not dispatched")
        return event.encode(self._dumps)

    # To subscribe.

    def subscribe(
        self,
        *channels: str,
        after: str | int = "now",
        on_gap: str | Callable[[], Iterable[Any]] = "replay",
        on_lag: str = "reset",
        key: Callable[[Event], Hashable] | None = None,
        throttle: float | None = None,
        tags: Iterable[str] = (),
        who: Any = None,
        announce: bool = False,
        authorize: Callable[[Subscription], bool] | None = None,
        reauthorize: float | None = None,
    ) -> Subscription:
        """Return a subscription: the events of these channels from a position on.

        Args:
            channels: Names; or patterns: ``chat:*`` for one level more, ``logs:#``
                for all levels. A name that is not all yours may be one: make it by
                `channel`. Who comes back to a pattern gets a reset of it, then
                what comes from now on: no broker knows which channels there were
                in between.
            after: Where a first connection begins: "now", "start" (the oldest that
                is kept), an id, or a number: so many of the newest of each. With
                a pattern only "now". A client that comes back with a Last-Event-ID
                begins there.
            on_gap: What follows a reset, when that id is not kept any more or the
                reader has fallen behind: "replay", all that is kept; "live", what
                comes from now on; or a callable, which returns events that make a
                client whole again (a snapshot, without ids), and what came since it
                was called follows. Who is cut off before its end gets another one.
                It is called for each channel that has a gap.
            on_lag: What becomes of a reader that falls behind what is kept:
                "reset", it is told, and goes on as ``on_gap`` says;
                "drop", its stream ends, and the client comes back by itself;
                "latest", of what it is behind it gets the newest for each key.
            key: For "latest": an event's key. What it raises `read` raises, and
                reads the same once more.
            throttle: Seconds between two deliveries, at least.
            tags: What `publish` may select it by.
            who: What `presence` shows of it; a user's name, say.
            announce: Tell those who are there, by "join" and "leave" events in its
                channels, with ``who`` as it is now; not in those of a pattern. They
                are not kept, and have the id of the event before them.
            authorize: Called when it is first read, and every ``reauthorize``
                seconds; when it returns false, or has not answered within 5 seconds
                (`ANSWER`), the stream ends ("denied"), and a late answer changes
                nothing. What it raises `read` raises, and nothing is read. A plain
                function: an answer that is to be awaited, iterated or called is an
                error.
            reauthorize: Seconds.

        Raises:
            TypeError, ValueError: An argument is not what it should be.
        """
        self.check_open("subscribe")
        return Subscription(
            self,
            channels,
            after=after,
            on_gap=on_gap,
            on_lag=on_lag,
            key=key,
            throttle=throttle,
            tags=tags,
            who=who,
            announce=announce,
            authorize=authorize,
            reauthorize=reauthorize,
        )

    @staticmethod
    def channel(*levels: str | int) -> str:
        """Return a channel's name, of levels that may come from outside.

        ``hub.channel("user", name)`` is one user's channel, whatever the name:
        ``f"user:{name}"`` is everybody's if that is ``*``, and another's channel if
        it is ``ann:mail``.

        Args:
            levels: What stands between the colons.

        Raises:
            ValueError: One is empty, or has a colon, ``*``, ``#`` or white space; or
                the name is too long.
            TypeError: One is neither text nor a whole number.
        """
        for level in levels:
            if isinstance(level, bool) or not isinstance(level, (str, int)):
                raise TypeError(f"a channel's level must be str or int, got {level!r}")
            if not _NAME.fullmatch(str(level)) or ":" in str(level):
                raise ValueError(
                    "a channel's level must be text without white space, :, * and #,"
                    f" got {level!r}"
                )
        name = ":".join(map(str, levels))
        _check_name(name)
        return name

    def begin_anew(self) -> None:
        """Forget, in a forked child, what is its parent's: who subscribes, and all
        that was told. Nobody here listens for it."""
        for subscription in self._subscriptions():
            subscription.forget()
        self._lock = native(_thread, "RLock")()  # a thread may have held it
        self._channels, self._filled, self._size = {}, OrderedDict(), 0
        self._patterns, self._listeners, self._open = {}, {}, {}
        self._control.begin_anew()
        self._dropped.clear()
        self._published = self._delivered = 0
        self._hears_presence = False

    def head(self, *channels: str) -> str:
        """Return the id of a channel's newest event; of several, one for all.

        For the page that is rendered before its stream opens: ``after=`` that id, or
        ``?lastEventId=``, and nothing is missed in between.

        Args:
            channels: As for `subscribe`, but names only, and the same ones: an id of
                two channels is not one of the first alone.
        """
        self.check_open("head")
        names = tuple(dict.fromkeys(channels))
        if not names:
            raise ValueError("channels must be given, at least one")
        for name in names:
            _check_name(name)
        heads = [self.broker.read(name, None).head for name in names]
        return heads[0] if len(names) == 1 else _composite(names, heads)

    # Who is there.

    def presence(self, channel: str) -> list[Any]:
        """Return the ``who`` of each subscription of this process to a channel."""
        self._clear()
        return [s.who for s in self._subscriptions() if s.hears(channel)]

    def kick(
        self,
        predicate: Callable[[Subscription], bool] | None = None,
        *,
        who: Any = _ANYBODY,
        tags: Iterable[str] | None = None,
    ) -> int:
        """End subscriptions: by name in all processes of the hub, or here by a test.

        ``kick(who="ann")`` ends those whose ``who`` is the same JSON,
        ``kick(tags=["user:7"])`` those that have one of the tags, in every process;
        with both, those for which both hold. One that is just being opened may be
        missed: give it an ``authorize``.

        Args:
            predicate: Tells which subscriptions of this process to end, and no
                others; in place of a name. If it raises, the others are asked all the
                same, and then this raises it.
            who: As given to `subscribe`; not ``None``, which nobody is called.
            tags: Several strings; an empty list is nobody.

        Returns:
            How many were ended in this process.

        Raises:
            Unavailable, Uncertain: Those of this process were ended, and the others
                could not be told, or may not have been. Do it again.
            Denied: Those of this process were ended; the engine does not allow it to
                tell the others, or to hear their kicks: then others may be as deaf.
            PayloadTooLarge, TypeError, ValueError: An argument is not what it should
                be; nobody was ended.
        """
        if predicate is not None:
            if who is not _ANYBODY or tags is not None:
                raise ValueError("predicate and who or tags must not be given together")
            if not callable(predicate):
                raise TypeError(f"predicate must be callable, got {predicate!r}")
            return self._end(predicate)
        if who is None or (who is _ANYBODY and tags is None):
            raise ValueError("who or tags must be given, or a predicate")
        self.check_open("kick")
        kick = Kick(
            None if who is _ANYBODY else self._named(who),
            None if tags is None else _check_tags("tags", tags),
        )
        if kick.who == "null":  # as JSON it would be all who have no name
            raise ValueError(f"who must not be null as JSON, got {who!r}")
        if kick.tags == []:
            return 0
        self.check_size(kick.encoded(""))
        count, told = 0, None
        try:
            count = self.end(kick)
        finally:  # whatever has failed here
            try:
                self._control.tell(kick)
            except BrokerError as error:
                told = error
        if told is not None:
            kind = type(told) if isinstance(told, Unavailable) else Uncertain
            raise kind(
                f"{count} were ended in this process, and those of others may go on:"
                f" {told}"
            ) from told
        return count

    def end(self, kick: Kick) -> int:
        """End the subscriptions of this process that a kick names."""
        return self._end(lambda subscription: self._is_named(subscription, kick))

    def end_nameable(self, but: object = None) -> int:
        """End the subscriptions of this process that some kick may have named.

        Args:
            but: One that it cannot have named.
        """
        return self._end(lambda s: s.is_nameable and s is not but)

    def _is_named(self, subscription: Subscription, kick: Kick) -> bool:
        if kick.tags is not None and subscription.tags.isdisjoint(kick.tags):
            return False
        if kick.who is None:
            return True
        try:
            return kick.who == self._named(subscription.who)
        except (TypeError, ValueError):  # it is no JSON: nobody can name it
            return False

    def _named(self, who: Any) -> str:
        """Return the JSON of a ``who``, in one form."""
        if not isinstance(who, (str, int)):
            who = json.loads(self._dumps(who))
        return json.dumps(who, sort_keys=True)

    def _end(self, predicate: Callable[[Subscription], bool]) -> int:
        """End those a predicate holds for; one that fails keeps no other from it."""
        ended: list[Subscription] = []

        def ask(subscription: Subscription) -> None:
            if predicate(subscription):
                ended.append(subscription)
                subscription.close("kicked")

        attempt(partial(ask, s) for s in self._subscriptions() if not s.is_closed)
        return len(ended)

    def _subscriptions(self) -> list[Subscription]:
        return _alive(self._open)

    def stats(self) -> dict[str, Any]:
        """Return counts: of this process, and since it began.

        Returns:
            ``{"subscribers": 12, "channels": 3, "entries": 120, "bytes": 40320,
            "published": 1000, "delivered": 12000, "up": True}``; channels, entries
            and bytes are those of the windows that it keeps.
        """
        self._clear()
        with self._lock:
            logs = [channel.log for channel in self._channels.values()]
            return {
                "subscribers": len(self._open),
                "channels": len(logs),
                "entries": sum(len(log) for log in logs),
                "bytes": self._size,
                "published": self._published,
                "delivered": self._delivered,
                "up": self._is_up,
            }

    def close(self) -> None:
        """End all subscriptions, and the broker."""
        if self._is_closed:
            return
        self._is_closed = True
        for subscription in self._subscriptions():
            subscription.close("closed")
        self.broker.close()

    # What the broker tells: a `Sink`.

    def deliver(self, channel: str, entry: Entry) -> None:
        problem = flaw(entry)
        if problem is not None:
            self.drop_malformed(channel, problem)
            self.resync([channel])  # it may have come in place of another
            return
        with self._lock:
            record = self._channels.get(channel)
            if record is None:
                if channel == CONTROL:  # by its name, or by a pattern of all
                    self._control.look()
                    return
                if channel == PRESENCE:
                    self._tell_presence(entry)
                    return
                if not self._listening(channel):
                    return
                if not _is_name(channel):
                    self.drop_malformed(channel, "it is in no channel of ours")
                    return
                self._forget_idle(time.monotonic(), is_watched=False)
                record = self._channels[channel] = _Channel()
                record.is_doubtful = False  # to who listens from now on
            window = record.log
            if window.head and entry.prev != window.head:
                if window.after(entry.id) is not None:
                    return  # told twice
                window.restart(entry.prev)
                record.is_doubtful = True  # it may have come late
            if record.held:
                self._begin_window(record, entry.prev)
            window.append(entry)
            if entry.payload[:1] == b"\0":
                record.tagged = window.end - 1
            self._trim(record, entry.time)
            waiters, record.waiters = record.waiters, {}
            if self._listeners:
                if not record.is_watched:
                    record.idle_since = time.monotonic()
                for subscription in self._listening(channel):
                    waiters |= subscription.discover(channel, entry.prev)
        if waiters:
            wake_all(waiters)

    def drop_malformed(self, channel: str, problem: str) -> None:
        """Say that what the broker has told, or read, is none of ours."""
        text = "something in %r is no event, and dropped: %s"
        self._say_once(channel, logging.ERROR, text, channel, problem)

    def _trim(self, record: _Channel, now: float) -> None:
        """Keep a window within its bounds, and all of them, under the lock."""
        record.log.trim(WINDOW, now - self._max_age, WINDOW_SIZE)
        self._count(record)
        self._filled.move_to_end(record)
        while self._size > BUDGET:
            self._empty(next(iter(self._filled)))

    def _tell_presence(self, entry: Entry) -> None:
        """Give who came or went to those who are there, under the lock."""
        if entry.id in self._told_presence:
            return
        self._told_presence.append(entry.id)
        try:
            channel, fields = decoded_presence(entry)
        except ValueError as error:
            self.drop_malformed(PRESENCE, str(error))
            return
        if not _is_name(channel):
            self.drop_malformed(PRESENCE, "it tells of no channel of ours")
            return
        waiters: dict[Wakeable, None] = {}
        record = self._channels.get(channel)
        if record is not None and record.subscriptions:
            if record.log.head:
                self._set_aside(record, fields, entry.time)
                self._trim(record, entry.time)
            else:
                record.held = (*record.held, fields)[-WINDOW:]
            waiters, record.waiters = record.waiters, {}
        for subscription in dict.fromkeys(self._listening(channel)):
            waiters |= subscription.overhear(channel, fields)
        wake_all(waiters)

    def _begin_window(self, record: _Channel, head: str) -> None:
        """Let a window begin anew after an id, under the lock."""
        record.log.restart(head)
        if head:
            held, record.held = record.held, ()
            for fields in held:
                self._set_aside(record, fields, time.monotonic())
        self._count(record)

    def _set_aside(self, record: _Channel, fields: bytes, now: float) -> None:
        record.aside = record.log.end
        record.log.set_aside(fields, now)

    def _listening(self, channel: str) -> list[Subscription]:
        """Return those that have patterns of a channel; maybe one several times."""
        found: list[Subscription] = []
        for pattern in patterns_of(channel):
            listeners = self._listeners.get(pattern)
            if listeners:
                found += _alive(listeners)
        return found

    def _count(self, record: _Channel) -> None:
        """Take note of a window's size, under the lock, after any change of it."""
        size = record.log.size
        if size and not record.counted:
            self._filled[record] = None
        elif record.counted and not size:
            del self._filled[record]
        self._size += size - record.counted
        record.counted = size

    def _empty(self, record: _Channel) -> None:
        """Drop a window's entries; who is behind reads them from the broker."""
        record.log.trim(0, float("-inf"), float("inf"))
        self._count(record)

    def restart(self, record: _Channel, head: str) -> dict[Wakeable, None]:
        """Let a window begin anew after an id, under the lock; return whom to wake."""
        self._begin_window(record, head)
        waiters, record.waiters = record.waiters, {}
        return waiters

    def resync(self, channels: Iterable[str] | None) -> None:
        named = None if channels is None else list(channels)
        if named is None or CONTROL in named:
            self._control.look()
        with self._lock:
            names = [
                name
                for name in (self._channels if named is None else named)
                if name not in (CONTROL, PRESENCE)
            ]
            waiters: dict[Wakeable, None] = {}
            for name in names:
                record = self._channels.get(name)
                if record is not None:
                    # Readers find themselves outside of it, and ask the broker.
                    waiters.update(self.restart(record, ""))
                    record.is_doubtful = True
                for subscription in self._listening(name):
                    waiters |= subscription.lose(name)
            if named is None:  # maybe of channels that nobody has heard of
                for listeners in self._listeners.values():
                    for subscription in _alive(listeners):
                        waiters |= subscription.lose(None)
        wake_all(waiters)

    def state(self, is_up: bool, reason: str) -> None:
        if is_up != self._is_up:
            self._is_up = is_up
            state = "back" if is_up else "down"
            say(log, logging.WARNING, "the broker is %s: %s", state, reason)

    def deny(self, name: str, reason: str) -> None:
        if name == CONTROL:
            self._control.refuse(reason)
            text = "kicks of other processes are not heard: %s"
            self._say_once(name, logging.ERROR, text, reason)
            return
        if name == PRESENCE:
            text = "who comes and goes in other processes is not heard: %s"
            self._say_once(name, logging.ERROR, text, reason)
            return
        text = "the engine refuses %r, whose subscribers are denied: %s"
        self._say_once(name, logging.ERROR, text, name, reason)
        self._end_named(name, "denied")

    def _end_named(self, name: str, reason: str) -> None:
        """End those who subscribe to a name, without waiting for anybody."""
        waiters: dict[Wakeable, None] = {}
        with self._lock:
            record = self._channels.get(name)
            if record is not None:  # who comes now has the broker asked again
                record.is_watched, record.is_doubtful = False, True
            for subscription in self._subscriptions():
                if name in subscription.channels:
                    waiters |= subscription.end(reason)
        wake_all(waiters)

    def _say_once(self, name: str, level: int, text: str, *args: object) -> None:
        """Log a line of a name, unless that was done within the hour."""
        now = time.monotonic()
        with self._lock:
            if len(self._said) >= MOST_SAID:
                self._said = {k: at for k, at in self._said.items() if now - at < SAID}
            at = self._said.get((name, text), -math.inf)
            is_full = len(self._said) >= MOST_SAID and name not in (CONTROL, PRESENCE)
            if now - at < SAID or is_full:
                return
            self._said[name, text] = now
        say(log, level, text, *args)

    # For subscriptions.

    def enter(self, subscription: Subscription) -> None:
        """Count a subscription as present."""
        self._clear()
        with self._lock:
            reference = self._open[id(subscription)] = weakref.ref(subscription)
            for name in subscription.channels if subscription.has_patterns else ():
                if is_pattern(name):
                    listeners = self._listeners.setdefault(name, {})
                    listeners[id(subscription)] = reference

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

    def _ask_why(self, name: str, error: BrokerError) -> None:
        """Take note of what a broker has raised of a name."""
        if self._is_closed:
            raise Closed("closed") from None
        if isinstance(error, Denied):
            self.deny(name, str(error))
        else:
            self.say_unreadable(name, error)

    def say_unreadable(self, name: str, error: BrokerError) -> None:
        """Say that a name cannot be read where others can: nobody else would."""
        if self._is_up and not self._is_closed:
            text = "%r cannot be read: %s"
            self._say_once(name, logging.ERROR, text, name, error)

    def newest(self, channel: str, count: int) -> tuple[str, str]:
        """Ask a broker that has `newest`; raise as `read` does."""
        try:
            found: tuple[str, str] = self.broker.newest(  # type: ignore[attr-defined]
                channel, count
            )
            return found
        except BrokerError as error:
            self._ask_why(channel, error)
            raise

    def warn_of_processes(self) -> None:
        """Say, once, that other processes have channels of their own."""
        if self.broker.scope == "process":
            process().warn_once(
                log,
                "this hub's channels are those of one process, and the server runs"
                " several: what is published in one is not seen in the others. Use"
                ' Hub("local:") or Hub("redis://…"), or run one worker',
            )

    def leave(self, subscription: Subscription) -> None:
        self._open.pop(id(subscription), None)
        if subscription.has_patterns:
            for name in subscription.channels:
                self._listeners.get(name, {}).pop(id(subscription), None)

    def drop(
        self,
        subscription: Subscription,
        watched: Sequence[str],
        announced: Sequence[str],
        is_listed: bool,
    ) -> None:
        """Take note of one that is gone without a `close`; calls nobody."""
        self.leave(subscription)
        data = subscription.announcement
        self._dropped.append((watched, announced, data, is_listed))

    def _clear(self) -> None:
        """Do what is left to do for those that were dropped."""
        while self._dropped:
            try:
                watched, announced, data, is_listed = self._dropped.popleft()
            except IndexError:  # another thread was faster
                return
            for name in watched:
                self.unwatch(name)
            if is_listed:
                self.unlist()
            self.announce(announced, data, "leave")

    def enlist(self, subscription: Subscription) -> None:
        """Listen for kicks for one more subscription.

        Raises:
            Unavailable: The broker does not answer.
        """
        self._control.enter(subscription)

    def unlist(self) -> None:
        """Listen for kicks for one subscription less."""
        self._control.leave()

    def hear_presence(self) -> None:
        """Have the broker tell who comes and goes, from the first subscription on.

        Raises:
            Unavailable: The broker does not answer.
        """
        if self._hears_presence:
            return
        try:
            self.broker.watch(PRESENCE)
        except Denied as error:
            self.deny(PRESENCE, str(error))
        self._hears_presence = True

    def announce(self, channels: Iterable[str], data: str | None, name: str) -> None:
        """Tell channels who has come or gone."""
        for channel in channels:
            if self._is_closed:
                return
            try:
                fields = Event(data, event=name).encode()
                self.broker.publish([(PRESENCE, encoded_presence(channel, fields))])
                self._published += 1
            except BrokerError as error:
                text = "%r could not be announced in %r: %s"
                say(log, logging.WARNING, text, name, channel, error)
            except Exception as error:  # the broker's own; others are not to end by it
                text = "%r could not be announced in %r"
                say(log, logging.ERROR, text, name, channel, error=error)

    def watch(self, name: str) -> _Channel | None:
        """Have the broker tell of a channel, or of those that match a pattern."""
        record = None
        with self._lock:
            if is_pattern(name):
                self._patterns[name] = self._patterns.get(name, 0) + 1
            else:
                record = self._channels.setdefault(name, _Channel())
                record.subscriptions += 1
                since = time.monotonic() - self._max_age
                record.log.trim(WINDOW, since, WINDOW_SIZE)
                self._count(record)
        # Others may have come first, and not be done: it is done twice, then.
        if record is None or not record.is_watched:
            try:
                self.broker.watch(name)
            except Denied as error:
                self.deny(name, str(error))
                raise
            if record is not None:
                with self._lock:
                    # A pattern may have brought it, and have gone since.
                    record.is_doubtful = record.is_watched = True
        return record

    def unwatch(self, name: str) -> None:
        now = time.monotonic()
        idle: list[str] = []
        with self._lock:
            if is_pattern(name):
                self._patterns[name] -= 1
                if not self._patterns[name]:
                    del self._patterns[name]
                    if not self._listeners.get(name, True):
                        del self._listeners[name]
                    idle.append(name)
            else:
                record = self._channels[name]
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
            with self._lock:
                found = self._channels.get(name)
                is_back = name in self._patterns or (
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
        if now - self._swept < IDLE / 4 and len(self._channels) < self._crowd:
            return []
        self._swept = now
        idle = [
            (name, record)
            for name, record in self._channels.items()
            if not record.subscriptions and (is_watched or not record.is_watched)
        ]
        idle.sort(key=lambda pair: pair[1].idle_since)
        surplus = len(idle) - MOST_IDLE
        dropped = [
            (name, record)
            for place, (name, record) in enumerate(idle)
            if place < surplus or now - record.idle_since > IDLE
        ]
        for name, record in dropped:
            del self._channels[name]
            self._empty(record)  # a pattern's subscription may hold it
        count = len(self._channels)
        self._crowd = count + max(CROWD, count // 2)
        return [name for name, record in dropped if record.is_watched]

    def record(self, name: str) -> _Channel:
        with self._lock:
            return self._channels.setdefault(name, _Channel())


def _alive(
    subscriptions: dict[int, weakref.ref[Subscription]],
) -> list[Subscription]:
    found = [reference() for reference in list(subscriptions.values())]
    return [s for s in found if s is not None]


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise TypeError(f"channel must be str, got {name!r}")
    if not _is_name(name):
        raise ValueError(
            f"channel must be 1 to {_MAX_NAME} characters, without white space, * and"
            f" #, got {name!r}"
        )


def _is_name(name: str) -> bool:
    return len(name) <= _MAX_NAME and _NAME.fullmatch(name) is not None


def _is_id(id: str) -> bool:
    return len(id) <= 40 and _ID.fullmatch(id) is not None


def _check_tags(name: str, tags: Iterable[str]) -> list[str]:
    # The characters of a text are no tags.
    if isinstance(tags, (str, bytes)) or not isinstance(tags, Iterable):
        raise TypeError(f"{name} must be several strings, got {tags!r}")
    listed = list(tags)
    for tag in listed:
        if not isinstance(tag, str):
            raise TypeError(f"{name} must be strings, got {tag!r}")
    return listed


def _prefix(only: Iterable[str] | None, exclude: Iterable[str]) -> bytes:
    """Return what stands before an event that is not for everybody."""
    tags: dict[str, list[str]] = {}
    if only is not None:  # a computed list that is empty is nobody
        tags["only"] = _check_tags("only", only)
    excluded = _check_tags("exclude", exclude)
    if excluded:
        tags["exclude"] = excluded
    return b"\0%b\n" % json.dumps(tags).encode() if tags else b""


@dataclass(slots=True)
class _Cursor:
    """A subscription's place in one channel.

    Attributes:
        last: The id after which it goes on.
        sent: The id of what was given out last; it may be behind.
        position: The same in the window; -1 if it is not known to be there.
        seen: The window's end before the broker was asked, and had nothing more; -1
            if it may have. While the window's end is that, there is nothing new.
        is_begun: It was found once, so that a gap is one of a lag.
        since: The window's end when it began: what was set aside before that is not
            for it. A pattern's gets none of it there, see `Subscription.overhear`.
        start: The head when it began, if it began before that, with entries that it
            was not promised; ``""`` otherwise, and later.
    """

    name: str
    record: _Channel
    last: str
    position: int = -1
    seen: int = -1
    is_begun: bool = False
    sent: str = ""
    start: str = ""
    since: int = 0

    def __post_init__(self) -> None:
        self.sent = self.last

    def is_at_end(self) -> bool:
        """Tell whether there is nothing new; under the hub's lock."""
        # Outside of the window it is read from the broker, to its end.
        is_outside = self.position < 0 or self.record.is_doubtful
        return self.record.log.end == (self.seen if is_outside else self.position)

    def is_late(self) -> bool:
        """Tell whether there may be what is not for it; under the hub's lock."""
        return self.position < self.since and self.record.aside >= self.position

    def read(self, limit: int) -> tuple[list[Entry], int]:
        """Return what there is for it in the window, and the position after that."""
        position, window = self.position, self.record.log
        entries = window.read(position, limit)
        end = position + len(entries)
        if self.is_late():
            entries = [
                entry
                for place, entry in enumerate(entries, position)
                if place >= self.since or not entry.is_aside
            ]
        return entries, end

    def place(self) -> tuple[Any, ...]:
        """Return what reading changes, for `go_back`."""
        place = self.last, self.position, self.seen
        return *place, self.is_begun, self.sent, self.start

    def go_back(self, place: tuple[Any, ...]) -> None:
        """Undo all reading since that place."""
        self.last, self.position, self.seen = place[:3]
        self.is_begun, self.sent, self.start = place[3:]


class _Brought:
    """What a subscription's patterns have brought; all of it under the hub's lock.

    Attributes:
        cursors: Of each channel, as long as it has a window.
        news: Channels with something new, and the id before that.
        behind: Cursors that may not be at their ends, whose turn is next first.
        overheard: Channels, and fields of who came or went there.
        room: So many cursors are kept before those without windows are looked for.
    """

    __slots__ = ("behind", "cursors", "news", "overheard", "room")

    def __init__(self) -> None:
        self.cursors: dict[str, _Cursor] = {}
        self.news: dict[str, str] = {}
        self.behind: dict[str, _Cursor] = {}
        self.overheard: deque[tuple[str, bytes]] = deque(maxlen=WINDOW)
        self.room = 64


class Apart(Exception):
    """Those who are at one place do not go on together: each asks its application."""


def _read_apart() -> Iterable[Any]:
    raise Apart


Item = tuple["_Cursor", "Entry | Event"]

_NO_TAGS: frozenset[str] = frozenset()


class Subscription:
    """The events of one channel or several, from a position on; from `Hub.subscribe`.

    Iterate it; or `read` what is there; or give it to a response. Its position is
    fixed, and it counts as present, when it is first read. In a response, and as the
    first that a stream's generator reads, it begins after the client's Last-Event-ID,
    if there is one; a second one in a generator begins where ``after`` says. One
    thread or greenlet reads it.

    Attributes:
        who: As given to `Hub.subscribe`.
        tags: As given to `Hub.subscribe`.
    """

    # There may be many thousands, idle: nothing empty is kept where `None` does.
    __slots__ = (
        *("__weakref__", "_after", "_asked", "_authorize", "_brought"),
        *("_delivered", "_given", "_is_begun", "_is_listed", "_is_simple"),
        *("_items", "_key"),
        *("_lost", "_named", "_on_gap", "_on_lag", "_reason", "_reauthorize"),
        *("_throttle", "_turn", "_waiter", "_watched", "announcement", "channels"),
        *("has_patterns", "hub", "tags", "who"),
    )

    def __init__(
        self,
        hub: Hub,
        channels: tuple[str, ...],
        *,
        after: str | int,
        on_gap: str | Callable[[], Iterable[Any]],
        on_lag: str,
        key: Callable[[Event], Hashable] | None,
        throttle: float | None,
        tags: Iterable[str],
        who: Any,
        announce: bool,
        authorize: Callable[[Subscription], bool] | None,
        reauthorize: float | None,
    ) -> None:
        if not channels:
            raise ValueError("channels must be given, at least one")
        for name in channels:
            if isinstance(name, str) and is_pattern(name):
                if name not in ("*", "#"):
                    _check_name(name[:-2])
            else:
                _check_name(name)
        if len(set(channels)) > MAX_CHANNELS:
            raise ValueError(
                f"channels must be {MAX_CHANNELS} at most, got {len(channels)}: use a"
                " pattern"
            )
        if isinstance(after, bool) or not isinstance(after, (str, int)):
            raise TypeError(f"after must be str or int, got {after!r}")
        if after != "now" and any(is_pattern(name) for name in channels):
            raise ValueError(
                f"after must be 'now' where a channel is a pattern, got {after!r}"
            )
        if isinstance(after, int) and after < 1:
            raise ValueError(f"after must be 1 or more events, got {after!r}")
        if on_gap not in ("replay", "live") and not callable(on_gap):
            raise ValueError(
                f"on_gap must be 'replay', 'live' or a callable, got {on_gap!r}"
            )
        if on_lag not in ("reset", "drop", "latest"):
            raise ValueError(
                f"on_lag must be 'reset', 'drop' or 'latest', got {on_lag!r}"
            )
        if (on_lag == "latest") != (key is not None):
            raise ValueError("on_lag='latest' and key must be given together")
        for label, value in (("throttle", throttle), ("reauthorize", reauthorize)):
            if value is None:
                continue
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise TypeError(f"{label} must be seconds or None, got {value!r}")
            if not 0 < value <= _LONGEST:
                raise ValueError(
                    f"{label} must be above 0 seconds, and {_LONGEST:.0f} at most, got"
                    f" {value!r}"
                )
        if authorize is not None and not callable(authorize):
            raise TypeError(f"authorize must be callable, got {authorize!r}")
        if reauthorize is not None and authorize is None:
            raise ValueError("reauthorize needs authorize")
        self.hub = hub
        is_one = len(channels) == 1
        self.channels = channels if is_one else tuple(dict.fromkeys(channels))
        self.tags = frozenset(_check_tags("tags", tags)) or _NO_TAGS
        self.who = who
        self._after = after
        self._on_gap = on_gap
        self._on_lag = on_lag
        self._key = key
        self._throttle = throttle
        self.announcement = hub.announcement(who) if announce else None
        self._authorize = authorize
        self._reauthorize = reauthorize
        self._asked = 0.0
        self._delivered = 0.0
        self._named: tuple[_Cursor, ...] = ()  # of the channels, in their order
        self._turn = 0  # which of them comes first, when there is much
        self._brought: _Brought | None = None  # of patterns
        self._waiter: Wakeable | None = None
        # Read, and not given out; the next is the last.
        self._items: list[Item] | None = None
        self._is_begun = False
        self._is_listed = False  # kicks are listened for, for its sake
        self._watched = 0  # so many of its channels, the first ones
        self._lost: list[str] | None = None  # patterns: what of them, nobody knows
        self._reason: str | None = None
        self._given: str | None = None  # the request's Last-Event-ID
        self.has_patterns = any(is_pattern(name) for name in self.channels)
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
            and self._key is None
            and self._throttle is None
            and self._reauthorize is None
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
        with self.hub._lock:
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
        with self.hub._lock:
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
            self._given = _composite([c.name for c in named], [c.last for c in named])
        self._is_begun = self._is_listed = False
        self._named, self._brought, self._waiter, self._watched = (), None, None, 0

    def __del__(self) -> None:
        # Maybe in the midst of anything: see `Hub._dropped`.
        if getattr(self, "_is_begun", False):
            self._is_begun = False
            watched = self.channels[: self._watched]
            self.hub.drop(self, watched, self._announced(), self._is_listed)

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
        return self._is_simple and self._key is None and self._throttle is None

    @property
    def kind(self) -> tuple[Hashable, ...]:
        """What plain ones have in common that may be sent the same bytes."""
        (cursor,) = self._named
        on_gap = "apart" if callable(self._on_gap) else self._on_gap
        return cursor.record, self.tags, self._on_lag, on_gap

    @property
    def has_user_code(self) -> bool:
        """To read it may call what the application has given."""
        return self._key is not None or (
            callable(self._on_gap) and self._on_gap is not _read_apart
        )

    @property
    def ask_again_at(self) -> float:
        """When `authorize` is to be asked again, `time.monotonic`; maybe never."""
        if self._reauthorize is None:
            return math.inf
        return self._asked + self._reauthorize

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
            self.hub,
            self.channels,
            after="now",
            on_gap=_read_apart if callable(self._on_gap) else self._on_gap,
            on_lag=self._on_lag,
            key=None,
            throttle=None,
            tags=self.tags,
            who=None,
            announce=False,
            authorize=None,
            reauthorize=None,
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
            and -1 != mine.position == theirs.position
            and not (mine.is_late() or theirs.is_late())
        )

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
        with self.hub._lock:
            if cursor.position < window.first and cursor.last:
                place = window.after(cursor.last)
                cursor.position = -1 if place is None else place
            position = cursor.position
            if position < window.first or self._reason is not None:
                return None
            while cursor.position < window.end:
                position = cursor.position
                if record.tagged >= position or cursor.is_late():
                    entries, end = cursor.read(READ)
                    ours = [e.wire for e in entries if self._is_for_us(e)]
                    chunk, count = b"".join(ours), len(ours)
                else:
                    end, chunk = window.joined(position)
                    count = end - position
                cursor.position = end
                is_all = end == window.end
                cursor.last = window.head if is_all else window.entry(end - 1).id
                cursor.is_begun, cursor.start = True, ""
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
        self.hub._delivered += events

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
        scope: Any = current_scope()
        # It is what the first one in a stream has sent: of others it says nothing.
        if scope is not None and not getattr(scope, "has_resumed", False):
            # Kept: where the broker is down, it is tried again, maybe elsewhere.
            # An empty one is a first connection's.
            self._given = getattr(scope, "last_event_id", None) or None
        if getattr(scope, "is_multiprocess", False):
            self.hub.warn_of_processes()
        self._named, self._turn, self._lost = (), 0, None
        self._brought = _Brought() if self.has_patterns else None
        self.hub.enter(self)
        try:
            if self.is_nameable:
                self._is_listed = True
                self.hub.enlist(self)
            # From here on a kick finds it: what changes after a yes does not escape.
            self.check_allowed()
            self._check_open()
            self.hub.hear_presence()
            self._begin_channels(self._given)
        except BaseException as error:
            self._leave(has_joined=False)
            self._end_if_denied(error)
            raise
        if scope is not None:
            scope.has_resumed = True
        with self.hub._lock:
            if self.hub._is_closed and self._reason is None:
                self._reason = "closed"
            self._is_begun = self._reason is None
        if self._reason is not None:
            self._leave(has_joined=False)
            raise Closed(self._reason)
        # A generator that ends may be long in letting go of us.
        if not is_owned and hasattr(scope, "on_close"):
            scope.on_close(partial(_close, weakref.ref(self)))
        self.hub.announce(self._announced(), self.announcement, "join")

    def _begin_channels(self, given: str | None) -> None:
        places = self._places(given)
        if places is None and self._after not in ("now", "start"):
            places = self._places(self._after) if isinstance(self._after, str) else None
        named: list[_Cursor] = []
        for name in self.channels:
            self._watched += 1
            record = self.hub.watch(name)
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
        hashes = {_hash(name): name for name in self.channels}
        places = {}
        for part in given[:_MAX_ID].split(","):
            short, _, id = part.partition(".")
            if short in hashes:
                places[hashes[short]] = id
        return places

    def _cursor(
        self, name: str, record: _Channel, places: dict[str, str] | None
    ) -> _Cursor:
        if places is not None:
            # Whatever it says, it comes from outside.
            id = places.get(name, "")
            return _Cursor(name, record, id if _is_id(id) else "")
        if self._after == "now":
            head = self.hub.read(name, None).head
            return _Cursor(name, record, head, is_begun=True)
        count = self._after if isinstance(self._after, int) else None
        last, head = self._oldest(name, count)
        return _Cursor(name, record, last, start=head)

    def _oldest(self, name: str, count: int | None) -> tuple[str, str]:
        """Return the id before the oldest of a channel's entries, and its head's.

        Args:
            count: Of so many of its newest; ``None`` for all that are kept.
        """
        read = self.hub.read
        if count is None:
            page = read(name, START, 1)
            return page.entries[0].prev if page.entries else page.head, page.head
        count = min(count, _MOST_KEPT)
        if callable(getattr(self.hub.broker, "newest", None)):
            return self.hub.newest(name, count)
        page = read(name, START, READ)
        head = page.head
        oldest = page.entries[0].prev if page.entries else head
        before: deque[str] = deque(maxlen=count)  # each of the newest
        # More may come faster than they are read: only up to the head of now.
        while page.entries:
            for entry in page.entries:
                before.append(entry.prev)
                if entry.id == head:
                    return before[0], head
            last = page.entries[-1].id
            page = read(name, last, READ)
            if page.complete:
                continue
            is_anew = page.entries and page.entries[0].prev == oldest
            # Those were dropped meanwhile, and maybe all; or one of them was removed.
            if is_anew or not self._is_kept(name, last):
                before.clear()
                if is_anew or not read(name, head, 1).complete:
                    break
                oldest = page.entries[0].prev if page.entries else head
        return before[0] if before else head, head

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
                    items, pause = [], random.uniform(0.5, 1.5) * RETRY
                if items:
                    self._delivered = time.monotonic()
                    self.hub._delivered += len(items)
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
        if self._throttle is None:
            return 0.0
        return max(0.0, self._delivered + self._throttle - time.monotonic())

    def _left(self, deadline: float | None, pause: float) -> float | None:
        ends = []
        now = time.monotonic()
        if deadline is not None:
            ends.append(deadline - now)
        if pause:
            ends.append(pause)
        if self._reauthorize is not None:
            ends.append(self._asked + self._reauthorize - now)
        return max(0.0, min(ends)) if ends else None

    def _register(self, waiter: Wakeable) -> bool:
        """Have the waiter woken by what is new; ``False`` if something is there."""
        with self.hub._lock:
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
        places: list[tuple[_Cursor, tuple[Any, ...]]] = []
        try:
            while self._lost:
                lost.append(self._lost.pop(0))
                items += self._lost_items(lost[-1])
            while self._brought is not None and self._brought.overheard:
                overheard.append(self._brought.overheard.popleft())
                items.append(_overheard_item(*overheard[-1]))
            size = 0
            for cursor in self._turns():
                places.append((cursor, cursor.place()))
                try:
                    if self._key is not None:
                        items += self._latest(cursor)
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
            # Of `key`, `on_gap`, the broker, or from outside. Nothing was given out:
            # the next read begins where this one did, with the one after this.
            with self.hub._lock:
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

    def _turns(self) -> Sequence[_Cursor]:
        """Return the cursors that may have something new, in their order.

        Who was not reached the last time comes first: a busy channel holds up none.
        """
        brought, named, turn = self._brought, self._named, self._turn
        if brought is None:
            return named if not turn else (*named[turn:], *named[:turn])
        hub = self.hub
        with hub._lock:
            news, brought.news = brought.news, {}
            for channel, prev in news.items():
                cursor = brought.cursors.get(channel)
                record = hub.record(channel)
                if cursor is None:
                    cursor = _Cursor(channel, record, prev, is_begun=True)
                    cursor.since = sys.maxsize
                    brought.cursors[channel] = cursor
                elif cursor.record is not record:
                    cursor.record, cursor.position, cursor.seen = record, -1, -1
                brought.behind[channel] = cursor
            if len(brought.cursors) > brought.room:
                # Of a channel that is idle the next event is a first one again.
                brought.cursors = {
                    name: cursor
                    for name, cursor in brought.cursors.items()
                    if name in brought.behind
                    or hub._channels.get(name) is cursor.record
                }
                brought.room = 2 * len(brought.cursors) + 64
            behind = islice(brought.behind.values(), READ)
            return [*named[turn:], *behind, *named[:turn]]

    def _end_turns(self, had: Sequence[_Cursor]) -> None:
        """Take note of who had a turn: the next is whoever comes after the last."""
        if self._is_simple or not had:
            return
        brought, last = self._brought, had[-1]
        self._turn = next((n for n, c in enumerate(self._named, 1) if c is last), 0)
        if brought is None:
            return
        with self.hub._lock:
            for cursor in had:
                is_behind = brought.behind.pop(cursor.name, None) is not None
                if is_behind and not cursor.is_at_end():
                    brought.behind[cursor.name] = cursor

    def _take_from(self, cursor: _Cursor) -> list[Item]:
        """Return what follows a cursor: entries of anybody's, and resets."""
        window = cursor.record.log
        with self.hub._lock:
            if cursor.position < window.first:
                place = window.after(cursor.last) if cursor.last else None
                cursor.position = -1 if place is None else place
            if cursor.position >= 0:
                entries, end = cursor.read(READ)
                if end > cursor.position:
                    cursor.position, cursor.last = end, window.entry(end - 1).id
                cursor.is_begun, cursor.start = True, ""
                if entries or not cursor.record.is_doubtful:
                    return [(cursor, entry) for entry in entries]
            end, limit = window.end, cursor.record.limit
        page = self.hub.read(cursor.name, cursor.last or _NOWHERE, limit)
        entries = first_part(page.entries)
        if len(entries) < len(page.entries):
            cursor.record.limit = len(entries)
        elif len(entries) == limit < READ:
            cursor.record.limit = min(2 * limit, READ)
        last = entries[-1].id if entries else page.head
        cursor.seen = end if last == page.head else -1
        if cursor.record.is_doubtful:
            self._settle(cursor, page.head, end)
        if entries or not page.complete:  # it goes elsewhere
            cursor.position = -1
        items = self._chained(cursor, page, entries)
        cursor.is_begun, cursor.start = True, ""
        return items

    def _chained(
        self, cursor: _Cursor, page: Page, entries: Sequence[Entry]
    ) -> list[Item]:
        """Return a page's entries, and a reset wherever the chain is broken.

        What was removed, or is no event, shows there; the cursor goes past it.
        """
        is_replay = self._on_gap == "replay"
        reason = "unknown"
        # What the next entry must name; `None` where something is missing for certain.
        last: str | None = cursor.last
        if not page.complete:
            following = self._following(cursor, page, entries)
            if following is not None:
                entries = following
            elif self._is_only_older(cursor):
                last = cursor.sent = entries[0].prev if entries else page.head
            else:
                last = None
                if (cursor.is_begun or cursor.start) and not self._is_kept(
                    cursor.name, cursor.last
                ):
                    reason = "lagged"
        items: list[Item] = []
        for entry in entries:
            problem = flaw(entry)
            if problem is not None:
                self.hub.drop_malformed(cursor.name, problem)
                last = None
                continue
            if entry.prev != last:
                if not is_replay:
                    last = None
                    break
                items += self._reset(cursor, reason, entry.prev)
                reason = "unknown"
            items.append((cursor, entry))
            last = entry.id
        if last is None:  # what follows is not to be given out, or has not come yet
            is_past = is_replay and bool(entries) and _is_id(entries[-1].id)
            last = entries[-1].id if is_past else page.head
            if not is_replay:
                cursor.seen = -1  # more may have come
            items += self._reset(cursor, reason, last)
        cursor.last = last
        return items

    def _following(
        self, cursor: _Cursor, page: Page, entries: Sequence[Entry]
    ) -> Sequence[Entry] | None:
        """Return what follows an id that was removed, if something names it."""
        if cursor.last in ("", START):
            return None
        while entries:
            for place, entry in enumerate(entries):
                if entry.prev == cursor.last:
                    return entries[place:]
            # Of so many of the newest the first may come after the first page.
            if not (cursor.start and isinstance(self._after, int)):
                break
            last = entries[-1].id
            if last == page.head:
                break
            page = self.hub.read(cursor.name, last, READ)
            if not page.complete and not self._is_kept(cursor.name, last):
                break  # it has been trimmed meanwhile, and is read from the oldest on
            entries = first_part(page.entries)
            cursor.seen = -1  # more may have come
        return None

    def _is_kept(self, name: str, last: str) -> bool:
        """Tell whether an event is kept, though its next is not.

        Then that was removed, and nobody was too slow: only the oldest are trimmed.
        What follows an id that is not kept begins with the oldest.
        """
        for _ in range(3):  # what is trimmed meanwhile proves nothing
            oldest, after, still = (
                [entry.id for entry in self.hub.read(name, id, 1).entries]
                for id in (START, last or _NOWHERE, START)
            )
            if not oldest or after == oldest:
                return False
            if oldest == still:
                return True
        return False

    def _is_only_older(self, cursor: _Cursor) -> bool:
        """Tell whether what was trimmed had come before the cursor began.

        "All that is kept" and "the newest" are less on a busy channel by the time
        when they are read. That is no gap, as long as nothing newer is missing.
        """
        if not cursor.start:
            return False
        return self.hub.read(cursor.name, cursor.start, 1).complete

    def _settle(self, cursor: _Cursor, head: str, end: int) -> None:
        """Put an end to a window's doubts, if it is as it was."""
        record = cursor.record
        with self.hub._lock:
            if record.log.end == end:
                record.is_doubtful = False
                if record.log.head != head:
                    wake_all(self.hub.restart(record, head))

    def _lost_items(self, name: str) -> list[Item]:
        """Return the reset of a pattern; its cursor stands for all its channels."""
        cursor = _Cursor(name, _Channel(), _NOWHERE, is_begun=True)
        return self._reset(cursor, "unknown", _NOWHERE)

    def _reset(self, cursor: _Cursor, reason: str, before: str) -> list[Item]:
        """Return a reset and a snapshot, after which what follows an id follows."""
        if reason == "lagged" and self._on_lag == "drop":
            self.close("lagged")
            raise Closed("lagged")
        snapshot: list[Event] = []
        if callable(self._on_gap):
            snapshot = [self._snapshot(item) for item in self._on_gap()]
        # Who is cut off within a snapshot needs all of it.
        id = _NOWHERE if snapshot else before
        items: list[Item] = [(cursor, _gap(cursor.name, reason, id))]
        if snapshot:
            *most, last = snapshot
            items += [(cursor, event) for event in most]
            last = Event(last.data, event=last.event, retry=last.retry, id=before)
            items.append((cursor, last))
        return items

    def _snapshot(self, item: Any) -> Event:
        event = item if isinstance(item, Event) else self.hub._event(item, None, None)
        if event.id is not None:
            raise ValueError("a snapshot's events must have no id")
        if event.data is None:
            raise ValueError("a snapshot's events must have data")
        data = event.data  # text, in the end, as what a broker has
        if isinstance(data, (bytes, bytearray)):
            data = data.decode()
        return self.hub._event(data, event.event, event.retry)

    def _is_for_us(self, entry: Entry) -> bool:
        if entry.payload[:1] != b"\0":
            return True
        tags = json.loads(entry.tags)
        only, exclude = tags.get("only"), tags.get("exclude")
        if only is not None and self.tags.isdisjoint(only):
            return False
        return exclude is None or self.tags.isdisjoint(exclude)

    def _latest(self, cursor: _Cursor) -> list[Item]:
        """Return the newest of each key, and gaps, of all that is there by now.

        Not of what comes meanwhile: it may come as fast as it is read.
        """
        assert self._key is not None
        with self.hub._lock:
            end, head = cursor.record.log.end, cursor.record.log.head
            is_known = head and not cursor.record.is_doubtful
        if not is_known:
            head = self.hub.read(cursor.name, None).head
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
                (event,) = _decoder().feed(entry.wire)
                key = self._key(event)
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

    def _id(self, cursor: _Cursor, id: str) -> str:
        """Return the id under which a client comes back that has got this one.

        The other channels' are what it has got of them, not what was read. Patterns
        have none: who comes back to one gets a reset.
        """
        if self._is_simple:
            return id
        cursor.sent = id
        named = self._named
        return _composite([c.name for c in named], [c.sent for c in named]) or id

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
        decoder = _decoder()
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
        if self._authorize is None or time.monotonic() < self._ask_at:
            return
        watcher = watch()
        denied = partial(_unanswered, weakref.ref(self), current_scope(), watcher)
        timer = watcher.call_at(time.monotonic() + ANSWER, denied)
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
        assert self._authorize is not None
        now = time.monotonic()
        is_allowed: Any = self._authorize(self)
        # Those are true, whatever would come of them: what is to be awaited, a
        # generator, a method that was not called.
        if isinstance(is_allowed, (Awaitable, Iterator)) or callable(is_allowed):
            if isinstance(is_allowed, Coroutine):
                is_allowed.close()
            raise TypeError(
                f"authorize must be a plain function that returns bool, got"
                f" {self._authorize!r}, which has returned"
                f" {type(is_allowed).__name__}"
            )
        self._asked = now
        if not is_allowed:
            self.close("denied")

    def _leave(self, has_joined: bool = True) -> None:
        self.hub.leave(self)
        self.withdraw()
        watched, self._watched = self.channels[: self._watched], 0
        for name in watched:
            self.hub.unwatch(name)
        was_listed, self._is_listed = self._is_listed, False
        if was_listed:
            self.hub.unlist()
        if has_joined:
            self.hub.announce(self._announced(), self.announcement, "leave")

    def _announced(self) -> list[str]:
        """Return the channels that are told who comes and goes."""
        names = () if self.announcement is None else self.channels
        return [name for name in names if not is_pattern(name)]


def _decoder() -> sse.Decoder:
    """Return one for an event of the broker's, which may be as large as it takes."""
    return sse.Decoder(max_line=None, max_event=None)


def _overheard_item(channel: str, fields: bytes) -> Item:
    """Return who came to a pattern's channel, or went; it has no place there."""
    cursor = _Cursor(channel, _Channel(), _NOWHERE)
    return cursor, Entry(_NOWHERE, _NOWHERE, fields)


def _unanswered(
    reference: weakref.ref[Subscription], scope: Any, watcher: Watch
) -> None:
    """End one whose `authorize` has not answered in time; in its watch."""
    subscription = reference()
    if subscription is None:
        return
    text = "authorize of %r has not answered in %g seconds: it is denied"
    say(log, logging.WARNING, text, subscription.channels, ANSWER)
    # Elsewhere: who waits for the watch is not to wait for a broker.
    elsewhere(watcher, partial(subscription.close, "denied"))
    if hasattr(scope, "abandon"):
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
        record, hub = cursor.record, subscription.hub
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
                with hub._lock:
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
                            if waiter.hub is not None and not record.is_doubtful:
                                # Now: it takes the lock once for each event. (Threads
                                # may run before all of a batch has come.)
                                record.waiters[waiter] = None
                                self._is_registered = True
                        else:
                            cursor.last = window.entry(end - 1).id
                        count = end - position
                        self.events += count
                        hub._delivered += count
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


def _composite(names: Iterable[str], ids: Iterable[str]) -> str:
    """Return one id for several channels; `Subscription._places` takes it apart."""
    pairs = zip(names, ids, strict=True)
    return ",".join(f"{_hash(name)}.{id}" for name, id in pairs)


def _hash(name: str) -> str:
    # So long that no two names have the same, not even of who looks for such.
    return hashlib.blake2b(name.encode(), digest_size=10).hexdigest()


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()  # for their children


def _forked() -> None:
    for hub in tuple(_hubs):
        hub.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
