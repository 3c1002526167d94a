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

import logging
import math
import weakref
from collections.abc import (
    Callable,
    Hashable,
    Iterable,
)
from typing import Any

from ..brokers import open_broker, shown
from ..brokers.contract import Broker, check_bounds
from ..brokers.names import NAME, check_name
from ..errors import (
    BrokerError,
    Unavailable,
    Uncertain,
)
from ..protocol.json import Dumps
from ..protocol.sse import Event
from ..runtime.process import process
from . import limits
from .control import Kick
from .ids import composite
from .options import Authorize, Options
from .payloads import Payloads
from .sink import HubSink
from .subscribers import Subscribers
from .subscription import Subscription
from .tags import check_tags, tag_prefix
from .windows import Windows

__all__ = ["Hub"]

log = logging.getLogger("syncstream.hub")
_DEFAULT: Any = object()  # an argument that was not given
_ANYBODY: Any = object()  # `who` was not given


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

    Attributes:
        broker: What stores the events.
        sink: What the broker tells; for tests of brokers.
        windows, subscribers, payloads: Its parts, which are no public API.

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
        check_bounds(capacity, max_age)
        if not isinstance(max_payload, int) or isinstance(max_payload, bool):
            raise TypeError(f"max_payload must be int, got {max_payload!r}")
        if not 1 <= max_payload <= limits.MOST_PAYLOAD:
            raise ValueError(
                f"max_payload must be 1 to {limits.MOST_PAYLOAD}, got {max_payload!r}"
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
        self.payloads = Payloads(dumps, max_payload)
        self.windows = Windows(broker, math.inf if max_age is None else max_age)
        self.subscribers = Subscribers(self.windows, self.payloads)
        self.sink = HubSink(self.subscribers)
        _hubs.add(self)
        self._warn_of_many()
        broker.attach(self.sink)

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
            connection: A database's: the event is stored if its transaction commits.
                For ``postgresql:``; ``memory:`` takes it, too, and can follow Django's
                transactions. Other brokers refuse it.

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
            item = self.payloads.event(data, event, retry)
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
        self._check_open("publish")
        check_name(channel)
        prefix = tag_prefix(only, exclude)
        encoded = self.payloads.encoded
        batch = [(channel, prefix + encoded(item)) for item in items]
        for _, payload in batch:
            self.payloads.check_size(payload)
        self.subscribers.clear()
        ids = self.broker.publish(batch, connection=connection) if batch else []
        self.windows.published += len(ids)
        return ids

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.windows.is_closed

    def _check_open(self, what: str) -> None:
        if self.windows.is_closed:
            raise ValueError(f"{what} after close()")

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
        self._check_open("subscribe")
        options = Options(
            after=after,
            on_gap=on_gap,
            conflate=conflate,
            throttle=throttle,
            authorize=authorize,
        )
        return Subscription(
            self.subscribers, channels, options, tags=tags, who=who, announce=announce
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

    def head(self, *channels: str) -> str:
        """Return the id of a channel's newest event; of several, one for all.

        For the page that is rendered before its stream opens: ``after=`` that id, or
        ``?lastEventId=``, and nothing is missed in between.

        Args:
            channels: As for `subscribe`, but names only, and the same ones: an id of
                two channels is not one of the first alone.
        """
        self._check_open("head")
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
        self.subscribers.clear()
        return [s.who for s in self.subscribers.all() if s.hears(channel)]

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
            return self.subscribers.end_where(predicate)
        if who is None or (who is _ANYBODY and tags is None):
            raise ValueError("who or tags must be given, or a predicate")
        self._check_open("kick")
        kick = Kick(
            None if who is _ANYBODY else self.payloads.name_of(who),
            None if tags is None else check_tags("tags", tags),
        )
        if kick.who == "null":  # as JSON it would be all who have no name
            raise ValueError(f"who must not be null as JSON, got {who!r}")
        if kick.tags == []:
            return 0
        self.payloads.check_size(kick.encoded(""))
        count, told = 0, None
        try:
            count = self.subscribers.end(kick)
        finally:  # whatever has failed here
            try:
                self.subscribers.control.tell(kick)
            except BrokerError as error:
                told = error
        if told is not None:
            kind = type(told) if isinstance(told, Unavailable) else Uncertain
            raise kind(
                f"{count} were ended in this process, and those of others may go on:"
                f" {told}"
            ) from told
        return count

    def stats(self) -> dict[str, Any]:
        """Return counts: of this process, and since it began.

        Returns:
            ``{"subscribers": 12, "channels": 3, "entries": 120, "bytes": 40320,
            "published": 1000, "delivered": 12000, "up": True}``; channels, entries
            and bytes are those of the windows that it keeps.
        """
        self.subscribers.clear()
        windows = self.windows
        with windows.lock:
            logs = [channel.log for channel in windows.channels.values()]
            return {
                "subscribers": len(windows.open),
                "channels": len(logs),
                "entries": sum(len(log) for log in logs),
                "bytes": windows.budget.size,
                "published": windows.published,
                "delivered": windows.delivered,
                "up": windows.is_up,
            }

    def close(self) -> None:
        """End all subscriptions, and the broker."""
        if self.windows.is_closed:
            return
        self.windows.is_closed = True
        for subscription in self.subscribers.all():
            subscription.close("closed")
        self.broker.close()


_hubs: weakref.WeakSet[Hub] = weakref.WeakSet()  # those of this process
