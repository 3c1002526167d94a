"""`Hub`: publish to channels, subscribe to them, resume.

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
import json
import logging
import math
import os
import weakref
from collections import OrderedDict, deque
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
    Sequence,
)
from functools import partial
from typing import Any

from ..brokers import open_broker, shown
from ..brokers.contract import Broker
from ..brokers.log import Entry, Page, flaw
from ..brokers.names import NAME, check_name, is_name, is_pattern, patterns_of
from ..errors import (
    BrokerError,
    Closed,
    Denied,
    PayloadTooLarge,
    Unavailable,
    Uncertain,
)
from ..protocol.json import Dumps, dumps_or_default
from ..protocol.sse import Event
from ..runtime.clock import time
from ..runtime.process import process
from ..runtime.sockets import native
from ..runtime.waiter import Wakeable, wake_all
from ..runtime.waiting import say
from . import limits
from .control import CONTROL, Control, Kick, attempt
from .cursor import composite
from .gap import GAP_EVENT
from .presence import PRESENCE
from .presence import decoded as decoded_presence
from .presence import encoded as encoded_presence
from .subscription import Authorize, Subscription
from .tags import check_tags, tag_prefix
from .windows import Channel

__all__ = ["Hub"]

log = logging.getLogger("syncstream.hub")
_DEFAULT: Any = object()  # an argument that was not given
_ANYBODY: Any = object()  # `who` was not given


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
            ("capacity", capacity, limits.MOST_KEPT),
            ("max_payload", max_payload, limits.MOST_PAYLOAD),
        ):
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name} must be int, got {number!r}")
            if not 1 <= number <= most:
                raise ValueError(f"{name} must be 1 to {most}, got {number!r}")
        if max_age is not None:
            if not isinstance(max_age, (int, float)) or isinstance(max_age, bool):
                raise TypeError(f"max_age must be seconds or None, got {max_age!r}")
            if not 0 < max_age <= limits.LONGEST:
                raise ValueError(
                    f"max_age must be above 0, and {limits.LONGEST:.0f} seconds at"
                    f" most, or None for no limit, got {max_age!r}"
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
        self._channels: dict[str, Channel] = {}
        # Those whose windows hold something, the one first that was not written to
        # for longest; and what they hold together.
        self._filled: OrderedDict[Channel, None] = OrderedDict()
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
        self._told_presence: deque[str] = deque(maxlen=limits.WINDOW)  # ids: not twice
        self._is_closed = False
        self._said: dict[tuple[str, str], float] = {}
        self._swept = time.monotonic()
        self._control = Control(self)
        self._crowd = limits.CROWD  # so many windows are looked through at once
        _hubs.add(self)
        self._warn_of_many()
        broker.attach(_Ear(self))

    def _warn_of_many(self) -> None:
        """Say, once, that hubs are made by the dozen: for each call, maybe."""
        if self._url is None:
            return
        if sum(hub._url == self._url for hub in list(_hubs)) > limits.MANY:
            process().warn_once(
                log,
                f"more than {limits.MANY} hubs of one {shown(self._url)} are in use:"
                " make one for the whole application, each has connections and threads",
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
        check_name(channel)
        prefix = tag_prefix(only, exclude)
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
        conflate: Callable[[Event], Hashable] | None = None,
        throttle: float | None = None,
        tags: Iterable[str] = (),
        who: Any = None,
        announce: bool = False,
        authorize: Authorize | tuple[Authorize, float] | None = None,
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
            conflate: Returns an event's key, a price's symbol for one: of all events
                that are waiting when it is read, only the newest of each key is
                delivered. ``None``: all are. What it raises `read` raises, and
                reads the same once more.
            throttle: Seconds between two deliveries, at least.
            tags: What `publish` may select it by.
            who: What `presence` shows of it; a user's name, say.
            announce: Tell those who are there, by "join" and "leave" events in its
                channels, with ``who`` as it is now; not in those of a pattern. They
                are not kept, and have the id of the event before them.
            authorize: A function, called when the subscription is first read; or
                ``(function, 60)``, which is called again every 60 seconds. When it
                returns false, or has not answered within 5 seconds (`ANSWER`), the
                stream ends ("denied"), and a late answer changes nothing. What it
                raises `read` raises, and nothing is read. A plain function: an answer
                that is to be awaited, iterated or called is an error.

        Raises:
            TypeError, ValueError: An argument is not what it should be.
        """
        self.check_open("subscribe")
        return Subscription(
            self,
            channels,
            after=after,
            on_gap=on_gap,
            conflate=conflate,
            throttle=throttle,
            tags=tags,
            who=who,
            announce=announce,
            authorize=authorize,
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
            if not NAME.fullmatch(str(level)) or ":" in str(level):
                raise ValueError(
                    "a channel's level must be text without white space, :, * and #,"
                    f" got {level!r}"
                )
        name = ":".join(map(str, levels))
        check_name(name)
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
            check_name(name)
        heads = [self.broker.read(name, None).head for name in names]
        return heads[0] if len(names) == 1 else composite(names, heads)

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
            None if tags is None else check_tags("tags", tags),
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
                if not is_name(channel):
                    self.drop_malformed(channel, "it is in no channel of ours")
                    return
                self._forget_idle(time.monotonic(), is_watched=False)
                record = self._channels[channel] = Channel()
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

    def _trim(self, record: Channel, now: float) -> None:
        """Keep a window within its bounds, and all of them, under the lock."""
        record.log.trim(limits.WINDOW, now - self._max_age, limits.WINDOW_SIZE)
        self._count(record)
        self._filled.move_to_end(record)
        while self._size > limits.BUDGET:
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
        if not is_name(channel):
            self.drop_malformed(PRESENCE, "it tells of no channel of ours")
            return
        waiters: dict[Wakeable, None] = {}
        record = self._channels.get(channel)
        if record is not None and record.subscriptions:
            if record.log.head:
                self._set_aside(record, fields, entry.time)
                self._trim(record, entry.time)
            else:
                record.held = (*record.held, fields)[-limits.WINDOW :]
            waiters, record.waiters = record.waiters, {}
        for subscription in dict.fromkeys(self._listening(channel)):
            waiters |= subscription.overhear(channel, fields)
        wake_all(waiters)

    def _begin_window(self, record: Channel, head: str) -> None:
        """Let a window begin anew after an id, under the lock."""
        record.log.restart(head)
        if head:
            held, record.held = record.held, ()
            for fields in held:
                self._set_aside(record, fields, time.monotonic())
        self._count(record)

    def _set_aside(self, record: Channel, fields: bytes, now: float) -> None:
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

    def _count(self, record: Channel) -> None:
        """Take note of a window's size, under the lock, after any change of it."""
        size = record.log.size
        if size and not record.counted:
            self._filled[record] = None
        elif record.counted and not size:
            del self._filled[record]
        self._size += size - record.counted
        record.counted = size

    def _empty(self, record: Channel) -> None:
        """Drop a window's entries; who is behind reads them from the broker."""
        record.log.trim(0, float("-inf"), float("inf"))
        self._count(record)

    def restart(self, record: Channel, head: str) -> dict[Wakeable, None]:
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
            if len(self._said) >= limits.MOST_SAID:
                self._said = {
                    k: at for k, at in self._said.items() if now - at < limits.SAID
                }
            at = self._said.get((name, text), -math.inf)
            is_full = len(self._said) >= limits.MOST_SAID and name not in (
                CONTROL,
                PRESENCE,
            )
            if now - at < limits.SAID or is_full:
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

    def watch(self, name: str) -> Channel | None:
        """Have the broker tell of a channel, or of those that match a pattern."""
        record = None
        with self._lock:
            if is_pattern(name):
                self._patterns[name] = self._patterns.get(name, 0) + 1
            else:
                record = self._channels.setdefault(name, Channel())
                record.subscriptions += 1
                since = time.monotonic() - self._max_age
                record.log.trim(limits.WINDOW, since, limits.WINDOW_SIZE)
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
        if now - self._swept < limits.IDLE / 4 and len(self._channels) < self._crowd:
            return []
        self._swept = now
        idle = [
            (name, record)
            for name, record in self._channels.items()
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
            del self._channels[name]
            self._empty(record)  # a pattern's subscription may hold it
        count = len(self._channels)
        self._crowd = count + max(limits.CROWD, count // 2)
        return [name for name, record in dropped if record.is_watched]

    def record(self, name: str) -> Channel:
        with self._lock:
            return self._channels.setdefault(name, Channel())


def _alive(
    subscriptions: dict[int, weakref.ref[Subscription]],
) -> list[Subscription]:
    found = [reference() for reference in list(subscriptions.values())]
    return [s for s in found if s is not None]


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()  # for their children


def _forked() -> None:
    for hub in tuple(_hubs):
        hub.begin_anew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
